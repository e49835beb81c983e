"""The leaderboard of a course project in systems for machine learning: loss, training throughput, inference throughput.

    python -m benchmarks.leaderboard                                # the embedded model, on text of its world
    python -m benchmarks.leaderboard --ckpt_dir=models/smollm2-135m --data=wikitext2_test_tokens.txt
    python -m benchmarks.leaderboard --accumulation=40              # steps as long as the project's

An entry is a form of the weights, and what of them is trained:

    fp32, all weights    products and weights in fp32
    bf16, all weights    generation from weights in bf16; training by autocast, whose weights stay in fp32
    bf16, LoRA           adapters over frozen weights in bf16, lean
    int8, LoRA           adapters over 8-bit weights, lean
    int4 with zero-points, LoRA    adapters over 4-bit weights in groups of 32, lean: without zero-points, the loss of a
                         small model rises by a fifth of a nat

The loss is that of evaluate.py, in nats per token of a text, before any training. Training throughput counts the tokens
of whole optimizer steps: forward and backward over `accumulation` micro-batches of blocks of the text, and AdamW's
update. Inference throughput counts the generated tokens of greedy decoding with the KV cache, and the time of the
prompts, too. Each has a process of its own, as benchmarks/workers.py says.

Left out on purpose: how low training brings the loss, which takes a run of finetuning.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import hardware, rows, stopwatch, workers
from benchmarks import options as shared
from benchmarks.inputs import PLAIN
from benchmarks.ladder import make_forms
from data import text
from data.tiny import directory_of, name_of
from llama import Llama, checkpoint, cli, lora
from llama import device as devices
from llama.cli import option
from llama.errors import InputError
from llama.evaluation import perplexity
from llama.lora import LoRAConfig
from llama.quantization import Quantization
from llama.tokenizer import Tokenizer, find_tokenizer
from llama.training import batch
from llama.training.step import Settings, Trainer
from reports import tables

FORMATS = {config.name: config for config in (Quantization(8), Quantization(4, 32, zero_points=True))}
LOSS, GENERATION, ALL_WEIGHTS, ADAPTERS = "loss", "generation", "all weights", "LoRA"


@dataclass(frozen=True)
class Options(shared.RowOptions):
    """Measure the leaderboard: loss, training throughput and inference throughput, with the memory of both."""

    ckpt_dir: str | None = option(None, cli.CKPT_DIR)
    tokenizer_path: str | None = option(None, cli.TOKENIZER_PATH)
    data: str | None = option(None, shared.TEXT)
    batch_sizes: str = option("4,12", "sequences of a micro-batch, and prompts per call, separated by commas")
    accumulation: int = option(4, "micro-batches of one optimizer step; the course project takes 40", least=1)
    seq_len: int = option(64, "tokens of a sequence in training", least=2)
    input_len: int = option(32, "tokens of each prompt", least=1)
    output_len: int = option(32, "tokens generated for each prompt", least=2)
    max_tokens: int = option(8192, "tokens of the text, from its start, on which the loss is measured", least=2)
    repeats: int = option(3, "timed runs of each cell", least=1)
    seed: int = option(1, "of the order of the runs", **cli.SEEDS)
    device: str = option("auto", cli.DEVICE)
    work_dir: str | None = option(None, shared.WORK_DIR)

    @property
    def sizes(self) -> list[int]:
        return shared.sizes_of(self.batch_sizes)


@dataclass(frozen=True)
class Cell:
    """What one process measures. weights: fp32, bf16, ...; batch_size: None for the loss."""

    weights: str
    work: str
    batch_size: int | None = None
    engine: str = "llama"

    def __str__(self) -> str:
        return f"{self.weights}, {self.work}" + (f", batch {self.batch_size}" if self.batch_size else "")


@dataclass(frozen=True)
class Setup:
    """What all cells of a run share: checkpoints by form of the weights, the ids of the text, sizes, and where to run.

    tokens: of the text, on which the loss is measured in windows of `context`.
    """

    directories: dict[str, str]
    ids: list[int]
    tokens: int
    context: int
    seq_len: int
    accumulation: int
    input_len: int
    output_len: int
    device: str
    half: str

    def dtype_of(self, cell: Cell) -> str:
        """What a cell's weights are loaded in; quantized ones compute in it."""
        return "float32" if cell.weights == PLAIN["float32"] or cell.work == ALL_WEIGHTS else self.half


def main(options: Options) -> None:
    """Measure every cell, keep its row, and show the leaderboard."""
    device, half = devices.resolve_half(options.device, "auto")
    cells = cells_of(options.sizes, PLAIN[devices.dtype_name(half)])
    path = options.results_file("leaderboard")
    directory = directory_of(options.ckpt_dir)
    args = checkpoint.read_args(directory)
    if checkpoint.read_quantization(directory) is not None:
        raise InputError(f"{directory} is quantized; pass the original, of which quantized forms are made here")
    tokenizer = Tokenizer(find_tokenizer(directory, options.tokenizer_path))
    tokenizer.check_vocabulary(args.vocab_size, f"the model in {directory}")
    ids = text.to_measure(options.data, tokenizer)
    require_room(options, args.trained_context, len(ids))
    sizes = {name: getattr(options, name) for name in ("seq_len", "accumulation", "input_len", "output_len")}
    sizes |= {"tokens": min(options.max_tokens, len(ids))}
    sizes |= {"context": min(text.window_of(tokenizer), args.trained_context)}
    with tempfile.TemporaryDirectory(dir=options.work_dir) as folder:
        plain = Path(folder) / "plain"  # once, so that no process has to convert a foreign file or to quantize
        checkpoint.save(checkpoint.load(directory, torch.float32), plain)
        forms = make_forms(plain, Path(folder), FORMATS, FORMATS)
        setup = Setup(forms, ids, **sizes, device=str(device), half=devices.dtype_name(half))
        runs = leaderboard_runs(setup, cells, options.repeats, options.seed)
    place, found = {"model": name_of(directory), **rows.text_cell(options.data), **sizes}, []
    for cell in cells:
        metrics, dtype = rows.by_metric(runs[cell]), setup.dtype_of(cell)
        found.append(rows.record(path, "leaderboard", place | asdict(cell), metrics, device, dtype, options.seed))
    shared.finish(path, "leaderboard", found, tables.leaderboard(found))


