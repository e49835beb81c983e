"""The ladder: from plain PyTorch without a cache to what is fastest, one change a row, on the same work.

    python -m benchmarks.ladder                        # the embedded model in bfloat16, two to three minutes
    python -m benchmarks.ladder --model=llama3.2-1b    # Llama 3.2 1B's shape with random weights: time and memory only

A row is one change to another row: that one's speed is what it is compared with, and a test holds it to the same text
or bounds the error. The work is greedy decoding of the same prompts, one after another, for the same number of tokens,
whatever they say: text of the embedded model's own world, and questions that it repeats again and again, which is
what prompt lookup is for. Each row has a process of its own, and the rounds go through them in shuffled order; see
llama/cells.py.

Perplexity is that of the row's weights, in the row's dtype, on the text and in the windows of evaluate.py: it says what
int8, int4 and pruning cost; a cache, a kernel and a draft change nothing in it. Pruned is without fine-tuning.

Left out on purpose: several rows at once (benchmark_inference.py), and speculation with random weights: how often a
draft is right about a model that has learned nothing says nothing.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import hardware as floors
from benchmarks import rows as row_files
from benchmarks import stopwatch
from benchmarks import workers as cells
from data.tiny.sequences import SEQ_LEN, held_out
from llama import Llama, Transformer, checkpoint, cli, pruning, quantization
from llama import device as devices
from llama.config import PRESETS
from llama.errors import InputError
from llama.evaluation import perplexity
from llama.quantization import Quantization
from llama.speculative import Draft, ModelDraft, PromptLookup, Speculation
from llama.tokenizer import Tokenizer
from reports import tables
from reports.render import markdown

ROOT = Path(__file__).parents[1]
EMBEDDED = ROOT / "data" / "tiny"
RESULTS = ROOT / "reports" / "results" / "ladder.jsonl"
FIGURES = ROOT / "reports" / "figures"
SHARE = 0.25  # of the hidden units that pruning takes out
OWN, REPETITIVE, RANDOM = "its own", "repetitive", "random ids"
N_PROMPTS = 8  # of the model's own text
# After which the embedded model asks and answers one question again and again; 16 tokens each, so that none is cut.
QUESTIONS = tuple(
    f'Question: What is the past tense of "{verb}"?\nAnswer:' for verb in ("speak", "swim", "drink", "buy")
)
# What "auto" decoding comes to.
STEPS = {"native": "C step", "fused and captured": "Triton", "captured": "CUDA graph", "eager": "auto"}
# By what a change is held: the same tokens, the same logits, or a bound on the error.
TESTS = {
    "no cache": "tests/llama/checkpoint/test_checkpoint.py::test_logits_equal_transformers",
    "KV cache": "tests/llama/test_generation.py::test_cache_on_equals_off_over_a_thousand_tokens",
    "C step": "tests/llama/test_decoding.py::test_native_step_is_as_exact_as_the_eager_one",
    "Triton": "tests/llama/kernels/test_gpu_kernels.py::test_fused_step_is_as_exact_as_the_eager_one",
    "CUDA graph": "tests/llama/test_decoding.py::test_captured_step_equals_eager",
    "auto": "tests/llama/test_decoding.py::test_without_a_compiler_generation_goes_on",
    "int8": "tests/llama/test_quantization.py::test_int8_loses_at_most_half_a_step",
    "int4": "tests/llama/test_quantization.py::test_int4_is_bounded_and_better_than_rounding",
    "pruned": "tests/llama/test_pruning.py::test_the_strongest_units_are_left_in_their_order",
    "draft": "tests/llama/test_speculative.py::test_greedy_equals_plain_for_any_draft",
    "lookup": "tests/llama/test_speculative.py::test_greedy_equals_plain_for_any_draft",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A row: what it changes about which other row, and all that it runs with. `row` counts from 1."""

    row: int
    name: str
    changes: int | None
    text: str
    weights: str = "whole"
    use_cache: bool = True
    decoding: str = "auto"
    draft: str | None = None
    engine: str = "llama"

    def __str__(self) -> str:
        return f"{self.row} {self.name}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What all rows of one run share: checkpoints by form of the weights, ids of the prompts by text."""

    directories: dict[str, str]
    prompts: dict[str, list[list[int]]]
    output_len: int
    device: str
    dtype: str


