"""From measured rows of fine-tuning to tables: Tables 2 and 3, every step in detail, what a run has learned.

Each function is made like those of tables.py, which names the tables of every experiment.
"""

from __future__ import annotations

import functools
import math
import operator
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks.rows import Row
from llama.training import memory
from reports.cells import OUT_OF_MEMORY, Cell, Figure, Table, chosen, computed, figure, newest, ratio
from reports.columns import RELATIVE, Column, line_per_row, metric, per_setting, relative, runs, word

TECHNIQUES = {"checkpointing": "checkpointing", "amp": "mixed precision", "lora": "LoRA"}
PLAIN = {"lean": False, "half": False, "batch_size": 1, "accumulation": 1, "engine": "llama"}
LONGEST = 200  # characters of a text in a table
LINKS = {"PCIe 3 x16": 12.0, "100 Gbit/s network": 12.5, "NVLink 4": 450.0}  # GB/s, nominal, in one direction
PLANNED = "Arithmetic, nothing measured: without the CUDA context and what libraries allocate inside."
CHANGED, SLOWER = 0.03, 0.05  # of memory or computation, of time: a smaller change is no arrow in Table 2
# What the course calls a kind of memory, in metrics by the categories of llama/training/memory.py.
KINDS = {"parameters": ["weights_most_mb", "copies_most_mb"], "activations": ["activations_most_mb"]}
KINDS |= {"gradients": ["gradients_most_mb"], "optimizer state": ["optimizer_most_mb"]}
of_steps = per_setting("model", "seq_len", "memory_limit_gb", dtype=False)


@of_steps
def table_2(rows: list[Row]) -> list[Table]:
    """What each technique does to each kind of memory and to a step, from pairs of rows: without accumulation, with."""
    lines = [(f"{kind} (MB)", names, ",.0f", CHANGED) for kind, names in KINDS.items()]
    lines += [("peak of all (MB)", ["peak_memory_mb"], ",.0f", CHANGED)]
    lines += [("computation (TFLOP)", ["step_tflop"], ".2f", CHANGED), ("time per step (s)", ["step_s"], ".2f", SLOWER)]
    about = (
        f"An arrow is a change of more than {CHANGED:.0%}, for the time of more than {SLOWER:.0%}. Parameters include "
        "their copies in 16 bits; each kind is at its own highest moment."
    )
    rows, tables = _current(rows), []
    for accumulation, title in ((1, "without accumulation"), (2, "with accumulation")):
        base = _step(rows, accumulation=accumulation)
        pairs = {words: (base, _step(rows, name, accumulation=accumulation)) for name, words in TECHNIQUES.items()}
        if accumulation > 1:
            pairs = {"accumulation (1 x 2 to 2 x 1)": (_step(rows, batch_size=2), base), **pairs}
        used = [row for pair in pairs.values() for row in pair]
        if None not in used:
            body = [[label, *(_change(*pair, *how) for pair in pairs.values())] for label, *how in lines]
            note = [about, *(_textbook(rows) if accumulation == 1 else ())]
            name, title = f"table-2-{accumulation}", f"{_steps_title(rows)}: {title}"
            tables.append(Table(name, title, ["", *pairs], body, note, [row for row in rows if row in used]))
    return tables


def _current(rows: Sequence[Row]) -> list[Row]:
    """The rows, but for those from before rows said which kernels ran of which there is one that does."""
    told = [row for row in rows if "kernels" in row.cell]
    return [row for row in rows if row in told or newest(told, **_configuration(row)) is None]


def _configuration(row: Row) -> dict[str, Any]:
    return {name: row.cell[name] for name in (*TECHNIQUES, *PLAIN)}


def _steps_title(rows: Sequence[Row]) -> str:
    return "{model}, {seq_len} tokens per sequence".format_map(rows[0].cell)


def _step(rows: Sequence[Row], *techniques: str, **changes: Any) -> Row | None:
    """The row of a plain step with some techniques."""
    return newest(rows, **{**PLAIN, **{name: name in techniques for name in TECHNIQUES}, **changes})


