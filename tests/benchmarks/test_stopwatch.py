"""Measured time is that of the work: all of it, and only it."""

from __future__ import annotations

import pytest
import torch
from support import CUDA, FakeGPU

from benchmarks import hardware, pruning, stopwatch


def test_measured_time_is_that_of_the_work_all_of_it_and_only_it(monkeypatch):
    gpu = FakeGPU(monkeypatch)
    gpu.queue(100.0, n_bytes=900)  # something else that still runs, and had its own peak
    result, measured = stopwatch.measure(lambda: gpu.queue(2.0, n_bytes=50) or "result", CUDA)
    assert (result, measured.seconds, measured.peak_bytes) == ("result", 2.0, 50)


@pytest.mark.parametrize("omitted", ["synchronize before", "synchronize after", "reset"])
def test_each_precaution_of_measure_matters(monkeypatch, omitted):
    """With any one of them taken out, the test above would fail."""
    gpu = FakeGPU(monkeypatch)
    calls = []

    def synchronize(device=None):
        calls.append(1)
        if omitted != ("synchronize before" if len(calls) == 1 else "synchronize after"):
            gpu.synchronize()

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    if omitted == "reset":
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: None)
    gpu.queue(100.0, n_bytes=900)
    _, measured = stopwatch.measure(lambda: gpu.queue(2.0, n_bytes=50), CUDA)
    assert (measured.seconds, measured.peak_bytes) != (2.0, 50)


def test_time_to_first_token_begins_with_the_work(monkeypatch):
    """Whatever the device was still busy with, and the reset of the peak, come before: they are no part of it."""
    gpu = FakeGPU(monkeypatch)

    def generate(on_step):
        for step in range(1, 5):
            gpu.queue(3.0 if step == 1 else 1.0, n_bytes=70)
            on_step(step)

    gpu.queue(100.0)
    values, whole = stopwatch.measure_generation(generate, 4, CUDA)
    assert values == {"runtime_s": 6.0, "ttft_s": 3.0, "tpot_s": 1.0} and whole.peak_over(20) == {
        "peak_memory_mb": 50 / 1e6
    }
    values, _ = stopwatch.measure_generation(lambda on_step: gpu.queue(6.0), 4, CUDA)
    assert values == {"runtime_s": 6.0}  # it does not say when its first token is there


def test_pruning_takes_its_times_from_the_stopwatch(monkeypatch, tiny):
    gpu = FakeGPU(monkeypatch)
    monkeypatch.setattr(hardware, "read_bandwidth", lambda model: gpu.queue(500.0) or {"sum": 1e9})
    monkeypatch.setattr(type(tiny), "device", CUDA)

    def generate(prompts, n, temperature, on_step):
        gpu.queue(3.0)
        on_step(1)
        gpu.queue(n - 1.0)

    monkeypatch.setattr(tiny, "generate", generate)
    times = pruning.time_generation(tiny, [[1, 2, 3]])
    assert (times["ttft_s"], times["tpot_s"]) == (3.0, 1.0)
