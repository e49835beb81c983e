"""Training with the same numbers in far less memory: what backward needs is computed again, gradients are not kept.

    optimizer = make_lean(model)      # after lora.apply; Trainer does it for Settings(lean=True)

    LeanRMSNorm      keeps its input and one number for each position; the plain one keeps four tensors of that size
    LeanAttention    rotates in one operation that keeps nothing; on AMX, gradients by kernels/cpu/attention_backward.c
    LeanFeedForward  keeps gate and up, two of the four tensors of the hidden size
    LeanLinear       under autocast, the 16-bit copy of a weight lives as long as one product, not the whole step
    LeanLoRALinear   the same under an adapter, and of dropout one byte an element instead of two fp32 tensors
    SGDInBackward    where the weights themselves are trained: SGD as soon as a gradient is known, so that none is kept

The logits are lean in lean_loss.py, the arithmetic in kernels/cpu/train_ops.py. With SGD inside the backward pass a
weight has one chance to move: no accumulation, no clipping, no momentum, no loss scale. The results are those of the
plain parts up to the order of additions; under autocast, gradients that meet are added in 16 bits instead of 32. Tests
compare the two part by part.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from llama.errors import InputError
from llama.frozen import FrozenLinear, compute_dtype
from llama.kernels.cpu import attention_backward, train_ops
from llama.lora import LoRALinear
from llama.model import Attention, Cache, FeedForward, Mask, RMSNorm, TokenEmbedding, Transformer, attend, in_texts
from llama.surgery import replace_modules, take_over


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


class SGDInBackward(torch.optim.Optimizer):
    """Plain SGD that happens inside the backward pass, at the learning rate that the group of weights has by then.

    `step` finds nothing left to do. `is_finite` tells, until `zero_grad`, whether the gradient was: what is not finite
    in one layer reaches all below it, and the embedding last. The weights have moved by then.
    """

    def __init__(self, weights: Iterable[nn.Parameter], workspace: Workspace) -> None:
        super().__init__(weights, {"lr": 0.0})
        self.workspace = workspace
        self._sum = torch.zeros((), device=self.param_groups[0]["params"][0].device)

    @property
    def lr(self) -> float:
        return self.param_groups[0]["lr"]

    def step(self, closure: None = None) -> None:
        """Every weight has moved already."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Get ready for the next step; no weight has a gradient."""
        self._sum.zero_()

    def move(self, weight: Tensor, gradient: Tensor) -> None:
        """weight -= lr * gradient, unseen by autograd: what it still needs of this weight was read before."""
        train_ops.sgd_(weight.data, gradient, self.lr)

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


class _RMSNorm(Function):
    """y = w x / rms(x), keeping x and one number for each position."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, sgd: SGDInBackward | None) -> Tensor:
        y, inverse = train_ops.rms_norm(x, weight, eps, dtype)
        ctx.save_for_backward(x, inverse)
        ctx.weight, ctx.sgd = weight, sgd
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse = ctx.saved_tensors
        dx, dw = train_ops.rms_norm_backward(x, ctx.weight, inverse, dy, ctx.needs_input_grad[1])
        if dw is not None:
            ctx.sgd.move(ctx.weight, dw)
        return dx, None, None, None, None


class LeanRMSNorm(RMSNorm):
    """RMSNorm that keeps its input and one number for each position, and returns what the next product takes."""

    def __init__(self, norm: RMSNorm, sgd: SGDInBackward | None) -> None:
        take_over(self, norm)
        self.sgd = sgd

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps, compute_dtype(x), self.sgd)


class _Linear(Function):
    """y = x w^T in the dtype of x, without keeping the weight's copy in that dtype."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, sgd: SGDInBackward | None, workspace: Workspace) -> Tensor:
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

    def __init__(self, linear: nn.Linear, sgd: SGDInBackward | None, workspace: Workspace) -> None:
        take_over(self, linear)
        self.sgd, self.workspace = sgd, workspace

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x.to(compute_dtype(x)), self.weight, self.sgd, self.workspace)


