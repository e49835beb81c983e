"""The results page: every measured row as tables and charts, and a replay of generation with and without the KV cache.

    python -m reports.page.build     # reports/results/*.jsonl -> reports/index.html, which needs no network
    python -m benchmarks.replay           # records what the replay shows; see there

The page says nothing that no row says. Each figure names its row (point at it), ratios name both; what was not measured
is said to be so. Experiments that have no section of their own come as plain tables of their rows. The parts are in
reports/page/: reading rows, markup, charts, style and the replay's script.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from llama import cli
from llama.errors import EnvironmentFailure
from reports.formats import CHANGED, KINDS, SLOWER, arrow
from reports.page import charts
from reports.page.charts import Bar, Line, Point
from reports.page.markup import Html, figure, heading, joined, number, provenance, ratio, spread, table, tag
from reports.page.rows import Row, group, read_folder

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "reports" / "results"
PAGE = ROOT / "reports" / "index.html"
PARTS = ROOT / "reports" / "page"
TECHNIQUES = {"checkpointing": "checkpointing", "amp": "mixed precision", "lora": "LoRA"}
CATEGORIES = ("weights", "optimizer", "gradients", "copies", "activations", "temporary")
QUANTIZED = ("int8", "int4")
# Ways to the same share, in the order of their columns, and how each is drawn.
WAYS = {"one-shot": "a", "one-round": "c", "iterative": "b"}
PLAIN = {"lean": False, "half": False, "batch_size": 1, "accumulation": 1, "engine": "llama"}
OTHERS = {"tiny": "The embedded models"}  # an experiment without a section of its own stands under its name
Section = tuple[str, str, Html]  # an anchor, a title, and what stands under it
NOT_MEASURED = tag("p", "Not measured yet.", class_="none")


def main(*, results: str | None = None, page: str | None = None) -> None:
    """Make the results page from measured rows.

    Args:
        results: folder of *.jsonl files; default: reports/results.
        page: file to write; default: reports/index.html.
    """
    rows = read_folder(Path(results) if results is not None else RESULTS)
    path = Path(page) if page is not None else PAGE
    write(path, render(rows))
    print(f"{sum(map(len, rows.values()))} rows of {len(rows)} experiments in {path}")


def write(path: Path, text: str) -> None:
    """The whole page or the old one, never half of it."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        raise EnvironmentFailure(f"cannot write {path}: {error.strerror}; choose another --page") from None
    finally:
        scratch.unlink(missing_ok=True)


def render(rows: dict[str, list[Row]]) -> str:
    """The page as text, the same for the same rows."""
    known = ["replay", "inference", "benchmark_finetuning", "finetuning", "loading", "formats", "ladder", "kernels"]
    known += ["pruning"]
    found = {name: rows.get(name, []) for name in known}
    sections: list[Section] = [
        ("replay", "Cached against uncached, as it ran", replays(found["replay"])),
        ("table-1", "Table 1: memory and runtime of generation", table_1(found["inference"])),
        ("table-2", "Table 2: what each technique does to memory and time", table_2(found["benchmark_finetuning"])),
        ("table-3", "Table 3: combinations of techniques", table_3(found["benchmark_finetuning"])),
        ("fine-tuning", "Fine-tuning: does it learn", fine_tuning(found["finetuning"])),
        ("loading", "Loading", loading(found["loading"])),
        ("formats", "Generation with quantized weights", formats(found["formats"])),
        ("ladder", "The ladder: one change a row", ladder(found["ladder"])),
        ("kernels", "Kernels: each beside the plain PyTorch that it equals", kernels(found["kernels"])),
        ("pruning", "Pruning: size against quality and speed", pruning(found["pruning"])),
        *[
            (name, OTHERS.get(name, name.replace("_", " ").capitalize()), plain(rows[name]))
            for name in rows
            if name not in known
        ],
    ]
    parts = [introduction(rows, sections)]
    for anchor, title, content in sections:
        parts.append(tag("section", tag("h2", title, id=anchor), content, aria_labelledby=anchor))
    style, script = ((PARTS / name).read_text(encoding="utf-8") for name in ("style.css", "replay.js"))
    template = Template((PARTS / "template.html").read_text(encoding="utf-8"))
    return template.substitute(style=style, script=script, body=joined(parts, "\n"))


