"""A whole decode step in C, at the speed of the CPU's memory: weights of bfloat16, int8 or int4.

In PyTorch, on two Xeon cores with AMX, a product of one row with a matrix reads 13 GB/s of the 25 that the machine
delivers, scaled_dot_product_attention reads the cache at 6, and 700 small operations cost another tenth of the step.
decode_step.c says how it avoids each. Its slow twin is `Transformer.forward` with a cache, to which it is equal up to
rounding. Several tokens of a sequence at once give the same bits as one after the other, in every format and for any
number. The weights are read once for 16 tokens, which with bfloat16 cost a fifth more than one. With int8 and int4 the
time goes into arithmetic from a few tokens on: four layers of Llama 3.2 1B without a head, in ms, on two threads of one
core whose memory delivers 26 GB/s (the fastest of 25 runs, on a machine with other load):

    tokens        1      8     16
    bfloat16   18.7   19.7   22.8
    int8       10.3   13.6   19.7
    int4        7.6   17.1   23.6
"""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llama.cache import KVCache
from llama.kernels.cpu import native
from llama.model import Attention, FeedForward, RMSNorm, TokenEmbedding, Transformer, TransformerBlock, rope_table
from llama.quantization import Int4Linear, Int8Embedding, Int8Linear, quantization_of

FLAGS = tuple("-mavx512f -mavx512vl -mavx512bw -mavx512bf16 -mavx512vnni -mamx-tile -mamx-bf16 -mamx-int8".split())
LAYER_WEIGHTS = (
    "attention.wq attention.wk attention.wv attention.wo feed_forward.w1 feed_forward.w2 feed_forward.w3 "
    "attention_norm ffn_norm"
).split()
PLAIN = {Transformer, TransformerBlock, Attention, FeedForward, RMSNorm, nn.ModuleList}


class _Format(NamedTuple):
    """What decode_step.c calls a format of matrix, and how many columns it takes at a time."""

    code: int
    dtype: torch.dtype
    columns: int


_BF16, _INT8, _INT4 = _Format(0, torch.bfloat16, 32), _Format(1, torch.int8, 64), _Format(2, torch.uint8, 128)
FORMATS = {nn.Linear: _BF16, TokenEmbedding: _BF16, Int8Linear: _INT8, Int8Embedding: _INT8, Int4Linear: _INT4}


class Matrix(ctypes.Structure):
    """A matrix as decode_step.c sees it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("data", "scales")),
        *((name, ctypes.c_int64) for name in ("format", "group_size")),
    )

    @classmethod
    def of(cls, module: nn.Module) -> Matrix:
        """The matrix of a linear layer or a table. It holds addresses, so the module has to outlive it."""
        scales = getattr(module, "scales", None)
        address = None if scales is None else scales.data_ptr()
        group_size = getattr(module, "group_size", None) or 0
        return cls(module.weight.data_ptr(), address, FORMATS[type(module)].code, group_size)


class _Layer(ctypes.Structure):
    _fields_ = tuple(
        (name.split(".")[-1], ctypes.c_void_p if name.endswith("norm") else Matrix) for name in LAYER_WEIGHTS
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_int64) for n in "dim n_layers n_heads n_kv_heads head_dim ffn_dim vocab_size".split()),
        ("norm_eps", ctypes.c_float),
        ("tok_embeddings", Matrix),
        ("output", Matrix),
        ("norm", ctypes.c_void_p),
        ("layers", ctypes.POINTER(_Layer)),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None where this machine cannot run it: no AMX, no C compiler."""
    if not torch.cpu._is_amx_tile_supported():
        return None
    loaded = native.load("decode_step", FLAGS)
    if loaded is None or loaded.decode_init() != 0:
        return None
    loaded.decode_workspace.argtypes = [ctypes.POINTER(_Model), ctypes.c_int64, ctypes.c_int64]
    loaded.decode_workspace.restype = ctypes.c_int64
    loaded.decode_step.argtypes = [ctypes.POINTER(_Model), *[ctypes.c_void_p] * 7, *[ctypes.c_int64] * 3]
    loaded.rms_norm.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_float, ctypes.c_int64, ctypes.c_int64]
    loaded.silu_mul.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    loaded.rotate_heads.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 5
    loaded.widen_rows.argtypes = [ctypes.POINTER(Matrix), *[ctypes.c_int64] * 3, ctypes.c_void_p]
    loaded.rms_norm.restype = loaded.widen_rows.restype = loaded.silu_mul.restype = loaded.rotate_heads.restype = None
    loaded.read_all.argtypes, loaded.read_all.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_int64
    return loaded


