"""From measured rows to tables: one function for each table, whatever shows it.

A function here takes rows of one experiment and returns `Table`s, one or more for each setting that was measured;
render.py turns those into Markdown, which the terminal shows too, HTML and Typst. Left out: what a table is made of
(cells.py, columns.py), the tables of fine-tuning (training_tables.py), and charts (charts.py).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.rows import Row
from llama.lora import META_NAMES
from reports.cells import NOT_MEASURED, Cell, Figure, Table, chosen, computed, figure, newest, ratio
from reports.columns import (
    RELATIVE,
    Column,
    Related,
    Tables,
    faster,
    line_per_row,
    metric,
    per_setting,
    relative,
    runs,
    word,
)
from reports.training_tables import (
    answers,
    cards,
    divisions,
    estimates,
    held_out_answers,
    learning,
    preferences,
    pretraining,
    step_details,
    sweep,
    table_2,
    table_3,
)

PLAIN_WEIGHTS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # in rows that do not name a format
PRUNED = ("one-round", "one-shot", "iterative")  # modes of pruning, beside each other
YES = ("no", "yes")
UNITS = {"tflop_s": "TFLOP/s", "gb_s": "GB/s", "tflop": "TFLOP", "gb": "GB", "mb": "MB", "nats": "nats", "s": "s"}

of_generation = per_setting("model", "input_len", "output_len", "memory_limit_gb")


# Generation


@of_generation
def table_1(rows: list[Row]) -> list[Table]:
    """Peak memory and runtime of generation by batch size, with and without the KV cache: the course's form."""
    rows = chosen(_current(rows), engine="llama")
    sizes, formats = sorted({row.cell["batch_size"] for row in rows}), _formats(rows)
    body = []
    for use_cache, weights in itertools.product((True, False), formats):
        own = [row for row in chosen(rows, use_cache=use_cache) if weights_of(row) == weights]
        label = ("with KV cache" if use_cache else "without") + (f", {weights}" if len(formats) > 1 else "")
        for what, name, form in (("peak memory (MB)", "peak_memory_mb", ",.0f"), ("runtime (s)", "runtime_s", ".2f")):
            values = [figure(newest(own, batch_size=size), name, form) for size in sizes]
            body += [[f"{label}: {what}", *values]] if own else []
    if not body:
        return []
    head = [f"{rows[0].cell['input_len']} + {rows[0].cell['output_len']} tokens", *(f"batch {n}" for n in sizes)]
    return [Table("table-1", _generation_title(rows), head, body, rows=rows)]


def weights_of(row: Row) -> str:
    """The format of the weights that a row was measured with."""
    return row.cell.get("weights") or PLAIN_WEIGHTS[row.data["dtype"]]


def _current(rows: Sequence[Row]) -> list[Row]:
    """The last row of each cell, whether or not it names the format of its weights."""
    names = ("engine", "batch_size", "use_cache", "decoding")
    return list({(*(row.cell.get(name) for name in names), weights_of(row)): row for row in rows}.values())


def _formats(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(weights_of(row) for row in chosen(rows, engine="llama")))


def _generation_title(rows: Sequence[Row]) -> str:
    return "{model}: {output_len} tokens after prompts of {input_len}".format_map(rows[0].cell)