def require_room(options: Options, trained_context: int, n_ids: int) -> None:
    """Raise InputError where the model's context or the text is too short for what is asked."""
    if max(options.seq_len, options.input_len + options.output_len) > trained_context:
        lengths = f"seq_len={options.seq_len} input_len={options.input_len} output_len={options.output_len}"
        raise InputError(f"{lengths}: more than the model's {trained_context:,} tokens")
    most = max(options.sizes)
    needed = max(most * options.input_len, most * options.accumulation * (options.seq_len - 1) + 1)
    if n_ids < needed:
        raise InputError(
            f"data={options.data or 'none'}: the text has {n_ids:,} tokens; batch_sizes={options.batch_sizes} with "
            f"accumulation={options.accumulation}, seq_len={options.seq_len} and input_len={options.input_len} take "
            f"{needed:,}; use smaller ones, or a longer text"
        )


def cells_of(sizes: list[int], half: str) -> list[Cell]:
    """Every measurement; entries of the table are those in which something is trained."""
    forms = [PLAIN["float32"], half, *FORMATS]
    entries = [(form, ALL_WEIGHTS) for form in forms[:2]] + [(form, ADAPTERS) for form in forms[1:]]
    cells = [Cell(form, LOSS) for form in forms]
    cells += [Cell(form, GENERATION, size) for form in forms for size in sizes]
    return cells + [Cell(*entry, size) for entry in entries for size in sizes]


def leaderboard_runs(setup: Setup, cells: list[Cell], repeats: int, seed: int) -> dict[Cell, list[dict[str, Any]]]:
    """Each cell with its measurements: losses once, all others in turns with those of the same work and batch size."""
    device, found = torch.device(setup.device), {}
    for is_loss, times in ((True, 1), (False, repeats)):
        own = [cell for cell in cells if (cell.work == LOSS) == is_loss]
        groups = workers.turns(own, device, lambda cell: (cell.work in (LOSS, GENERATION), cell.batch_size))
        found |= dict(workers.rounds(groups, lambda cell: CellRunner(setup, cell), times, seed))
    return found


@dataclass
class CellRunner:
    """One cell in its process."""

    setup: Setup
    cell: Cell

    def prepare(self) -> None:
        """Load and warm up. `work` does what is measured, and returns how many tokens that were."""
        setup, cell = self.setup, self.cell
        self.device, dtype = devices.resolve(setup.device, setup.dtype_of(cell))
        devices.return_freed_memory()
        workers.warm_libraries(self.device, dtype)
        self.baseline = stopwatch.memory_baseline(self.device)
        form = cell.weights if cell.weights in FORMATS else "whole"
        self.model = checkpoint.load(setup.directories[form], dtype, self.device)
        self.values = {"weights_mb": hardware.weight_bytes(self.model) / devices.MB}
        makers = {LOSS: self._scoring, GENERATION: self._generation}
        self.work = makers.get(cell.work, self._training)()

    def measure(self) -> dict[str, Any]:
        """Time, throughput and peak memory, and of a text its loss."""
        tokens, spent = stopwatch.measure(self.work, self.device)
        speed = {"runtime_s": spent.seconds, "tokens_per_s": tokens / spent.seconds}
        return self.values | speed | spent.peak_over(self.baseline)

    def _scoring(self) -> Callable[[], int]:
        """The loss of the text, counted as evaluate.py counts."""
        setup = self.setup

        def work() -> int:
            result = perplexity.evaluate(self.model, setup.ids[: setup.tokens], setup.context)
            self.values |= {"loss_nats": result.loss, "perplexity_x": result.perplexity}
            return result.tokens

        return work

    def _generation(self) -> Callable[[], int]:
        """Greedy decoding with the cache, after prompts from the text; run once with few tokens."""
        setup, size, length = self.setup, self.cell.batch_size, self.setup.input_len
        llama = Llama(self.model, None, length + setup.output_len, size)
        prompts = [setup.ids[i * length : (i + 1) * length] for i in range(size)]
        llama.generate(prompts, 2, 0)
        return lambda: sum(map(len, llama.generate(prompts, setup.output_len, 0)[0]))

    def _training(self) -> Callable[[], int]:
        """Optimizer steps over blocks of the text; the first micro-batch of one is taken."""
        setup, cell = self.setup, self.cell
        if cell.work == ADAPTERS:
            lora.apply(self.model, LoRAConfig())
            settings = Settings(optimizer="adamw", lean=True)
        else:
            self.model.requires_grad_(True)
            amp = "none" if cell.weights == PLAIN["float32"] else cell.weights
            settings = Settings(optimizer="adamw", amp=amp)
        trainer = Trainer(self.model, settings, 1)
        per_step = cell.batch_size * setup.accumulation
        blocks = text.blocks(setup.ids, setup.seq_len)
        sequences = [[block] for block in blocks[: len(blocks) // per_step * per_step]]  # whole steps alone

        def window() -> list[batch.Batch]:
            return batch.window(sequences, trainer.progress.windows, cell.batch_size, setup.accumulation, 0, 0)

        trainer.step(window()[:1])
        return lambda: trainer.step(window()).tokens


if __name__ == "__main__":
    cli.run(main)
