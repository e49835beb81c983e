"""From measured rows to what the PDF reports show: tables, figures in the text, curves, texts that models wrote.

All of it is text already, in the digits in which it is printed, so that the Typst sources hold no figure of their own
and a test can look each one up in a row. What was not measured on the chosen device is NOT_MEASURED, out of memory x.
"""

from __future__ import annotations

import ast
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import setting
from llama.config import PRESETS, ROPE_HIGH_FREQ_FACTOR, ROPE_LOW_FREQ_FACTOR, ROPE_ORIGINAL_CONTEXT, ModelArgs
from llama.errors import InputError
from llama.lora import LoRAConfig
from reports.formats import CHANGED, KINDS, SLOWER, arrow, most_mb

NOT_MEASURED, OUT_OF_MEMORY = "not measured", "x"
STEPS = "benchmark_finetuning"
COMMANDS = {
    "inference": "python benchmark_inference.py --against=transformers",
    "comparison": "python inference.py --compare --max_gen_len=48 --results=reports/results/comparison.jsonl",
    STEPS: "python benchmark_finetuning.py --cells=course,lean,half,table2 --against=peers",
    "finetuning": "python finetuning.py --preset=learn --results=reports/results/finetuning.jsonl",
    "ladder": "python -m benchmarks.ladder",
    "pruning": "python -m benchmarks.pruning",
}
COUNTED = ("runtime_s", "step_s")  # what a cell was repeated for
VARIANTS = (("plain", False, False), ("lean", True, False), ("16-bit base", False, True), ("lean, 16-bit", True, True))
QUALITY = ("dense", "iterative", "one-shot", "one-round")  # the parts of benchmark_pruning.py that have a loss
TECHNIQUES = {"checkpointing": "checkpointing", "amp": "mixed precision", "lora": "LoRA"}
Rows = Sequence[dict[str, Any]]


def choose_device(rows: Rows, wanted: str | None) -> str | None:
    """The measured device whose name holds `wanted`; without it that of the newest Table 1, or else the newest row.

    None where nothing was measured. Raises InputError where the name fits no device, or more than one.
    """
    names = sorted({row["device"]["name"] for row in rows})
    if wanted is not None:
        found = [name for name in names if wanted.lower() in name.lower()]
        exact = [name for name in found if name.lower() == wanted.lower()]
        if len(exact or found) != 1:
            what = "fits no measured device" if not found else f"fits {len(found)} devices"
            raise InputError(f"--device={wanted}: {what}; measured are {', '.join(names) or 'none'}")
        return (exact or found)[0]
    table_1 = [row for row in rows if row["experiment"] == "inference"]
    newest = max(table_1 or rows, key=lambda row: row["time"], default=None)
    return newest and newest["device"]["name"]


