"""Time and peak memory of a piece of work, measured the same way everywhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from llama.device import peak_memory_bytes, reset_peak_memory, synchronize

Result = TypeVar("Result")


@dataclass(frozen=True)
class Measurement:
    """Wall-clock seconds, and the peak of memory in bytes: allocated on a GPU, resident in the process on a CPU.

    `peak_bytes` is None where the operating system does not let the peak be reset (it needs Linux's /proc).
    """

    seconds: float
    peak_bytes: int | None


def measure(work: Callable[[], Result], device: torch.device) -> tuple[Result, Measurement]:
    """Run `work` once and measure it, device work included that it leaves running."""
    peak_is_known = reset_peak_memory(device)
    synchronize(device)
    began = time.perf_counter()
    result = work()
    synchronize(device)
    seconds = time.perf_counter() - began
    return result, Measurement(seconds, peak_memory_bytes(device) if peak_is_known else None)


def memory_baseline(device: torch.device) -> int:
    """What the process holds now, and what its peaks are to be counted from; nothing on a GPU, where peaks are ours."""
    if device.type == "cuda" or not reset_peak_memory(device):
        return 0
    return peak_memory_bytes(device)
