"""Perplexity of a Llama model on a text, alone or against a second model.

    python evaluate.py                                                      # the embedded model on text of its world
    python evaluate.py --dtype=bfloat16 --against_dtype=float32             # what 16 bits cost
    python evaluate.py --cache_dtype=int8 --against=data/tiny               # what a KV cache in 8 bits costs
    python evaluate.py --adapter=runs/finetuning/adapter --against=data/tiny   # what fine-tuning changed
    python evaluate.py --adapter=runs/finetuning/adapter --inspect          # which layers it moved, and how far
    python evaluate.py --ckpt_dir=Llama-3.2-1B --data=wiki.test.raw         # chunks of 2,048, as papers count
    python evaluate.py --ckpt_dir=Llama-3.2-1B --data=wiki.test.raw --stride=512   # sliding windows

How tokens are counted: llama/evaluation/perplexity.py. A file's text is taken as it is, with the begin-of-text token
once, before its first character.
"""

from __future__ import annotations

import early  # noqa: F401 (first of all: a start that fails ends in one line)

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import hardware, stopwatch
from benchmarks.options import TEXT
from benchmarks.rows import Row, model_cell, record, require_writable, text_cell
from data import text
from data.tiny import directory_of, name_of
from llama import adapters, checkpoint, cli
from llama import device as devices
from llama.cli import option
from llama.decoding import CACHES
from llama.errors import InputError
from llama.evaluation import inspection, perplexity
from llama.evaluation.intervals import LEAST_PIECES, confidence
from llama.model import Transformer
from llama.tokenizer import Tokenizer, find_tokenizer, other_tokenizer
from reports import render, tables

WARM_UP = 16  # tokens of a first, unmeasured window: it reads the weights from the disk and starts the libraries


@dataclass(frozen=True)
class Side:
    """A model to measure, and the precision to measure it in."""

    directory: Path
    adapter: str | None
    dtype: torch.dtype
    any_base: bool = False
    cache_dtype: str = "auto"

    @property
    def cell(self) -> dict[str, Any]:
        config = checkpoint.read_quantization(self.directory)
        cache = {} if self.cache_dtype == "auto" else {"cache_dtype": self.cache_dtype}
        return {"adapter": None, **model_cell(name_of(self.directory), config, self.adapter), **cache}

    @property
    def dtype_name(self) -> str:
        return devices.dtype_name(self.dtype)


@dataclass(frozen=True)
class Options(cli.Options):
    """Perplexity of a Llama model on a text, alone or against a second model."""

    ckpt_dir: str | None = option(None, cli.CKPT_DIR)
    tokenizer_path: str | None = option(None, cli.TOKENIZER_PATH)
    adapter: str | None = option(None, cli.ADAPTER)
    any_base: bool = option(False, cli.ANY_BASE)
    data: str | None = option(None, TEXT)
    context: int | None = option(
        None, "tokens of a window; default 2048, and with the embedded model's tokenizer 257, one such sequence"
    )
    stride: int | None = option(
        None,
        "tokens from one window's start to the next's; default: context, windows side by side, of each of which the "
        "first token is not scored. With less, windows overlap and every token but the text's first is scored",
    )
    batch_size: int = option(1, "windows that go through the network at once", least=1)
    max_tokens: int | None = option(
        None, "stop after this many tokens of the text (at least 2), the begin-of-text token included", least=2
    )
    dtype: str = option("auto", cli.DTYPE)
    device: str = option("auto", cli.DEVICE)
    cache_dtype: str = option(
        "auto",
        "attend to keys and values as a KV cache of this kind returns them; auto: as they are. A second model has none",
        choices=tuple(CACHES),
    )
    against: str | None = option(
        None, "checkpoint directory of a second model, without adapter, to compare with on the same tokens"
    )
    against_dtype: str | None = option(
        None,
        "dtype of the second model; without --against, the second is the first in this dtype",
        choices=("auto", *devices.DTYPES),
    )
    inspect: bool = option(
        False,
        "what sets the model apart from its base without --adapter, or from --against: how far each matrix has moved, "
        "activations after each block, and predictions; in place of the perplexity",
    )
    results: str | None = option(None, "append the measured rows to this file; default: no")