def introduction(rows: dict[str, list[Row]], sections: Sequence[Section]) -> Html:
    """What this is, on what it was measured, and where it goes from here."""
    devices = dict.fromkeys(row.data["device"]["name"] for part in rows.values() for row in part)
    where = f"Measured on: {'; '.join(devices)}." if devices else "Nothing has been measured yet."
    if not any("P100" in name for name in devices):
        where += " The target, a P100, has not been measured."
    links = [tag("li", tag("a", title, href=f"#{anchor}")) for anchor, title, _ in sections]
    about = (
        "Every figure here is read from a measured row in reports/results: point at one to see the file, the line and "
        "the spread of its runs. Figures are medians, MB are millions of bytes, and x stands for out of memory."
    )
    head = tag("h1", "Llama 3.2 1B on one small GPU: what was measured")
    return joined([head, tag("p", about), tag("p", where), tag("nav", tag("ul", *links), aria_label="Sections")])


# The replay


def replays(rows: Sequence[Row]) -> Html:
    """Side by side, the newest recording of each prompt with the cache and without."""
    parts = []
    for found in group(rows, "model", "prompt"):
        sides = {row.cell.get("use_cache"): row for row in found if row.data.get("series", {}).get("token_s")}
        if set(sides) == {True, False}:
            parts.append(replay(f"replay-{len(parts) + 1}", sides[True], sides[False]))
    about = tag("p", "Both sides of a replay share one clock. Rates count the time of the prompt, too.")
    return joined([about, *parts]) if parts else NOT_MEASURED


def replay(name: str, on: Row, off: Row) -> Html:
    """Two recorded runs and the buttons that play them; without a script, how they ended."""
    if "text" in on.data["series"]:
        title = "The embedded model: text"
        about = (
            "Greedy decoding of one prompt; both sides write the same tokens. Each appears at the second it was there."
        )
    else:
        title = f"The shape of {on.cell['model']}: steps"
        about = (
            f"{on.cell['output_len']} tokens after a prompt of {on.cell['input_len']}, one box a token. The weights "
            "are random, so there is no text; the work, and its time, is that of the real model."
        )
    speeds = [
        tag(
            "label", Html(f'<input type="radio" name="{name}" value="{speed}"{" checked" * (speed == 1)}>'), f"{speed}x"
        )
        for speed in (1, 4)
    ]
    controls = tag(
        "div",
        tag("button", "Play", type="button", class_="toggle"),
        tag("button", "Restart", type="button", class_="restart"),
        tag("fieldset", tag("legend", "Speed"), *speeds),
        class_="controls",
        hidden="",
    )
    sides = tag("div", side("with KV cache", on), side("without", off), class_="sides")
    parts = [tag("h3", title), tag("p", about), controls, sides, provenance([on, off])]
    return tag("div", *parts, class_="replay", id=name)


def side(title: str, row: Row) -> Html:
    """One run: its time, its tokens and its rate, and the tokens with their seconds."""
    seconds, series = row.data["series"]["token_s"], row.data["series"]
    file = row.source("series.token_s")
    rate = joined([ratio(row, "cell.output_len", row, "metrics.replayed_s.median"), " tokens/s"])
    count = tag("data", len(seconds), value=len(seconds), data_from=row.source("cell.output_len"))
    figures = {"time": joined([figure(row, "replayed_s"), " s"]), "count": count, "rate": rate}
    labels = {"time": "time", "count": "tokens", "rate": "rate"}
    summary = [tag("div", tag("dt", labels[key]), tag("dd", value, class_=key)) for key, value in figures.items()]
    if "text" in series:
        tokens = [
            tag("span", text, data_s=second, class_="there")
            for text, second in zip(series["text"], seconds, strict=True)
        ]
        content = tag("p", tag("span", row.cell["prompt"], class_="prompt"), *tokens, class_="text", data_series=file)
    else:
        boxes = [tag("span", data_s=second, class_="there") for second in seconds]
        content = tag("div", *boxes, class_="cells", data_series=file, aria_hidden="true")
    use = "on" if row.cell["use_cache"] else "off"
    return tag("div", tag("h4", title), tag("dl", *summary), content, class_="side", data_cache=use, data_state="done")


