"""Weight-only quantization: weights of 8 or 4 bits, activations in floating point.

    errors = quantize(model, Quantization(bits=8))      # swaps the layers; relative error of each matrix

A decode step spends its time on reading weights, so half or a quarter of the bytes is worth nearly that much time.

    int8   a scale for each row, or for each group of a row
    int4   a scale for each group of a row; with zero-points an offset as well, so that the 16 values that a weight can
           have lie wherever the weights of its group do

How they are chosen and stored: codes.py; chosen for what a layer computes on a text: calibration.py, which may also
keep some matrices of a model of 4 bits in 8. The layers that multiply by codes: code_layers.py.

Tables (embedding and head, mostly the same matrix) have int8 with a scale for each row whatever the blocks have: their
rows are both looked up and multiplied, and the logits depend on the head directly. Norms keep their precision, and say
what dtype the model computes in.

Left out on purpose: quantized activations, other bit widths. A quantized KV cache is in cache.py.
"""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from llama import codes
from llama.code_layers import Int4Linear, Int8Embedding, Int8Linear, Quantized
from llama.codes import BLOCK, Codes, Grid, pack, quantize_groups, quantize_rows
from llama.errors import InputError
from llama.kernels import gpu
from llama.kernels.cpu import decode_step
from llama.model import TokenEmbedding, Transformer
from llama.surgery import replace_modules

GROUP_SIZES = (32, 64, 128)
TABLES = ("tok_embeddings", "output")  # int8 also in an int4 model
FIELDS = ("method", "bits", "group_size", "zero_points", "int8")  # of params.json
CALIBRATED = "gptq"  # the method of codes that calibration.py has chosen
TRAINED = "qat"  # of those that weights were trained through: training/qat.py


@dataclass(frozen=True)
class Quantization:
    """How a model is quantized. Raises ValueError naming the field where a value is impossible."""

    bits: int
    group_size: int | None = None  # None: of int8 a whole row, of int4 32
    zero_points: bool = False  # of int4: an offset for each group beside its scale
    method: str | None = None  # how the codes are chosen: CALIBRATED, TRAINED, or None: each weight by itself
    int8: tuple[
        str, ...
    ] = ()  # matrices of the blocks, by name, that have 8 bits with a scale for each row all the same

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
        plain = {8: "absmax", 4: "least-squares"}[self.bits]
        if self.method not in (None, plain, CALIBRATED, TRAINED):
            raise ValueError(f"method={self.method!r} is not known for {self.bits} bits")
        object.__setattr__(self, "method", self.method or plain)
        is_list = isinstance(self.int8, (list, tuple)) and all(isinstance(name, str) for name in self.int8)
        if not is_list or (self.int8 and self.bits == 8):
            raise ValueError(f"int8={self.int8!r} is no list of the matrices of a model of 4 bits that have 8")
        object.__setattr__(self, "int8", tuple(self.int8))

    @property
    def grid(self) -> Grid:
        """What the codes of the blocks' matrices can stand for."""
        if self.bits == 8:
            return codes.INT8_ROWS if self.group_size is None else codes.INT8_GROUPS
        return codes.INT4_ZERO_POINTS if self.zero_points else codes.INT4

    @property
    def name(self) -> str:
        """Short, for a line that says what is computed: int4, int4 with zero-points, int8 in groups."""
        in_groups = self.bits == 8 and self.group_size is not None
        name = f"int{self.bits}" + " with zero-points" * self.zero_points + " in groups" * in_groups
        return name + (f" and {len(self.int8)} matrices of int8" if self.int8 else "")

    def of(self, name: str) -> Quantization:
        """How this matrix is quantized: tables, and the matrices that are named, in 8 bits."""
        is_wide = name in TABLES or name in self.int8
        return Quantization(8, method=CALIBRATED if self.method == CALIBRATED else None) if is_wide else self

    @classmethod
    def from_params(cls, content: Any) -> Quantization:
        """Read what `to_params` wrote."""
        if not isinstance(content, dict) or content.keys() - set(FIELDS) or not {"bits", "method"} <= content.keys():
            raise ValueError(f"quantization: {content!r} is not an object of {', '.join(FIELDS)}")
        try:
            return cls(**{name: value for name, value in content.items() if value is not None})
        except (ValueError, TypeError) as error:  # TypeError: a list where a number should be
            raise ValueError(f"quantization.{error}") from None

    def to_params(self) -> dict[str, Any]:
        """The field `quantization` of a params.json."""
        values = {name: getattr(self, name) for name in FIELDS} | {"int8": list(self.int8)}
        return {name: value for name, value in values.items() if value or name in ("method", "bits")}


@torch.no_grad()
def quantize(model: Transformer, config: Quantization, progress: bool = False) -> dict[str, float]:
    """Swap every matrix of a model for its codes, each chosen for itself; return the relative error of each matrix,
    |w of the codes - w| / |w|.

    Raises InputError naming the weight for values that are not finite or exceed what the format holds, ValueError for a
    model that is quantized already or has adapters.
    """
    names, layers, errors = matrices(model, config), {}, {}
    hidden = None if progress else True
    for module, name in tqdm(names.items(), f"int{config.bits}", unit="matrix", disable=hidden, leave=False):
        layers[module] = rounded(module, name, config)
        errors[name] = _relative_error(layers[module], module.weight)
    replace_modules(model, lambda _, module: module in layers, lambda module: layers[module])
    model.quantization = config
    return errors


