"""Table 1: peak memory and runtime of generation, with and without the KV cache, beside what the hardware allows.

    python benchmark_inference.py                            # Llama 3.2 1B, random weights, 256 + 32 tokens
    python benchmark_inference.py --model=tiny               # the embedded model's shape, in a minute
    python benchmark_inference.py --against=transformers     # and Hugging Face's generate on the same weights and ids
    python benchmark_inference.py --weights=bf16,int8,int4 --cache=on    # quantized weights beside plain ones

A generation has two phases with two limits. Prefill takes the whole prompt through the network at once: each weight
that is read is multiplied with hundreds of tokens, so arithmetic is the limit, and the time to first token cannot be
less than the FLOPs over the best rate of the network's own largest products. Decode then makes one token per step:
every weight, and all cached keys and values, are read to multiply a single token, so memory bandwidth is the limit, and
the time per output token cannot be less than those bytes over the best rate at which any kernel reads them. Without the
cache every step is a prefill of the whole text, so arithmetic is the limit of all of it. The limit of memory: weights,
cache and one row of logits per sequence.

The limits are measured in the same round as the cell, and the tables show time relative to them: 1.00 is the limit.
How cells run: benchmarks/workers.py. Before anything is timed, the tokens with and without the cache are compared in
fp32.
"""

from __future__ import annotations

import early  # noqa: F401 (first of all: a start that fails ends in one line)

import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import hardware, inputs, rows, stopwatch, workers
from benchmarks.inputs import PLAIN, QUANTIZED
from benchmarks.options import HALF_DTYPE, TableOptions, finish, sizes_of
from llama import Llama, Transformer, checkpoint, cli, quantization
from llama import device as devices
from llama.cli import option
from llama.decoding import DECODING
from llama.errors import EnvironmentFailure, InputError, InternalError
from reports import tables

Generate = Callable[[int, Callable[[int], None] | None], Any]  # that many tokens; called back after each step
CONTEXT = 131_072  # positions that Llama 3.2 was trained for
PEERS = ("transformers", "transformers static", "transformers compiled")
CACHE_MODES = {"both": (True, False), "on": (True,), "off": (False,)}