# Table 1


def table_1(rows: Sequence[Row]) -> Html:
    """Peak memory and runtime by batch size, their floors, and the peers; a set of tables for each setting."""
    parts = []
    for i, found in enumerate(group(rows, "model", "input_len", "output_len", "memory_limit_gb"), 1):
        found = sorted(found, key=_order_1)
        parts += [course_1(found), curves_1(f"inference-{i}", found), details_1(found), provenance(found)]
    return joined(parts) if parts else NOT_MEASURED


def _order_1(row: Row) -> tuple[Any, ...]:
    cell = row.cell
    return cell["batch_size"], cell["engine"], not cell["use_cache"]


def _chosen(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row.cell.get(name) == value for name, value in wanted.items())]


def course_1(rows: Sequence[Row]) -> Html:
    """Table 1 in the course's form, with a line for each floor."""
    sizes = sorted({row.cell["batch_size"] for row in rows})
    body = []
    for use_cache, title in ((True, "with KV cache"), (False, "without")):
        by_size = {row.cell["batch_size"]: row for row in _chosen(rows, engine="llama", use_cache=use_cache)}
        names = {"peak memory (MB)": "peak_memory_mb", "least possible (MB)": "floor_peak_memory_mb"}
        names |= {"runtime (s)": "runtime_s", "least possible (s)": "floor_runtime_s"}
        for label, name in names.items() if by_size else ():
            values = [figure(by_size[size], name) if size in by_size else Html("-") for size in sizes]
            body.append([f"{title}: {label}", *values])
    cell = rows[0].cell
    caption = f"{cell['model']}: {cell['output_len']} tokens after prompts of {cell['input_len']}"
    note = tag(
        "p",
        "The least possible follows from rates measured in the same round: a step reads each weight and all keys and "
        "values once at the best reading rate, a prompt takes its FLOPs at the rate of the network's own largest "
        "products, and memory is weights, cache and one row of logits each.",
    )
    return table(caption, ["", *[f"batch {size}" for size in sizes]], body, note, narrow="stay")


def curves_1(name: str, rows: Sequence[Row]) -> Html:
    """Runtime and memory over batch size."""
    sets = [("with cache", "a", {"engine": "llama", "use_cache": True})]
    sets += [("without", "b", {"engine": "llama", "use_cache": False})]
    sets += [("transformers", "c", {"engine": "transformers", "use_cache": True})]
    drawn = []
    for metric, title, log in (
        ("runtime_s", "Runtime (s), logarithmic", True),
        ("peak_memory_mb", "Peak memory (MB)", False),
    ):
        series = []
        for label, look, wanted in sets:
            for key, words, style in ((metric, label, look), (f"floor_{metric}", f"{label}: least", f"{look} floor")):
                points = [Point.of(row.cell["batch_size"], row, key) for row in _chosen(rows, **wanted) if row.has(key)]
                series += [Line(words, points, style)] if points else []
        if series:
            about = (
                f"{title.split(',')[0]} by batch size for {', '.join(line.name for line in series)}; as in the tables."
            )
            drawn.append(charts.lines(f"{name}-{metric.split('_')[0]}", title, about, "batch size", series, log))
    return tag("div", *drawn, class_="charts")


