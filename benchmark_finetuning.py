"""Tables 2 and 3: memory and time of a fine-tuning step, for every combination of techniques, and where memory goes.

    python benchmark_finetuning.py                      # Table 3 of Llama 3.2 1B's shape, random weights, 512 tokens
    python benchmark_finetuning.py --model=tiny --seq_len=128                # the same of the embedded model's shape
    python benchmark_finetuning.py --cells=course,lean,half --against=peers  # lean mode, and peft and transformers
    python benchmark_finetuning.py --cells=table2       # what each technique does to each kind of memory
    python benchmark_finetuning.py --estimate           # what would be needed, without weights, GPU or measuring

A timed step is forward, backward and the optimizer's step on one batch of random tokens, each with a label. Loading and
warming up are not counted, and nothing that looks into memory is on while a step is timed: the categories come from a
step of their own. Cells run as in benchmark_inference.py, those that fit into memory together in turns.

mixed precision: autocast in bf16, in fp16 with loss scaling on GPUs without bf16. half: LoRA over a frozen base in 16
bits. lean: see llama/training/lean.py. "x floor" is the time over that of the step's matrix products, recomputed ones
included, at the best rate of the network's own largest products in the same round.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import hardware as floors
from benchmarks import rows as row_files
from benchmarks import stopwatch
from benchmarks.workers import Worker, limit_memory, measure_on_demand, provide_weights, rounds
from llama import checkpoint, cli, lora
from llama import device as devices
from llama.config import PRESETS, ModelArgs
from llama.errors import EnvironmentFailure, InputError
from llama.lora import LoRAConfig
from llama.model import Transformer
from llama.training import memory
from llama.training.batch import Batch
from llama.training.step import Settings, Trainer, checkpoint_layers
from reports.formats import CHANGED, KINDS, SLOWER, arrow, counts, median, most_mb, spread

ROOT = Path(__file__).parent
RESULTS = ROOT / "reports" / "results" / "benchmark_finetuning.jsonl"
FIGURES = ROOT / "reports" / "figures"
ADAPTERS = LoRAConfig()  # the course's: r 16, alpha 32, dropout 0.05, wq and wv
P100_GB = 16.0
TECHNIQUES = ("checkpointing", "amp", "lora")
TITLES = {"checkpointing": "gradient checkpointing", "amp": "mixed precision", "lora": "LoRA"}
MAX_TOKENS = 131_072  # positions that Llama 3.2 was trained for


@dataclasses.dataclass(frozen=True)
class Cell:
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


COURSE = [Cell(*choice) for choice in itertools.product((False, True), repeat=3)]
ONE_MORE = [Cell(), *(Cell(**{name: True}) for name in TECHNIQUES)]
SETS = {
    "course": COURSE,
    "lean": [dataclasses.replace(cell, lean=True) for cell in COURSE],
    "half": [Cell(checkpointing=c, lora=True, half=True, lean=lean) for c in (False, True) for lean in (False, True)],
    # Each technique alone, with one batch in a step and with two; and two rows at once, for what accumulation saves.
    "table2": [*ONE_MORE, *(dataclasses.replace(cell, accumulation=2) for cell in ONE_MORE), Cell(batch_size=2)],
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What all cells of one run share."""

    ckpt_dir: str
    seq_len: int
    device: str
    warm_up: int
    memory_limit_gb: float | None
    seed: int


