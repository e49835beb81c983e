"""GGUF, the files of llama.cpp and ollama: shape, weights and tokenizer in one file.

The rows of wq and wk are in Meta's order: llama.cpp's converter undoes Hugging Face's, so nothing is reordered here.
Tensors of 16 and 32 bits are views of the mapped file. Quantized ones become float32 when they are read, the usual
types here and all others through the `gguf` package, a few rows at a time; where no dtype is asked for, a model of
theirs is bfloat16, whose rounding is finer than that of the codes.

Left out on purpose: architectures besides llama, files in parts, computing on the codes themselves.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from llama import gguf_header
from llama.checkpoint import hf
from llama.checkpoint.source import EMBEDDING, HEAD, Source, naming, read_fields
from llama.config import LARGEST, ModelArgs
from llama.errors import InputError
from llama.gguf_header import Stored
from llama.model import rope_frequencies

ARCHITECTURE = "llama"
ROPE_FACTORS = "rope_freqs.weight"  # by what llama.cpp divides each frequency; absent: 1
FIELDS = {  # our name -> theirs
    "dim": "llama.embedding_length",
    "n_layers": "llama.block_count",
    "n_heads": "llama.attention.head_count",
    "n_kv_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.attention.key_length",
    "ffn_dim": "llama.feed_forward_length",
    "vocab_size": "llama.vocab_size",
    "norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "max_seq_len": "llama.context_length",
    "rope_theta": "llama.rope.freq_base",
}
HEAD_DIMS = ("llama.attention.value_length", "llama.rope.dimension_count")  # must be that of the keys
FIXED = {
    "llama.expert_count": 0,
    "llama.expert_used_count": 0,
    "llama.attention.causal": True,
    "llama.rope.scaling.attn_factor": 1.0,
}
SCALING = ("llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.rope.scale_linear")
IDLE = ("llama.tensor_data_layout", "llama.rope.scaling.original_context_length", "llama.rope.scaling.finetuned")
KNOWN = {*FIELDS.values(), *HEAD_DIMS, *SCALING, *IDLE}
PLAIN = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
ROWS = 1024  # dequantized at once by the package, which needs several times their size
BLOCKS = 1024  # dequantized at once here: they stay in a core's cache, and torch takes one thread for them


class GgufSource(Source):
    """What it reads has Meta's names."""

    def __init__(self, path: Path) -> None:
        header = gguf_header.read(path)
        self.where = path
        if header.fields.get("split.count", 1) not in (0, 1):  # 0 where parts have been joined
            raise InputError(f"{path}: is one of {header.fields['split.count']} parts; join them with gguf-split first")
        self.names = names_of(header.fields.get(FIELDS["n_layers"]))
        ours = {theirs: name for name, theirs in self.names.items()}
        self.stored = {ours.get(name, name): tensor for name, tensor in header.tensors.items()}
        if len(self.stored) != len(header.tensors):
            raise InputError(f"{path}: has a tensor under Meta's name as well as under GGUF's; convert it anew")
        for name, tensor in self.stored.items():
            _check_kind(tensor.kind, self.place(name))
        factors = self.stored.pop(ROPE_FACTORS, None)
        self.shapes = {name: tensor.shape for name, tensor in self.stored.items()}
        with naming(path, FIELDS):
            self.args = _args_of(header.fields, self.shapes, factors and _read(_map(path), factors).float())
        kinds = {tensor.kind for tensor in self.stored.values() if len(tensor.shape) > 1}
        self.dtype = PLAIN.get(kinds.pop(), torch.bfloat16) if len(kinds) == 1 else torch.bfloat16

    def place(self, name: str) -> str:
        return super().place(self.names.get(name, name))

    @contextlib.contextmanager
    def open(self) -> Iterator[Callable[[str], Tensor]]:
        data = _map(self.where)
        yield lambda name: _read(data, self.stored[name])


def names_of(n_layers: Any) -> dict[str, str]:
    """Meta's name -> GGUF's for a model of so many layers; of none where that cannot be their number."""
    n_layers = n_layers if isinstance(n_layers, int) and n_layers <= LARGEST["n_layers"] else 0
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, n_layers)
    ours = [*hf.TOP, *(f"layers.{i}.{name}" for i in range(n_layers) for name in hf.BLOCK)]
    return {name: known.get_name(name, [".weight"]) for name in ours}


def _map(path: Path) -> Tensor:
    """The bytes of a file; a page is read when it is touched."""
    return torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)


