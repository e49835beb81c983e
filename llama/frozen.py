"""Linear layers that are never trained themselves: what quantized layers are, and what adapters can sit on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a product with x, under autocast too."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class FrozenLinear(nn.Module):
    """A linear layer y = x w^T that is never trained itself, so that its weight need not be a matrix of numbers.

    A subclass stores the weight in some form and says how to multiply by it. Gradients reach x, and nothing is kept for
    them. `model.to(dtype)` changes the dtype of none of its tensors.
    """

    in_features: int
    out_features: int

    def multiply(self, x: Tensor) -> Tensor:
        """x w^T, [M, out_features] in the dtype of x [M, in_features]."""
        raise NotImplementedError

    def multiply_transposed(self, dy: Tensor) -> Tensor:
        """dy w, [M, in_features] in the dtype of dy [M, out_features]: the gradient of x."""
        raise NotImplementedError

    def project(self, x: Tensor) -> Tensor:
        """x w^T for x [..., in_features], as F.linear, under autocast too."""
        rows = x.to(compute_dtype(x)).reshape(-1, self.in_features)
        y = _Product.apply(rows, self) if rows.requires_grad else self.multiply(rows)
        return y.view(*x.shape[:-1], self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x)

    def _apply(self, fn, recurse: bool = True):
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class _Product(Function):
    @staticmethod
    def forward(ctx, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return layer.multiply(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.multiply_transposed(dy), None