def arrow(before: float, after: float, threshold: float) -> str:
    """Up or down where the change is more than that share of `before`, else =."""
    if abs(after - before) > threshold * before:
        return "↑" if after > before else "↓"
    return "="


def _total(row: Row | None, names: Sequence[str], form: str) -> Cell:
    terms = [(row, name) for name in names]
    return computed(" + ".join("{}" for _ in names), lambda *values: sum(values), form, *terms)


def _change(before: Row, after: Row, names: Sequence[str], form: str, threshold: float) -> Cell:
    """An arrow and both figures."""
    pair = [_total(row, names, form) for row in (before, after)]
    gaps = [cell for cell in pair if not isinstance(cell, Figure)]
    return min(gaps) if gaps else (f"{arrow(pair[0].value, pair[1].value, threshold)} ", pair[0], " to ", pair[1])


def _textbook(rows: Sequence[Row]) -> list[Cell]:
    """Where the measured rows disagree with what is usually taught, in words."""
    notes: list[Cell] = []
    for technique, kind in (("checkpointing", "activations"), ("amp", "parameters")):
        pair = [_step(rows), _step(rows, technique)]
        peaks = [figure(row, "peak_memory_mb", ",.0f") for row in pair]
        most = [_total(row, KINDS[kind], "") for row in pair]
        if not all(isinstance(cell, Figure) for cell in (*peaks, *most)):
            continue
        before, after = (cell.value for cell in most)
        if technique == "checkpointing" and peaks[1].value > (1 - CHANGED) * peaks[0].value and after < before:
            words = "Checkpointing lowers activations, and not the peak: without accumulation, full fine-tuning peaks "
            words += "at the end of the backward pass ("
            notes.append((words, peaks[0], " and ", peaks[1], " MB), where all gradients and no activations are."))
        if technique == "amp" and after > (1 + CHANGED) * before:
            words = "Mixed precision raises the memory of parameters, by the 16-bit copies that autocast makes of "
            notes.append((f"{words}them; the peak goes from ", peaks[0], " to ", peaks[1], " MB."))
    return notes


@of_steps
def table_3(rows: list[Row]) -> list[Table]:
    """Peak memory and time of a step for each combination, the course's form: plain, lean, and over a 16-bit base."""
    over_half = {"half": True, "lora": True, "amp": False, "batch_size": 1, "accumulation": 1, "engine": "llama"}
    modes = [
        ("table-3", "", TECHNIQUES, PLAIN),
        ("table-3-lean", ", lean", TECHNIQUES, {**PLAIN, "lean": True}),
        ("table-3-half", ", LoRA over a 16-bit base", {"lean": "lean", "checkpointing": "checkpointing"}, over_half),
    ]
    figures = {"peak memory (MB)": metric("peak_memory_mb", ",.0f"), "time per step (s)": metric("step_s", ".2f")}
    rows, tables = _current(rows), []
    for name, title, marks, wanted in modes:
        columns = {words: _yes_or_no(mark) for mark, words in marks.items()} | figures
        by_marks = {tuple(row.cell[mark] for mark in marks): row for row in chosen(rows, **wanted)}
        own = sorted(by_marks.values(), key=step_order)
        tables += line_per_row(name, _steps_title(rows) + title, own, columns)
    return tables


def _yes_or_no(name: str) -> Column:
    return lambda row: "yes" if row.cell[name] else "no"


def step_order(row: Row) -> tuple[Any, ...]:
    names = ("half", "lean", "accumulation", "batch_size", "lora", "amp", "checkpointing")
    return row.cell["engine"] != "llama", *(row.cell[name] for name in names)