def _read(data: Tensor, tensor: Stored) -> Tensor:
    part = data[tensor.offset : tensor.offset + tensor.n_bytes]
    if tensor.kind in PLAIN:
        weight = part.view(PLAIN[tensor.kind]).view(tensor.shape)
        return weight.clone() if weight.dim() == 1 else weight  # a norm that is kept would keep the pages of its block
    weight = torch.empty(math.prod(tensor.shape[:-1]), tensor.shape[-1])
    if tensor.kind in DEQUANTIZED:
        block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.kind]
        for codes, numbers in zip(
            part.view(-1, block_bytes).split(BLOCKS), weight.view(-1, block).split(BLOCKS), strict=True
        ):
            DEQUANTIZED[tensor.kind](codes, numbers)
        return weight.view(tensor.shape)
    with np.errstate(all="ignore"):  # what a damaged file holds may overflow; it is judged where it is used
        for codes, rows in zip(part.view(len(weight), -1).split(ROWS), weight.split(ROWS), strict=True):
            rows.copy_(torch.from_numpy(gguf.dequantize(codes.numpy(), tensor.kind)))
    return weight.view(tensor.shape)


def _q8_0(codes: Tensor, numbers: Tensor) -> None:
    torch.mul(codes[:, 2:].view(torch.int8), _halves(codes, 0), out=numbers)


def _q4_0(codes: Tensor, numbers: Tensor) -> None:
    torch.mul(_nibbles(codes[:, 2:]).view(torch.int8) - 8, _halves(codes, 0), out=numbers)


def _q4_1(codes: Tensor, numbers: Tensor) -> None:
    torch.mul(_nibbles(codes[:, 4:]), _halves(codes, 0), out=numbers).add_(_halves(codes, 2))


def _halves(codes: Tensor, at: int) -> Tensor:
    """The float16 at that byte of each block, [n, 1]: its scale, or its smallest number."""
    return codes[:, at : at + 2].view(torch.float16).float()


def _nibbles(codes: Tensor) -> Tensor:
    """Two codes per byte, [n, 16] -> [n, 32]: the low halves are the first 16 of a block."""
    return torch.cat((codes & 15, codes >> 4), 1)


# Blocks [n, bytes of one] to numbers [n, 32]: bit for bit what the package gives, in a third of its time.
DEQUANTIZED = {Kind.Q8_0: _q8_0, Kind.Q4_0: _q4_0, Kind.Q4_1: _q4_1}


def _check_kind(kind: Kind, place: str) -> None:
    """Raise InputError for a type whose codes the package cannot turn into numbers."""
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        raise InputError(f"{place}: the type {kind.name} is not supported; take a Q8_0 or F16 file") from None


def _args_of(fields: dict[str, Any], shapes: dict[str, tuple[int, ...]], factors: Tensor | None) -> ModelArgs:
    """ModelArgs of the metadata. Raises ValueError for an architecture or field that this code would not honour."""
    for name, only in (("architecture", ARCHITECTURE), ("type", "model")):  # of others, an adapter
        if fields.get(f"general.{name}", "model") != only:
            given = fields.get(f"general.{name}")
            raise ValueError(f"general.{name}: {given!r} is not supported, only {only!r}")
    own = {name: value for name, value in fields.items() if name.startswith(f"{ARCHITECTURE}.")}
    for name, value in own.items():
        if name not in KNOWN and FIXED.get(name, ...) != value:
            only = f"only {FIXED[name]!r}" if name in FIXED else "nothing is known of it here"
            raise ValueError(f"{name}: {value!r} is not supported, {only}")
    # The file holds what came of Llama 3.1's scaling, not its parameters: the slowest pair is divided by the factor.
    scaling = {"use_scaled_rope": factors is not None and not (factors == 1).all()}
    if scaling["use_scaled_rope"]:
        scaling["rope_scale_factor"] = factors.flatten()[-1].item()
    args = read_fields(
        FIELDS,
        {FIELDS["vocab_size"]: shapes.get(EMBEDDING, (-1,))[0]} | own,
        tie_word_embeddings=HEAD not in shapes,
        rope_linear_factor=_linear_factor(own),
        **scaling,
    )
    for name in HEAD_DIMS:
        if own.get(name, args.head_dim) != args.head_dim:
            raise ValueError(f"{name}: {own[name]!r} is not supported, only that of the keys, {args.head_dim}")
    if factors is not None:
        expected = rope_factors(args)
        if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-4, atol=0):
            raise ValueError(f"{ROPE_FACTORS}: is not the scaling of Llama 3.1 and 3.2, the only one that is supported")
    return args


def _linear_factor(own: dict[str, Any]) -> float | None:
    """By what positions are divided, as llama.cpp reads it: linear where no type is given, 0 for none."""
    kind, *factors = (own.get(name) for name in SCALING)
    if kind not in (None, "none", "linear"):
        raise ValueError(f"{SCALING[0]}: {kind!r} is not supported, only 'none' and 'linear'")
    factor = next((factor for factor in factors if factor is not None), 0.0)
    return None if kind == "none" or factor in (0.0, 1.0) else factor


def rope_factors(args: ModelArgs) -> Tensor:
    """By what RoPE scaling divides the frequency of each pair."""
    plain = replace(args, use_scaled_rope=False, rope_scale_factor=None)
    return rope_frequencies(plain) / rope_frequencies(args)