@of_generation
def generation_details(rows: list[Row]) -> list[Table]:
    """Every cell with its spread, relative to the hardware limit and to ours; then the limits themselves."""
    names = ("batch_size", "engine")
    rows = sorted(_current(rows), key=lambda row: (*map(row.cell.get, names), not row.cell["use_cache"]))
    formats = _formats(rows)
    # Compared with ours in plain weights with the cache, or in the first format where those were not measured.
    cached = sorted(chosen(rows, engine="llama", use_cache=True), key=lambda r: weights_of(r) in ("int8", "int4"))
    ours = {row.cell["batch_size"]: row for row in reversed(cached)}

    def label(row: Row) -> str:
        cache = f", cache {'on' if row.cell['use_cache'] else 'off'}"
        own = cache + (f", {weights_of(row)}" if len(formats) > 1 else "")
        return f"batch {row.cell['batch_size']}, {row.cell['engine']}" + own * (row.cell["engine"] == "llama")

    columns = {"configuration": label, "runtime (s)": runs("runtime_s", ".2f")}
    columns |= {"runtime vs. limit": metric("runtime_over_floor_x", ".2f"), "TTFT (s)": metric("ttft_s", ".3f")}
    columns |= {"TTFT vs. limit": metric("ttft_over_floor_x", ".2f"), "TPOT (ms)": metric("tpot_s", ",.1f", 1e3)}
    columns |= {"TPOT vs. limit": metric("tpot_over_floor_x", ".2f")}
    columns |= {"peak memory (MB)": metric("peak_memory_mb", ",.0f")}
    columns |= {"memory vs. limit": metric("peak_memory_over_floor_x", ".2f")}
    columns |= {"time relative to ours": relative(lambda row: ours.get(row.cell["batch_size"]), "runtime_s")}
    note = f"TTFT: time to first token. TPOT: time per output token after it. {RELATIVE}."
    limits = {"configuration": label, "prompt (s)": metric("floor_ttft_s", ".3f")}
    limits |= {"step (ms)": metric("floor_tpot_s", ",.1f", 1e3), "runtime (s)": metric("floor_runtime_s", ".2f")}
    limits |= {"memory (MB)": metric("floor_peak_memory_mb", ",.0f")}
    limits |= {"read per step (GB)": metric("step_bytes_gb", ".2f"), "reading (GB/s)": metric("read_gb_s", ".1f")}
    limits |= {"products (TFLOP/s)": metric("product_tflop_s", ".3f"), "larger part": _larger_part}
    about = (
        "Both rates are measured in the same round. A step reads each weight as it is stored, and the cached keys and "
        "values, once at the best rate of any reading kernel; a prompt, and without the cache every token, takes its "
        "FLOPs at the best rate of the network's own largest products; memory is weights, cache and one row of logits "
        "per sequence."
    )
    title, limited = _generation_title(rows), [row for row in rows if row.has("floor_ttft_s", "floor_tpot_s")]
    tables = line_per_row("generation", title, rows, columns, note)
    return tables + line_per_row("limits", f"{title}: hardware limits", limited, limits, about)


def _larger_part(row: Row) -> str:
    """Which part of a generation has the larger share of the limit, and what bounds it."""
    is_prompt = row.median("floor_ttft_s") > (row.cell["output_len"] - 1) * row.median("floor_tpot_s")
    bound = "products" if is_prompt or not row.cell["use_cache"] else "reading"
    return f"{'prompt' if is_prompt else 'steps'}: {bound}"


def _weights_in_words(cell: dict[str, Any]) -> list[str]:
    """The format of quantized weights, in full."""
    if not cell.get("weights"):
        return []
    words = cell["weights"] + (f" in groups of {cell['group_size']}" if cell.get("group_size") else "")
    words += " with zero-points" if cell.get("zero_points") else ""
    words += f" and {cell['int8_matrices']} matrices of int8" if cell.get("int8_matrices") else ""
    return [words, *(["calibrated"] if cell.get("calibrated") else []), *(["QAT"] if cell.get("qat") is True else [])]


@per_setting("data", "data_sha256", "tokens", "context", "stride", "batch_size", dtype=False)
def perplexity(rows: list[Row]) -> list[Table]:
    """Models on a text, and how each compares with the one that it was measured against."""

    def model(row: Row) -> str:
        words = [row.cell["model"] + (" with adapter" if row.cell["adapter"] else ""), *_weights_in_words(row.cell)]
        cache = [f"{row.cell['cache_dtype']} cache"] if "cache_dtype" in row.cell else []
        return ", ".join([*words, row.data["dtype"], *cache])

    columns = {"model": model, "loss": metric("loss_nats", ".4f"), "perplexity": metric("perplexity_x", ".4f")}
    columns |= {"scored tokens": metric("scored_tokens", ",.0f"), "tokens/s": metric("tokens_per_s", ",.0f")}
    columns |= {"peak memory (MB)": metric("peak_memory_mb", ",.0f")}
    note: list[Cell] = [_verdict(row) for row in rows if row.has("difference_nats")]
    note += _how_counted(rows[0])
    if len(rows) > 1:
        note.append("Peak memory of the first includes what the libraries set up once.")
    return line_per_row("perplexity", f"Perplexity on {rows[0].cell['data']}", rows, columns, *note)


def _how_counted(row: Row) -> list[Cell]:
    """The text of a perplexity, and the windows in which a model saw it."""
    cell = row.cell
    mode = "sliding" if cell["stride"] < cell["context"] else "side by side, each without its first token"
    words = f" windows of {cell['context']}, stride {cell['stride']}: {mode}."
    text = f"Loss in nats per token, over {cell['tokens']} tokens of {cell['data']}."
    return [text, (figure(row, "windows", ",.0f"), words)]


