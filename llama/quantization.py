"""Weight-only quantization: weights of 8 or 4 bits, activations in floating point.

    errors = quantize(model, Quantization(bits=8))      # swaps the layers; relative error of each matrix

A decode step spends its time on reading weights, so half or a quarter of the bytes is worth nearly that much time.

    int8   one scale per row:               w[n, k] = codes[n, k] * scales[n],   scales[n] = max |w[n]| / 127
    int4   one per group of a row:          w[n, k] = codes[n, k] * scales[n, k // group_size]
           chosen for the least squared error among candidates, in bfloat16; it may be negative

Tables (embedding and head, mostly the same matrix) have int8 also in an int4 model: their rows are both looked up and
multiplied, and the logits depend on the head directly. Norms keep their precision, and say what dtype the model
computes in. No weight is ever widened as a whole: in a decode step its codes are (kernels/cpu/decode_step.py on a CPU,
kernels/gpu/triton_ops.py on a GPU), and else a slab of rows at a time is, in the dtype of x, and multiplied.

Layout of int4: each 32 columns of a row are 16 bytes; nibble c stands for code c - 8. One shift and two masks give 32
codes in order:

    byte           0        1        2             15
    high nibble    col 16   col 17   col 18  ...   col 31
    low nibble     col  0   col  1   col  2  ...   col 15

Left out on purpose: quantized activations and caches, codes that depend on each other (GPTQ), other bit widths.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from llama.errors import InputError
from llama.frozen import FrozenLinear
from llama.kernels import gpu
from llama.model import TokenEmbedding, Transformer
from llama.surgery import replace_modules

GROUP_SIZES = (32, 64, 128)
TABLES = ("tok_embeddings", "output")  # int8 also in an int4 model
BLOCK = 32  # columns that are packed together
SLAB_BYTES = {"cpu": 1 << 20, "cuda": 1 << 23}  # of widened weights: fits a CPU's cache, keeps a GPU busy
# Rows of x up to which PyTorch's int8 kernel for bfloat16 on a CPU beats slabs. For w1 of Llama 3.2 1B it takes 1.4 ms
# with 1 row, 7 with 16 and 114 with 256; slabs 13, 16 and 32; bfloat16 weights 2.4, 2.5 and 18 (two cores with AMX).
MOST_ROWS = 32
# Weights that are quantized at once: small enough for a core's cache, and not worth PyTorch's waking a second thread.
CHUNK = 1 << 15
# A group's candidates for the scale: its value of largest magnitude, with its sign, over each of these. 7 loses nothing
# at the ends; beyond 8 the largest value itself is cut for a finer grid. A greedy choice out of 38 divisors, for normal
# weights: seven of them are within 1.2 % of what all 38 reach.
DIVISORS = (7.0, 7.25, -7.75, -8.0, -8.25, -8.5, -8.75)


@dataclass(frozen=True)
class Quantization:
    """How a model is quantized. Raises ValueError naming the field where a value is impossible."""

    bits: int
    group_size: int | None = None  # of int4; None there means 32

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in (8, 4):
            raise ValueError(f"bits={self.bits!r} is not 8 or 4")
        if self.bits == 8 and self.group_size is not None:
            raise ValueError(f"group_size={self.group_size!r} has no effect on int8, which has one scale per row")
        if self.bits == 4:
            object.__setattr__(self, "group_size", 32 if self.group_size is None else self.group_size)
            if isinstance(self.group_size, bool) or self.group_size not in GROUP_SIZES:
                raise ValueError(f"group_size={self.group_size!r} is not one of {', '.join(map(str, GROUP_SIZES))}")

    @property
    def method(self) -> str:
        """How the scales are chosen."""
        return {8: "absmax", 4: "least-squares"}[self.bits]

    @classmethod
    def from_params(cls, content: Any) -> Quantization:
        """Read what `to_params` wrote."""
        if not isinstance(content, dict) or content.keys() - {"method", "bits", "group_size"} or "bits" not in content:
            raise ValueError(f"quantization: {content!r} is not an object of method, bits and group_size")
        try:
            config = cls(content["bits"], content.get("group_size"))
        except (ValueError, TypeError) as error:  # TypeError: a list where a number should be
            raise ValueError(f"quantization.{error}") from None
        if content.get("method") != config.method:
            raise ValueError(f"quantization.method: {content.get('method')!r} is not known for {config.bits} bits")
        return config

    def to_params(self) -> dict[str, Any]:
        """The field `quantization` of a params.json."""
        params = {"method": self.method, "bits": self.bits, "group_size": self.group_size}
        return {name: value for name, value in params.items() if value is not None}


# Layers


class _Quantized(FrozenLinear):
    """Codes and scales of a matrix [out_features, in_features], which is multiplied a slab of rows at a time."""

    def __init__(self, weight: Tensor, scales: Tensor, in_features: int) -> None:
        super().__init__()
        self.out_features, self.in_features = len(weight), in_features
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scales", scales)

    def widen(self, rows: slice, out: Tensor) -> Tensor:
        """These rows of w, into `out`."""
        raise NotImplementedError

    def slabs(self, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows of w, and room for them in the dtype of `like`, the same for each slab."""
        n_rows = max(1, SLAB_BYTES[like.device.type] // (self.in_features * like.element_size()))
        slab = like.new_empty(n_rows, self.in_features)
        for start in range(0, self.out_features, n_rows):
            stop = min(start + n_rows, self.out_features)
            yield slice(start, stop), slab[: stop - start]

    def multiply(self, x: Tensor) -> Tensor:
        y = x.new_empty(len(x), self.out_features)
        for rows, slab in self.slabs(x):
            torch.mm(x, self.widen(rows, slab).t(), out=y[:, rows])
        return y

    def multiply_transposed(self, dy: Tensor) -> Tensor:
        """dy w, summed over slabs in fp32 or wider."""
        dx = dy.new_zeros(len(dy), self.in_features, dtype=torch.promote_types(dy.dtype, torch.float32))
        for rows, slab in self.slabs(dy):
            dx += dy[:, rows] @ self.widen(rows, slab)
        return dx.to(dy.dtype)


class _Int8(_Quantized):
    """int8 [N, K] and a scale for each row, fp32 [N]."""

    def __init__(self, weight: Tensor, scales: Tensor) -> None:
        super().__init__(weight, scales, weight.shape[1])

    def multiply(self, x: Tensor) -> Tensor:
        """(x codes^T) * scales: every code is exact in the dtype of x, so only the sum is rounded; in fp16 x w^T."""
        ops = gpu.ops(x.device)
        if ops is not None and ops.multiplies(x):
            return ops.int8_linear(x, self.weight, self.scales)
        is_small = x.dtype == torch.bfloat16 and len(x) <= MOST_ROWS and self.in_features % 32 == 0
        # From 4 rows on, the kernel crashes where a weight does not begin at 16 bytes: a memory-mapped one may not.
        if x.device.type == "cpu" and is_small and (len(x) < 4 or self.weight.data_ptr() % 16 == 0):
            # PyTorch's own kernel, with the scales left to fp32: it would round them to 8 bits.
            y = torch._weight_int8pack_mm(x.contiguous(), self.weight, x.new_ones(self.out_features))
            return y.mul_(self.scales)
        if x.dtype == torch.float16:  # ends at 65504, which a sum of products with codes can exceed where y does not
            return super().multiply(x)
        y = x.new_empty(len(x), self.out_features)
        for rows, slab in self.slabs(x):
            torch.mm(x, slab.copy_(self.weight[rows]).t(), out=y[:, rows])
        return y.mul_(self.scales)

    def widen(self, rows: slice, out: Tensor) -> Tensor:
        scales = self.scales[rows, None].to(torch.promote_types(out.dtype, torch.float32))
        return torch.mul(self.weight[rows], scales, out=out)


class Int8Linear(_Int8):
    """y = x w^T with w[n, k] = weight[n, k] * scales[n]; weight int8 [N, K], codes -127 to 127; scales fp32 [N]."""


class Int8Embedding(_Int8):
    """The table of token vectors, int8 [V, dim] with scales fp32 [V]; also the head of a model with a tied one.

    `dtype` is that of the vectors it returns; model.to(dtype) changes it.
    """

    def __init__(self, weight: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        super().__init__(weight, scales)
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        scales = self.scales[tokens, None].to(torch.promote_types(self.dtype, torch.float32))
        return (self.weight[tokens] * scales).to(self.dtype)

    def _apply(self, fn, recurse: bool = True):
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return super()._apply(fn, recurse)


class Int4Linear(_Quantized):
    """y = x w^T; weight uint8 [N, K / 2], two codes per byte (see above); scales bfloat16 [N, K / group_size]."""

    def __init__(self, weight: Tensor, scales: Tensor, group_size: int) -> None:
        super().__init__(weight, scales, 2 * weight.shape[1])
        self.group_size = group_size

    def multiply(self, x: Tensor) -> Tensor:
        """x w^T; except for a few rows of x on a GPU with Triton, a slab of rows of w at a time."""
        ops = gpu.ops(x.device)
        if ops is not None and ops.multiplies(x):
            return ops.int4_linear(x, self.weight, self.scales, self.group_size)
        return super().multiply(x)

    def widen(self, rows: slice, out: Tensor) -> Tensor:
        packed = self.weight[rows].unflatten(1, (-1, 1, BLOCK // 2))
        halves = out.view(len(out), -1, 2, BLOCK // 2)
        halves[:, :, :1].copy_(packed & 15)
        halves[:, :, 1:].copy_(packed >> 4)
        groups = out.sub_(8).view(len(out), -1, self.group_size)
        groups.mul_(self.scales[rows, :, None])
        return out


# Codes


@torch.no_grad()
def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [N, K] and fp32 scales [N] of a matrix: |w - codes * scales| <= scales / 2, exactly.

    In fp64, in which no quotient of two fp32 numbers is rounded across the middle between two codes.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    n_rows = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), n_rows):
        rows = slice(start, start + n_rows)
        w = weight[rows].double()
        scales[rows] = _usable((w.abs().amax(1) / 127).float())
        codes[rows] = w.div_(scales[rows, None]).round_()
    return codes, scales


@torch.no_grad()
def quantize_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes -8 to 7 as int8 [N, K] and bfloat16 scales [N, K / group_size] of a matrix, for the least squared error."""
    n, k = weight.shape
    codes = torch.empty(n, k, dtype=torch.int8, device=weight.device)
    scales = torch.empty(n, k // group_size, dtype=torch.bfloat16, device=weight.device)
    n_rows = max(1, CHUNK // k)
    for start in range(0, n, n_rows):
        rows = slice(start, start + n_rows)
        # Members of a group below each other: sums over a group then run over many groups at once.
        groups = weight[rows].float().view(-1, group_size).t().contiguous()
        q, s = _search(groups)
        codes[rows] = q.t().reshape(-1, k)
        scales[rows] = s.view(-1, k // group_size)
    return codes, scales


def _search(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The best codes [group_size, G], as fp32, and scales [G] for groups [group_size, G]."""
    high, low = groups.amax(0), groups.amin(0)
    largest = torch.where(high < -low, low, high)
    least = torch.full_like(largest, torch.inf)
    best = torch.ones_like(largest)
    q, error = torch.empty_like(groups), torch.empty_like(groups)

    def consider(scales: Tensor) -> None:
        scales = _usable(scales.bfloat16().float())
        _round(groups, scales, q)
        squared = torch.mul(q, scales, out=error).sub_(groups).square_().sum(0)
        is_better = squared < least
        torch.where(is_better, squared, least, out=least)
        torch.where(is_better, scales, best, out=best)

    for divisor in DIVISORS:
        consider(largest / divisor)
    _round(groups, best, q)
    # The scale with the least error for the codes just found: sum(w q) / sum(q q).
    consider((groups * q).sum(0) / q.square().sum(0).clamp_min_(1))
    return _round(groups, best, q), best


def _round(groups: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    return torch.div(groups, scales, out=out).round_().clamp_(-8, 7)


def _usable(scales: Tensor) -> Tensor:
    """1 for rows of zeros; and where a scale would be subnormal, the smallest that is not."""
    tiny = torch.finfo(scales.dtype).tiny
    raised = torch.where(scales.abs() < tiny, tiny, scales)
    return torch.where(scales == 0, 1.0, raised)


def pack(codes: Tensor) -> Tensor:
    """Codes -8 to 7, int8 [N, K], as uint8 [N, K / 2], in the order described above."""
    low, high = (codes + 8).to(torch.uint8).unflatten(1, (-1, 2, BLOCK // 2)).unbind(2)
    return (low | high << 4).flatten(1)


# Models


@torch.no_grad()
def quantize(model: Transformer, config: Quantization, progress: bool = False) -> dict[str, float]:
    """Swap every matrix of a model for its codes; return the relative error |codes * scales - w| / |w| of each.

    Raises InputError naming the weight for values that are not finite or a width that groups do not divide, ValueError
    for a model that is quantized already or has adapters.
    """
    names, layers, errors = _matrices(model, config), {}, {}
    for module, name in names.items():
        if not all(part.isfinite().all() for part in module.weight.split(4096)):
            raise InputError(f"{name}.weight: holds values that are not finite; the checkpoint is damaged")
    hidden = None if progress else True
    for module, name in tqdm(names.items(), f"int{config.bits}", unit="matrix", disable=hidden, leave=False):
        layers[module] = _quantized(module, name, config)
        errors[name] = _relative_error(layers[module], module.weight)
    replace_modules(model, lambda _, module: module in layers, lambda module: layers[module])
    return errors


def lay_out(model: Transformer, config: Quantization) -> None:
    """Swap in layers whose codes are yet to be filled in: to read a file, or to plan for a model without its weights.

    Raises InputError for a width that groups do not divide.
    """
    names = _matrices(model, config)
    replace_modules(model, lambda _, module: module in names, lambda module: _empty(module, names[module], config))


def quantization_of(model: nn.Module) -> Quantization | None:
    """How a model is quantized; None where it is not."""
    layers = {type(module): module for module in model.modules() if isinstance(module, _Quantized)}
    if Int4Linear in layers:
        return Quantization(4, layers[Int4Linear].group_size)
    return Quantization(8) if layers else None


def slow_reason(model: Transformer) -> str | None:
    """Why decoding with these weights is slower than with those that they were made from; None where it is not."""
    config, device = quantization_of(model), model.norm.weight.device
    if config is None or device.type == "cpu" or gpu.ops(device) is not None:
        return None
    return (
        f"int{config.bits} weights save memory here and no time: {gpu.why_not(device)}, so they are widened before "
        "each product; decoding is faster from the checkpoint that they were made from"
    )


def _matrices(model: Transformer, config: Quantization) -> dict[nn.Module, str]:
    """The modules to be quantized, and their names."""
    if quantization_of(model) is not None:
        raise ValueError("the model is quantized already")
    names = {module: name for name, module in model.named_modules() if type(module) in (nn.Linear, TokenEmbedding)}
    if len(names) != 7 * model.args.n_layers + (1 if model.output is None else 2):
        raise ValueError("the model has layers that are not plain; remove adapters first")
    for module, name in names.items():
        width = module.weight.shape[1]
        if _bits(name, config) == 4 and width % config.group_size:
            raise InputError(f"{name}.weight: groups of {config.group_size} do not divide {width} columns; use 8 bits")
    return names


def _bits(name: str, config: Quantization) -> int:
    return 8 if name in TABLES else config.bits


def _quantized(module: nn.Module, name: str, config: Quantization) -> _Quantized:
    if _bits(name, config) == 4:
        codes, scales = quantize_groups(module.weight, config.group_size)
        return Int4Linear(pack(codes), scales, config.group_size)
    return _int8(module, *quantize_rows(module.weight))


def _empty(module: nn.Module, name: str, config: Quantization) -> _Quantized:
    new = functools.partial(torch.empty, device=module.weight.device)
    n, k = module.weight.shape
    if _bits(name, config) == 4:
        size = config.group_size
        return Int4Linear(new(n, k // 2, dtype=torch.uint8), new(n, k // size, dtype=torch.bfloat16), size)
    return _int8(module, new(n, k, dtype=torch.int8), new(n))


def _int8(module: nn.Module, codes: Tensor, scales: Tensor) -> _Int8:
    if isinstance(module, TokenEmbedding):
        return Int8Embedding(codes, scales, module.weight.dtype)
    return Int8Linear(codes, scales)


def _relative_error(layer: _Quantized, weight: Tensor) -> float:
    lost = whole = 0.0
    for rows, slab in layer.slabs(weight.new_empty(0, dtype=torch.float32)):
        w = weight[rows].float()
        lost += (layer.widen(rows, slab) - w).double().square().sum().item()
        whole += w.double().square().sum().item()
    return math.sqrt(lost / whole) if whole else 0.0
