"""What the benchmarks printed before reports/tables.py: kept until the PDFs are made of those tables, too."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from benchmark_finetuning import TECHNIQUES
from benchmark_finetuning import StepCell as Cell
from benchmarks import rows as row_files
from reports import formats as tables
from reports.formats import CHANGED, KINDS, SLOWER, arrow, median, most_mb

TITLES = {"checkpointing": "gradient checkpointing", "amp": "mixed precision", "lora": "LoRA"}


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
    return "\n".join(parts)
