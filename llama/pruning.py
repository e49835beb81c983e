"""Pruning: the weights that matter least become zeros, or the weakest hidden units or heads are taken out.

    model = cut(model, "magnitude", 0.5, model.args, tokens)     # half of each row of each matrix is zero from now on,
    ...                                                          # whatever optimizer trains the rest
    remove_masks(model)                  # plain layers again; the checkpoint is a dense one that any loader takes

    model = cut(model, "dimensions", 0.5, model.args, tokens)    # half of the hidden units: smaller, faster everywhere
    model = cut(model, "heads", 0.5, model.args, tokens)         # half of the key/value heads, with their query heads

What a weight adds to an output is its product with an input. So weights are compared by |w| times the root mean square
of that input over some text (Wanda, Sun et al. 2023), units and heads by the mean square of what they add to the
residual stream. Without a text all inputs count as 1, which leaves the norms of the weights (Han et al. 2015; Li et al.
2017): far worse on a model in which some activations are large and others are not.

Magnitude pruning saves nothing by itself: a dense product multiplies with zeros as fast as with anything else. It says
how many weights a model needs. Taking out units removes rows of w1 and w3 and columns of w2, and params.json describes
what is left in Meta's own fields. Taking out heads removes rows of wq, wk and wv and columns of wo, and of the KV cache
their share; params.json then has a field of ours, head_dim, since Meta's derives it from the number of heads.

`gradually` cuts a little at a time with some fine-tuning after each cut (training/step.py has a `fine_tune`).

Left out on purpose: embedding, head and norms. A row of the table is a token, and a rare token is still
needed; a norm has a millionth of the weights. Residual dimensions: each is a row or column of every matrix and of the
table and enters every norm, so that one cut damages the whole network at once, where a hidden unit is one term of a
sum. Single query heads: those of a key/value head read the same keys, and grouped attention takes as many for each.
Layers: what is compared here stands in one layer. Gradients (Molchanov et al. 2019): on SmolLM2-135M, without
fine-tuning, no better than inputs for weights and units at three shares each, and for heads at one of two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from llama.config import ModelArgs
from llama.errors import InputError
from llama.model import Transformer, TransformerBlock
from llama.surgery import plain_linear, replace_modules

UNITS = 32  # kept hidden units are a multiple of this: the tiles of the kernels
PARTS = {"dimensions": ("hidden units", "ffn_dim", UNITS), "heads": ("key/value heads", "n_kv_heads", 1)}
METHODS = ("magnitude", *PARTS)  # what the others take out: its name, field of ModelArgs, and how many go together
SPARSE = 0.01  # a share of zeros that only pruning gives; every large model in 16 bits has some


class _OnlyKept(Function):
    """A weight as it is; its gradient is zero where it is pruned. No copy is made."""

    @staticmethod
    def forward(ctx, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.masked_fill(~ctx.saved_tensors[0], 0), None


class MaskedLinear(nn.Module):
    """A linear layer whose pruned weights are zero and stay zero; `weight` keeps its name and its dtype.

    `mask` (bool, True where a weight is kept) is part of the state, so that a snapshot holds it. A pruned weight has no
    gradient, so it gathers no momentum, and weight decay of zero is zero: no optimizer that is made after the mask
    moves it.
    """

    def __init__(self, weight: nn.Parameter, mask: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("mask", mask)
        with torch.no_grad():
            weight.masked_fill_(~mask, 0)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _OnlyKept.apply(self.weight, self.mask))


def projections(model: nn.Module) -> dict[str, nn.Module]:
    """The matrices that are pruned, by name: wq, wk, wv, wo, w1, w2, w3 of every block."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith("layers.") and isinstance(module, (nn.Linear, MaskedLinear))
    }


def count_zeros(model: nn.Module) -> tuple[int, int]:
    """Weights that are exactly zero, and all weights, of the matrices that are pruned."""
    weights = [module.weight for module in projections(model).values()]
    return sum((weight == 0).sum().item() for weight in weights), sum(weight.numel() for weight in weights)


