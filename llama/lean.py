"""Training with the same numbers in far less memory: what backward needs is computed again, gradients are not kept.

    sgd = make_lean(model)      # after lora.apply; Trainer does it for Settings(lean=True)

    LeanRMSNorm      keeps its input and one number for each position; the plain one keeps four tensors of that size
    LeanAttention    rotates in one operation that keeps nothing
    LeanFeedForward  keeps gate and up, two of the four tensors of the hidden size
    LeanLinear       under autocast, the 16-bit copy of a weight lives as long as one product, not the whole step
    LeanLoRALinear   the same under an adapter, and of dropout one byte an element instead of two fp32 tensors
    InBackward       where the weights themselves are trained: SGD as soon as a gradient is known, so that none is kept

The logits are lean in loss.py. With SGD inside the backward pass a weight has one chance to move: no accumulation, no
clipping, no momentum, no loss scale. The results are those of the plain parts up to the order of additions; under
autocast, gradients that meet are added in 16 bits instead of 32. Tests compare the two part by part.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from llama.lora import LoRALinear
from llama.model import Attention, Cache, FeedForward, RMSNorm, TokenEmbedding, Transformer, attend
from llama.surgery import replace_modules

ROWS = 1024  # of a gradient in 16 bits that are widened at once


class Workspace:
    """Buffers for the 16-bit copy of one weight and for one gradient, used again for each weight.

    Fresh ones would cost a CPU more than what is computed into them: their pages are faulted in one by one.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def narrow(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`: itself, or a copy that is valid until the next one."""
        return weight if weight.dtype == dtype else self._take("weight", weight, dtype).copy_(weight)

    def gradient(self, weight: Tensor, dy: Tensor, x: Tensor) -> Tensor:
        """dy^T x, that of a weight in y = x w^T; valid until the next one."""
        return torch.mm(dy.t(), x, out=self._take("gradient", weight, x.dtype))

    def _take(self, use: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
        buffer = self._buffers.get((use, dtype))
        if buffer is None or buffer.numel() < weight.numel():
            buffer = self._buffers[use, dtype] = weight.new_empty(weight.numel(), dtype=dtype, requires_grad=False)
        return buffer[: weight.numel()].view(weight.shape)


class InBackward:
    """Plain SGD that happens inside the backward pass, at the learning rate that is set before each step.

    `is_finite` tells after a step whether the gradient was: what is not finite in one layer reaches all below it, and
    the embedding last. The weights have moved by then.
    """

    def __init__(self, device: torch.device, workspace: Workspace) -> None:
        self.lr = 0.0
        self.workspace = workspace
        self._sum = torch.zeros((), device=device)

    def start(self, lr: float) -> None:
        """Before each step."""
        self.lr = lr
        self._sum.zero_()

    def move(self, weight: Tensor, gradient: Tensor) -> None:
        """weight -= lr * gradient, unseen by autograd: what it still needs of this weight was read before."""
        for part, step in zip(weight.data.split(ROWS), gradient.split(ROWS), strict=True):
            part.add_(step.to(part.dtype), alpha=-self.lr)

    def move_product(self, weight: Tensor, dy: Tensor, x: Tensor) -> None:
        """weight -= lr * dy^T x, the gradient of a weight [out, in] from dy [.., out] and x [.., in]."""
        dy, x = dy.flatten(0, -2), x.flatten(0, -2)
        if weight.dtype == x.dtype:
            weight.data.addmm_(dy.t(), x, alpha=-self.lr)
        else:
            self.move(weight, self.workspace.gradient(weight, dy, x))

    def move_rows(self, weight: Tensor, rows: Tensor, gradient: Tensor) -> None:
        """The same for some rows of the embedding; a row may occur several times."""
        step = gradient.to(weight.dtype)
        self._sum += step.sum()  # NaN and infinity survive any sum
        weight.data.index_add_(0, rows, step, alpha=-self.lr)

    def is_finite(self) -> bool:
        return bool(self._sum.isfinite())


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What autocast would make of a product with x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _RMSNorm(Function):
    """y = w x / rms(x). With n = x / rms(x) and g = w dy: dx = (g - n mean(g n)) / rms(x), dw = sum of n dy.

    In place wherever possible: on a CPU a fresh buffer costs more than what is computed into it.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, sgd: InBackward | None) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, inverse)
        ctx.weight, ctx.sgd = weight, sgd
        return wide.mul_(inverse).to(x.dtype).mul_(weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse = ctx.saved_tensors
        normed = x.to(inverse.dtype, copy=True).mul_(inverse)
        g = dy.to(inverse.dtype, copy=True)
        dw = (g * normed).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        g.mul_(ctx.weight)
        if dw is not None:
            ctx.sgd.move(ctx.weight, dw)
        mean = (g.unsqueeze(-2) @ normed.unsqueeze(-1)).squeeze(-1) / x.shape[-1]
        return g.addcmul_(normed, mean, value=-1).mul_(inverse).to(x.dtype), None, None, None, None


class LeanRMSNorm(RMSNorm):
    """RMSNorm that keeps its input and one number for each position, and returns what the next product takes."""

    def __init__(self, norm: RMSNorm, sgd: InBackward | None) -> None:
        nn.Module.__init__(self)
        self.eps, self.weight, self.sgd = norm.eps, norm.weight, sgd

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps, _compute_dtype(x), self.sgd)


class _Linear(Function):
    """y = x w^T in the dtype of x, without keeping the weight's copy in that dtype."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, sgd: InBackward | None, workspace: Workspace) -> Tensor:
        # Not save_for_backward, which refuses a weight that has moved since: here it moves in its own backward.
        ctx.weight, ctx.sgd, ctx.workspace = weight, sgd, workspace
        ctx.save_for_backward(x if weight.requires_grad else None)
        return F.linear(x, workspace.narrow(weight, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        dx = dy @ ctx.workspace.narrow(ctx.weight, dy.dtype) if ctx.needs_input_grad[0] else None
        if x is not None:  # after dx, which is that of the weight before the step
            ctx.sgd.move_product(ctx.weight, dy, x)
        return dx, None, None, None


class LeanLinear(nn.Linear):
    """A linear layer whose 16-bit copy of the weight lives as long as one product."""

    def __init__(self, linear: nn.Linear, sgd: InBackward | None, workspace: Workspace) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = linear.weight.shape
        self.weight, self.bias, self.sgd, self.workspace = linear.weight, None, sgd, workspace

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x.to(_compute_dtype(x)), self.weight, self.sgd, self.workspace)


class _LoRALinear(Function):
    """y = x w^T + scale dropout(x) a^T b^T, keeping x, which elements were dropped, and dropout(x) a^T.

    The factors of scale and dropout go to the small matrices, never to one of the size of x.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, p: float, workspace: Workspace
    ) -> Tensor:
        dtype = x.dtype if torch.is_autocast_enabled(x.device.type) else a.dtype  # of the adapter's two products
        # On a CPU this is what F.dropout draws from the same state of the generator.
        drop = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p).logical_not_() if p else None
        low = F.linear(_without(x.to(dtype), drop), a.to(dtype)).div_(1 - p)
        ctx.save_for_backward(x, drop, low, a, b)
        ctx.weight, ctx.scale, ctx.p, ctx.workspace = weight, scale, p, workspace
        return F.linear(x, workspace.narrow(weight, x.dtype)).add_(F.linear(low * scale, b.to(dtype)).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, drop, low, a, b = ctx.saved_tensors
        dtype, wide = low.dtype, dy.to(low.dtype)
        db = (wide.flatten(0, -2).t() @ (low * ctx.scale).flatten(0, -2)).to(b.dtype)
        d_low = (wide @ b.to(dtype)).mul_(ctx.scale / (1 - ctx.p))
        da = (d_low.flatten(0, -2).t() @ _without(x.to(dtype), drop).flatten(0, -2)).to(a.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ ctx.workspace.narrow(ctx.weight, dy.dtype)
            dx.add_(_without(d_low @ a.to(dtype), drop).to(dx.dtype))
        return dx, None, da, db, None, None, None


def _without(x: Tensor, drop: Tensor | None) -> Tensor:
    return x if drop is None else x.masked_fill(drop, 0)


class LeanLoRALinear(LoRALinear):
    """An adapted projection that keeps one byte an element of its dropout, and no copy of its input."""

    def __init__(self, adapted: LoRALinear, workspace: Workspace) -> None:
        nn.Module.__init__(self)
        self.workspace = workspace
        self.weight, self.lora_A, self.lora_B = adapted.weight, adapted.lora_A, adapted.lora_B
        self.scale, self.dropout, self.base = adapted.scale, adapted.dropout, adapted.base

    def forward(self, x: Tensor) -> Tensor:
        if self.base is not None:
            return super().forward(x)
        p = self.dropout.p if self.training else 0.0
        x = x.to(_compute_dtype(x))
        return _LoRALinear.apply(x, self.weight, self.lora_A, self.lora_B, self.scale, p, self.workspace)


class _Rotation(Function):
    """apply_rope as a product of complex numbers; backward is the rotation the other way, and keeps nothing of x."""

    @staticmethod
    def forward(ctx, x_BTHD: Tensor, freqs_cis: Tensor) -> Tensor:
        ctx.cis = torch.view_as_complex(freqs_cis.to(torch.promote_types(x_BTHD.dtype, torch.float32)))
        return _rotated(x_BTHD, ctx.cis)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return _rotated(dy, ctx.cis.conj()), None


def _rotated(x_BTHD: Tensor, cis: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x_BTHD.to(cis.real.dtype, copy=True).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs.mul_(cis)).flatten(-2).to(x_BTHD.dtype)


class LeanAttention(Attention):
    """Attention that keeps the rotated q and k, v and its output."""

    def __init__(self, attention: Attention) -> None:
        nn.Module.__init__(self)
        self.layer, self.head_dim = attention.layer, attention.head_dim
        for name, projection in attention.named_children():
            self.add_module(name, projection)

    def forward(
        self, x: Tensor, freqs_cis: Tensor, mask: Tensor | None, pos: Tensor | None, cache: Cache | None
    ) -> Tensor:
        if cache is not None:
            return super().forward(x, freqs_cis, mask, pos, cache)
        q_BTHD, k_BTKD, v_BTKD = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = (_Rotation.apply(part, freqs_cis).transpose(1, 2) for part in (q_BTHD, k_BTKD))
        return self.wo(attend(q, k, v_BTKD.transpose(1, 2), mask).transpose(1, 2).flatten(-2))


class _SwiGLU(Function):
    """silu(gate) * up, keeping the two; gradients with the roundings of the plain operations."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.unpacked = None
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, d: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.unpacked or ctx.saved_tensors
        ctx.unpacked = None
        return torch.ops.aten.silu_backward(d * up, gate), d * F.silu(gate)


class _Down(Function):
    """y = product w^T after _SwiGLU, whose product is not kept but made again from what that keeps.

    Two functions and not one: a checkpointed block is recomputed up to the last tensor that is kept of it, and the
    product with w2, a quarter of a block's FLOPs, comes after that.
    """

    @staticmethod
    def forward(ctx, product: Tensor, weight: Tensor, sgd: InBackward, workspace: Workspace) -> Tensor:
        ctx.swiglu, ctx.weight, ctx.sgd, ctx.workspace = product.grad_fn, weight, sgd, workspace
        return F.linear(product, workspace.narrow(weight, product.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.swiglu.unpacked = ctx.swiglu.saved_tensors  # recomputation allows to ask for them once
        d = dy @ ctx.workspace.narrow(ctx.weight, dy.dtype)
        ctx.sgd.move_product(ctx.weight, dy, F.silu(gate).mul_(up))
        return d, None, None, None


class LeanFeedForward(FeedForward):
    """SwiGLU that keeps two tensors of the hidden size."""

    def __init__(self, feed_forward: FeedForward, sgd: InBackward | None, workspace: Workspace) -> None:
        nn.Module.__init__(self)
        self.w1, self.w2, self.w3 = feed_forward.w1, feed_forward.w2, feed_forward.w3
        self.sgd, self.workspace = sgd, workspace

    def forward(self, x: Tensor) -> Tensor:
        product = _SwiGLU.apply(self.w1(x), self.w3(x))
        if self.sgd is not None:
            return _Down.apply(product, self.w2.weight, self.sgd, self.workspace)
        return self.w2(product)  # frozen, or an adapter, which keeps the product itself


class _Lookup(Function):
    """Rows of a table, which the backward pass moves; it makes no gradient of the table."""

    @staticmethod
    def forward(ctx, tokens: Tensor, weight: Tensor, sgd: InBackward) -> Tensor:
        ctx.weight, ctx.sgd = weight, sgd
        ctx.save_for_backward(tokens)
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[None, None, None]:
        (tokens,) = ctx.saved_tensors
        ctx.sgd.move_rows(ctx.weight, tokens.flatten(), dy.flatten(0, -2))
        return None, None, None


class LeanEmbedding(TokenEmbedding):
    """The table of token vectors, of which a step moves the rows that were looked up."""

    def __init__(self, embedding: TokenEmbedding, sgd: InBackward) -> None:
        super().__init__(*embedding.weight.shape, _weight=embedding.weight)
        self.weight, self.sgd = embedding.weight, sgd  # the parameter itself

    def forward(self, tokens: Tensor) -> Tensor:
        return _Lookup.apply(tokens, self.weight, self.sgd)


def make_lean(model: Transformer) -> InBackward | None:
    """Swap the lean parts in. Where the weights themselves are trained, return the SGD that moves them.

    With adapters there is none: their gradients are small, and any optimizer may use them.
    """
    embedding = model.tok_embeddings.weight
    workspace = Workspace()
    sgd = InBackward(embedding.device, workspace) if embedding.requires_grad else None
    parts = [
        (RMSNorm, lambda norm: LeanRMSNorm(norm, sgd)),
        (nn.Linear, lambda linear: LeanLinear(linear, sgd, workspace)),
        (Attention, LeanAttention),
        (FeedForward, lambda feed_forward: LeanFeedForward(feed_forward, sgd, workspace)),
    ]
    if any(type(module) is LoRALinear for module in model.modules()):
        parts.append((LoRALinear, lambda adapted: LeanLoRALinear(adapted, workspace)))
    if sgd is not None:
        parts.append((TokenEmbedding, lambda embedding: LeanEmbedding(embedding, sgd)))
    for plain, make in parts:
        try:
            replace_modules(model, lambda _, module, plain=plain: type(module) is plain, make)
        except ValueError:
            if plain is not nn.Linear:  # of which none is left where all are adapted
                raise
    return sgd
