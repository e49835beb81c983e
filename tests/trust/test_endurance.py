"""Hundreds of generations of every kind and a hundred training steps in one process."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys

import psutil
import pytest
import torch
from conftest import ROOT

from tests.trust import endurance


@pytest.mark.slow
def test_nothing_grows_and_nothing_is_left_over(tmp_path):
    """In a process of its own: memory, descriptors, threads, children and tensors; each kind repeats its output."""
    flags = ["--generations=400", "--steps=100", f"--results={tmp_path / 'rows.jsonl'}"]
    command = [sys.executable, "-m", "tests.trust.endurance", *flags]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    found = {row["cell"]["part"]: row["metrics"] for row in rows}
    assert (
        found["generation"]["kinds_n"]["median"] == len(endurance.KINDS)
        and found["training"]["rss_mb"]["n"] == endurance.MOMENTS
    )


def test_what_grows_or_is_left_over_is_noticed(tmp_path):
    """Tensors, descriptors and memory, one by one: the watch itself."""
    kept: list = []

    def quiet(_: int) -> None:
        torch.ones(10)

    def keep_tensors(_: int) -> None:
        kept.append(torch.ones(10))

    def keep_files(_: int) -> None:
        kept.append(stack.enter_context((tmp_path / "file").open("w")))

    def keep_memory(_: int) -> None:
        kept.append(b"x" * (psutil.Process().memory_info().rss // 20))  # a share: other tests have been here

    expected = {quiet: "", keep_tensors: "more_tensors", keep_files: "more_descriptors", keep_memory: "memory grew"}
    with contextlib.ExitStack() as stack:
        for work, what in expected.items():
            figures = {
                name: sorted(values)[len(values) // 2] for name, values in endurance.watched(4, work, "").items()
            }
            problems = endurance.wrong({**figures, "different_n": 0})
            assert any(problem.startswith(what) for problem in problems) if what else not problems, (what, problems)
    assert endurance.wrong({"growth_percent": 0, "different_n": 1}) == ["1 outputs differ"]