def step_label(row: Row) -> str:
    """A cell of benchmark_finetuning.py in words: "llama, 2 x 1, lean + LoRA"."""
    cell, words = row.cell, {"lean": "lean", "half": "16-bit base", **TECHNIQUES}
    names = [words[name] for name in words if cell.get(name)]
    size = f"{cell['accumulation']} x {cell['batch_size']}" if cell["accumulation"] * cell["batch_size"] > 1 else ""
    optimizer = "AdamW" if cell.get("optimizer") == "adamw" else ""
    return ", ".join(part for part in (cell["engine"], size, " + ".join(names) or "plain", optimizer) if part)


@of_steps
def step_details(rows: list[Row]) -> list[Table]:
    """Every cell with its spread, the hardware limit and the predicted peak; then what checkpointing gains."""
    rows = sorted(_current(rows), key=step_order)
    labels = Counter(map(step_label, rows))

    def label(row: Row) -> str:
        return step_label(row) + f", kernels: {row.cell.get('kernels')}" * (labels[step_label(row)] > 1)

    def like(row: Row, **changes: Any) -> Row | None:
        return newest(rows, **_configuration(row) | changes)

    def plain(row: Row) -> Row | None:
        return like(row, checkpointing=False) if row.cell["checkpointing"] else None

    def ours(row: Row) -> Row | None:
        return like(row, engine="llama", lean=True) if row.cell["engine"] != "llama" else None

    def recomputed(row: Row) -> Row | None:
        return like(row, checkpointing=True)

    columns = {"configuration": label, "time per step (s)": runs("step_s", ".2f")}
    columns |= {"time vs. limit": metric("step_over_floor_x", ".2f")}
    columns |= {"peak memory (MB)": metric("peak_memory_mb", ",.0f")}
    columns |= {"predicted (MB)": metric("expected_peak_memory_mb", ",.0f")}
    columns |= {"predicted / measured": lambda row: ratio(row, row, "expected_peak_memory_mb", ".3f", "peak_memory_mb")}
    columns |= {"time relative to no checkpointing": relative(plain, "step_s")}
    columns |= {"time relative to ours": relative(ours, "step_s")}
    columns |= {"memory relative to ours": relative(ours, "peak_memory_mb")}
    note = (
        f"A step is forward, backward and the optimizer's step. {RELATIVE}, the time of the step's matrix products, "
        "recomputed ones included, at the best rate of the network's own largest products in the same round. Ours, for "
        "a peer, is the lean mode, which does the same work."
    )
    tables = line_per_row("steps", f"{_steps_title(rows)}: every configuration", rows, columns, note)
    whole = chosen(rows, checkpointing=False, batch_size=1, accumulation=1, engine="llama")
    paired = [row for row in whole if recomputed(row) is not None]
    gain = {"mode": lambda row: label(row).removeprefix("llama, ")}
    gain |= {"peak memory (MB)": metric("peak_memory_mb", ",.0f")}
    gain |= {"all recomputed (MB)": metric("peak_memory_mb", ",.0f", of=recomputed)}
    gain |= {"time per step (s)": metric("step_s", ".2f"), "all recomputed (s)": metric("step_s", ".2f", of=recomputed)}
    gain |= {"MB saved per second": lambda row: _saved(row, recomputed(row))}
    title = f"{_steps_title(rows)}: no layer recomputed, and all of them"
    return tables + line_per_row("gain", title, paired, gain)


def _saved(whole: Row, recomputed: Row) -> Cell:
    """MB that checkpointing saves for a second of recomputing."""
    terms = [(row, "peak_memory_mb") for row in (whole, recomputed)]
    terms += [(row, "step_s") for row in (recomputed, whole)]
    saved = computed("({} - {}) / ({} - {})", lambda a, b, c, d: (a - b) / (c - d), ",.0f", *terms)
    if not isinstance(saved, Figure):
        return saved
    if whole.median("peak_memory_mb") - recomputed.median("peak_memory_mb") <= CHANGED * whole.median("peak_memory_mb"):
        return "nothing saved"
    return saved if recomputed.median("step_s") > whole.median("step_s") else "no slower"


