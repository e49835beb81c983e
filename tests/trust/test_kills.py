"""Kills, disks that fill or go away and clocks that jump, under all that the project writes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from tests.trust import disks, kills, operations

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler is installed")


def tool(name: str, *flags: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"tests.trust.{name}", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@needs_compiler
@pytest.mark.slow
def test_kills_at_random_moments_leave_the_old_or_the_new(tmp_path):
    """Each operation four times; the second half goes on from the state of the first."""
    flags = [f"--state={tmp_path / 'state'}", f"--results={tmp_path / 'rows.jsonl'}"]
    for n in (32, 64):
        run = tool("kills", f"--n={n}", *flags)
        assert run.returncode == 0, run.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    counts = {row["cell"]["operation"]: row["metrics"] for row in rows}
    assert set(counts) == set(operations.OPERATIONS)
    assert all(found["kills_n"]["median"] == 4 and found["lost_n"]["median"] == 0 for found in counts.values())
    assert sum(found["old_n"]["median"] for found in counts.values()) < 64  # some came when something was written


# Operations on files at which a fault begins, of each operation; `python -m tests.trust.disks` takes all.
@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "points"),
    [("full disk", 3), ("failing disk", 1), ("vanishing directory", 2)]
    + [("read-only directory", 1), ("two at once", 1), ("jumping clock", 1)],
)
def test_a_disk_that_fails_leaves_the_old_or_the_new(fault, points):
    run = tool("disks", f"--faults={fault}", f"--points={points}")
    assert run.returncode == 0, run.stderr[-2000:]
    found = re.search(r"trials_n (\d+), refused_n (\d+), lost_n 0", run.stdout)
    assert int(found[1]) >= len(operations.OPERATIONS) and (int(found[2]) > 0) == (fault != "jumping clock")


class Careless(operations.Bench):
    """Operations that write two letters, one by one, into their place, or beside it; without forks."""

    def __init__(self, root: Path, is_careful: bool, ends_at: int | None) -> None:
        self.root, self.output, self.is_careful, self.ends_at = root, root / "output", is_careful, ends_at
        self.seconds = {}

    def fresh(self, name):
        return {}

    def whole(self, name):
        return {"letters": "ab"}, 2, 0.1

    def run(self, name, **_):
        ends_at, self.ends_at = self.ends_at, None
        scratch = self.root / (".letters" if self.is_careful else "letters")
        scratch.write_text("ab"[:ends_at])
        self.output.write_text("" if ends_at is None else "error: no space\n")
        if ends_at is None:
            scratch.replace(self.root / "letters")
        return 0 if ends_at is None else 3


def letters(root: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in root.glob("letters")}


@pytest.mark.parametrize(("is_careful", "expected"), [(True, None), (False, "half: ['letters'], lost: []")])
def test_half_a_file_is_noticed(tmp_path, monkeypatch, is_careful, expected):
    """The judge itself, on a writer that is careful and on one that is not."""
    monkeypatch.setitem(operations.OPERATIONS, "letters", operations.Operation(None, letters, is_new=False))
    bench = Careless(tmp_path, is_careful, ends_at=1)
    code = bench.run("letters")
    assert bench.judge("letters", code, {3}, {})[0] == expected


def test_points_are_spread_over_all_operations():
    assert list(disks.spread(10, 3)) == [1, 5, 9] and list(disks.spread(3, None)) == [1, 2, 3]


def test_only_kills_that_came_in_time_are_counted():
    trials = [
        {"operation": "rows", "is_killed": is_killed, "state": state, "scratch": 1, "problem": problem}
        for is_killed, state, problem in ((True, "old", None), (True, "new", "half"), (False, "new", None))
    ]
    counts = {what: counter["rows"] for what, counter in kills.counted(trials).items()}
    assert counts == {"kills": 2, "old": 1, "some": 0, "new": 1, "scratch": 2, "lost": 1}
