"""LoRA adapters on disk, in PEFT's format: those of `peft`, torchtune and others are read, and they read ours.

    config = load(model, "adapter", lambda: fingerprint(ckpt_dir))     # "one,two": the sum of both updates
    save(model, config, "adapter", fingerprint(ckpt_dir), ckpt_dir)

A directory holds adapter_config.json and adapter_model.safetensors (or, older, .bin). Of the configuration every field
is honoured, known to leave the result alone, or refused by name. A test compares the logits with PEFT's for each.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import regex
import safetensors.torch
import torch
from torch import Tensor

from llama import files, parallel
from llama.checkpoint import hf, meta, source
from llama.checkpoint.locate import locate
from llama.checkpoint.source import open_safetensors
from llama.config import ModelArgs
from llama.errors import InputError
from llama.lora import META_NAMES, LoRAConfig, apply, layers, state_dict
from llama.model import Transformer
from llama.processes import ALONE, World

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # of every tensor in PEFT's files
TENSOR = re.compile(r"(?:(?:base_model|model)\.)*(layers\.\d+\.\w+\.\w+\.lora_[AB])(?:\.\w+)?\.weight")  # read
HF_NAMES = {target: hf.BLOCK[name].removesuffix(".weight") for target, name in META_NAMES.items()}  # inside a block
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# The fields of PEFT's configuration: those of `_read_fields`, these, and others that must be off.
ALLOWED = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    # The others leave a base behind that they have changed: what is saved is an update of weights that nobody has.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
    "layers_pattern": ("layers", ["layers"], "", [], None),
}
# Names, versions and how training began; fan_in_fan_out and the ties are of layers that a Llama's projections are not.
IGNORED = (
    "auto_mapping peft_version base_model_name_or_path revision inference_mode runtime_config eva_config "
    "megatron_core qalora_group_size fan_in_fan_out ensure_weight_tying"
).split()
OFF = (None, False, {}, [])
MERGE = "merge it by peft's merge_and_unload, and take that"
READ = (
    "r lora_alpha lora_dropout use_rslora rank_pattern alpha_pattern target_modules exclude_modules layers_to_transform"
).split()

# Patterns from a file have what names of modules need, without counted repetitions, which could fill the memory. All of
# them are matched within this time, because backtracking may have no end.
PLAIN = re.compile(r"(?:\(\?:|\((?!\?)|[\w.*+?|)\[\]^$-]|\\[.dwb]|\{1,\})*")
MATCH_SECONDS = 5.0


@dataclass(frozen=True)
class Adapter:
    """What a directory holds: A and B by module, in Meta's order, fp32; and what it says of the base under it."""

    path: Path  # of the tensors
    config: LoRAConfig
    matrices: dict[str, dict[str, Tensor]]
    base_sha256: str | None
    base: Any  # its name


def folders(adapter: str | Path) -> list[Path]:
    """The directories that "one" or "one,two" names. Raises InputError where one holds no adapter."""
    parts = [str(adapter)] if os.path.exists(os.path.expanduser(adapter)) else str(adapter).split(",")
    if not (names := [part.strip() for part in parts if part.strip()]):
        raise InputError(f"adapter={adapter} names no directory")
    found = [locate(name, "adapter directory") for name in names]
    for folder in found:
        if not (folder / CONFIG).is_file():
            below = sorted(str(config.parent) for config in folder.glob(f"*/{CONFIG}"))
            remedy = f"; look at {' or '.join(below[:3])}" if below else ""
            raise InputError(f"adapter={folder} holds no {CONFIG}{remedy}")
    return found


def fingerprint(adapter: str | Path) -> str:
    """sha256 of the files of the directories that `adapter` names: the same wherever they lie."""
    digest = hashlib.sha256()
    for folder in folders(adapter):
        digest.update(f"{files.sha256(folder / CONFIG)} {files.sha256(_weights(folder))}\n".encode())
    return digest.hexdigest()


