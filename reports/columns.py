"""How a table is made from rows: column by column, and for each setting that was measured."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from benchmarks.rows import Row, group
from reports.cells import Cell, Table, figure, ratio, spread

RELATIVE = "vs. limit: relative to the hardware limit (1.00 = limit)"  # under tables with such columns
Column = Callable[[Row], Cell]
Related = Callable[[Row], Row | None]  # from a row to the one that it is compared with
Tables = Callable[[Sequence[Row]], list[Table]]


def line_per_row(name: str, title: str, rows: Sequence[Row], columns: dict[str, Column], *note: Cell) -> list[Table]:
    """A table with a line for each row; none without rows. columns: what stands in a line, by its title."""
    body = [[column(row) for column in columns.values()] for row in rows]
    return [Table(name, title, list(columns), body, note, rows)] if body else []


def word(name: str) -> Column:
    """A column of what the rows' cells call `name`."""
    return lambda row: str(row.cell[name])


def itself(row: Row) -> Row:
    return row


def metric(name: str, form: str, scale: float = 1, stat: str = "median", of: Related = itself) -> Column:
    """A column of one metric's medians, of another row where `of` finds one."""
    return lambda row: figure(of(row), name, form, scale, stat)


def runs(name: str, form: str, scale: float = 1, of: Related = itself) -> Column:
    """A column of one metric's medians with their least and most."""
    return lambda row: spread(of(row), name, form, scale)


def relative(base: Related, name: str) -> Column:
    """A column of one metric over that of another row, which `base` finds."""
    return lambda row: ratio(row, base(row), name)


def faster(base: Related, name: str) -> Column:
    """A column of how many times as fast a row is as another one."""
    return lambda row: ratio(base(row), row, name)


def per_setting(*names: str, dtype: bool = True) -> Callable[[Callable[[list[Row]], list[Table]]], Tables]:
    """Let a function that makes tables of rows of one setting take rows of any: it is called for each setting.

    A setting is device, threads, torch, dtype (unless that may differ) and these names in the rows' cells.
    """

    def decorate(make: Callable[[list[Row]], list[Table]]) -> Tables:
        @functools.wraps(make)
        def tables(rows: Sequence[Row]) -> list[Table]:
            return [table for same in group(rows, *names, dtype=dtype) for table in make(same)]

        return tables

    return decorate
