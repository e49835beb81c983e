"""Tables 2 and 3: memory and time of a fine-tuning step, for every combination of techniques, and where memory goes.

    python benchmark_finetuning.py                      # Table 3: Llama 3.2 1B, random weights, 512 tokens
    python benchmark_finetuning.py --model=tiny --seq_len=128                # the same with the embedded model's shape
    python benchmark_finetuning.py --cells=course,lean,half --against=peers  # lean mode, and peft and transformers
    python benchmark_finetuning.py --cells=table2       # what each technique does to each kind of memory
    python benchmark_finetuning.py --estimate           # what would be needed, without weights, GPU or measuring
    python benchmark_finetuning.py --estimate --world_size=8 --model=llama3.1-8b     # the same of each of 8 processes
    python benchmark_finetuning.py --estimate --model=all --optimizer=adamw          # how many cards a step takes

A timed step is forward, backward and the optimizer's step on one batch of random tokens, each with a label. Loading and
warming up are not counted, and nothing that looks into memory is on while a step is timed: the categories come from a
step of their own. Cells run as benchmarks/workers.py says, those that fit into memory together in turns.

A step multiplies each weight with hundreds of tokens, three times: forward, for the gradient of the activations, and
for that of the weights (which LoRA leaves out). So arithmetic is its limit: the FLOPs of its matrix products,
recomputed ones included, over the best rate of the network's own largest products in the same round.

mixed precision: autocast in bf16, in fp16 with loss scaling on GPUs without bf16. half: LoRA over a frozen base in 16
bits. lean: see llama/training/lean.py.
"""

from __future__ import annotations

import early  # noqa: F401 (first of all: a start that fails ends in one line)

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import hardware, rows, stopwatch, workers
from benchmarks.options import MODEL, TableOptions, finish
from llama import checkpoint, cli, lora
from llama import device as devices
from llama.cli import option
from llama.config import PRESETS, ModelArgs
from llama.errors import EnvironmentFailure, InputError, InternalError
from llama.kernels.cpu import train_ops
from llama.lora import LoRAConfig
from llama.model import Transformer
from llama.training import memory, planning
from llama.training.batch import Batch
from llama.training.step import Settings, Trainer, checkpoint_layers
from reports import render, tables

ADAPTERS = LoRAConfig()  # the course's: r 16, alpha 32, dropout 0.05, wq and wv
P100_GB = 16.0
TECHNIQUES = ("checkpointing", "amp", "lora")
PLANNED = ("llama3.2-1b", "llama3.1-8b", "llama3.1-70b")  # by --model=all, on cards of CARDS_GB
CARDS_GB = (16.0, 24.0, 80.0)
MOST_CARDS = 64
MAX_TOKENS = 131_072  # positions that Llama 3.2 was trained for


@dataclass(frozen=True)
class StepCell:
    """One kind of step. half: the frozen base has 16 bits; engine: who takes the step."""

    checkpointing: bool = False
    amp: bool = False
    lora: bool = False
    lean: bool = False
    half: bool = False
    batch_size: int = 1
    accumulation: int = 1
    engine: str = "llama"

    def __str__(self) -> str:
        names = [name for name in ("lean", "half", *TECHNIQUES) if getattr(self, name)]
        size = f"{self.accumulation} x {self.batch_size}" if self.accumulation * self.batch_size > 1 else ""
        return ", ".join(part for part in (self.engine, size, " + ".join(names) or "plain") if part)


COURSE = [StepCell(*choice) for choice in itertools.product((False, True), repeat=3)]
ONE_TECHNIQUE = [StepCell(), *(StepCell(**{name: True}) for name in TECHNIQUES)]
SETS = {
    "course": COURSE,
    "lean": [replace(cell, lean=True) for cell in COURSE],
    "half": [StepCell(checkpointing=c, lora=True, half=True, lean=m) for c in (False, True) for m in (False, True)],
    "large": [StepCell(checkpointing=True, amp=True), StepCell(checkpointing=True, lora=True, half=True)],
    # Each technique alone, with one batch per step and with two; and two sequences at once, which accumulation avoids.
    "table2": [*ONE_TECHNIQUE, *(replace(cell, accumulation=2) for cell in ONE_TECHNIQUE), StepCell(batch_size=2)],
}
PEERS = [StepCell(engine="transformers", amp=True), StepCell(engine="peft", lora=True, half=True)]


