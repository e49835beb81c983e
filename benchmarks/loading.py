"""How long a checkpoint takes to load, and how much memory at its peak.

    python -m benchmarks.loading                  # Llama 3.2 1B, random weights; needs 7.5 GB of disk
    python -m benchmarks.loading --model=tiny     # in seconds

Each load happens in a fresh process, so that its peak of resident memory is its own. "ready" is the moment when every
weight has been read once: a memory-mapped load returns long before that.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import options as shared
from benchmarks import rows
from benchmarks.workers import Worker
from llama import Transformer, checkpoint, cli
from llama import device as devices
from llama.cli import option
from llama.config import PRESETS
from llama.errors import EnvironmentFailure
from reports import tables

FILES = {"meta": "meta", "hf": "hf", "model.gguf": "gguf"}  # what is written, and in which layout


@dataclass(frozen=True)
class Options(shared.Options):
    """Measure loading time and peak memory from each layout, with and without a change of dtype."""

    work_dir: str | None = option(None, shared.WORK_DIR)


def main(options: Options) -> None:
    """Write a checkpoint in each layout, and load all in both dtypes, in turns: a slow minute hits all of them."""
    path = options.results_file("loading")
    runs: dict[LoadRunner, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(dir=options.work_dir) as folder:
        weights = Transformer.random(PRESETS[options.model], torch.bfloat16, seed=options.seed)
        for name, layout in FILES.items():
            checkpoint.save(weights, Path(folder) / name, layout)
            runs |= {LoadRunner(str(Path(folder) / name), dtype): [] for dtype in ("bfloat16", "float32")}
        del weights
        for _ in tqdm(range(options.repeats), desc="loading", unit="round"):
            for runner, own in runs.items():
                with closing(Worker(runner)) as worker:
                    own.append(worker.ask())
                if own[-1] is None:
                    what = f"{Path(runner.directory).name} as {runner.dtype}"
                    raise EnvironmentFailure(f"{what}: memory ran out; choose a smaller --model")
    found = []
    for runner, own in runs.items():
        cell = {"model": options.model, "layout": FILES[Path(runner.directory).name], "stored": "bfloat16"}
        metrics, cpu = rows.by_metric(own), torch.device("cpu")
        found.append(rows.record(path, "loading", cell, metrics, cpu, runner.dtype, options.seed))
    shared.finish(path, "loading", found, tables.loading(found))


@dataclass(frozen=True)
class LoadRunner:
    """A load in its own process. Peak memory is that of the whole process, Python and torch included."""

    directory: str
    dtype: str  # to load in; the checkpoint is in bfloat16

    def prepare(self) -> None:
        """Nothing: what the libraries set up at first use is part of the first load."""

    def measure(self) -> dict[str, float]:
        """Load, then read every weight."""
        began = time.perf_counter()
        network = checkpoint.load(self.directory, devices.DTYPES[self.dtype])
        load_s = time.perf_counter() - began
        for weight in network.parameters():
            weight.view(-1)[:: 4096 // weight.element_size()].sum().item()  # one value of each page
        ready_s = time.perf_counter() - began
        peak = devices.peak_memory_bytes(torch.device("cpu"))
        values = {"load_s": load_s, "ready_s": ready_s}
        if peak is None:
            return values
        n_bytes = sum(weight.nbytes for weight in network.parameters())
        return values | {"peak_memory_mb": peak / devices.MB, "peak_over_weights_x": peak / n_bytes}


if __name__ == "__main__":
    cli.run(main)
