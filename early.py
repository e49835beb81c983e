"""Imported by every script, and what fetches, before anything else: a start that fails ends in one line, too.

An old Python, a package that is not installed, Ctrl-C while torch loads. From `cli.run` on, errors are llama/cli.py's.
And it says what torch is to keep in memory, before torch loads.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType

OLDEST = (3, 11)
# oneDNN prepares each product for its shapes and keeps the last 1,024: 500 MB where every sample of a training has a
# length of its own, as much as all else in a step of SmolLM2-135M in bfloat16. Read when torch loads; 64 are as fast.
KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}


def stop(line: str, code: int) -> None:
    """End the process at once, with one line."""
    if sys.stderr is not None:
        print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(code)


def stop_interrupted() -> None:
    """With one line, also where torchrun has started several processes."""
    if os.environ.get("RANK", "0") != "0":
        os._exit(130)
    stop("interrupted", 130)


def report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """In place of a traceback, where the cause is known."""
    if issubclass(kind, KeyboardInterrupt):
        stop_interrupted()
    if issubclass(kind, ModuleNotFoundError):
        remedy = "type `. .venv/bin/activate` after `make run`, or `pip install -r requirements.txt`"
        stop(f"the package {error.name} is not installed for {sys.executable}; {remedy}", 3)
    sys.__excepthook__(kind, error, traceback)


def report_ignored(ignored: sys.UnraisableHookArgs) -> None:
    """Python goes on after what is raised in a callback, such as those of its imports; after a signal it shall not."""
    if ignored.exc_type is KeyboardInterrupt:
        stop_interrupted()
    if ignored.exc_type is SystemExit:  # by llama/cli.py
        os._exit(ignored.exc_value.code)
    sys.__unraisablehook__(ignored)


for name, value in KEPT.items():
    os.environ.setdefault(name, value)
if "--debug" not in sys.argv:
    sys.excepthook, sys.unraisablehook = report, report_ignored
if sys.version_info < OLDEST:
    found = ".".join(map(str, sys.version_info[:2]))
    stop(f"Python {found} is too old; use {'.'.join(map(str, OLDEST))} or newer", 3)