class _LoRALinear(Function):
    """y = x w^T + scale dropout(x) a^T b^T, keeping x, which elements were dropped, and dropout(x) a^T.

    The factors of scale and dropout go to the small matrices, never to one of the size of x.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor | FrozenLinear,
        a: Tensor,
        b: Tensor,
        scale: float,
        p: float,
        workspace: Workspace,
    ) -> Tensor:
        dtype = x.dtype if torch.is_autocast_enabled(x.device.type) else a.dtype  # of the adapter's two products
        # On a CPU this is what F.dropout draws from the same state of the generator.
        drop = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p).logical_not_() if p else None
        low = train_ops.lora_down(x, drop, a.to(dtype), 1 / (1 - p))
        ctx.save_for_backward(x, drop, low, a, b)
        ctx.weight, ctx.scale, ctx.p, ctx.workspace, ctx.dtype = weight, scale, p, workspace, dtype
        return train_ops.lora_up_(_product(x, weight, workspace), low, b.t().to(dtype), None, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, drop, low, a, b = ctx.saved_tensors
        db = train_ops.lora_outer(low, dy, None, ctx.scale).t().to(b.dtype)
        d_low = train_ops.lora_down(dy, None, b.t().to(ctx.dtype), ctx.scale / (1 - ctx.p))
        da = train_ops.lora_outer(d_low, x, drop, 1.0).to(a.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _product_transposed(dy, ctx.weight, ctx.workspace)
            train_ops.lora_up_(dx, d_low, a.to(ctx.dtype), drop, 1.0)
        return dx, None, da, db, None, None, None


def _product(x: Tensor, weight: Tensor | FrozenLinear, workspace: Workspace) -> Tensor:
    """x w^T, whatever form the frozen weight has."""
    if isinstance(weight, FrozenLinear):
        return weight.multiply(x.flatten(0, -2)).view(*x.shape[:-1], weight.out_features)
    return F.linear(x, workspace.narrow(weight, x.dtype))


def _product_transposed(dy: Tensor, weight: Tensor | FrozenLinear, workspace: Workspace) -> Tensor:
    if isinstance(weight, FrozenLinear):
        return weight.multiply_transposed(dy.flatten(0, -2)).view(*dy.shape[:-1], weight.in_features)
    return dy @ workspace.narrow(weight, dy.dtype)


class LeanLoRALinear(LoRALinear):
    """An adapted projection that keeps one byte an element of its dropout, and no copy of its input."""

    def __init__(self, adapted: LoRALinear, workspace: Workspace) -> None:
        take_over(self, adapted)
        self.workspace = workspace

    def forward(self, x: Tensor) -> Tensor:
        if self.is_merged:
            return super().forward(x)
        p = self.dropout.p if self.training else 0.0
        x = x.to(compute_dtype(x))
        weight = self.weight if self.layer is None else self.layer
        return _LoRALinear.apply(x, weight, self.lora_A, self.lora_B, self.scale, p, self.workspace)


class _Rotation(Function):
    """apply_rope; backward is the rotation the other way, and keeps nothing of x."""

    @staticmethod
    def forward(ctx, x_BTHD: Tensor, freqs_cis: Tensor) -> Tensor:
        ctx.freqs_cis = freqs_cis
        return train_ops.rotate(x_BTHD, freqs_cis, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return train_ops.rotate(dy, ctx.freqs_cis, -1), None


class LeanAttention(Attention):
    """Attention that keeps the rotated q and k, v and its output."""

    def __init__(self, attention: Attention) -> None:
        take_over(self, attention)

    def forward(self, x: Tensor, freqs_cis: Tensor, mask: Mask, pos: Tensor | None, cache: Cache | None) -> Tensor:
        if cache is not None:
            return super().forward(x, freqs_cis, mask, pos, cache)
        q_BTHD, k_BTKD, v_BTKD = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q_BTHD, k_BTKD = (_Rotation.apply(part, freqs_cis) for part in (q_BTHD, k_BTKD))
        if not isinstance(mask, Tensor) and attention_backward.supports(q_BTHD):
            causal, given = attention_backward.causal_attention, (q_BTHD, k_BTKD, v_BTKD)
            return self.wo((causal(*given) if mask is None else in_texts(causal, *given, mask)).flatten(-2))
        q, k, v = (part.transpose(1, 2) for part in (q_BTHD, k_BTKD, v_BTKD))
        return self.wo(attend(q, k, v, mask).transpose(1, 2).flatten(-2))


class _SwiGLU(Function):
    """silu(gate) * up, keeping the two."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return train_ops.swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, d: Tensor) -> tuple[Tensor, Tensor]:
        return train_ops.swiglu_backward(d, *(kept.clone() for kept in ctx.saved_tensors))


# The feed-forward, and which node of the graph keeps what for its backward pass:
#
#     x --- w1 ---> gate --+
#      \                   silu(gate) * up = product --- w2 ---> y
#       +-- w3 ---> up ----+
#
#     _GatedUp, from x to product: keeps gate and up, and x where the weights are trained
#     _Down, from product to y:    keeps nothing; in its backward pass, which comes first, it makes product again from
#                                  the gate and up of _GatedUp, whose own backward pass then overwrites them
#
# Two nodes and not one, because a checkpointed block is recomputed up to the last tensor that is kept of it: what comes
# after that, the product with w2, a quarter of a block's FLOPs, is not.


