"""GGUF, the files of llama.cpp and ollama: shape, weights and tokenizer in one file.

The rows of wq and wk are in Meta's order: llama.cpp's converter undoes Hugging Face's, so nothing is reordered here.
Tensors of 16 and 32 bits are views of the mapped file. Quantized ones become float32 when they are read, through the
`gguf` package, a few rows at a time; where no dtype is asked for, a model of theirs is bfloat16, whose rounding is
finer than that of the codes.

Left out on purpose: architectures besides llama, files in parts, computing on the codes themselves.
"""

from __future__ import annotations

import contextlib
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
from llama.checkpoint.source import EMBEDDING, HEAD, Source, naming
from llama.config import ModelArgs
from llama.errors import InputError
from llama.gguf_header import Stored
from llama.model import rope_frequencies

ARCHITECTURE = "llama"
# Meta's name -> GGUF's, for everything outside and inside a block.
TOP = {EMBEDDING: "token_embd.weight", "norm.weight": "output_norm.weight", HEAD: "output.weight"}
BLOCK = {
    "attention.wq.weight": "attn_q.weight",
    "attention.wk.weight": "attn_k.weight",
    "attention.wv.weight": "attn_v.weight",
    "attention.wo.weight": "attn_output.weight",
    "feed_forward.w1.weight": "ffn_gate.weight",
    "feed_forward.w2.weight": "ffn_down.weight",
    "feed_forward.w3.weight": "ffn_up.weight",
    "attention_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
}
ROPE_FACTORS = "rope_freqs.weight"  # by what llama.cpp divides each frequency; absent: 1
REQUIRED = ("embedding_length", "block_count", "feed_forward_length", "attention.head_count")
REQUIRED += ("attention.layer_norm_rms_epsilon",)
# Fields of the architecture that may be there: what else is read, what must have one value, what changes nothing.
READ = ("attention.head_count_kv", "attention.key_length", "attention.value_length", "context_length", "vocab_size")
READ += ("rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear")
FIXED = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True, "rope.scaling.attn_factor": 1.0}
IDLE = ("tensor_data_layout", "rope.scaling.original_context_length", "rope.scaling.finetuned")
PLAIN = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
ROWS = 1024  # dequantized at once; the package needs several times their size


class GgufSource(Source):
    """What it reads has Meta's names."""

    def __init__(self, path: Path) -> None:
        header = gguf_header.read(path)
        self.where = path
        if header.fields.get("split.count", 1) not in (0, 1):  # 0 where parts have been joined
            raise InputError(f"{path}: is one of {header.fields['split.count']} parts; join them with gguf-split first")
        n_layers = header.fields.get(f"{ARCHITECTURE}.block_count", 0)
        meta_names = {theirs: ours for ours, theirs in names_of(n_layers if isinstance(n_layers, int) else 0).items()}
        self.stored = {meta_names.get(name, name): tensor for name, tensor in header.tensors.items()}
        self.names = {ours: theirs for theirs, ours in meta_names.items()}
        if len(self.stored) != len(header.tensors):
            raise InputError(f"{path}: has a tensor under Meta's name as well as under GGUF's; convert it anew")
        factors = self._rope_factors()
        self.shapes = {name: tensor.shape for name, tensor in self.stored.items()}
        for name, tensor in self.stored.items():
            _check_kind(tensor.kind, self.place(name))
        with naming(path):
            self.args = _args_of(header.fields, self.shapes, factors)
        kinds = {tensor.kind for tensor in self.stored.values() if len(tensor.shape) > 1}
        self.dtype = PLAIN.get(kinds.pop(), torch.bfloat16) if len(kinds) == 1 else torch.bfloat16

    def place(self, name: str) -> str:
        return super().place(self.names.get(name, name))

    def _rope_factors(self) -> Tensor | None:
        """Those that the file holds; no weight of the model."""
        tensor = self.stored.pop(ROPE_FACTORS, None)
        if tensor is None:
            return None
        if tensor.kind is not Kind.F32 or len(tensor.shape) != 1:
            raise InputError(f"{self.place(ROPE_FACTORS)}: is not a list of float32")
        return _read(_map(self.where), tensor)

    @contextlib.contextmanager
    def open(self) -> Iterator[Callable[[str], Tensor]]:
        data = _map(self.where)
        yield lambda name: _read(data, self.stored[name])


