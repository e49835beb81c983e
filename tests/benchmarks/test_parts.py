"""Parts of a course: resumed, within a budget, and none of them ends another."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import crash
import psutil
import pytest
from conftest import ROOT
from support import measured_row

from benchmarks import parts, rows
from benchmarks.parts import Part, Parts

WRITES = """
import json, os, sys, time
flags = dict(arg.removeprefix("--").split("=", 1) for arg in sys.argv[1:])
n = int(flags.get("repeats", 1))
open({log!r}, "a").write(flags["name"] + " ")
time.sleep(float(flags.get("sleep", 0)) * n)
if "fails" in flags:
    sys.exit(flags["fails"])
if "dies" in flags:
    os.kill(os.getpid(), 9)
row = json.loads({row!r})
row["cell"] |= dict(name=flags["name"])
row["metrics"]["x_s"]["n"] = n
open(flags["results"], "a").write(json.dumps(row) + chr(10))
"""
DEVICE = "A CPU"


@pytest.fixture
def script(tmp_path) -> Path:
    """A script that keeps a row as a benchmark does, but starts at once."""
    row = measured_row({"x_s": 1.0}).data
    row |= {"experiment": "fake", "commit": rows.commit(), "device": {"kind": "cpu", "name": DEVICE}}
    path = tmp_path / "writes.py"
    path.write_text(WRITES.format(row=json.dumps(row), log=str(tmp_path / "log")))
    return path


def part(script: Path, name: str, kind: str = "repeated", **flags: object) -> Part:
    return Part(name, (str(script), f"--name={name}", *(f"--{flag}={value}" for flag, value in flags.items())), kind)


def course(tmp_path: Path, minutes: float | None = None) -> Parts:
    return Parts(tmp_path / "out", DEVICE, minutes)


def measured(tmp_path: Path) -> dict[str, int]:
    """Runs of each name in the rows."""
    found = [row for path in (tmp_path / "out" / "rows").glob("*.jsonl") for row in rows.read_file(path)]
    return {row.cell["name"]: row.metrics["x_s"]["n"] for row in found}


def test_a_part_that_fails_ends_no_other_and_is_tried_again(tmp_path, script):
    wanted = [part(script, "a"), part(script, "b", fails="error: out of memory; use less"), part(script, "c", dies=1)]
    wanted += [part(script, "d", "once"), Part("e", (str(tmp_path / "none.py"),))]
    first = course(tmp_path)
    first.measure(wanted)
    assert first.state["a"] == "5 runs" and first.state["d"] == "one run"
    assert first.state["b"] == "not measured: out of memory; use less"
    assert first.state["c"].startswith("not measured: killed by signal 9") and "exit code 2" in first.state["e"]
    assert measured(tmp_path) == {"a": 5, "d": 1}
    again = course(tmp_path)
    again.measure([*wanted[:1], part(script, "b"), *wanted[2:]])
    assert again.state["a"] == "measured before" and again.state["b"] == "5 runs"
    assert (tmp_path / "log").read_text().split() == ["a", "b", "c", "d", "b", "c"]
    assert not list((tmp_path / "out").glob(".*"))


def test_a_training_that_had_ended_without_its_row_begins_anew(tmp_path, script):
    """As a kill leaves it between the end of the training and the row's name: resumed, it would keep none."""
    ends = "if '--resume' in sys.argv: open(flags['results'], 'a'), sys.exit(0)\nn = int(flags"
    script.write_text(
        script.read_text()
        .replace("in sys.argv[1:])", "in sys.argv[1:] if '=' in arg)")
        .replace("n = int(flags", ends)
        .replace('flags["name"]', '"a"')
    )
    wanted = Part("a", (str(script), "--name=a"), "training")
    found = course(tmp_path)
    training = tmp_path / "out" / "trainings" / wanted.file
    (training / "snapshots" / "step-00000001").mkdir(parents=True)
    found.measure([wanted])
    assert "it left no rows" in found.state["a"] and not list((tmp_path / "out" / "rows").iterdir())
    (training / "summary.json").write_text("{}")
    found = course(tmp_path)
    found.measure([wanted])
    assert found.state["a"] == "one run" and found.has(wanted, 1) and not training.exists()


def test_other_weights_another_commit_or_device_are_measured_anew(tmp_path, script):
    for wanted in (part(script, "a"), part(script, "a", seed=2)):
        course(tmp_path).measure([wanted])
    path, *others = (tmp_path / "out" / "rows").iterdir()
    assert not others and len((tmp_path / "log").read_text().split()) == 2
    for change in ({"commit": "0" * 12}, {"device": {"kind": "cuda", "name": "Tesla P100"}}):
        path.write_text(json.dumps(json.loads(path.read_text()) | change) + "\n")
        assert not course(tmp_path).has(part(script, "a", seed=2), 1)
    course(tmp_path).measure([part(script, "a", seed=2)])
    assert course(tmp_path).has(part(script, "a", seed=2), 5)