def main(
    *,
    model: str = "tiny",
    input_len: int = 32,
    output_len: int = 64,
    repeats: int = 5,
    max_tokens: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 1,
    results: str | None = None,
    figure: str | None = None,
    work_dir: str | None = None,
    worker: str | None = None,
) -> None:
    """Measure what each change brings: cache, decode step, int8, int4, pruning, speculative decoding.

    Args:
        model: tiny, the embedded model, or another preset with random weights: time and memory, no drafts.
        input_len: tokens of each prompt; those of repetitive text may have fewer.
        output_len: tokens generated for each.
        repeats: timed runs of each row.
        max_tokens: take the perplexity on so many tokens of the held-out text; default: all of it.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto (the device's 16-bit type), float32, bfloat16 or float16.
        seed: of random weights and ids and the order of the rows.
        results: file that the measured rows are appended to; default: reports/results/ladder.jsonl.
        figure: file of the plot; default: one in reports/figures, named after model and device.
        work_dir: where checkpoints are written for the while; default: the system's temporary folder.
        worker: (internal) measure one row, given as JSON, on demand.
    """
    if worker is not None:
        orders = json.loads(worker)
        cells.measure_on_demand(Runner(Plan(**orders["plan"]), Cell(**orders["cell"])))
        return
    check_flags(model, input_len, output_len, repeats, max_tokens)
    if dtype == "auto" and devices.resolve(device)[0].type == "cpu":
        dtype = "bfloat16"
    target, compute_dtype = devices.resolve(device, dtype)
    name = str(compute_dtype).removeprefix("torch.")
    path = Path(results) if results is not None else RESULTS
    row_files.require_writable(path)
    wanted = ladder(model == "tiny")
    with tempfile.TemporaryDirectory(dir=work_dir) as folder:
        source = EMBEDDED
        if model != "tiny":
            source = cells.provide_weights(Path(folder), model, None, compute_dtype, seed, for_peers=False)
        directories = make_forms(source, Path(folder), {cell.weights for cell in wanted})
        prompts = make_prompts(model, input_len, seed)
        plan = Plan(directories, prompts, output_len, str(target), name)
        quality = losses(plan, max_tokens) if model == "tiny" else {}
        runs = measure(plan, wanted, repeats, seed)
    rows = []
    for cell in wanted:
        place, values, series = describe(model, plan, cell, runs, quality.get(cell.weights, {}))
        rows.append(row_files.record(path, "ladder", place, values, target, name, seed, series))
    print(markdown([*tables.ladder(rows), *tables.drafts(rows)]))
    image = Path(figure) if figure is not None else FIGURES / f"ladder-{model}-{target.type}.png"
    plot([row.data for row in rows], image)
    print(f"rows appended to {path}; plot in {image}")


def check_flags(model: str, input_len: int, output_len: int, repeats: int, max_tokens: int | None) -> None:
    """Raise InputError for what cannot be measured."""
    cli.require_one_of("model", model, PRESETS)
    cli.require_at_least(2, input_len=input_len, output_len=output_len)
    cli.require_at_least(1, repeats=repeats)
    longest = SEQ_LEN if model == "tiny" else PRESETS[model].trained_context
    if input_len + output_len > longest:
        raise InputError(f"--input_len={input_len} --output_len={output_len}: more than the model's {longest:,} tokens")
    if max_tokens is not None and model != "tiny":
        raise InputError("--max_tokens: is for the perplexity of the embedded model; random weights have none")
    if max_tokens is not None and max_tokens < 2:
        raise InputError(f"--max_tokens={max_tokens}: expected at least 2, one to see and one to predict")


def ladder(has_text: bool) -> list[Cell]:
    """The rows, in order. has_text: of a model that has learned something, so that drafts have a chance to be right."""
    text = OWN if has_text else RANDOM
    rows = [
        Cell(1, "no cache", None, text, use_cache=False, decoding="eager"),
        Cell(2, "KV cache", 1, text, decoding="eager"),
        Cell(3, "auto", 2, text),
        Cell(4, "int8", 3, text, weights="int8"),
        Cell(5, "int4", 4, text, weights="int4"),
        Cell(6, "pruned", 3, text, weights="pruned"),
    ]
    if not has_text:
        return rows
    return [
        *rows,
        Cell(7, "draft", 3, text, draft="model"),
        Cell(8, "lookup", 3, text, draft="lookup"),
        Cell(9, "no cache", None, REPETITIVE, use_cache=False, decoding="eager"),
        Cell(10, "KV cache", 9, REPETITIVE, decoding="eager"),
        Cell(11, "auto", 10, REPETITIVE),
        Cell(12, "draft", 11, REPETITIVE, draft="model"),
        Cell(13, "lookup", 11, REPETITIVE, draft="lookup"),
    ]


