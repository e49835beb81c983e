"""Weight-only quantization: weights of 8 or 4 bits, activations in floating point.

    errors = quantize(model, Quantization(bits=8))      # swaps the layers; relative error of each matrix

A decode step spends its time on reading weights, so half or a quarter of the bytes is worth nearly that much time.

    int8   a scale for each row, or for each group of a row
    int4   a scale for each group of a row; with zero-points an offset as well, so that the 16 values that a weight can
           have lie wherever the weights of its group do

How they are chosen and stored: codes.py; the layers that multiply by them: code_layers.py.

Tables (embedding and head, mostly the same matrix) have int8 with a scale for each row whatever the blocks have: their
rows are both looked up and multiplied, and the logits depend on the head directly. Norms keep their precision, and say
what dtype the model computes in.

Left out on purpose: quantized activations and caches, other bit widths.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from llama.code_layers import Int4Linear, Int8Embedding, Int8Linear, Quantized
from llama.codes import pack, quantize_groups, quantize_ranges, quantize_row_groups, quantize_rows
from llama.errors import InputError
from llama.kernels import gpu
from llama.model import TokenEmbedding, Transformer
from llama.surgery import replace_modules

GROUP_SIZES = (32, 64, 128)
TABLES = ("tok_embeddings", "output")  # int8 also in an int4 model
FIELDS = {"method", "bits", "group_size", "zero_points"}  # of params.json


@dataclass(frozen=True)
class Quantization:
    """How a model is quantized. Raises ValueError naming the field where a value is impossible."""

    bits: int
    group_size: int | None = None  # None: of int8 a whole row, of int4 32
    zero_points: bool = False  # of int4: an offset for each group beside its scale

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in (8, 4):
            raise ValueError(f"bits={self.bits!r} is not 8 or 4")
        if not isinstance(self.zero_points, bool):
            raise ValueError(f"zero_points={self.zero_points!r} is not True or False")
        if self.bits == 8 and self.zero_points:
            raise ValueError("zero_points=True has no effect on int8, whose codes are symmetric")
        if self.bits == 4 and self.group_size is None:
            object.__setattr__(self, "group_size", 32)
        size = self.group_size
        if size is not None and (isinstance(size, bool) or size not in GROUP_SIZES):
            raise ValueError(f"group_size={size!r} is not one of {', '.join(map(str, GROUP_SIZES))}")

    @property
    def method(self) -> str:
        """How the scales are chosen."""
        return {8: "absmax", 4: "least-squares"}[self.bits]

    @property
    def name(self) -> str:
        """Short, for a line that says what is computed: int4, int4 with zero-points, int8 in groups."""
        in_groups = self.bits == 8 and self.group_size is not None
        return f"int{self.bits}" + " with zero-points" * self.zero_points + " in groups" * in_groups

    @classmethod
    def from_params(cls, content: Any) -> Quantization:
        """Read what `to_params` wrote."""
        if not isinstance(content, dict) or content.keys() - FIELDS or "bits" not in content:
            raise ValueError(f"quantization: {content!r} is not an object of {', '.join(sorted(FIELDS))}")
        try:
            config = cls(content["bits"], content.get("group_size"), content.get("zero_points", False))
        except (ValueError, TypeError) as error:  # TypeError: a list where a number should be
            raise ValueError(f"quantization.{error}") from None
        if content.get("method") != config.method:
            raise ValueError(f"quantization.method: {content.get('method')!r} is not known for {config.bits} bits")
        return config

    def to_params(self) -> dict[str, Any]:
        """The field `quantization` of a params.json."""
        params = {"method": self.method, "bits": self.bits, "group_size": self.group_size}
        params["zero_points"] = self.zero_points or None
        return {name: value for name, value in params.items() if value is not None}


@torch.no_grad()
def quantize(model: Transformer, config: Quantization, progress: bool = False) -> dict[str, float]:
    """Swap every matrix of a model for its codes; return the relative error |codes * scales - w| / |w| of each.

    Raises InputError naming the weight for values that are not finite or exceed what the format holds, ValueError for a
    model that is quantized already or has adapters.
    """
    names, layers, errors = _matrices(model), {}, {}
    for module, name in names.items():
        _check_values(module.weight, name, config)
    hidden = None if progress else True
    for module, name in tqdm(names.items(), f"int{config.bits}", unit="matrix", disable=hidden, leave=False):
        is_table = name in TABLES
        layers[module] = _int8(module, *quantize_rows(module.weight)) if is_table else rounded(module.weight, config)
        errors[name] = relative_error(layers[module], module.weight)
    replace_modules(model, lambda _, module: module in layers, lambda module: layers[module])
    return errors


def lay_out(model: Transformer, config: Quantization) -> None:
    """Swap in layers whose codes are yet to be filled in: to read a file, or to plan without the weights."""
    names = _matrices(model)
    replace_modules(model, lambda _, module: module in names, lambda module: _empty(module, names[module], config))


def quantization_of(model: nn.Module) -> Quantization | None:
    """How a model is quantized; None where it is not."""
    layers = [m for name, m in model.named_modules() if isinstance(m, Quantized) and name.split(".")[0] not in TABLES]
    if not layers:
        return None
    if isinstance(layers[0], Int4Linear):
        return Quantization(4, layers[0].group_size, layers[0].offsets is not None)
    return Quantization(8, layers[0].group_size)


def slow_reason(model: Transformer) -> str | None:
    """Why decoding with these weights is slower than with those that they were made from; None where it is not."""
    config, device = quantization_of(model), model.norm.weight.device
    if config is None or device.type == "cpu" or gpu.ops(device) is not None:
        return None
    return (
        f"int{config.bits} weights save memory here and no time: {gpu.why_not(device)}, so they are widened before "
        "each product; decoding is faster from the checkpoint that they were made from"
    )


def _matrices(model: Transformer) -> dict[nn.Module, str]:
    """The modules to be quantized, and their names."""
    if quantization_of(model) is not None:
        raise ValueError("the model is quantized already")
    names = {module: name for name, module in model.named_modules() if type(module) in (nn.Linear, TokenEmbedding)}
    if len(names) != 7 * model.args.n_layers + (1 if model.output is None else 2):
        raise ValueError("the model has layers that are not plain; remove adapters first")
    return names


def _check_values(weight: Tensor, name: str, config: Quantization) -> None:
    """Raise InputError for values that are not finite, or beyond the range of scales and offsets."""
    largest = max(part.abs().amax().item() if part.isfinite().all() else math.inf for part in weight.split(4096))
    if largest == math.inf:
        raise InputError(f"{name}.weight: holds values that are not finite; the checkpoint is damaged")
    if name not in TABLES and _in_half(config) and largest > torch.finfo(torch.float16).max:
        remedy = "use zero_points=False" if config.zero_points else "leave out group_size"
        raise InputError(f"{name}.weight: values exceed float16, which scales and offsets have; {remedy}")


def _in_half(config: Quantization) -> bool:
    """Whether scales are fp16."""
    return config.zero_points or (config.bits == 8 and config.group_size is not None)


def _empty(module: nn.Module, name: str, config: Quantization) -> Quantized:
    new = functools.partial(torch.empty, device=module.weight.device)
    (n, k), size = module.weight.shape, config.group_size
    if name in TABLES or (config.bits == 8 and size is None):
        return _int8(module, new(n, k, dtype=torch.int8), new(n))
    groups = functools.partial(new, n, math.ceil(k / size))
    if config.bits == 8:
        return Int8Linear(new(n, k, dtype=torch.int8), groups(dtype=torch.float16), size)
    packed = new(n, 16 * math.ceil(k / 32), dtype=torch.uint8)
    if config.zero_points:
        return Int4Linear(packed, groups(dtype=torch.float16), size, groups(dtype=torch.float16), k)
    return Int4Linear(packed, groups(dtype=torch.bfloat16), size, None, k)


def rounded(weight: Tensor, config: Quantization) -> Quantized:
    """A linear layer with the codes of a weight [N, K], each chosen for itself."""
    size, k = config.group_size, weight.shape[1]
    if config.bits == 8:
        return Int8Linear(*(quantize_rows(weight) if size is None else quantize_row_groups(weight, size)), size)
    if config.zero_points:
        codes, scales, offsets = quantize_ranges(weight, size)
        return Int4Linear(pack(codes, 0), scales, size, offsets, k)
    codes, scales = quantize_groups(weight, size)
    return Int4Linear(pack(codes), scales, size, None, k)


def _int8(module: nn.Module, codes: Tensor, scales: Tensor) -> Quantized:
    if isinstance(module, TokenEmbedding):
        return Int8Embedding(codes, scales, module.weight.dtype)
    return Int8Linear(codes, scales)


def relative_error(layer: Quantized, weight: Tensor) -> float:
    """|w of the codes - w| / |w|."""
    lost = whole = 0.0
    for rows, slab in layer.slabs(weight.new_empty(0, dtype=torch.float32)):
        w = weight[rows].float()
        lost += (layer.widen(rows, slab) - w).double().square().sum().item()
        whole += w.double().square().sum().item()
    return math.sqrt(lost / whole) if whole else 0.0
