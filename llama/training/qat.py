"""Quantization-aware training: weights are trained through the rounding to the codes that are written at the end.

    begin(model, FORMATS[4])     # swaps the layers in; whatever trains all weights now trains them for 4 bits
    ...
    finish(model, FORMATS[4])    # the codes that the last forward pass computed with: a quantized model, to be saved

    begin(model, config, start)  # the same from the codes of a quantized model, such as calibration.py chooses
    adapt(model, lora_config)    # behind it: low-rank updates are trained, inside the rounding, in place of all weights

A layer keeps its weight in fp32 and computes with the values of its codes, those of the very layer that will be
written. Their gradient goes to the weight as if it had not been rounded (the straight-through estimator, Bengio et al.
2013), so that small steps add up until a code changes. Codes are made once for each optimizer step.

Scales and offsets of groups start as those with the least squared error and are then trained with the weights (LSQ,
Esser et al. 2020; LSQ+, Bhalgat et al. 2020). To search for them anew before each step would take a good part of
its time. Where each row has one scale, in tables and in int8, it follows from the row.

Left out on purpose: formats other than these. Groups of 64 with zero-points have 4.5 bits per weight, as many as
groups of 32 without.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from tqdm import tqdm

from llama import quantization
from llama.code_layers import Quantized
from llama.codes import Codes, quantize_rows
from llama.errors import InputError
from llama.frozen import compute_dtype
from llama.lora import LoRAConfig, LoRALinear
from llama.model import TokenEmbedding, Transformer
from llama.quantization import TRAINED, Quantization
from llama.surgery import plain_linear, replace_modules, take_over

FORMATS = {4: Quantization(4, 64, zero_points=True), 8: Quantization(8)}
SLAB = 1 << 17  # weights at a time, half a megabyte in fp32
FAR = 0.5  # relative error of a matrix beyond which codes are not of this weight


class _StraightThrough(Function):
    """The value of a layer's codes [N, K], whose gradient the weight gets unchanged.

    For u = (w - offset) / scale and the code q = round(u), cut to what codes there are, the gradients of a group's
    scale and offset sum those of the value times q - u and 0 where nothing was cut, q and 1 where it was.
    """

    @staticmethod
    def forward(
        ctx, weight: Tensor, scales: Tensor | None, offsets: Tensor | None, layer: _Rounded, dtype: torch.dtype
    ) -> Tensor:
        ctx.layer = layer
        return layer.value(dtype).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, dv: Tensor) -> tuple[Tensor | None, ...]:
        layer, weight = ctx.layer, ctx.layer.exact()
        dv = dv.to(weight.dtype)
        if layer.scales is None:
            return dv, None, None, None, None
        low, high = layer.grid.low, layer.grid.high
        by_scale = torch.empty_like(layer.scales)
        by_offset = None if layer.offsets is None else torch.empty_like(layer.offsets)
        for rows, scales, offsets in layer.slabs():
            w, d = layer.in_groups(weight[rows]), layer.in_groups(dv[rows])
            u = (w if offsets is None else w - offsets) / scales
            q = u.round().clamp_(low, high)
            is_cut = (u < low) | (u > high)
            by_scale[rows] = torch.where(is_cut, q, q - u).mul_(d).sum(2)
            if by_offset is not None:
                by_offset[rows] = torch.where(is_cut, d, 0).sum(2)
        return dv, by_scale, by_offset, None, None


class _Rounded(nn.Module):
    """A matrix [N, K] that is trained as `weight` and computed with as the value of its codes.

    codes: of the weight as it is at the start, whose scales and offsets are trained from there on, in fp32, where
    groups have them. config: of this matrix.
    """

    def __init__(self, weight: nn.Parameter, codes: Quantized, config: Quantization) -> None:
        nn.Module.__init__(self)
        self.weight, self.config, self.grid = weight, config, config.grid
        numbers = (None, None) if config.group_size is None else (codes.scales, getattr(codes, "offsets", None))
        self.scales, self.offsets = (None if part is None else nn.Parameter(part.float()) for part in numbers)
        self._values: dict[torch.dtype, Tensor] = {}
        self._versions: list[tuple[int, int]] = []

    def exact(self) -> Tensor:
        """The weight that is rounded."""
        return self.weight

    @torch.no_grad()
    def codes(self) -> Quantized:
        """The layer that is written: the codes closest to the weight as it is now."""
        if self.scales is None:
            q, scales = quantize_rows(self.exact())
            return quantization.of_codes(self, Codes(q, scales[:, None], None), self.config)
        weight, q = self.exact(), torch.empty(self.weight.shape, dtype=torch.int8, device=self.weight.device)
        for rows, scales, offsets in self.slabs():
            nearest = self.grid.nearest(self.in_groups(weight[rows]), scales, offsets).flatten(1)
            q[rows] = nearest[:, : weight.shape[1]]
        return quantization.linear(Codes(q, *self._stored()), self.config)

    def rounded(self, x: Tensor) -> Tensor:
        """What to multiply x by, in its dtype or that of autocast."""
        return _StraightThrough.apply(self.exact(), self.scales, self.offsets, self, compute_dtype(x))

    @torch.no_grad()
    def value(self, dtype: torch.dtype) -> Tensor:
        """What the codes stand for. It is kept for as long as no optimizer changes what it is made of."""
        versions = [(id(tensor), tensor._version) for tensor in self.parameters()]
        if versions != self._versions:
            self._versions, self._values = versions, {}
        if dtype not in self._values:
            codes, value = self.codes(), self.weight.new_empty(self.weight.shape, dtype=dtype)
            for rows in self._rows():
                codes.widen(rows, value[rows])
            self._values[dtype] = value
        return self._values[dtype]

    def slabs(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Some rows after others, with their scales and offsets as they are stored, fp32 [rows, groups, 1].

        What is computed of so few rows stays in a CPU's cache, and in memory that is used again.
        """
        scales, offsets = (None if part is None else part.float()[:, :, None] for part in self._stored())
        for rows in self._rows():
            yield rows, scales[rows], None if offsets is None else offsets[rows]

    def in_groups(self, values: Tensor) -> Tensor:
        """Rows [rows, K] by group, [rows, groups, group_size]; what the last one lacks is 0."""
        size = self.config.group_size
        missing = -values.shape[1] % size
        return (F.pad(values, (0, missing)) if missing else values).unflatten(1, (-1, size))

    def _rows(self) -> Iterator[slice]:
        n_rows = max(1, SLAB // self.weight.shape[1])
        return (slice(start, start + n_rows) for start in range(0, len(self.weight), n_rows))

    @torch.no_grad()
    def take(self, codes: Quantized) -> None:
        """Have these codes, of the same scales and offsets: what is nearer to another starts at the value of its own.

        Were it moved no further than the border, a few steps of Adam in whatever direction would undo the choice.
        """
        value = codes.widen(slice(None), torch.empty_like(self.weight))
        if not (value - self.weight).norm() <= FAR * self.weight.norm():
            raise InputError("the codes to start from are not those of this weight; quantize the model that is trained")
        if self.scales is not None:
            self.weight.copy_(torch.where(self.value(value.dtype) == value, self.weight, value))

    def _stored(self) -> tuple[Tensor, Tensor | None]:
        dtype = self.grid.dtype
        return self.grid.stored(self.scales).to(dtype), None if self.offsets is None else self.offsets.to(dtype)


class RoundedLinear(_Rounded):
    """y = x v^T with the value v of the codes."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.rounded(x))


class RoundedLoRA(RoundedLinear):
    """y = x v^T with the value v of the codes of W + (alpha / r) B A, of which B, A, scales and offsets are trained."""

    def __init__(self, layer: RoundedLinear, adapted: LoRALinear) -> None:
        take_over(self, layer)
        self.lora_A, self.lora_B, self.scale = adapted.lora_A, adapted.lora_B, adapted.scale

    def exact(self) -> Tensor:
        return self.weight + (self.lora_B @ self.lora_A) * self.scale


class RoundedEmbedding(_Rounded, TokenEmbedding):
    """The table of token vectors, whose rows are looked up and multiplied as the values of their codes."""

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, _StraightThrough.apply(self.weight, None, None, self, self.weight.dtype))

    def project(self, h: Tensor) -> Tensor:
        return F.linear(h, self.rounded(h))


@torch.no_grad()
def begin(model: Transformer, config: Quantization, start: Transformer | None = None, progress: bool = False) -> None:
    """Swap in layers that round every matrix, as `quantization.quantize` does now, or to the codes of `start`.

    start: a model that is quantized as `config` says. Where each row has one scale, codes are the nearest ones all the
    same. Raises as `quantize` does, and InputError naming a matrix whose codes in `start` are far from its weight.
    """
    names, hidden = quantization.matrices(model, config), None if progress else True
    codes = {}
    for module, name in tqdm(names.items(), f"int{config.bits}", unit="matrix", disable=hidden, leave=False):
        codes[name] = quantization.rounded(module, name, config) if start is None else start.get_submodule(name)
    _swap(model, config, names, codes)
    for name in codes if start is not None else ():
        try:
            model.get_submodule(name).take(codes[name])
        except InputError as error:
            raise InputError(f"{name}: {error}") from None


def adapt(model: Transformer, config: LoRAConfig, seed: int = 0) -> None:
    """Train low-rank updates of some matrices, with their scales and offsets, in place of all weights.

    The update is rounded together with its weight, so dropout on its input has no place. All other matrices keep the
    codes that they have now, and nothing else of them. `seed` draws the A matrices.
    """
    model.requires_grad_(False)
    names = {module: name for name, module in model.named_modules() if isinstance(module, _Rounded)}
    generator = torch.Generator(model.tok_embeddings.weight.device).manual_seed(seed)

    def make(layer: _Rounded) -> nn.Module:
        of_layer = config.of(names[layer])
        if of_layer is None:
            return layer.codes()
        for numbers in (layer.scales, layer.offsets):
            if numbers is not None:
                numbers.requires_grad_(True)
        return RoundedLoRA(layer, LoRALinear(plain_linear(layer.weight), of_layer, generator))

    replace_modules(model, lambda _, module: module in names, make)


def lay_out(model: Transformer, config: Quantization) -> None:
    """The same layers with scales that are yet to be filled in, to plan without the weights."""
    names = quantization.named(model, config)
    _swap(model, config, names, {name: quantization.empty(module, name, config) for module, name in names.items()})


def _swap(model: Transformer, config: Quantization, names: dict[nn.Module, str], codes: dict[str, Quantized]) -> None:
    def make(module: nn.Module) -> _Rounded:
        kind = RoundedEmbedding if isinstance(module, TokenEmbedding) else RoundedLinear
        name = names[module]
        return kind(module.weight, codes[name], config.of(name))

    replace_modules(model, lambda _, module: module in names, make)


def finish(model: Transformer, config: Quantization) -> None:
    """The quantized model: every layer as its codes."""
    replace_modules(model, lambda _, module: isinstance(module, _Rounded), lambda layer: layer.codes())
    model.quantization = replace(config, method=TRAINED)
