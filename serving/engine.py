"""One worker for many visitors: generations that advance in turn in a single thread, behind a queue with a limit.

    with engine.run(pieces(llama, ids)) as job:       # raises Busy where too many wait
        async for piece in job:
            ...                                       # leaving the block ends the generation

A generation is an iterator, whose steps are the worker's turns. Of the active ones that goes next which has used the
least time so far. So each visitor gets an equal share of the machine and reads along, while a faster generation gets
further than a slower one beside it. A step is never interrupted: a long prompt is one step.
Left out on purpose: models and texts (text.py), HTTP (api.py), batching of several visitors' steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from llama.errors import EnvironmentFailure

Item = TypeVar("Item")
_END = object()


class Busy(EnvironmentFailure):
    """The queue is full."""


class Job(Generic[Item]):
    """One generation as its visitor sees it: what it yields, asynchronously, or the error that ended it."""

    def __init__(self, work: Iterator[Item], owner: str) -> None:
        self.work, self.owner = work, owner
        self.seconds: float | None = None  # of the worker, from its first turn on counted from that of the others
        self.is_cancelled = False
        self._loop, self._items = asyncio.get_running_loop(), asyncio.Queue()

    def __aiter__(self) -> Job[Item]:
        return self

    async def __anext__(self) -> Item:
        item = await self._items.get()
        if item is _END:
            raise StopAsyncIteration
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self) -> None:
        """Its next turn ends it."""
        self.is_cancelled = True

    def put(self, item: Any) -> None:
        """From the worker's thread. A visitor whose event loop has ended reads no more."""
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
        except RuntimeError:
            self.cancel()


class Engine:
    """The worker. n_active: generations that advance in turn, each with its own cache. n_waiting: those behind them."""

    def __init__(self, n_active: int = 4, n_waiting: int = 32) -> None:
        self.n_active, self.n_waiting = n_active, n_waiting
        self._jobs: list[Job[Any]] = []  # in order of arrival; the first n_active are active
        self._errands: list[Callable[[], None]] = []
        self._changed = threading.Condition()
        self.is_closed = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @contextmanager
    def run(self, work: Iterator[Item], owner: str = "") -> Iterator[Job[Item]]:
        """Give work to the worker; it ends with the block at the latest. Raises Busy where the queue is full."""
        with self._changed:
            if self.is_closed or len(self._jobs) >= self.n_active + self.n_waiting:
                raise Busy(f"{len(self._jobs)} generations are running or waiting; try again later")
            job = Job(work, owner)
            self._jobs.append(job)
            self._changed.notify()
        try:
            yield job
        finally:
            job.cancel()

    def cancel(self, owner: str) -> None:
        """End all that a visitor has running or waiting; those who read it see its end."""
        with self._changed:
            for job in self._jobs:
                if job.owner == owner:
                    job.cancel()

    def soon(self, errand: Callable[[], None]) -> None:
        """Let the worker do something short between two turns: what touches the models belongs to its thread."""
        with self._changed:
            self._errands.append(errand)
            self._changed.notify()

    def close(self) -> None:
        """End everything; returns when the worker has."""
        with self._changed:
            self.is_closed = True
            for job in self._jobs:
                job.cancel()
            self._changed.notify()
        self._thread.join()

    @property
    def n_jobs(self) -> int:
        """Generations that run or wait."""
        return len(self._jobs)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._errands or self.is_closed)
                errands, self._errands = self._errands, []
                job = self._next()
            for errand in errands:
                errand()
            if job is not None:
                self._advance(job)
            elif self.is_closed:
                return

    def _next(self) -> Job[Any] | None:
        """Whose turn it is, if anybody is there."""
        if cancelled := [job for job in self._jobs if job.is_cancelled]:
            return cancelled[0]
        active = self._jobs[: self.n_active]
        least = min((job.seconds for job in active if job.seconds is not None), default=0.0)
        for job in active:
            job.seconds = least if job.seconds is None else job.seconds
        return min(active, key=lambda job: job.seconds, default=None)

    def _advance(self, job: Job[Any]) -> None:
        began = time.perf_counter()
        try:
            if job.is_cancelled:
                self._end(job)
            else:
                job.put(next(job.work))
        except StopIteration:
            self._end(job)
        except Exception as error:
            job.put(error)
            self._end(job)
        job.seconds = (job.seconds or 0.0) + time.perf_counter() - began

    def _end(self, job: Job[Any]) -> None:
        with contextlib.suppress(Exception):  # of what the iterator does at its end; its visitor has left
            job.work.close()
        with self._changed:
            self._jobs.remove(job)
        job.put(_END)
