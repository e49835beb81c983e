"""LoRA (Hu et al. 2021): a frozen weight W gets a trained update of low rank, y = W x + (alpha / r) B A dropout(x).

    config = LoRAConfig(r=16, alpha=32, dropout=0.05, targets=("wq", "wv"))
    apply(model, config)          # swaps the projections in, freezes everything else
    ...                           # train
    save(model, config, "adapter", base)
    merge(model); remove(model)   # a plain model again, with the update inside its weights

A starts random and B at zero, so an adapted model starts as its base, to the bit. Adapters are fp32 over a base of any
dtype, because updates of 16-bit weights are mostly lost to rounding. On disk they have PEFT's format, both ways.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import files
from llama.checkpoint import Source, fingerprint, hf
from llama.checkpoint.source import open_safetensors
from llama.errors import InputError
from llama.frozen import FrozenLinear
from llama.model import Transformer
from llama.surgery import plain_linear, replace_modules

# Each projection that can be adapted, and what it is called inside a block: by Meta and by Hugging Face.
META_NAMES = {name.split(".")[1]: name for name in hf.BLOCK if not name.endswith("norm.weight")}
HF_NAMES = {target: hf.BLOCK[name].removesuffix(".weight") for target, name in META_NAMES.items()}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
UNSUPPORTED = (  # options of PEFT that change the result
    "use_rslora use_dora fan_in_fan_out lora_bias use_qalora modules_to_save rank_pattern alpha_pattern "
    "layers_to_transform target_parameters trainable_token_indices exclude_modules"
).split()
PREFIX = "base_model.model.model"  # of every tensor name in PEFT's files


@dataclass(frozen=True)
class LoRAConfig:
    """Which projections are adapted and how. Raises InputError naming the field where a value is impossible."""

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("wq", "wv")

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
        y = F.linear(x, self.weight) if self.layer is None else self.layer(x)
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
    return replace_modules(
        model,
        lambda name, module: name.split(".")[-1] in config.targets and isinstance(module, (nn.Linear, FrozenLinear)),
        lambda linear: LoRALinear(linear, config, generator),
    )


def layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted projections by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@torch.no_grad()
def merge(model: Transformer) -> float:
    """Add each update to its weight.

    The sum is made in fp32 and rounded once to the dtype of the weight. Returns the share of the update that this
    rounding loses, |rounded - exact| / |update| over all weights (Frobenius norms): small in fp32; near or above 1
    where a 16-bit base swallows a small update. Raises ValueError where there is nothing to merge or a sum is not
    finite, InputError for a quantized base; then no weight has changed.
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
            raise ValueError(f"{name}: the merged weight is not finite in {module.weight.dtype}; nothing was merged")
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


# Files, in PEFT's format


def save(model: Transformer, config: LoRAConfig, directory: str | Path, base: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors as a new directory that `peft` and `load` read.

    base: checkpoint.fingerprint of the checkpoint under the adapters, which goes into the file's metadata.
    """
    tensors = {}
    for name, tensor in state_dict(model).items():
        _, layer, _, target, matrix = name.split(".")
        if matrix == "lora_B":  # its rows are those of the projection
            tensor = hf.swap_rotary_order(tensor, META_NAMES[target], model.args, to_hf=True)
        tensors[f"{PREFIX}.layers.{layer}.{HF_NAMES[target]}.{matrix}.weight"] = tensor.cpu().contiguous()
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": [HF_NAMES[target].split(".")[1] for target in config.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    with files.new_directory(directory) as scratch:
        files.write_json(scratch / CONFIG, settings)
        safetensors.torch.save_file(tensors, scratch / WEIGHTS, metadata={"format": "pt", "base_sha256": base})


def load(model: Transformer, directory: str | Path, base: str | Path | Source | None = None) -> LoRAConfig:
    """Apply the adapter in a directory that `save` or `peft` wrote, and return its configuration.

    base: the checkpoint that `model` was loaded from. Where the file says what it was trained on, and only there, the
    weights of `base` are hashed, seconds for a large model: with the wrong ones an adapter gives fluent nonsense.
    Raises InputError naming file and field for anything missing, unexpected, of a wrong shape, not finite or not
    supported.
    """
    folder = Path(directory)
    config = _read_config(folder / CONFIG)
    path = folder / WEIGHTS
    with open_safetensors(path) as file:
        trained_on = (file.metadata() or {}).get("base_sha256")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a handle)
    if base is not None and trained_on is not None and trained_on != (actual := fingerprint(base)):
        raise InputError(
            f"{path}: was trained on a different base model (sha256 {trained_on[:12]}, this is {actual[:12]})"
        )
    expected = _expected(model, config)
    for name in sorted(expected.keys() ^ tensors.keys()):
        raise InputError(f"{path}:{name}: {'is missing' if name in expected else 'is not expected'} for {CONFIG}")
    for name, (_, _, shape) in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise InputError(f"{path}:{name}: has shape {list(tensors[name].shape)}, expected {list(shape)}")
        if not tensors[name].is_floating_point() or not tensors[name].isfinite().all():
            raise InputError(f"{path}:{name}: holds values that are not finite numbers")
    apply(model, config)
    adapted = layers(model)
    for name, (module, matrix, _) in expected.items():
        tensor = tensors[name]
        if matrix == "lora_B":
            tensor = hf.swap_rotary_order(tensor, META_NAMES[module.split(".")[-1]], model.args, to_hf=False)
        getattr(adapted[module], matrix).data.copy_(tensor)
    return config


def _read_config(path: Path) -> LoRAConfig:
    content = files.read_json(path)
    for name, only in {"peft_type": "LORA", "bias": "none"}.items():
        if content.get(name) != only:
            raise InputError(f"{path}:{name}: {content.get(name)!r} is not supported, only {only!r}")
    for name in UNSUPPORTED:
        if content.get(name):
            raise InputError(f"{path}:{name}: {content[name]!r} is not supported, only None")
    targets = content.get("target_modules")
    by_hf_name = {name.split(".")[1]: target for target, name in HF_NAMES.items()}
    if not isinstance(targets, list) or not all(isinstance(t, str) and t in by_hf_name for t in targets):
        raise InputError(f"{path}:target_modules: {targets!r} is not a list of {', '.join(by_hf_name)}")
    ours = sorted((by_hf_name[target] for target in targets), key=list(META_NAMES).index)  # PEFT writes a set
    try:
        return LoRAConfig(content.get("r"), content.get("lora_alpha"), content.get("lora_dropout"), tuple(ours))
    except InputError as error:
        raise InputError(f"{path}:{error}") from None


def _expected(model: Transformer, config: LoRAConfig) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """PEFT's name of each tensor, and to which module and matrix of what shape it belongs."""
    tensors = {}
    for layer in range(model.args.n_layers):
        for target in config.targets:
            module = f"layers.{layer}.{META_NAMES[target].removesuffix('.weight')}"
            linear = model.get_submodule(module)
            shapes = {"lora_A": (config.r, linear.in_features), "lora_B": (linear.out_features, config.r)}
            for matrix, shape in shapes.items():
                name = f"{PREFIX}.layers.{layer}.{HF_NAMES[target]}.{matrix}.weight"
                tensors[name] = (module, matrix, shape)
    return tensors


def trainable_share(model: nn.Module) -> tuple[int, int]:
    """Trainable parameters and all parameters, adapters included; a tied table counts once."""
    # int4 holds two parameters in a byte
    counts = [(p.numel() * (2 if p.dtype == torch.uint8 else 1), p.requires_grad) for p in model.parameters()]
    return sum(n for n, is_trained in counts if is_trained), sum(n for n, _ in counts)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
