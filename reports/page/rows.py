"""Moved to benchmarks/rows.py."""

from benchmarks.rows import Row, group, read_folder

__all__ = ["Row", "group", "read_folder"]
