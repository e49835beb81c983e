"""How a table is made from rows: column by column, and for each setting that was measured."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from benchmarks.rows import Row, group
from reports.cells import Cell, Table, figure, ratio, spread

RELATIVE = "vs. limit: relative to the hardware limit (1.00 = limit)"  # under tables with such columns
Column = Callable[[Row], Cell]
Tables = Callable[[Sequence[Row]], list[Table]]


def table(name: str, title: str, rows: Sequence[Row], columns: dict[str, Column], *note: Cell) -> Table:
    """A table with a line for each row. columns: what stands in a line, by its title."""
    body = [[column(row) for column in columns.values()] for row in rows]
    return Table(name, title, list(columns), body, note, rows)


def word(name: str) -> Column:
    """A column of what the rows' cells call `name`."""
    return lambda row: str(row.cell[name])


def metric(name: str, form: str, scale: float = 1, stat: str = "median") -> Column:
    """A column of one metric's medians."""
    return lambda row: figure(row, name, form, scale, stat)


def runs(name: str, form: str, scale: float = 1) -> Column:
    """A column of one metric's medians with their least and most."""
    return lambda row: spread(row, name, form, scale)


def relative(base: Callable[[Row], Row | None], name: str) -> Column:
    """A column of one metric over that of another row, which `base` finds."""
    return lambda row: ratio(row, base(row), name)


def faster(base: Callable[[Row], Row | None], name: str) -> Column:
    """A column of how many times as fast a row is as another one."""
    return lambda row: ratio(base(row), row, name)


def per_setting(*names: str, dtype: bool = True) -> Callable[[Callable[[list[Row]], list[Table]]], Tables]:
    """Let a function that makes tables of rows of one setting take rows of any: it is called for each setting.

    A setting is device, threads, torch, dtype (unless that may differ) and these names in the rows' cells.
    """

    def decorate(make: Callable[[list[Row]], list[Table]]) -> Tables:
        @functools.wraps(make)
        def tables(rows: Sequence[Row]) -> list[Table]:
            return [table for found in group(rows, *names, dtype=dtype) for table in make(found)]

        return tables

    return decorate