def formats(rows: Sequence[Row]) -> Html:
    """The same work with weights of several formats."""
    parts = []
    for found in group(rows, "model", "input_len", "output_len", "memory_limit_gb"):
        cell = found[0].cell
        caption = f"{cell['model']}: {cell['output_len']} tokens after prompts of {cell['input_len']}"
        parts += [details_1(sorted(found, key=_order_1), caption), provenance(found)]
    return joined(parts) if parts else NOT_MEASURED


def details_1(rows: Sequence[Row], caption: str = "Behind it, and beside others") -> Html:
    """Every cell with its spread, its ratio to the floor, and its time against ours with the cache, not quantized."""
    whole = [row for row in _chosen(rows, engine="llama", use_cache=True) if row.cell.get("weights") not in QUANTIZED]
    ours = {row.cell["batch_size"]: row for row in whole}
    has_formats = len({row.cell.get("weights") for row in rows}) > 1
    head = ["cell", "runtime (s)", "runtime, x least", "first token (s)", "first token, x least", "each next (ms)"]
    head += ["each next, x least", "memory, x least", "its time / ours"]
    body = []
    for row in rows:
        cell, own = row.cell, ours.get(row.cell["batch_size"])
        label = f"batch {cell['batch_size']}, {cell['engine']}"
        label += f", cache {'on' if cell['use_cache'] else 'off'}" if cell["engine"] == "llama" else ""
        label += f", {cell['weights']}" if has_formats else ""
        times = [figure(row, "runtime_over_floor_x"), figure(row, "ttft_s"), figure(row, "ttft_over_floor_x")]
        times += [figure(row, "tpot_s", 1e3), figure(row, "tpot_over_floor_x")]
        runtime = "metrics.runtime_s.median"
        against = ratio(row, runtime, own, runtime) if own else Html("-")
        body.append([label, spread(row, "runtime_s"), *times, figure(row, "peak_memory_over_floor_x"), against])
    return table(caption, head, body)


# Tables 2 and 3


def table_2(rows: Sequence[Row]) -> Html:
    """What each technique does to each kind of memory and to time, from pairs of rows."""
    parts = []
    for found in group(rows, "model", "seq_len", "memory_limit_gb", dtype=False):
        for accumulation in (1, 2):
            parts += pairs_2(found, accumulation)
    if not parts:
        return NOT_MEASURED
    note = (
        f"An arrow is a change of more than {CHANGED:.0%} of memory or computation, of {SLOWER:.0%} of a step's time. "
        "Parameters include their copies in 16 bits; each kind is at its own highest moment."
    )
    return joined([*parts, tag("p", note)])


def pairs_2(rows: Sequence[Row], accumulation: int) -> list[Html]:
    """Table 2 for steps of one batch, or of two; nothing where a row of a pair was not measured."""

    def cell(**changes: Any) -> Row | None:
        wanted = {**PLAIN, **dict.fromkeys(TECHNIQUES, False), **changes}
        return next((row for row in _chosen(rows, **wanted) if row.metrics), None)

    base = cell(accumulation=accumulation)
    pairs = {title: (base, cell(accumulation=accumulation, **{name: True})) for name, title in TECHNIQUES.items()}
    if accumulation > 1:
        pairs = {"accumulation (1 x 2 to 2 x 1)": (cell(batch_size=2), base), **pairs}
    if not all(before and after for before, after in pairs.values()):
        return []
    lines = [(f"{kind} (MB)", [f"{name}_most_mb" for name in names], CHANGED) for kind, names in KINDS.items()]
    lines += [("peak of all (MB)", ["peak_memory_mb"], CHANGED), ("computation (TFLOP)", ["step_tflop"], CHANGED)]
    lines += [("a step (s)", ["step_s"], SLOWER)]
    body = [[label, *[change(*pair, names, least) for pair in pairs.values()]] for label, names, least in lines]
    caption = (
        f"{base.cell['model']}, {base.cell['seq_len']} tokens: {'with' if accumulation > 1 else 'without'} accumulation"
    )
    used = list({row.source(""): row for pair in pairs.values() for row in pair}.values())
    return [table(caption, ["", *pairs], body), provenance(used)]


