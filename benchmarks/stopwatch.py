"""Time and peak memory of a piece of work, measured the same way everywhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from llama.device import MB, memory_bytes, peak_memory_bytes, reset_peak_memory, synchronize

Result = TypeVar("Result")


@dataclass(frozen=True)
class Measurement:
    """Wall-clock seconds, and the peak of memory in bytes: allocated on a GPU, resident in the process on a CPU.

    `peak_bytes` is None where the operating system does not let the peak be reset (it needs Linux's /proc).
    """

    seconds: float
    peak_bytes: int | None

    def peak_over(self, baseline: int) -> dict[str, float]:
        """The metric peak_memory_mb, counted from `baseline` bytes; none where the peak is not known."""
        return {} if self.peak_bytes is None else {"peak_memory_mb": (self.peak_bytes - baseline) / MB}


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
    return 0 if device.type == "cuda" else memory_bytes(device)


def measure_generation(
    generate: Callable[[Callable[[int], None]], Any], n_tokens: int, device: torch.device
) -> tuple[dict[str, float], Measurement]:
    """Measure a generation of `n_tokens` for each prompt, and its two phases apart.

    runtime_s: all of it. ttft_s, time to first token: the prefill, which multiplies all tokens of the prompts with each
    weight that it reads, so that arithmetic is its limit. tpot_s, time per output token after that: a decode step,
    which reads all weights for one token per sequence, so that memory bandwidth is its limit.

    generate: gets a function to call with the number of tokens so far; one that never does has no phases.
    """
    first: list[float] = []

    def on_step(step: int) -> None:
        if step == 1:
            synchronize(device)
            first.append(time.perf_counter())

    def work() -> float:
        began = time.perf_counter()
        generate(on_step)
        return began

    began, whole = measure(work, device)
    values = {"runtime_s": whole.seconds}
    if first:
        values["ttft_s"] = first[0] - began
        values["tpot_s"] = (whole.seconds - values["ttft_s"]) / (n_tokens - 1)
    return values, whole