@per_setting("model", "seq_len", "limit_gb", dtype=False)
def estimates(rows: list[Row]) -> list[Table]:
    """What the memory of a step is predicted to be at its peak, by category, and whether it fits."""
    limit, title = rows[0].cell["limit_gb"], _steps_title(rows)
    columns = {"configuration": step_label, "peak (MB)": metric("peak_memory_mb", ",.0f")}
    columns |= {name: metric(f"{name}_at_peak_mb", ",.0f") for name in memory.CATEGORIES}
    columns |= {f"within {limit:g} GB": lambda row: "yes" if row.median("peak_memory_mb") <= limit * 1e3 else "no"}
    note = "Predicted, not measured: without the CUDA context (some hundred MB) and what kernels allocate inside."
    rows = sorted((row for row in rows if row.metrics), key=step_order)
    return line_per_row("estimates", f"{title}: predicted memory at the peak of a step", rows, columns, note)


@per_setting("model", "seq_len", "limit_gb", "world_size", dtype=False)
def divisions(rows: list[Row]) -> list[Table]:
    """What each of several processes would hold and send, by how they share a step."""
    limit, size = rows[0].cell["limit_gb"], rows[0].cell["world_size"]
    columns = {"configuration": _planned_label, "division": lambda row: row.cell["division"]}
    columns |= {"peak (MB)": metric("peak_memory_mb", ",.0f")}
    columns |= {
        name: metric(f"{name}_at_peak_mb", ",.0f") if name != memory.GATHERED else _gathered
        for name in (*memory.CATEGORIES, memory.GATHERED)
    }
    columns |= {f"within {limit:g} GB": lambda row: "yes" if row.median("peak_memory_mb") <= limit * 1e3 else "no"}
    columns |= {"sent, and received (MB per step)": metric("sent_mb", ",.0f")}
    columns |= {"tokens per step": metric("tokens", ",.0f")}
    title = f"{_steps_title(rows)}: predicted for each of {size} processes"
    rows = [row for row in rows if row.metrics]
    return line_per_row("divisions", title, rows, columns, PLANNED)


@per_setting("seq_len", "optimizer", dtype=False)
def cards(rows: list[Row]) -> list[Table]:
    """On how few cards of a size a step would fit, how it is divided there, and how long a card would send."""

    def number(row: Row) -> Cell:
        terms = [(row, name) for name in ("tensor", "shards", "replicas")]
        found = computed("{} * {} * {}", lambda a, b, c: a * b * c, ",.0f", *terms)
        return "none of up to 64" if found == OUT_OF_MEMORY else found

    def sending(rate: float) -> Column:
        return lambda row: computed(f"{{}} / {rate * 1e3:.0f}", lambda mb: mb / (rate * 1e3), ".3f", (row, "sent_mb"))

    columns = {"model": word("model"), "configuration": _planned_label}
    columns |= {"card (GB)": lambda row: f"{row.cell['limit_gb']:g}", "cards": number}
    columns |= {"tensor parallel": metric("tensor", ",.0f"), "FSDP2": metric("shards", ",.0f")}
    columns |= {"peak per card (MB)": metric("peak_memory_mb", ",.0f")}
    columns |= {"tokens per step": metric("tokens", ",.0f"), "sent per card (MB)": metric("sent_mb", ",.0f")}
    columns |= {f"{name}, {rate:g} GB/s (s)": sending(rate) for name, rate in LINKS.items()}
    title = f"{rows[0].cell['seq_len']} tokens per sequence: the fewest cards on which a step is predicted to fit"
    note = f"{PLANNED} Of several divisions of the same number, that which sends least per token. The last columns are "
    note += "the bytes over the nominal rate of a link in one direction, as if nothing were computed meanwhile."
    return line_per_row("cards", title, rows, columns, note)


def _planned_label(row: Row) -> str:
    return step_label(row).removeprefix("llama, ")


def _gathered(row: Row) -> Cell:
    """What only processes with shards have."""
    name = f"{memory.GATHERED}_at_peak_mb"
    return figure(row, name, ",.0f") if row.has(name) else "-"


