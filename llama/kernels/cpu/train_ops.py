"""What lies between the matrix products of a lean training step: norm, rotation, SwiGLU, LoRA, softmax and SGD.

Each function holds the formula in plain PyTorch, which serves every device and dtype, and beside it one pass of C for
bfloat16 activations on a CPU that has AVX-512: sums in fp32, no temporary. On such a machine the plain operations take
half of a training step, most of it to fault in the pages of buffers that live for one operation (train_ops.c).

Under fake tensors (memory.py) a fused operation allocates what it would, and computes nothing.
"""

from __future__ import annotations

import ctypes
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.kernels.cpu import native

FLAGS = ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512bf16")
LANES = 16  # values that a vector holds; rows are multiples of it
ROWS = 1024  # of a gradient that are widened at once where there is no kernel
X_WIDE, W_WIDE, DY_WIDE = 1, 2, 4
_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
SIGNATURES = {
    "rms_norm": [_P, _P, _P, _P, _F, _I, _I, ctypes.c_int],
    "rms_norm_backward": [_P, _P, _P, _P, _P, _I, _I, ctypes.c_int],
    "rms_norm_weight": [_P, _P, _P, _P, _I, _I, ctypes.c_int],
    "swiglu": [_P, _P, _P, _I],
    "swiglu_backward": [_P, _P, _P, _P, _P, _I],
    "rotate": [_P, _P, _P, _I, _I, _I, _F],
    "lora_down": [_P, _P, _P, _P, _F, _I, _I, _I],
    "lora_up": [_P, _P, _P, _P, _F, _I, _I, _I],
    "lora_outer": [_P, _P, _P, _P, _F, _I, _I, _I],
    "logsumexp": [_P, _P, _I, _I],
    "softmax_gradient": [_P, _P, _P, _F, _I, _I],
    "sgd": [_P, _P, _F, _I],
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where this machine cannot run them: no AVX-512 with bfloat16, no C compiler."""
    if not torch.cpu._is_avx512_bf16_supported():
        return None
    loaded = native.load("train_ops", FLAGS)
    for name, argtypes in SIGNATURES.items() if loaded else ():
        function = getattr(loaded, name)
        function.argtypes, function.restype = argtypes, None
    return loaded


def in_use(lean: bool, device: torch.device) -> str:
    """Which kernels a training step runs, for its row: "c" (in fp32, the norms alone), or "none" for plain PyTorch."""
    return "c" if lean and device.type == "cpu" and library() is not None else "none"


def _fits(x: Tensor, *others: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether the kernels take these: bfloat16 (x: `dtype`) in main memory, in rows of whole vectors."""
    dtypes = {dtype or x.dtype, *(other.dtype for other in others)}
    is_ours = dtypes == {torch.bfloat16} and x.device.type == "cpu" and x.shape[-1] % LANES == 0
    return is_ours and library() is not None


def _run(name: str, *arguments: Tensor | float | None) -> None:
    """Call a kernel, unless its tensors are fake."""
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    if all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors):
        getattr(library(), name)(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))


def _wide(x: Tensor, flag: int) -> int:
    return flag if x.dtype is torch.float32 else 0


def _rows(x: Tensor) -> tuple[int, int]:
    return x.shape[:-1].numel(), x.shape[-1]


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """y = w n with n = x / rms(x), in `dtype`; and 1 / rms(x) [.., 1] in fp32 or wider, for the backward pass."""
    if _fits(x, dtype=dtype) and {x.dtype, weight.dtype} <= {torch.float32, torch.bfloat16}:
        x = x.contiguous()
        y, inverse = torch.empty_like(x, dtype=dtype), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        _run("rms_norm", x, weight, y, inverse, eps, *_rows(x), _wide(x, X_WIDE) | _wide(weight, W_WIDE))
        return y, inverse
    wide = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide.mul_(inverse).to(x.dtype).mul_(weight).to(dtype), inverse


def rms_norm_backward(
    x: Tensor, weight: Tensor, inverse: Tensor, dy: Tensor, has_dw: bool
) -> tuple[Tensor, Tensor | None]:
    """dx = (g - n mean(g n)) / rms(x) with g = w dy, and dw = sum of n dy over all positions where it is wanted."""
    if _fits(x, dtype=torch.bfloat16) and {x.dtype, weight.dtype, dy.dtype} <= {torch.float32, torch.bfloat16}:
        x, dy, dx, dw = x.contiguous(), dy.contiguous(), torch.empty_like(x), None
        kinds = _wide(x, X_WIDE) | _wide(weight, W_WIDE) | _wide(dy, DY_WIDE)
        if has_dw:
            dw = inverse.new_empty(weight.shape)
            _run("rms_norm_weight", x, inverse, dy, dw, *_rows(x), kinds)
        _run("rms_norm_backward", x, weight, inverse, dy, dx, *_rows(x), kinds)
        return dx, dw
    normed = x.to(inverse.dtype, copy=True).mul_(inverse)
    g = dy.to(inverse.dtype, copy=True)
    dw = (g * normed).flatten(0, -2).sum(0) if has_dw else None
    g.mul_(weight)
    mean = (g.unsqueeze(-2) @ normed.unsqueeze(-1)).squeeze(-1) / x.shape[-1]
    return g.addcmul_(normed, mean, value=-1).mul_(inverse).to(x.dtype), dw


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up."""
    if _fits(gate, up):
        gate, up, y = gate.contiguous(), up.contiguous(), torch.empty_like(gate)
        _run("swiglu", gate, up, y, gate.numel())
        return y
    return F.silu(gate).mul_(up)


def swiglu_backward(d: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """d_gate = d up silu'(gate), d_up = d silu(gate); gate and up may be overwritten with them."""
    if _fits(d, gate, up):
        d, gate, up = d.contiguous(), gate.contiguous(), up.contiguous()
        _run("swiglu_backward", d, gate, up, gate, up, gate.numel())
        return gate, up
    return torch.ops.aten.silu_backward(d * up, gate), d * F.silu(gate)