@per_setting("model", "data", "data_sha256", "tokens", "context", "stride", dtype=False)
def perplexity_formats(rows: list[Row]) -> list[Table]:
    """A model in each format of its weights: what that costs in perplexity, and what it takes by batch size."""
    names = ("weights", "group_size", "zero_points", "calibrated", "qat", "int8_matrices")

    def format_of(row: Row) -> tuple[Any, ...]:
        return (row.data["dtype"], *map(row.cell.get, names))

    rows = [row for row in rows if row.cell.get("adapter") is None and row.has("weights_mb")]
    rows = [row for row in rows if "cache_dtype" not in row.cell]
    if not rows:
        return []
    lines = list({format_of(row): row for row in rows}.values())
    whole = next((row for row in lines if weights_of(row) in ("bf16", "fp16")), None)

    def like(size: int) -> Related:
        return lambda row: newest([other for other in rows if format_of(other) == format_of(row)], batch_size=size)

    def of_codes(word: Callable[[dict[str, Any]], str]) -> Column:
        return lambda row: word(row.cell) if row.cell.get("weights") else NOT_MEASURED

    def label(row: Row) -> str:
        return weights_of(row) + " and int8" * bool(row.cell.get(names[-1])) + ", QAT" * ("qat" in row.cell)

    columns: dict[str, Column] = {"weights": label}
    columns |= {"bits per weight": metric("weight_bits", ".2f")}
    columns |= {"group": of_codes(lambda cell: str(cell.get("group_size", "row")))}
    columns |= {name.replace("_", "-"): of_codes(lambda cell, name=name: YES[name in cell]) for name in names[2:4]}
    columns |= {"perplexity": metric("perplexity_x", ".3f")}
    columns |= {"relative to 16 bits": lambda row: ratio(row, whole, "perplexity_x", ".4f")}
    columns |= {"weights (MB)": metric("weights_mb", ",.1f")}
    for size in sorted({row.cell["batch_size"] for row in rows}):
        columns[f"peak memory, batch {size} (MB)"] = metric("peak_memory_mb", ",.0f", of=like(size))
    note = (
        "Bits per weight: of all that is stored, with scales and offsets, and the embedding in 8 bits. Group: weights "
        "of a row that share a scale. Calibrated: codes chosen for what the layers compute on a different text. QAT: "
        "weights trained through their rounding."
    )
    title = "{model}: perplexity by format of the weights, stride {stride}".format_map(lines[0].cell)
    found = line_per_row("perplexity-formats", title, lines, columns, note, *_how_counted(lines[0]))
    return [dataclasses.replace(table, rows=rows) for table in found]


def inspection(rows: Sequence[Row]) -> list[Table]:
    """What sets a model apart from its original: each matrix of each layer, activations, predictions."""
    about = "Relative change in %: of a matrix, the norm of its change over its own (Frobenius); of the activations "
    about += "after a block, the same over all tokens."
    tables = []
    for row in (row for row in rows if row.metrics):
        series = {name: f"{name}_update_x" for name in META_NAMES} | {"activations": "activation_x"}
        layers = range(len(row.data["series"]["activation_x"]))
        body = [[str(layer), *(_point(row, name, layer) for name in series.values())] for layer in layers]
        note: list[Cell] = [about, _whole_change(row), _predictions(row)]
        title = f"{row.cell['against']['model']}: what {changed_by(row)} changed"
        tables.append(Table("inspection", title, ["layer", *series], body, note, [row]))
    return tables


def changed_by(row: Row) -> str:
    """What has made a model of its original."""
    if row.cell.get("adapter"):
        return f"adapter {row.cell['adapter']}"
    return ", ".join(_weights_in_words(row.cell)) or f"{row.cell['model']} in {row.data['dtype']}"


def _point(row: Row, curve: str, layer: int) -> Figure:
    value, source = row.data["series"][curve][layer][1], row.source(f"series.{curve}.{layer}.1")
    return Figure(f"{100 * value:.2f}", value, source, source, 100)


def _whole_change(row: Row) -> Cell:
    names = {"all matrices": "update_x", "embedding": "tok_embeddings_update_x", "head": "output_update_x"}
    parts = [(f"{what} ", figure(row, name, ".2f", 100), " %; ") for what, name in names.items() if row.has(name)]
    return ("Change of ", *itertools.chain(*parts), "norms left out.")


def _predictions(row: Row) -> Cell:
    cell, interval = row.cell, ()
    if row.has("divergence_low_nats"):
        low, high = (figure(row, f"divergence_{end}_nats", ".4f") for end in ("low", "high"))
        interval = (" [95 %: ", low, " to ", high, "]")
    divergence, same = figure(row, "divergence_nats", ".4f"), figure(row, "same_token_x", ".1f", 100)
    text = f" % of {cell['tokens']} tokens of {cell['data']}, {cell['context']} at once."
    return (
        "KL divergence of the predictions ",
        divergence,
        *interval,
        " nats; the likeliest token is the same for ",
        same,
        text,
    )