def load(
    model: Transformer, adapter: str | Path, base: Callable[[], str] | None = None, me: World = ALONE
) -> LoRAConfig:
    """Apply the adapter of a directory, or the sum of several ("one,two"), and return the configuration.

    base: gives the fingerprint of the checkpoint under the model. It is asked only where an adapter says what it was
    trained on: with the wrong weights it gives fluent nonsense. None: any base whose shapes fit will do.
    me: of several processes, each has a part of the model, and gets the same part of the update (parallel.py).
    Raises InputError naming file and field for anything missing, unexpected, of a wrong shape, not finite or not
    supported; then the model is as it was.
    """
    adapters = [_read(folder, model, me) for folder in folders(adapter)]
    asked = base is not None and any(one.base_sha256 is not None for one in adapters)
    actual = base() if asked else None
    for one in adapters:
        if asked and one.base_sha256 not in (None, actual):
            name = f"{_shown(one.base)}, " if one.base else ""
            raise InputError(
                f"{one.path}: was trained on a different base model ({name}sha256 {one.base_sha256[:12]}, this is "
                f"{actual[:12]}); any_base=True uses it all the same"
            )
    config = adapters[0].config if len(adapters) == 1 else _sum([one.config for one in adapters], model.args)
    apply(model, config)
    for name, module in layers(model).items():
        parts = [(one.matrices[name], one.config.of(name)) for one in adapters if name in one.matrices]
        module.lora_A.data.copy_(torch.cat([part["lora_A"] for part, _ in parts]))
        scaled = [part["lora_B"] * (of.alpha / of.r / module.scale) for part, of in parts]
        module.lora_B.data.copy_(torch.cat(scaled, 1))
        if me.size > 1:
            parallel.sum_with_update(name, module)
    return config


def _sum(configs: list[LoRAConfig], args: ModelArgs) -> LoRAConfig:
    """One beside the other: the ranks of a module add up, and the scales move into B."""
    ranks = {name: sum(of.r for config in configs if (of := config.of(name))) for name in _hf_names(args).values()}
    return _of_modules({name: (r, float(r)) for name, r in ranks.items() if r}, 0.0, args)


def _of_modules(modules: dict[str, tuple[int, float]], dropout: float, args: ModelArgs) -> LoRAConfig:
    """The configuration of these ranks and alphas, said in short where all layers are alike."""
    targets = tuple(target for target in META_NAMES if any(name.endswith(f".{target}") for name in modules))
    r, alpha = max(modules.values())
    if len(set(modules.values())) > 1 or len(modules) < len(targets) * args.n_layers:
        return LoRAConfig(r, alpha, dropout, targets, tuple((name, *both) for name, both in modules.items()))
    return LoRAConfig(r, alpha, dropout, targets)


@cache
def _hf_names(args: ModelArgs) -> dict[str, str]:
    """Hugging Face's name of each projection, and its name here."""
    return {
        f"model.layers.{layer}.{HF_NAMES[target]}": f"layers.{layer}.{name.removesuffix('.weight')}"
        for layer in range(args.n_layers)
        for target, name in META_NAMES.items()
    }


# The configuration


def read_config(folder: Path, args: ModelArgs) -> LoRAConfig:
    """What a configuration means for a model of that shape. Raises InputError naming each field it cannot honour."""
    try:
        return _read_fields(files.read_json(folder / CONFIG), args)
    except _Refused as error:
        raise InputError(f"{folder / CONFIG}:{error}") from None


class _Refused(Exception):
    """A field of the configuration, the value that it has, and what is wrong with it."""

    def __init__(self, field: str, value: Any, why: str) -> None:
        super().__init__(f"{field}: {_shown(value)} {why}")


