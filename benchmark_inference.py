"""Table 1: peak memory and runtime of generation, with and without the KV cache, beside what the hardware allows.

    python benchmark_inference.py                            # Llama 3.2 1B's shape, random weights, 256 + 32 tokens
    python benchmark_inference.py --model=tiny               # the same table of the embedded model's shape, in a minute
    python benchmark_inference.py --against=transformers     # and Hugging Face's generate on the same weights and ids
    python benchmark_inference.py --weights=bf16,int8,int4 --cache=on    # quantized weights beside plain ones

Each cell has a process of its own, which loads, warms up, and then runs when it is told to; the rounds go through the
cells in shuffled order, so that a slow minute of the machine hits all of them. On a GPU a cell's process ends before
the next one begins, for the sake of its memory. Before anything is timed, the tokens with and without the cache are
compared in fp32.

Columns: "x floor" is the median of time over the least time that the hardware allows, both measured in the same round.
The floor of a decode step is its bytes (each weight once as it is stored, the keys and values so far) over the best
rate at which any reading kernel goes through the weights; that of a prefill, and of everything without the cache, is
its FLOPs over the best rate of the network's own largest products; that of memory is weights + cache + one row of
logits each.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import hardware as floors
from benchmarks import rows as row_files
from benchmarks import stopwatch
from benchmarks import workers as cells
from llama import Llama, Transformer, checkpoint, cli, quantization
from llama import device as devices
from llama.config import PRESETS
from llama.decoding import DECODING
from llama.errors import EnvironmentFailure, InputError
from llama.quantization import Quantization
from reports import formats as tables

ROOT = Path(__file__).parent
RESULTS = ROOT / "reports" / "results"
FIGURES = ROOT / "reports" / "figures"
Generate = Callable[[int, Callable[[int], None] | None], Any]  # so many tokens; called back after each step
CONTEXT = 131_072  # positions that Llama 3.2 was trained for
PLAIN = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # what plain weights of a dtype are called
QUANTIZED = {"int8": Quantization(8), "int4": Quantization(4)}
PEERS = ("transformers", "transformers static", "transformers compiled")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of the table: who generates, how many rows, with or without the cache, with weights of which format.

    Without a format they are as they lie in the checkpoint.
    """

    engine: str
    batch_size: int
    use_cache: bool
    weights: str | None = None

    def __str__(self) -> str:
        weights = f", {self.weights}" if self.weights else ""
        return f"batch {self.batch_size}, {self.engine}, cache {'on' if self.use_cache else 'off'}{weights}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What all cells of one run share."""

    ckpt_dir: str
    input_len: int
    output_len: int
    device: str
    dtype: str
    decoding: str
    warm_up: int
    memory_limit_gb: float | None
    seed: int