def why_not(model: Transformer) -> str | None:
    """Why a model that its CPU has the instructions for is not run by them; None where nothing is known to be wrong."""
    is_there = model.norm.weight.device.type == "cpu" and model.dtype is torch.bfloat16
    if not is_there or not torch.cpu._is_amx_tile_supported():
        return None
    if library() is None:
        return native.why_not.get("decode_step")
    config = quantization_of(model)
    is_known = config is None or not (config.zero_points or config.int8 or (config.bits == 8 and config.group_size))
    return None if is_known else f"the C step has no {config.name}"


def supports(model: Transformer) -> bool:
    """Whether the kernel computes what `model` computes: its own modules, in main memory.

    Norms, activations and cache in bfloat16; the matrices of the blocks in one of bfloat16, int8 and int4.
    """
    args, n_values = model.args, 0
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return False  # a hook needs the real forward; so do adapters and other layers, below
        if not (type(module) in FORMATS or type(module) in PLAIN) or not _is_as_expected(module):
            return False
        n_values += _n_values(module)
    body = {type(m) for block in model.layers for m in block.modules() if type(m) in FORMATS}
    columns = max(FORMATS[layer].columns for layer in {*body, type(_head(model))})
    fits = len(body) == 1 and args.dim % columns == args.ffn_dim % columns == args.vocab_size % 16 == 0
    fits = fits and args.n_heads * args.head_dim == args.dim
    fits = fits and args.head_dim % 32 == 0 and args.head_dim <= 256 and args.n_kv_heads * args.head_dim % 16 == 0
    return fits and n_values == args.n_params() and library() is not None  # a pruned one has fewer


def _head(model: Transformer) -> nn.Module:
    return model.tok_embeddings if model.output is None else model.output


def _n_values(module: nn.Module) -> int:
    """Parameters of a module itself, two in a byte of int4."""
    packed = module.weight.numel() if type(module) is Int4Linear else 0
    return sum(p.numel() for p in module._parameters.values() if p is not None) + packed


def _is_as_expected(module: nn.Module) -> bool:
    """Contiguous tensors in main memory, of the dtypes that the format has."""
    expected = FORMATS[type(module)].dtype if type(module) in FORMATS else torch.bfloat16
    tensors = [(p, expected) for p in module._parameters.values() if p is not None]
    if type(module) in (Int8Linear, Int8Embedding, Int4Linear):
        tensors.append((module.scales, torch.bfloat16 if type(module) is Int4Linear else torch.float32))
    if type(module) is Int8Embedding and module.dtype is not torch.bfloat16:
        return False
    return all(t.dtype is dtype and t.device.type == "cpu" and t.is_contiguous() for t, dtype in tensors)


class NativeStep:
    """One decode step of `model` over `cache`: call it with the newest tokens and their positions, both [B, T]."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        args = model.args
        layers = (_Layer * args.n_layers)()
        for layer, block in zip(layers, model.layers, strict=True):
            for name in LAYER_WEIGHTS:
                module = block.get_submodule(name)
                value = module.weight.data_ptr() if type(module) is RMSNorm else Matrix.of(module)
                setattr(layer, name.split(".")[-1], value)
        shape = (args.dim, args.n_layers, args.n_heads, args.n_kv_heads, args.head_dim, args.ffn_dim, args.vocab_size)
        tables = (Matrix.of(model.tok_embeddings), Matrix.of(_head(model)), model.norm.weight.data_ptr())
        self._struct = _Model(*shape, args.norm_eps, *tables, layers)
        self._cos_sin = rope_table(torch.arange(cache.max_len)[None], model.rope_freqs)  # of every slot
        self._workspace = cache.k.new_empty(0)

    def __call__(self, tokens: Tensor, pos: Tensor) -> Tensor:
        """Logits [B, T, V]. Raises IndexError for a token outside the vocabulary or a position outside the cache."""
        cache, (B, T) = self.cache, tokens.shape
        if cache.k.shape[1] != B:
            raise ValueError(f"the cache was made for {cache.k.shape[1]} sequences, not {B}")
        needed = library().decode_workspace(self._struct, B * T, cache.max_len)
        if len(self._workspace) < needed:
            self._workspace = cache.k.new_empty(needed)
        logits = cache.k.new_empty(B, T, self.model.args.vocab_size)
        tensors = (tokens.contiguous(), pos.contiguous(), self._cos_sin, cache.k, cache.v, self._workspace, logits)
        pointers = [tensor.data_ptr() for tensor in tensors]
        if library().decode_step(self._struct, *pointers, B, T, cache.max_len) != 0:
            raise IndexError(f"a token is outside the vocabulary, or a position outside the {cache.max_len} slots")
        return logits
