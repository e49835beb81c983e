"""A whole decode step in C, at the speed of the CPU's memory: weights of bfloat16, int8 or int4, of any width.

In PyTorch a product of one row with a matrix reads half of what the machine's memory delivers, attention over the cache
a quarter, and 700 small operations cost another tenth of the step; products.h and decode_step.c say how they avoid it.
Its slow twin is `Transformer.forward` with a cache, to which it is equal up to rounding. Several tokens of a sequence
at once give the same bits as one after the other, in every format and for any number. The weights are read once for 16
tokens; from a few on, the time goes into arithmetic. Llama 3.2 1B with random weights, a step of so many sequences in
ms, on two cores (the fastest of 7 runs, all formats in turns, in one process):

    sequences                       1      8     16
    bfloat16                      115    171    225
    int8                           55    100    153
    int4                           38    119    164
    int4 with zero-points          41    105    175

Left out on purpose: tile registers (AMX). They make steps of many sequences faster on the CPUs that have them, and
would be a second way to compute each product.
"""

from __future__ import annotations

import ctypes
import functools
import math

import torch
from torch import Tensor, nn

from llama.cache import KVCache
from llama.code_layers import Int4Linear, Int8Embedding, Int8Linear, Quantized
from llama.kernels.cpu import native
from llama.model import Attention, FeedForward, RMSNorm, TokenEmbedding, Transformer, TransformerBlock, rope_table

FLAGS = tuple(f"-mavx512{part}" for part in ("f", "vl", "bw", "dq", "bf16", "vnni"))
NO_AVX512 = "this CPU has no AVX-512 with VNNI and bfloat16"
LAYER_WEIGHTS = (
    "attention.wq attention.wk attention.wv attention.wo feed_forward.w1 feed_forward.w2 feed_forward.w3 "
    "attention_norm ffn_norm"
).split()
PLAIN = {Transformer, TransformerBlock, Attention, FeedForward, RMSNorm, nn.ModuleList}


MOST_HEAD_DIM = 128
FORMATS = {nn.Linear: 0, TokenEmbedding: 0, Int8Linear: 1, Int8Embedding: 1, Int4Linear: 2}  # as products.h has them
DTYPES = (torch.bfloat16, torch.int8, torch.uint8)  # of the weights of each


class Matrix(ctypes.Structure):
    """A matrix as decode_step.c sees it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("data", "scales", "offsets")),
        *((name, ctypes.c_int64) for name in ("format", "group_size", "N", "K")),
    )

    @classmethod
    def of(cls, module: nn.Module) -> Matrix:
        """The matrix of a linear layer or a table. It holds addresses, so the module has to outlive it."""
        numbers = (getattr(module, name, None) for name in ("scales", "offsets"))
        addresses = (None if tensor is None else tensor.data_ptr() for tensor in numbers)
        n, k = shape_of(module)
        group_size = getattr(module, "group_size", None) or 0
        return cls(module.weight.data_ptr(), *addresses, FORMATS[type(module)], group_size, n, k)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """Rows and columns of the matrix of a linear layer or a table."""
    is_quantized = isinstance(module, Quantized)
    return (module.out_features, module.in_features) if is_quantized else tuple(module.weight.shape)


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


def has_instructions() -> bool:
    """Whether the CPU has what decode_step.c is made of."""
    return torch.cpu._is_avx512_bf16_supported() and torch.cpu._is_vnni_supported()


class _Cache(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("keys", "values", "key_scales", "value_scales"))


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None where this machine cannot run it: no such CPU, no C compiler."""
    loaded = native.load("decode_step", FLAGS) if has_instructions() else None
    if loaded is None:
        return None
    loaded.decode_workspace.argtypes = [ctypes.POINTER(_Model), ctypes.c_int64, ctypes.c_int64]
    loaded.decode_workspace.restype = ctypes.c_int64
    shape = [ctypes.c_int64] * 3
    loaded.decode_step.argtypes = [ctypes.POINTER(_Model), *[ctypes.c_void_p] * 3, ctypes.POINTER(_Cache)]
    loaded.decode_step.argtypes += [*[ctypes.c_void_p] * 2, *shape]
    loaded.rms_norm.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_float, ctypes.c_int64, ctypes.c_int64]
    loaded.silu_mul.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    loaded.rotate_heads.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 5
    loaded.widen_rows.argtypes = [ctypes.POINTER(Matrix), *[ctypes.c_int64] * 2, ctypes.c_void_p]
    loaded.rms_norm.restype = loaded.widen_rows.restype = loaded.silu_mul.restype = loaded.rotate_heads.restype = None
    loaded.read_all.argtypes, loaded.read_all.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_int64
    return loaded