def main(
    *,
    model: str = "llama3.2-1b",
    ckpt_dir: str | None = None,
    batch_sizes: str = "1,8,16",
    input_len: int = 256,
    output_len: int = 32,
    cache: str = "both",
    repeats: int = 5,
    warm_up: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    decoding: str = "auto",
    weights: str | None = None,
    against: str | None = None,
    memory_limit_gb: float | None = None,
    seed: int = 1,
    results: str | None = None,
    figure: str | None = None,
    work_dir: str | None = None,
    worker: str | None = None,
) -> None:
    """Measure Table 1: peak memory and runtime of generation with and without the KV cache.

    Args:
        model: a preset, with random weights: llama3.2-1b, llama3.2-3b, llama3.1-8b, llama2-7b, tiny or tiny-draft.
        ckpt_dir: a checkpoint directory instead of random weights.
        batch_sizes: prompts in a call, separated by commas.
        input_len: tokens of each prompt.
        output_len: tokens generated for each.
        cache: both, on or off.
        repeats: timed runs of each cell.
        warm_up: runs before them, not counted.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto (the device's 16-bit type), float32, bfloat16 or float16.
        decoding: auto, eager or compiled; see llama/decoding.py.
        weights: formats of random weights, separated by commas: the dtype's own (bf16, fp16 or fp32), int8, int4.
        against: transformers, to measure Hugging Face's generate on the same weights and ids too (needs transformers).
        memory_limit_gb: hold a larger GPU to this much memory; a P100 has 16.
        seed: of weights, prompts and the order of the cells.
        results: file that the measured rows are appended to; default: inference.jsonl in reports/results, or with
            --weights formats.jsonl.
        figure: file of the plot; default: one in reports/figures, named after model and device.
        work_dir: where the random checkpoint is written for the while; default: the system's temporary folder.
        worker: (internal) measure one cell, given as JSON, on demand.
    """
    if worker is not None:
        serve(json.loads(worker))
        return
    wanted = check_flags(model, batch_sizes, input_len, output_len, cache, repeats, warm_up, decoding, against)
    if dtype == "auto" and devices.resolve(device)[0].type == "cpu":
        dtype = "bfloat16"  # half the bytes; the library's own default on a CPU is fp32, for exactness
    resolved, compute_dtype = devices.resolve(device, dtype)
    name = str(compute_dtype).removeprefix("torch.")
    wanted = with_weights(wanted, weights, name, ckpt_dir)
    if memory_limit_gb is not None and (resolved.type != "cuda" or memory_limit_gb <= 0):
        raise InputError(f"--memory_limit_gb={memory_limit_gb}: expected more than 0, and a CUDA device to limit")
    experiment = "inference" if weights is None else "formats"  # Table 1, or a comparison that is not to change it
    path = Path(results) if results is not None else RESULTS / f"{experiment}.jsonl"
    row_files.require_writable(path)
    with tempfile.TemporaryDirectory(dir=work_dir) as folder:
        directory = cells.provide_weights(Path(folder), model, ckpt_dir, compute_dtype, seed, against is not None)
        shape = (input_len, output_len, str(resolved), name, decoding, warm_up, memory_limit_gb, seed)
        plan = Plan(str(directory.resolve()), *shape)
        check = start(plan, None)
        if check.ask() is None:
            raise EnvironmentFailure("comparing the tokens in float32 ran out of memory; nothing was timed")
        check.close()
        label = model if ckpt_dir is None else Path(ckpt_dir).name
        measured = measure(plan, wanted, repeats)
        rows = [append_row(path, experiment, label, plan, cell, runs, resolved) for cell, runs in measured]
    print(table(rows))
    print(details(rows))
    image = Path(figure) if figure is not None else FIGURES / f"{experiment}-{label}-{resolved.type}.png"
    plot(rows, image)
    print(f"rows appended to {path}; plot in {image}")