# What is measured


def make_forms(source: Path, folder: Path, wanted: set[str]) -> dict[str, str]:
    """A checkpoint for each form of the weights: as they are, quantized, or with hidden units taken out."""
    directories = {"whole": str(source.resolve())}
    for name in sorted(wanted - {"whole"}):
        model = checkpoint.load(source)
        if name == "pruned":
            model = pruning.cut(model, "dimensions", SHARE, model.args.ffn_dim)
        else:
            quantization.quantize(model, Quantization(int(name.removeprefix("int"))), progress=True)
        checkpoint.save(model, folder / name)
        directories[name] = str((folder / name).resolve())
    return directories


def make_prompts(model: str, input_len: int, seed: int) -> dict[str, list[list[int]]]:
    """Ids of equal length by text, so that a recorded step serves all prompts of a text."""
    if model != "tiny":
        generator = torch.Generator().manual_seed(seed)
        return {RANDOM: torch.randint(PRESETS[model].vocab_size, (1, input_len), generator=generator).tolist()}
    tokenizer = Tokenizer(EMBEDDED / "tokenizer.model")
    own = held_out(tokenizer, n=N_PROMPTS)[:, :input_len].tolist()
    questions = [tokenizer.encode(question, bos=True, eos=False) for question in QUESTIONS]
    length = min(input_len, *map(len, questions))
    return {OWN: own, REPETITIVE: [ids[-length:] for ids in questions]}


def losses(plan: Plan, max_tokens: int | None) -> dict[str, dict[str, float]]:
    """Loss and perplexity of each form of the embedded model, counted as evaluate.py counts."""
    device, dtype = devices.resolve(plan.device, plan.dtype)
    ids = held_out(Tokenizer(EMBEDDED / "tokenizer.model")).flatten().tolist()[:max_tokens]
    found = {}
    for name, directory in plan.directories.items():
        network = checkpoint.load(directory, dtype, device)
        result = perplexity.evaluate(network, ids, SEQ_LEN + 1, progress=True)
        found[name] = {"loss_nats": result.loss, "perplexity_x": result.perplexity, "scored_tokens": result.tokens}
    return found


def start(plan: Plan, cell: Cell) -> cells.Worker:
    """A process for a row."""
    return cells.Worker(__file__, {"plan": dataclasses.asdict(plan), "cell": dataclasses.asdict(cell)})


def measure(plan: Plan, wanted: list[Cell], repeats: int, seed: int) -> dict[Cell, list[dict[str, Any]]]:
    """Each row with its measurements. On a CPU all take turns; on a GPU each runs alone, for the sake of its memory."""
    groups = [[cell] for cell in wanted] if plan.device.startswith("cuda") else [wanted]
    return dict(cells.rounds(groups, lambda cell: start(plan, cell), repeats, seed))


class Runner:
    """One row in this process: loads and warms up at the first call, measures at every call."""

    def __init__(self, plan: Plan, cell: Cell) -> None:
        self.plan, self.cell = plan, cell
        self.device, self.dtype = devices.resolve(plan.device, plan.dtype)
        self.prompts = plan.prompts[cell.text]
        self.llama: Llama | None = None
        self.draft: Draft | None = None

    def __call__(self) -> dict[str, Any]:
        if self.llama is None:
            self._prepare()
        speculation = None if self.draft is None else Speculation(self.draft)
        ids, spent = stopwatch.measure(lambda: self._generate(self.plan.output_len, speculation), self.device)
        n_tokens = sum(map(len, ids))
        values = {"runtime_s": spent.seconds, "tokens_per_s": n_tokens / spent.seconds}
        models = [self.llama.model, *([self.draft.decoder.model] if isinstance(self.draft, ModelDraft) else [])]
        values["weights_mb"] = sum(map(floors.weight_bytes, models)) / devices.MB
        if spent.peak_bytes is not None:
            values["peak_memory_mb"] = (spent.peak_bytes - self.baseline) / devices.MB
        if speculation is not None:
            values["acceptance"] = speculation.counts.acceptance
            values["tokens_a_round"] = speculation.counts.tokens_per_round
        return {"values": values, "decoding": self.llama.decoder.name, "ids": ids}

    def _prepare(self) -> None:
        """Load, and generate once: all of it, or two tokens without the cache, which touch all that more of them do."""
        plan, cell = self.plan, self.cell
        cells.warm_libraries(self.device, self.dtype)
        self.baseline = stopwatch.memory_baseline(self.device)
        model = self._load(plan.directories[cell.weights])
        length = max(map(len, self.prompts)) + plan.output_len
        self.llama = Llama(model, None, length, 1, decoding=cell.decoding)
        if cell.draft is not None:
            self.draft = PromptLookup() if cell.draft == "lookup" else ModelDraft(self._load(EMBEDDED / "draft"))
        self._generate(plan.output_len if cell.use_cache else 2, self.draft and Speculation(self.draft))

    def _load(self, directory: str | Path) -> Transformer:
        return checkpoint.load(directory, self.dtype, self.device)

    def _generate(self, length: int, speculation: Speculation | None) -> list[list[int]]:
        options = {"use_cache": self.cell.use_cache, "speculation": speculation}
        return [self.llama.generate([prompt], length, 0, **options)[0][0] for prompt in self.prompts]