def main(options: Options) -> None:
    """Measure one model or two, and print a table."""
    target, sides = sides_of(options)
    directory = sides[0].directory
    path = find_tokenizer(directory, options.tokenizer_path)
    tokenizer = Tokenizer(path)
    context = text.window_of(tokenizer) if options.context is None else options.context
    for side in sides:
        check(side, tokenizer, context)
    for side in sides[1:]:
        require_same_tokenizer(side, tokenizer)
    ids = text.to_measure(options.data, tokenizer)[: options.max_tokens]
    stride = context if options.stride is None else options.stride
    perplexity.windows(len(ids), context, stride)  # settings that are out of range end it here, not after loading
    if options.results is not None:
        require_writable(Path(options.results))
    if options.inspect:
        rows = [
            look_inside(sides, ids, target, context, {**text_cell(options.data), "tokens": len(ids)}, options.results)
        ]
        print(render.markdown(tables.inspection(rows)), end="")
        return
    settings = {"context": context, "stride": stride, "batch_size": options.batch_size}
    measured = [measure(side, ids, target, **settings) for side in sides]
    cell = {**text_cell(options.data), "tokens": len(ids), **settings}
    print(render.markdown(tables.perplexity(make_rows(sides, measured, cell, target, options.results))), end="")


def sides_of(options: Options) -> tuple[torch.device, list[Side]]:
    """Where to compute, and the one or two models."""
    target, dtype = devices.resolve(options.device, options.dtype)
    first = Side(directory_of(options.ckpt_dir), options.adapter, dtype, options.any_base, options.cache_dtype)
    if options.inspect and options.adapter is not None and options.against is None:
        return target, [first, replace(first, adapter=None)]
    if options.against is None and options.against_dtype is None:
        if options.inspect:
            raise InputError("--inspect compares two models; give --adapter, or --against=CHECKPOINT, the original")
        return target, [first]
    other = dtype if options.against_dtype is None else devices.resolve(target, options.against_dtype)[1]
    second = replace(first, dtype=other, cache_dtype="auto")
    if options.against is not None:
        second = Side(directory_of(options.against), None, other)
    return target, [first, second]


def check(side: Side, tokenizer: Tokenizer, context: int) -> None:
    """Raise InputError where a model cannot be measured with this tokenizer and context, before it is loaded."""
    args = checkpoint.read_args(side.directory)
    tokenizer.check_vocabulary(args.vocab_size, f"the model in {side.directory}")
    if context > args.trained_context:
        raise InputError(
            f"--context={context}: models like that in {side.directory} were trained on {args.trained_context} tokens "
            "at most"
        )


def require_same_tokenizer(side: Side, tokenizer: Tokenizer) -> None:
    """Raise InputError where the second model brings a different tokenizer."""
    if (other := other_tokenizer(side.directory, tokenizer)) is not None:
        raise InputError(f"--against: {other} is not the tokenizer in use; different tokens cannot be compared")


def measure(
    side: Side, ids: list[int], device: torch.device, context: int, stride: int, batch_size: int
) -> tuple[perplexity.Perplexity, dict[str, float]]:
    """Load, warm up, measure; the model is gone afterwards.

    Peak memory is counted from before the model was loaded.
    """
    devices.return_freed_memory()
    baseline = stopwatch.memory_baseline(device)
    devices.keep_freed_memory()  # new pages for every window would take as long as all that is computed
    model, n_bytes = load(side, device)
    perplexity.evaluate(model, ids[:WARM_UP], WARM_UP)
    cache_type = None if side.cache_dtype == "auto" else CACHES[side.cache_dtype]
    work = partial(perplexity.evaluate, model, ids, context, stride, batch_size, True, cache_type)
    result, spent = stopwatch.measure(work, device)
    values = {
        "loss_nats": result.loss,
        "perplexity_x": result.perplexity,
        "scored_tokens": result.tokens,
        "windows": result.windows,
        "tokens_per_s": result.tokens / spent.seconds,
        "weights_mb": n_bytes / devices.MB,
        "weight_bits": 8 * n_bytes / model.args.n_params(),
    }
    if spent.peak_bytes is not None:
        values["peak_memory_mb"] = (spent.peak_bytes - baseline) / devices.MB
    return result, values


