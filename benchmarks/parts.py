"""Scripts that measure, run one after the other within a time budget: course.py's parts, and what became of each.

A part writes its rows to a hidden file, which takes its name in `out`/rows when the script has ended well. So a run
that is stopped anywhere and started again has every part's rows as a whole or not at all, and goes on with what is
missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from benchmarks import rows
from llama import files

ROOT = Path(__file__).parents[1]
REPEATS = 5
BEFORE = "measured before"
TO_END = 10  # seconds that a script has to end by itself


@dataclass(frozen=True)
class Part:
    """A command. kind: "once"; "repeated", which takes a number of repeats; or "training", which can be resumed."""

    name: str
    command: tuple[str, ...]
    kind: str = "once"
    draws: bool = False  # takes a folder for charts

    @property
    def file(self) -> str:
        """Where its rows are kept: another command, such as one for other weights, has another file."""
        words = re.sub(r"\W+", "-", self.name.lower())
        return f"{words}.{hashlib.sha256(repr(self.command).encode()).hexdigest()[:8]}"


class Parts:
    """Parts one after the other, and what became of each. minutes: None for as many as it takes."""

    def __init__(self, out: Path, device: str, minutes: float | None) -> None:
        self.out, self.device, self.commit = out, device, rows.commit()
        self.end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.state: dict[str, str] = {}  # of each part, as the last table says it
        self.seconds: dict[str, float] = {}  # that a part took in this process
        for name in ("rows", "logs", "trainings"):
            (out / name).mkdir(parents=True, exist_ok=True)
        for left_over in out.glob(".*.jsonl"):
            left_over.unlink()

    def measure(self, wanted: Sequence[Part]) -> None:
        """Each part; where there is a budget all of them once, before any is repeated."""
        for repeats in (REPEATS,) if self.end == math.inf else (1, REPEATS):
            for part in wanted:
                n = repeats if part.kind == "repeated" else 1
                if self.has(part, n):
                    self.state.setdefault(part.name, BEFORE)
                elif self.state.get(part.name, BEFORE) == BEFORE or part.name in self.seconds:
                    self.state[part.name] = self.attempt(part, n)

    def has(self, part: Part, n: int) -> bool:
        """Whether there are rows of this part, device and commit, of n runs."""
        path = self.out / "rows" / f"{part.file}.jsonl"
        found = rows.read_file(path) if path.exists() else []
        counts = [spread["n"] for row in found for spread in row.metrics.values()]
        is_here = all((row.device_name, row.data["commit"]) == (self.device, self.commit) for row in found)
        return bool(found) and is_here and max(counts, default=n) >= n

    def attempt(self, part: Part, n: int) -> str:
        """Run a part n times; what the last table says of it."""
        before, left = self.state.get(part.name), self.end - time.monotonic()
        needed = n * self.seconds.get(part.name, 0)
        if left <= 0 or needed > left:
            missing = f"the {needed / 60:.0f} minutes for {n} runs were not left" if before else "the time was up"
            return f"{before}; {missing}" if before else f"not measured: {missing}"
        print(f"{part.name}, {runs(n)}{f', {left / 60:.0f} minutes left' if left < math.inf else ''}", flush=True)
        began = time.monotonic()
        reason = self.run(part, n, left)
        if reason is None:
            self.seconds[part.name] = time.monotonic() - began
            return runs(n)
        return f"{before}; for {n} runs {reason}" if before else f"not measured: {reason}"

    def run(self, part: Part, n: int, limit: float) -> str | None:
        """Run a part; None where it is done, else why not. Its rows appear as a whole, in place of older ones."""
        scratch, command = self.out / f".{part.file}.{os.getpid()}.jsonl", part.command
        flags = [f"--results={scratch}", *[f"--repeats={n}"] * (part.kind == "repeated")]
        flags += [f"--figures={self.out / 'figures'}"] * part.draws
        if part.kind == "training":
            training = self.out / "trainings" / part.file
            flags.append(f"--out_dir={training}")
            if (training / "summary.json").exists():  # it had ended, and was stopped before its row was kept
                shutil.rmtree(training)
            if any(training.glob("snapshots/step-*")):
                command = (command[0], "--resume")
        try:
            if (reason := self.call(part.file, (*command, *flags), limit)) is not None:
                return reason
            if not (scratch.exists() and rows.read_file(scratch)):
                return f"it left no rows; see {self.out / 'logs' / part.file}.txt"
            for older in self.out.glob(f"rows/{part.file.partition('.')[0]}.*"):
                older.unlink()
            files.sync(scratch)
            scratch.replace(self.out / "rows" / f"{part.file}.jsonl")
        finally:
            scratch.unlink(missing_ok=True)
        return None

    def call(self, name: str, command: Sequence[str], limit: float = math.inf) -> str | None:
        """Run a script for at most `limit` seconds; None where all went well, else in what it ended."""
        path = self.out / "logs" / f"{name}.txt"
        script = command if command[0] == "-m" else (str(ROOT / command[0]), *command[1:])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        with path.open("w") as log:
            code = end_in_time([sys.executable, *script], environment, log, limit)
        said = [line for line in path.read_text(errors="replace").splitlines() if line.startswith("error: ")]
        if code is None or code == 0:
            return None if code == 0 else "the time was up"
        ended = f"killed by signal {-code}, which may be for memory" if code < 0 else f"exit code {code}"
        if code > 0 and not path.stat().st_size:
            ended += " and nothing said, as on a full disk"
        return said[-1].removeprefix("error: ") if said else f"{ended}; see {path}"

    def summary(self) -> str:
        """What was measured, what was not, and why, as a table in Markdown."""
        lines = [f"| {name} | {state} |" for name, state in self.state.items()]
        return "\n".join([f"| {self.device} | |", "|---|---|", *lines, ""])


def runs(n: int) -> str:
    return "one run" if n == 1 else f"{n} runs"


def end_in_time(command: Sequence[str], environment: dict[str, str], log: TextIO, limit: float) -> int | None:
    """The exit code of a process; None where it was ended, with its own ones, because `limit` seconds were over."""
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        return process.wait(None if limit == math.inf else limit)
    except subprocess.TimeoutExpired:
        return None
    finally:  # also where this process is interrupted
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TO_END)