@dataclass(frozen=True)
class Options(TableOptions):
    """Measure Tables 2 and 3: memory and time of a fine-tuning step."""

    model: str = option("llama3.2-1b", f"{MODEL}; all, with estimate: {', '.join(PLANNED)}", choices=[*PRESETS, "all"])
    cells: str = option(
        "course",
        "of course (Table 3), lean (the same in lean mode), half (16-bit base under LoRA), table2, and large (mixed "
        "precision, and LoRA over a 16-bit base; the default with world_size and model=all); with commas",
        choices=SETS,
        several=True,
    )
    seq_len: int = option(512, "tokens per sequence, all but the last with a label", least=2)
    batch_size: int = option(1, "sequences that go through the network at once", least=1)
    accumulation: int = option(1, "such batches per step", least=1)
    warm_up: int = option(1, "steps before the timed ones, beside the one in which memory is looked into", least=1)
    against: str | None = option(
        None,
        "peers, to measure transformers (full) and peft (LoRA over a 16-bit base) too (needs both)",
        choices=("peers",),
    )
    estimate: bool = option(False, "say what each cell would need, and measure nothing")
    world_size: int | None = option(None, "with estimate: so many processes share a step", least=1, below=4097)
    optimizer: str = option("sgd", "with estimate: sgd (the course's) or adamw", choices=("sgd", "adamw"))

    @classmethod
    def resolve(cls, typed: dict[str, Any]) -> Options:
        is_shared = "world_size" in typed or typed.get("model") == "all"
        return cls(**({"cells": "large"} if is_shared else {}) | typed)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, usual in (("world_size", None), ("optimizer", "sgd")):
            if getattr(self, name) != usual and not self.estimate:
                raise InputError(f"{name}={getattr(self, name)} is for estimates; add estimate=True")
        if self.model == "all" and (not self.estimate or self.world_size or self.ckpt_dir):
            raise InputError("model=all finds the least world_size by estimate=True; without world_size and ckpt_dir")
        if self.seq_len > MAX_TOKENS:
            raise InputError(f"seq_len={self.seq_len}: more positions than Llama's {MAX_TOKENS:,}")
        names = self.cells.split(",")
        if "lean" in names and self.accumulation > 1:
            raise InputError(
                f"accumulation={self.accumulation}: lean full fine-tuning has no gradients to accumulate; use 1"
            )
        if "table2" in names and (self.batch_size, self.accumulation) != (1, 1):
            raise InputError("cells=table2 sets batch_size and accumulation itself; leave them out")

    def chosen_cells(self) -> list[StepCell]:
        sizes = {"batch_size": self.batch_size, "accumulation": self.accumulation}
        names = self.cells.split(",")
        found = [cell if name == "table2" else replace(cell, **sizes) for name in names for cell in SETS[name]]
        return list(dict.fromkeys([*(PEERS if self.against else []), *found]))


Runs = tuple[StepCell, list[dict[str, Any]]]  # a cell and its measurements


def main(options: Options) -> None:
    """Measure every cell, keep its row, and show Tables 2 and 3; or what the cells would need."""
    cells = options.chosen_cells()
    if options.model == "all" or options.world_size is not None:
        plan(options, cells)
        return
    args = PRESETS[options.model] if options.ckpt_dir is None else checkpoint.read_args(options.ckpt_dir)
    if options.estimate:
        path = None if options.results is None else options.results_file("estimates")
        limit_gb = options.memory_limit_gb or P100_GB
        found = estimates(path, options.label, args, cells, options.seq_len, limit_gb, options.optimizer)
        print(render.markdown(tables.estimates(found)))
        return
    device, _ = devices.resolve(options.device, "float32")
    options.require_limit_fits(device)
    if not devices.computes_bf16(device):  # loss scaling needs the whole gradient before a weight may move
        cells = [cell for cell in cells if not (cell.lean and cell.amp and not cell.lora)]
    path = options.results_file("benchmark_finetuning")
    options = replace(options, device=str(device))
    with tempfile.TemporaryDirectory(dir=options.work_dir) as folder:
        directory = options.provide_weights(Path(folder), torch.bfloat16)
        measured = same_losses(step_runs(options, args, cells, directory))
        found = [keep(path, options, cell, runs) for cell, runs in measured]
    shown = tables.table_3(found) + tables.table_2(found) + tables.step_details(found)
    finish(path, "benchmark_finetuning", found, shown, options.figures)


def plan(options: Options, cells: Sequence[StepCell]) -> None:
    """Show how processes could share a step: the memory and traffic of each, or how many cards a step takes."""
    experiment = "cards" if options.model == "all" else "divisions"
    path = None if options.results is None else options.results_file(experiment)
    found = (card_plans if options.model == "all" else division_plans)(path, options, cells)
    print(render.markdown(tables.TABLES[experiment][0](found)))