@torch.no_grad()
def input_powers(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """Mean square of each input of each matrix over the tokens [S, T], by the matrix's name: fp32 [in_features]."""
    powers: dict[str, Tensor] = {}

    def note(name: str, _module: nn.Module, inputs: tuple[Tensor]) -> None:
        power = inputs[0].flatten(0, -2).float().square().sum(0) / tokens.numel()
        powers[name] = powers.get(name, 0) + power

    hooks = [module.register_forward_pre_hook(partial(note, name)) for name, module in projections(model).items()]
    try:
        for part in tokens.split(1):
            model.hidden(part.to(model.tok_embeddings.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return powers


# Magnitude


@torch.no_grad()
def smallest(size: Tensor, n: int) -> Tensor:
    """True at the `n` smallest of each row, exactly, also where some are equal; size [rows, columns]."""
    chosen = torch.zeros_like(size, dtype=torch.bool)
    return chosen.scatter_(1, size.topk(n, dim=1, largest=False).indices, True)


def zero_smallest(model: Transformer, share: float, powers: Mapping[str, Tensor] | None = None) -> Transformer:
    """Set this share of each row of each matrix, its smallest weights, to zero for good, and return the model.

    powers: see `input_powers`. Zeros that are there already count, and stay, also where they are more than that. Each
    row for itself: what makes the same output is compared, and a row of large weights may feed a gate that is shut.
    """

    def mask_of(name: str, weight: Tensor) -> Tensor:
        size = weight.detach().abs().float()
        if powers is not None:
            size *= powers[name].sqrt()
        return ~smallest(size, round(share * weight.shape[1])) & (weight != 0)

    return _mask(model, mask_of)


def keep_zeros(model: Transformer) -> Transformer:
    """Keep the zeros of a pruned checkpoint zero, and return the model. Raises InputError where it has none."""
    if count_zeros(model)[0] == 0:
        raise InputError("no weight of the model is zero; prune it by magnitude first (compress.py prune)")
    return _mask(model, lambda _, weight: weight != 0)


def _mask(model: Transformer, mask_of: Callable[[str, Tensor], Tensor]) -> Transformer:
    names = {module: name for name, module in projections(model).items()}
    replace_modules(
        model,
        lambda _, module: module in names,
        lambda old: MaskedLinear(old.weight, mask_of(names[old], old.weight)),
    )
    return model


def remove_masks(model: nn.Module) -> nn.Module:
    """Plain linear layers again, with the same weights, zeros included; a model without masks stays as it is."""
    if any(isinstance(module, MaskedLinear) for module in model.modules()):
        replace_modules(
            model, lambda _, module: isinstance(module, MaskedLinear), lambda masked: plain_linear(masked.weight)
        )
    return model


# Dimensions and heads


def kept_count(args: ModelArgs, method: str, share: float) -> int:
    """How many hidden units or key/value heads stay: the possible number next to (1 - share) of all, or the larger."""
    _, field, step = PARTS[method]
    return math.floor(getattr(args, field) * (1 - share) / step + 0.5) * step


@torch.no_grad()
def column_powers(matrix: nn.Module, power: Tensor | None) -> Tensor:
    """Mean square of what each input of a matrix adds to its output, summed over outputs; fp32 [in_features]."""
    powers = matrix.weight.float().square().sum(0)
    return powers if power is None else powers * power


def keep_units(model: Transformer, n_units: int, powers: Mapping[str, Tensor] | None = None) -> Transformer:
    """A model of the `n_units` hidden units of each block that add most to the residual stream, in their old order.

    powers: see `input_powers`. Every block keeps as many, since params.json has one size for all. What is not cut is
    shared with `model`.
    """

    def cuts(block: TransformerBlock, name: str) -> dict[str, tuple[int, Tensor]]:
        name = f"{name}.feed_forward.w2"
        kept = _strongest(column_powers(block.feed_forward.w2, powers and powers[name]), n_units)
        return {"feed_forward.w1": (0, kept), "feed_forward.w3": (0, kept), "feed_forward.w2": (1, kept)}

    return _keep(model, model.args.with_ffn_dim(n_units), cuts)


def keep_heads(model: Transformer, n_kv_heads: int, powers: Mapping[str, Tensor] | None = None) -> Transformer:
    """The same for key/value heads: each goes or stays with the query heads that read it."""
    args = model.args
    queries = args.n_heads // args.n_kv_heads

    def cuts(block: TransformerBlock, name: str) -> dict[str, tuple[int, Tensor]]:
        power = column_powers(block.attention.wo, powers and powers[f"{name}.attention.wo"])
        kept = _strongest(power.view(args.n_kv_heads, -1).sum(1), n_kv_heads)
        of_keys, of_queries = (
            torch.arange(args.n_kv_heads * size, device=kept.device).view(-1, size)[kept].flatten()
            for size in (args.head_dim, queries * args.head_dim)
        )
        found = {"attention.wk": (0, of_keys), "attention.wv": (0, of_keys)}
        return found | {"attention.wq": (0, of_queries), "attention.wo": (1, of_queries)}

    return _keep(model, replace(args, n_heads=n_kv_heads * queries, n_kv_heads=n_kv_heads), cuts)


def _strongest(power: Tensor, n: int) -> Tensor:
    """Indices of the largest, in ascending order."""
    return power.topk(n).indices.sort().values


@torch.no_grad()
def _keep(
    model: Transformer, args: ModelArgs, cuts: Callable[[TransformerBlock, str], dict[str, tuple[int, Tensor]]]
) -> Transformer:
    """A model of shape `args` with the weights of `model`. cuts(block, name): by matrix, which rows or columns stay."""
    with torch.device("meta"):
        smaller = Transformer(args)
    for name, module in model.named_modules():
        for leaf, weight in module.named_parameters(recurse=False):
            setattr(smaller.get_submodule(name), leaf, weight)
    for i, block in enumerate(model.layers):
        for name, (axis, kept) in cuts(block, f"layers.{i}").items():
            weight = block.get_submodule(name).weight
            cut = nn.Parameter(weight.index_select(axis, kept), weight.requires_grad)
            smaller.layers[i].get_submodule(name).weight = cut
    smaller.to(model.tok_embeddings.weight.device)  # the RoPE frequencies, the only thing not there yet
    return smaller.train(model.training)


# All of them


def check(args: ModelArgs, method: str, share: float, rounds: int = 1) -> None:
    """Raise InputError where this share of such a model cannot be cut so."""
    if method not in METHODS:
        raise InputError(f"method={method}: expected one of {', '.join(METHODS)}")
    if not 0 < share < 1:
        raise InputError(f"share={share:g}: expected a number between 0 and 1, such as 0.5")
    if method == "magnitude":
        least = min(args.dim, args.n_heads * args.head_dim, args.ffn_dim)  # weights of the shortest rows
        if not 0 < round(share * least) < least:
            left = "none" if share > 0.5 else "all"
            raise InputError(f"share={share:g}: {left} of the {least:,} weights of a row would be left")
        return
    name, field, step = PARTS[method]
    whole, kept = getattr(args, field), kept_count(args, method, share)
    if not 0 < kept < whole:
        left = f"{'none' if kept == 0 else 'all'} of {whole} {name} would be left"
        raise InputError(f"share={share:g}: {left}; possible are multiples of {step / whole:.3g}")
    most = (whole - kept) // step
    if rounds > most:
        raise InputError(f"rounds={rounds}: this share is {most} times {step} {name}; use rounds={most}")


def require_plain(model: nn.Module) -> None:
    """Raise InputError for a quantized model, whose codes are not the sizes of weights, and for what is no number."""
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            raise InputError(f"{name} is quantized ({value.dtype}); prune the original, then quantize the result")
        if not value.isfinite().all():
            raise InputError(f"{name}: holds values that are not finite; the checkpoint is damaged")


def cut(model: Transformer, method: str, share: float, whole: ModelArgs, tokens: Tensor | None = None) -> Transformer:
    """`model`, which may have been cut before, with this share of a model of shape `whole` gone.

    tokens: int64 [S, T], a text on which inputs are measured; None: all count as 1.
    """
    powers = None if tokens is None else input_powers(model, tokens)
    if method == "magnitude":
        return zero_smallest(model, share, powers)
    keep = keep_units if method == "dimensions" else keep_heads
    return keep(model, kept_count(whole, method, share), powers)


def gone(method: str, share: float, whole: ModelArgs) -> float:
    """The share that `cut` really takes: hidden units go in whole groups, heads one by one."""
    if method == "magnitude":
        return share
    return 1 - kept_count(whole, method, share) / getattr(whole, PARTS[method][1])


@dataclass(frozen=True)
class Cut:
    """One round: the share that is gone, what is left, and its validation loss before and after fine-tuning."""

    share: float
    model: Transformer
    loss_cut: float
    loss: float


def gradually(
    model: Transformer,
    method: str,
    share: float,
    rounds: int,
    fine_tune: Callable[[Transformer, int], None],
    validate: Callable[[Transformer], float],
    tokens: Tensor | None = None,
) -> Iterator[Cut]:
    """Cut `share` of a model in equal parts, and after each part call fine_tune(model, round). `model` is used up.

    One round is one-shot pruning. Each cut looks at the weights as the training before has left them, and at the inputs
    that they then have on `tokens`. The zeros of a model that was pruned by magnitude before are held.
    """
    whole, (n_zeros, n_all) = model.args, count_zeros(model)
    is_sparse = n_zeros >= SPARSE * n_all
    for number in range(1, rounds + 1):
        part = share if number == rounds else share * number / rounds
        model = cut(model, method, part, whole, tokens)
        if is_sparse and method != "magnitude":
            model = keep_zeros(model)
        before = validate(model)
        fine_tune(model, number)
        yield Cut(gone(method, part, whole), model, before, validate(model))
