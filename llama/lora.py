"""LoRA (Hu et al. 2021): a frozen weight W gets a trained update of low rank, y = W x + (alpha / r) B A dropout(x).

    config = LoRAConfig(r=16, alpha=32, dropout=0.05, targets=("wq", "wv"))
    apply(model, config)          # swaps the projections in, freezes everything else
    ...                           # train
    merge(model); remove(model)   # a plain model again, with the update inside its weights

A starts random and B at zero, so an adapted model starts as its base, to the bit. Adapters are fp32 over a base of any
dtype, because updates of 16-bit weights are mostly lost to rounding. Adapters on disk: adapters.py.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.checkpoint import hf
from llama.errors import InputError, NonFinite
from llama.frozen import FrozenLinear
from llama.model import Transformer
from llama.surgery import plain_linear, replace_modules

# Each projection that can be adapted, and what it is called inside a block.
META_NAMES = {name.split(".")[1]: name for name in hf.BLOCK if not name.endswith("norm.weight")}


@dataclass(frozen=True)
class LoRAConfig:
    """Which projections are adapted and how. Raises InputError naming the field where a value is impossible.

    modules: name, rank and alpha of each adapted projection, where they are not the same in all layers, as in adapters
    from elsewhere; without, `targets` says which.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("wq", "wv")
    modules: tuple[tuple[str, int, float], ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or not 1 <= self.r <= 1 << 16:
            raise InputError(f"r={self.r!r} is not a rank; use an integer from 1")
        if not _is_number(self.alpha) or self.alpha <= 0:
            raise InputError(f"alpha={self.alpha!r} is not a positive number")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise InputError(f"dropout={self.dropout!r} is not in 0 <= dropout < 1")
        if not self.targets or len(set(self.targets)) < len(self.targets) or set(self.targets) - set(META_NAMES):
            names = ",".join(map(str, self.targets))
            raise InputError(f"targets={names} is not a choice of {','.join(META_NAMES)}, each once")

    def of(self, name: str) -> LoRAConfig | None:
        """What holds for the projection of that name; None where it is not adapted."""
        if not self.modules:
            return self if name.split(".")[-1] in self.targets else None
        found = (replace(self, r=r, alpha=alpha, modules=()) for module, r, alpha in self.modules if module == name)
        return next(found, None)


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained update; `weight` keeps its name and its dtype.

    A layer whose weight is no matrix of numbers, a quantized one, goes on existing as `layer` and makes the product.
    """

    def __init__(
        self, linear: nn.Linear | FrozenLinear, config: LoRAConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.layer = linear if isinstance(linear, FrozenLinear) else None
        weight = linear.weight.requires_grad_(False)
        if self.layer is None:
            self.weight = weight
        factory = {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device}
        self.lora_A = nn.Parameter(torch.empty(config.r, linear.in_features, **factory))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, config.r, **factory))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=generator)  # as the authors' code does
        self.scale = config.alpha / config.r
        self.dropout = nn.Dropout(config.dropout)
        self.is_merged = False

    def forward(self, x: Tensor) -> Tensor:
        # not self.layer(x): in one of several processes that would be summed without the update (parallel.py)
        y = F.linear(x, self.weight) if self.layer is None else self.layer.project(x)
        if self.is_merged:
            return y
        update = F.linear(F.linear(self.dropout(x.to(self.lora_A.dtype)), self.lora_A), self.lora_B)
        return y + (update * self.scale).to(y.dtype)

    def update(self) -> Tensor:
        """(alpha / r) B A, what the adapter adds to the weight, in the adapter's dtype."""
        return (self.lora_B.detach() @ self.lora_A.detach()) * self.scale


def apply(model: Transformer, config: LoRAConfig, seed: int = 0) -> list[str]:
    """Freeze the model and swap adapted projections in; return their names. `seed` draws the A matrices."""
    if layers(model):
        raise ValueError("the model has adapters already; remove them first")
    model.requires_grad_(False)
    generator = None
    if model.tok_embeddings.weight.device.type != "meta":
        generator = torch.Generator(model.tok_embeddings.weight.device).manual_seed(seed)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, FrozenLinear))}
    configs = {linear: of for name, linear in linears.items() if (of := config.of(name)) is not None}
    return replace_modules(
        model, lambda _, module: module in configs, lambda linear: LoRALinear(linear, configs[linear], generator)
    )


def layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted projections by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@torch.no_grad()
def merge(model: Transformer) -> float:
    """Add each update to its weight.

    The sum is made in fp32 and rounded once to the dtype of the weight. Returns the share of the update that this
    rounding loses, |rounded - exact| / |update| over all weights (Frobenius norms): small in fp32; near or above 1
    where a 16-bit base swallows a small update. Raises ValueError where there is nothing to merge, NonFinite where a
    sum is not finite, InputError for a quantized base; then no weight has changed.
    """
    adapted = layers(model)
    require_mergeable(model)
    if not adapted or any(module.is_merged for module in adapted.values()):
        raise ValueError("there is nothing to merge" if not adapted else "the adapters are merged already")
    lost, whole, merged = 0.0, 0.0, {}
    for name, module in adapted.items():
        update = module.update()
        exact = module.weight.to(update.dtype) + update
        merged[name] = exact.to(module.weight.dtype)
        if not merged[name].isfinite().all():
            raise NonFinite(f"{name}: the merged weight is not finite in {module.weight.dtype}; nothing was merged")
        # What the weight really changed by, against what it should have: exact - weight would round as well.
        gap = (merged[name].double() - module.weight.double()) - update.double()
        lost += gap.square().sum().item()
        whole += update.double().square().sum().item()
    for name, module in adapted.items():
        module.is_merged, module.weight.data = True, merged[name]
    return math.sqrt(lost / whole) if whole else 0.0


def require_mergeable(model: nn.Module) -> None:
    """Raise InputError where the base is quantized: its codes have no room for an update."""
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear):
            raise InputError(f"{name}: an adapter cannot be merged into quantized weights; keep it beside them")


def remove(model: Transformer) -> None:
    """The layers without adapters again, with the weights that are in them now: merge first to keep the update."""

    def plain(adapted: nn.Module) -> nn.Module:
        return plain_linear(adapted.weight) if adapted.layer is None else adapted.layer

    replace_modules(model, lambda _, module: isinstance(module, LoRALinear), plain)


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors under their names in the model."""
    return {
        f"{name}.{matrix}": getattr(module, matrix).detach()
        for name, module in layers(model).items()
        for matrix in ("lora_A", "lora_B")
    }


def trainable_share(model: nn.Module) -> tuple[int, int]:
    """Trainable parameters and all parameters, adapters included; a tied table counts once."""
    # int4 holds two parameters in a byte
    counts = [(p.numel() * (2 if p.dtype == torch.uint8 else 1), p.requires_grad) for p in model.parameters()]
    return sum(n for n, is_trained in counts if is_trained), sum(n for n, _ in counts)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