def rotate(x_BTHD: Tensor, freqs_cis: Tensor, sign: int) -> Tensor:
    """apply_rope as a product of complex numbers, freqs_cis [B, T, 1, P, 2]; sign -1 turns back, as gradients do."""
    (*size, H, D), shared = x_BTHD.shape, freqs_cis.dtype is torch.float32 and freqs_cis.shape[:2] == x_BTHD.shape[:2]
    if shared and _fits(x_BTHD):
        x, freqs_cis = x_BTHD.contiguous(), freqs_cis.contiguous()
        y = torch.empty_like(x)
        _run("rotate", x, freqs_cis, y, size[0] * size[1], H, D, float(sign))
        return y
    wide = torch.promote_types(x_BTHD.dtype, torch.float32)
    cis = torch.view_as_complex(freqs_cis.to(wide))
    pairs = torch.view_as_complex(x_BTHD.to(wide, copy=True).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs.mul_(cis if sign > 0 else cis.conj())).flatten(-2).to(x_BTHD.dtype)


# LoRA: x [.., N] with the elements that `drop` [.., N] marks left out, a matrix of R rows, and low [.., R].


def _without(x: Tensor, drop: Tensor | None) -> Tensor:
    return x if drop is None else x.masked_fill(drop, 0)


def lora_down(x: Tensor, drop: Tensor | None, a: Tensor, factor: float) -> Tensor:
    """low = factor x a^T, a [R, N]; in the dtype of `a`, or in fp32."""
    if _fits(x):
        x, a = x.contiguous(), a.float().contiguous()
        low = a.new_empty(*x.shape[:-1], len(a))
        _run("lora_down", x, drop, a, low, factor, *_rows(x), len(a))
        return low
    return F.linear(_without(x.to(a.dtype), drop), a).mul_(factor)


def lora_up_(y: Tensor, low: Tensor, a: Tensor, drop: Tensor | None, factor: float) -> Tensor:
    """y += factor low a but for the dropped elements, a [R, N]; y [.., N] must be contiguous."""
    if _fits(y) and low.dtype is torch.float32:
        _run("lora_up", low, a.float().contiguous(), drop, y, factor, *_rows(y), len(a))
        return y
    return y.add_(_without((low * factor) @ a.to(low.dtype), drop).to(y.dtype))


def lora_outer(low: Tensor, x: Tensor, drop: Tensor | None, factor: float) -> Tensor:
    """factor low^T x, [R, N]: the gradient of a matrix between x and low."""
    if _fits(x) and low.dtype is torch.float32:
        x, g = x.contiguous(), low.new_empty(low.shape[-1], x.shape[-1])
        _run("lora_outer", low, x, drop, g, factor, *_rows(x), len(g))
        return g
    return (low * factor).flatten(0, -2).t() @ _without(x.to(low.dtype), drop).flatten(0, -2)


# Cross entropy: logits z [M, N], contiguous.


def _fits_logits(z: Tensor) -> bool:
    return z.dtype is torch.bfloat16 and z.device.type == "cpu" and library() is not None


def logsumexp(z: Tensor) -> Tensor:
    """log sum exp of each row, [M], in fp32 or wider."""
    wide = torch.promote_types(z.dtype, torch.float32)
    if _fits_logits(z):
        lse = z.new_empty(len(z), dtype=wide)
        _run("logsumexp", z, lse, *z.shape)
        return lse
    return z.to(wide).logsumexp(-1)


def softmax_gradient_(z: Tensor, lse: Tensor, labels: Tensor, scale: float) -> Tensor:
    """z = scale (exp(z - lse) - onehot(label)); a label [M] that is not in 0..N-1 is in another part of the row."""
    if _fits_logits(z):
        _run("softmax_gradient", z, lse, labels, scale, *z.shape)
        return z
    p = (z.to(lse.dtype) - lse[:, None]).exp_()
    is_inside = (labels >= 0) & (labels < z.shape[1])
    p.scatter_add_(1, labels.clamp(0, z.shape[1] - 1)[:, None], -is_inside[:, None].to(p.dtype))
    return z.copy_(p.mul_(scale))


def sgd_(weight: Tensor, gradient: Tensor, lr: float) -> None:
    """weight -= lr gradient, in the dtype of the weight; the gradient's may be narrower. Both contiguous."""
    if weight.dtype is torch.float32 and gradient.dtype is torch.bfloat16 and _fits(gradient):
        _run("sgd", weight, gradient, lr, weight.numel())
        return
    for part, step in zip(weight.split(ROWS), gradient.split(ROWS), strict=True):
        part.add_(step.to(part.dtype), alpha=-lr)
