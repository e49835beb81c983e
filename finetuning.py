"""Fine-tune a Llama model on instructions, with LoRA or in full, in a run that can be stopped and resumed at any time.

    python finetuning.py                               # the embedded model, 200 records, the course's settings
    python finetuning.py --preset=learn                # settings that change what the model answers
    python finetuning.py --ckpt_dir=Llama-3.2-1B --dtype=float16 --lean       # in a fifth more than the weights need
    python finetuning.py --resume                      # go on where a run stopped, to the same bytes
    python finetuning.py --show_data=3                 # print samples, the trained tokens in brackets

A run is a directory: settings.json, loss.jsonl (one line a step), loss.png, snapshots/, and at the end adapter/ (in
PEFT's format), merged/ (a checkpoint that inference.py takes) and summary.json.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import secrets
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import rows as row_files
from benchmarks import stopwatch
from data import alpaca
from llama import Llama, checkpoint, cli, files, lora, order, pruning
from llama import device as devices
from llama.errors import EnvironmentFailure, InputError, NonFinite, Stopped
from llama.evaluation.intervals import confidence
from llama.kernels.cpu import train_ops
from llama.tokenizer import Tokenizer, find_tokenizer
from llama.training import batch as batches
from llama.training import memory, snapshot
from llama.training.step import (
    Evaluation,
    Movement,
    Report,
    Settings,
    Trainer,
    checkpoint_layers,
    checkpointed_layers,
    evaluate,
    require_plain_sgd,
)

ROOT = Path(__file__).parent
EMBEDDED = ROOT / "data" / "tiny"
COURSE = {
    "lora": True,
    "r": 16,
    "alpha": 32.0,
    "dropout": 0.05,
    "targets": "wq,wv",
    "optimizer": "sgd",
    "lr": 1e-5,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "schedule": "constant",
    "warmup_steps": 0,
    "clip_norm": None,
    "batch_size": 1,
    "accumulation": 8,
    "epochs": 1,
}
PRESETS = {
    "course": COURSE,
    "learn": {
        **COURSE,
        "targets": "wq,wk,wv,wo,w1,w2,w3",
        "optimizer": "adamw",
        "lr": 1e-3,
        "schedule": "cosine",
        "warmup_steps": 5,
        "clip_norm": 1.0,
        "epochs": 3,
    },
}
MAY_CHANGE = ("device", "save_every", "keep", "eval_every", "export", "results")  # when a run is resumed
ROW = ("preset", "lora", "optimizer", "batch_size", "accumulation", "amp", "lean", "checkpointing", "max_seq_len")
EXPORTS = ("meta", "hf", "both", "none")
INSTRUCTIONS = ("Name three colours.", "What is the capital of France?", "Explain how to make a cup of tea.")
ANSWER_LEN = 48
MAX_ASKED = 20  # held-out records whose answers are compared with the reference


@dataclasses.dataclass(frozen=True)
class Options:
    """All settings of a run; see `main` for what they mean."""

    preset: str
    ckpt_dir: str | None
    tokenizer_path: str | None
    data: str
    held_out: int
    max_seq_len: int
    packing: bool
    lora: bool
    r: int
    alpha: float
    dropout: float
    targets: str
    optimizer: str
    lr: float
    momentum: float
    weight_decay: float
    schedule: str
    warmup_steps: int
    clip_norm: float | None
    batch_size: int
    accumulation: int
    epochs: int
    max_steps: int | None
    loss_normalization: str
    amp: str
    lean: bool
    keep_zeros: bool
    checkpointing: str
    checkpoint_budget_gb: float | None
    dtype: str
    seed: int
    device: str
    save_every: int
    keep: int
    eval_every: int | None
    export: str
    results: str | None

    def __post_init__(self) -> None:
        least = {"held_out": 0, "max_seq_len": 2, "batch_size": 1, "accumulation": 1, "epochs": 1}
        least |= {"max_steps": 1, "save_every": 1, "keep": 1, "eval_every": 1, "seed": 0}
        for name, value in least.items():
            if getattr(self, name) is not None and getattr(self, name) < value:
                raise InputError(f"--{name}={getattr(self, name)}: expected at least {value}")
        if self.export not in EXPORTS:
            raise InputError(f"--export={self.export}: expected one of {', '.join(EXPORTS)}")
        if not self.lora and self.dtype != "float32":
            raise InputError(f"--dtype={self.dtype}: without LoRA all weights are trained, in float32; use --amp")
        if self.keep_zeros and (self.lora or self.lean):
            flag = "lora=True" if self.lora else "lean=True"
            raise InputError(f"--keep_zeros with --{flag} would fill the zeros in; use --lora=False without --lean")
        if self.lean and not self.lora:
            require_plain_sgd(self.settings, self.accumulation)
        if self.checkpoint_budget_gb is not None and (self.checkpoint_budget_gb <= 0 or self.checkpointing != "none"):
            raise InputError(
                f"--checkpoint_budget_gb={self.checkpoint_budget_gb}: expected more than 0, and no --checkpointing, "
                "because it chooses the layers"
            )

    @property
    def settings(self) -> Settings:
        """What one optimizer step depends on."""
        return Settings(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Settings)})

    @property
    def lora_config(self) -> lora.LoRAConfig:
        return lora.LoRAConfig(self.r, self.alpha, self.dropout, tuple(self.targets.split(",")))


def main(
    *,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    data: str | None = None,
    out_dir: str = "runs/finetuning",
    resume: bool = False,
    preset: str | None = None,
    lora: bool | None = None,
    r: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    targets: str | None = None,
    optimizer: str | None = None,
    lr: float | None = None,
    momentum: float | None = None,
    weight_decay: float | None = None,
    schedule: str | None = None,
    warmup_steps: int | None = None,
    clip_norm: float | None = None,
    batch_size: int | None = None,
    accumulation: int | None = None,
    epochs: int | None = None,
    max_steps: int | None = None,
    loss_normalization: str | None = None,
    amp: str | None = None,
    lean: bool | None = None,
    keep_zeros: bool | None = None,
    checkpointing: str | None = None,
    checkpoint_budget_gb: float | None = None,
    dtype: str | None = None,
    held_out: int | None = None,
    max_seq_len: int | None = None,
    packing: bool | None = None,
    seed: int | None = None,
    device: str | None = None,
    save_every: int | None = None,
    keep: int | None = None,
    eval_every: int | None = None,
    export: str | None = None,
    results: str | None = None,
    show_data: int | None = None,
) -> None:
    """Fine-tune a Llama model on instructions.

    Args:
        ckpt_dir: checkpoint directory in Meta's or Hugging Face's layout; without it, the small embedded model.
        tokenizer_path: tokenizer.model; default: the one in ckpt_dir.
        data: Alpaca-format records, .json or .jsonl; default: data/alpaca_200.json, and for the embedded model records
            of the small world that it knows, data/tiny/alpaca_200.json.
        out_dir: directory of the run; must be new, unless --resume.
        resume: go on with the run in out_dir, with its own settings, from its newest whole snapshot.
        preset: course (the default: SGD, lr 1e-5, LoRA on wq and wv) or learn (AdamW, LoRA everywhere, 3 epochs).
        lora: True trains low-rank adapters over frozen weights, False all weights.
        r: rank of the adapters (16).
        alpha: the update is scaled by alpha / r (32).
        dropout: on the adapters' input (0.05).
        targets: adapted projections, of wq,wk,wv,wo,w1,w2,w3.
        optimizer: sgd or adamw.
        lr: peak learning rate.
        momentum: of sgd.
        weight_decay: of the optimizer.
        schedule: constant, linear or cosine, down to 0.
        warmup_steps: optimizer steps in which the learning rate rises.
        clip_norm: largest allowed norm of the gradient; default: no limit (course), 1 (learn).
        batch_size: rows that go through the network at once.
        accumulation: such batches in one optimizer step (8).
        epochs: passes over the data.
        max_steps: end after this many optimizer steps.
        loss_normalization: tokens weighs label tokens alike; microbatch averages the means of the batches (the course).
        amp: none, fp16 (with loss scaling) or bf16 autocast.
        lean: the same step in far less memory; without LoRA it takes sgd and --accumulation=1.
        keep_zeros: of a model pruned by magnitude, zeros stay zeros; with --lora=False.
        checkpointing: layers that are recomputed in the backward pass: none, all, every:K, or a list such as 0,4,8.
        checkpoint_budget_gb: recompute the fewest layers with which the peak stays within so many GB (1e9 bytes).
        dtype: float32, or bfloat16 or float16 for a frozen base under LoRA; what a quantized base computes in.
        held_out: records set aside, on which the loss is measured (20).
        max_seq_len: longer samples lose their end, and are counted (512).
        packing: several samples in a row, which do not see each other.
        seed: of the split, the order, the adapters and dropout.
        device: auto, cpu, cuda or cuda:N.
        save_every: steps between snapshots (10).
        keep: snapshots kept (2).
        eval_every: steps between looks at held-out loss and answers; default: a quarter of the run.
        export: merged model at the end, in the layout meta, hf, both or none; default: meta, and none over a quantized
            base, which no adapter can be merged into.
        results: append what came of it to this file, as a row of the tables; default: no.
        show_data: print so many samples with the trained tokens in brackets, and end.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    root = Path(given.pop("out_dir"))
    if given.pop("resume"):
        if "show_data" in given:
            raise InputError("--show_data shows what a new run would train on; leave out --resume")
        options = saved_options(root, given)
        train(options, root, resume=True)
        return
    n_shown = given.pop("show_data", None)
    options = resolve(given)
    if n_shown is not None:
        print_samples(options, n_shown)
        return
    require_free(root)
    train(options, root, resume=False)