def _verdict(row: Row) -> Cell:
    """How a model compares with the one that it was measured against, in one line."""
    times = computed("exp({})", math.exp, ".4f", (row, "difference_nats"))
    change = ("Loss of the first less that of the second: ", figure(row, "difference_nats", "+.5f"))
    line = (*change, ", so ", times, " times its perplexity")
    if not row.has("difference_low_nats"):
        return (*line, "; too little text for an interval.")
    low, high = (figure(row, f"difference_{end}_nats", "+.5f") for end in ("low", "high"))
    words = "the first is worse" if low.value > 0 else "the first is better" if high.value < 0 else ""
    return (*line, " [95 %: ", low, " to ", high, f"]: {words or 'no difference that shows'}.")


@per_setting(dtype=False)
def embedded(rows: list[Row]) -> list[Table]:
    """Size, training and loss of the models that ship."""

    def per_token(name: str) -> Column:
        return lambda row: computed("exp({})", math.exp, ".2f", (row, name))

    def minutes(row: Row) -> Cell:
        return computed("{} * {} / 60", lambda n, s: n * s / 60, ",.0f", (row, "train_steps"), (row, "step_s"))

    columns = {"model": word("model"), "parameters": metric("parameters", ",.0f")}
    columns |= {"file (MB)": metric("file_mb", ".2f"), "training steps": metric("train_steps", ",.0f")}
    columns |= {"time per step (s)": metric("step_s", ".2f"), "training (min)": minutes}
    columns |= {"held-out loss": metric("held_out_loss_nats", ".3f"), "perplexity": per_token("held_out_loss_nats")}
    columns |= {"loss on stories": metric("held_out_story_loss_nats", ".3f")}
    columns |= {"perplexity on stories": per_token("held_out_story_loss_nats")}
    return line_per_row("embedded", "The embedded models", rows, columns)


# What else is measured


@per_setting("model", "weights", "group_size", "answer_len", "decoding")
def conversation(rows: list[Row]) -> list[Table]:
    """Time to first token in each turn of a conversation, with the KV cache kept and by a fresh run."""
    rows.sort(key=lambda row: row.cell["turn"])

    def same_tokens(row: Row) -> Cell:
        return (figure(row, "tokens_equal", ",.0f"), " of ", figure(row, "answer_tokens", ",.0f"))

    columns = {"turn": word("turn"), "tokens of the dialog": metric("dialog_tokens", ",.0f")}
    columns |= {"computed with the kept cache": metric("computed_tokens", ",.0f")}
    columns |= {"TTFT, cache kept (s)": runs("ttft_kept_s", ".3f"), "TTFT, fresh run (s)": runs("ttft_fresh_s", ".3f")}
    columns |= {"times as fast": lambda row: ratio(row, row, "ttft_fresh_s", other="ttft_kept_s")}
    columns |= {"same tokens": same_tokens}
    cell = rows[0].cell
    title = f"{cell['model']}, {weights_of(rows[0])}: a conversation, answers of at most {cell['answer_len']} tokens"
    note = "TTFT: time to first token, from the message on. A fresh run computes all tokens of the dialog."
    return line_per_row("conversation", title, rows, columns, note)


@per_setting("model", dtype=False)
def loading(rows: list[Row]) -> list[Table]:
    """How long a checkpoint takes to load, and how much memory."""
    columns = {"layout": word("layout"), "stored as": word("stored"), "loaded as": lambda row: row.data["dtype"]}
    columns |= {"returns after (s)": metric("load_s", ".2f"), "ready after (s)": metric("ready_s", ".2f")}
    columns |= {"peak memory (MB)": metric("peak_memory_mb", ",.0f")}
    columns |= {"relative to the weights": metric("peak_over_weights_x", ".3f")}
    note = "Each load in a fresh process, its file in the page cache. Ready: every weight has been read once."
    return line_per_row("loading", f"Loading {rows[0].cell['model']}", rows, columns, note)


