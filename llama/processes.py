"""The processes that torchrun has started for one run: who this one is, and how all of them speak with one voice.

Without torchrun a process is alone, and nothing here does anything. With it, only the first prints; the one that
fails first says why, and torchrun ends the others. What is sent between them: parallel.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from llama.errors import EnvironmentFailure, InputError

TIMEOUT = timedelta(minutes=10)  # of waiting for another process
TO_REPORT = timedelta(seconds=10)  # of waiting for one that says why the run ends
TO_LEAVE = 1.0  # seconds between saying so and the end of the first process
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "NCCL")
_store: dist.Store | None = None  # what all processes read and write; None: this one has not met the others
_speaking = threading.Lock()  # never let go: a process says once why it ends
_comparisons = itertools.count()  # of require_same, so far


@dataclass(frozen=True)
class World:
    """This process among `size`; alone where torchrun has not started it."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, length: int) -> slice:
        """Its part of what `size` divides."""
        part = length // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


ALONE = World()


def world() -> World:
    """Who this process is, by the environment that torchrun gives it."""
    return World(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def start() -> World:
    """Meet the others, once; a GPU is taken by the rank within its host. Raises EnvironmentFailure where none come."""
    me = world()
    if me.size == 1 or dist.is_initialized():
        return me
    try:
        store = _meet(TIMEOUT)
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=me.rank, world_size=me.size, timeout=TIMEOUT)
    except (RuntimeError, ValueError, OSError) as error:
        raise EnvironmentFailure(
            f"process {me.rank} of {me.size} did not meet the others: {error}; see docs/devices.md"
        ) from error
    return me


def _meet(timeout: timedelta) -> dist.Store:
    global _store
    if _store is None:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            _store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    return _store


def require_same(what: str, value: bytes) -> None:
    """Raise InputError where this process has something else than the first one, such as other flags.

    All processes call it in the same order.
    """
    me, digest = world(), hashlib.sha256(value).digest()
    if me.size == 1:
        return
    key = f"{what} {next(_comparisons)}"
    if me.is_first:
        _store.set(key, digest)
    elif _store.get(key) != digest:
        raise InputError(f"process {me.rank} of {me.size} has other {what} than process 0; give all of them the same")


def from_first(value: str | None) -> str:
    """What the first process gives here, in all of them."""
    told = [value]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def to_first(value: Any) -> list[Any]:
    """What each process gives here, in the first; in others an empty list."""
    told = [None] * world().size if world().is_first else None
    dist.gather_object(value, told, dst=0)
    return told or []


def wait() -> None:
    """Until all processes have come here."""
    if _store is not None:
        dist.barrier()


def hush() -> None:
    """Let only the first process print."""
    if not world().is_first:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def say_once(say: Callable[[], None]) -> None:
    """Call what says why the run ends in the process that fails first; the others wait until it has been said.

    For torchrun ends all as soon as one has ended.
    """
    me = world()
    if me.size == 1:
        return say()
    if not _speaking.acquire(blocking=False):  # this process is ending already, and torchrun tells it to
        return
    try:
        met, rank = _meet(TO_REPORT), str(me.rank)
        met.set_timeout(TO_REPORT)  # else the next line would wait for a lost host as long as for a slow process
        store = met.clone()  # the store itself may be waiting for a value
        if store.compare_set("end", "", rank) == rank.encode():
            say()
            store.set("said", "")
        else:
            store.wait(["said"], TO_REPORT)
    except (RuntimeError, ValueError, OSError):  # the store has gone, with the host of the first process
        say()


def when_terminated(end: Callable[[], int]) -> None:
    """Call `end` on SIGTERM, and exit with the code that it returns: torchrun sends it when another process has ended.

    From a thread: this process may wait for the other one in C, where Python runs no handler of a signal.
    """
    inbox, outbox = os.pipe()
    os.set_blocking(outbox, False)

    def handle(number: int, _: object) -> None:
        """Replaced by whoever wants to end in another way."""

    def watch() -> None:
        while os.read(inbox, 1)[0] != signal.SIGTERM or signal.getsignal(signal.SIGTERM) is not handle:
            pass
        os._exit(end())

    signal.signal(signal.SIGTERM, handle)
    signal.set_wakeup_fd(outbox)
    threading.Thread(target=watch, daemon=True).start()


def is_loss(error: Exception) -> bool:
    """Whether an error says that another process has ended."""
    said = isinstance(error, dist.DistNetworkError) or any(text in str(error) for text in LOST)
    return dist.is_initialized() and isinstance(error, RuntimeError) and said


def leave() -> None:
    """Part from the others at the end of a run."""
    if dist.is_initialized():
        dist.destroy_process_group()


def abandon(code: int) -> None:
    """End one of several processes at once, with this exit code; alone it does nothing.

    Threads of torch's that are left in the middle of an exchange may abort a process that ends in the usual way. The
    first stays for a moment, with the store in which others that fail now see that it has been said why.
    """
    if dist.is_initialized():
        if world().is_first:
            time.sleep(TO_LEAVE)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # its reader has gone
                stream.flush()
        os._exit(code)
