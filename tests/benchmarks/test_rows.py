"""What a row says of how it was measured."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from benchmarks import rows
from llama.errors import EnvironmentFailure, InputError, Notice

ROW = "rows.record(pathlib.Path('rows.jsonl'), 'x', {}, {}, torch.device('cpu'), 'float32')"


def test_a_row_names_a_command_that_can_be_typed_in_the_repository(tmp_path):
    """No path of the machine that measured it, and `-m` where a module was run."""
    script, results = tmp_path / "measure.py", tmp_path / "rows.jsonl"
    script.write_text(
        f"import pathlib, sys, torch\nsys.path.insert(0, {str(ROOT)!r})\nfrom benchmarks import rows\n{ROW}\n"
    )
    for command, out in ([str(script)], [f"--results={results}"]), (["-m", "measure"], ["--results", results]):
        subprocess.run([sys.executable, *command, "--x=1", *out, "--figures=a b"], cwd=tmp_path, check=True)
    commands = [json.loads(line)["command"] for line in results.read_text().splitlines()]
    assert commands == ["python measure.py --x=1", "python -m measure --x=1"]


def test_runs_become_the_values_of_each_metric():
    """Only numbers are metrics: what else a run says, it says of what ran. Out of memory there are no runs."""
    runs = [{"step_s": 1.5, "decoding": "eager", "ids": [1]}, {"step_s": 2.5, "decoding": "eager", "ids": [1]}]
    assert rows.by_metric(runs) == {"step_s": [1.5, 2.5]} and rows.by_metric([]) == {}


def test_changed_code_marks_the_commit_and_measured_rows_do_not(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        run = subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, text=True)
        return run.stdout.strip()

    code, results = tmp_path / "benchmarks" / "rows.py", tmp_path / "reports" / "results" / "a.jsonl"
    for path in (code, results):
        path.parent.mkdir(parents=True)
        path.write_text("1\n")
    git("init"), git("add", "-A"), git("commit", "-m", "one")
    monkeypatch.setattr(rows, "__file__", str(code))
    commit = git("rev-parse", "--short=12", "HEAD")
    assert len(commit) == 12 and rows.commit() == commit
    results.write_text("2\n")
    assert rows.commit() == commit
    code.write_text("2\n")
    assert rows.commit() == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "")
    assert rows.commit() == "unknown"


def test_a_row_whose_writing_was_interrupted_is_left_out_and_written_over(tmp_path):
    """At any byte; a row that lacks only its end counts, and one that is broken elsewhere ends the reading."""
    path, device = tmp_path / "a.jsonl", torch.device("cpu")
    for number in (1, 2):
        assert rows.record(path, "e", {"number": number}, {"x_n": [1]}, device, "float32").line == number
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first + 1, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.warns(Notice, match=r"a\.jsonl:2 is the beginning of a row"):
            assert [row.line for row in rows.read_file(path)] == [1]
    assert rows.record(path, "e", {"number": 3}, {"x_n": [1]}, device, "float32").line == 2
    assert [row.cell["number"] for row in rows.read_file(path)] == [1, 3]
    path.write_bytes(whole[:-1])
    assert [row.line for row in rows.read_file(path)] == [1, 2]
    assert rows.record(path, "e", {"number": 3}, {"x_n": [1]}, device, "float32").line == 3
    assert [row.cell["number"] for row in rows.read_file(path)] == [1, 2, 3]
    path.write_bytes(whole[: first - 2] + whole[first - 1 :])
    with pytest.raises(InputError, match=r"broken row in .*a\.jsonl:1"):
        rows.read_file(path)


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (errno.ENOSPC, EnvironmentFailure, "cannot write .*rows.jsonl: .*No space left.*; is the disk full"),
        (errno.EDQUOT, EnvironmentFailure, "is the disk full"),
        (errno.EACCES, InputError, "rows.jsonl cannot be written: Permission denied; choose another --results"),
    ],
)
def test_a_full_disk_is_no_wrong_option(tmp_path, monkeypatch, number, error, message):
    """So a program ends with the exit code of what the machine lacks."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(error, match=message):
        rows.require_writable(tmp_path / "rows.jsonl")