def main(
    *,
    model: str = "llama3.2-1b",
    ckpt_dir: str | None = None,
    cells: str = "course",
    seq_len: int = 512,
    batch_size: int = 1,
    accumulation: int = 1,
    repeats: int = 5,
    warm_up: int = 1,
    device: str = "auto",
    against: str | None = None,
    memory_limit_gb: float | None = None,
    estimate: bool = False,
    seed: int = 1,
    results: str | None = None,
    figure: str | None = None,
    work_dir: str | None = None,
    worker: str | None = None,
) -> None:
    """Measure Tables 2 and 3: memory and time of a fine-tuning step.

    Args:
        model: a preset, with random weights: llama3.2-1b, llama3.2-3b, llama3.1-8b, llama2-7b, tiny or tiny-draft.
        ckpt_dir: a checkpoint directory instead of random weights.
        cells: of course (Table 3), lean (the same with --lean), half (16-bit base under LoRA) and table2; with commas.
        seq_len: tokens of each row, all but the last with a label.
        batch_size: rows that go through the network at once.
        accumulation: such batches in one step.
        repeats: timed steps of each cell.
        warm_up: steps before them, not counted, beside the one in which memory is looked into.
        device: auto, cpu, cuda or cuda:N.
        against: peers, to measure transformers (full) and peft (LoRA over a 16-bit base) too (needs both).
        memory_limit_gb: hold a larger GPU to this much memory; a P100 has 16.
        estimate: print what each cell would need, and measure nothing.
        seed: of weights, tokens and the order of the cells.
        results: file that the measured rows are appended to; default: reports/results/benchmark_finetuning.jsonl.
        figure: file of the plot; default: one in reports/figures, named after model and device.
        work_dir: where the random checkpoint is written for the while; default: the system's temporary folder.
        worker: (internal) measure one cell, given as JSON, on demand.
    """
    if worker is not None:
        orders = json.loads(worker)
        measure_on_demand(StepRunner(Plan(**orders["plan"]), Cell(**orders["cell"])))
        return
    wanted = check_flags(model, cells, seq_len, batch_size, accumulation, repeats, warm_up, against)
    args = PRESETS[model] if ckpt_dir is None else checkpoint.read_args(ckpt_dir)
    if estimate:
        print(estimates(args, wanted, seq_len, memory_limit_gb or P100_GB))
        return
    resolved, _ = devices.resolve(device, "float32")
    if narrow_dtype(resolved) is torch.float16:  # loss scaling needs the whole gradient before a weight may move
        wanted = [cell for cell in wanted if not (cell.lean and cell.amp and not cell.lora)]
    if memory_limit_gb is not None and (resolved.type != "cuda" or memory_limit_gb <= 0):
        raise InputError(f"--memory_limit_gb={memory_limit_gb}: expected more than 0, and a CUDA device to limit")
    path = Path(results) if results is not None else RESULTS
    row_files.require_writable(path)
    label = model if ckpt_dir is None else Path(ckpt_dir).name
    with tempfile.TemporaryDirectory(dir=work_dir) as folder:
        directory = provide_weights(Path(folder), model, ckpt_dir, torch.bfloat16, seed, against is not None)
        plan = Plan(str(directory.resolve()), seq_len, str(resolved), warm_up, memory_limit_gb, seed)
        measured = same_losses(measure(plan, args, wanted, repeats))
        rows = [append_row(path, label, plan, cell, runs, resolved) for cell, runs in measured]
    print(report(rows))
    image = Path(figure) if figure is not None else FIGURES / f"finetuning-{label}-{resolved.type}.png"
    plot(rows, image)
    print(f"rows appended to {path}; plot in {image}")


def check_flags(
    model: str,
    names: str,
    seq_len: int,
    batch_size: int,
    accumulation: int,
    repeats: int,
    warm_up: int,
    against: str | None,
) -> list[Cell]:
    """The cells that the flags ask for. Raises InputError for what cannot be measured."""
    cli.require_one_of("model", model, PRESETS)
    cli.require_at_least(2, seq_len=seq_len)
    cli.require_at_least(1, batch_size=batch_size, accumulation=accumulation, repeats=repeats, warm_up=warm_up)
    if seq_len > MAX_TOKENS:
        raise InputError(f"--seq_len={seq_len}: more positions than Llama's {MAX_TOKENS:,}")
    chosen = names.split(",")
    if set(chosen) - set(SETS) or len(set(chosen)) < len(chosen):
        raise InputError(f"--cells={names}: expected {', '.join(SETS)}, each at most once")
    if against not in (None, "peers"):
        raise InputError(f"--against={against}: expected peers")
    if "lean" in chosen and accumulation > 1:
        raise InputError(f"--accumulation={accumulation}: lean full fine-tuning has no gradients to accumulate; use 1")
    if "table2" in chosen and (batch_size, accumulation) != (1, 1):
        raise InputError("--cells=table2 sets batch_size and accumulation itself; leave them out")
    found = [
        cell if name == "table2" else dataclasses.replace(cell, batch_size=batch_size, accumulation=accumulation)
        for name in chosen
        for cell in SETS[name]
    ]
    peers = [Cell(engine="transformers", amp=True), Cell(engine="peft", lora=True, half=True)] if against else []
    return list(dict.fromkeys([*peers, *found]))