def shared_step(args: ModelArgs, cell: StepCell, options: Options) -> planning.Step:
    """A cell as planning takes it."""
    *kind, settings, shape, layers = described(args, cell, options.seq_len, torch.bfloat16)
    settings, shape = replace(settings, optimizer=options.optimizer), replace(shape, accumulation=cell.accumulation)
    return planning.Step(*kind, settings, shape, layers)


def division_plans(path: Path | None, options: Options, cells: Sequence[StepCell]) -> list[rows.Row]:
    """A row for each way in which the processes can share a step; why not for the others, in print."""
    args = PRESETS[options.model] if options.ckpt_dir is None else checkpoint.read_args(options.ckpt_dir)
    limit_gb, found, reasons = options.memory_limit_gb or P100_GB, [], {}
    for cell in (cell for cell in cells if cell.engine == "llama"):
        for planned in planning.plans(shared_step(args, cell, options), options.world_size):
            if not isinstance(planned, planning.Plan):
                reasons[f"left out: {planned[0]}: {planned[1]}"] = True
                continue
            place = {"world_size": options.world_size, "division": str(planned.division), "limit_gb": limit_gb}
            found.append(plan_row(path, "divisions", options, options.label, cell, place, planned))
    for reason in reasons:
        print(reason)
    return found


def card_plans(path: Path | None, options: Options, cells: Sequence[StepCell]) -> list[rows.Row]:
    """For each model, cell and card the fewest cards on which a step fits; a row without metrics where none do."""
    found = []
    for model, cell, limit_gb in itertools.product(PLANNED, cells, CARDS_GB):
        planned = planning.fewest(shared_step(PRESETS[model], cell, options), limit_gb * 1e9, MOST_CARDS)
        found.append(plan_row(path, "cards", options, model, cell, {"limit_gb": limit_gb}, planned))
    return found


def plan_row(
    path: Path | None,
    experiment: str,
    options: Options,
    model: str,
    cell: StepCell,
    place: dict[str, Any],
    planned: planning.Plan | None,
) -> rows.Row:
    """The memory of one process, in the categories of its peak, and what it sends."""
    values = {}
    if planned is not None:
        division, footprint = planned.division, planned.footprint
        values = memory_values(footprint) | {"sent_mb": [planned.sent / devices.MB], "tokens": [planned.tokens]}
        values |= {"tensor": [division.tensor], "shards": [division.shards], "replicas": [division.replicas]}
    place = {"model": model, **asdict(cell), "optimizer": options.optimizer, "seq_len": options.seq_len, **place}
    dtype = devices.dtype_name(torch.bfloat16 if cell.half else torch.float32)
    return rows.record(path, experiment, place, values, torch.device("meta"), dtype)


def memory_values(footprint: memory.Footprint) -> dict[str, list[float]]:
    """Metrics of a predicted peak."""
    sizes = {"peak_memory_mb": footprint.peak} | {f"{name}_at_peak_mb": n for name, n in footprint.at_peak.items()}
    return {name: [n_bytes / devices.MB] for name, n_bytes in sizes.items()}


def settings_of(cell: StepCell, half: torch.dtype) -> Settings:
    """The course's optimizer, and the cell's techniques."""
    amp = {torch.float16: "fp16", torch.bfloat16: "bf16"}[half] if cell.amp else "none"
    return Settings(optimizer="sgd", lr=1e-5, amp=amp, lean=cell.lean)


def described(args: ModelArgs, cell: StepCell, seq_len: int, half: torch.dtype) -> tuple:
    """A cell as the arguments of memory.estimate."""
    shape = memory.Shape(cell.batch_size, seq_len, cell.batch_size * (seq_len - 1), min(2, cell.accumulation))
    layers = tuple(range(args.n_layers)) if cell.checkpointing else ()
    dtype, adapters = half if cell.half else torch.float32, ADAPTERS if cell.lora else None
    return args, dtype, adapters, settings_of(cell, half), shape, layers


def predicted(
    args: ModelArgs, cell: StepCell, seq_len: int, half: torch.dtype = torch.bfloat16, device_type: str = "cpu"
) -> memory.Footprint:
    """What a cell will need."""
    return memory.estimate(*described(args, cell, seq_len, half), device_type=device_type)


def count_flops(args: ModelArgs, cell: StepCell, seq_len: int, half: torch.dtype) -> int:
    """FLOPs of a step's products and attention, recomputed ones included; counted on tensors without content.

    Apart from the step in which memory is looked into: the counter keeps tensors alive that a step would free.
    """
    *kind, shape, layers = described(args, cell, seq_len, half)
    with memory.fake_trainer(*kind, layers) as trainer, FlopCounterMode(display=False) as counter:
        trainer.back_propagate(shape.window()[0], 1)
    return counter.get_total_flops() * cell.accumulation


