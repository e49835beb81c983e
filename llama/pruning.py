"""Pruning by size alone: the smallest weights become zeros, or the weakest hidden units are taken out.

    masks = zero_smallest(model, 0.5)    # magnitude (Han et al. 2015): half of each matrix is zero from now on,
    ...                                  # whatever optimizer trains the rest
    remove_masks(model)                  # plain layers again; the checkpoint is a dense one that any loader takes

    model = keep_units(model, 4096)      # dimensions (Li et al. 2017): a smaller model, faster everywhere

Magnitude pruning saves nothing by itself: a dense product multiplies with zeros as fast as with anything else. It says
how many weights a model needs. Taking out units removes rows of w1 and w3 and columns of w2, and params.json describes
what is left in Meta's own fields.

`gradually` cuts a little at a time with some fine-tuning after each cut (training/step.py has a `fine_tune`).

Left out on purpose: embedding, head and norms. A row of the table is a token, and a rare token is still
needed; a norm has a millionth of the weights. Residual dimensions: each is a row or column of every matrix and of the
table and enters every norm, so that one cut damages the whole network at once, where a hidden unit is one term of a
sum. Layers: they have no norm to be compared by. Heads: Meta's params.json derives their size from their number, so
that it cannot describe a model with fewer of the same size, and attention has a seventh of Llama 3.2 1B's weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from llama.config import ModelArgs
from llama.errors import InputError
from llama.model import FeedForward, Transformer
from llama.surgery import plain_linear, replace_modules

METHODS = ("magnitude", "dimensions")
UNITS = 32  # kept hidden units are a multiple of this: the tiles of the kernels
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


# Magnitude


@torch.no_grad()
def smallest(weight: Tensor, n: int) -> Tensor:
    """True at the `n` smallest magnitudes of a tensor, exactly; of equal ones at the boundary the first count."""
    size = weight.detach().abs().flatten().float()
    if n == 0:
        return torch.zeros_like(weight, dtype=torch.bool)
    bound = size.kthvalue(n).values
    chosen = size < bound
    ties = (size == bound).nonzero().flatten()
    chosen[ties[: n - chosen.sum()]] = True
    return chosen.view_as(weight)


def zero_smallest(model: Transformer, share: float) -> Transformer:
    """Set this share of each matrix, its smallest weights, to zero for good, and return the model.

    Zeros that are there already count, and stay, also where they are more than that. Each matrix for itself: how large
    the weights of one are compared with those of another says little, because RMSNorm before it, or its partner in the
    same product, undoes any factor.
    """
    return _mask(model, lambda weight: ~smallest(weight, round(share * weight.numel())) & (weight != 0))


def keep_zeros(model: Transformer) -> Transformer:
    """Keep the zeros of a pruned checkpoint zero, and return the model. Raises InputError where it has none."""
    if count_zeros(model)[0] == 0:
        raise InputError("no weight of the model is zero; prune it by magnitude first (compress.py prune)")
    return _mask(model, lambda weight: weight != 0)


def _mask(model: Transformer, mask_of: Callable[[Tensor], Tensor]) -> Transformer:
    chosen = projections(model)
    replace_modules(model, lambda name, _: name in chosen, lambda old: MaskedLinear(old.weight, mask_of(old.weight)))
    return model


def remove_masks(model: nn.Module) -> nn.Module:
    """Plain linear layers again, with the same weights, zeros included; a model without masks stays as it is."""
    if any(isinstance(module, MaskedLinear) for module in model.modules()):
        replace_modules(
            model, lambda _, module: isinstance(module, MaskedLinear), lambda masked: plain_linear(masked.weight)
        )
    return model


# Dimensions


def kept_units(ffn_dim: int, share: float) -> int:
    """How many of the hidden units stay: the multiple of UNITS next to (1 - share) * ffn_dim, the larger of two."""
    return math.floor(ffn_dim * (1 - share) / UNITS + 0.5) * UNITS


@torch.no_grad()
def unit_norms(feed_forward: FeedForward) -> Tensor:
    """L2 norm of what each hidden unit adds to the residual stream at activation 1, its column of w2; fp32 [ffn_dim].

    Chosen on the embedded model, by the same text that validates: without fine-tuning, at six shares from 1/8 to 3/4,
    its loss was below that of the norm of all three, of |w2| |w3| and of |w1| |w2| |w3|; hardly so at the largest.
    """
    return feed_forward.w2.weight.float().square().sum(0).sqrt()


@torch.no_grad()
def keep_units(model: Transformer, n_units: int) -> Transformer:
    """A model of the `n_units` hidden units of each block whose L2 norm is largest, in their old order.

    Every block keeps as many, since params.json has one size for all. What is not cut is shared with `model`.
    """
    with torch.device("meta"):
        smaller = Transformer(model.args.with_ffn_dim(n_units))
    for name, module in model.named_modules():
        for leaf, weight in module.named_parameters(recurse=False):
            setattr(smaller.get_submodule(name), leaf, weight)
    for old, new in zip(model.layers, smaller.layers, strict=True):
        kept = unit_norms(old.feed_forward).topk(n_units).indices.sort().values
        for name, axis in (("w1", 0), ("w3", 0), ("w2", 1)):
            weight = getattr(old.feed_forward, name).weight
            cut = nn.Parameter(weight.index_select(axis, kept), weight.requires_grad)
            getattr(new.feed_forward, name).weight = cut
    smaller.to(model.tok_embeddings.weight.device)  # the RoPE frequencies, the only thing not there yet
    return smaller.train(model.training)


# Either


def check(args: ModelArgs, method: str, share: float, rounds: int = 1) -> None:
    """Raise InputError where this share of such a model cannot be cut so; method: magnitude or dimensions."""
    if method not in METHODS:
        raise InputError(f"method={method}: expected one of {', '.join(METHODS)}")
    if not 0 < share < 1:
        raise InputError(f"share={share:g}: expected a number between 0 and 1, such as 0.5")
    if method == "magnitude":
        least = args.dim * min(args.n_kv_heads * args.head_dim, args.ffn_dim)  # weights of the smallest matrix
        if not 0 < round(share * least) < least:
            left = "none" if share > 0.5 else "all"
            raise InputError(f"share={share:g}: {left} of the {least:,} weights of a matrix would be left")
        return
    kept = kept_units(args.ffn_dim, share)
    if not 0 < kept < args.ffn_dim:
        left = f"{'none' if kept == 0 else 'all'} of {args.ffn_dim} hidden units would be left"
        raise InputError(f"share={share:g}: {left}; they go in groups of {UNITS}")
    most = math.floor(share * args.ffn_dim / UNITS + 1e-9)
    if rounds > most:
        raise InputError(f"rounds={rounds}: this share is {most} groups of {UNITS} hidden units; use rounds={most}")


def require_plain(model: nn.Module) -> None:
    """Raise InputError for a quantized model, whose codes are not the sizes of weights, and for what is no number."""
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            raise InputError(f"{name} is quantized ({value.dtype}); prune the original, then quantize the result")
        if not value.isfinite().all():
            raise InputError(f"{name}: holds values that are not finite; the checkpoint is damaged")


def cut(model: Transformer, method: str, share: float, ffn_dim: int) -> Transformer:
    """`model`, which may have been cut before, with this share of the whole gone; the whole had `ffn_dim` units."""
    return zero_smallest(model, share) if method == "magnitude" else keep_units(model, kept_units(ffn_dim, share))


def gone(method: str, share: float, ffn_dim: int) -> float:
    """The share that `cut` really takes: hidden units go in whole groups."""
    return share if method == "magnitude" else 1 - kept_units(ffn_dim, share) / ffn_dim


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
) -> Iterator[Cut]:
    """Cut `share` of a model in equal parts, and after each part call fine_tune(model, round). `model` is used up.

    One round is one-shot pruning. Each cut looks at the weights as the training before has left them. The zeros of a
    model that was pruned by magnitude before are held.
    """
    whole, (n_zeros, n_all) = model.args.ffn_dim, count_zeros(model)
    is_sparse = n_zeros >= SPARSE * n_all
    for number in range(1, rounds + 1):
        part = share if number == rounds else share * number / rounds
        model = cut(model, method, part, whole)
        if is_sparse and method == "dimensions":
            model = keep_zeros(model)
        before = validate(model)
        fine_tune(model, number)
        yield Cut(gone(method, part, whole), model, before, validate(model))