def narrow_dtype(device: torch.device) -> torch.dtype:
    """The 16-bit type to compute in: bf16, and fp16 on a GPU that has no bf16."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return torch.bfloat16


def settings_of(cell: Cell, narrow: torch.dtype) -> Settings:
    """The course's optimizer, and the cell's techniques."""
    amp = {torch.float16: "fp16", torch.bfloat16: "bf16"}[narrow] if cell.amp else "none"
    return Settings(optimizer="sgd", lr=1e-5, amp=amp, lean=cell.lean)


def described(args: ModelArgs, cell: Cell, seq_len: int, narrow: torch.dtype) -> tuple:
    """A cell as memory.py asks for it."""
    shape = memory.Shape(cell.batch_size, seq_len, cell.batch_size * (seq_len - 1), min(2, cell.accumulation))
    layers = tuple(range(args.n_layers)) if cell.checkpointing else ()
    dtype, adapters = narrow if cell.half else torch.float32, ADAPTERS if cell.lora else None
    return args, dtype, adapters, settings_of(cell, narrow), shape, layers


def foresee(args: ModelArgs, cell: Cell, seq_len: int, narrow: torch.dtype = torch.bfloat16) -> memory.Footprint:
    """What a cell will need."""
    return memory.estimate(*described(args, cell, seq_len, narrow))


def count_flops(args: ModelArgs, cell: Cell, seq_len: int, narrow: torch.dtype) -> int:
    """FLOPs of a step's products and attention, recomputed ones included; counted on tensors without content.

    Apart from where memory is looked into: the counter keeps tensors alive that a step would free.
    """
    *kind, shape, layers = described(args, cell, seq_len, narrow)
    with memory.fake_trainer(*kind, layers) as trainer, FlopCounterMode(display=False) as counter:
        trainer.back_propagate(shape.window()[0], 1)
    return counter.get_total_flops() * cell.accumulation


def estimates(args: ModelArgs, wanted: Sequence[Cell], seq_len: int, limit_gb: float) -> str:
    """A table of what the cells would need, and which of them fit, as Markdown."""
    names = memory.CATEGORIES
    lines = [f"| {seq_len} tokens | peak (MB) | {' | '.join(names)} | within {limit_gb:g} GB |"]
    lines.append("|---|---|" + "---|" * (len(names) + 1))
    for cell in wanted:
        if cell.engine == "llama":
            found = foresee(args, cell, seq_len)
            sizes = " | ".join(f"{found.at_peak[name] / devices.MB:,.0f}" for name in names)
            fits = "yes" if found.peak <= limit_gb * 1e9 else "no"
            lines.append(f"| {cell} | {found.peak / devices.MB:,.0f} | {sizes} | {fits} |")
    lines.append("\nForeseen, not measured: without the CUDA context (about 300 MB) and what kernels allocate inside.")
    return "\n".join(lines)


def measure(
    plan: Plan, args: ModelArgs, wanted: Sequence[Cell], repeats: int
) -> Iterator[tuple[Cell, list[dict[str, Any]]]]:
    """Each cell with its measurements. On a CPU, cells that fit into memory together take turns."""
    groups = [[cell] for cell in wanted]
    if not plan.device.startswith("cuda"):
        room = 0.88 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        groups = side_by_side(wanted, lambda cell: 1.1 * foresee(args, cell, plan.seq_len).peak, room)

    def start(cell: Cell) -> Worker:
        return Worker(__file__, {"plan": dataclasses.asdict(plan), "cell": dataclasses.asdict(cell)})

    return rounds(groups, start, repeats, plan.seed)


def same_losses(
    measured: Iterator[tuple[Cell, list[dict[str, Any]]]], tolerance: float = 0.01
) -> Iterator[tuple[Cell, list[dict[str, Any]]]]:
    """Pass cells on whose first loss is that of the others: the same work. Raises InputError where it is not."""
    first: dict[tuple[int, int], tuple[Cell, float]] = {}
    for cell, runs in measured:
        if runs:
            loss = runs[0]["first_loss_nats"]
            other, expected = first.setdefault((cell.batch_size, cell.accumulation), (cell, loss))
            if not abs(loss - expected) <= tolerance * expected:
                raise InputError(
                    f"the first loss of {cell} is {loss:.3f}, that of {other} {expected:.3f}: not the same work, so no "
                    "time would mean anything"
                )
        yield cell, runs


def side_by_side(wanted: Sequence[Cell], size: Callable[[Cell], float], room: float) -> list[list[Cell]]:
    """Cells in groups that need no more than `room` together; those to be compared next to each other."""
    groups: list[list[Cell]] = []
    used = 0.0
    for cell in sorted(wanted, key=lambda c: (c.lora, c.half, c.amp, c.checkpointing, c.engine == "llama", not c.lean)):
        needed = size(cell)
        if not groups or used + needed > room:
            groups.append([])
            used = 0.0
        groups[-1].append(cell)
        used += needed
    return groups


class StepRunner:
    """One cell in this process: loads and warms up at the first call, measures one step at every call."""

    def __init__(self, plan: Plan, cell: Cell) -> None:
        self.plan, self.cell = plan, cell
        self.device, _ = devices.resolve(plan.device, "float32")
        limit_memory(self.device, plan.memory_limit_gb)
        self.narrow = narrow_dtype(self.device)
        self.dtype = self.narrow if cell.half else torch.float32
        self.step: Callable[[], float] | None = None

    def __call__(self) -> dict[str, float]:
        if self.step is None:
            self._prepare()
        values = dict(self.fixed)
        if self.cell.engine == "llama":
            kind = self.narrow if self.cell.amp or self.cell.half else torch.float32
            rate = max(floors.product_rate(self.trainer.model, kind).values())
            values |= {"product_tflop_s": rate / 1e12, "floor_step_s": self.flops / rate}
        _, whole = stopwatch.measure(self.step, self.device)
        values["step_s"] = whole.seconds
        if whole.peak_bytes is not None:
            values["peak_memory_mb"] = (whole.peak_bytes - self.baseline) / devices.MB
        if "floor_step_s" in values:
            values["step_over_floor_x"] = whole.seconds / values["floor_step_s"]
        return values

    def _prepare(self) -> None:
        """Load, look into memory with a step of its own, and warm up; all outside of any timing."""
        if self.cell.engine == "llama":
            devices.return_freed_memory()  # as finetuning.py does
        load = self._load if self.cell.engine == "llama" else self._load_peer
        warm_libraries(self.cell, self.device, self.narrow)
        self.baseline = stopwatch.memory_baseline(self.device)
        self.fixed: dict[str, float] = {}
        self.step, loading = stopwatch.measure(load, self.device)
        losses, _ = stopwatch.measure(lambda: [self.step() for _ in range(self.plan.warm_up)], self.device)
        self.fixed |= {"load_s": loading.seconds, "first_loss_nats": losses[0]}

    def _load(self) -> Callable[[], float]:
        plan, cell = self.plan, self.cell
        model = checkpoint.load(plan.ckpt_dir, self.dtype, self.device)
        self.trainer = make_trainer(model, cell, self.narrow)
        window = random_window(cell, model.args.vocab_size, plan.seq_len, plan.seed)
        found = memory.track_step(self.trainer, window).footprint()
        self.flops = count_flops(model.args, cell, plan.seq_len, self.narrow)
        self.fixed["step_tflop"] = self.flops / 1e12
        self.fixed["expected_peak_memory_mb"] = foresee(model.args, cell, plan.seq_len, self.narrow).peak / devices.MB
        for name in memory.CATEGORIES:
            self.fixed[f"{name}_at_peak_mb"] = found.at_peak[name] / devices.MB
            self.fixed[f"{name}_most_mb"] = found.largest[name] / devices.MB
        return lambda: self.trainer.step(window).loss

    def _load_peer(self) -> Callable[[], float]:
        """Hugging Face's model and loss in a plain loop; with peft's adapters for LoRA."""
        try:
            import peft
            import transformers
        except ImportError as error:
            raise EnvironmentFailure(f"--against=peers needs {error.name}; see requirements-dev.txt") from None
        plan, cell = self.plan, self.cell
        transformers.utils.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(plan.ckpt_dir, dtype=self.dtype).to(self.device)
        if cell.lora:
            options = {"r": ADAPTERS.r, "lora_alpha": ADAPTERS.alpha, "lora_dropout": ADAPTERS.dropout}
            targets = ["q_proj", "v_proj"]
            model = peft.get_peft_model(
                model, peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM", **options)
            )
        model.train()
        optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1e-5)
        window = random_window(cell, model.config.vocab_size, plan.seq_len, plan.seed)
        batches = [batch.tokens.to(self.device) for batch in window]

        def step() -> float:
            total = 0.0
            for ids in batches:
                with torch.autocast(self.device.type, self.narrow, enabled=cell.amp):
                    loss = model(input_ids=ids, labels=ids, use_cache=False).loss / len(batches)
                loss.backward()
                total += loss.item()
            optimizer.step()
            optimizer.zero_grad()
            return total

        return step


def make_trainer(model: Transformer, cell: Cell, narrow: torch.dtype) -> Trainer:
    """A trainer with the cell's techniques."""
    if cell.lora:
        lora.apply(model, ADAPTERS)
    else:
        model.requires_grad_(True)
    checkpoint_layers(model, range(model.args.n_layers) if cell.checkpointing else ())
    return Trainer(model, settings_of(cell, narrow), 1)


