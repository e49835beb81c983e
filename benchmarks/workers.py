"""Measuring the cells of a table fairly: each in a process of its own, and all of them in turn.

A cell's process loads, warms up, and measures once whenever it is told to. Rounds go through the cells of a group in
shuffled order, so that a slow minute of the machine hits all of them; the processes of one group wait side by side,
and end before the next group begins. Where memory runs out, the cell has no measurement and the rest goes on.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from tqdm import tqdm

from llama import checkpoint, quantization
from llama.config import PRESETS, ModelArgs
from llama.errors import EnvironmentFailure
from llama.generation import Llama
from llama.model import RMSNorm, Transformer
from llama.quantization import Quantization


class Cell(Protocol):
    """What is measured: `engine` is "llama" or the name of a peer; str() says which cell it is."""

    engine: str


AnyCell = TypeVar("AnyCell", bound=Cell)


class Worker:
    """A process that measures one cell whenever it is told to: the script, called with --worker and its orders."""

    def __init__(self, script: str, orders: dict[str, Any]) -> None:
        path = Path(script)
        module = ["-m", f"benchmarks.{path.stem}"] if path.parent.name == "benchmarks" else [script]
        command = [sys.executable, *module, f"--worker={json.dumps(orders)}"]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True)

    def ask(self) -> dict[str, Any] | None:
        """One measurement; None where memory ran out."""
        try:
            self._process.stdin.write("run\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            return json.loads(answer)
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or ["no message"]
        if code == -9 or "out of memory" in lines[-1]:  # the system's killer, or our own message
            return None
        raise EnvironmentFailure(f"a cell's process ended with {code}: {lines[-1]}")

    def close(self) -> None:
        """End the process; its memory is free afterwards."""
        self._process.communicate()  # the end of its input is its sign to leave
        self._errors.close()


def measure_on_demand(run: Callable[[], dict[str, Any]]) -> None:
    """The other side of Worker: one measurement for each line that comes in."""
    for _ in sys.stdin:
        print(json.dumps(run()), flush=True)


def warm_libraries(device: torch.device, dtype: torch.dtype) -> None:
    """Let the libraries set up what they keep, with a model of a few kilobytes, before memory is counted."""
    llama = Llama(Transformer(PRESETS["tiny-draft"]).to(device, dtype).eval(), None)
    for use_cache in (True, False):
        llama.generate([[1, 2, 3]], 2, 0, use_cache=use_cache)


def limit_memory(device: torch.device, limit_gb: float | None) -> None:
    """Hold this process to so many GB (1e9 bytes) of a GPU."""
    if limit_gb is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gb * 1e9 / total), device)


def rounds(
    groups: Sequence[Sequence[AnyCell]], start: Callable[[AnyCell], Worker], repeats: int, seed: int
) -> Iterator[tuple[AnyCell, list[dict[str, Any]]]]:
    """Yield each cell with its `repeats` measurements, none where memory ran out, as soon as its group has them.

    A peer that does not run here is left out, and said so; an error of our own ends everything.
    """
    order = random.Random(seed)
    with tqdm(total=sum(map(len, groups)) * repeats, unit="run") as bar:
        for group in order.sample(groups, len(groups)):
            workers = {cell: start(cell) for cell in group}
            runs: dict[AnyCell, list[dict[str, Any]]] = {cell: [] for cell in group}
            try:
                for _ in range(repeats):
                    for cell in order.sample(list(workers), len(workers)):
                        bar.set_description(str(cell))
                        if not _ask(workers[cell], cell, runs):
                            workers.pop(cell).close()
                        bar.update()
            finally:
                for worker in workers.values():
                    worker.close()
            yield from runs.items()


def _ask(worker: Worker, cell: AnyCell, runs: dict[AnyCell, list[dict[str, Any]]]) -> bool:
    """Put one more measurement into `runs`; False where there will be no more of this cell."""
    try:
        result = worker.ask()
    except EnvironmentFailure as error:
        if cell.engine == "llama":
            raise
        tqdm.write(f"{cell} does not run here: {error}", file=sys.stderr)
        del runs[cell]
        return False
    runs[cell] = [] if result is None else [*runs[cell], result]
    return result is not None


def provide_weights(
    folder: Path, model: str, ckpt_dir: str | None, dtype: torch.dtype, seed: int, for_peers: bool
) -> Path:
    """A directory for all cells: the user's, or random weights; in Hugging Face's layout where peers need it."""
    if ckpt_dir is not None:
        checkpoint.read_args(ckpt_dir)
        if not for_peers or (Path(ckpt_dir) / "config.json").exists():
            return Path(ckpt_dir)
        network = checkpoint.load(ckpt_dir, dtype)
    else:
        args = PRESETS[model]
        print(f"writing random weights of {model} ({args.weight_bytes(dtype.itemsize) / 1e9:.1f} GB)", file=sys.stderr)
        network = Transformer.random(args, dtype, seed=seed)
    checkpoint.save(network, folder / "weights", "hf" if for_peers else "meta")
    return folder / "weights"


@torch.no_grad()
def random_codes(
    args: ModelArgs, config: Quantization, device: torch.device, dtype: torch.dtype, seed: int
) -> Transformer:
    """A quantized model with random codes, of the size of random weights: far sooner made than by quantizing some."""
    with torch.device("meta"):
        model = Transformer(args).to(dtype)
        quantization.lay_out(model, config)
    model = model.to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "scales"):
            module.weight.random_(generator=generator)  # every value of the type
            module.scales.fill_(0.02 / (4.6 if module.weight.dtype == torch.uint8 else 74))  # codes' deviation
        elif isinstance(module, RMSNorm):
            module.weight.fill_(1.0)
    return model