class _GatedUp(Function):
    """silu(x w1^T) * (x w3^T)."""

    @staticmethod
    def forward(ctx, x: Tensor, w1: Tensor, w3: Tensor, sgd: SGDInBackward | None, workspace: Workspace) -> Tensor:
        ctx.weights, ctx.sgd, ctx.workspace, ctx.unpacked = (w1, w3), sgd, workspace, None
        gate, up = (F.linear(x, workspace.narrow(weight, x.dtype)) for weight in ctx.weights)
        ctx.save_for_backward(gate, up, None if sgd is None else x)
        return train_ops.swiglu(gate, up)

    def unpack(ctx) -> tuple[Tensor | None, ...]:
        """gate, up, x. Of a checkpointed block autograd hands out what was kept only once, and two nodes want it."""
        ctx.unpacked = ctx.unpacked or ctx.saved_tensors
        return ctx.unpacked

    @staticmethod
    @once_differentiable
    def backward(ctx, d: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, x = _GatedUp.unpack(ctx)
        ctx.unpacked, dx = None, None
        gradients = train_ops.swiglu_backward(d, gate, up)
        torch.autograd.graph.increment_version((gate, up))  # overwritten: autograd refuses a second backward pass
        for weight, dy in zip(ctx.weights, gradients, strict=True):
            narrow, rows = ctx.workspace.narrow(weight, dy.dtype), dy.flatten(0, -2)
            dx = rows @ narrow if dx is None else dx.addmm_(rows, narrow)
            if x is not None:  # after its share of dx, which is that of the weight before the step
                ctx.sgd.move_product(weight, dy, x)
        return dx.view(*d.shape[:-1], -1), None, None, None, None


class _Down(Function):
    """y = product w2^T, where the weights are trained: w2 moves by dy^T product."""

    @staticmethod
    def forward(ctx, product: Tensor, weight: Tensor, sgd: SGDInBackward, workspace: Workspace) -> Tensor:
        ctx.gated, ctx.weight, ctx.sgd, ctx.workspace = product.grad_fn, weight, sgd, workspace
        return F.linear(product, workspace.narrow(weight, product.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, _ = _GatedUp.unpack(ctx.gated)
        d = dy @ ctx.workspace.narrow(ctx.weight, dy.dtype)
        ctx.sgd.move_product(ctx.weight, dy, train_ops.swiglu(gate, up))
        return d, None, None, None


class LeanFeedForward(FeedForward):
    """SwiGLU that keeps two tensors of the hidden size."""

    def __init__(self, feed_forward: FeedForward, sgd: SGDInBackward | None, workspace: Workspace) -> None:
        take_over(self, feed_forward)
        self.sgd, self.workspace = sgd, workspace

    def forward(self, x: Tensor) -> Tensor:
        if type(self.w1) is not LeanLinear or type(self.w3) is not LeanLinear:  # adapters
            return self.w2(_SwiGLU.apply(self.w1(x), self.w3(x)))
        x = x.to(compute_dtype(x))
        product = _GatedUp.apply(x, self.w1.weight, self.w3.weight, self.sgd, self.workspace)
        if self.sgd is not None:
            return _Down.apply(product, self.w2.weight, self.sgd, self.workspace)
        return self.w2(product)  # frozen, or an adapter, which keeps the product itself


class _Lookup(Function):
    """Rows of a table, which the backward pass moves; it makes no gradient of the table."""

    @staticmethod
    def forward(ctx, tokens: Tensor, weight: Tensor, sgd: SGDInBackward) -> Tensor:
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

    def __init__(self, embedding: TokenEmbedding, sgd: SGDInBackward) -> None:
        take_over(self, embedding)
        self.sgd = sgd

    def forward(self, tokens: Tensor) -> Tensor:
        return _Lookup.apply(tokens, self.weight, self.sgd)


def make_lean(model: Transformer) -> SGDInBackward | None:
    """Swap the lean parts in. Where the weights themselves are trained, return the SGD that moves them.

    With adapters there is none: their gradients are small, and any optimizer may use them. Raises InputError where some
    weights are trained and some are not.
    """
    weights = {name: weight for name, weight in model.named_parameters() if ".lora_" not in name}
    trained = [weight for weight in weights.values() if weight.requires_grad]
    workspace = Workspace()
    sgd = SGDInBackward(trained, workspace) if trained else None
    if 0 < len(trained) < len(weights):
        frozen = next(name for name, weight in weights.items() if not weight.requires_grad)
        raise InputError(f"lean=True trains all weights or adapters alone, but {frozen} is frozen and others are not")
    parts = {
        RMSNorm: lambda norm: LeanRMSNorm(norm, sgd),
        nn.Linear: lambda linear: LeanLinear(linear, sgd, workspace),
        LoRALinear: lambda adapted: LeanLoRALinear(adapted, workspace),
        Attention: LeanAttention,
        FeedForward: lambda feed_forward: LeanFeedForward(feed_forward, sgd, workspace),
    }
    if sgd is not None:
        parts[TokenEmbedding] = lambda embedding: LeanEmbedding(embedding, sgd)
    replace_modules(model, lambda _, module: type(module) in parts, lambda module: parts[type(module)](module))
    return sgd
