"""Lets disks and clocks fail under whatever writes files, and looks at what is left.

    python -m tests.trust.disks --results=reports/results/trust.jsonl      # every operation on a file, one by one

A fault, of fault.c, begins at one operation on a file and then at the next. Each run ends well, or with one line and
the exit code for a bad environment; each file and directory is as it was before or whole; a run without the fault then
gives what an undisturbed one does.
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from benchmarks import rows as row_files
from llama import cli
from llama.cli import option
from llama.errors import InternalError
from tests.trust import operations
from tests.trust.operations import OPERATIONS, Bench, crash, text_of

YEARS = 10 * 365 * 86_400  # seconds


class Trial(NamedTuple):
    """At which operation on a file, the exit code, and what was wrong."""

    moment: int
    code: int
    problem: str | None


def refused(bench: Bench, name: str, number: int, lasting: int, moments: range, codes: set[int]) -> Iterator[Trial]:
    """An error from one operation on; -1: the directory goes away, and comes back before the next run."""
    for moment in moments:
        before = bench.fresh(name)
        code = bench.run(name, fault=(moment, number, lasting))
        yield Trial(moment, code, bench.judge(name, code, codes, before)[0])


def full(bench: Bench, name: str, moments: range) -> Iterator[Trial]:
    return refused(bench, name, errno.ENOSPC, 1, moments, {0, 3})


def failing(bench: Bench, name: str, moments: range) -> Iterator[Trial]:
    return refused(bench, name, errno.EIO, 0, moments, {0, 3})


def read_only(bench: Bench, name: str, moments: range) -> Iterator[Trial]:
    return refused(bench, name, errno.EROFS, 1, range(1, 2), {2, 3})


def vanishing(bench: Bench, name: str, moments: range) -> Iterator[Trial]:
    return refused(bench, name, -1, 0, moments, {0, 2, 3})


def clock(bench: Bench, name: str, moments: range) -> Iterator[Trial]:
    before = bench.fresh(name)
    code = bench.run(name, jump=YEARS)
    yield Trial(0, code, bench.judge(name, code, {0}, before)[0])


def two_at_once(bench: Bench, name: str, moments: range) -> Iterator[Trial]:
    """Two runs in one directory: one of them ends well, and both where a file is replaced or a row appended."""
    bench.fresh(name)
    other = bench.output.with_name("other output")
    pids = [bench.start(name), bench.start(name, output=other)]
    codes, texts = [crash.end(pid) for pid in pids], [text_of(bench.output), text_of(other)]
    allowed = {0} if name in operations.SHARED else {0, 2, 3}
    problems = [crash.wrong_end(code, text, allowed) for code, text in zip(codes, texts, strict=True)]
    n_well, seen = codes.count(0), OPERATIONS[name].view(bench.root)
    if not n_well or (OPERATIONS[name].is_new and n_well > 1) or seen != bench.whole(name)[0]:
        problems.append(f"exit codes {codes}; {texts}")
    if name == "rows":
        n_rows = len(row_files.read_file(bench.root / "rows.jsonl"))
        bench.fresh(name)
        expected = len(row_files.read_file(bench.root / "rows.jsonl")) + 2
        problems.append(None if n_rows == expected else f"{n_rows} rows, not {expected}")
    yield Trial(0, max(codes), next(filter(None, problems), None))


FAULTS: dict[str, Callable[[Bench, str, range], Iterator[Trial]]] = {
    "full disk": full,
    "failing disk": failing,
    "read-only directory": read_only,
    "vanishing directory": vanishing,
    "two at once": two_at_once,
    "jumping clock": clock,
}


@dataclass(frozen=True)
class Options(cli.Options):
    """Let disks and clocks fail under each operation."""

    faults: str = option(",".join(FAULTS), "which", choices=FAULTS, several=True)
    operations: str = option(",".join(OPERATIONS), "which", choices=OPERATIONS, several=True)
    points: int | None = option(None, "operations on files at which a fault begins, at most; default: all", least=1)
    results: str | None = option(None, "file to append a row per fault to; default: none")


def main(options: Options) -> None:
    operations.preload()
    lost, names = [], options.operations.split(",")
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(Path(work))
        for fault in options.faults.split(","):
            found = []
            for name in tqdm(names, desc=fault, unit="operation", disable=None):
                n = bench.whole(name)[1]
                trials = list(FAULTS[fault](bench, name, spread(n, options.points)))
                lost += [f"{name}, {fault} at {trial.moment}: {trial.problem}" for trial in trials if trial.problem]
                found += trials
            runs = {"trials_n": [len(found)], "refused_n": [sum(trial.code != 0 for trial in found)]}
            runs |= {"lost_n": [sum(trial.problem is not None for trial in found)], "operations_n": [len(names)]}
            print(f"{fault:<20}", ", ".join(f"{what} {values[0]}" for what, values in runs.items()), flush=True)
            if options.results is not None:
                path, cpu = Path(options.results), torch.device("cpu")
                row_files.record(path, "trust", {"kind": "disks", "fault": fault}, runs, cpu, "float32")
    if lost:
        raise InternalError(f"{len(lost)} trials went wrong: {'; '.join(lost[:5])}")


def spread(n: int, points: int | None) -> range:
    """At most so many of 1 to n, from one end to the other."""
    return range(1, n + 1, 1 if points is None else -(-n // points))


if __name__ == "__main__":
    cli.run(main)
