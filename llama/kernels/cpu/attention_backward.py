"""Causal attention for training: PyTorch's flash attention forward, and gradients by a kernel of our own on AMX.

On two cores, 512 tokens and 32 heads of 64, PyTorch's own backward pass takes 51 ms in bfloat16, six times as long as
its forward pass and a sixth of a LoRA step of Llama 3.2 1B. The .c file says how the gradients are made. Its slow twin:
`F.scaled_dot_product_attention`.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from llama.kernels.cpu import native

FLAGS = ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512bf16", "-mamx-tile", "-mamx-bf16")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None where this machine cannot run it: no AMX, no C compiler."""
    if not torch.cpu._is_amx_tile_supported():
        return None
    loaded = native.load("attention_backward", FLAGS)
    if loaded is None or loaded.attention_init() != 0:
        return None
    loaded.attention_backward.argtypes = [ctypes.c_void_p] * 9 + [ctypes.c_int64] * 5
    return loaded


def supports(q: Tensor) -> bool:
    """Whether gradients of this query, [.., D], come from the kernel."""
    return q.dtype is torch.bfloat16 and q.device.type == "cpu" and q.shape[-1] % 32 == 0 and library() is not None


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v with a causal mask, [B, T, H, D], for q [B, T, H, D] and k, v [B, T, K, D].

    Query head h reads key/value head h // (H / K). Keeps q, k, v, the result and a number for each of its rows.
    """
    return _CausalAttention.apply(q, k, v)


class _CausalAttention(Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first, 0.0, True)
        out = out.transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *given, lse = ctx.saved_tensors
        q, k, v, out, d_out = (x.contiguous() for x in (*given, d_out))
        gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        tensors = (q, k, v, out, d_out, lse.contiguous(), *gradients)
        if type(d_out) is Tensor:  # not a fake one, which has no content
            (B, T, H, D), K = q.shape, k.shape[2]
            if library().attention_backward(*(x.data_ptr() for x in tensors), B, T, H, K, D) != 0:
                raise MemoryError("no memory for the gradients of attention")
        return gradients