def _read_fields(content: dict[str, Any], args: ModelArgs) -> LoRAConfig:
    """PEFT's defaults stand for what is missing."""
    if "peft_type" not in content:
        raise _Refused("peft_type", None, "is not supported, only 'LORA'; this is no adapter of PEFT's format")
    for field, value in content.items():
        allowed = ALLOWED.get(field, OFF)
        if field not in (*READ, *IGNORED) and not any(value == one and type(value) is type(one) for one in allowed):
            only = f", only {', '.join(map(repr, allowed))}" if field in ALLOWED else ""
            raise _Refused(field, value, f"is not supported{only}; {MERGE}")
    deadline = time.monotonic() + MATCH_SECONDS
    targets, chosen = content.get("target_modules"), content.get("layers_to_transform")
    is_target = _chooser("target_modules", targets, ("q_proj", "v_proj"), deadline)
    is_excluded = _chooser("exclude_modules", content.get("exclude_modules"), (), deadline)
    chosen = chosen if isinstance(chosen, list) else [] if chosen is None else [chosen]
    if not all(type(layer) is int for layer in chosen) or (chosen and isinstance(targets, str)):
        raise _Refused("layers_to_transform", chosen, "is not a list of layers, beside target_modules by name")
    rank_of = _finder(content, "r", "r", "rank_pattern", deadline)
    alpha_of = _finder(content, "lora_alpha", "alpha", "alpha_pattern", deadline)
    dropout = _checked("lora_dropout", "dropout", content.get("lora_dropout", 0.0))
    if not isinstance(is_rank_stabilized := content.get("use_rslora", False), bool):
        raise _Refused("use_rslora", is_rank_stabilized, "is neither true nor false")
    modules = {}
    for name, module in {"lm_head": None, "model.embed_tokens": None, **_hf_names(args)}.items():
        if not is_target(name) or is_excluded(name):
            continue
        if module is None and not chosen:
            raise _Refused("target_modules", targets, f"adapts {name}, which is not supported; {MERGE}")
        if module is None or (chosen and int(module.split(".")[1]) not in chosen):
            continue
        r, alpha = rank_of(name), alpha_of(name)
        if is_rank_stabilized:  # scaled by alpha / sqrt(r)
            alpha = _checked("lora_alpha", "alpha", alpha * math.sqrt(r))
        modules[module] = r, alpha
    if not modules:
        raise _Refused("target_modules", targets, "names no projection of this model, or none that is left")
    return _of_modules(modules, dropout, args)


def _chooser(field: str, wanted: Any, usual: tuple[str, ...], deadline: float) -> Callable[[str], bool]:
    """Whether a name is meant: by a pattern, or by a list of names and of their ends."""
    if isinstance(wanted, str) and wanted.lower() == "all-linear" and field == "target_modules":
        return lambda name: name.startswith("model.layers.")
    if isinstance(wanted, str) and wanted:
        return _matcher(field, wanted, wanted, deadline)
    ends = usual if wanted is None else wanted or ()
    if not isinstance(ends, (list, tuple)) or not all(isinstance(end, str) for end in ends):
        raise _Refused(field, wanted, "is neither a pattern nor a list of names")
    known = frozenset(ends)

    def is_chosen(name: str) -> bool:
        parts = name.split(".")
        return not known.isdisjoint(".".join(parts[i:]) for i in range(len(parts)))

    return is_chosen


def _finder(content: dict[str, Any], field: str, option: str, pattern: str, deadline: float) -> Callable[[str], Any]:
    """The rank, or alpha, of a name: that of the first pattern that it ends with, else the usual one."""
    usual, table = _checked(field, option, content.get(field, 8)), content.get(pattern) or {}
    if not isinstance(table, dict):
        raise _Refused(pattern, table, "is not an object")
    values = [
        (_matcher(pattern, key, rf"(?:.*\.)?(?:{key})", deadline), _checked(pattern, option, value))
        for key, value in table.items()
    ]
    return lambda name: next((value for matches, value in values if matches(name)), usual)


def _matcher(field: str, shown: str, pattern: str, deadline: float) -> Callable[[str], bool]:
    """Whether a whole name matches a pattern from a file."""
    try:
        if not PLAIN.fullmatch(pattern):
            raise ValueError("it holds more than names of modules need")
        compiled = regex.compile(pattern)
    except (ValueError, regex.error, RecursionError) as error:
        raise _Refused(field, shown, f"is no plain pattern ({error}); list the modules by name") from None

    def matches(name: str) -> bool:
        try:
            return compiled.fullmatch(name, timeout=max(1e-3, deadline - time.monotonic())) is not None
        except TimeoutError:
            raise _Refused(field, shown, "takes too long to match; list the modules by name") from None

    return matches


def _checked(field: str, option: str, value: Any) -> Any:
    """The value, if LoRAConfig takes it."""
    try:
        LoRAConfig(**{option: value})
    except InputError as error:
        raise _Refused(field, value, f"is {str(error).partition(' is ')[2]}") from None
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


# The tensors


def _read(folder: Path, model: Transformer, me: World) -> Adapter:
    config, path = read_config(folder, model.args), _weights(folder)
    about: dict[str, str] = {}
    if path.name == PICKLED:
        tensors = meta.read_pth(path)
    else:
        with open_safetensors(path) as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a handle)
    base = files.read_json(folder / CONFIG).get("base_model_name_or_path")
    try:
        matrices = _fit(path, tensors, config, model, me)
    except InputError as error:
        raise InputError(f"{error}; it was made for {_shown(base)}" if base else str(error)) from None
    return Adapter(path, config, matrices, about.get("base_sha256"), base)


