"""What a table is made of: figures of measured rows, each with the place that it was read from.

A cell is text, a `Figure`, or several of them: (Figure, " (", Figure, " to ", Figure, ")"). No renderer formats
a figure, so it has the same digits everywhere. A row that ran out of memory has "x", what was not measured is "-".
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.rows import Row

GAPS = NOT_MEASURED, OUT_OF_MEMORY = "-", "x"


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
        columns = zip(*self.body, strict=True)
        firsts = [[cell[0] if isinstance(cell, tuple) else cell for cell in column] for column in columns]
        return [all(isinstance(cell, Figure) or cell in GAPS for cell in column) for column in firsts]


def figure(row: Row | None, name: str, form: str, scale: float = 1, stat: str = "median") -> Cell:
    """A figure of a row, by `scale`, in the format `form`; x where memory ran out, - where it was not measured."""
    if (gap := _gap((row, name))) is not None:
        return gap
    values, source = row.metrics[name], row.source(f"metrics.{name}.{stat}")
    spread = f" (median of {values['n']}, {values['min']:.6g} to {values['max']:.6g})" if values["n"] > 1 else ""
    return Figure(format(scale * values[stat], form), values[stat], source, f"{source}{spread}", scale)


def spread(row: Row | None, name: str, form: str, scale: float = 1) -> Cell:
    """Median (least to most), where there was more than one run."""
    median, least, most = (figure(row, name, form, scale, stat) for stat in ("median", "min", "max"))
    is_one = not isinstance(median, Figure) or row.metrics[name]["n"] == 1
    return median if is_one else (median, " (", least, " to ", most, ")")


def computed(formula: str, function: Callable[..., float], form: str, *terms: tuple[Row | None, str]) -> Cell:
    """A figure computed from others. formula: how its source is written, "{} / {}".

    terms: what stands in it, each a row and a metric, whose median it is, or a number of its cell, "cell.output_len".
    """
    gaps = [gap for term in terms if (gap := _gap(term)) is not None]
    if gaps:
        return min(gaps)  # - before x
    places = [(row, name if name.startswith("cell.") else f"metrics.{name}.median") for row, name in terms]
    try:
        value = function(*(functools.reduce(operator.getitem, path.split("."), row.data) for row, path in places))
    except ZeroDivisionError:
        return NOT_MEASURED
    source = formula.format(*(row.source(path) for row, path in places))
    return Figure(format(value, form), value, source, source)


def ratio(above: Row | None, below: Row | None, name: str, form: str = ".2f", other: str | None = None) -> Cell:
    """The median `name` of one row over the median `other` (the same name where it is left out) of another."""
    return computed("{} / {}", operator.truediv, form, (above, name), (below, other or name))


def _gap(term: tuple[Row | None, str]) -> str | None:
    """What stands for a metric that is not there."""
    row, name = term
    if row is None or (row.metrics and name not in row.metrics and not name.startswith("cell.")):
        return NOT_MEASURED
    return None if row.metrics else OUT_OF_MEMORY


def chosen(rows: Sequence[Row], /, **wanted: Any) -> list[Row]:
    """The rows whose cell has these values."""
    return [row for row in rows if all(row.cell.get(name) == value for name, value in wanted.items())]


def newest(rows: Sequence[Row], /, **wanted: Any) -> Row | None:
    """The last of the rows whose cell has these values."""
    return next(reversed(chosen(rows, **wanted)), None)