# From runs to rows


def describe(
    model: str, plan: Plan, cell: Cell, runs: dict[Cell, list[dict[str, Any]]], quality: dict[str, float]
) -> tuple[dict[str, Any], dict[str, list[float]], dict[str, list]]:
    """Cell, values and series of a row: what ran, how fast in each run, its test; no values where memory ran out."""
    own = runs[cell]
    decoding = own[0]["decoding"] if own else cell.decoding
    name = STEPS.get(decoding, decoding) if cell.name == "auto" else cell.name
    place = {"model": model, **dataclasses.asdict(cell), "name": name, "decoding": decoding}
    del place["engine"]  # all of them are ours
    prompts = plan.prompts[cell.text]
    place |= {"prompts": len(prompts), "input_len": len(prompts[0]), "output_len": plan.output_len}
    series = {"test": [TESTS[name]]}
    if not own:
        return place, {}, series
    values = {key: [run["values"][key] for run in own] for key in own[0]["values"]}
    values |= {key: [value] for key, value in quality.items()}
    base = next((runs[other] for other in runs if other.row == cell.changes), [])
    if base:
        values["tokens_equal"] = [equal_tokens(run["ids"], base[0]["ids"]) for run in own]
    return place, values, series


def equal_tokens(ids: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> int:
    """How many tokens come before the first that differs, in all texts together."""
    n_equal = 0
    for own, other in zip(ids, others, strict=True):
        pairs = enumerate(zip(own, other, strict=True))
        n_equal += next((place for place, (a, b) in pairs if a != b), len(own))
    return n_equal


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Tokens per second and memory of each row; greys, hatches and figures tell bars apart, not colours."""
    from matplotlib.figure import Figure  # draws without a screen, and only here

    shown = [row for row in rows if row["metrics"]]
    figure = Figure(figsize=(10, 1.4 + 0.34 * len(shown)), layout="constrained")
    speed, memory = figure.subplots(1, 2, sharey=True)
    places = range(len(shown))
    for place, row in zip(places, shown, strict=True):
        is_first_text = row["cell"]["text"] == shown[0]["cell"]["text"]
        style = {"color": "0.55" if is_first_text else "0.85", "hatch": None if is_first_text else "///"}
        rate, least, most = (row["metrics"]["tokens_per_s"][name] for name in ("median", "min", "max"))
        speed.barh(place, rate, xerr=[[rate - least], [most - rate]], edgecolor="black", capsize=2, **style)
        speed.annotate(f"{rate:,.0f}", (most, place), (6, 0), textcoords="offset points", va="center", fontsize=8)
        if "peak_memory_mb" in row["metrics"]:
            peak = row["metrics"]["peak_memory_mb"]["median"]
            memory.barh(place, peak, color="white", edgecolor="black")
            memory.annotate(f"{peak:,.0f}", (peak, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
        memory.barh(place, row["metrics"]["weights_mb"]["median"], edgecolor="black", **style)
    several = len({row["cell"]["text"] for row in shown}) > 1
    labels = [f"{r['cell']['row']}  {r['cell']['name']}" + f" ({r['cell']['text']})" * several for r in shown]
    speed.set_yticks(places, labels)
    speed.invert_yaxis()
    speed.set(xscale="log", title="tokens per second")
    speed.margins(x=0.25)
    memory.set(title="peak memory (MB); filled: weights")
    memory.margins(x=0.15)
    row = rows[0]
    figure.suptitle(f"{row['cell']['model']}, {row['dtype']}, {row['device']['name']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    cli.run(main)