def change(before: Row, after: Row, names: Sequence[str], least: float) -> Html:
    """An arrow beyond the threshold, and both figures; where a kind has several parts, their sums."""
    if not all(row.has(*names) for row in (before, after)):
        return Html("-")
    sums = [sum(row.median(name) for name in names) for row in (before, after)]
    shown = []
    for row, value in zip((before, after), sums, strict=True):
        source = " + ".join(row.source(f"metrics.{name}.median") for name in names)
        shown.append(tag("data", number(value), value=value, data_from=source, title=source))
    return joined([tag("span", arrow(*sums, least), class_="sign"), " ", shown[0], " to ", shown[1]])


def table_3(rows: Sequence[Row]) -> Html:
    """Memory and time of a step for each combination, plain and lean, and then every other cell."""
    parts = []
    for i, found in enumerate(group(rows, "model", "seq_len", "memory_limit_gb", dtype=False), 1):
        found = sorted(found, key=_order_3)
        for lean in (False, True):
            parts += course_3(_chosen(found, **{**PLAIN, "lean": lean}), lean)
        single = _chosen(found, batch_size=1, accumulation=1)
        parts += [bars_3(f"step-{i}", single), details_3(found), provenance(found)]
    return joined(parts) if parts else NOT_MEASURED


def _order_3(row: Row) -> tuple[Any, ...]:
    names = ("half", "lean", "accumulation", "batch_size", "lora", "amp", "checkpointing")
    return row.cell.get("engine") != "llama", *(row.cell.get(name, 0) for name in names)


def course_3(rows: Sequence[Row], lean: bool) -> list[Html]:
    """Table 3 in the course's form."""
    if not rows:
        return []
    body = []
    for row in rows:
        marks = ["yes" if row.cell[name] else "no" for name in TECHNIQUES]
        body.append([*marks, figure(row, "peak_memory_mb"), figure(row, "step_s")])
    cell = rows[0].cell
    caption = f"{cell['model']}, {cell['seq_len']} tokens a step, {'lean' if lean else 'plain'}"
    head = [*TECHNIQUES.values(), "peak memory (MB)", "a step (s)"]
    return [table(caption, head, body, narrow="stay")]


def _label_3(row: Row) -> str:
    """A cell in words, as benchmark_finetuning.py calls it."""
    cell = row.cell
    names = [name for name in ("lean", "half", *TECHNIQUES) if cell.get(name)]
    size = f"{cell['accumulation']} x {cell['batch_size']}" if cell["accumulation"] * cell["batch_size"] > 1 else ""
    return ", ".join(part for part in (cell["engine"], size, " + ".join(names) or "plain") if part)


def bars_3(name: str, rows: Sequence[Row]) -> Html:
    """Where memory is at the peak, beside the measured peak; and the time of a step beside its least."""
    memory, time = [], []
    for row in rows:
        label = _label_3(row).removeprefix("llama, ")
        at_peak = [(kind, f"{kind}_at_peak_mb") for kind in CATEGORIES if row.has(f"{kind}_at_peak_mb")]
        parts = [(kind, row.median(key), row.source(f"metrics.{key}.median")) for kind, key in at_peak]
        peak = "peak_memory_mb"
        mark = (row.median(peak), row.source(f"metrics.{peak}.median")) if row.has(peak) else None
        memory += [Bar(label, [part for part in parts if part[1]], mark)] if parts or mark else []
        if row.has("step_s"):
            least = "floor_step_s"
            mark = (row.median(least), row.source(f"metrics.{least}.median")) if row.has(least) else None
            time.append(Bar(label, [("a step", row.median("step_s"), row.source("metrics.step_s.median"))], mark))
    drawn = []
    if memory:
        about = (
            "Memory at the peak of a step by what it holds, for each combination; the table holds the measured peaks."
        )
        drawn.append(charts.bars(f"{name}-memory", "Memory at the peak (MB)", about, memory, "measured peak"))
    if time:
        about = "Time of a step for each combination beside the least that its matrix products take; as in the table."
        drawn.append(charts.bars(f"{name}-time", "Time of a step (s)", about, time, "least possible"))
    return tag("div", *drawn, class_="charts")