@per_setting("model", dtype=False)
def learning(rows: list[Row]) -> list[Table]:
    """Held-out loss and right answers of each run, before and after."""

    def right(name: str) -> Column:
        return lambda row: (figure(row, name, ".0f"), " of ", figure(row, "held_out_asked", ".0f"))

    columns = {"preset": run_label, "samples": metric("samples", ",.0f")}
    columns |= {"held-out loss before": metric("held_out_loss_before_nats", ".3f")}
    columns |= {"held-out loss after": metric("held_out_loss_nats", ".3f"), "it fell by": _fall}
    columns |= {"right answers before": right("held_out_right_before"), "right answers after": right("held_out_right")}
    columns |= {"steps": metric("step_s", ",.0f", stat="n"), "time per step (s)": metric("step_s", ".3f")}
    note = "Loss in nats per label token, on held-out samples, with the 95 % interval of its fall over the samples; "
    note += "a right answer is the sample's word for word."
    return line_per_row("learning", f"{rows[0].cell['model']}: before and after fine-tuning", rows, columns, note)


def run_label(row: Row) -> str:
    """The preset of a run, and where it did more than that says."""
    cell = row.cell
    words = [cell["preset"], *[cell.get("objective")] * ("objective" in cell)]
    words += ["all weights"] * (not cell.get("lora", True))
    return ", ".join(words + [cell.get("data", "other data")] * ("data_sha256" in cell))


@per_setting("model", "data", "eval_data", dtype=False)
def pretraining(rows: list[Row]) -> list[Table]:
    """Continued pre-training on plain text: the loss on another text, before and after."""

    def per_token(name: str) -> Column:
        return lambda row: computed("exp({})", math.exp, ".2f", (row, name))

    columns = {"preset": run_label, "blocks": metric("samples", ",.0f")}
    columns |= {"tokens of a block": lambda row: f"{row.cell['max_seq_len']:,}"}
    columns |= {"blocks of a step": lambda row: f"{row.cell['batch_size'] * row.cell['accumulation']}"}
    columns |= {"loss before": metric("held_out_loss_before_nats", ".3f")}
    columns |= {"loss after": metric("held_out_loss_nats", ".3f"), "it fell by": _fall}
    columns |= {"perplexity before": per_token("held_out_loss_before_nats")}
    columns |= {"perplexity after": per_token("held_out_loss_nats")}
    columns |= {"steps": metric("step_s", ",.0f", stat="n"), "time per step (s)": metric("step_s", ".1f")}
    columns |= {"peak memory (MB)": metric("peak_memory_mb", ",.0f")}
    cell = rows[0].cell
    text = cell.get("eval_data", "the same text, its end")
    note = f"Loss in nats per token on blocks of {text}, with the 95 % interval of its fall over the blocks."
    title = f"{cell['model']}: continued pre-training on {cell.get('data', 'text')}"
    return line_per_row("pretraining", title, rows, columns, note)


@per_setting("model", dtype=False)
def preferences(rows: list[Row]) -> list[Table]:
    """Direct preference optimization: how often the chosen answer is the likelier one, before and after."""

    def with_interval(name: str, form: str, scale: float = 1, unit: str = "x") -> Column:
        parts = (f"held_out_{name}{part}_{unit}" for part in ("", "_low", "_high"))
        cells = [functools.partial(figure, name=part, form=form, scale=scale) for part in parts]
        return lambda row: (cells[0](row), " [", cells[1](row), " to ", cells[2](row), "]")

    columns: dict[str, Column] = {"run": run_label}
    # Of a pair both samples are counted.
    columns |= {"pairs": lambda row: computed("{} / 2", lambda n: n / 2, ",.0f", (row, "samples"))}
    columns |= {"learning rate": lambda row: f"{row.cell['lr']:g}"}
    columns |= {"held-out pairs": lambda row: f"{row.cell['held_out']}"}
    columns |= {"chosen likelier before (%)": with_interval("preferred_before", ".0f", 100)}
    columns |= {"after (%)": with_interval("preferred", ".0f", 100)}
    columns |= {"rise (points)": with_interval("preferred_rise", ".0f", 100)}
    columns |= {"reward accuracy (%)": with_interval("reward_accuracy", ".0f", 100)}
    columns |= {"mean margin": with_interval("margin", ".2f", unit="nats")}
    columns |= {"loss after": metric("held_out_loss_nats", ".3f")}
    columns |= {"steps": metric("step_s", ",.0f", stat="n")}
    note = "On held-out pairs, with 95 % intervals over the pairs. Reward accuracy: share of pairs of which the chosen "
    note += (
        "answer has gained on the rejected one since the start; the margin is that gain times beta; the loss begins "
    )
    note += "at ln 2."
    return line_per_row("preferences", f"{rows[0].cell['model']}: preferences before and after", rows, columns, note)