@per_setting(
    *("model", "data", "data_sha256", "tokens", "context"),
    *("seq_len", "accumulation", "input_len", "output_len"),
    dtype=False,
)
def leaderboard(rows: list[Row]) -> list[Table]:
    """A line for each form of the weights and what of them is trained: loss, throughput and memory."""
    sizes = sorted({row.cell["batch_size"] for row in rows} - {None})
    if not sizes:
        return []
    entries = [row for row in chosen(rows, batch_size=sizes[0]) if row.cell["work"] != "generation"]

    def like(size: int | None, work: str | None = None) -> Related:
        """From an entry to the cell of its weights for that batch size; work: loss or generation, else training."""
        about = {"batch_size": size} | ({} if work is None else {"work": work})
        return lambda row: newest(rows, **{"weights": row.cell["weights"], "work": row.cell["work"], **about})

    columns: dict[str, Column] = {"entry": lambda row: f"{row.cell['weights']}, {row.cell['work']}"}
    columns |= {"loss": metric("loss_nats", ".4f", of=like(None, "loss"))}
    for words, work in (("training", None), ("generation", "generation")):
        for size in sizes:
            columns[f"{words}, batch {size} (tokens/s)"] = runs("tokens_per_s", ",.0f", of=like(size, work))
        columns[f"{words}: memory (MB)"] = metric("peak_memory_mb", ",.0f", of=like(sizes[-1], work))
    columns |= {"weights (MB)": metric("weights_mb", ",.0f", of=like(sizes[0], "generation"))}
    cell = rows[0].cell
    notes = (
        f"Loss in nats per token, before training, on {cell['tokens']} tokens of {cell['data']} in windows of "
        f"{cell['context']}. Memory: the highest at the largest batch.",
        f"Training: tokens of optimizer steps (AdamW) of {cell['accumulation']} micro-batches of sequences of "
        f"{cell['seq_len']} tokens. All weights are trained in fp32, in the second entry with autocast; LoRA is on wq "
        "and wv, lean.",
        f"Generation: {cell['output_len']} tokens after prompts of {cell['input_len']}, whose time counts too.",
    )
    found = line_per_row("leaderboard", f"{cell['model']}: leaderboard", entries, columns, *notes)
    return [dataclasses.replace(table, rows=rows) for table in found]


@per_setting("model")
def ladder(rows: list[Row]) -> list[Table]:
    """One change per row on the same work: time, memory, perplexity, and the test of that change."""
    rows.sort(key=lambda row: row.cell["row"])

    def first(row: Row) -> Row | None:
        found = chosen(rows, text=row.cell["text"])[0]
        return None if found is row else found

    def same_tokens(row: Row) -> Cell:
        same = figure(row, "tokens_equal", ",.0f")
        every = computed("{} * {}", operator.mul, ",.0f", (row, "cell.prompts"), (row, "cell.output_len"))
        return (same, " of ", every) if isinstance(same, Figure) else same

    columns = {"row": lambda row: f"{row.cell['row']}. {row.cell['name']}"}
    columns |= {"changes row": lambda row: str(row.cell["changes"] or "-"), "text": word("text")}
    columns |= {"runtime (s)": runs("runtime_s", ".3f"), "tokens/s": metric("tokens_per_s", ",.0f")}
    columns |= {"times as fast": faster(lambda row: newest(rows, row=row.cell["changes"]), "runtime_s")}
    columns |= {"as the first": faster(first, "runtime_s"), "same tokens": same_tokens}
    columns |= {"weights (MB)": metric("weights_mb", ",.1f"), "peak memory (MB)": metric("peak_memory_mb", ",.0f")}
    columns |= {"perplexity": metric("perplexity_x", ".4f")}
    columns |= {"tested by": lambda row: row.data.get("series", {}).get("test", ["-"])[0].rpartition("::")[2]}
    return line_per_row("ladder", f"{rows[0].cell['model']}: one change per row", rows, columns, *_ladder_notes(rows))


def _ladder_notes(rows: Sequence[Row]) -> list[Cell]:
    """The work, and what perplexity is of."""
    texts = {row.cell["text"]: row.cell for row in rows}
    work = [f"{text}: {c['prompts']} x ({c['input_len']} + {c['output_len']}) tokens" for text, c in texts.items()]
    notes: list[Cell] = [f"Greedy, one prompt after another. {'; '.join(work)}."]
    notes[0] += " Times as fast, and same tokens: as the row that is changed; as the first: with the same text."
    scored = next((row for row in rows if row.has("scored_tokens")), None)
    if scored is None:
        return [*notes, "The weights are random: no perplexity, and no draft, whose acceptance would mean nothing."]
    return [*notes, ("Perplexity: ", figure(scored, "scored_tokens", ",.0f"), " tokens of held-out text.")]


@per_setting("model")
def drafts(rows: list[Row]) -> list[Table]:
    """What speculative decoding brings over the row that it changes."""
    used = [row for row in sorted(rows, key=lambda row: row.cell["row"]) if row.cell.get("draft") and row.metrics]
    columns = {"draft": word("name"), "text": word("text")}
    columns |= {"times as fast": faster(lambda row: newest(rows, row=row.cell["changes"]), "runtime_s")}
    columns |= {"acceptance rate": metric("acceptance", ".2f"), "tokens per round": metric("tokens_a_round", ".2f")}
    return line_per_row("drafts", f"{rows[0].cell['model']}: speculative decoding", used, columns)


