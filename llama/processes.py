"""The processes that torchrun has started for one run: who this one is, and how all of them speak with one voice.

Without torchrun a process is alone, and nothing here does anything. With it, only the first prints; the first that
fails says why, and torchrun ends the others. What is sent between them: parallel.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from llama.errors import EnvironmentFailure, InputError

TIMEOUT = timedelta(minutes=10)  # of waiting for another process
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "NCCL")
_store: dist.Store | None = None  # what all processes read and write; None: this one has not met the others


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
    global _store
    me = world()
    if me.size == 1 or _store is not None:
        return me
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=me.rank, world_size=me.size, timeout=TIMEOUT)
    except (RuntimeError, ValueError, OSError) as error:
        raise EnvironmentFailure(
            f"process {me.rank} of {me.size} did not meet the others: {error}; see docs/devices.md"
        ) from error
    _store = store
    return me


def require_same(what: str, value: bytes) -> None:
    """Raise InputError where this process has something else than the first one, such as other flags."""
    me, digest = world(), hashlib.sha256(value).digest()
    if me.size == 1:
        return
    if me.is_first:
        _store.set(what, digest)
    elif _store.get(what) != digest:
        raise InputError(f"process {me.rank} of {me.size} has other {what} than process 0; give all of them the same")


def hush() -> None:
    """Let only the first process print."""
    if not world().is_first:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def may_report() -> bool:
    """Whether nobody has said yet why the run ends."""
    me = world()
    try:
        return me.is_first if _store is None else _store.compare_set("end", "", str(me.rank)) == str(me.rank).encode()
    except (RuntimeError, ValueError):  # the store has gone with the others
        return me.is_first


def is_loss(error: Exception) -> bool:
    """Whether an error says that another process has ended."""
    return _store is not None and isinstance(error, RuntimeError) and any(text in str(error) for text in LOST)


def leave() -> None:
    """Part from the others at the end of a run."""
    if _store is not None and dist.is_initialized():
        dist.destroy_process_group()