def quantized_copy(model: Transformer, config: Quantization) -> Transformer:
    """A quantized form of a model, which stays as it is; they share what is not quantized. Raises as `quantize`."""
    form = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    quantize(form, config)
    return form


def lay_out(model: Transformer, config: Quantization) -> None:
    """Swap in layers whose codes are yet to be filled in: to read a file, or to plan without the weights.

    Raises ValueError naming the field of `config` for a matrix that the model does not have.
    """
    names = named(model, config)
    replace_modules(model, lambda _, module: module in names, lambda module: empty(module, names[module], config))
    model.quantization = config


def quantization_of(model: nn.Module) -> Quantization | None:
    """How a model is quantized; None where it is not."""
    return getattr(model, "quantization", None)


def slow_reason(model: Transformer) -> str | None:
    """Why decoding with these weights is slower than with those that they were made from; None where it is not."""
    config, device = quantization_of(model), model.norm.weight.device
    if config is None:
        return None
    if device.type == "cpu":
        usual = "the C step for a CPU computes in bfloat16 (dtype=bfloat16)"
        reason = None if decode_step.supports(model) else decode_step.why_not(model) or usual
    else:
        reason = None if gpu.ops(device) is not None else gpu.why_not(device)
    if reason is None:
        return None
    return (
        f"int{config.bits} weights save memory here and no time: {reason}, so they are widened before each product; "
        "decoding is faster from the checkpoint that they were made from"
    )


def matrices(model: Transformer, config: Quantization) -> dict[nn.Module, str]:
    """The modules to be quantized, and their names. Raises as `quantize` does."""
    names = named(model, config)
    for module, name in names.items():
        weight, grid = module.weight, config.of(name).grid
        largest = max(part.abs().amax().item() if part.isfinite().all() else math.inf for part in weight.split(4096))
        if largest == math.inf:
            raise InputError(f"{name}.weight: holds values that are not finite; the checkpoint is damaged")
        if grid.dtype == torch.float16 and largest > torch.finfo(torch.float16).max:
            remedy = "use zero_points=False" if grid.has_offsets else "leave out group_size"
            raise InputError(f"{name}.weight: values exceed float16, which scales and offsets have; {remedy}")
    return names


def named(model: Transformer, config: Quantization) -> dict[nn.Module, str]:
    """The same, whatever their values."""
    if quantization_of(model) is not None:
        raise ValueError("the model is quantized already")
    names = {module: name for name, module in model.named_modules() if type(module) in (nn.Linear, TokenEmbedding)}
    if len(names) != 7 * model.args.n_layers + (1 if model.output is None else 2):
        raise ValueError("the model has layers that are not plain; remove adapters first")
    for name in config.int8:
        if name in TABLES or name not in names.values():
            raise ValueError(f"quantization.int8: the blocks have no matrix {name!r}")
    return names


def rounded(module: nn.Module, name: str, config: Quantization) -> Quantized:
    """What takes the place of a linear layer or table, with the nearest codes of each weight."""
    config = config.of(name)
    if config.grid is codes.INT8_ROWS:
        return _int8(module, *quantize_rows(module.weight))
    return linear(quantize_groups(module.weight, config.group_size, config.grid), config)


def of_codes(module: nn.Module, found: Codes, config: Quantization) -> Quantized:
    """What takes the place of a linear layer or table, with these codes."""
    if config.grid is codes.INT8_ROWS:
        return _int8(module, found.codes, found.scales[:, 0].contiguous())
    return linear(found, config)


def linear(found: Codes, config: Quantization) -> Quantized:
    """The linear layer that holds these codes."""
    q, scales, offsets = found
    if config.bits == 8:
        return Int8Linear(q, scales if config.group_size else scales[:, 0].contiguous(), config.group_size)
    return Int4Linear(pack(q, config.grid.low), scales, config.group_size, offsets, q.shape[1])


def empty(module: nn.Module, name: str, config: Quantization) -> Quantized:
    """The same with codes that are yet to be filled in."""
    new = functools.partial(torch.empty, device=module.weight.device)
    (n, k), config = module.weight.shape, config.of(name)
    size, grid = config.group_size, config.grid
    if grid is codes.INT8_ROWS:
        return _int8(module, new(n, k, dtype=torch.int8), new(n))
    groups = functools.partial(new, n, math.ceil(k / size), dtype=grid.dtype)
    if config.bits == 8:
        return Int8Linear(new(n, k, dtype=torch.int8), groups(), size)
    packed = new(n, BLOCK // 2 * math.ceil(k / BLOCK), dtype=torch.uint8)
    return Int4Linear(packed, groups(), size, groups() if grid.has_offsets else None, k)


def _int8(module: nn.Module, codes: Tensor, scales: Tensor) -> Quantized:
    if isinstance(module, TokenEmbedding):
        return Int8Embedding(codes, scales, module.weight.dtype)
    return Int8Linear(codes, scales)


def _relative_error(layer: Quantized, weight: Tensor) -> float:
    lost = whole = 0.0
    for rows, slab in layer.slabs(weight.new_empty(0, dtype=torch.float32)):
        w = weight[rows].float()
        lost += (layer.widen(rows, slab) - w).double().square().sum().item()
        whole += w.double().square().sum().item()
    return math.sqrt(lost / whole) if whole else 0.0
