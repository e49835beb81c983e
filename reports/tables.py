"""From measured rows to tables: one function for each table, whatever shows it.

A function here takes rows of one experiment and returns `Table`s; reports/render.py turns those into text for the
terminal and Markdown, HTML and Typst. No renderer formats a figure, so a figure has the same digits everywhere.

A cell is text, a `Figure`, or several of them in a row: (Figure, " (", Figure, " to ", Figure, ")"). A `Figure` knows
the line of the file that it was read from: the page shows it, and tests look every figure up again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.rows import Row

NOT_MEASURED, OUT_OF_MEMORY = "-", "x"


@dataclass(frozen=True)
class Figure:
    """A measured number as it is shown. source: where it stands, `inference.jsonl:3 metrics.runtime_s.median`.

    title: the source in words, with the spread of the runs. value: the number itself, before rounding and unit.
    """

    text: str
    value: float
    source: str
    title: str

    def __str__(self) -> str:
        return self.text


Cell = str | Figure | tuple["str | Figure", ...]


@dataclass(frozen=True)
class Table:
    """head: titles of the columns. body: lines of cells. note: paragraphs below, of the same kind as cells.

    rows: what it was made from, for the line that says on what, when and by which command they were measured.
    """

    title: str
    head: Sequence[str]
    body: Sequence[Sequence[Cell]]
    note: Sequence[Cell] = ()
    rows: Sequence[Row] = ()


def figure(row: Row | None, name: str, form: str, scale: float = 1, stat: str = "median") -> Cell:
    """A figure of a row, by `scale`, in the format `form`; x where memory ran out, - where it was not measured."""
    if row is None or (row.metrics and name not in row.metrics):
        return NOT_MEASURED
    if not row.metrics:
        return OUT_OF_MEMORY
    values, source = row.metrics[name], row.source(f"metrics.{name}.{stat}")
    spread = f"median of {values['n']}, {values['min']:.6g} to {values['max']:.6g}" if values["n"] > 1 else "one run"
    return Figure(format(scale * values[stat], form), values[stat], source, f"{source} ({spread})")


def spread(row: Row | None, name: str, form: str, scale: float = 1) -> Cell:
    """Median (least to most), where there was more than one run."""
    median = figure(row, name, form, scale)
    if not isinstance(median, Figure) or row.metrics[name]["n"] == 1:
        return median
    least, most = (figure(row, name, form, scale, stat) for stat in ("min", "max"))
    return (median, " (", least, " to ", most, ")")


def ratio(above: Row | None, below: Row | None, name: str, form: str = ".2f", other: str | None = None) -> Cell:
    """The median `name` of one row over the median `other` (the same name where it is left out) of another."""
    lower = other or name
    for row, metric in ((above, name), (below, lower)):
        if row is None or (row.metrics and metric not in row.metrics):
            return NOT_MEASURED
        if not row.metrics:
            return OUT_OF_MEMORY
    value = above.median(name) / below.median(lower)
    source = f"{above.source(f'metrics.{name}.median')} / {below.source(f'metrics.{lower}.median')}"
    return Figure(format(value, form), value, source, source)


def chosen(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """The rows whose cell has these values."""
    return [row for row in rows if all(row.cell.get(name) == value for name, value in wanted.items())]