def estimates(
    path: Path | None,
    label: str,
    args: ModelArgs,
    cells: Sequence[StepCell],
    seq_len: int,
    limit_gb: float,
    optimizer: str = "sgd",
) -> list[rows.Row]:
    """What our cells would need, as rows; appended to a file where there is one."""
    found = []
    for cell in (cell for cell in cells if cell.engine == "llama"):
        *kind, settings, shape, layers = described(args, cell, seq_len, torch.bfloat16)
        footprint = memory.estimate(*kind, replace(settings, optimizer=optimizer), shape, layers)
        place = {"model": label, **asdict(cell), "seq_len": seq_len, "limit_gb": limit_gb}
        place |= {} if optimizer == "sgd" else {"optimizer": optimizer}
        values = memory_values(footprint)
        dtype = devices.dtype_name(torch.bfloat16 if cell.half else torch.float32)
        found.append(rows.record(path, "estimates", place, values, torch.device("meta"), dtype))
    return found


def step_runs(options: Options, args: ModelArgs, cells: Sequence[StepCell], directory: Path) -> Iterator[Runs]:
    """Each cell with its measurements. On a CPU, cells that fit into memory together take turns."""
    groups = [[cell] for cell in cells]
    if not options.device.startswith("cuda"):
        room = 0.88 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        groups = side_by_side(cells, lambda cell: 1.1 * predicted(args, cell, options.seq_len).peak, room)
    return workers.rounds(groups, lambda cell: StepRunner(options, cell, directory), options.repeats, options.seed)


def same_losses(measured: Iterator[Runs], tolerance: float = 0.01) -> Iterator[Runs]:
    """Pass cells on whose first loss is that of the others: the same work. Raises InternalError where it is not."""
    first: dict[tuple[int, int], tuple[StepCell, float]] = {}
    for cell, runs in measured:
        if runs:
            loss = runs[0]["first_loss_nats"]
            other, expected = first.setdefault((cell.batch_size, cell.accumulation), (cell, loss))
            if not abs(loss - expected) <= tolerance * expected:
                raise InternalError(
                    f"the first loss of {cell} is {loss:.3f}, that of {other} {expected:.3f}: not the same work, so no "
                    "time would mean anything"
                )
        yield cell, runs


def side_by_side(cells: Sequence[StepCell], size: Callable[[StepCell], float], room: float) -> list[list[StepCell]]:
    """Cells in groups that need no more than `room` together; those to be compared next to each other."""
    groups: list[list[StepCell]] = []
    used = 0.0
    for cell in sorted(cells, key=lambda c: (c.lora, c.half, c.amp, c.checkpointing, c.engine == "llama", not c.lean)):
        needed = size(cell)
        if not groups or used + needed > room:
            groups.append([])
            used = 0.0
        groups[-1].append(cell)
        used += needed
    return groups