def require_free(root: Path) -> None:
    """Raise InputError where a new run would stand in the way of what is there."""
    if root.exists() and not root.is_dir():
        raise InputError(f"--out_dir={root} is not a directory")
    left = {entry.name for entry in root.iterdir()} if root.exists() else set()
    # A run that was killed before its first snapshot has nothing to lose and nothing to resume from.
    if left - {".lock", "settings.json", "loss.jsonl", "snapshots"} or snapshot.listed(root / "snapshots"):
        raise InputError(f"--out_dir={root} holds something already; --resume goes on with a run, or choose another")


def resolve(given: dict[str, Any]) -> Options:
    """Flags over preset over defaults. Raises InputError for an impossible value."""
    name = given.get("preset", "course")
    if name not in PRESETS:
        raise InputError(f"--preset={name}: expected one of {', '.join(PRESETS)}")
    defaults = {
        "preset": "course",
        "ckpt_dir": None,
        "tokenizer_path": None,
        "data": str((EMBEDDED if given.get("ckpt_dir") is None else ROOT / "data") / "alpaca_200.json"),
        "held_out": 20,
        "max_seq_len": 512,
        "packing": False,
        "max_steps": None,
        "loss_normalization": "tokens",
        "amp": "none",
        "lean": False,
        "keep_zeros": False,
        "checkpointing": "none",
        "checkpoint_budget_gb": None,
        "dtype": "float32",
        "seed": 1,
        "device": "auto",
        "save_every": 10,
        "keep": 2,
        "eval_every": None,
        "export": "meta",
        "results": None,
    }
    if "ckpt_dir" in given and "export" not in given and checkpoint.read_quantization(given["ckpt_dir"]) is not None:
        defaults["export"] = "none"
    options = Options(**{**defaults, **PRESETS[name], **given})
    _ = options.settings, options.lora_config  # wrong values end it here, not after loading
    return options


