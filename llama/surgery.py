"""Swapping modules of a network: the one way in which adapters, recomputation, quantization and pruning get in.

Also what layers that are swapped in have in common, so that they need not know each other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def replace_modules(
    model: nn.Module, wanted: Callable[[str, nn.Module], bool], make: Callable[[nn.Module], nn.Module]
) -> list[str]:
    """Put `make(module)` in the place of each submodule that `wanted(name, module)` picks; return their names.

    What is made should keep the parameter name `weight`, so that checkpoints load before and after. Raises ValueError
    where nothing matches: a misspelt name must not pass for a change.
    """
    names = [name for name, module in model.named_modules() if name and wanted(name, module)]
    if not names:
        raise ValueError("no module matches; nothing was replaced")
    for name in names:
        module = model.get_submodule(name)
        model.set_submodule(name, make(module).train(module.training))
    return names


def compute_dtype(x: Tensor) -> torch.dtype:
    """What autocast would make of a product with x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class FrozenLinear(nn.Module):
    """A linear layer y = x w^T that is never trained itself, so that its weight need not be a matrix of numbers.

    A subclass keeps the weight in its own form and says how to multiply by it. An adapter can sit on it: gradients
    reach x, and nothing is kept for them. `model.to(dtype)` changes the dtype of none of its tensors.
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