@per_setting("model", "data", "data_sha256", "input_len", "output_len", "prompts", "decoding")
def speculation(rows: list[Row]) -> list[Table]:
    """What each draft brings on each kind of text, greedy and sampled."""
    columns = {"text": word("text"), "temperature": word("temperature"), "draft": word("draft")}
    columns |= {"acceptance rate": metric("acceptance", ".2f"), "tokens per round": metric("tokens_a_round", ".2f")}
    columns |= {"tokens/s": metric("tokens_per_s", ",.1f"), "plain tokens/s": metric("plain_tokens_per_s", ",.1f")}
    columns |= {"times as fast": runs("speedup_x", ".2f"), "same tokens": metric("tokens_equal", ",.0f")}
    lines = list({(r.cell["text"], r.cell["temperature"], r.cell["draft"]): r for r in rows}.values())
    cell = lines[0].cell
    title = f"{cell['model']}: speculative decoding, {cell['prompts']} prompts of {cell['input_len']} tokens"
    note = (
        f"{cell['output_len']} tokens for each prompt; the time is that after the first. Plain decoding took turns "
        "with each draft. Quoting: a prompt whose end is its own beginning. Same tokens: as plain decoding, greedy."
    )
    return line_per_row("speculation", title, lines, columns, note)


@per_setting("model", "part")
def kernels(rows: list[Row]) -> list[Table]:
    """Every operation in both forms, by the part of the work that it belongs to, and which kernels do not pay."""
    twins = chosen(rows, engine="plain")

    def ours(row: Row) -> Row | None:
        return newest(rows, **row.cell | {"engine": "kernel"})

    def operation(row: Row) -> str:
        return row.cell["operation"] + (f", {row.cell['weights']}" if row.cell.get("weights") else "")

    columns = {"operation": operation, "operands": word("shape")}
    columns |= {"kernel (ms)": runs("run_s", ".3f", 1e3, of=ours), "plain (ms)": runs("run_s", ".3f", 1e3)}
    columns |= {"times as fast": metric("plain_over_kernel_x", ".2f", of=ours)}
    columns |= {"as F.linear in 16 bits": metric("linear_over_kernel_x", ".2f", of=ours)}
    columns |= {"moved (MB)": metric("moved_mb", ",.1f", of=lambda row: ours(row) or row)}
    columns |= {"moved (GB/s)": metric("moved_gb_s", ".1f", of=ours)}
    columns |= {"share of memory bandwidth": metric("of_reading_x", ".2f", of=ours), "tested by": word("equality")}
    slow = [row for row in rows if row.has("plain_over_kernel_x") and row.median("plain_over_kernel_x") < 1]
    named = "; ".join(f"{operation(row)} ({row.cell['shape']})" for row in slow)
    verdict = f"Slower than plain PyTorch: {named}." if slow else "No kernel is slower than plain PyTorch."
    note: list[Cell] = [verdict if len(twins) < len(rows) else "No kernel runs here."]
    read = sorted((row for row in rows if row.has("read_gb_s")), key=lambda row: row.median("read_gb_s"))
    if read:
        words = "Moved: operands and results once, of products the weights of one block; GB/s are the kernel's. The "
        words += "memory bandwidth is the best rate of any reading kernel in the same round, "
        least, most = (figure(row, "read_gb_s", ".1f") for row in (read[0], read[-1]))
        note.append((words, least, " to ", most, " GB/s; activations may lie in caches, which are faster."))
    title = "{model}: kernels, {part}".format_map(rows[0].cell)
    return [dataclasses.replace(table, rows=rows) for table in line_per_row("kernels", title, twins, columns, *note)]


@per_setting("model", "steps")
def context(rows: list[Row]) -> list[Table]:
    """Time to first token, time per token and memory by the length of the prompt, for each cache and a peer."""
    rows = sorted(rows, key=lambda row: (-row.cell["n_layers"], row.cell["context"]))

    def peer(row: Row) -> Row | None:
        same = {name: row.cell[name] for name in ("n_layers", "context")}
        return None if row.cell["engine"] == "transformers" else newest(rows, engine="transformers", **same)

    def label(row: Row) -> str:
        return row.cell["engine"] + f", {PLAIN_WEIGHTS.get(row.cell['cache'], row.cell['cache'])} cache"

    columns: dict[str, Column] = {"context": word("context"), "layers": word("n_layers"), "engine": label}
    columns |= {"TTFT (s)": runs("ttft_s", ".2f"), "TTFT vs. limit": metric("ttft_over_floor_x", ".2f")}
    columns |= {"TTFT, times as fast": faster(peer, "ttft_s"), "TPOT (ms)": runs("tpot_s", ",.1f", 1e3)}
    columns |= {"TPOT vs. limit": metric("tpot_over_floor_x", ".2f"), "TPOT, times as fast": faster(peer, "tpot_s")}
    columns |= {"memory beyond weights and cache (MB)": metric("peak_memory_mb", ",.0f")}
    note = (
        "TTFT: time to first token, of prompts that went through the network. TPOT: time per output token behind so "
        "many tokens, whose keys and values are random numbers: they change no time. Times as fast: as transformers. "
        f"{RELATIVE}, weights and the cache in use at the best rate of reading, and the FLOPs of the prompt at that of "
        "the largest products in the dtype of the weights: below 1 it went through in fp32, which this CPU multiplies "
        "faster. A row with fewer layers than the model is there for its memory."
    )
    return line_per_row("context", f"{rows[0].cell['model']}: long texts, one sequence", rows, columns, note)


