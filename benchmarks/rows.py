"""The rows that keep measured figures.

A row says what was measured, on what, with which code and by which command; tables and plots are made from rows only.
"""

from __future__ import annotations

import datetime
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llama.device import device_name
from llama.errors import InputError

OUTPUT_FLAGS = ("--results", "--figure", "--out_dir", "--work_dir")


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """What a row keeps of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def medians(row: dict[str, Any]) -> dict[str, float]:
    """The median of each metric of a row, by name."""
    return {name: values["median"] for name, values in row["metrics"].items()}


def setting(row: dict[str, Any]) -> str:
    """On what a row was measured, for the line under a table."""
    return f"{row['device']['name']}, {row['threads']} threads, torch {row['torch']}"


def require_writable(path: Path) -> None:
    """Raise InputError now rather than after an hour of measuring, where rows could not be appended to `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        raise InputError(f"results file {path} cannot be written: {error.strerror}; choose another --results") from None


def make_row(
    experiment: str,
    cell: dict[str, Any],
    metrics: dict[str, Any],
    device: torch.device,
    dtype: str,
    seed: int,
    series: dict[str, list] | None = None,
) -> dict[str, Any]:
    """One measured cell and all that is to be known about it. Metric names end in their unit; MB is 1e6 bytes.

    series: what a curve or a replay is drawn from, point by point; most rows have none.
    """
    return {
        "experiment": experiment,
        "cell": cell,
        "metrics": metrics,
        **({"series": series} if series is not None else {}),
        "device": {"kind": device.type, "name": device_name(device)},
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": _commit(),
        "seed": seed,
        "command": _command(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def append_row(
    path: Path,
    experiment: str,
    cell: dict[str, Any],
    metrics: dict[str, Any],
    device: torch.device,
    dtype: str,
    seed: int,
    series: dict[str, list] | None = None,
) -> dict[str, Any]:
    """Append one measured cell, as one line of JSON, and return it."""
    row = make_row(experiment, cell, metrics, device, dtype, seed, series)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return row


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


def _commit() -> str:
    """The checked-out commit, marked where files differ from it; "unknown" outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git on this machine
        return "unknown"
    return run.stdout.strip() or "unknown"