def test_with_a_budget_all_are_measured_once_before_any_is_repeated(tmp_path, script):
    found = course(tmp_path, minutes=1)
    found.measure([part(script, "a"), part(script, "b"), part(script, "c", "once")])
    assert (tmp_path / "log").read_text().split() == ["a", "b", "c", "a", "b"]
    assert measured(tmp_path) == {"a": 5, "b": 5, "c": 1} and set(found.state.values()) == {"5 runs", "one run"}


def test_what_does_not_fit_is_said_and_what_was_measured_stays(tmp_path, script):
    found = course(tmp_path, minutes=6 / 60)
    found.measure([part(script, "a", sleep=1), part(script, "b", sleep=60), part(script, "c")])
    assert "the 0 minutes for 5 runs were not left" in found.state["a"] and found.state["a"].startswith("one run; ")
    assert found.state["b"] == found.state["c"] == "not measured: the time was up"
    assert measured(tmp_path) == {"a": 1}
    text = found.summary()
    assert "| b | not measured: the time was up |" in text and text.splitlines()[1] == "|---|---|"


def test_a_script_that_is_ended_takes_its_own_processes_along(tmp_path):
    family = tmp_path / "family.py"
    family.write_text(
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\ntime.sleep(99)\n"
    )
    with (tmp_path / "text").open("w") as log:
        assert parts.end_in_time([sys.executable, str(family)], dict(os.environ), log, 2) is None
    time.sleep(0.2)
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # nobody waits for it


@pytest.mark.slow
def test_the_small_course_is_the_same_however_often_it_is_killed(tmp_path):
    """From nothing to three reports, killed at five random moments; what was measured is not measured again."""
    command = [sys.executable, "course.py", "--model=tiny", f"--out_dir={tmp_path / 'out'}"]
    rng, kept = random.Random(0), {}
    for _ in range(5):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        time.sleep(rng.uniform(5, 30))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        folder = tmp_path / "out" / "rows"
        now = {path.name: path.read_bytes() for path in folder.glob("*.jsonl")} if folder.exists() else {}
        assert kept.items() <= now.items()
        kept = now
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(rows.read_file(path) for path in folder.glob("*.jsonl"))
    summary = (tmp_path / "out" / "measured.md").read_text()
    assert "not m" not in summary and summary in done.stdout
    assert {path.name for path in (tmp_path / "out").glob("*.pdf")} == {f"phase_{i}.pdf" for i in (1, 2, 3)}
    assert (tmp_path / "out" / "index.html").stat().st_size > 100_000
    assert kept.items() <= {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}.items()


TROUBLE = """
import ctypes, os, sys
if not {"course.py", "reports.build"} & {arg.rpartition("/")[2] for arg in sys.orig_argv}:
    if os.environ.get("FULL"):
        ctypes.CDLL(None).fault_arm(os.environ["FULL"].encode(), 1, 28, 1)
    else:
        import torch
        def embedding(*arguments, usual=torch.embedding, calls=iter(range(10**9))):
            if next(calls) == 2:
                raise torch.OutOfMemoryError("DefaultCPUAllocator: can't allocate memory")
            return usual(*arguments)
        torch.embedding = embedding
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "said", "kept", "reports"),
    [("memory", "out of memory", 1, "in {}"), ("disk", "full disk", 0, "not made: nothing was measured")],
)
def test_parts_in_trouble_end_no_other_and_leave_reports(tmp_path, trouble, said, kept, reports):
    """Without memory in the third forward of each process that computes; with a full disk at each first write."""
    (tmp_path / "sitecustomize.py").write_text(TROUBLE)
    environment, out = {**os.environ, "PYTHONPATH": str(tmp_path)}, tmp_path / "out"
    if trouble == "disk":
        environment |= {"LD_PRELOAD": str(crash.build_library(tmp_path)), "FULL": str(out)}
    command = [sys.executable, "course.py", "--model=tiny", f"--out_dir={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    table = dict(line.strip("| ").split(" | ") for line in done.stdout.partition("|---|---|")[2].split("\n") if line)
    assert table.pop("reports") == reports.format(out) and bool(table.pop("page", "")) == bool(kept)
    harmed = [state for state in table.values() if state.startswith("not measured: ") and said in state]
    assert len(harmed) == len(table) - kept == 14 - kept, table  # kernels.py looks up no embedding
    assert len(list(out.glob("rows/*"))) == kept and not list(out.glob(".*.jsonl"))
