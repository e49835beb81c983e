"""Codes for what the layers compute on a text: quantization block by block, with the activations of real tokens.

    outcomes = calibrate(model, Quantization(4, 64, zero_points=True), tokens)

`quantize` chooses the codes of each weight for itself. Here gptq.py chooses them for the inputs of each matrix, which a
calibration text provides: a few tens of sequences. They go through block after block, each of whose matrices gets its
codes before what it computes with them goes on to the next. So a matrix is chosen for the inputs that it will have,
errors of the matrices before it included, and memory holds the weights, and of activations and Hessians those of one
block. Where that is no better than the nearest codes, on the very inputs, these are kept.

The head comes first, with its inputs in the unquantized model: a tied one is the table of the embeddings, too, whose
errors the blocks are to see.

With a budget of more than 4 bits per weight, those matrices have 8 whose 4 bits cost the most. To second order, an
error e of what a matrix computes costs (g e)^2 / 2 for a gradient g of the loss by it, on average over the tokens. Of g
the mean square of each output is taken, from the unquantized model, and outputs count as independent.

Left out on purpose: scales that move from the columns of a matrix into the norm before it (AWQ, Lin et al. 2023). They
would change what a layer sees, and with it what an adapter of the unquantized model adds to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from llama.code_layers import Quantized
from llama.errors import NonFinite
from llama.gptq import DAMPING, ROWS, round_for, row_errors
from llama.model import Transformer, TransformerBlock, rope_table
from llama.quantization import CALIBRATED, TABLES, Quantization, matrices, of_codes, rounded
from llama.surgery import replace_modules
from llama.training.loss import cross_entropy_sum

TOKENS = 2048  # that go through a layer at once
FEW_TOKENS = 4096  # of the text, from which gradients are taken, and what reaches the head

# Of the head. A tied one is looked up, too, where all its columns count alike. For SmolLM2-135M the mean divergence
# from the unquantized distribution falls from 0.00096 to 0.00043 with gptq.DAMPING, and to 0.00037 with this.
HEAD_DAMPING = 0.1


class Outcome(NamedTuple):
    """Relative error of what a matrix computes on the calibration text, |(W' - W) X| / |W X|."""

    nearest: float  # with the nearest codes of each weight
    chosen: float  # with those that it has now


@torch.no_grad()
def calibrate(
    model: Transformer, config: Quantization, tokens: Tensor, bits: float | None = None, progress: bool = False
) -> dict[str, Outcome]:
    """Swap every matrix of a model for codes that are chosen on `tokens`, int64 [S, T]: S texts of T tokens.

    bits: with 4 bits, the average number per weight of the blocks; what is above 4 gives 8 to the matrices that need
    them most. Scales and offsets do not count. Activations have the dtype of the norms. Raises as `quantize` does, and
    NonFinite where activations are not finite.
    """
    config = replace(config, method=CALIBRATED)
    names = matrices(model, config)
    sizes = {name: module.weight.numel() for module, name in names.items() if name not in TABLES}
    few = tokens[: max(1, FEW_TOKENS // tokens.shape[1])]
    choice = _Choice(config, {} if bits is None else _slopes(model, few))
    _swap(model, _tables(model, choice, few))
    x = model.tok_embeddings(tokens).to(model.dtype)
    freqs_cis = rope_table(torch.arange(tokens.shape[1], device=tokens.device)[None], model.rope_freqs)
    hidden = None if progress else True
    with tqdm(total=len(sizes), desc="calibrating", unit="matrix", disable=hidden, leave=False) as bar:
        for i, block in enumerate(model.layers):

            def swap(name: str, hessian: Tensor, prefix: str = f"layers.{i}.") -> None:
                module = model.get_submodule(prefix + name)
                _swap(model, {prefix + name: choice.layer(prefix + name, module, hessian)})
                bar.update()

            x = _through(block, x, freqs_cis, swap)
    if bits is not None:
        config = replace(config, int8=affordable(choice.costs, sizes, bits))
        _swap(model, {name: choice.wide[name][0] for name in config.int8})
        choice.outcomes |= {name: choice.wide[name][1] for name in config.int8}
    model.quantization = config
    return choice.outcomes


def affordable(costs: Mapping[str, float], sizes: Mapping[str, int], bits: float) -> tuple[str, ...]:
    """The matrices that get 8 bits in place of 4 where the average is to be at most `bits`: most cost per weight first.

    costs: of 4 bits. sizes: weights. The names come in the order of `sizes`.
    """
    room, kept = (bits - 4) / 4 * sum(sizes.values()), set()
    for name in sorted(costs, key=lambda name: costs[name] / sizes[name], reverse=True):
        if sizes[name] <= room:
            kept.add(name)
            room -= sizes[name]
    return tuple(name for name in sizes if name in kept)


def _tables(model: Transformer, choice: _Choice, tokens: Tensor) -> dict[str, Quantized]:
    """What takes the place of embedding and head."""
    hessian = _hessian(_parts(model.hidden, tokens))
    if not hessian.isfinite().all():
        hessian.zero_()  # so that the head keeps its nearest codes; the first matrix with such inputs will be named
    if model.output is None:
        return {"tok_embeddings": choice.layer("tok_embeddings", model.tok_embeddings, hessian)}
    embedding = rounded(model.tok_embeddings, "tok_embeddings", choice.config)
    return {"output": choice.layer("output", model.output, hessian), "tok_embeddings": embedding}


class _Choice:
    """Codes for one matrix after the other, and what is known of them."""

    def __init__(self, config: Quantization, slopes: Mapping[str, Tensor]) -> None:
        self.config, self.slopes = config, slopes
        self.outcomes: dict[str, Outcome] = {}
        self.costs: dict[str, float] = {}  # of 4 bits, summed over the tokens
        self.wide: dict[str, tuple[Quantized, Outcome]] = {}  # the same in 8 bits

    def layer(self, name: str, module: nn.Linear, hessian: Tensor) -> Quantized:
        """What takes the place of a matrix with such inputs."""
        if not hessian.isfinite().all():
            raise NonFinite(f"{name}: its inputs are not finite on the calibration text; use dtype=float32")
        config, weight = self.config.of(name), module.weight.float()
        layer = rounded(module, name, config)
        errors = nearest = _errors(layer, weight, hessian)
        if hessian.diagonal().any():
            damping = HEAD_DAMPING if name in TABLES else DAMPING
            found = round_for(weight, hessian, config.grid, config.group_size or weight.shape[1], damping)
            found = of_codes(module, found, config)
            better = _errors(found, weight, hessian)
            if better.sum() < nearest.sum():
                layer, errors = found, better
        whole = torch.cat([row_errors(rows, hessian) for rows in weight.split(ROWS)]).sum()
        self.outcomes[name] = Outcome(_relative(nearest, whole), _relative(errors, whole))
        if name in self.slopes:
            self.costs[name] = (self.slopes[name] * errors).sum().item()
            wide = rounded(module, name, Quantization(8))
            self.wide[name] = wide, Outcome(*2 * (_relative(_errors(wide, weight, hessian), whole),))
        return layer


def _errors(layer: Quantized, weight: Tensor, hessian: Tensor) -> Tensor:
    """The error of each row, [N]."""
    parts = []
    for start in range(0, len(weight), ROWS):
        rows = weight[start : start + ROWS]
        difference = layer.widen(slice(start, start + ROWS), torch.empty_like(rows)).sub_(rows)
        parts.append(row_errors(difference, hessian))
    return torch.cat(parts)


def _relative(errors: Tensor, whole: Tensor) -> float:
    return (errors.sum() / whole).sqrt().item() if whole > 0 else 0.0


def _swap(model: Transformer, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        replace_modules(model, lambda found, _, name=name: found == name, lambda _, layer=layer: layer)


def _through(block: TransformerBlock, x: Tensor, freqs_cis: Tensor, swap: Callable[[str, Tensor], None]) -> Tensor:
    """What a block computes from x [S, T, dim], once `swap(name, hessian)` has been called for each of its matrices.

    All sequences reach a matrix before any goes on.
    """
    attention, feed_forward = block.attention, block.feed_forward
    h = _parts(block.attention_norm, x)
    hessian = _hessian(h)
    for name in ("wq", "wk", "wv"):
        swap(f"attention.{name}", hessian)
    with _without(attention, "wo"):
        h = _parts(lambda part: attention(part, freqs_cis, None, None, None), h)
    swap("attention.wo", _hessian(h))
    x = x + _parts(attention.wo, h)
    h = _parts(block.ffn_norm, x)
    hessian = _hessian(h)
    for name in ("w1", "w3"):
        swap(f"feed_forward.{name}", hessian)
    with _without(feed_forward, "w2"):
        h = _parts(feed_forward, h)
    swap("feed_forward.w2", _hessian(h))
    return x + _parts(feed_forward.w2, h)


def _parts(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), some sequences at a time."""
    return torch.cat([function(part) for part in x.split(max(1, TOKENS // x.shape[1]))])


def _hessian(x: Tensor) -> Tensor:
    """The sum over tokens of x x^T, fp32 [K, K], for x [S, T, K]."""
    hessian = torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
    for part in x.flatten(0, 1).split(TOKENS):
        wide = part.float()
        hessian.addmm_(wide.t(), wide)
    return hessian


@contextmanager
def _without(owner: nn.Module, name: str) -> Iterator[None]:
    """`owner` returns what its last layer would multiply."""
    layer = getattr(owner, name)
    setattr(owner, name, nn.Identity())
    yield
    setattr(owner, name, layer)


def _slopes(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    """For each matrix of the blocks the mean square of the loss's derivative by each of its outputs, fp32 [N].

    The loss is the sum over all tokens; one sequence at a time.
    """
    slopes: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor) -> None:
        slopes[name] = slopes.get(name, 0) + gradient.flatten(0, 1).float().square().sum(0) / tokens.numel()

    hooks = [model.tok_embeddings.register_forward_hook(lambda _module, _given, out: out.requires_grad_())]
    for name, module in model.layers.named_modules(prefix="layers"):
        if type(module) is nn.Linear:
            hook = partial(lambda name, _module, _dx, dy: add(name, dy[0]), name)
            hooks.append(module.register_full_backward_hook(hook))
    needed = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        model.requires_grad_(False)
        with torch.enable_grad():
            for part in tokens.split(1):
                h = model.hidden(part[:, :-1])
                cross_entropy_sum(model.logits, h.flatten(0, 1), part[:, 1:].flatten()).backward()
    finally:
        for hook in hooks:
            hook.remove()
        for weight in needed:
            weight.requires_grad_()
    return slopes
