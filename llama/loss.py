"""Cross entropy at the labelled positions only, some at a time.

With a vocabulary of 128,256 the logits of one position are half a megabyte in fp32. A training sample has labels on its
answer alone; the others are never projected, and of those that are, a bounded number is held at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK = 128  # positions: 66 MB of fp32 logits, and as much again for their gradient
LOGIT_BYTES = 1 << 26  # of logits that the lean loss holds at once: 256 positions in 16 bits
KEPT_BYTES = 1 << 27  # of logits that it keeps for the gradient of the table, if those of all positions fit
SLICE = 8192  # rows of the output table that are multiplied at once
P_SCALE = 1024.0  # p of a rare token is below what fp16 can hold
Move = Callable[[Tensor, Tensor, Tensor], None]  # weight [.., dim], a [N, ..], b [N, dim]: the gradient is a^T b


def cross_entropy_sum(project: Callable[[Tensor], Tensor], h: Tensor, labels: Tensor, chunk: int = CHUNK) -> Tensor:
    """Sum over N positions of -log softmax(project(h))[label], in nats, in fp32 or wider.

    h: [N, dim] final hidden states, each of the position before its label. labels: [N] int64. project: hidden states to
    logits [.., V]. With more than `chunk` positions the logits of each part are computed again in the backward pass.
    """
    if len(h) <= chunk:
        return _sum(project, h, labels)
    parts = zip(h.split(chunk), labels.split(chunk), strict=True)
    return torch.stack(
        [
            checkpoint(_sum, project, part, part_labels, use_reentrant=False, preserve_rng_state=False)
            for part, part_labels in parts
        ]
    ).sum()


def _sum(project: Callable[[Tensor], Tensor], h: Tensor, labels: Tensor) -> Tensor:
    logits = project(h)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")


def lean_cross_entropy_sum(h: Tensor, weight: Tensor, labels: Tensor, move: Move | None = None) -> Tensor:
    """The same for logits h w^T, without recomputing them: the gradient of h is made in the forward pass.

    h: [N, dim] in the dtype of the product. weight: [V, dim], the output table. move: called in the backward pass
    with slices of a trained table and the two factors of their gradients; the table itself gets no gradient.
    """
    return _LeanCrossEntropy.apply(h, weight, labels, move)


class _LeanCrossEntropy(Function):
    """Sum of lse(z) - z[label] with z = h w^T. With p = softmax(z) - onehot(label): dh = p w, dw = p^T h.

    dh is made in the forward pass, while the logits are there. For dw the p of all positions are kept where they are
    within `KEPT_BYTES`; elsewhere each slice of the vocabulary is computed again: p_s = exp(h w_s^T - lse), whatever
    has become of the other rows of w in the meantime.
    """

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, labels: Tensor, move: Move | None) -> Tensor:
        wide, row_bytes = torch.promote_types(h.dtype, torch.float32), len(weight) * h.element_size()
        is_kept = ctx.needs_input_grad[1] and len(h) * row_bytes <= KEPT_BYTES
        n_rows = len(h) if is_kept else max(1, LOGIT_BYTES // row_bytes)
        total, lse, dh = h.new_zeros((), dtype=wide), h.new_empty(len(h), dtype=wide), torch.empty_like(h)
        z = None
        for start in range(0, len(h), n_rows):
            rows = slice(start, start + n_rows)
            z = h.new_empty(len(h[rows]), len(weight))
            sums = []
            for part, w in _slices(weight, h.dtype):
                z[:, part] = h[rows] @ w.t()
                sums.append(z[:, part].to(wide).logsumexp(-1))
            del w  # its buffer; the next pass has its own
            lse[rows] = torch.stack(sums).logsumexp(0)
            total += (lse[rows] - z.gather(1, labels[rows, None])[:, 0]).sum()
            if ctx.needs_input_grad[0]:
                dh_wide = h.new_zeros(h[rows].shape, dtype=wide)
                for part, w in _slices(weight, h.dtype):
                    z[:, part] = _p(z[:, part], lse[rows], labels[rows], part)
                    dh_wide += z[:, part] @ w
                dh[rows] = dh_wide / P_SCALE
        ctx.save_for_backward(h, labels, lse, dh, z if is_kept else None)
        ctx.weight, ctx.move = weight, move
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, labels, lse, dh, p = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            scaled = (h * (grad / P_SCALE)).to(h.dtype)
            for part, w in _slices(ctx.weight.detach(), h.dtype):
                p_part = _p(h @ w.t(), lse, labels, part) if p is None else p[:, part]
                ctx.move(ctx.weight[part], p_part, scaled)
        return (dh * grad).to(h.dtype), None, None, None


def _slices(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a [V, dim] table, `SLICE` at a time, in `dtype`, each valid until the next: never a copy of all."""
    buffer = None if weight.dtype == dtype else weight.new_empty(min(SLICE, len(weight)), weight.shape[1], dtype=dtype)
    for start in range(0, len(weight), SLICE):
        part = slice(start, min(start + SLICE, len(weight)))
        yield part, weight[part] if buffer is None else buffer[: part.stop - start].copy_(weight[part])


def _p(z: Tensor, lse: Tensor, labels: Tensor, part: slice) -> Tensor:
    """P_SCALE (softmax - onehot) of one slice of the logits, in their dtype."""
    p = (z.to(lse.dtype) - lse[:, None]).exp_()
    is_inside = (labels >= part.start) & (labels < part.stop)
    places = (labels - part.start).clamp(0, part.stop - part.start - 1)
    p.scatter_add_(1, places[:, None], -is_inside[:, None].to(p.dtype))
    return p.mul_(P_SCALE).to(z.dtype)