def saved_options(root: Path, given: dict[str, Any]) -> Options:
    """The settings of the run in `root`. Raises InputError naming each flag that would change the training."""
    if not (root / "settings.json").is_file():
        raise InputError(f"--out_dir={root} holds no run to resume; leave out --resume to start one")
    saved = files.read_json(root / "settings.json").get("options")
    if not isinstance(saved, dict):
        raise InputError(f"{root / 'settings.json'}:options: is missing; the run cannot be resumed")
    changed = [name for name, value in given.items() if name not in MAY_CHANGE and saved.get(name) != value]
    if changed:
        differences = ", ".join(f"--{name}={given[name]} (was {saved.get(name)})" for name in changed)
        raise InputError(f"{root} was started with other settings: {differences}; leave them out or start a new run")
    try:
        return Options(**{**saved, **given})
    except TypeError as error:
        raise InputError(f"{root / 'settings.json'}:options: is not of this version ({error})") from error


def print_samples(options: Options, n_shown: int) -> None:
    """Print the first samples as the model will see them."""
    tokenizer = load_tokenizer(options)
    records = alpaca.read(options.data)
    samples, cut, left_out = alpaca.encode(tokenizer, records[: max(0, n_shown)], options.max_seq_len)
    for sample in samples:
        print("\n".join(alpaca.show(sample, tokenizer)), end="\n\n")
    print(f"{len(samples)} of {len(records)} records of {options.data}{about_lengths(cut, left_out)}")


def about_lengths(cut: list[str], left_out: list[str]) -> str:
    """What did not fit into max_seq_len, by name."""
    parts = []
    for names, what in ((cut, "cut at --max_seq_len"), (left_out, "left out, without an answer or room for one")):
        if names:
            parts.append(f"; {len(names)} {what} ({', '.join(names[:5])}{', ...' if names[5:] else ''})")
    return "".join(parts)


def directory_of(options: Options) -> Path:
    return Path(options.ckpt_dir) if options.ckpt_dir is not None else EMBEDDED


def tokenizer_file(options: Options) -> Path:
    return Path(options.tokenizer_path) if options.tokenizer_path is not None else find_tokenizer(directory_of(options))


def load_tokenizer(options: Options) -> Tokenizer:
    return Tokenizer(tokenizer_file(options))


def require_adapters_alone(options: Options) -> None:
    """Raise InputError for what the codes of a quantized base do not allow."""
    if not options.lora:
        raise InputError(
            f"--lora=False: {options.ckpt_dir} is quantized, and codes cannot be trained; use LoRA, or the original"
        )
    if options.export != "none":
        raise InputError(
            f"--export={options.export}: an adapter cannot be merged into the quantized weights of {options.ckpt_dir}; "
            "use --export=none, the adapter is kept"
        )


