"""The measured rows of reports/results, read with suspicion; each knows the line that it stands in.

A row that is not what llama/bench.py writes ends the reading with the file and the line: a page that left it out would
say less than what was measured, and one that guessed would say more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.errors import InputError

FIELDS = {"experiment": str, "cell": dict, "metrics": dict, "device": dict, "dtype": str, "threads": int}
FIELDS |= {"torch": str, "commit": str, "command": str, "time": str}
SPREAD = ("median", "min", "max", "n")


@dataclass(frozen=True)
class Row:
    """One measured cell, and where it stands: line `line` (from 1) of `file`."""

    file: str
    line: int
    data: dict[str, Any]

    @property
    def cell(self) -> dict[str, Any]:
        return self.data["cell"]

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        return self.data["metrics"]

    def median(self, name: str) -> float:
        return self.metrics[name]["median"]

    def has(self, *names: str) -> bool:
        return all(name in self.metrics for name in names)

    def source(self, path: str) -> str:
        """Where a figure stands, as the page says it: `inference.jsonl:3 metrics.runtime_s.median`."""
        return f"{self.file}:{self.line} {path}"


def read_folder(folder: Path) -> dict[str, list[Row]]:
    """The newest row of each cell, by experiment. Raises InputError for a folder or a row that cannot be read."""
    if not folder.is_dir():
        raise InputError(f"results folder {folder} does not exist; pass --results")
    newest: dict[tuple[str, ...], Row] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for row in _read_file(path):
            place = (json.dumps(row.cell, sort_keys=True), row.data["dtype"], row.data["device"]["name"])
            newest[row.data["experiment"], *place] = row
    found: dict[str, list[Row]] = {}
    for (experiment, *_), row in sorted(newest.items(), key=lambda item: (item[0][0], item[1].file, item[1].line)):
        found.setdefault(experiment, []).append(row)
    return found


def group(rows: Iterable[Row], *names: str, dtype: bool = True) -> list[list[Row]]:
    """Rows of the same setting, in the same dtype unless that may differ, that agree in these keys of their cells."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        data = row.data
        setting = [data["device"]["name"], data["threads"], data["torch"], data["dtype"] if dtype else ""]
        groups.setdefault(json.dumps([[row.cell.get(name) for name in names], setting]), []).append(row)
    return list(groups.values())


def _read_file(path: Path) -> list[Row]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}; restore it") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(Row(path.name, number, _checked(line)))
        except (ValueError, RecursionError) as error:
            raise InputError(f"broken row in {path}:{number}: {error}; restore the line or remove it") from None
    return rows


def _checked(line: str) -> dict[str, Any]:
    """The row in a line. Raises ValueError, with the field, for anything that bench.append_row does not write."""
    data = json.loads(line, parse_constant=_refuse)
    if not isinstance(data, dict):
        raise ValueError("it is not a JSON object")
    for name, kind in FIELDS.items():
        if not isinstance(data.get(name), kind):
            raise ValueError(f"{name} is missing or not of type {kind.__name__}")
    if not all(isinstance(data["device"].get(name), str) for name in ("kind", "name")):
        raise ValueError("device has no kind or no name")
    for name, values in data["metrics"].items():
        if not isinstance(values, dict) or not all(_is_number(values.get(part)) for part in SPREAD):
            raise ValueError(f"metrics.{name} is not {', '.join(SPREAD)} in numbers")
    series = data.get("series", {})
    if not isinstance(series, dict) or not all(isinstance(points, list) for points in series.values()):
        raise ValueError("series is not lists by name")
    return data


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a number")