def check_flags(
    model: str,
    batch_sizes: str,
    input_len: int,
    output_len: int,
    cache: str,
    repeats: int,
    warm_up: int,
    decoding: str,
    against: str | None,
) -> list[Cell]:
    """The cells that the flags ask for. Raises InputError for what cannot be measured."""
    cli.require_one_of("model", model, PRESETS)
    try:
        sizes = [int(size) for size in batch_sizes.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise InputError(f"--batch_sizes={batch_sizes}: expected different numbers above 0, such as 1,8,16")
    cli.require_at_least(0, warm_up=warm_up)
    cli.require_at_least(1, input_len=input_len, repeats=repeats)
    cli.require_at_least(2, output_len=output_len)
    if input_len + output_len > CONTEXT:
        raise InputError(f"--input_len={input_len} --output_len={output_len}: more positions than Llama's {CONTEXT:,}")
    if cache not in ("both", "on", "off"):
        raise InputError(f"--cache={cache}: expected both, on or off")
    cli.require_one_of("decoding", decoding, DECODING)
    if against not in (None, "transformers"):
        raise InputError(f"--against={against}: expected transformers")
    modes = {"both": (True, False), "on": (True,), "off": (False,)}[cache]
    ours = [Cell("llama", size, use_cache) for size in sizes for use_cache in modes]
    return ours + [Cell(peer, size, True) for size in sizes for peer in PEERS if against]


def with_weights(wanted: list[Cell], weights: str | None, dtype: str, ckpt_dir: str | None) -> list[Cell]:
    """The cells once for each format of the weights. Raises InputError for what is not one, or not random."""
    if weights is None:
        return wanted
    names = weights.split(",")
    known = [PLAIN[dtype], *QUANTIZED]
    if not set(names) <= set(known) or len(set(names)) < len(names):
        raise InputError(f"--weights={weights}: expected different ones of {', '.join(known)}")
    if ckpt_dir is not None:
        raise InputError("--weights: is for random weights; those of --ckpt_dir are measured as they are stored")
    peers = [cell for cell in wanted if cell.engine != "llama"]
    return [dataclasses.replace(cell, weights=name) for name in names for cell in wanted if cell not in peers] + peers


def start(plan: Plan, cell: Cell | None) -> cells.Worker:
    """A process for a cell; for the check of the tokens where there is none."""
    return cells.Worker(__file__, {"plan": dataclasses.asdict(plan), "cell": cell and dataclasses.asdict(cell)})


def measure(plan: Plan, wanted: list[Cell], repeats: int) -> Iterator[tuple[Cell, list[dict[str, Any]]]]:
    """Each cell with its measurements. On a CPU those of one batch size take turns; on a GPU each runs alone."""
    sizes = sorted({cell.batch_size for cell in wanted})
    groups = [[cell] for cell in wanted]
    if not plan.device.startswith("cuda"):
        groups = [[cell for cell in wanted if cell.batch_size == size] for size in sizes]
    return cells.rounds(groups, lambda cell: start(plan, cell), repeats, plan.seed)


def serve(orders: dict[str, Any]) -> None:
    """What a worker does: set up once, then measure on demand."""
    plan = Plan(**orders["plan"])
    device, _ = devices.resolve(plan.device, plan.dtype)
    cells.limit_memory(device, plan.memory_limit_gb)
    cell = orders["cell"]
    cells.measure_on_demand(CellRunner(plan, Cell(**cell)) if cell is not None else lambda: check_tokens(plan, device))


def check_tokens(
    plan: Plan, device: torch.device, n_prompts: int = 2, input_len: int = 48, output_len: int = 8
) -> dict:
    """Generate in fp32 with and without the cache. Raises InputError where a token differs: no speed would matter."""
    model = checkpoint.load(plan.ckpt_dir, torch.float32, device)
    llama = Llama(model, None, input_len + output_len, n_prompts, decoding=plan.decoding)
    prompts = random_prompts(model.args.vocab_size, n_prompts, min(input_len, plan.input_len), plan.seed)
    on, off = (llama.generate(prompts, output_len, 0, use_cache=use_cache)[0] for use_cache in (True, False))
    if on != off:
        raise InputError("the tokens with and without the KV cache differ in float32; the timings would be meaningless")
    return {"tokens_equal": sum(map(len, on))}


def random_prompts(vocab_size: int, batch_size: int, length: int, seed: int) -> list[list[int]]:
    """The same ids for every engine."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (batch_size, length), generator=generator).tolist()


class CellRunner:
    """One cell in this process: loads and warms up at the first call, measures at every call."""

    def __init__(self, plan: Plan, cell: Cell) -> None:
        self.plan, self.cell = plan, cell
        self.device, self.dtype = devices.resolve(plan.device, plan.dtype)
        self.generate: Generate | None = None

    def __call__(self) -> dict[str, Any]:
        plan, cell = self.plan, self.cell
        if self.generate is None:
            self._prepare()
        values: dict[str, Any] = (
            self._floors() | {"decoding": self.llama.decoder.name, "weights": weights_of(self.llama.model)}
            if cell.engine == "llama"
            else {}
        )
        times: list[float] = []  # of the start and of the first token

        def at_step(step: int) -> None:
            if step == 1:
                devices.synchronize(self.device)
                times.append(time.perf_counter())

        def work() -> None:
            times.append(time.perf_counter())
            self.generate(plan.output_len, at_step)

        _, whole = stopwatch.measure(work, self.device)
        values |= {"runtime_s": whole.seconds, "load_s": self.load_s, "warm_up_s": self.warm_up_s}
        if len(times) == 2:
            values["ttft_s"] = times[1] - times[0]
            values["tpot_s"] = (whole.seconds - values["ttft_s"]) / (plan.output_len - 1)
        if whole.peak_bytes is not None:
            values["peak_memory_mb"] = (whole.peak_bytes - self.baseline) / devices.MB
        for name in ("runtime_s", "ttft_s", "tpot_s", "peak_memory_mb"):
            if name in values and f"floor_{name}" in values:
                values[f"{name.rpartition('_')[0]}_over_floor_x"] = values[name] / values[f"floor_{name}"]
        return values

    def _prepare(self) -> None:
        """Load, outside of any timing, and run `warm_up` times; without the cache two tokens touch all that 32 do."""
        plan, cell = self.plan, self.cell
        load = load_ours if cell.engine == "llama" else load_transformers
        cells.warm_libraries(self.device, self.dtype)
        self.baseline = stopwatch.memory_baseline(self.device)
        (self.generate, self.llama), loading = stopwatch.measure(
            lambda: load(plan, cell, self.device, self.dtype), self.device
        )
        self.load_s = loading.seconds
        length = plan.output_len if cell.use_cache else 2
        _, warming = stopwatch.measure(lambda: [self.generate(length, None) for _ in range(plan.warm_up)], self.device)
        self.warm_up_s = warming.seconds

    def _floors(self) -> dict[str, float]:
        """The least time and memory that this cell can take, from rates measured right now."""
        plan, cell, args = self.plan, self.cell, self.llama.model.args
        bandwidth = max(floors.read_bandwidth(self.llama.model).values())
        rate = max(floors.product_rate(self.llama.model).values())
        size, batch, n = self.dtype.itemsize, cell.batch_size, plan.output_len
        step_bytes = floors.decode_bytes(self.llama.model, batch, plan.input_len + n // 2)
        prefill_s = batch * args.forward_flops(plan.input_len) / rate
        if cell.use_cache:
            step_s = step_bytes / bandwidth
        else:
            flops = sum(args.forward_flops(plan.input_len + i) for i in range(1, n))
            step_s = batch * flops / rate / (n - 1)
        cache = args.kv_cache_bytes(batch, plan.input_len + n - 1, size) if cell.use_cache else 0
        memory = floors.weight_bytes(self.llama.model) + cache + batch * args.vocab_size * size
        return {
            "read_gb_s": bandwidth / 1e9,
            "product_tflop_s": rate / 1e12,
            "step_bytes_gb": step_bytes / 1e9,
            "floor_ttft_s": prefill_s,
            "floor_tpot_s": step_s,
            "floor_runtime_s": prefill_s + (n - 1) * step_s,
            "floor_peak_memory_mb": memory / devices.MB,
        }


def load_ours(plan: Plan, cell: Cell, device: torch.device, dtype: torch.dtype) -> tuple[Generate, Llama]:
    """A function that generates that many tokens, and what it does that with."""
    if cell.weights in QUANTIZED:
        args = checkpoint.read_args(plan.ckpt_dir)
        model = cells.random_codes(args, QUANTIZED[cell.weights], device, dtype, plan.seed)
    else:
        model = checkpoint.load(plan.ckpt_dir, dtype, device)
    llama = Llama(model, None, plan.input_len + plan.output_len, cell.batch_size, decoding=plan.decoding)
    prompts = random_prompts(model.args.vocab_size, cell.batch_size, plan.input_len, plan.seed)
    return lambda n, at_step: llama.generate(prompts, n, 0, use_cache=cell.use_cache, on_step=at_step), llama


def weights_of(model: Transformer) -> str:
    """What a row calls the format of a model's weights."""
    found = quantization.quantization_of(model)
    return f"int{found.bits}" if found else PLAIN[str(model.norm.weight.dtype).removeprefix("torch.")]


def load_transformers(plan: Plan, cell: Cell, device: torch.device, dtype: torch.dtype) -> tuple[Generate, None]:
    """Hugging Face's generate: with its default cache, a static one, or a static one and torch.compile."""
    try:
        import transformers
    except ImportError:
        raise EnvironmentFailure(
            "--against=transformers needs the transformers package; see requirements-dev.txt"
        ) from None
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(plan.ckpt_dir, dtype=dtype).to(device).eval()
    ids = torch.tensor(random_prompts(model.config.vocab_size, cell.batch_size, plan.input_len, plan.seed)).to(device)
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    if cell.engine != "transformers":
        options["cache_implementation"] = "static"
        options["disable_compile"] = cell.engine == "transformers static"
    if cell.engine == "transformers compiled":
        compile_config = transformers.CompileConfig()
        compile_config._compile_all_devices = True  # its own switch for compiling on a CPU too
        options["compile_config"] = compile_config
    return lambda n, _: model.generate(ids, max_new_tokens=n, min_new_tokens=n, **options), None


def append_row(
    path: Path, experiment: str, label: str, plan: Plan, cell: Cell, runs: list[dict[str, Any]], device: torch.device
) -> dict[str, Any]:
    """One row for a cell; without metrics where memory ran out."""
    names = [name for name in runs[0] if name not in ("decoding", "weights")] if runs else []
    metrics = {name: row_files.spread([run[name] for run in runs]) for name in names}
    place = {"model": label, **dataclasses.asdict(cell), "input_len": plan.input_len, "output_len": plan.output_len}
    decoding = runs[0].get("decoding", "peer") if runs else plan.decoding
    weights = (runs[0].get("weights") if runs else None) or cell.weights or PLAIN[plan.dtype]
    place |= {"decoding": decoding, "memory_limit_gb": plan.memory_limit_gb, "weights": weights}
    return row_files.append_row(path, experiment, place, metrics, device, plan.dtype, plan.seed)


def _formats(rows: list[dict]) -> list[str | None]:
    """The formats of our weights, in the order of the rows; None in rows from before there were several."""
    return list(dict.fromkeys(row["cell"].get("weights") for row in rows if row["cell"]["engine"] == "llama"))


def _cells(rows: list[dict], use_cache: bool, weights: str | None) -> dict[int, dict[str, Any]]:
    """Our metrics by batch size."""
    wanted = ("llama", use_cache, weights)
    chosen = [row for row in rows if tuple(row["cell"].get(n) for n in ("engine", "use_cache", "weights")) == wanted]
    return {row["cell"]["batch_size"]: row["metrics"] for row in sorted(chosen, key=lambda r: r["cell"]["batch_size"])}


def table(rows: list[dict]) -> str:
    """Table 1 in the course's form, as Markdown."""
    sizes = sorted({row["cell"]["batch_size"] for row in rows})
    cell = rows[0]["cell"]
    lines = [f"| {cell['input_len']} + {cell['output_len']} tokens | " + " | ".join(f"batch {n}" for n in sizes) + " |"]
    lines.append("|---|" + "---|" * len(sizes))
    formats = _formats(rows)
    for use_cache, weights in itertools.product((True, False), formats):
        title = ("with KV cache" if use_cache else "without") + (f", {weights}" if len(formats) > 1 else "")
        metrics = _cells(rows, use_cache, weights)
        for label, name, form in (("peak memory (MB)", "peak_memory_mb", ",.0f"), ("runtime (s)", "runtime_s", ".2f")):
            if metrics:
                values = " | ".join(tables.median(metrics.get(size), name, form) for size in sizes)
                lines.append(f"| {title}: {label} | {values} |")
    return "\n".join(lines) + "\n"


def details(rows: list[dict]) -> str:
    """What stands behind Table 1: each figure beside its floor, and the peers beside us; as Markdown."""
    lines = [
        "| batch | engine | cache | runtime (s) | x floor | first token (s) | x floor | each next (ms) | x floor |"
    ]
    lines[0] += " memory x floor | its runtime / ours |"
    lines.append("|---|---|---|---|---|---|---|---|---|---|---|")
    formats = _formats(rows)
    ours = _cells(rows, True, formats[0])  # what all others are compared with
    for row in sorted(rows, key=lambda r: (r["cell"]["batch_size"], r["cell"]["engine"], not r["cell"]["use_cache"])):
        cell, m = row["cell"], row["metrics"]
        run = m.get("runtime_s")
        own = ours.get(cell["batch_size"])
        compared = f"{run['median'] / own['runtime_s']['median']:.2f}" if run and own else "-"
        step = f"{1e3 * m['tpot_s']['median']:.1f}" if "tpot_s" in m else tables.median(m, "tpot_s", "")
        x_floor = {
            name: tables.median(m, f"{name}_over_floor_x", ".2f") for name in ("runtime", "ttft", "tpot", "peak_memory")
        }
        engine = cell["engine"] + (f", {cell['weights']}" if len(formats) > 1 and cell["engine"] == "llama" else "")
        columns = [str(cell["batch_size"]), engine, "on" if cell["use_cache"] else "off"]
        columns.append(tables.spread(m, "runtime_s", ".2f"))
        columns += [x_floor["runtime"], tables.median(m, "ttft_s", ".3f"), x_floor["ttft"], step, x_floor["tpot"]]
        lines.append(f"| {' | '.join([*columns, x_floor['peak_memory'], compared])} |")
    row = rows[0]
    runs = tables.counts(r["metrics"]["runtime_s"]["n"] for r in rows if r["metrics"])
    where = f"{row_files.setting(row)}, {row['dtype']}"
    limit = f", held to {row['cell']['memory_limit_gb']:g} GB" if row["cell"]["memory_limit_gb"] else ""
    lines.append(
        f"\nMedians (least to most) of {runs} runs of {row['cell']['model']}; {where}{limit}; x: out of memory."
    )
    for weights in formats:
        note = f", {weights}" if len(formats) > 1 else ""
        for size, m in _cells(rows, True, weights).items():
            moved, read, rate = (
                tables.median(m, name, ".3g") for name in ("step_bytes_gb", "read_gb_s", "product_tflop_s")
            )
            lines.append(f"Batch {size}{note}: a step moves {moved} GB; floors from {read} GB/s and {rate} TFLOP/s.")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """Runtime and peak memory by batch size, with and without the cache, each with its floor."""
    from matplotlib.figure import Figure  # draws without a screen, and only here

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, name, title in ((axes[0], "runtime_s", "runtime (s)"), (axes[1], "peak_memory_mb", "peak memory (MB)")):
        for use_cache, colour, label in ((True, "#1b6ca8", "with KV cache"), (False, "#c1440e", "without")):
            metrics = {size: m for size, m in _cells(rows, use_cache, _formats(rows)[0]).items() if name in m}
            if metrics:
                axis.plot(list(metrics), [m[name]["median"] for m in metrics.values()], "o-", color=colour, label=label)
                floor = [m[f"floor_{name}"]["median"] for m in metrics.values()]
                axis.plot(list(metrics), floor, ":", color=colour, label=f"{label}: floor")
        axis.set(xlabel="batch size", title=title, xticks=sorted({row["cell"]["batch_size"] for row in rows}))
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")  # with and without the cache are a factor of ten or more apart
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[1].set_ylim(0, 1.1 * axes[1].get_ylim()[1])
    axes[0].legend(fontsize=8)
    row = rows[0]
    figure.suptitle(f"{row['cell']['model']}, {row['dtype']}, {row['device']['name']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    cli.run(main)