@dataclass(frozen=True)
class Options(TableOptions):
    """Measure Table 1: peak memory and runtime of generation with and without the KV cache."""

    batch_sizes: str = option("1,8,16", "prompts per call, separated by commas")
    input_len: int = option(256, "tokens of each prompt", least=1)
    output_len: int = option(32, "tokens generated for each prompt", least=2)
    cache: str = option("both", ", ".join(CACHE_MODES), choices=CACHE_MODES)
    warm_up: int = option(1, "runs of each cell before the timed ones", least=0)
    dtype: str = option("auto", HALF_DTYPE)
    decoding: str = option("auto", f"{', '.join(DECODING)}; see llama/decoding.py", choices=DECODING)
    weights: str | None = option(
        None,
        "formats of random weights, separated by commas: the dtype's own (bf16, fp16 or fp32), int8, int4; rows go to "
        "formats.jsonl",
        choices=(*PLAIN.values(), *QUANTIZED),
        several=True,
    )
    against: str | None = option(
        None,
        "transformers, to measure Hugging Face's generate on the same weights and ids too (needs transformers)",
        choices=("transformers",),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.input_len + self.output_len > CONTEXT:
            raise InputError(
                f"input_len={self.input_len} output_len={self.output_len}: more positions than Llama's {CONTEXT:,}"
            )
        if self.weights is not None and self.ckpt_dir is not None:
            raise InputError(
                f"weights={self.weights}: is for random weights; those of a checkpoint are measured as they are"
            )

    @property
    def sizes(self) -> list[int]:
        return sizes_of(self.batch_sizes)


@dataclass(frozen=True)
class GenerationCell:
    """One cell of the table: who generates, for how many prompts, with or without the cache, from which weights.

    weights: bf16, int8, ...; None: as they are in the checkpoint.
    """

    engine: str
    batch_size: int
    use_cache: bool
    weights: str | None = None

    def __str__(self) -> str:
        weights = f", {self.weights}" if self.weights else ""
        return f"batch {self.batch_size}, {self.engine}, cache {'on' if self.use_cache else 'off'}{weights}"


def main(options: Options) -> None:
    """Measure every cell, keep its row, and show Table 1."""
    device, dtype = devices.resolve_half(options.device, options.dtype)
    name = devices.dtype_name(dtype)
    options.require_limit_fits(device)
    cells = cells_of(options, PLAIN[name])
    experiment = "inference" if options.weights is None else "formats"  # a comparison is not to change Table 1
    path = options.results_file(experiment)
    options = replace(options, device=str(device), dtype=name)  # for all cells, whatever their processes would choose
    with tempfile.TemporaryDirectory(dir=options.work_dir) as folder:
        directory = options.provide_weights(Path(folder), dtype)
        require_same_tokens(options, directory)
        measured = generation_runs(options, cells, directory)
        found = [keep(path, experiment, options, cell, runs) for cell, runs in measured]
    finish(path, experiment, found, tables.table_1(found) + tables.generation_details(found), options.figures)


def cells_of(options: Options, plain: str) -> list[GenerationCell]:
    """The cells that the options ask for. plain: what weights of the dtype in use are called."""
    formats = [None] if options.weights is None else options.weights.split(",")
    if not set(formats) <= {None, plain, *QUANTIZED}:
        raise InputError(f"weights={options.weights}: expected different ones of {', '.join([plain, *QUANTIZED])}")
    shapes = list(itertools.product(formats, options.sizes, CACHE_MODES[options.cache]))
    ours = [GenerationCell("llama", size, use_cache, weights) for weights, size, use_cache in shapes]
    return ours + [GenerationCell(peer, size, True) for size in options.sizes for peer in PEERS if options.against]


def require_same_tokens(options: Options, directory: Path) -> None:
    """Compare tokens with and without the cache, in a process of its own: no speed would matter where they differ."""
    with closing(workers.Worker(TokenCheck(options, directory))) as check:
        if check.ask() is None:
            raise EnvironmentFailure("comparing the tokens in float32 ran out of memory; nothing was timed")


def generation_runs(
    options: Options, cells: list[GenerationCell], directory: Path
) -> Iterator[tuple[GenerationCell, list[dict[str, Any]]]]:
    """Each cell with its measurements. On a CPU those of one batch size take turns; on a GPU each runs alone."""
    groups = workers.turns(cells, torch.device(options.device), lambda cell: cell.batch_size)
    return workers.rounds(
        groups, lambda cell: GenerationRunner(options, cell, directory), options.repeats, options.seed
    )


@dataclass
class TokenCheck:
    """Greedy tokens in fp32 with and without the cache, of a few short prompts."""

    options: Options
    directory: Path
    n_prompts: int = 2
    input_len: int = 48
    output_len: int = 8

    def prepare(self) -> None:
        self.device, _ = devices.resolve(self.options.device, "float32")
        workers.limit_memory(self.device, self.options.memory_limit_gb)

    def measure(self) -> dict[str, int]:
        """How many tokens are equal: all of them. Raises InternalError where one differs."""
        options, length = self.options, min(self.input_len, self.options.input_len)
        model = checkpoint.load(self.directory, torch.float32, self.device)
        llama = Llama(model, None, length + self.output_len, self.n_prompts, decoding=options.decoding)
        prompts = inputs.random_prompts(model.args.vocab_size, self.n_prompts, length, options.seed)
        on, off = (llama.generate(prompts, self.output_len, 0, use_cache=use_cache)[0] for use_cache in (True, False))
        if on != off:
            raise InternalError(
                "the tokens with and without the KV cache differ in float32; the timings would be meaningless"
            )
        return {"tokens_equal": sum(map(len, on))}


@dataclass
class GenerationRunner:
    """One cell in its process."""

    options: Options
    cell: GenerationCell
    directory: Path

    def prepare(self) -> None:
        """Load and run `warm_up` times; without the cache two tokens touch all that 32 do."""
        options, cell = self.options, self.cell
        self.device, self.dtype = devices.resolve(options.device, options.dtype)
        workers.limit_memory(self.device, options.memory_limit_gb)
        workers.warm_libraries(self.device, self.dtype)
        self.baseline = stopwatch.memory_baseline(self.device)
        load = self._load_ours if cell.engine == "llama" else self._load_transformers
        (self.generate, self.llama), loading = stopwatch.measure(load, self.device)
        length = options.output_len if cell.use_cache else 2
        _, warming = stopwatch.measure(
            lambda: [self.generate(length, None) for _ in range(options.warm_up)], self.device
        )
        self.prepared = {"load_s": loading.seconds, "warm_up_s": warming.seconds}

    def measure(self) -> dict[str, Any]:
        """Times, peak memory and, of ours, the limits from rates measured right now, and what ran."""
        length, values = self.options.output_len, dict(self.prepared)
        if self.llama is not None:
            values |= self._limits()
            values |= {"decoding": self.llama.decoder.name, "weights": weights_of(self.llama.model)}
        times, whole = stopwatch.measure_generation(lambda on_step: self.generate(length, on_step), length, self.device)
        values |= times | whole.peak_over(self.baseline)
        for name in ("runtime_s", "ttft_s", "tpot_s", "peak_memory_mb"):
            if name in values and f"floor_{name}" in values:
                values[f"{name.rpartition('_')[0]}_over_floor_x"] = values[name] / values[f"floor_{name}"]
        return values

    def _limits(self) -> dict[str, float]:
        """The least time and memory that this cell can take on this hardware; see the top of this file."""
        options, cell, model = self.options, self.cell, self.llama.model
        args, batch, n, itemsize = model.args, cell.batch_size, options.output_len, self.dtype.itemsize
        bandwidth = max(hardware.read_bandwidth(model).values())
        rate = max(hardware.product_rate(model).values())
        step_bytes = hardware.decode_bytes(model, batch, options.input_len + n // 2)
        prefill_s = batch * args.forward_flops(options.input_len) / rate
        if cell.use_cache:
            step_s = step_bytes / bandwidth
        else:
            step_s = batch * sum(args.forward_flops(options.input_len + i) for i in range(1, n)) / rate / (n - 1)
        cache = args.kv_cache_bytes(batch, options.input_len + n - 1, itemsize) if cell.use_cache else 0
        memory = hardware.weight_bytes(model) + cache + batch * args.vocab_size * itemsize
        return {
            "read_gb_s": bandwidth / 1e9,
            "product_tflop_s": rate / 1e12,
            "step_bytes_gb": step_bytes / 1e9,
            "floor_ttft_s": prefill_s,
            "floor_tpot_s": step_s,
            "floor_runtime_s": prefill_s + (n - 1) * step_s,
            "floor_peak_memory_mb": memory / devices.MB,
        }

    def _load_ours(self) -> tuple[Generate, Llama]:
        """A function that generates, and what it does that with."""
        options, cell = self.options, self.cell
        if cell.weights in QUANTIZED:
            args = checkpoint.read_args(self.directory)
            model = inputs.random_codes(args, QUANTIZED[cell.weights], self.device, self.dtype, options.seed)
        else:
            model = checkpoint.load(self.directory, self.dtype, self.device)
        llama = Llama(model, None, options.input_len + options.output_len, cell.batch_size, decoding=options.decoding)
        prompts = inputs.random_prompts(model.args.vocab_size, cell.batch_size, options.input_len, options.seed)
        return lambda n, on_step: llama.generate(prompts, n, 0, use_cache=cell.use_cache, on_step=on_step), llama

    def _load_transformers(self) -> tuple[Generate, None]:
        """Hugging Face's generate: with its default cache, a static one, or a static one and torch.compile."""
        try:
            import transformers
        except ImportError:
            raise EnvironmentFailure("against=transformers needs that package; see requirements-dev.txt") from None
        transformers.utils.logging.disable_progress_bar()
        load, engine = transformers.AutoModelForCausalLM.from_pretrained, self.cell.engine
        model = load(self.directory, dtype=self.dtype).to(self.device).eval()
        shape = (self.cell.batch_size, self.options.input_len, self.options.seed)
        ids = torch.tensor(inputs.random_prompts(model.config.vocab_size, *shape)).to(self.device)
        settings: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
        if engine != "transformers":
            settings["cache_implementation"] = "static"
            settings["disable_compile"] = engine == "transformers static"
        if engine == "transformers compiled":
            settings["compile_config"] = transformers.CompileConfig()
            settings["compile_config"]._compile_all_devices = True  # its own switch for compiling on a CPU too
        return lambda n, _: model.generate(ids, max_new_tokens=n, min_new_tokens=n, **settings), None


def weights_of(model: Transformer) -> str:
    """What a row calls the format of a model's weights."""
    found = quantization.quantization_of(model)
    return f"int{found.bits}" if found else PLAIN[devices.dtype_name(model.dtype)]


def keep(
    path: Path | None, experiment: str, options: Options, cell: GenerationCell, runs: list[dict[str, Any]]
) -> rows.Row:
    """One row for a cell; without metrics where memory ran out."""
    about = runs[0] if runs else {"decoding": options.decoding}
    place = {"model": options.label, **asdict(cell), "input_len": options.input_len, "output_len": options.output_len}
    place |= {"decoding": about.get("decoding", "peer"), "memory_limit_gb": options.memory_limit_gb}
    place["weights"] = about.get("weights") or cell.weights or PLAIN[options.dtype]
    device = torch.device(options.device)
    return rows.record(path, experiment, place, rows.by_metric(runs), device, options.dtype, options.seed)


if __name__ == "__main__":
    cli.run(main)
