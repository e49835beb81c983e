"""The cross entropy of loss.py with its gradient made in the forward pass: logits are never computed again.

With SGD inside the backward pass (lean.py) the output table moves without a gradient of its own either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from llama.kernels.cpu import train_ops

LOGIT_BYTES = 1 << 26  # of logits that are held at once: 256 positions in 16 bits
KEPT_BYTES = 1 << 27  # of logits that are kept for the gradient of the table, if those of all positions fit
TILE = 32  # positions: products of other numbers of rows reach two thirds of the speed
SLICE = 8192  # rows of the output table that are multiplied at once
P_SCALE = 1024.0  # p of a rare token is below what fp16 can hold
Move = Callable[[Tensor, Tensor, Tensor], None]  # weight [.., dim], a [N, ..], b [N, dim]: the gradient is a^T b


def lean_cross_entropy(h: Tensor, weight: Tensor, labels: Tensor, move: Move | None = None) -> Tensor:
    """-log softmax(h w^T)[label] at N positions [N], in nats, in fp32 or wider.

    h: [N, dim] in the dtype of the product. weight: [V, dim], the output table. move: called in the backward pass
    with slices of a trained table and the two factors of their gradients; the table itself gets no gradient.
    """
    return _LeanCrossEntropy.apply(h, weight, labels, move)


class _LeanCrossEntropy(Function):
    """lse(z) - z[label] with z = h w^T. With p = softmax(z) - onehot(label): dh = p w, dw = p^T h.

    dh is made in the forward pass, while the logits are there; each position's then gets its factor in the backward
    pass. For dw the p of all positions are kept where they are
    within `KEPT_BYTES`; elsewhere each slice of the vocabulary is computed again: p_s = exp(h w_s^T - lse), whatever
    has become of the other rows of w in the meantime.

    The positions go through one buffer, `n` at a time, in two passes over the vocabulary: the first makes z and its
    logsumexp, the second turns z into p where it lies. In the buffer the logits of a slice of the vocabulary lie
    together, because a product that writes parts of longer rows takes twice as long. With n = 3, V = 20, SLICE = 8:

        | slice 0: 3 rows of 8 | slice 1: 3 rows of 8 | slice 2: 3 rows of 4 |
                                             ^ label 13 of position 1: 3 * 8 + 1 * 8 + (13 - 8) = index 37

    `_block` is one such slice as [n, width], `_label_indices` the place of each position's label.
    """

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, labels: Tensor, move: Move | None) -> Tensor:
        wide, row_bytes = torch.promote_types(h.dtype, torch.float32), len(weight) * h.element_size()
        is_kept = ctx.needs_input_grad[1] and len(h) * row_bytes <= KEPT_BYTES
        fitting = LOGIT_BYTES // row_bytes
        n = len(h) if is_kept else max(1, fitting // TILE * TILE or fitting)
        losses, lse, dh = h.new_empty(len(h), dtype=wide), h.new_empty(len(h), dtype=wide), torch.empty_like(h)
        buffer = h.new_empty(min(n, len(h)) * len(weight))
        for start in range(0, len(h), n):
            rows = slice(start, start + n)
            z, sums = buffer[: len(h[rows]) * len(weight)], []
            for part, w in _slices(weight, h.dtype):
                torch.mm(h[rows], w.t(), out=_block(z, part, weight))
                sums.append(train_ops.logsumexp(_block(z, part, weight)))
            del w  # its buffer; the next pass has its own
            lse[rows] = torch.stack(sums).logsumexp(0)
            losses[rows] = lse[rows] - z[_label_indices(labels[rows], weight)]
            if ctx.needs_input_grad[0]:
                dh_wide = h.new_zeros(h[rows].shape, dtype=wide)
                for part, w in _slices(weight, h.dtype):
                    p = _block(z, part, weight)
                    train_ops.softmax_gradient_(p, lse[rows], labels[rows] - part.start, P_SCALE)
                    dh_wide += p @ w
                del w
                dh[rows] = dh_wide / P_SCALE
        ctx.save_for_backward(h, labels, lse, dh, buffer if is_kept else None)
        ctx.weight, ctx.move = weight, move
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, labels, lse, dh, p = ctx.saved_tensors
        grad = grad[:, None]
        if ctx.needs_input_grad[1]:
            scaled = (h * (grad / P_SCALE)).to(h.dtype)
            for part, w in _slices(ctx.weight.detach(), h.dtype):
                if p is None:
                    p_part = train_ops.softmax_gradient_(h @ w.t(), lse, labels - part.start, P_SCALE)
                else:
                    p_part = _block(p, part, ctx.weight)
                ctx.move(ctx.weight[part], p_part, scaled)
        return (dh * grad).to(h.dtype), None, None, None


def _slices(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a [V, dim] table, `SLICE` at a time, in `dtype`, each valid until the next: never a copy of all."""
    buffer = None if weight.dtype == dtype else weight.new_empty(min(SLICE, len(weight)), weight.shape[1], dtype=dtype)
    for start in range(0, len(weight), SLICE):
        part = slice(start, min(start + SLICE, len(weight)))
        yield part, weight[part] if buffer is None else buffer[: part.stop - start].copy_(weight[part])


def _block(z: Tensor, part: slice, weight: Tensor) -> Tensor:
    """The logits [n, width] of one slice of the vocabulary."""
    n = z.numel() // len(weight)
    return z[n * part.start : n * part.stop].view(n, -1)


def _label_indices(labels: Tensor, weight: Tensor) -> Tensor:
    """Where in the buffer the logit of each position's label is."""
    starts = labels // SLICE * SLICE
    widths = (len(weight) - starts).clamp(max=SLICE)
    return len(labels) * starts + torch.arange(len(labels), device=labels.device) * widths + labels - starts
