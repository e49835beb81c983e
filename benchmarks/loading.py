"""How long a checkpoint takes to load, and how much memory at its peak.

    python -m benchmarks.loading                  # the real Llama 3.2 1B shape, random weights; needs 5 GB of disk
    python -m benchmarks.loading --model=tiny     # in seconds

Each load happens in a fresh process, so that its peak of resident memory is its own. "ready" is the moment when every
weight has been read once: a memory-mapped load returns long before that.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import rows as row_files
from llama import Transformer, checkpoint, cli
from llama import device as devices
from llama.config import PRESETS
from llama.device import DTYPES
from llama.errors import EnvironmentFailure
from reports import tables
from reports.render import markdown

RESULTS = Path(__file__).parents[1] / "reports" / "results" / "loading.jsonl"


def main(
    *,
    model: str = "llama3.2-1b",
    repeats: int = 5,
    work_dir: str | None = None,
    results: str | None = None,
    load_dir: str | None = None,
    dtype: str | None = None,
) -> None:
    """Measure loading time and peak memory from both layouts, with and without a change of dtype.

    Args:
        model: a preset: llama3.2-1b, llama3.2-3b, llama3.1-8b, llama2-7b, tiny or tiny-draft.
        repeats: loads of each cell, each in a fresh process.
        work_dir: where the checkpoint is written for the while; default: the system's temporary folder.
        results: file that the measured rows are appended to; default: reports/results/loading.jsonl.
        load_dir: load this directory once and print the figures as JSON, instead.
        dtype: of load_dir; default: as stored.
    """
    if dtype is not None:
        cli.require_one_of("dtype", dtype, DTYPES)
    if load_dir is not None:
        print(json.dumps(load_once(load_dir, dtype)))
        return
    cli.require_one_of("model", model, PRESETS)
    cli.require_at_least(1, repeats=repeats)
    target = Path(results) if results is not None else RESULTS
    row_files.require_writable(target)
    with tempfile.TemporaryDirectory(dir=work_dir) as folder:
        weights = Transformer.random(PRESETS[model], torch.bfloat16)
        for layout in ("meta", "hf"):
            checkpoint.save(weights, Path(folder) / layout, layout)
        del weights
        cells = [(layout, dtype) for layout in ("meta", "hf") for dtype in ("bfloat16", "float32")]
        figures: dict[tuple[str, str], list[dict[str, float]]] = {cell: [] for cell in cells}
        for _ in tqdm(range(repeats), desc="loading", unit="round"):  # cells interleaved: a slow minute hits all
            for layout, dtype in cells:
                figures[layout, dtype].append(load_in_fresh_process(Path(folder) / layout, dtype))
    rows = []
    for (layout, dtype), runs in figures.items():
        values = {name: [run[name] for run in runs] for name in runs[0]}
        cell = {"model": model, "layout": layout, "stored": "bfloat16"}
        rows.append(row_files.record(target, "loading", cell, values, torch.device("cpu"), dtype))
    print(markdown(tables.loading(rows)), end="")


def load_in_fresh_process(directory: Path, dtype: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.loading", f"--load_dir={directory}", f"--dtype={dtype}"]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise EnvironmentFailure(f"loading {directory} failed: {run.stderr.strip()}")
    return json.loads(run.stdout)


def load_once(directory: str, dtype: str | None) -> dict[str, float]:
    """Load, then read every weight; peak memory is that of the whole process, Python and torch included."""
    began = time.perf_counter()
    network = checkpoint.load(directory, DTYPES[dtype] if dtype else None)
    load_s = time.perf_counter() - began
    for weight in network.parameters():
        weight.view(-1)[:: 4096 // weight.element_size()].sum().item()  # one value of each page
    ready_s = time.perf_counter() - began
    peak = devices.peak_memory_bytes(torch.device("cpu"))
    weights = sum(weight.nbytes for weight in network.parameters())
    return {
        "load_s": load_s,
        "ready_s": ready_s,
        "peak_memory_mb": peak / devices.MB,
        "peak_over_weights_x": peak / weights,
    }


if __name__ == "__main__":
    cli.run(main)