def why_not(model: Transformer) -> str | None:
    """Why a model in bfloat16 on a CPU is not run by the kernel; None where it is, and for other models."""
    if model.norm.weight.device.type != "cpu" or model.dtype is not torch.bfloat16:
        return None
    if not has_instructions():
        return NO_AVX512
    if library() is None:
        return native.why_not.get("decode_step")
    return None if supports(model) else "the model has layers that the C step does not have"


def supports(model: Transformer) -> bool:
    """Whether the kernel computes what `model` computes: its own modules, in main memory, in bfloat16 or codes."""
    args, n_values = model.args, 0
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return False  # a hook needs the real forward; so do adapters and other layers, below
        if not (type(module) in FORMATS or type(module) in PLAIN) or not _is_as_expected(module):
            return False
        n_values += math.prod(shape_of(module)) if type(module) in FORMATS else _n_values(module)
    is_whole = n_values == args.n_params()  # one whose layers were changed by hand has fewer
    return is_whole and args.head_dim <= MOST_HEAD_DIM and library() is not None


def _n_values(module: nn.Module) -> int:
    return sum(p.numel() for p in module._parameters.values() if p is not None)


def _head(model: Transformer) -> nn.Module:
    return model.tok_embeddings if model.output is None else model.output


def _is_as_expected(module: nn.Module) -> bool:
    """Contiguous tensors in main memory, of the dtypes that the format has."""
    expected = DTYPES[FORMATS[type(module)]] if type(module) in FORMATS else torch.bfloat16
    tensors = [(p, expected) for p in module._parameters.values() if p is not None]
    if isinstance(module, Int4Linear):
        dtype = torch.bfloat16 if module.offsets is None else torch.float16
        tensors += [(t, dtype) for t in (module.scales, module.offsets) if t is not None]
    elif isinstance(module, Quantized):
        tensors.append((module.scales, torch.float32 if module.group_size is None else torch.float16))
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
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self._cache = _Cache(*(getattr(cache, name).data_ptr() for name in cache.parts))

    def __call__(self, tokens: Tensor, pos: Tensor) -> Tensor:
        """Logits [B, T, V]. Raises IndexError for a token outside the vocabulary or a position outside the cache."""
        cache, (B, T) = self.cache, tokens.shape
        if cache.k.shape[1] != B:
            raise ValueError(f"the cache was made for {cache.k.shape[1]} sequences, not {B}")
        needed = library().decode_workspace(self._struct, B * T, min(int(pos.max()), cache.max_len))
        if len(self._workspace) < needed:
            self._workspace = torch.empty(needed, dtype=torch.uint8)
        logits = torch.empty(B, T, self.model.args.vocab_size, dtype=torch.bfloat16)
        angles = rope_table(pos, self.model.rope_freqs)
        tensors = (tokens.contiguous(), pos.contiguous(), angles, self._workspace, logits)
        token_data, pos_data, cos_sin, workspace, out = (tensor.data_ptr() for tensor in tensors)
        arguments = (self._struct, token_data, pos_data, cos_sin, self._cache, workspace, out, B, T, cache.max_len)
        if library().decode_step(*arguments) != 0:
            raise IndexError(f"a token is outside the vocabulary, or a position outside the {cache.max_len} slots")
        return logits