def random_window(cell: Cell, vocab_size: int, seq_len: int, seed: int) -> list[Batch]:
    """The same ids for every engine; the label of each token is the next one."""
    generator = torch.Generator().manual_seed(seed)
    window = []
    for _ in range(cell.accumulation):
        tokens = torch.randint(vocab_size, (cell.batch_size, seq_len), generator=generator)
        where = torch.arange(tokens.numel()).view_as(tokens)[:, :-1].flatten()
        window.append(Batch(tokens, None, where, tokens[:, 1:].flatten()))
    return window


def warm_libraries(cell: Cell, device: torch.device, narrow: torch.dtype) -> None:
    """Let the libraries set up what they keep, with a model of a few kilobytes, before memory is counted."""
    dtype = narrow if cell.half else torch.float32
    trainer = make_trainer(Transformer(PRESETS["tiny-draft"]).to(device, dtype), cell, narrow)
    trainer.step(random_window(cell, PRESETS["tiny-draft"].vocab_size, 16, 0))


def append_row(
    path: Path, label: str, plan: Plan, cell: Cell, runs: list[dict[str, Any]], device: torch.device
) -> dict[str, Any]:
    """One row for a cell; without metrics where memory ran out."""
    metrics = {name: row_files.spread([run[name] for run in runs]) for name in (runs[0] if runs else ())}
    place = {"model": label, **dataclasses.asdict(cell), "seq_len": plan.seq_len}
    place["memory_limit_gb"] = plan.memory_limit_gb
    dtype = str(narrow_dtype(device) if cell.half else torch.float32).removeprefix("torch.")
    return row_files.append_row(path, "benchmark_finetuning", place, metrics, device, dtype, plan.seed)