@per_setting("model", "heads", "kv_heads", "textbook_limit_gb", dtype=False)
def attention(rows: list[Row]) -> list[Table]:
    """The textbook's attention, which keeps all scores, beside fused kernels, by length."""

    def textbook(row: Row) -> Row | None:
        same = chosen(rows, positions=row.cell["positions"], engine="textbook")
        return next((other for other in same if other.data["dtype"] == row.data["dtype"] and other is not row), None)

    columns: dict[str, Column] = {"positions": word("positions")}
    columns |= {"dtype": lambda row: PLAIN_WEIGHTS[row.data["dtype"]], "attention": word("engine")}
    for name in ("forward", "backward"):
        columns |= {f"{name} (ms)": metric(f"{name}_s", ",.2f", 1e3)}
        columns |= {f"{name}, times as fast": faster(textbook, f"{name}_s")}
        columns |= {f"{name}, memory (MB)": metric(f"{name}_peak_mb", ",.1f")}
        columns |= {f"{name}, error (ppm)": metric(f"{name}_error_x", ",.2f", 1e6)}
    limit = computed("{}", float, "g", (rows[0], "cell.textbook_limit_gb"))
    left_out = ("Textbook: all scores in memory; x: left out, for it needs more than ", limit, " GB.")
    note = (
        "Causal attention of one sequence. Memory: the peak beyond queries, keys and values, backward with what the "
        "forward pass kept. Error: the largest, of the result or of a gradient, relative to the largest value, against "
        "the textbook in double precision. Times as fast: as the textbook in the same dtype."
    )
    cell = rows[0].cell
    title = f"{cell['model']}: attention, query heads {cell['heads']}, key/value heads {cell['kv_heads']}"
    lines = sorted(rows, key=lambda row: (row.cell["positions"], row.data["dtype"], row.cell["engine"] != "textbook"))
    return line_per_row("attention", title, lines, columns, left_out, note)


@per_setting("model", "batch_size", "lr")
def pruning_quality(rows: list[Row]) -> list[Table]:
    """Held-out loss by share for each method, one-shot and iterative pruning beside each other."""
    rows = [row for row in rows if row.cell["part"] != "speed" and row.metrics]
    dense = sorted(chosen(rows, part="dense"), key=lambda row: row.cell["steps"])
    note = (
        "Held-out loss in nats per token. Iterative: cut a little, fine-tune, again. One-shot: the same cut at once, "
        "then the steps of all those rounds together; one-round: then those of one round. Cut: without any steps, by "
        "the weights times their inputs, as in the other columns, and by the norms of the weights alone. Share 0: the "
        "dense model."
    )
    tables = []
    for method in dict.fromkeys(row.cell["method"] for row in rows if row not in dense):
        cut = chosen(rows, method=method)
        lines: list[tuple[Row, list[Cell]]] = [(row, 5 * [figure(row, "loss_nats", ".3f")]) for row in dense]
        for share in sorted({row.cell["share"] for row in cut}):
            norm, *modes = (newest(cut, part=part, share=share) for part in ("norm", *PRUNED))
            row = max(filter(None, (norm, *modes)), key=lambda row: row.cell["steps"])
            losses = [figure(row, "loss_cut_nats", ".3f") for row in (norm, modes[PRUNED.index("one-shot")])]
            lines.append((row, losses + [figure(mode, "loss_nats", ".3f") for mode in modes]))
        body = [
            [_share(row), str(row.cell["steps"]), figure(row, "parameters", ",.0f")]
            + [figure(row, "stored_mb", ",.1f"), figure(row, "zeros", ",.0f"), *losses]
            for row, losses in lines
        ]
        head = ["share", "steps", "parameters", "stored (MB)", "zeros", "cut by norm", "cut", *PRUNED]
        title = f"{rows[0].cell['model']}: pruning by {method}"
        tables.append(Table("pruning-quality", title, head, body, [note], [*dense, *cut]))
    return tables


def _share(row: Row) -> Cell:
    return computed("{}", float, ".3g", (row, "cell.share"))