class StopSignal:
    """Remembers the first SIGINT or SIGTERM; the next one has its usual effect."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __call__(self) -> bool:
        return self.received is not None

    def _receive(self, number: int, _: Any) -> None:
        self.received = number
        for caught in self._usual:
            signal.signal(caught, self._usual[caught])

    @contextmanager
    def caught(self) -> Iterator[StopSignal]:
        """Watch for the signals inside the block."""
        self._usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in self._usual:
            signal.signal(number, self._receive)
        try:
            yield self
        finally:
            for number, handler in self._usual.items():
                signal.signal(number, handler)


class Log:
    """loss.jsonl: one line a step. Holds no times, so that a resumed run writes the bytes of an uninterrupted one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, n_bytes: int = 0) -> None:
        """Go on after the first `n_bytes`; what a later, lost part of the run wrote is cut off."""
        present = self.path.stat().st_size if self.path.exists() else 0
        if present < n_bytes:
            raise InputError(f"{self.path} has {present} bytes, the snapshot was taken at {n_bytes}; restore the file")
        with self.path.open("ab") as file:
            file.truncate(n_bytes)

    def append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def commit(self) -> int:
        """Bring everything to the disk; return the size in bytes."""
        files.sync(self.path)
        return self.path.stat().st_size

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]


def train(options: Options, root: Path, resume: bool) -> None:
    """A whole run: from the start or from its newest snapshot to the exported model."""
    if options.results is not None:
        row_files.require_writable(Path(options.results))
    run = Run(options, root)  # before anything is written: what cannot be trained leaves no directory
    with snapshot.lock(root), StopSignal().caught() as stop:
        run.restore() if resume else run.begin()
        run.loop(stop)
        run.finish()