def details_3(rows: Sequence[Row]) -> Html:
    """Every cell with its spread and its floor; the peers beside our lean mode, which does the same work."""
    head = ["cell", "a step (s)", "x least", "peak (MB)", "foreseen (MB)", "its time / ours"]
    names = ("step_over_floor_x", "peak_memory_mb", "expected_peak_memory_mb")
    body = []
    for row in rows:
        same = {name: row.cell.get(name) for name in (*TECHNIQUES, "half", "batch_size", "accumulation")}
        ours = _chosen(rows, **same, engine="llama", lean=True) if row.cell["engine"] != "llama" else []
        step = "metrics.step_s.median"
        against = ratio(row, step, ours[0], step) if ours else Html("-")
        body.append([_label_3(row), spread(row, "step_s"), *[figure(row, name) for name in names], against])
    return table("Every cell", head, body)


# Fine-tuning, loading, and whatever else was measured


def fine_tuning(rows: Sequence[Row]) -> Html:
    """What each run came to, and its losses."""
    parts = []
    for i, found in enumerate(group(rows, "model"), 1):
        head = [
            "preset",
            "held-out loss before (nats)",
            "loss after",
            "right before",
            "right after",
            "of",
            "steps",
            "a step (ms)",
        ]
        names = (
            "held_out_loss_before_nats",
            "held_out_loss_nats",
            "held_out_right_before",
            "held_out_right",
            "held_out_asked",
        )
        body = []
        for row in found:
            steps = figure(row, "step_s", stat="n")
            values = [figure(row, name) for name in names]
            body.append([row.cell.get("preset", ""), *values, steps, figure(row, "step_s", 1e3)])
        parts += [table(f"{found[0].cell['model']}: before and after", head, body)]
        parts += [losses(f"loss-{i}", found), provenance(found)]
    return joined(parts) if parts else NOT_MEASURED


def losses(name: str, rows: Sequence[Row]) -> Html:
    """Training and held-out loss over steps, a chart for each run; nothing where no run kept its losses."""
    drawn = []
    for i, row in enumerate(rows):
        series = row.data.get("series", {})
        kinds = (("loss_nats", "training", "c"), ("held_out_loss_nats", "held out", "a"))
        curves = []
        for key, label, look in kinds:
            points = [Point(x, y, row.source(f"series.{key}.{n}.1")) for n, (x, y) in enumerate(series.get(key, []))]
            curves += [Line(label, points, look)] if points else []
        if curves:
            title = f"{row.cell.get('preset', 'run')}: loss (nats a label token)"
            about = "Training loss at every step, and held-out loss where it was looked at; the table has its ends."
            drawn.append(charts.lines(f"{name}-{i}", title, about, "optimizer step", curves))
    if not drawn:
        return tag("p", "The losses of single steps were not kept.", class_="none")
    return tag("div", *drawn, class_="charts")


def loading(rows: Sequence[Row]) -> Html:
    """How long a checkpoint takes until it is there, and how much memory."""
    head = ["layout", "stored as", "loaded as", "returns after (s)", "ready after (s)", "peak memory (MB)", "x weights"]
    parts = []
    models: dict[str, list[Row]] = {}
    for row in rows:
        models.setdefault(str(row.cell.get("model")), []).append(row)
    for model, found in models.items():
        body = []
        for row in found:
            names = ("load_s", "ready_s", "peak_memory_mb", "peak_over_weights_x")
            values = [figure(row, name) for name in names]
            body.append([row.cell.get("layout"), row.cell.get("stored"), row.data["dtype"], *values])
        note = tag(
            "p", "Each load in a fresh process, its file in the page cache. Ready: every weight has been read once."
        )
        parts += [table(model, head, body, note), provenance(found)]
    return joined(parts) if parts else NOT_MEASURED