def make(rows: Rows, device: str | None, model: str, root: Path, code: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Everything that the three documents show. model: whose Tables 1 to 3; code: functions to quote, (file, name)."""
    here = sorted((row for row in rows if row["device"]["name"] == device), key=lambda row: row["time"])
    by = {name: [row for row in here if row["experiment"] == name] for name in COMMANDS}
    generation = like_the_newest(
        [row for row in by["inference"] if row["cell"]["model"] == model],
        lambda row: (row["dtype"], *(row["cell"][name] for name in ("input_len", "output_len", "memory_limit_gb"))),
    )
    steps = like_the_newest(
        [row for row in by[STEPS] if row["cell"]["model"] == model],
        lambda row: (row["cell"]["seq_len"], row["cell"]["memory_limit_gb"]),
    )
    tables = table_1(generation) | tables_2_and_3(steps) | ladder(by["ladder"]) | pruning(by["pruning"])
    runs = learning_runs(by["finetuning"])
    return {
        "device": device or "no device",
        "model": model,
        "facts": facts(PRESETS["llama3.2-1b"]) | {"changed": f"{CHANGED:.0%}", "slower": f"{SLOWER:.0%}"},
        "figures": figures(generation, steps),
        "tables": tables | {"learning": learning(runs)},
        "charts": {"generation": generation_chart(generation), "loss": loss_charts(runs)},
        "comparisons": comparisons(by["comparison"]),
        "answers": [answers(row) for row in runs],
        "log": [loss_log(row) for row in runs],
        "code": {f"{file}:{name}": quote(root / file, name) for file, name in code},
    }


def like_the_newest(rows: Rows, key: Callable[[dict[str, Any]], Any]) -> list[dict[str, Any]]:
    """The rows with the newest one's key; others belong to another table."""
    return [row for row in rows if key(row) == key(rows[-1])]


# Small parts of tables


def value(row: dict[str, Any] | None, name: str, form: str, scale: float = 1.0) -> str:
    """A median as text; x where memory ran out."""
    if row is None:
        return NOT_MEASURED
    if not row["metrics"]:
        return OUT_OF_MEMORY
    return format(scale * row["metrics"][name]["median"], form) if name in row["metrics"] else NOT_MEASURED


def spread(row: dict[str, Any] | None, name: str, form: str) -> str:
    """Median (least to most)."""
    text = value(row, name, form)
    if text in (NOT_MEASURED, OUT_OF_MEMORY):
        return text
    found = row["metrics"][name]
    return f"{text} ({found['min']:{form}} to {found['max']:{form}})"


def ratio(row: dict[str, Any] | None, other: dict[str, Any] | None, name: str) -> str:
    """How many times the other's median this one's is."""
    for one in (row, other):
        if one is None or not one["metrics"]:
            return NOT_MEASURED if one is None else OUT_OF_MEMORY
        if name not in one["metrics"]:
            return NOT_MEASURED
    return f"{row['metrics'][name]['median'] / other['metrics'][name]['median']:.2f}"


def about(rows: Rows, experiment: str) -> dict[str, Any]:
    """On what, when and by which commands a table was measured; or by which it would be."""
    if not rows:
        return {"where": "Not measured on this device:", "commands": [COMMANDS[experiment]]}
    dtypes: dict[str, dict[str, None]] = {}
    for row in rows:
        dtypes.setdefault(setting(row), {})[row["dtype"]] = None
    settings = [f"{place}, {' and '.join(found)}" for place, found in dtypes.items()]
    days = sorted({row["time"][:10] for row in rows})
    dates = " to ".join(dict.fromkeys((days[0], days[-1])))
    repeats = sorted({spread["n"] for row in rows for name, spread in row["metrics"].items() if name in COUNTED})
    counts = " to ".join(str(n) for n in dict.fromkeys((repeats[0], repeats[-1]))) if repeats else ""
    what = "steps" if experiment in ("finetuning", STEPS) else "runs"
    runs = f"; medians of {counts} {what}" if repeats and repeats[-1] > 1 else ""
    limits = sorted({row["cell"]["memory_limit_gb"] for row in rows if row["cell"].get("memory_limit_gb")})
    held = "".join(f"; held to {limit:g} GB" for limit in limits)
    commands = list(dict.fromkeys(row["command"] for row in rows))
    return {"where": f"{'; '.join(settings)}{held}{runs}; {dates};", "commands": commands}


def made(head: Sequence[str], body: Sequence[Sequence[str]], rows: Rows, experiment: str) -> dict[str, Any]:
    return {"head": list(head), "rows": [list(line) for line in body], "about": about(rows, experiment)}


# Table 1


def table_1(rows: Rows) -> dict[str, Any]:
    """The course's Table 1, the same with floors, what bounds each cell, and the peers."""
    sizes = sorted({1, 8, 16} | {row["cell"]["batch_size"] for row in rows})
    cells = {(r["cell"]["engine"], r["cell"]["batch_size"], r["cell"]["use_cache"]): r for r in rows}
    ours = {key[1:]: row for key, row in cells.items() if key[0] == "llama"}
    course, floors, bounds = [], [], []
    for cache, title in ((True, "with KV cache"), (False, "without")):
        for label, name, form in (("peak memory (MB)", "peak_memory_mb", ",.0f"), ("runtime (s)", "runtime_s", ".2f")):
            course.append([f"{title}: {label}", *(value(ours.get((size, cache)), name, form) for size in sizes)])
    for size, cache in itertools.product(sizes, (True, False)):
        row, label = ours.get((size, cache)), [str(size), "on" if cache else "off"]
        floors.append([*label, spread(row, "runtime_s", ".2f"), value(row, "runtime_over_floor_x", ".2f")])
        for name, form, scale in (("ttft", ".3f", 1), ("tpot", ".1f", 1e3)):
            floors[-1] += [value(row, f"{name}_s", form, scale), value(row, f"{name}_over_floor_x", ".2f")]
        floors[-1].append(value(row, "peak_memory_over_floor_x", ".2f"))
        bounds.append([*label, *bound(row)])
    peers = [
        [str(size), engine, spread(row, "runtime_s", ".2f"), ratio(row, ours.get((size, True)), "runtime_s")]
        for (engine, size, _), row in sorted(cells.items(), key=lambda item: (item[0][1], item[0][0]))
        if engine != "llama"
    ]
    engines = [row for row in rows if row["cell"]["engine"] != "llama"]
    own = [row for row in rows if row["cell"]["engine"] == "llama"]
    size_heads = [f"batch {size}" for size in sizes]
    each = ["batch", "cache", "runtime (s)", "x floor", "first token (s)", "x floor", "each next (ms)", "x floor"]
    limits = ["batch", "cache", "prompt (s)", "a step (ms)", "reading (GB/s)", "products (TFLOP/s)", "largest part"]
    return {
        "table1": made([prompt_and_output(own), *size_heads], course, own, "inference"),
        "floors": made([*each, "memory x floor"], floors, own, "inference"),
        "bounds": made(limits, bounds, own, "inference"),
        "peers": made(["batch", "engine", "runtime (s)", "its runtime / ours"], peers, engines, "inference"),
    }


def prompt_and_output(rows: Rows) -> str:
    if not rows:
        return "256 + 32 tokens"
    return f"{rows[0]['cell']['input_len']} + {rows[0]['cell']['output_len']} tokens"


def bound(row: dict[str, Any] | None) -> list[str]:
    """The floors of the two parts of a generation, the rates they come from, and which part is the larger one."""
    names = (("floor_ttft_s", ".3f", 1), ("floor_tpot_s", ".1f", 1e3), ("read_gb_s", ".1f", 1))
    texts = [value(row, *name) for name in (*names, ("product_tflop_s", ".3f", 1))]
    if row is None or "floor_ttft_s" not in row["metrics"]:
        return [*texts, value(row, "floor_ttft_s", ".3f")]
    cell, floor = row["cell"], {name: row["metrics"][name]["median"] for name, *_ in names}
    is_prompt = floor["floor_ttft_s"] > (cell["output_len"] - 1) * floor["floor_tpot_s"]
    work = "products" if is_prompt or not cell["use_cache"] else "reading"
    return [*texts, f"{'prompt' if is_prompt else 'steps'}: {work}"]


# Tables 2 and 3


def flags(row: dict[str, Any]) -> tuple:
    """What tells the cells of benchmark_finetuning.py apart."""
    cell = row["cell"]
    names = ("engine", "lean", "half", "batch_size", "accumulation")
    return (*(cell[name] for name in names), *(cell[name] for name in TECHNIQUES))


def tables_2_and_3(rows: Rows) -> dict[str, Any]:
    """Tables 2 and 3, the latter also lean and over a 16-bit base; and what checkpointing buys."""
    cells = {flags(row): row for row in rows}

    def cell(*on: str, lean: bool = False, half: bool = False, batch: int = 1, accumulation: int = 1) -> Any:
        return cells.get(("llama", lean, half, batch, accumulation, *(name in on for name in TECHNIQUES)))

    choices = [
        [name for name, is_on in zip(TECHNIQUES, marks, strict=True) if is_on]
        for marks in itertools.product((False, True), repeat=3)
    ]
    titles = [*TECHNIQUES.values(), "peak memory (MB)", "a step (s)", "x floor", "foreseen (MB)"]
    found = {
        name: made(titles, [step_line(on, cell(*on, lean=name == "lean")) for on in choices], rows, STEPS)
        for name in ("plain", "lean")
    }
    base = [(on, lean) for on in (["lora"], ["checkpointing", "lora"]) for lean in (False, True)]
    lines = [
        ["yes" if lean else "no", *step_line(on, cell(*on, lean=lean, half=True))[:1]]
        + step_line(on, cell(*on, lean=lean, half=True))[3:]
        for on, lean in base
    ]
    found["half"] = made(["lean", "checkpointing", *titles[3:]], lines, rows, STEPS)
    kinds = [(name, {"lean": lean, "half": half}) for name, lean, half in VARIANTS]
    gains = [
        [name, " + ".join(TECHNIQUES[n] for n in on) or "neither", *gain(cell(*on, **kind), with_all)]
        for name, kind in kinds
        for on in choices
        if "checkpointing" not in on and not (kind["half"] and on != ["lora"])
        for with_all in [cell("checkpointing", *on, **kind)]
    ]
    head = ["mode", "with", "peak (MB)", "all recomputed (MB)", "a step (s)", "all recomputed (s)", "MB saved a second"]
    found["gain"] = made(head, gains, rows, STEPS)
    for accumulation in (1, 2):
        found[f"table2_{accumulation}"] = table_2(cell, accumulation, rows)
    ours = {half: cell(*on, lean=True, half=half) for half, on in ((False, ["amp"]), (True, ["lora"]))}
    peers = [
        [
            {"transformers": "transformers, mixed precision", "peft": "peft, LoRA over 16 bits"}[row["cell"]["engine"]],
            value(row, "peak_memory_mb", ",.0f"),
            spread(row, "step_s", ".2f"),
            ratio(row, ours[row["cell"]["half"]], "peak_memory_mb"),
            ratio(row, ours[row["cell"]["half"]], "step_s"),
        ]
        for row in cells.values()
        if row["cell"]["engine"] != "llama"
    ]
    engines = [row for row in rows if row["cell"]["engine"] != "llama"]
    head = ["peer", "peak (MB)", "a step (s)", "its memory / our lean mode's", "its time / our lean mode's"]
    return {**found, "step_peers": made(head, peers, engines, STEPS)}


def step_line(on: Sequence[str], row: dict[str, Any] | None) -> list[str]:
    """A line of Table 3."""
    marks = ["yes" if name in on else "no" for name in TECHNIQUES]
    peak, expected = (value(row, name, ",.0f") for name in ("peak_memory_mb", "expected_peak_memory_mb"))
    return [*marks, peak, value(row, "step_s", ".2f"), value(row, "step_over_floor_x", ".2f"), expected]


def gain(without: dict[str, Any] | None, recomputed: dict[str, Any] | None) -> list[str]:
    """Peak and time of a step with no block recomputed and with all, and the MB saved for a second of recomputing."""
    pair = (without, recomputed)
    texts = [value(row, "peak_memory_mb", ",.0f") for row in pair] + [value(row, "step_s", ".2f") for row in pair]
    if any(row is None or not {"peak_memory_mb", "step_s"} <= row["metrics"].keys() for row in pair):
        return [*texts, OUT_OF_MEMORY if OUT_OF_MEMORY in texts else NOT_MEASURED]
    saved = [a["median"] - b["median"] for a, b in (
        (without["metrics"]["peak_memory_mb"], recomputed["metrics"]["peak_memory_mb"]),
        (recomputed["metrics"]["step_s"], without["metrics"]["step_s"]),
    )]  # fmt: skip
    if saved[0] <= CHANGED * without["metrics"]["peak_memory_mb"]["median"]:
        return [*texts, "nothing saved"]
    return [*texts, f"{saved[0] / saved[1]:,.0f}" if saved[1] > 0 else "no slower"]


def table_2(cell: Callable[..., Any], accumulation: int, rows: Rows) -> dict[str, Any]:
    """What each technique does to each kind of memory and to a step, from pairs of rows."""
    base = cell(accumulation=accumulation)
    pairs = {title: (base, cell(name, accumulation=accumulation)) for name, title in TECHNIQUES.items()}
    if accumulation > 1:
        pairs = {"accumulation": (cell(batch=2), base), **pairs}
    lines = [
        [f"{kind} (MB)", *(changed(pair, lambda m, k=kind: most_mb(m, k), ",.0f", CHANGED) for pair in pairs.values())]
        for kind in KINDS
    ]
    for label, name, form, threshold in (
        ("computation (TFLOP)", "step_tflop", ".2f", CHANGED),
        ("peak of all (MB)", "peak_memory_mb", ",.0f", CHANGED),
        ("a step (s)", "step_s", ".2f", SLOWER),
    ):
        line = [changed(pair, lambda m, n=name: m[n]["median"], form, threshold) for pair in pairs.values()]
        lines.append([label, *line])
    return made(["", *pairs], lines, rows, STEPS)


def changed(pair: Sequence[Any], read: Callable[[Any], float], form: str, threshold: float) -> str:
    """An arrow and both values."""
    if any(row is None for row in pair):
        return NOT_MEASURED
    if not all(row["metrics"] for row in pair):
        return OUT_OF_MEMORY
    try:
        before, after = (read(row["metrics"]) for row in pair)
    except KeyError:  # the peak of a process, on a system that does not tell it
        return NOT_MEASURED
    return f"{arrow(before, after, threshold)} {before:{form}} to {after:{form}}"


# What was learned, the ladder, and pruning


def learning_runs(rows: Rows) -> list[dict[str, Any]]:
    """The newest run of each preset and model, real weights first; rows come oldest first."""
    newest = {(row["cell"]["model"], row["cell"]["preset"]): row for row in rows}
    return sorted(newest.values(), key=lambda row: (row["cell"]["model"] == "tiny", row["cell"]["preset"]))


def learning(rows: Rows) -> dict[str, Any]:
    """Held-out loss and right answers before and after, of each run."""
    lines = []
    for row in rows:
        right = [value(row, name, ".0f") for name in ("held_out_right_before", "held_out_right", "held_out_asked")]
        line = [row["cell"]["model"], row["cell"]["preset"], value(row, "held_out_loss_before_nats", ".3f")]
        line += [value(row, "held_out_loss_nats", ".3f"), *(f"{n} of {right[2]}" for n in right[:2])]
        lines.append([*line, str(row["metrics"]["step_s"]["n"]), value(row, "step_s", ".2f")])
    head = ["model", "preset", "held-out loss before", "after", "right before", "after", "steps", "a step (s)"]
    return made(head, lines, rows, "finetuning")


def ladder(rows: Rows) -> dict[str, Any]:
    """One change a row on the same work: speed, over the row it changes and over the first; memory, perplexity."""
    newest = like_the_newest(rows, lambda row: row["dtype"]) if rows else []
    cells = {(row["cell"]["model"], row["cell"]["row"]): row for row in newest}
    found = sorted(cells.items())
    lines = []
    for (model, number), row in found:
        cell = row["cell"]
        first = next(other for key, other in found if key[0] == model and other["cell"]["text"] == cell["text"])
        others = (None if cell["changes"] is None else cells.get((model, cell["changes"])), first)
        line = [model, f"{number}. {cell['name']}", str(cell["changes"] or "-"), cell["text"]]
        line += [value(row, "tokens_per_s", ",.0f"), *(ratio(other, row, "runtime_s") for other in others)]
        line += [value(row, "weights_mb", ",.1f"), value(row, "peak_memory_mb", ",.0f")]
        lines.append([*line, value(row, "perplexity_x", ".3f")])
        if cell["changes"] is None:
            lines[-1][5:7] = ["-", "-"]
    head = ["model", "what", "changes", "text", "tokens/s", "x that row", "x first", "weights (MB)", "peak (MB)"]
    return {"ladder": made([*head, "perplexity"], lines, newest, "ladder")}


def pruning(rows: Rows) -> dict[str, Any]:
    """Quality after pruning in rounds and at once, and the speed of what is left."""
    parts = {name: [row for row in rows if row["cell"]["part"] == name] for name in (*QUALITY, "speed")}
    quality = [
        [
            name,
            str(row["cell"].get("method", "-")),
            f"{row['cell'].get('share', 0):g}",
            str(row["cell"].get("steps", "-")),
            value(row, "parameters", ",.0f"),
        ]
        + [value(row, "stored_mb", ",.1f"), value(row, "loss_nats", ".3f")]
        for name in QUALITY
        for row in sorted(parts[name], key=lambda row: (str(row["cell"].get("method")), row["cell"].get("share", 0)))
    ]
    speed = [
        [row["cell"]["model"], f"{row['cell']['share']:g}", value(row, "parameters", ",.0f")]
        + [value(row, "stored_mb", ",.1f"), value(row, "ttft_s", ".1f", 1e3), value(row, "tpot_s", ".2f", 1e3)]
        for row in sorted(parts["speed"], key=lambda row: (row["cell"]["model"], row["cell"]["share"]))
    ]
    head = ["share taken out", "parameters", "stored (MB)"]
    measured = [row for name in QUALITY for row in parts[name]]
    return {
        "pruned": made(["how", "method", head[0], "steps", *head[1:], "held-out loss"], quality, measured, "pruning"),
        "pruned_speed": made(["model", *head, "first token (ms)", "each next (ms)"], speed, parts["speed"], "pruning"),
    }


# Figures in the text, curves, texts


def figures(generation: Rows, steps: Rows) -> dict[str, str]:
    """Single figures that sentences need."""
    cells = {(r["cell"]["batch_size"], r["cell"]["use_cache"]): r for r in generation if r["cell"]["engine"] == "llama"}
    found = {f"speedup_{n}": ratio(cells.get((n, False)), cells.get((n, True)), "runtime_s") for n in (1, 8, 16)}
    found |= {f"step_gb_{n}": value(cells.get((n, True)), "step_bytes_gb", ".2f") for n in (1, 8, 16)}
    plain = {flags(row): row for row in steps}.get(("llama", False, False, 1, 1, False, False, False))
    return found | {"full_peak": value(plain, "peak_memory_mb", ",.0f")}


def chart(title: str, x_label: str, curves: Rows, is_log: bool = False, x_ticks: Sequence[int] = ()) -> dict[str, Any]:
    """Curves with the range and the ticks of both axes; a tick is where it stands and how it is written."""
    xs, ys = ([float(point[axis]) for curve in curves for point in curve["points"]] for axis in (0, 1))
    x_range, y_range = widened(min(xs), max(xs)), widened(min(ys), max(ys), is_log)
    return {
        "title": title,
        "x_label": x_label,
        "log": is_log,
        "curves": list(curves),
        "x_range": x_range,
        "y_range": y_range,
        "x_ticks": [[x, str(x)] for x in x_ticks] or ticks(*x_range),
        "y_ticks": log_ticks(*y_range) if is_log else ticks(*y_range),
    }


def widened(low: float, high: float, is_log: bool = False) -> tuple[float, float]:
    """A range with some room around it."""
    if is_log:
        return low / 1.3, high * 1.3
    room = 0.05 * (high - low) or 0.5
    return low - room, high + room


def ticks(low: float, high: float) -> list[list[Any]]:
    """Three to eight multiples of 1, 2 or 5 times a power of ten."""
    unit = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = max(m * unit for m in (1, 2, 5) if m * unit <= (high - low) / 3)
    return [[i * step, f"{i * step:,.10g}"] for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[list[Any]]:
    """1, 2 and 5 times the powers of ten."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [[m * 10.0**e, f"{m * 10.0**e:,.10g}"] for e in powers for m in (1, 2, 5) if low <= m * 10.0**e <= high]


def generation_chart(rows: Rows) -> list[dict[str, Any]]:
    """Curves over the batch size: runtime and peak memory of the measured cells, each with its floor."""
    charts = []
    own = [row for row in rows if row["cell"]["engine"] == "llama"]
    sizes = sorted({row["cell"]["batch_size"] for row in own})
    for name, title, is_log in (("runtime_s", "runtime (s)", True), ("peak_memory_mb", "peak memory (MB)", False)):
        curves = []
        for cache, label in ((True, "with cache"), (False, "without")):
            for metric, kind in ((name, label), (f"floor_{name}", f"{label}: floor")):
                points = sorted(
                    (row["cell"]["batch_size"], row["metrics"][metric]["median"])
                    for row in own
                    if row["cell"]["use_cache"] is cache and metric in row["metrics"]
                )
                curves += [{"label": kind, "points": points}] if points else []
        charts += [chart(title, "batch size", curves, is_log, sizes)] if curves else []
    return charts


def loss_charts(rows: Rows) -> list[dict[str, Any]]:
    """Training and held-out loss over the steps of each run that kept them."""
    charts = []
    for row in rows:
        series = row.get("series", {})
        names = (("loss_nats", "training"), ("held_out_loss_nats", "held out"))
        curves = [{"label": label, "points": series[name]} for name, label in names if series.get(name)]
        if curves:
            charts.append(chart(f"{row['cell']['model']}, preset {row['cell']['preset']}", "optimizer step", curves))
    return charts


def loss_log(row: dict[str, Any]) -> dict[str, Any]:
    """The loss of some steps of a run, the first and the last among them."""
    points = row.get("series", {}).get("loss_nats", [])
    stride = max(1, math.ceil(len(points) / 12))
    chosen = [*points[:-1:stride], *points[-1:]]
    about_run = {"model": row["cell"]["model"], "preset": row["cell"]["preset"]}
    return about_run | {"points": [[str(step), f"{loss:.3f}"] for step, loss in chosen]}


def answers(row: dict[str, Any]) -> dict[str, Any]:
    """What the model answered before the run and after it."""
    found = row.get("series", {}).get("answers", [])
    return {"model": row["cell"]["model"], "preset": row["cell"]["preset"], "answers": found}


def comparisons(rows: Rows) -> list[dict[str, Any]]:
    """Texts with the cache and without, by dtype; the newest of each prompt."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["cell"]["what"] == "KV cache":
            groups.setdefault(f"{row['cell']['model']}, {row['dtype']}", []).append(row)
    return [
        {
            "title": title,
            "about": about(found, "comparison"),
            "n_equal": sum(row["series"]["text_on"] == row["series"]["text_off"] for row in found),
            "prompts": [
                {
                    "prompt": row["cell"]["prompt"],
                    **{name: row["series"][f"text_{name}"][0] for name in ("on", "off")},
                    "verdict": row["series"]["verdict"][0],
                    "seconds": [value(row, f"runtime_{name}_s", ".3f") for name in ("on", "off")],
                }
                for row in found
            ],
        }
        for title, found in groups.items()
    ]


# What follows from the shape alone, and the code itself


def facts(args: ModelArgs) -> dict[str, str]:
    """Counts and bytes of Llama 3.2 1B by arithmetic; no measuring is in them."""
    lora = LoRAConfig()
    widths = {"wq": args.dim, "wv": args.n_kv_heads * args.head_dim}
    trained = args.n_layers * sum(lora.r * (args.dim + widths[name]) for name in lora.targets)
    turns = [
        ROPE_ORIGINAL_CONTEXT / 2 / math.pi * args.rope_theta ** (-i / args.head_dim)
        for i in range(0, args.head_dim, 2)
    ]
    kept, slowed = sum(t > ROPE_HIGH_FREQ_FACTOR for t in turns), sum(t < ROPE_LOW_FREQ_FACTOR for t in turns)
    cached = args.forward_flops(256) + sum(args.forward_flops(1, start=256 + i) for i in range(31))
    uncached = sum(args.forward_flops(256 + i) for i in range(32))
    kv_token = args.kv_bytes_per_token(2)
    return {
        "n_params": f"{args.n_params():,}",
        "weights_16": f"{args.weight_bytes(2) / 1e6:,.1f}",
        "weights_32": f"{args.weight_bytes(4) / 1e6:,.1f}",
        "embedding": f"{args.vocab_size * args.dim:,}",
        "kv_values": f"{kv_token // 2:,}",
        "kv_token": f"{kv_token:,}",
        "kv_token_mha": f"{kv_token * args.n_heads // args.n_kv_heads:,}",
        "kv_288": f"{288 * kv_token / 1e6:.2f}",
        "kv_context": f"{args.trained_context * kv_token / 1e9:.1f}",
        "kv_context_mha": f"{args.trained_context * kv_token * args.n_heads // args.n_kv_heads / 1e9:.1f}",
        "cached_tflop": f"{cached / 1e12:.3f}",
        "uncached_tflop": f"{uncached / 1e12:.2f}",
        "flop_ratio": f"{uncached / cached:.1f}",
        "prompt_ratio": f"{uncached / args.forward_flops(256):.1f}",
        "token_gflop": f"{args.forward_flops(1, start=271) / 1e9:.2f}",
        "logits_mb": f"{16 * 256 * args.vocab_size * 6 / 1e6:,.0f}",
        "lora_params": f"{trained:,}",
        "lora_share": f"{trained / (args.n_params() + trained):.4%}",
        "rope_kept": str(kept),
        "rope_blended": str(len(turns) - kept - slowed),
        "rope_slowed": str(slowed),
    }


def quote(path: Path, name: str) -> str:
    """The source of a function, `name` or `Class.name`, without docstrings. Raises InputError where there is none."""
    try:
        source = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be quoted: {error.strerror}; correct the report's source") from None
    node: Any = ast.parse(source)
    for part in name.split("."):
        inner = (child for child in node.body if getattr(child, "name", None) == part)
        node = next(inner, None)
        if node is None:
            raise InputError(f"{path} has no {name}; correct the report's source")
    lines = source.splitlines()
    skipped = range(0)
    if ast.get_docstring(node):
        skipped = range(node.body[0].lineno, node.body[0].end_lineno + 1)
    kept = [lines[i - 1] for i in range(node.lineno, node.end_lineno + 1) if i not in skipped]
    return "\n".join(line[node.col_offset :] for line in kept)