# What the rows say


def cell_of(row: dict[str, Any]) -> Cell:
    """The cell that a row is of."""
    return Cell(**{field.name: row["cell"][field.name] for field in dataclasses.fields(Cell)})


def by_cell(rows: Sequence[dict[str, Any]]) -> dict[Cell, dict[str, Any]]:
    """Metrics by cell, in the order of the tables."""
    keys = sorted(rows, key=lambda row: (*_order(cell_of(row)), row["time"]))
    return {cell_of(row): row["metrics"] for row in keys}


def _order(cell: Cell) -> tuple:
    sizes = (cell.accumulation, cell.batch_size)
    return (cell.engine != "llama", cell.half, cell.lean, sizes, cell.lora, cell.amp, cell.checkpointing)


def table3(rows: Sequence[dict[str, Any]], lean: bool = False) -> str:
    """Table 3 in the course's form, of the plain or of the lean mode, as Markdown; empty without such rows."""
    titles = " | ".join(TITLES[name] for name in TECHNIQUES)
    lines = [f"| {titles} | {'lean' if lean else 'plain'}: peak memory (MB) | a step (s) |"]
    lines.append("|---|---|---|---|---|")
    for cell, metrics in by_cell(rows).items():
        if cell == Cell(cell.checkpointing, cell.amp, cell.lora, lean):
            marks = " | ".join("yes" if getattr(cell, name) else "no" for name in TECHNIQUES)
            values = f"{median(metrics, 'peak_memory_mb', ',.0f')} | {median(metrics, 'step_s', '.2f')}"
            lines.append(f"| {marks} | {values} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def details(rows: Sequence[dict[str, Any]]) -> str:
    """Every cell with its spread, its floor, what was foreseen, and what it is compared with; as Markdown."""
    found = by_cell(rows)
    lines = [
        "| cell | a step (s) | x floor | peak (MB) | foreseen | error | x without checkpointing | its time / ours |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for cell, m in found.items():
        step = m.get("step_s")
        runtime = spread(m, "step_s", ".2f")
        plain = found.get(dataclasses.replace(cell, checkpointing=False)) if cell.checkpointing else None
        ours = found.get(dataclasses.replace(cell, engine="llama", lean=True)) if cell.engine != "llama" else None
        ratios = [f"{step['median'] / o['step_s']['median']:.2f}" if step and o else "-" for o in (plain, ours)]
        error = "-"
        if "expected_peak_memory_mb" in m and "peak_memory_mb" in m:
            error = f"{m['expected_peak_memory_mb']['median'] / m['peak_memory_mb']['median'] - 1:+.1%}"
        sizes = [median(m, name, ",.0f") for name in ("peak_memory_mb", "expected_peak_memory_mb")]
        lines.append(
            f"| {cell} | {runtime} | {median(m, 'step_over_floor_x', '.2f')} | {sizes[0]} | {sizes[1]} "
            f"| {error} | {ratios[0]} | {ratios[1]} |"
        )
    row = rows[0]
    runs = counts(m["step_s"]["n"] for m in found.values() if m)
    limit = f", held to {row['cell']['memory_limit_gb']:g} GB" if row["cell"]["memory_limit_gb"] else ""
    lines.append(
        f"\nMedians (least to most) of {runs} steps of {row['cell']['model']}, {row['cell']['seq_len']} tokens a row, "
        f"the optimizer's step included; {row_files.setting(row)}{limit}; x: out of memory."
    )
    return "\n".join(lines) + "\n"


def _arrow(before: float, after: float, form: str, threshold: float) -> str:
    return f"{arrow(before, after, threshold)} {before:{form}} to {after:{form}}"


def table2(rows: Sequence[dict[str, Any]]) -> str:
    """What each technique does to each kind of memory and to time, from pairs of rows; empty without them."""
    found = by_cell(rows)
    parts = []
    for accumulation in (1, 2):
        base = Cell(accumulation=accumulation)
        pairs = {TITLES[name]: (base, dataclasses.replace(base, **{name: True})) for name in TECHNIQUES}
        if accumulation > 1:
            pairs = {"accumulation (1 x 2 to 2 x 1)": (Cell(batch_size=2), base), **pairs}
        if not all(found.get(cell) for pair in pairs.values() for cell in pair):
            continue
        lines = [f"| {'with' if accumulation > 1 else 'without'} accumulation | " + " | ".join(pairs) + " |"]
        lines.append("|---|" + "---|" * len(pairs))
        both = [(found[before], found[after]) for before, after in pairs.values()]
        for kind in KINDS:
            arrows = [_arrow(most_mb(a, kind), most_mb(b, kind), ",.0f", CHANGED) for a, b in both]
            lines.append(f"| {kind} (MB) | {' | '.join(arrows)} |")
        for label, name, form, threshold in (
            ("peak of all (MB)", "peak_memory_mb", ",.0f", CHANGED),
            ("computation (TFLOP)", "step_tflop", ".2f", CHANGED),
            ("a step (s)", "step_s", ".2f", SLOWER),
        ):
            arrows = [_arrow(a[name]["median"], b[name]["median"], form, threshold) for a, b in both]
            lines.append(f"| {label} | {' | '.join(arrows)} |")
        parts.append("\n".join(lines) + "\n")
    if not parts:
        return ""
    about = f"An arrow is a change of more than {CHANGED:.0%}, of more than {SLOWER:.0%} for the time of a step. "
    about += "Parameters include their copies in 16 bits; each kind is at its own highest moment."
    return "\n".join([*parts, about, *textbook(found)]) + "\n"


def textbook(found: dict[Cell, dict[str, Any]]) -> list[str]:
    """Where the measured rows disagree with what is usually taught, in words."""
    lines = []
    base = found.get(Cell())
    recomputed, mixed = found.get(Cell(checkpointing=True)), found.get(Cell(amp=True))
    if base and recomputed:
        peaks = [m["peak_memory_mb"]["median"] for m in (base, recomputed)]
        if peaks[1] > (1 - CHANGED) * peaks[0] and most_mb(recomputed, "activations") < most_mb(base, "activations"):
            lines.append(
                "Checkpointing lowers activations, and not the peak: without accumulation, full fine-tuning peaks at "
                f"the end of the backward pass ({peaks[0]:,.0f} and {peaks[1]:,.0f} MB), where all gradients and no "
                "activations are."
            )
    if base and mixed and most_mb(mixed, "parameters") > (1 + CHANGED) * most_mb(base, "parameters"):
        peaks = [m["peak_memory_mb"]["median"] for m in (base, mixed)]
        lines.append(
            "Mixed precision raises the memory of parameters, by the 16-bit copies that autocast makes of them; the "
            f"peak goes from {peaks[0]:,.0f} to {peaks[1]:,.0f} MB."
        )
    return ["", *lines] if lines else []


def report(rows: Sequence[dict[str, Any]]) -> str:
    """All tables that the rows can fill."""
    tables = (table3(rows), table3(rows, lean=True), table2(rows), details(rows))
    return "\n".join(part for part in tables if part)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Peak memory of each cell by category, and the time of a step beside its floor."""
    from matplotlib.figure import Figure  # draws without a screen, and only here

    found = {cell: m for cell, m in by_cell(rows).items() if m}
    names = [str(cell).removeprefix("llama, ") for cell in found]
    figure = Figure(figsize=(10, 1.4 + 0.3 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    at = range(len(names))
    shown = [0.0] * len(names)
    shades = dict(
        zip(memory.CATEGORIES, ("#1b6ca8", "#7a5195", "#c1440e", "#58a4d6", "#e8a33d", "#bbbbbb"), strict=True)
    )
    for category, shade in shades.items():
        sizes = [
            m[f"{category}_at_peak_mb"]["median"] if f"{category}_at_peak_mb" in m else 0.0 for m in found.values()
        ]
        if any(sizes):
            left.barh(at, sizes, left=shown, color=shade, label=category)
            shown = [a + b for a, b in zip(shown, sizes, strict=True)]
    peaks = [m["peak_memory_mb"]["median"] if "peak_memory_mb" in m else 0.0 for m in found.values()]
    left.plot(peaks, at, "k|", markersize=12, label="measured peak")
    left.set(title="memory at the peak (MB)", yticks=list(at), yticklabels=names)
    left.invert_yaxis()
    left.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.04), ncols=3)  # where no bar can be
    right.barh(at, [m["step_s"]["median"] for m in found.values()], color="#1b6ca8")
    floor = [m["floor_step_s"]["median"] if "floor_step_s" in m else float("nan") for m in found.values()]
    right.plot(floor, at, "k|", markersize=12, label="floor: its matrix products")
    right.set(title="time of a step (s)")
    right.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.04))
    for axis in (left, right):
        axis.grid(axis="x", alpha=0.3)
    row = rows[0]
    figure.suptitle(f"{row['cell']['model']}, {row['cell']['seq_len']} tokens, {row['device']['name']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    cli.run(main)
