"""A whole decode step in C, at the speed of the CPU's memory: bfloat16, a few tokens a row, KV cache on.

In PyTorch, on two Xeon cores with AMX, a product of one row with a matrix reads 13 GB/s of the 25 that the machine
delivers, scaled_dot_product_attention reads the cache at 6, and 700 small operations cost another tenth of the step.
decode_step.c says how it gets around each. Its slow twin is `Transformer.forward` with a cache, to which it is equal up
to rounding. Several tokens of a row at once give the same bits as one after the other, and up to 16 tokens in all cost
about as much as one: the weights are read once.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor, nn

from llama.cache import KVCache
from llama.kernels import native
from llama.model import Attention, FeedForward, RMSNorm, TokenEmbedding, Transformer, TransformerBlock, rope_table

FLAGS = ("-mavx512f", "-mavx512vl", "-mavx512bf16", "-mamx-tile", "-mamx-bf16")
LAYER_WEIGHTS = (
    "attention.wq attention.wk attention.wv attention.wo feed_forward.w1 feed_forward.w2 feed_forward.w3 "
    "attention_norm ffn_norm"
).split()
PLAIN = {Transformer, TransformerBlock, Attention, FeedForward, RMSNorm, TokenEmbedding, nn.Linear, nn.ModuleList}


class _Layer(ctypes.Structure):
    _fields_ = tuple((name.split(".")[-1], ctypes.c_void_p) for name in LAYER_WEIGHTS)


class _Model(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_int64) for n in "dim n_layers n_heads n_kv_heads head_dim ffn_dim vocab_size".split()),
        ("norm_eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("tok_embeddings", "norm", "output")),
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
    loaded.rms_norm.restype = loaded.silu_mul.restype = loaded.rotate_heads.restype = None
    loaded.read_all.argtypes, loaded.read_all.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_int64
    return loaded


def supports(model: Transformer) -> bool:
    """Whether the kernel computes what `model` computes: its own modules, plain bfloat16 weights in main memory."""
    args, weights = model.args, list(model.parameters())
    if any(w.dtype is not torch.bfloat16 or w.device.type != "cpu" or not w.is_contiguous() for w in weights):
        return False
    if any(type(m) not in PLAIN or m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return False  # an adapter, a quantized layer, somebody who looks on: they all need the real forward
    is_whole = sum(w.numel() for w in weights) == args.n_params()  # a pruned one has fewer
    fits = args.dim % 32 == 0 and args.ffn_dim % 32 == 0 and args.vocab_size % 16 == 0
    fits = fits and args.head_dim % 32 == 0 and args.head_dim <= 256 and args.n_kv_heads * args.head_dim % 16 == 0
    return is_whole and fits and library() is not None


class NativeStep:
    """One decode step of `model` over `cache`: call it with the newest tokens and their positions, both [B, T]."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        args = model.args
        layers = (_Layer * args.n_layers)()
        for layer, block in zip(layers, model.layers, strict=True):
            for name in LAYER_WEIGHTS:
                setattr(layer, name.split(".")[-1], block.get_submodule(name).weight.data_ptr())
        head = model.tok_embeddings if model.output is None else model.output
        shape = (args.dim, args.n_layers, args.n_heads, args.n_kv_heads, args.head_dim, args.ffn_dim, args.vocab_size)
        tables = (module.weight.data_ptr() for module in (model.tok_embeddings, model.norm, head))
        self._struct = _Model(*shape, args.norm_eps, *tables, layers)
        self._workspace = cache.k.new_empty(0)

    def __call__(self, tokens: Tensor, pos: Tensor) -> Tensor:
        """Logits [B, T, V]. Raises IndexError for a token outside the vocabulary or a position outside the cache."""
        cache, (B, T) = self.cache, tokens.shape
        if cache.k.shape[1] != B:
            raise ValueError(f"the cache was made for {cache.k.shape[1]} sequences, not {B}")
        needed = library().decode_workspace(self._struct, B * T, cache.max_len)
        if len(self._workspace) < needed:
            self._workspace = cache.k.new_empty(needed)
        freqs_cis = rope_table(pos, self.model.rope_freqs)
        logits = cache.k.new_empty(B, T, self.model.args.vocab_size)
        tensors = (tokens.contiguous(), pos.contiguous(), freqs_cis, cache.k, cache.v, self._workspace, logits)
        pointers = [tensor.data_ptr() for tensor in tensors]
        if library().decode_step(self._struct, *pointers, B, T, cache.max_len) != 0:
            raise IndexError(f"a token is outside the vocabulary, or a position outside the {cache.max_len} slots")
        return logits