class Run:
    """A training with its data, and the directory that holds it."""

    def __init__(self, options: Options, root: Path) -> None:
        self.options, self.root = options, root
        self.device, dtype = devices.resolve(options.device, options.dtype)
        if options.amp == "bf16" and not devices.computes_bf16(self.device):
            raise InputError("--amp=bf16: this GPU has no bfloat16 arithmetic; use fp16")
        self.tokenizer = load_tokenizer(options)
        self.quantized = checkpoint.read_quantization(directory_of(options))
        if self.quantized is not None:
            require_adapters_alone(options)
        self._prepare_data()
        self.layers = self._plan_memory(dtype)
        devices.return_freed_memory()
        self.baseline = stopwatch.memory_baseline(self.device)
        self.model = checkpoint.load(directory_of(options), dtype, self.device, progress=True)
        self.base = checkpoint.fingerprint(directory_of(options))
        if options.lora:
            lora.apply(self.model, options.lora_config, options.seed)
        else:
            self.model.requires_grad_(True)
        if options.keep_zeros:
            pruning.keep_zeros(self.model)
        checkpoint_layers(self.model, self.layers)
        size = options.batch_size * options.accumulation
        self.per_epoch = order.steps_per_epoch(len(self.rows), size)
        self.total = min(self.per_epoch * options.epochs, options.max_steps or math.inf)
        self.eval_every = options.eval_every or max(1, self.total // 4)
        self.trainer = Trainer(self.model, options.settings, self.total)
        self.llama = Llama(self.model, self.tokenizer, max_seq_len=options.max_seq_len + ANSWER_LEN, decoding="eager")
        self.log = Log(root / "loss.jsonl")
        self.step_seconds: list[float] = []
        self.tokens = 0
        self.peak_bytes = 0  # of the steps alone, over what the process took before it loaded the model
        print(self.describe())

    def _prepare_data(self) -> None:
        """Records to samples; a seeded choice of them is held out."""
        options = self.options
        records = alpaca.read(options.data)
        self.data_sha256 = files.sha256(Path(options.data))
        samples, self.cut, self.left_out = alpaca.encode(self.tokenizer, records, options.max_seq_len)
        if len(samples) <= options.held_out:
            raise InputError(
                f"--data={options.data}: {len(samples)} records have an answer within --max_seq_len="
                f"{options.max_seq_len}; --held_out={options.held_out} leaves none of them to train on"
            )
        held_out = set(order.epoch_order(len(samples), options.seed, 0)[: options.held_out])
        self.held_out = [batches.collate([[samples[i]]], self.tokenizer.pad_id) for i in sorted(held_out)]
        tested = [samples[i] for i in sorted(held_out)][:MAX_ASKED]
        self.references = [self.tokenizer.decode(sample.tokens[sample.n_prompt : -1]).strip() for sample in tested]
        self.asked = [alpaca.encode_prompt(self.tokenizer, instruction) for instruction in INSTRUCTIONS]
        self.asked += [list(sample.tokens[: sample.n_prompt]) for sample in tested]
        kept = [sample for i, sample in enumerate(samples) if i not in held_out]
        self.rows = batches.pack(kept, options.max_seq_len) if options.packing else [[sample] for sample in kept]
        self.n_trained_on = len(kept)

    def _plan_memory(self, dtype: torch.dtype) -> list[int]:
        """The layers to recompute; also foresees the peak of a step on the longest samples."""
        options = self.options
        tokens = [sum(len(sample.tokens) for sample in row) for row in self.rows]
        labels = [sum(len(sample.tokens) - sample.n_prompt for sample in row) for row in self.rows]
        shape = memory.Shape(
            options.batch_size, max(tokens), options.batch_size * max(labels), min(2, options.accumulation)
        )
        args = checkpoint.read_args(directory_of(options))
        self.tokenizer.check_vocabulary(args.vocab_size)
        training = args, dtype, options.lora_config if options.lora else None, options.settings, shape
        layers = checkpointed_layers(options.checkpointing, args.n_layers)
        if options.checkpoint_budget_gb is not None:
            layers = memory.plan(memory.profile(*training, self.quantized), options.checkpoint_budget_gb * 1e9)
        self.expected = memory.estimate(*training, tuple(layers), self.quantized)
        return layers

    def describe(self) -> str:
        """The settings in a few lines."""
        options, s = self.options, self.options.settings
        n_trained, n_all = lora.trainable_share(self.model)
        name = "embedded model" if options.ckpt_dir is None else options.ckpt_dir
        name += f", int{self.quantized.bits}" if self.quantized is not None else ""
        method = f"LoRA r={options.r}, alpha={options.alpha:g}, dropout={options.dropout:g} on {options.targets}"
        rows = f"{len(self.rows)} rows" if options.packing else f"{self.n_trained_on} records"
        held = ", ".join(f"{name} {size / devices.MB:,.0f}" for name, size in self.expected.at_peak.items() if size)
        return "\n".join(
            (
                f"model      {name}, {options.dtype} on {devices.device_name(self.device)}, seed {options.seed}",
                f"training   {method if options.lora else 'all weights'}, amp {s.amp}, "
                f"{len(self.layers)} of {self.model.args.n_layers} layers checkpointed{', lean' if s.lean else ''}",
                f"trainable  {n_trained:,} of {n_all:,} parameters ({n_trained / n_all:.4%})",
                f"optimizer  {s.optimizer}, lr {s.lr:g} {s.schedule}, warm-up {s.warmup_steps}, "
                f"loss averaged over {s.loss_normalization}",
                f"memory     {self.expected.peak / devices.MB:,.0f} MB expected at the peak of a step: {held}",
                f"data       {rows}, {len(self.held_out)} held out{about_lengths(self.cut, self.left_out)}",
                f"steps      {self.total} of {options.accumulation} x {options.batch_size} rows; "
                f"an epoch has {self.per_epoch}; kept in {self.root}",
            )
        )

    # The state on the disk

    def check_disk(self) -> None:
        """Raise EnvironmentFailure where snapshots and exports would not fit."""
        copies = {"sgd": 2 if self.options.momentum else 1, "adamw": 3}[self.options.optimizer]
        trained = sum(weight.nbytes for weight in self.trainer.weights.values())
        exports = {"none": 0, "both": 2}.get(self.options.export, 1)
        whole = sum(weight.nbytes for weight in self.model.parameters())
        needed = trained * (copies * (self.options.keep + 1) + 1) + exports * whole
        free = shutil.disk_usage(self.root).free
        if free < needed:
            gigabytes = f"{needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            raise EnvironmentFailure(
                f"{self.root}: the run needs {gigabytes}; choose another --out_dir or --export=none"
            )

    def begin(self) -> None:
        """Start anew: what the untrained model does, and a first snapshot, so that a full disk shows at once."""
        self.check_disk()
        shutil.rmtree(self.root / "snapshots", ignore_errors=True)
        self.run_id = secrets.token_hex(8)
        identity = {"data_sha256": self.data_sha256, "base_sha256": self.base}
        about = {"run_id": self.run_id, "options": dataclasses.asdict(self.options), **identity}
        files.replace_json(self.root / "settings.json", about)
        self.log.start()
        torch.manual_seed(self.options.seed)
        self.movement = Movement(self.trainer.weights)
        self.before = self.evaluate()
        self.answers_before = self.answers(self.asked)
        self.save()

    def restore(self) -> None:
        """Go on from the newest whole snapshot of this run."""
        about = files.read_json(self.root / "settings.json")
        self.run_id = about.get("run_id")
        for name, now, flag in (("data_sha256", self.data_sha256, "data"), ("base_sha256", self.base, "ckpt_dir")):
            if about.get(name) != now:
                was = str(about.get(name))[:12]
                raise InputError(f"--{flag} is not what the run was started with (sha256 {was}, now {now[:12]})")
        path, saved, passed_over = snapshot.latest(self.root / "snapshots", self.run_id)
        for line in passed_over:
            print(f"passed over: {line}")
        start = saved.tensors.pop("start", None)
        missing = {"before", "answers_before", "log_bytes"} - saved.state.keys()
        if start is None or missing:
            raise InputError(f"{path}: has no {', '.join(sorted(missing)) or 'start'}; it is not of this version")
        self.trainer.restore(saved)
        self.movement = Movement(self.trainer.weights)
        self.movement.start = {name: tensor.to(self.device) for name, tensor in start.items()}
        self.before = Evaluation(**saved.state["before"])
        self.answers_before = saved.state["answers_before"]
        self.log.start(saved.state["log_bytes"])
        print(f"resumed    after step {self.trainer.progress.windows}")

    def save(self) -> None:
        """Keep everything that resuming needs."""
        content = self.trainer.snapshot()
        content.tensors["start"] = self.movement.start
        content.state |= {
            "log_bytes": self.log.commit(),
            "before": dataclasses.asdict(self.before),
            "answers_before": self.answers_before,
        }
        snapshot.save(self.root / "snapshots", self.trainer.progress.windows, content, self.run_id, self.options.keep)

    # Training

    def loop(self, stop: StopSignal) -> None:
        """All windows that are left. Raises Stopped, after saving, where a signal came."""
        trainer, options = self.trainer, self.options
        with tqdm(total=self.total, initial=trainer.progress.windows, unit="step", desc="training") as bar:
            while trainer.progress.windows < self.total:
                number = trainer.progress.windows
                sizes = (options.batch_size, options.accumulation, options.seed)
                window = batches.window(self.rows, number, *sizes, self.tokenizer.pad_id)
                devices.reset_peak_memory(self.device)
                began = time.perf_counter()
                report = trainer.step(window, stop)
                if report is None:
                    break
                self.step_seconds.append(time.perf_counter() - began)
                self.peak_bytes = max(self.peak_bytes, devices.peak_memory_bytes(self.device) - self.baseline)
                self.tokens += report.tokens
                self.log.append(self._row(report, [name for batch in window for name in batch.names]))
                self._check_movement(report)
                bar.update()
                bar.set_postfix_str(self._status(report))
                if (number + 1) % self.eval_every == 0 and number + 1 < self.total:
                    self.look(bar)
                if (number + 1) % options.save_every == 0 or number + 1 == self.total:
                    self.save()
                if stop():
                    break
        if stop() and trainer.progress.windows < self.total:
            self.save()
            name = signal.Signals(stop.received).name
            done = f"after step {trainer.progress.windows} of {self.total}"
            raise Stopped(f"stopped by {name} {done}, saved in {self.root}; --resume goes on", stop.received)

    def _row(self, report: Report, names: list[str]) -> dict[str, Any]:
        progress = self.trainer.progress
        return {
            "step": progress.windows,
            "epoch": (progress.windows - 1) // self.per_epoch,
            "loss": report.loss,
            "lr": report.lr,
            "grad_norm": report.grad_norm if math.isfinite(report.grad_norm or 0) else None,
            "label_tokens": report.label_tokens,
            "skipped": report.skipped,
            "samples": names,
        }

    def _status(self, report: Report) -> str:
        peak = self.peak_bytes / devices.MB
        skipped = f", {self.trainer.progress.skipped} skipped" if self.trainer.progress.skipped else ""
        rate = self.tokens / sum(self.step_seconds)
        return f"loss {report.loss:.3f}, lr {report.lr:.2g}, {rate:,.0f} tokens/s, peak {peak:,.0f} MB{skipped}"

    def _check_movement(self, report: Report) -> None:
        first = self.trainer.progress.steps == 1 and not report.skipped
        if first and report.lr > 0 and report.grad_norm != 0 and self.movement.share() == 0:
            raise NonFinite(f"--lr={report.lr:g}: no weight moved in the first step; updates are below its resolution")

    def look(self, bar: tqdm) -> None:
        """Held-out loss and answers on the way."""
        step = self.trainer.progress.windows
        answers = self.answers(self.asked[: len(INSTRUCTIONS)])
        if self.held_out:
            loss = self.evaluate().loss
            self.log.append({"step": step, "held_out_loss": loss})
            bar.write(f"step {step}: held-out loss {loss:.4f}")
        for instruction, answer in zip(INSTRUCTIONS, answers, strict=True):
            bar.write(f"step {step}: {instruction} -> {' '.join(answer['text'].split())}")

    def evaluate(self) -> Evaluation:
        return evaluate(self.trainer, self.held_out)

    def answers(self, prompts: list[list[int]]) -> list[dict[str, Any]]:
        """What the model answers now, greedily; `ended`: by itself, within ANSWER_LEN tokens."""
        self.model.eval()
        ids, _ = self.llama.generate(prompts, ANSWER_LEN, temperature=0, seed=0)
        return [{"text": self.tokenizer.decode(row).strip(), "ended": len(row) < ANSWER_LEN} for row in ids]

    # The end

    def finish(self) -> None:
        """Compare before and after, say whether it learned, and write what the run was for."""
        after, answers = self.evaluate(), self.answers(self.asked)
        self.show_answers(answers)
        lines = verdict(self.options, self.model.args.vocab_size, self.before, after, self.movement.share())
        if self.trainer.progress.skipped:
            lines.append(f"{self.trainer.progress.skipped} of {self.total} steps overflowed in fp16 and were skipped.")
        if self.step_seconds:  # there is nothing to measure in a run that was resumed after its last step
            peak, expected = self.peak_bytes / devices.MB, self.expected.peak / devices.MB
            lines.append(f"Peak memory of a step {peak:,.0f} MB; {expected:,.0f} MB were expected.")
        lines += self.export()
        if self.step_seconds or not (self.root / "summary.json").exists():
            self.write_summary(after, answers)
        print("\n".join(lines))

    def show_answers(self, answers: list[dict[str, Any]]) -> None:
        """Before and after, side by side."""
        for instruction, before, after in zip(INSTRUCTIONS, self.answers_before, answers, strict=False):
            print(f"\n> {instruction}\n\n{cli.side_by_side('before', 'after')}\n{'-' * (2 * cli.COLUMN + 3)}")
            print(cli.side_by_side(before["text"], after["text"]))
        ended = [sum(answer["ended"] for answer in found) for found in (self.answers_before, answers)]
        kinds = f"{len(INSTRUCTIONS)} to the questions above, {len(answers) - len(INSTRUCTIONS)} held out"
        print(f"\n{ended[0]} of {len(answers)} answers ({kinds}) ended by themselves before, {ended[1]} after.")
        if self.references:
            right = [self.count_right(found) for found in (self.answers_before, answers)]
            print(f"{right[0]} of {len(self.references)} held-out answers were the reference before, {right[1]} after.")

    def count_right(self, answers: list[dict[str, Any]]) -> int:
        """Held-out records whose answer is the reference, word for word."""
        pairs = zip(answers[len(INSTRUCTIONS) :], self.references, strict=True)
        return sum(answer["ended"] and answer["text"] == reference for answer, reference in pairs)

    def export(self) -> list[str]:
        """Write adapter and merged model, where they are not there yet; say where."""
        lines = []
        if self.options.lora:
            lines += self._keep(
                "adapter", lambda path: lora.save(self.model, self.options.lora_config, path, self.base)
            )
        layouts = {"meta": ("merged",), "hf": ("merged-hf",), "both": ("merged", "merged-hf"), "none": ()}
        if self.options.lora and self.options.export != "none":
            lost = lora.merge(self.model)
            lora.remove(self.model)
            if lost > 0.01:
                lines.append(
                    f"Merging in {self.options.dtype} lost {lost:.0%} of the update to rounding; keep the adapter."
                )
        if self.options.keep_zeros:
            zeros, n_all = pruning.count_zeros(self.model)
            lines.append(f"{zeros:,} of {n_all:,} weights of the projections are zero, as before.")
            pruning.remove_masks(self.model)
        for name in layouts[self.options.export]:
            lines += self._keep(name, lambda path, hf=name == "merged-hf": self._save_merged(path, hf))
        return lines

    def _keep(self, name: str, write: Any) -> list[str]:
        path = self.root / name
        if not path.exists():  # a run that was resumed after its end has it
            write(path)
        return [f"{name:<10} {path}"]

    def _save_merged(self, path: Path, hf: bool) -> None:
        checkpoint.save(self.model, path, "hf" if hf else "meta", tokenizer_file(self.options))

    def write_summary(self, after: Evaluation, answers: list[dict[str, Any]]) -> None:
        """summary.json and loss.png."""
        summary = {
            "steps": self.trainer.progress.steps,
            "skipped": self.trainer.progress.skipped,
            "label_tokens": self.trainer.progress.label_tokens,
            "moved_share": self.movement.share(),
            "tokens_per_s": self.tokens / sum(self.step_seconds) if self.step_seconds else None,
            "peak_memory_mb": self.peak_bytes / devices.MB if self.step_seconds else None,
            "expected_peak_memory_mb": self.expected.peak / devices.MB,
            "answers": [
                {"instruction": instruction, "before": before["text"], "after": now["text"]}
                for instruction, before, now in zip(INSTRUCTIONS, self.answers_before, answers, strict=False)
            ],
        }
        if self.held_out:
            summary |= {"held_out_loss_before": self.before.loss, "held_out_loss": after.loss}
            summary["held_out_fall_95"] = confidence(self.before, after)
            summary |= {"held_out_right_before": self.count_right(self.answers_before)}
            summary |= {"held_out_right": self.count_right(answers), "held_out_asked": len(self.references)}
        files.replace_json(self.root / "summary.json", summary)
        rows = self.log.rows()
        points = [(0, self.before.loss)] if self.held_out else []
        points += [(row["step"], row["held_out_loss"]) for row in rows if "held_out_loss" in row]
        points += [(self.total, after.loss)] if self.held_out else []
        if self.options.results is not None and self.step_seconds:
            losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
            self.append_row(summary, {"loss_nats": losses, "held_out_loss_nats": points})
        plot(rows, points, self.root / "loss.png")

    def append_row(self, summary: dict[str, Any], curves: dict[str, list]) -> None:
        """Keep the figures of this run as a row, with the curves of its losses as points (step, loss)."""
        names = ("held_out_loss_before", "held_out_loss", "held_out_right_before", "held_out_right", "held_out_asked")
        values = {f"{name}_nats" if "loss" in name else name: summary[name] for name in names if name in summary}
        values |= {"moved_share_x": summary["moved_share"], "peak_memory_mb": summary["peak_memory_mb"]}
        metrics = {name: row_files.spread([value]) for name, value in values.items()}
        metrics["step_s"] = row_files.spread(self.step_seconds)
        model = "tiny" if self.options.ckpt_dir is None else Path(self.options.ckpt_dir).name
        cell = {"model": model, **{name: getattr(self.options, name) for name in ROW}}
        cell["kernels"] = train_ops.in_use(self.options.lean, self.device)
        options, path = self.options, Path(self.options.results)
        series = {**curves, "answers": [[a["instruction"], a["before"], a["after"]] for a in summary["answers"]]}
        row_files.append_row(path, "finetuning", cell, metrics, self.device, options.dtype, options.seed, series)