@per_setting("model", "method", "input_len", "output_len")
def pruning_speed(rows: list[Row]) -> list[Table]:
    """First token and decode step of a model with fewer and fewer hidden units or heads, and those of the whole one."""
    model, method = rows[0].cell["model"], rows[0].cell["method"]
    rows = sorted(chosen(rows, part="speed"), key=lambda row: row.cell["share"])
    columns = {"share": _share, "parameters": metric("parameters", ",.0f")}
    columns |= {"stored (MB)": metric("stored_mb", ",.1f"), "TTFT (ms)": runs("ttft_s", ",.2f", 1e3)}
    columns |= {"TTFT, times as fast": faster(lambda _: rows[0], "ttft_s"), "TPOT (ms)": runs("tpot_s", ",.2f", 1e3)}
    columns |= {"TPOT, times as fast": faster(lambda _: rows[0], "tpot_s")}
    columns |= {"TPOT vs. limit": lambda row: ratio(row, row, "tpot_s", other="floor_tpot_s")}
    note = (
        "Share: of the hidden units, or of the heads, that are taken out. TTFT: time to first token. TPOT: time per "
        f"output token after it. {RELATIVE}, the time in which the best reading kernel goes through a step's bytes."
    )
    return line_per_row("pruning-speed", f"{model}: speed after pruning by {method}", rows, columns, note)


def generic(rows: Sequence[Row]) -> list[Table]:
    """Rows of any experiment: what tells them apart, then every metric that was measured."""
    of_keys: dict[frozenset[str], list[Row]] = {}
    for row in rows:
        of_keys.setdefault(frozenset(row.cell), []).append(row)
    return [_generic(found) for found in of_keys.values()]


@per_setting()
def trust(rows: list[Row]) -> list[Table]:
    """What was tried to break the project, a table for each kind of attempt."""
    return generic(rows)


def _generic(rows: list[Row]) -> Table:
    cells = [{**row.cell, "dtype": row.data["dtype"], "device": row.device_name} for row in rows]
    texts = {name: [_words(cell[name]) for cell in cells] for name in cells[0]}
    apart = [name for name, values in texts.items() if len(set(values)) > 1] or list(texts)[:1]
    same = [f"{name.replace('_', ' ')} {texts[name][0]}" for name in rows[0].cell if name not in apart]
    metrics = {name: _in_words(name, rows) for name in dict.fromkeys(name for row in rows for name in row.metrics)}
    body = []
    for i, row in enumerate(rows):
        forms = [_digits(row.median(name) * scale) if row.has(name) else "" for name, (_, scale) in metrics.items()]
        figures = [figure(row, name, form, metrics[name][1]) for name, form in zip(metrics, forms, strict=True)]
        body.append([*(texts[name][i] for name in apart), *figures])
    head = [*(name.replace("_", " ") for name in apart), *(words for words, _ in metrics.values())]
    experiment = rows[0].data["experiment"]
    title = "; ".join([experiment.replace("_", " ").capitalize(), *same])
    return Table(experiment, title, head, body, rows=rows)


def _words(value: Any) -> str:
    words = {"true": "yes", "false": "no", "null": NOT_MEASURED}
    return value if isinstance(value, str) else words.get(text := json.dumps(value), text)


def _digits(value: float) -> str:
    """The format of a count; else of three significant digits, or of all digits of a larger integer part."""
    is_count = value == int(value) or abs(value) >= 100
    return ",.0f" if is_count else f".{2 - math.floor(math.log10(abs(value)))}f"


def _in_words(name: str, rows: Sequence[Row]) -> tuple[str, float]:
    """A metric's name in words with its unit, and the factor to that unit: seconds become ms where all are short."""
    ending = next((ending for ending in UNITS if name.endswith(f"_{ending}")), "")
    words = name.removesuffix(f"_{ending}").replace("_", " ")
    if ending == "s" and max(row.median(name) for row in rows if row.has(name)) < 0.1:
        return f"{words} (ms)", 1e3
    return f"{words} ({UNITS[ending]})" if ending else words, 1


TABLES: dict[str, tuple[Tables, ...]] = {  # of an experiment's rows
    "inference": (table_1, generation_details),
    "formats": (generation_details,),
    "benchmark_finetuning": (table_2, table_3, step_details),
    "estimates": (estimates,),
    "divisions": (divisions,),
    "cards": (cards,),
    "finetuning": (learning, answers, held_out_answers),
    "sweep": (sweep,),
    "pretraining": (pretraining,),
    "preferences": (preferences, answers),
    "perplexity": (perplexity_formats, perplexity),
    "inspection": (inspection,),
    "conversation": (conversation,),
    "loading": (loading,),
    "leaderboard": (leaderboard,),
    "ladder": (ladder, drafts),
    "speculation": (speculation,),
    "kernels": (kernels,),
    "context": (context,),
    "attention": (attention,),
    "pruning": (pruning_quality, pruning_speed),
    "tiny": (embedded,),
    "trust": (trust,),
}