def load(side: Side, device: torch.device) -> tuple[Transformer, int]:
    """The model, and the bytes of its weights without an adapter's."""
    model = checkpoint.load(side.directory, side.dtype, device, progress=True)
    n_bytes = hardware.weight_bytes(model)
    if side.adapter is not None:
        base = None if side.any_base else partial(checkpoint.fingerprint, side.directory)
        adapters.load(model, side.adapter, base)
    return model, n_bytes


def look_inside(
    sides: list[Side], ids: list[int], device: torch.device, context: int, cell: dict[str, Any], results: str | None
) -> Row:
    """A row of what sets the first model apart from the second. Raises InputError where their shapes differ."""
    shapes = [checkpoint.read_args(side.directory) for side in sides]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"--against: {sides[1].directory} has another shape than {sides[0].directory}; give its original"
        )
    models = [load(side, device)[0] for side in sides]
    changes = inspection.compare(*models, ids, context)
    values = {"divergence_nats": changes.loss, "update_x": changes.total}
    values["same_token_x"] = changes.n_same / sum(changes.counts)
    values |= {f"{name}_update_x": value for name, value in changes.tables.items()}
    if len(changes.sums) >= LEAST_PIECES:
        values["divergence_low_nats"], values["divergence_high_nats"] = confidence(changes)
    curves = {f"{matrix}_update_x": moved for matrix, moved in changes.updates.items()}
    curves["activation_x"] = changes.activations
    series = {name: list(enumerate(points)) for name, points in curves.items()}
    against = {**sides[1].cell, "dtype": sides[1].dtype_name}
    cell = {**sides[0].cell, "against": against, **cell, "context": context}
    runs = {name: [value] for name, value in values.items()}
    path, dtype = results and Path(results), sides[0].dtype_name
    return record(path, "inspection", cell, runs, device, dtype, series=series)


def difference(ours: perplexity.Perplexity, theirs: perplexity.Perplexity, context: int) -> dict[str, float]:
    """Loss of the first model less that of the second, with a paired 95 % interval where there is text enough for one.

    What is drawn for the interval are stretches of `context` tokens, whatever the stride.
    """
    values = {"difference_nats": ours.loss - theirs.loss}
    pieces = [result.stretches(context - 1) for result in (ours, theirs)]
    if len(pieces[0].sums) >= LEAST_PIECES:
        values["difference_low_nats"], values["difference_high_nats"] = confidence(*pieces)
    return values


def make_rows(
    sides: list[Side],
    measured: list[tuple[perplexity.Perplexity, dict[str, float]]],
    cell: dict[str, Any],
    device: torch.device,
    results: str | None,
) -> list[Row]:
    """A row for each model, appended to `results` where there is one; the first also holds the difference."""
    rows = []
    for side, (_, values) in zip(sides, measured, strict=True):
        place = {**side.cell, **cell}
        if side is sides[0] and len(sides) == 2:
            place["against"] = {**sides[1].cell, "dtype": sides[1].dtype_name}
            values = values | difference(measured[0][0], measured[1][0], cell["context"])
        path, runs = results and Path(results), {name: [value] for name, value in values.items()}
        rows.append(record(path, "perplexity", place, runs, device, side.dtype_name))
    return rows


if __name__ == "__main__":
    cli.run(main)
