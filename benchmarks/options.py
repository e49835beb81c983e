"""What can be chosen in every benchmark, and how each of them ends: rows kept, tables printed, figures saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import inputs, rows
from benchmarks.rows import Row
from llama import checkpoint, cli
from llama.cli import option
from llama.config import PRESETS
from llama.errors import InputError
from reports import render
from reports.cells import Table

REPORTS = Path(__file__).parents[1] / "reports"
MODEL = f"a preset, with random weights: {', '.join(PRESETS)}"
WORK_DIR = "where checkpoints are written for the while; default: the system's temporary folder"
FIGURES = "folder of the plots (SVG), which are named after model and device; default: reports/figures"
TEXT = (
    "a text file in UTF-8, scored as it is after one begin-of-text token; models with the embedded model's tokenizer "
    "need none: without, 256 sequences of text of its world that it was not trained on"
)
HALF_DTYPE = "auto (the device's 16-bit type), float32, bfloat16 or float16"


@dataclass(frozen=True)
class RowOptions(cli.Options):
    """Of every benchmark that keeps the rows it measures."""

    repeats: int = option(5, "timed runs of each cell", least=1)
    results: str | None = option(None, "file that the measured rows are appended to; default: one in reports/results")

    def results_file(self, experiment: str) -> Path:
        """Raises InputError now, rather than after an hour of measuring, where it cannot be written."""
        path = REPORTS / "results" / f"{experiment}.jsonl" if self.results is None else Path(self.results)
        rows.require_writable(path)
        return path


@dataclass(frozen=True)
class Options(RowOptions):
    """Of those that take random weights."""

    model: str = option("llama3.2-1b", MODEL, choices=PRESETS)
    seed: int = option(1, "of random weights, of prompts and of the order of the runs", **cli.SEEDS)


@dataclass(frozen=True)
class DeviceOptions(Options):
    """Of a benchmark that runs on any device."""

    device: str = option("auto", cli.DEVICE)


@dataclass(frozen=True)
class TableOptions(DeviceOptions):
    """Of the benchmarks behind Tables 1, 2 and 3."""

    ckpt_dir: str | None = option(None, "a checkpoint directory instead of random weights")
    memory_limit_gb: float | None = option(None, "hold a larger GPU to this much memory; a P100 has 16", above=0)
    figures: str | None = option(None, FIGURES)
    work_dir: str | None = option(None, WORK_DIR)
    against: str | None = option(None, "libraries to measure on the same weights and ids, too")

    @property
    def label(self) -> str:
        """What rows call the model."""
        return self.model if self.ckpt_dir is None else checkpoint.locate(self.ckpt_dir).name

    def provide_weights(self, folder: Path, dtype: torch.dtype) -> Path:
        """A checkpoint for all cells; `folder` is where random ones may be written."""
        for_peers = self.against is not None
        return inputs.provide_weights(folder, self.model, self.ckpt_dir, dtype, self.seed, for_peers).resolve()

    def require_limit_fits(self, device: torch.device) -> None:
        if self.memory_limit_gb is not None and device.type != "cuda":
            raise InputError(f"memory_limit_gb={self.memory_limit_gb}: expected a CUDA device to limit")


def sizes_of(text: str, name: str = "batch_sizes") -> list[int]:
    """The numbers of an option like 4,12. Raises InputError naming it."""
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise InputError(f"{name}={text}: expected different numbers above 0, such as 1,8,16")
    return sizes


def finish(
    path: Path, experiment: str, measured: Sequence[Row], tables: Sequence[Table], figures: str | None = None
) -> None:
    """Print the tables, and save the experiment's charts in the folder `figures`."""
    from reports.charts import CHARTS  # not above: every cell's process imports this file, and matplotlib is large

    print(render.markdown(tables))
    drawn = CHARTS[experiment](measured) if experiment in CHARTS else {}
    for name, figure in drawn.items():
        image = (REPORTS / "figures" if figures is None else Path(figures)) / f"{name}.svg"
        render.save_svg(figure, image)
        print(f"plot in {image}")
    print(f"rows appended to {path}")