@dataclass
class StepRunner:
    """One cell in its process."""

    options: Options
    cell: StepCell
    directory: Path

    def prepare(self) -> None:
        """Load, look into memory with a step of its own, and warm up."""
        options, cell = self.options, self.cell
        self.device, _ = devices.resolve(options.device, "float32")
        self.half = devices.half_dtype(self.device)
        workers.limit_memory(self.device, options.memory_limit_gb)
        if cell.engine == "llama":
            devices.return_freed_memory()  # as finetuning.py does
        warm_training(cell, self.device, self.half)
        self.baseline = stopwatch.memory_baseline(self.device)
        self.prepared: dict[str, float] = {}
        load = self._load if cell.engine == "llama" else self._load_peer
        self.step, loading = stopwatch.measure(load, self.device)
        losses = [self.step() for _ in range(options.warm_up)]
        self.prepared |= {"load_s": loading.seconds, "first_loss_nats": losses[0]}

    def measure(self) -> dict[str, float]:
        """One step, beside its limit from rates measured right now."""
        values = dict(self.prepared)
        if self.cell.engine == "llama":
            dtype = self.half if self.cell.amp or self.cell.half else torch.float32
            rate = max(hardware.product_rate(self.trainer.model, dtype).values())
            values |= {"product_tflop_s": rate / 1e12, "floor_step_s": self.flops / rate}
        _, whole = stopwatch.measure(self.step, self.device)
        values |= {"step_s": whole.seconds} | whole.peak_over(self.baseline)
        if "floor_step_s" in values:
            values["step_over_floor_x"] = whole.seconds / values["floor_step_s"]
        return values

    def _weights_dtype(self) -> torch.dtype:
        return self.half if self.cell.half else torch.float32

    def _load(self) -> Callable[[], float]:
        options, cell = self.options, self.cell
        model = checkpoint.load(self.directory, self._weights_dtype(), self.device)
        self.trainer = make_trainer(model, cell, self.half)
        window = random_window(cell, model.args.vocab_size, options.seq_len, options.seed)
        found = memory.track_step(self.trainer, window).footprint()
        self.flops = count_flops(model.args, cell, options.seq_len, self.half)
        expected = predicted(model.args, cell, options.seq_len, self.half, self.device.type).peak
        self.prepared |= {"step_tflop": self.flops / 1e12, "expected_peak_memory_mb": expected / devices.MB}
        for name in memory.CATEGORIES:
            self.prepared[f"{name}_at_peak_mb"] = found.at_peak[name] / devices.MB
            self.prepared[f"{name}_most_mb"] = found.largest[name] / devices.MB
        return lambda: self.trainer.step(window).loss

    def _load_peer(self) -> Callable[[], float]:
        """Hugging Face's model and loss in a plain loop; with peft's adapters for LoRA."""
        try:
            import peft
            import transformers
        except ImportError as error:
            raise EnvironmentFailure(f"against=peers needs {error.name}; see requirements-dev.txt") from None
        options, cell = self.options, self.cell
        transformers.utils.logging.disable_progress_bar()
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(self.directory, dtype=self._weights_dtype()).to(self.device)
        if cell.lora:
            settings = {"r": ADAPTERS.r, "lora_alpha": ADAPTERS.alpha, "lora_dropout": ADAPTERS.dropout}
            config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings)
            model = peft.get_peft_model(model, config)
        model.train()
        optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1e-5)
        window = random_window(cell, model.config.vocab_size, options.seq_len, options.seed)
        batches = [batch.tokens.to(self.device) for batch in window]

        def step() -> float:
            total = 0.0
            for ids in batches:
                with torch.autocast(self.device.type, self.half, enabled=cell.amp):
                    loss = model(input_ids=ids, labels=ids, use_cache=False).loss / len(batches)
                loss.backward()
                total += loss.item()
            optimizer.step()
            optimizer.zero_grad()
            return total

        return step


def make_trainer(model: Transformer, cell: StepCell, half: torch.dtype) -> Trainer:
    """A trainer with the cell's techniques."""
    if cell.lora:
        lora.apply(model, ADAPTERS)
    else:
        model.requires_grad_(True)
    checkpoint_layers(model, range(model.args.n_layers) if cell.checkpointing else ())
    return Trainer(model, settings_of(cell, half), 1)


def random_window(cell: StepCell, vocab_size: int, seq_len: int, seed: int) -> list[Batch]:
    """The batches of a step, the same ids for every engine; the label of each token is the next one."""
    generator = torch.Generator().manual_seed(seed)
    window = []
    for _ in range(cell.accumulation):
        tokens = torch.randint(vocab_size, (cell.batch_size, seq_len), generator=generator)
        where = torch.arange(tokens.numel()).view_as(tokens)[:, :-1].flatten()
        window.append(Batch(tokens, None, where, tokens[:, 1:].flatten()))
    return window


def warm_training(cell: StepCell, device: torch.device, half: torch.dtype) -> None:
    """Let the libraries set up what they keep, with a model of a few kilobytes, before memory is counted."""
    dtype = half if cell.half else torch.float32
    trainer = make_trainer(Transformer(PRESETS["tiny-draft"]).to(device, dtype), cell, half)
    trainer.step(random_window(cell, PRESETS["tiny-draft"].vocab_size, 16, 0))


def keep(path: Path | None, options: Options, cell: StepCell, runs: list[dict[str, Any]]) -> rows.Row:
    """One row for a cell; without metrics where memory ran out."""
    device = torch.device(options.device)
    kernels = train_ops.in_use(cell.lean, device) if cell.engine == "llama" else "peer"
    place = {"model": options.label, **asdict(cell), "seq_len": options.seq_len}
    place |= {"memory_limit_gb": options.memory_limit_gb, "kernels": kernels}
    dtype = devices.dtype_name(devices.half_dtype(device) if cell.half else torch.float32)
    return rows.record(path, "benchmark_finetuning", place, rows.by_metric(runs), device, dtype, options.seed)


if __name__ == "__main__":
    cli.run(main)
