"""Processes that measure: what they send, how they end, and what becomes of a cell whose process fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass

import pytest
from conftest import ROOT

from benchmarks import workers
from benchmarks.workers import Worker
from llama.errors import EnvironmentFailure, InputError, InternalError, NonFinite

WAIT_S = 120  # for another process, on a busy machine


@dataclass(frozen=True)
class Named:
    """A cell, and what happens in its process."""

    how: str
    engine: str = "llama"

    def __str__(self) -> str:
        return f"cell {self.how}"


@dataclass
class Runner:
    """Fails in one way after the other: `hows` at each measurement, "" for a success; in `prepare` at first."""

    hows: tuple[str, ...] = ()
    prepare_fails: bool = False

    def prepare(self) -> None:
        self.count = 0
        if self.prepare_fails:
            self.prepare_fails = False
            raise InputError("no such file; choose another")

    def measure(self) -> dict[str, int]:
        how = self.hows[self.count] if self.count < len(self.hows) else ""
        self.count += 1
        if how in KILLS:
            os.kill(os.getpid(), KILLS[how])
        if how:
            raise RAISES[how]
        return {"count": self.count, "pid": os.getpid()}


KILLS = {"killed": signal.SIGKILL, "crash": signal.SIGSEGV}
RAISES = {"memory": MemoryError(), "gpu memory": RuntimeError("CUDA error: out of memory"), "bug": KeyError("nothing")}
RAISES |= {"environment": EnvironmentFailure("needs a package"), "not finite": NonFinite("NaN in the logits")}


def test_a_process_prepares_once_and_measures_when_asked():
    with closing(Worker(Runner())) as worker:
        runs = [worker.ask() for _ in range(3)]
        assert [run["count"] for run in runs] == [1, 2, 3]
        assert {run["pid"] for run in runs} != {os.getpid()}
    assert not is_running(runs[0]["pid"])


def test_an_interrupt_while_a_process_starts_is_no_failure_of_that_process():
    """Ctrl-C reaches all processes of a terminal, also those that still import."""
    with closing(Worker(Runner())) as worker:
        os.kill(worker._process.pid, signal.SIGINT)
        assert worker.ask()["count"] == 1
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_out_of_memory_is_no_measurement_and_a_failure_is_raised_here_with_its_message():
    with closing(Worker(Runner((*RAISES, "killed"), prepare_fails=True))) as worker:
        with pytest.raises(InputError, match=r"^no such file; choose another$"):
            worker.ask()
        for how in RAISES:
            if "memory" in how:
                assert worker.ask() is None
                continue
            kinds = {"bug": InternalError, "environment": EnvironmentFailure, "not finite": NonFinite}
            with pytest.raises(kinds[how]) as caught:
                worker.ask()
            message = "unexpected KeyError: 'nothing'; this is a bug, --debug shows where"
            assert str(caught.value) == (message if how == "bug" else str(RAISES[how]))
        assert worker.ask() is None  # by the system, to get memory back
        assert worker.ask() is None


def test_a_process_that_crashes_ran_out_of_nothing():
    message = r"^the process ended with exit code -11$"
    with closing(Worker(Runner(("crash",)))) as worker, pytest.raises(EnvironmentFailure, match=message):
        worker.ask()


class Scripted:
    """A worker without a process."""

    def __init__(self, how: str) -> None:
        self.how = how

    def ask(self) -> dict[str, int] | None:
        if self.how == "environment":
            raise EnvironmentFailure("needs a package")
        return None if self.how == "killed" else {"count": 1}

    def close(self) -> None:
        pass


def run_rounds(monkeypatch, *cells: Named) -> dict[Named, list[dict]]:
    monkeypatch.setattr(workers, "Worker", Scripted)
    return dict(workers.rounds([cells], lambda cell: cell.how, 3, seed=1))


def test_where_memory_runs_out_the_rest_goes_on(monkeypatch):
    cells = [Named(""), Named("killed"), Named("", "other")]
    assert [len(runs) for runs in run_rounds(monkeypatch, *cells).values()] == [3, 0, 3]


def test_a_peer_that_does_not_run_is_left_out_and_said_so(monkeypatch, capsys):
    cells = [Named(""), Named("environment", "transformers")]
    assert run_rounds(monkeypatch, *cells).keys() == {cells[0]}
    assert "cell environment does not run here: needs a package" in capsys.readouterr().err


def test_a_failure_of_our_own_ends_it_and_names_the_cell(monkeypatch):
    with pytest.raises(EnvironmentFailure, match=r"^cell environment: needs a package"):
        run_rounds(monkeypatch, Named(""), Named("environment"))


SCRIPT = """
import os, sys, time
from dataclasses import dataclass
from pathlib import Path
sys.path.insert(0, ROOT)
from benchmarks.workers import Worker
from llama import cli

@dataclass
class Busy:
    pid_file: str
    def prepare(self): pass
    def measure(self):
        Path(self.pid_file).write_text(str(os.getpid()))
        time.sleep(600)

@dataclass(frozen=True)
class Options(cli.Options):
    pid_file: str = cli.option("", "where the process writes its number")

def main(options: Options) -> None:
    worker = Worker(Busy(options.pid_file))
    try:
        worker.ask()
    finally:
        worker.close()

if __name__ == "__main__":
    cli.run(main)
"""


@pytest.mark.parametrize(
    ("sent", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGKILL, -9)]
)
def test_processes_end_with_the_one_that_started_them(tmp_path, sent, code):
    """A script, so that the runner is an object of __main__; in the middle of a measurement of ten minutes."""
    script, pid_file = tmp_path / "busy.py", tmp_path / "pid"
    script.write_text(f"ROOT = {str(ROOT)!r}\n{SCRIPT}")
    parent = subprocess.Popen(
        [sys.executable, str(script), f"--pid_file={pid_file}"], stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: pid_file.exists() and pid_file.read_text())
    child = int(pid_file.read_text())
    parent.send_signal(sent)
    _, errors = parent.communicate(timeout=WAIT_S)
    assert parent.returncode == code and "Traceback" not in errors, errors
    wait_until(lambda: not is_running(child))


def is_running(pid: int) -> bool:
    """Not where it has ended and nobody has asked for its exit code yet."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return state.strip()[:1] not in ("", "Z")


def wait_until(condition) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