def names_of(n_layers: int) -> dict[str, str]:
    """Meta's name -> GGUF's for a model of so many layers."""
    layers = range(min(n_layers, 1024))
    return TOP | {f"layers.{i}.{meta}": f"blk.{i}.{theirs}" for i in layers for meta, theirs in BLOCK.items()}


def _map(path: Path) -> Tensor:
    """The bytes of a file; a page is read when it is touched."""
    return torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)


def _read(data: Tensor, tensor: Stored) -> Tensor:
    part = data[tensor.offset : tensor.offset + tensor.n_bytes]
    if tensor.kind in PLAIN:
        weight = part.view(PLAIN[tensor.kind]).view(tensor.shape)
        return weight.clone() if weight.dim() == 1 else weight  # a norm that is kept would keep the pages of its block
    weight = torch.empty(tensor.shape)
    with np.errstate(all="ignore"):  # what a damaged file holds may overflow; it is judged where it is used
        for codes, rows in zip(part.view(tensor.shape[0], -1).split(ROWS), weight.split(ROWS), strict=True):
            rows.copy_(torch.from_numpy(gguf.dequantize(codes.numpy(), tensor.kind)).view(rows.shape))
    return weight


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
    prefix = f"{ARCHITECTURE}."
    own = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
    for name in REQUIRED:
        if name not in own:
            raise ValueError(f"{prefix}{name}: is missing")
    for name, value in own.items():
        if name not in (*REQUIRED, *READ, *IDLE) and FIXED.get(name, ...) != value:
            only = f"only {FIXED[name]!r}" if name in FIXED else "nothing is known of it here"
            raise ValueError(f"{prefix}{name}: {value!r} is not supported, {only}")
    args = ModelArgs(
        dim=own["embedding_length"],
        n_layers=own["block_count"],
        n_heads=own["attention.head_count"],
        n_kv_heads=own.get("attention.head_count_kv"),
        head_dim=own.get("attention.key_length"),
        vocab_size=own.get("vocab_size", shapes.get(EMBEDDING, (-1,))[0]),
        norm_eps=own["attention.layer_norm_rms_epsilon"],
        tie_word_embeddings=HEAD not in shapes,
        max_seq_len=own.get("context_length"),
        rope_theta=own.get("rope.freq_base", 10_000.0),
        rope_linear_factor=_linear_factor(own),
    )
    for name in ("attention.value_length", "rope.dimension_count"):
        if own.get(name, args.head_dim) != args.head_dim:
            raise ValueError(f"{prefix}{name}: {own[name]!r} is not supported, only that of the keys, {args.head_dim}")
    ffn = own["feed_forward_length"]
    if not isinstance(ffn, int) or not 0 < ffn < 1 << 20:
        raise ValueError(f"{prefix}feed_forward_length: {ffn!r} is not a size")
    return _scaled(args.with_ffn_dim(ffn), factors)


def _linear_factor(own: dict[str, Any]) -> float | None:
    """By what positions are divided, as llama.cpp reads it: linear where no type is given, 0 for none."""
    kind = own.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise ValueError(f"{ARCHITECTURE}.rope.scaling.type: {kind!r} is not supported, only 'none' and 'linear'")
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear", 0.0))
    return None if kind == "none" or factor in (0.0, 1.0) else factor


def _scaled(args: ModelArgs, factors: Tensor | None) -> ModelArgs:
    """With the scaling of Llama 3.1 and 3.2 that divides each frequency by its factor.

    The file holds what came of the scaling, not its parameters: the slowest pair is divided by `rope_scale_factor`
    itself. Raises ValueError where ours would divide by anything else.
    """
    if factors is None or (len(factors) == args.head_dim // 2 and (factors == 1).all()):
        return args
    scaled = replace(args, use_scaled_rope=True, rope_scale_factor=factors[-1].item())
    expected = rope_factors(scaled)
    if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-4, atol=0):
        raise ValueError(f"{ROPE_FACTORS}: is not the scaling of Llama 3.1 and 3.2, the only one that is supported")
    return scaled


def rope_factors(args: ModelArgs) -> Tensor:
    """By what RoPE scaling divides the frequency of each pair."""
    plain = replace(args, use_scaled_rope=False, rope_scale_factor=None)
    return rope_frequencies(plain) / rope_frequencies(args)
