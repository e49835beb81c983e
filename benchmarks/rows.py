"""The rows that keep measured figures: written by whatever measures, read with suspicion by whatever presents.

A row says what was measured, on what, with which code and by which command; tables and charts are made from rows only.
One that is not what `record` writes ends the reading with the file and the line: a page that left it out would say less
than what was measured, and one that guessed would say more. A last line without an end is no row yet: whoever was
writing it was killed.
"""

from __future__ import annotations

import datetime
import json
import shlex
import statistics
import subprocess
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama import adapters, files
from llama.device import device_name
from llama.errors import InputError, Notice
from llama.quantization import CALIBRATED, TRAINED, Quantization

OUTPUT_FLAGS = ("--state", "--results", "--figures", "--out_dir", "--work_dir")
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

    @property
    def device_name(self) -> str:
        return self.data["device"]["name"]

    @property
    def setting(self) -> str:
        """On what it was measured, for the line under a table."""
        return f"{self.data['device']['name']}, {self.data['threads']} threads, torch {self.data['torch']}"

    def has(self, *names: str) -> bool:
        return all(name in self.metrics for name in names)

    def source(self, path: str) -> str:
        """Where a figure stands, as the page says it: `inference.jsonl:3 metrics.runtime_s.median`."""
        return f"{self.file}:{self.line} {path}"


def record(
    path: Path | None,
    experiment: str,
    cell: dict[str, Any],
    runs: Mapping[str, Sequence[float]],
    device: torch.device,
    dtype: str,
    seed: int = 0,
    series: dict[str, list] | None = None,
) -> Row:
    """Append one measured cell to a file, as one line of JSON; None keeps it in memory alone.

    runs: the values of each metric, one for each run; none where memory ran out. Names end in their unit; MB is 1e6
    bytes. series: what a curve or a replay is drawn from, point by point.
    """
    data = {
        "experiment": experiment,
        "cell": cell,
        "metrics": {name: spread(values) for name, values in runs.items()},
        **({"series": series} if series is not None else {}),
        "device": {"kind": device.type, "name": device_name(device)},
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "seed": seed,
        "command": _command(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if path is None:
        return Row("", 0, data)
    return Row(path.name, files.append_json(path, data), data)


def model_cell(name: str, quantization: Quantization | None, adapter: str | None) -> dict[str, Any]:
    """What the cell of a row says of a model: its name, and where it has them the format of its weights and an adapter.

    An adapter is known by its content as well: every run of finetuning.py calls its own `adapter`.
    """
    cell: dict[str, Any] = {"model": name}
    if quantization is not None:
        cell["weights"] = f"int{quantization.bits}"
    if quantization is not None and quantization.group_size is not None:
        cell["group_size"] = quantization.group_size
    if quantization is not None and quantization.zero_points:
        cell["zero_points"] = True
    if quantization is not None and quantization.method == CALIBRATED:
        cell["calibrated"] = True
    if quantization is not None and quantization.method == TRAINED:
        cell["qat"] = True
    if quantization is not None and quantization.int8:
        cell["int8_matrices"] = len(quantization.int8)
    if adapter is not None:
        names = [folder.resolve().name for folder in adapters.folders(adapter)]
        cell |= {"adapter": ",".join(names), "adapter_sha256": adapters.fingerprint(adapter)}
    return cell


def text_cell(data: str | None) -> dict[str, str | None]:
    """What the cell of a row says of a text file; without one, of text of the embedded model's world."""
    if data is None:
        return {"data": "the embedded model's held-out text", "data_sha256": None}
    return {"data": Path(data).name, "data_sha256": files.sha256(Path(data))}


def by_metric(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The numbers of several runs as `record` takes them, by name; what else a run holds says what ran."""
    names = [name for name, value in (runs[0] if runs else {}).items() if isinstance(value, (int, float))]
    return {name: [run[name] for run in runs] for name in names}


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """What a row keeps of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def require_writable(path: Path) -> None:
    """Raise now rather than after an hour of measuring, where rows could not be appended to `path`.

    EnvironmentFailure on a full disk, InputError where the path is at fault.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        if error.errno in files.NO_SPACE:
            raise files.cannot_write(path, error) from None
        raise InputError(f"results file {path} cannot be written: {error.strerror}; choose another --results") from None


def _command() -> str:
    """The command line as it is typed in the repository, without the flags that say where output goes.

    Where things lie on this machine changes no figure and is nobody's business.
    """
    spec, script = sys.modules["__main__"].__spec__, Path(sys.argv[0]).resolve()
    root = Path(__file__).resolve().parents[1]
    name = str(script.relative_to(root)) if script.is_relative_to(root) else script.name
    flags, rest = [], iter(sys.argv[1:])
    for arg in rest:
        if arg in OUTPUT_FLAGS:
            next(rest, None)
        elif arg.partition("=")[0] not in OUTPUT_FLAGS:
            flags.append(arg)
    return shlex.join(["python", *(["-m", spec.name] if spec else [name]), *flags])


def commit() -> str:
    """The checked-out commit, marked where files other than rows differ from it; "unknown" outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!reports/results")
    except OSError:  # no git on this machine
        return "unknown"
    return f"{commit}-dirty" if commit and changed else commit or "unknown"


def read_folder(folder: Path) -> dict[str, list[Row]]:
    """The newest row of each cell, by experiment. Raises InputError for a folder or a row that cannot be read."""
    if not folder.is_dir():
        raise InputError(f"results folder {folder} does not exist; pass --results")
    newest: dict[tuple[str, ...], Row] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for row in read_file(path):
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


def read_file(path: Path) -> list[Row]:
    """All rows of a file, but for an unfinished last line. Raises InputError naming file and line of a broken one."""
    if not path.is_file():
        raise InputError(f"{path} is not a file; restore it, or take it out of the folder")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}; restore it") from None
    rows, lines = [], text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(Row(path.name, number, _checked(line)))
        except (ValueError, RecursionError) as error:
            if number == len(lines) and not text.endswith("\n"):
                unfinished = f"{path}:{number} is the beginning of a row, whose writing was interrupted; it is left out"
                warnings.warn(unfinished, Notice, stacklevel=2)
                break
            raise InputError(f"broken row in {path}:{number}: {error}; restore the line or remove it") from None
    return rows


def _checked(line: str) -> dict[str, Any]:
    """The row in a line. Raises ValueError, with the field, for anything that `record` does not write."""
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
    """Not an integer that is too large to be drawn, either."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a number")