def ladder(rows: Sequence[Row]) -> Html:
    """One change a row on the same work: time, memory, perplexity, and the test that licenses it."""
    head = ["row", "what", "changes", "text", "runtime (s)", "x that row", "same tokens"]
    head += ["weights (MB)", "peak (MB)", "perplexity", "accepted", "tokens a round"]
    names = ("tokens_equal", "weights_mb", "peak_memory_mb", "perplexity_x", "acceptance", "tokens_a_round")
    runtime = "metrics.runtime_s.median"
    parts = []
    for found in group(rows, "model"):
        body = []
        for row in sorted(found, key=lambda row: row.cell["row"]):
            cell, changed = row.cell, _chosen(found, row=row.cell["changes"])
            what = tag("span", cell["name"], title=f"held by {row.data['series']['test'][0]}")
            faster = ratio(changed[0], runtime, row, runtime) if changed else Html("-")
            figures = [spread(row, "runtime_s"), faster, *[figure(row, name) for name in names]]
            body.append([str(cell["row"]), what, str(cell["changes"] or "-"), cell["text"], *figures])
        parts += [table(str(found[0].cell["model"]), head, body), provenance(found)]
    note = tag("p", "Point at a row's name to see the test that holds it. Same tokens: as the row that it changes.")
    return joined([*parts, note]) if parts else NOT_MEASURED


def kernels(rows: Sequence[Row]) -> Html:
    """Every operation in both forms, by the part of the work that it belongs to."""
    head = ["operation", "operands", "kernel (ms)", "plain (ms)", "x as fast", "x as F.linear in 16 bits", "GB/s"]
    head += ["of reading"]
    names = ("plain_over_kernel_x", "linear_over_kernel_x", "moved_gb_s", "of_reading_x")
    parts = []
    for found in group(rows, "model", "part"):
        body = []
        for twin in _chosen(found, engine="plain"):
            cell = twin.cell
            same = {name: cell.get(name) for name in ("operation", "shape", "weights")}
            ours = _chosen(found, **same, engine="kernel")
            what = tag("span", cell["operation"], title=f"held equal by {cell['equality']}")
            what = joined([what, f", {cell['weights']}"]) if cell.get("weights") else what
            own = spread(ours[0], "run_s", 1e3) if ours else Html("-")
            rates = [figure(ours[0], name) if ours else Html("-") for name in names]
            body.append([what, cell["shape"], own, spread(twin, "run_s", 1e3), *rates])
        parts += [table(f"{found[0].cell['model']}: {found[0].cell['part']}", head, body), provenance(found)]
    note = tag("p", "Point at an operation to see the test that holds both forms equal.")
    return joined([*parts, note]) if parts else NOT_MEASURED


def pruning(rows: Sequence[Row]) -> Html:
    """Loss by share for each method, the ways to the same size beside each other; then the speed of what is smaller."""
    about = (
        "Iterative: cut a little, fine-tune, again. One-shot: the same cut at once, then the steps of all those rounds "
        "together; one-round: then the steps of one of them."
    )
    parts = []
    quality = [row for row in rows if row.has("loss_nats")]
    dense = _chosen(quality, method="none")
    methods = dict.fromkeys(row.cell["method"] for row in quality if row not in dense)
    for method in methods:
        found = _chosen(quality, method=method)
        parts += [loss_by_share(method, found), provenance([*found, *dense])]
    if dense:
        values = [joined([figure(row, "loss_nats"), f" after {row.cell['steps']} steps"]) for row in dense]
        parts.append(tag("p", "The dense model, in nats: ", joined(values, ", "), "."))
    for found in group([row for row in rows if row.has("tpot_s")], "model"):
        parts += [speed_by_size(found), provenance(found)]
    return joined([tag("p", about), *parts]) if parts else NOT_MEASURED


