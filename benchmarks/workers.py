"""Measuring the cells of a table fairly: each in a process of its own, and all of them in turn.

A process of its own has a peak of memory of its own, and one that runs out of memory ends alone: its cell has no
measurement, and the rest goes on. It prepares (loads, warms up) when it is first asked, and then measures once each
time that it is asked. Rounds go through the cells of a group in shuffled order, so that a slow minute of the machine
hits all of them; the processes of a group wait side by side, and end before the next group begins.

A process is started afresh ("spawn") and imports the script again under another name; what runs in it is an object of
the script that travels by pickle. It ends with the process that started it, whatever ends that one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar

import torch
from tqdm import tqdm

from llama import Llama, Transformer, cli
from llama.config import PRESETS
from llama.errors import EnvironmentFailure, InternalError

PATIENCE_S = 5  # for a process that is in the middle of a measurement when nobody needs it any more


class Cell(Protocol):
    """What is measured: `engine` is "llama" or the name of a peer; str() says which cell it is."""

    engine: str


AnyCell = TypeVar("AnyCell", bound=Cell)


class Runner(Protocol):
    """What happens in a cell's process. It is made outside, so until `prepare` it holds nothing but settings."""

    def prepare(self) -> None:
        """Load and warm up, outside of any timing."""

    def measure(self) -> dict[str, Any]:
        """One measurement."""


@dataclass(frozen=True)
class _Failure:
    message: str
    exit_code: int


class Worker:
    """A process that measures one cell whenever it is asked."""

    def __init__(self, runner: Runner) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(runner, theirs), daemon=True)
        with _interrupts_held():
            self._process.start()
        theirs.close()

    def ask(self) -> dict[str, Any] | None:
        """One measurement; None where memory ran out. Raises what ended the process: its error, with its exit code."""
        try:
            self._pipe.send(True)
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):  # it ended without a word
            self._process.join()
            if self._process.exitcode == -signal.SIGKILL:  # by the system, to get memory back
                return None
            raise EnvironmentFailure(f"the process ended with exit code {self._process.exitcode}") from None
        if not isinstance(answer, _Failure):
            return answer
        if "out of memory" in answer.message:
            return None
        kinds = {code: kind for kind, code in cli.EXIT_CODES.items()}
        raise kinds.get(answer.exit_code, InternalError)(answer.message)

    def close(self) -> None:
        """End the process; its memory is free afterwards."""
        with contextlib.suppress(ConnectionError):
            self._pipe.send(False)
        self._process.join(PATIENCE_S)
        self._process.kill()
        self._process.join()
        self._pipe.close()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """What is started in here does not see Ctrl-C while it imports, before `_serve` ignores it; it reaches us later."""
    resource_tracker.ensure_running()  # its first start ends with the signal let through again
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def _serve(runner: Runner, pipe: Connection) -> None:
    """The cell's process: a measurement for each True that arrives, until a False."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent as well, which ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    is_prepared = False
    while pipe.recv():
        try:
            if not is_prepared:
                runner.prepare()
                is_prepared = True
            answer = runner.measure()
        except Exception as error:
            if "--debug" in sys.argv:
                traceback.print_exc()
            answer = _Failure(*cli.explain(error))
        pipe.send(answer)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def rounds(
    groups: Sequence[Sequence[AnyCell]], runner_of: Callable[[AnyCell], Runner], repeats: int, seed: int
) -> Iterator[tuple[AnyCell, list[dict[str, Any]]]]:
    """Yield each cell with its `repeats` measurements, none where memory ran out, as soon as its group has them.

    A peer that does not run here is left out, and said so; an error of our own ends everything.
    """
    order = random.Random(seed)
    with tqdm(total=sum(map(len, groups)) * repeats, unit="run") as bar:
        for group in order.sample(groups, len(groups)):
            workers = {cell: Worker(runner_of(cell)) for cell in group}
            runs: dict[AnyCell, list[dict[str, Any]]] = {cell: [] for cell in group}
            try:
                for _ in range(repeats):
                    for cell in order.sample(list(workers), len(workers)):
                        bar.set_description(str(cell))
                        if not _add_run(workers[cell], cell, runs):
                            workers.pop(cell).close()
                        bar.update()
            finally:
                for worker in workers.values():
                    worker.close()
            yield from runs.items()


def _add_run(worker: Worker, cell: AnyCell, runs: dict[AnyCell, list[dict[str, Any]]]) -> bool:
    """Put one more measurement into `runs`; False where there will be no more of this cell."""
    try:
        result = worker.ask()
    except tuple(cli.EXIT_CODES) as error:
        if cell.engine == "llama":
            raise type(error)(f"{cell}: {error}") from error
        tqdm.write(f"{cell} does not run here: {error}", file=sys.stderr)
        del runs[cell]
        return False
    runs[cell] = [] if result is None else [*runs[cell], result]
    return result is not None


def turns(cells: Sequence[AnyCell], device: torch.device, together: Callable[[AnyCell], Any]) -> list[list[AnyCell]]:
    """Groups for `rounds`: on a CPU the cells for which `together` is equal; on a GPU each alone, for its memory."""
    if device.type == "cuda":
        return [[cell] for cell in cells]
    groups: dict[Any, list[AnyCell]] = {}
    for cell in cells:
        groups.setdefault(together(cell), []).append(cell)
    return list(groups.values())


def warm_libraries(device: torch.device, dtype: torch.dtype) -> None:
    """Let the libraries set up what they keep, with a model of a few kilobytes, before memory is counted."""
    llama = Llama(Transformer(PRESETS["tiny-draft"]).to(device, dtype).eval(), None)
    for use_cache in (True, False):
        llama.generate([[1, 2, 3]], 2, 0, use_cache=use_cache)


def limit_memory(device: torch.device, limit_gb: float | None) -> None:
    """Hold this process to that many GB (1e9 bytes) of a GPU."""
    if limit_gb is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gb * 1e9 / total), device)
