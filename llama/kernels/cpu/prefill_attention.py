"""Causal attention of a prompt in bfloat16, for CPUs that multiply pairs of bfloat16 in vectors and have no AMX.

PyTorch's flash attention reaches a fifth of the rate of products there, in fp32 as in bfloat16; this one three quarters
(benchmarks/kernels.py, on two cores of an AMD EPYC). It needs no mask either. The .c file says how. Its slow twin:
`F.scaled_dot_product_attention`.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from llama.kernels.cpu import native
from llama.kernels.cpu.decode_step import FLAGS, has_instructions


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None where this machine cannot run it."""
    loaded = native.load("prefill_attention", FLAGS) if has_instructions() else None
    if loaded is not None:
        loaded.prefill_attention.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 8
    return loaded


def attention(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, [B, T, H, D], for q [B, H, T, D] and k, v [B, K, start + T, D], all bfloat16.

    Query t stands at position start + t and sees the keys up to it; query head h reads key/value head h // (H / K). D
    is a multiple of 16. k and v may be slots of a cache, both laid out alike.
    """
    (B, H, T, D), K = q.shape, k.shape[1]
    q, (to_sequence, to_head, *rows) = q.contiguous(), k.stride()
    if v.stride() != k.stride() or rows != [D, 1] or D % 16 or H % K or k.shape[2] != start + T:
        raise ValueError(f"q {list(q.shape)}, k {list(k.shape)} behind {start} tokens: not what the kernel takes")
    out = q.new_empty(B, T, H, D)
    tensors = (x.data_ptr() for x in (q, k, v, out))
    if library().prefill_attention(*tensors, B, T, H, K, D, start, to_head, to_sequence) != 0:
        raise MemoryError("no memory for attention")
    return out


def is_faster(head_dim: int) -> bool:
    """Whether this machine runs the kernel, and faster than PyTorch's; with AMX that takes 0.25 to 0.45 of the time."""
    return head_dim % 16 == 0 and not torch.cpu._is_amx_tile_supported() and library() is not None