@per_setting("model", "preset")
def sweep(rows: list[Row]) -> list[Table]:
    """Runs of one preset that differ in the peak learning rate: the held-out loss on the way and at the end."""
    rows.sort(key=lambda row: row.cell["lr"])
    ends = [step for step, _ in rows[0].data["series"]["held_out_loss_nats"][1:]]
    columns: dict[str, Column] = {"peak learning rate": lambda row: f"{row.cell['lr']:g}"}
    columns |= {"before": metric("held_out_loss_before_nats", ".3f")}
    for number, step in enumerate(ends[:-1], 1):
        columns[f"step {step}"] = functools.partial(_on_the_way, number)
    columns |= {f"step {ends[-1]}": metric("held_out_loss_nats", ".3f"), "it fell by": _fall}
    cell = rows[0].cell
    title = "{model}, preset {preset}: held-out loss by learning rate".format_map(cell)
    note = (
        f"Another split than that of the runs above: {cell['held_out']} samples held out, seed {rows[0].data['seed']}."
    )
    return line_per_row("sweep", title, rows, columns, note)


def _on_the_way(number: int, row: Row) -> Cell:
    """A point of the curve of held-out losses."""
    if not row.metrics:
        return OUT_OF_MEMORY
    (_, loss), source = row.data["series"]["held_out_loss_nats"][number], f"series.held_out_loss_nats.{number}.1"
    return Figure(f"{loss:.3f}", loss, row.source(source), row.source(source))


def _fall(row: Row) -> Cell:
    """How far the held-out loss fell, and the interval of that, where the row has one."""
    pair = [(row, f"held_out_loss{when}_nats") for when in ("_before", "")]
    fell = computed("{} - {}", operator.sub, ".3f", *pair)
    if not row.has("held_out_fall_low_nats"):
        return fell
    low, high = (figure(row, f"held_out_fall_{end}_nats", ".3f") for end in ("low", "high"))
    return (fell, " [", low, " to ", high, "]")


def answers(rows: Sequence[Row]) -> list[Table]:
    """What the model answered before each run and after it."""
    head = ["instruction", "before", "after"]
    found = [(row, row.data.get("series", {}).get("answers")) for row in rows]
    return [Table("answers", _answers_title(row), head, body, rows=[row]) for row, body in found if body]


def _answers_title(row: Row) -> str:
    return f"{row.cell['model']}, preset {run_label(row)}: answers"


def held_out_answers(rows: Sequence[Row]) -> list[Table]:
    """The same of instructions that were held out, beside the sample's answer; of runs that changed any of them."""
    head = ["held-out instruction", "the sample's answer", "before", "after"]
    tables = []
    for row in rows:
        shown = row.data.get("series", {}).get("held_out_answers", [])
        if any(before != after for *_, before, after in shown):
            body = [[textwrap.shorten(text, LONGEST, placeholder=" ...") for text in line] for line in shown]
            title = f"{_answers_title(row)} to held-out instructions"
            tables.append(Table("held-out-answers", title, head, body, rows=[row]))
    return tables