def loss_by_share(method: str, rows: Sequence[Row]) -> Html:
    """What each way comes to at each share: one-shot with the steps of all rounds, with those of one, and iterative."""
    ways = {way: found for way in WAYS if (found := _chosen(rows, part=way))}
    head = ["share", "parameters", "zeros", *[f"{way} (nats)" for way in ways]]
    body, curves = [], []
    for share in sorted({row.cell["share"] for row in rows}):
        here = [_chosen(found, share=share) for found in ways.values()]
        one = next(found[0] for found in here if found)
        values = [figure(found[0], "loss_nats") if found else Html("-") for found in here]
        body.append([str(share), figure(one, "parameters"), figure(one, "zeros"), *values])
    for way, found in ways.items():
        ordered = sorted(found, key=lambda row: row.cell["share"])
        curves.append(Line(way, [Point.of(row.cell["share"], row, "loss_nats") for row in ordered], WAYS[way]))
    title = f"{method}: validation loss (nats)"
    about = f"Validation loss by the share that {method} pruning took, for {', '.join(ways)}; as in the table."
    chart = charts.lines(f"pruning-{method}", title, about, "share pruned", curves)
    caption = f"{rows[0].cell['model']}: {method}"
    return joined([table(caption, head, body, narrow="stay"), tag("div", chart, class_="charts")])


def speed_by_size(rows: Sequence[Row]) -> Html:
    """First token and decode step of a model with fewer and fewer hidden units, over those of the whole one."""
    ordered = sorted(rows, key=lambda row: row.cell["share"])
    whole, model = ordered[0], str(ordered[0].cell["model"])
    head = ["share", "parameters", "stored (MB)", "first token (ms)", "x as fast", "each next (ms)", "x as fast"]
    body = []
    for row in ordered:
        values = [str(row.cell["share"]), figure(row, "parameters"), figure(row, "stored_mb")]
        for name in ("ttft_s", "tpot_s"):
            key = f"metrics.{name}.median"
            values += [spread(row, name, 1e3), ratio(whole, key, row, key)]
        body.append(values)
    lines = [Line("each next", [Point.of(row.median("stored_mb"), row, "tpot_s") for row in ordered[::-1]], "a")]
    lines += [
        Line("least", [Point.of(row.median("stored_mb"), row, "floor_tpot_s") for row in ordered[::-1]], "a floor")
    ]
    about = (
        "Seconds of a decode step by the size of the checkpoint, and the least that reading it takes; as in the table."
    )
    chart = charts.lines(f"pruning-{model.replace('.', '-')}", "A decode step (s)", about, "stored (MB)", lines)
    return joined([table(f"{model}: speed", head, body), tag("div", chart, class_="charts")])


def plain(rows: Sequence[Row]) -> Html:
    """Rows of any experiment: what tells them apart, then every metric that was measured."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(" ".join(sorted(row.cell)), []).append(row)
    parts = []
    for found in kinds.values():
        about = [{**row.cell, "dtype": row.data["dtype"], "device": row.data["device"]["name"]} for row in found]
        told = {name: [_words(cell[name]) for cell in about] for name in about[0]}
        apart = [name for name, values in told.items() if len(set(values)) > 1] or list(about[0])[:1]
        same = [f"{name.replace('_', ' ')} {told[name][0]}" for name in found[0].cell if name not in apart]
        metrics = list(dict.fromkeys(name for row in found for name in row.metrics))
        heads = [heading(name, found) for name in metrics]
        body = []
        for i, row in enumerate(found):
            values = [figure(row, name, scale) for name, (_, scale) in zip(metrics, heads, strict=True)]
            body.append([*[told[name][i] for name in apart], *values])
        head = [*[name.replace("_", " ") for name in apart], *[title for title, _ in heads]]
        parts += [table("; ".join(same) or "All rows", head, body), provenance(found)]
    return joined(parts)


def _words(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    cli.run(main)
