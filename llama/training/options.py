"""The settings of a fine-tuning run: what one optimizer step depends on, and all the rest.

Each is said once, as a field: the flag of finetuning.py, its help, settings.json in the run's directory and the check
of a resumed run come from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from llama import checkpoint, cli, files
from llama.cli import option
from llama.errors import InputError
from llama.lora import LoRAConfig

AMP = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}
SCHEDULES = ("constant", "linear", "cosine")
NORMALIZATIONS = ("tokens", "microbatch")
OBJECTIVES = ("answers", "dpo")
PRESETS: dict[str, dict[str, Any]] = {
    "course": {},  # the defaults
    "learn": {
        "targets": "wq,wk,wv,wo,w1,w2,w3",
        "optimizer": "adamw",
        "lr": 1e-3,
        "schedule": "cosine",
        "warmup_steps": 5,
        "clip_norm": 1.0,
        "epochs": 3,
    },
}
SETTINGS = "settings.json"
NOT_KEPT = ("out_dir", "resume", "show_data")  # in settings.json: they are of one call, not of the run
MAY_CHANGE = (
    *NOT_KEPT,
    "device",
    "shard",
    "save_every",
    "keep",
    "eval_every",
    "export",
    "results",
)  # when a run is resumed
PLACES = ("ckpt_dir", "tokenizer_path", "adapter", "qat_start", "data", "eval_data")  # known by their content
MAY_CHANGE += PLACES


@dataclass(frozen=True)
class Settings(cli.Options):
    """What one optimizer step depends on. Raises InputError naming the field where a value is impossible."""

    objective: str = option(
        "answers",
        "answers: each token of the answers is learned; dpo: of two answers, which one is preferred (direct preference "
        "optimization)",
        choices=OBJECTIVES,
    )
    beta: float = option(0.1, "of dpo: how strongly the model is held to where it started", above=0)
    optimizer: str = option("sgd", "sgd or adamw", choices=("sgd", "adamw"))
    lr: float = option(1e-5, "peak learning rate", least=0)
    momentum: float = option(0.0, "of sgd, below 1", least=0)
    weight_decay: float = option(0.0, "of the optimizer: part of the gradient for sgd, decoupled for adamw", least=0)
    schedule: str = option("constant", "constant, linear or cosine, down to 0", choices=SCHEDULES)
    warmup_steps: int = option(0, "optimizer steps in which the learning rate rises", least=0)
    clip_norm: float | None = option(None, "largest allowed L2 norm of the whole gradient; default: no limit", above=0)
    loss_normalization: str = option(
        "tokens",
        "tokens weighs all label tokens of a step alike, dpo all its pairs; microbatch averages the mean losses of its "
        "batches, as the course does: a token of a short answer weighs more",
        choices=NORMALIZATIONS,
    )
    amp: str = option("none", "autocast: none, fp16 (with loss scaling) or bf16", choices=AMP)
    lean: bool = option(
        False, "the same step in far less memory; without lora it takes plain sgd and an accumulation of 1"
    )
    qat: int | None = option(
        None,
        "4 or 8: weights are trained through their rounding to so many bits, with lora what it adapts, and the codes "
        "are exported; without lean",
        choices=(4, 8),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective != "dpo" and self.beta != 0.1:
            raise InputError(f"beta={self.beta} is of objective=dpo; leave it out")
        if self.qat is not None and self.lean:
            raise InputError(
                f"qat={self.qat} with lean=True: lean parts compute with unrounded weights; use lean=False"
            )
        if self.momentum >= 1 or (self.momentum and self.optimizer != "sgd"):
            raise InputError(f"momentum={self.momentum}: expected less than 1, and optimizer=sgd")

    def lr_at(self, step: int, total_steps: int) -> float:
        """Learning rate of update `step` (from 0): up to `lr` over the warm-up, then by the schedule down to 0.

        The last update, total_steps - 1, still moves: the schedule reaches 0 one step later.
        """
        if step < self.warmup_steps:
            return self.lr * (step + 1) / (self.warmup_steps + 1)
        done = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
        factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.schedule]
        return self.lr * factor


@dataclass(frozen=True)
class TrainingOptions(Settings):
    """Fine-tune a Llama model on instructions, chats or text."""

    ON_SEVERAL = True

    ckpt_dir: str | None = option(None, cli.CKPT_DIR)
    tokenizer_path: str | None = option(None, cli.TOKENIZER_PATH)
    data: str | None = option(
        None,
        "Alpaca records, chats, prompts with completions or texts, in JSON, JSON lines or CSV; or plain text; for dpo, "
        "prompts with a chosen and a rejected answer; default: data/alpaca_200.json, for dpo data/pairs_200.json, and "
        "for the embedded model those of the small world that it knows, in data/tiny",
    )
    eval_data: str | None = option(
        None,
        "the held-out loss is measured on the first samples of this file, in any of these formats, and all of data is "
        "trained on; default: a part of data is held out",
    )
    out_dir: str = option("runs/finetuning", "directory of the run; must be new, unless resume is on")
    resume: bool = option(False, "continue the run in out_dir, with its own settings, from its newest whole snapshot")
    preset: str = option(
        "course", "course (the defaults) or learn (AdamW, LoRA on all projections, 3 epochs)", choices=PRESETS
    )
    lora: bool = option(True, "True trains low-rank adapters over frozen weights, False all weights")
    r: int = option(LoRAConfig.r, "rank of the adapters")
    alpha: float = option(LoRAConfig.alpha, "the adapters' update is scaled by alpha / r")
    dropout: float = option(LoRAConfig.dropout, "on the adapters' input")
    targets: str = option(",".join(LoRAConfig.targets), "adapted projections, of wq,wk,wv,wo,w1,w2,w3")
    adapter: str | None = option(
        None, "go on from this LoRA adapter, from finetuning.py or PEFT, whose rank, alpha and targets are kept"
    )
    any_base: bool = option(False, cli.ANY_BASE)
    batch_size: int = option(1, "sequences that go through the network at once, a micro-batch", least=1)
    accumulation: int = option(8, "micro-batches of one optimizer step", least=1)
    epochs: int = option(1, "passes over the data", least=1)
    max_steps: int | None = option(None, "end after this many optimizer steps", least=1)
    qat_start: str | None = option(
        None,
        "with qat, start from the codes of this checkpoint, which compress.py has made of the same model, in its "
        "format; default: 4 bits in groups of 64 with zero-points, chosen for each weight by itself",
    )
    keep_zeros: bool = option(False, "of a model pruned by magnitude, zeros stay zeros; without lora and lean")
    checkpointing: str = option(
        "none", "layers that are recomputed in the backward pass: none, all, every:K, or a list such as 0,4,8"
    )
    checkpoint_budget_gb: float | None = option(
        None, "recompute the fewest layers with which the peak stays within this many GB (1e9 bytes)", above=0
    )
    dtype: str = option(
        "float32", "float32, or bfloat16 or float16 for a frozen base under LoRA; what a quantized base computes in"
    )
    held_out: int = option(
        20,
        "records, or blocks of a text, on which the loss is measured: set aside from data, or the first of eval_data",
        least=0,
    )
    max_seq_len: int = option(
        512, "longer samples lose their end, and are counted; texts are cut into blocks of this length", least=2
    )
    packing: bool = option(False, "several samples in a sequence, which do not see each other")
    shard: bool = option(
        False,
        "of several processes, each keeps a share of the weights, gradients and optimizer state, where all of them "
        "would not fit; default: each has them all",
    )
    seed: int = option(1, "of the split, the order, the adapters and dropout", **cli.SEEDS)
    device: str = option("auto", cli.DEVICE)
    save_every: int = option(10, "steps between snapshots", least=1)
    keep: int = option(2, "snapshots kept", least=1)
    eval_every: int | None = option(
        None, "steps between evaluations, of held-out loss and answers; default: a quarter of the run", least=1
    )
    export: str = option(
        "meta",
        "merged model at the end, in the layout meta, hf, both, gguf or none; default: meta, and none over a quantized "
        "base, which no adapter can be merged into",
        choices=("meta", "hf", "both", "gguf", "none"),
    )
    results: str | None = option(None, "append the measured figures to this file, as a row of the tables; default: no")
    show_data: int | None = option(None, "print this many samples, the trained tokens in brackets, and end", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.lora_config  # wrong values end it here, not after loading
        if not self.lora and self.dtype != "float32":
            raise InputError(f"dtype={self.dtype}: without LoRA all weights are trained, in float32; use amp=bf16")
        if self.adapter is not None and not self.lora:
            raise InputError(f"adapter={self.adapter} is trained with lora=True; for all weights, merge it first")
        if self.keep_zeros and (self.lora or self.lean):
            refused = "lora=True" if self.lora else "lean=True"
            raise InputError(f"keep_zeros=True with {refused} would fill the zeros in; use lora=False and lean=False")
        if self.qat is not None:
            self._require_codes_alone()
        elif self.qat_start is not None:
            raise InputError(f"qat_start={self.qat_start} is where qat=4 or 8 starts; leave it out, or say which")
        if self.lean and not self.lora:
            require_plain_sgd(self)
        if self.of_pairs and self.packing:
            raise InputError("packing=True with objective=dpo: a pair is a sequence already; use batch_size")
        if self.checkpoint_budget_gb is not None and self.checkpointing != "none":
            raise InputError(
                f"checkpoint_budget_gb={self.checkpoint_budget_gb} chooses the layers; leave out "
                f"checkpointing={self.checkpointing}"
            )
        if self.eval_data is not None and not self.held_out:
            raise InputError(f"held_out=0 measures nothing on eval_data={self.eval_data}; leave one of them out")
        if self.resume and self.show_data is not None:
            raise InputError("show_data shows what a new run would train on; leave out resume=True")

    def _require_codes_alone(self) -> None:
        """Raise InputError for what does not go with training through the rounding."""
        if self.lora and self.dropout:
            raise InputError(
                f"dropout={self.dropout:g} with qat={self.qat}: an update that is rounded with its weight has no input "
                "of its own; use dropout=0, or lora=False to train all weights"
            )
        if self.adapter is not None:
            raise InputError(f"adapter={self.adapter} with qat={self.qat}: merge it first, then train through rounding")
        if self.keep_zeros:
            raise InputError(
                f"keep_zeros=True with qat={self.qat}: codes round zeros as they do any weight; use one of them"
            )
        if self.export not in ("meta", "none"):
            raise InputError(f"export={self.export}: has no place for codes of {self.qat} bits; use meta or none")

    @property
    def lora_config(self) -> LoRAConfig:
        return LoRAConfig(self.r, self.alpha, self.dropout, tuple(self.targets.split(",")))

    @property
    def of_pairs(self) -> bool:
        """Whether the data are pairs of answers."""
        return self.objective == "dpo"

    @property
    def root(self) -> Path:
        return Path(self.out_dir)

    def kept(self) -> dict[str, Any]:
        """What settings.json holds."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in NOT_KEPT}

    def places(self) -> dict[str, str]:
        """Files of the run as they lie from its directory, so that both may be moved together, for settings.json."""
        values = {name: getattr(self, name) for name in PLACES}
        with contextlib.suppress(ValueError):  # other drives on Windows
            return {
                name: os.path.relpath(Path(value).expanduser(), self.root) for name, value in values.items() if value
            }
        return {}

    def changed(self) -> dict[str, Any]:
        """What this run was started with that is not its preset's, and that changes its figures."""
        usual = {field.name: field.default for field in dataclasses.fields(self)} | PRESETS[self.preset]
        told = (*MAY_CHANGE, "preset", "dtype", "seed")
        return {name: value for name, value in self.kept().items() if name not in told and value != usual[name]}

    @classmethod
    def resolve(cls, typed: dict[str, Any]) -> Self:
        """What was typed, over the settings of the run to resume, or over a preset."""
        if typed.get("resume"):
            return cls._resumed(typed)
        chosen = dict(PRESETS.get(typed.get("preset", "course"), {}))
        own = [f"{name}={typed[name]}" for name in ("r", "alpha", "targets") if name in typed]
        if typed.get("adapter") is not None and own:
            raise InputError(f"{', '.join(own)}: adapter={typed['adapter']} says it; leave it out")
        if "ckpt_dir" in typed and checkpoint.read_quantization(typed["ckpt_dir"]) is not None:
            chosen["export"] = "none"
        return cls(**{**chosen, **typed})

    @classmethod
    def _resumed(cls, typed: dict[str, Any]) -> Self:
        """Raises InputError naming each option that would change the training."""
        root = Path(typed.get("out_dir", cls.out_dir))
        path = root / SETTINGS
        if not path.is_file():
            raise InputError(f"out_dir={root} holds no run to resume; leave out resume=True to start one")
        about = files.read_json(path)
        saved, beside = about.get("options"), about.get("places", {})
        if not isinstance(saved, dict) or not isinstance(beside, dict):
            raise InputError(f"{path}:options: is missing; the run cannot be resumed")
        changed = [name for name in typed if name not in MAY_CHANGE and saved.get(name) != typed[name]]
        if changed:
            differences = ", ".join(f"{name}={typed[name]} (was {saved.get(name)})" for name in changed)
            raise InputError(
                f"{root} was started with other settings: {differences}; leave them out, or start a new run"
            )
        for name in PLACES:
            if name not in typed and saved.get(name) is not None:
                places = [root / str(beside.get(name, saved[name])), Path(str(saved[name])).expanduser()]
                if not (found := [place for place in places if place.exists()]):
                    reason = f"was started with {name}={saved[name]}, which is no longer there"
                    raise InputError(f"{root} {reason}; pass {name}=PATH as it is now, its content is compared")
                saved[name] = str(found[0])
        try:
            return cls(**{**saved, **typed})
        except (TypeError, AttributeError) as error:  # an option that is missing, unknown or of another type
            raise InputError(f"{path}:options: is not of this version ({error})") from error


def require_plain_sgd(settings: Settings) -> None:
    """Raise InputError where SGD inside the backward pass would be another step than these settings ask for."""
    allowed = {"optimizer": ("sgd",), "momentum": (0,), "weight_decay": (0,), "clip_norm": (None,)}
    allowed |= {"amp": ("none", "bf16"), "accumulation": (1,)}
    for name, values in allowed.items():
        value = getattr(settings, name, 1)  # a library's Settings say nothing of accumulation
        if value not in values:
            raise InputError(
                f"lean=True trains all weights by SGD inside the backward pass, which {name}={value} does not allow: "
                "use sgd without momentum, weight_decay and clip_norm, accumulation=1, amp=none or bf16; or lora=True"
            )