def _weights(folder: Path) -> Path:
    for path in (folder / WEIGHTS, folder / PICKLED):
        if path.is_file():
            return path
    raise InputError(f"{folder} holds neither {WEIGHTS} nor {PICKLED}; download the adapter again")


def _fit(
    path: Path, tensors: dict[str, Tensor], config: LoRAConfig, model: Transformer, me: World
) -> dict[str, dict[str, Tensor]]:
    """This process's part of each tensor by module and matrix, in fp32 and Meta's order, once all are there and fit."""
    names: dict[str, str] = {}
    for name in sorted(tensors):
        match = TENSOR.fullmatch(source.WRAPPERS.sub("", name))
        key = name if match is None else match[1]
        if key in names:
            raise InputError(f"{path}:{name}: stands twice, as {names[key]} too")
        names[key] = name
    matrices: dict[str, dict[str, Tensor]] = {}
    for hf_name, module in _hf_names(model.args).items():
        if (of := config.of(module)) is None:
            continue
        linear = model.get_submodule(module)
        for matrix, shape in (("lora_A", [of.r, linear.in_features]), ("lora_B", [linear.out_features, of.r])):
            name = names.pop(f"{hf_name}.{matrix}".removeprefix("model."), None)
            if name is None:
                raise InputError(f"{path}:{PREFIX}{hf_name}.{matrix}.weight: is missing for {CONFIG}")
            tensor = tensors[name]
            if (axis := parallel.axis_of(f"{module}.{matrix}")) is not None:
                shape[axis] *= me.size
            if list(tensor.shape) != shape:
                raise InputError(f"{path}:{name}: has shape {list(tensor.shape)}, expected {shape}")
            if tensor.dtype not in DTYPES or not (tensor := tensor.float()).isfinite().all():
                raise InputError(f"{path}:{name}: holds values that are not finite numbers")
            tensor = parallel.shard(f"{module}.{matrix}", tensor, me)
            if matrix == "lora_B":  # its rows are those of the projection
                tensor = hf.swap_rotary_order(tensor, META_NAMES[module.split(".")[-1]], model.args, to_hf=False)
            matrices.setdefault(module, {})[matrix] = tensor
    for name in names.values():
        raise InputError(f"{path}:{name}: is not expected for {CONFIG}")
    return matrices


def save(
    model: Transformer, config: LoRAConfig, directory: str | Path, base: str, base_name: str | None = None
) -> None:
    """Write a new directory that `peft` and `load` read.

    base: checkpoint.fingerprint of the checkpoint under the adapters, which goes into the file's metadata; base_name:
    where it lies, which is what `AutoPeftModelForCausalLM` loads.
    """
    hf_names = {module: name for name, module in _hf_names(model.args).items()}
    tensors = {}
    for name, tensor in state_dict(model).items():
        module, _, matrix = name.rpartition(".")
        if matrix == "lora_B":
            tensor = hf.swap_rotary_order(tensor, META_NAMES[module.split(".")[-1]], model.args, to_hf=True)
        tensors[f"{PREFIX}{hf_names[module]}.{matrix}.weight"] = tensor.cpu().contiguous()
    each = {hf_names[module]: (r, alpha) for module, r, alpha in config.modules}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": config.r,
        "lora_alpha": _whole(config.alpha),
        "rank_pattern": {name: r for name, (r, _) in each.items()},
        "alpha_pattern": {name: _whole(alpha) for name, (_, alpha) in each.items()},
        "lora_dropout": config.dropout,
        "target_modules": list(each) or [HF_NAMES[target].split(".")[1] for target in config.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    with files.new_directory(directory) as scratch:
        files.write_json(scratch / CONFIG, settings)
        (scratch / WEIGHTS).write_bytes(_serialized(tensors, {"base_sha256": base, "format": "pt"}))


def _serialized(tensors: dict[str, Tensor], about: dict[str, str]) -> bytes:
    """A safetensors file: of equal adapters equal ones, where the library writes what is about it in a random order."""
    data = safetensors.torch.save(tensors, about)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    head = json.dumps({**header, "__metadata__": about}, separators=(",", ":")).encode()
    return data[:8] + head.ljust(end - 8) + data[end:]


def _whole(alpha: float) -> float:
    """As an integer, where it is one: PEFT expects no other."""
    return int(alpha) if alpha == int(alpha) else alpha