def table(rows: list[dict[str, Any]]) -> str:
    """Measured runs, in Markdown."""
    lines = ["| preset | held-out loss before | after | right word for word before | after | steps | a step |"]
    lines.append("|" + "---|" * 7)
    for row in rows:
        m = row_files.medians(row)
        right = [f"{m[name]:.0f} of {m['held_out_asked']:.0f}" for name in ("held_out_right_before", "held_out_right")]
        loss = [f"{m[name]:.3f}" for name in ("held_out_loss_before_nats", "held_out_loss_nats")]
        steps = f"{row['metrics']['step_s']['n']} | {m['step_s']:.2f} s"
        lines.append(f"| {row['cell']['preset']} | {loss[0]} | {loss[1]} | {right[0]} | {right[1]} | {steps} |")
    return "\n".join([*lines, "", f"{row_files.setting(rows[0])}.", ""])


def verdict(options: Options, vocab_size: int, before: Evaluation, after: Evaluation, moved: float) -> list[str]:
    """Whether it learned, in plain words."""
    lines = [f"{moved:.1%} of the trained values (sampled) are no longer what they were."]
    if not before.counts:
        return [*lines, "No records were held out (--held_out), so nothing can be said about learning."]
    uniform = math.log(vocab_size)
    if before.loss > uniform:
        lines.append(
            f"ALARM: the loss started at {before.loss:.2f}, above ln(vocabulary) = {uniform:.2f}: worse than guessing. "
            "The weights do not fit the tokenizer, or the labels are wrong."
        )
    # Random weights may start that way; what matters is what training has made better.
    if after.copy_loss < after.loss and before.copy_loss - after.copy_loss > before.loss - after.loss + 0.1:
        lines.append(
            f"ALARM: the model is better at repeating the token that it was given (loss {after.copy_loss:.2f}) than at "
            f"the next one ({after.loss:.2f}): it was trained on labels that are not shifted."
        )
    level, fall = confidence(after), confidence(before, after)
    change = before.loss - after.loss
    lines.append(
        f"Held-out loss {before.loss:.4f} before, {after.loss:.4f} after [95 %: {level[0]:.4f} to {level[1]:.4f}]; "
        f"it fell by {change:.4f} [{fall[0]:.4f} to {fall[1]:.4f}]."
    )
    if fall[0] > 0 and change >= 0.01:
        lines.append("It learned.")
    elif fall[1] < 0 and change <= -0.01:
        lines.append("It got worse: lower --lr, or train on more records.")
    else:
        lines.append("It learned nothing that shows.")
        if options.optimizer == "sgd" and options.lora:
            lines.append(
                f"SGD at lr {options.lr:g} hardly moves LoRA: its B starts at zero, and the gradient of A with it. "
                "--preset=learn has settings that do."
            )
    return lines


def plot(rows: list[dict[str, Any]], held_out: list[tuple[int, float]], path: Path) -> None:
    """The loss curve."""
    from matplotlib.figure import Figure  # draws without a screen, and only here

    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axis = figure.subplots()
    steps = [row for row in rows if "loss" in row]
    axis.plot([row["step"] for row in steps], [row["loss"] for row in steps], color="#1b6ca8", label="training")
    if held_out:
        axis.plot(*zip(*held_out, strict=True), "o--", color="#c1440e", label="held out")
    axis.set(xlabel="optimizer step", ylabel="loss (nats per label token)")
    axis.grid(alpha=0.3)
    axis.legend()
    scratch = path.with_name(f".{path.name}")
    figure.savefig(scratch, dpi=150, format="png")
    os.replace(scratch, path)


if __name__ == "__main__":
    cli.run(main)
