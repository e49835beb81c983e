"""Swapping modules of a network: the one way in which adapters, recomputation, quantization and pruning get in."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def replace_modules(
    model: nn.Module, is_chosen: Callable[[str, nn.Module], bool], make: Callable[[nn.Module], nn.Module]
) -> list[str]:
    """Put `make(module)` in the place of each submodule for which `is_chosen(name, module)`; return their names.

    The new module should keep the parameter name `weight`, so that checkpoints load before and after. Raises ValueError
    where nothing matches: a misspelt name must not pass for a change.
    """
    names = [name for name, module in model.named_modules() if name and is_chosen(name, module)]
    if not names:
        raise ValueError("no module matches; nothing was replaced")
    for name in names:
        module = model.get_submodule(name)
        model.set_submodule(name, make(module).train(module.training))
    return names


def plain_linear(weight: nn.Parameter) -> nn.Linear:
    """A linear layer around this very weight [out_features, in_features]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    return linear


def take_over(new: nn.Module, old: nn.Module) -> None:
    """Give a module that is being made, in place of its `__init__`, all that one of its base class has."""
    new.__dict__.update(old.__dict__)
