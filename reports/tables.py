"""From measured rows to tables: one function for each table, whatever shows it.

A function here takes rows of one experiment and returns `Table`s, one or more for each setting that was measured;
reports/render.py turns those into Markdown, which the terminal shows too, HTML and Typst. No renderer formats a figure,
so a figure has the same digits everywhere. Left out: charts (charts.py), and which tables stand where (build.py).

A cell is text, a `Figure`, or several of them in a row: (Figure, " (", Figure, " to ", Figure, ")"). A `Figure` knows
the line of the file that it was read from: the page shows it, and tests look every figure up again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.rows import Row

NOT_MEASURED, OUT_OF_MEMORY = "-", "x"


@dataclass(frozen=True)
class Figure:
    """A measured number as it is shown. source: where it stands, `inference.jsonl:3 metrics.runtime_s.median`.

    A figure that was computed from several has a formula of such places. title: the source in words, with the spread
    of the runs. value: the number itself; times `scale` and rounded, it is `text`.
    """

    text: str
    value: float
    source: str
    title: str
    scale: float = 1

    def __str__(self) -> str:
        return self.text


Cell = str | Figure | tuple["str | Figure", ...]


@dataclass(frozen=True)
class Table:
    """head: titles of the columns. body: lines of cells. note: paragraphs below, of the same kind as cells.

    name: what documents call it, the same for every setting. rows: what it was made from, for the line that says on
    what, when and by which command they were measured.
    """

    name: str
    title: str
    head: Sequence[str]
    body: Sequence[Sequence[Cell]]
    note: Sequence[Cell] = ()
    rows: Sequence[Row] = ()

    @property
    def numeric(self) -> list[bool]:
        """For each column, whether it holds nothing but figures; those are set to the right."""
        return [all(_is_number(line[i]) for line in self.body) for i in range(len(self.head))]


def _is_number(cell: Cell) -> bool:
    return isinstance(cell[0] if isinstance(cell, tuple) else cell, Figure) or cell in (NOT_MEASURED, OUT_OF_MEMORY)


def figure(row: Row | None, name: str, form: str, scale: float = 1, stat: str = "median") -> Cell:
    """A figure of a row, by `scale`, in the format `form`; x where memory ran out, - where it was not measured."""
    if (gap := _gap((row, name))) is not None:
        return gap
    values, source = row.metrics[name], row.source(f"metrics.{name}.{stat}")
    spread = f"median of {values['n']}, {values['min']:.6g} to {values['max']:.6g}" if values["n"] > 1 else "one run"
    return Figure(format(scale * values[stat], form), values[stat], source, f"{source} ({spread})", scale)


def spread(row: Row | None, name: str, form: str, scale: float = 1) -> Cell:
    """Median (least to most), where there was more than one run."""
    median = figure(row, name, form, scale)
    if not isinstance(median, Figure) or row.metrics[name]["n"] == 1:
        return median
    least, most = (figure(row, name, form, scale, stat) for stat in ("min", "max"))
    return (median, " (", least, " to ", most, ")")


def computed(formula: str, function: Callable[..., float], form: str, *terms: tuple[Row | None, str]) -> Cell:
    """A figure computed from medians. formula: how its source is written, "{} / {}"; terms: rows and metrics in it."""
    gaps = [gap for term in terms if (gap := _gap(term)) is not None]
    if gaps:
        return min(gaps)  # - before x
    value = function(*(row.median(name) for row, name in terms))
    source = formula.format(*(row.source(f"metrics.{name}.median") for row, name in terms))
    return Figure(format(value, form), value, source, source)


def ratio(above: Row | None, below: Row | None, name: str, form: str = ".2f", other: str | None = None) -> Cell:
    """The median `name` of one row over the median `other` (the same name where it is left out) of another."""
    return computed("{} / {}", operator.truediv, form, (above, name), (below, other or name))


def _gap(term: tuple[Row | None, str]) -> str | None:
    """What stands for a metric that is not there."""
    row, name = term
    if row is None or (row.metrics and name not in row.metrics):
        return NOT_MEASURED
    return None if row.metrics else OUT_OF_MEMORY


def chosen(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """The rows whose cell has these values."""
    return [row for row in rows if all(row.cell.get(name) == value for name, value in wanted.items())]
