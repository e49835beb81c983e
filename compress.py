"""Make a Llama model smaller, or write it in another layout.

    python compress.py quantize                                     # the embedded model in 8 bits
    python compress.py quantize --bits=4 --out_dir=runs/int4        # in 4 bits, groups of 32 weights
    python compress.py quantize --ckpt_dir=Llama-3.2-1B --out_dir=Llama-3.2-1B-int8
    python compress.py prune --method=dimensions --share=0.5 --steps=100    # cut at once, then fine-tune
    python compress.py prune --method=dimensions --share=0.5 --iterative    # cut a little, fine-tune, cut again
    python compress.py prune --method=magnitude --share=0.5                 # half of each matrix becomes zero
    python compress.py prune --ckpt_dir=Llama-3.2-1B --data=train.txt --share=0.25 --iterative
    python compress.py merge --ckpt_dir=Llama-3.2-1B --adapter=runs/finetuning/adapter      # one checkpoint of the two
    python compress.py convert --ckpt_dir=Llama-3.2-1B --type=q8_0 --out_dir=llama.gguf     # for llama.cpp, ollama

What comes out is a checkpoint directory like any other, which every script here takes as --ckpt_dir; a quantized one is
run, measured and given adapters, and its own weights stay. How it works: llama/quantization.py, llama/pruning.py.
"""

from __future__ import annotations

import early  # noqa: F401 (first of all: a start that fails ends in one line)

import copy
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from data import text
from data.tiny import EMBEDDED, directory_of, has_tokenizer
from llama import Transformer, adapters, calibration, checkpoint, cli, files, lora, pruning, quantization
from llama import device as devices
from llama.checkpoint import gguf_files
from llama.cli import option
from llama.config import ModelArgs
from llama.errors import InputError, NonFinite
from llama.model import RMSNorm
from llama.quantization import GROUP_SIZES, Quantization
from llama.tokenizer import Tokenizer, find_tokenizer
from llama.training.batch import collate
from llama.training.step import Settings, fine_tune

DTYPES = ("auto", *devices.DTYPES)
DTYPE = "dtype of the weights; auto keeps theirs, which must be one for all"
N_WORST = 3  # matrices that are named
CONTEXT = 512  # tokens of a sequence of a text file
SEQUENCES = 32
ROUNDS = 8
STEPS_PER_ROUND = 20
CONVERTED = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "q8_0": None}


@dataclass(frozen=True)
class QuantizeOptions(cli.Options):
    """Write a checkpoint whose weights have 8 or 4 bits, and say what each matrix lost."""

    ckpt_dir: str | None = option(None, cli.CKPT_DIR)
    tokenizer_path: str | None = option(None, cli.TOKENIZER_PATH)
    bits: float = option(
        8,
        "8, 4, or with --calibration a number in between, to which the average of the blocks' weights comes close when "
        "the matrices that lose most keep 8; tables have 8 in any case",
    )
    group_size: int | None = option(
        None, f"{GROUP_SIZES} neighbouring weights of a row share a scale; default: 32 of 4 bits, of 8 the whole row"
    )
    zero_points: bool = option(
        False, "of 4 bits: each group has an offset beside its scale, which loses less and takes 16 bits more per group"
    )
    calibration: str | None = option(
        None,
        "a text file in UTF-8: codes are chosen for what the matrices compute on it, not for each weight by itself",
    )
    sequences: int | None = option(
        None, f"of {CONTEXT} tokens from the start of that text; default: {SEQUENCES}", least=1
    )
    dtype: str = option("auto", DTYPE, choices=DTYPES)
    out_dir: str = option("runs/quantized", "directory of the checkpoint; must be new")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibration is None and self.sequences is not None:
            raise InputError(f"--sequences={self.sequences}: needs --calibration, of whose text they are")
        if self.calibration is None and 4 < self.bits < 8:
            raise InputError(f"--bits={self.bits:g}: needs --calibration, to find the matrices that keep 8")

    @property
    def config(self) -> Quantization:
        bits = 4 if 4 < self.bits < 8 else self.bits
        try:
            return Quantization(int(bits) if bits == int(bits) else bits, self.group_size, self.zero_points)
        except ValueError as error:
            raise InputError(f"--{error}") from None


def quantize(options: QuantizeOptions) -> None:
    directory, target = directory_of(options.ckpt_dir), files.require_new(options.out_dir)
    config = options.config
    source = checkpoint.open_source(directory)
    if source.quantization is not None:
        raise InputError(f"{directory} is quantized already, in {source.quantization.bits} bits; quantize the original")
    tokenizer = tokenizer_file(options.tokenizer_path, directory)
    tokens = calibration_tokens(options, tokenizer, source.args)
    dtype = devices.DTYPES.get(options.dtype)
    exact = torch.float32 if dtype is None and source.dtype is not None else dtype  # as a file's own codes may need it
    model = checkpoint.load(source, exact, progress=True)
    for norm in (module for module in model.modules() if isinstance(module, RMSNorm)):
        norm.to(dtype or source.dtype)  # which is the dtype of activations
    try:
        if tokens is None:
            lost = {"relative error": quantization.quantize(model, config, progress=True)}
        else:
            bits = options.bits if 4 < options.bits < 8 else None
            outcomes = calibration.calibrate(model, config, tokens, bits, progress=True)
            lost = {
                "output error of the nearest codes": {name: outcome.nearest for name, outcome in outcomes.items()},
                "output error of the chosen codes": {name: outcome.chosen for name, outcome in outcomes.items()},
            }
    except InputError as error:
        raise InputError(f"{directory}:{error}") from None
    checkpoint.save(model.to(model.dtype), target, tokenizer_path=tokenizer)
    for what, errors in lost.items():
        print(report(model, what, errors))
    kept = quantization.quantization_of(model).int8
    if kept:
        print(f"the matrices that keep 8 bits: {', '.join(kept)}\n")
    before, after = model.args.weight_bytes(2), (target / "model.safetensors").stat().st_size
    print(
        f"{shown(directory)}: {before / devices.MB:,.2f} MB in 16 bits, {after / devices.MB:,.2f} MB now "
        f"({after / before:.3f} of it), in {target}"
    )


def tokenizer_file(path: str | None, directory: Path) -> Path:
    """The tokenizer of a checkpoint. Raises InputError where there is none, or one of a different vocabulary."""
    file = find_tokenizer(directory, path)
    Tokenizer(file).check_vocabulary(checkpoint.read_args(directory).vocab_size)
    return file


def shown(directory: Path) -> str:
    return "embedded model" if directory == EMBEDDED else str(directory)


def calibration_tokens(options: QuantizeOptions, tokenizer: Path, args: ModelArgs) -> torch.Tensor | None:
    """Sequences [S, T] from the start of the text. Raises InputError where it has not as many."""
    if options.calibration is None:
        return None
    length, n = min(CONTEXT, args.trained_context), options.sequences or SEQUENCES
    ids = text.read(Path(options.calibration), Tokenizer(tokenizer))
    if len(ids) < n * length:
        n_whole = len(ids) // length
        remedy = f"use --sequences={n_whole}" if n_whole else f"a sequence takes {length}"
        raise InputError(f"--calibration={options.calibration}: {len(ids)} tokens, not {n} times {length}; {remedy}")
    return torch.tensor(ids[: n * length]).view(n, length)


def report(model: Transformer, what: str, errors: dict[str, float]) -> str:
    """The error of each matrix, one line per layer, and the worst by name."""
    parts = [name.removeprefix("layers.0.") for name in errors if name.startswith("layers.0.")]
    heads = [part.split(".")[-1] for part in parts]
    lines = [f"{what} of each matrix (%)", "layer " + "".join(f"{head:>7}" for head in heads)]
    for layer in range(model.args.n_layers):
        lines.append(
            f"{layer:<6}" + "".join(f"{errors[f'layers.{layer}.{part}']:7.2%}"[:-1].rjust(7) for part in parts)
        )
    lines += [f"{name:<15}{error:6.2%}"[:-1] for name, error in errors.items() if not name.startswith("layers.")]
    worst = sorted(errors, key=errors.__getitem__, reverse=True)[:N_WORST]
    return "\n".join([*lines, "worst: " + ", ".join(f"{name} {errors[name]:.2%}" for name in worst), ""])


@dataclass(frozen=True)
class PruneOptions(cli.Options):
    """Take weights out of a Llama model, at once or little by little with fine-tuning in between."""

    ckpt_dir: str | None = option(None, cli.CKPT_DIR)
    tokenizer_path: str | None = option(None, cli.TOKENIZER_PATH)
    method: str = option(
        "dimensions",
        "dimensions takes hidden units of the feed-forward out, heads whole key/value heads with their query heads: "
        "the model is smaller and faster; magnitude sets the smallest weights of each matrix to zero: it is neither",
        choices=pruning.METHODS,
    )
    share: float = option(0.5, "share of the hidden units, heads or weights to take out")
    iterative: bool = option(False, "cut in equal parts and fine-tune after each; without it, cut once and fine-tune")
    rounds: int | None = option(None, f"with --iterative, number of parts; default: {ROUNDS}", least=1)
    steps: int | None = option(
        None, f"fine-tuning steps of all weights in total; default: none, or {STEPS_PER_ROUND} per round of --iterative"
    )
    max_loss_increase: float | None = option(
        None, "with --iterative, stop before the validation loss has risen by more nats per token than this"
    )
    data: str | None = option(
        None,
        "a text file in UTF-8 to fine-tune on; its last tenth validates, unless there is eval_data. Models with the "
        "embedded model's tokenizer need none: there is text of its world",
    )
    eval_data: str | None = option(None, "another text file in UTF-8, whose start validates")
    eval_tokens: int = option(text.VALIDATION * CONTEXT, "tokens that validate, at most", least=2)
    batch_size: int = option(8, "sequences per step", least=1)
    lr: float = option(1e-3, "peak learning rate of AdamW in each round; it falls to 0 as a cosine")
    out_dir: str = option("runs/pruned", "directory of the checkpoint; must be new")
    seed: int = option(1, "seed of the order of the sequences", **cli.SEEDS)
    device: str = option("auto", cli.DEVICE)
    dtype: str = option("auto", DTYPE, choices=DTYPES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds is not None and not self.iterative:
            raise InputError(f"--rounds={self.rounds}: needs --iterative; without it there is one cut")
        least = self.n_rounds if self.iterative else 0
        if self.n_steps < least:
            raise InputError(f"--steps={self.steps}: expected at least {least}, one in each round")
        limit = self.max_loss_increase
        if limit is not None and (not self.iterative or not 0 <= limit < math.inf):
            raise InputError(f"--max_loss_increase={limit:g}: expected 0 or more, with --iterative")
        if self.eval_data is not None and self.data is None:
            raise InputError(f"--eval_data={self.eval_data}: needs --data, the text to fine-tune on")
        Settings(lr=self.lr)

    @property
    def n_rounds(self) -> int:
        return (self.rounds or ROUNDS) if self.iterative else 1

    @property
    def n_steps(self) -> int:
        usual = STEPS_PER_ROUND * self.n_rounds if self.iterative else 0
        return usual if self.steps is None else self.steps


def prune(options: PruneOptions) -> None:
    directory, method, share = directory_of(options.ckpt_dir), options.method, options.share
    files.require_new(options.out_dir)
    device, _ = devices.resolve(options.device, "float32")
    args = checkpoint.read_args(directory)
    pruning.check(args, method, share, options.n_rounds)
    tokenizer = tokenizer_file(options.tokenizer_path, directory)
    source = load_text(tokenizer, options)
    if source is None and options.n_steps:
        raise InputError("--data is missing; fine-tuning takes a text file, and so does --iterative")
    model = checkpoint.load(directory, devices.DTYPES.get(options.dtype), device, progress=True)
    pruning.require_plain(model)
    dtype = model.tok_embeddings.weight.dtype
    line = f"model      {shown(directory)}, {size_line(model, dtype)}"
    if source is not None:
        model = model.float()
        before = source.loss(model)
        line += f", validation loss {before:.4f}"
    print(line)
    if options.n_steps == 0:
        model = pruning.cut(model, method, share, args, None if source is None else source.calibration())
        gone = pruning.gone(method, share, args)
    else:
        rise = math.inf if options.max_loss_increase is None else options.max_loss_increase
        model, gone = shrink(model, options, source, before + rise)
    pruning.remove_masks(model.to(dtype))
    is_whole = gone == pruning.gone(method, share, args)
    print(f"{'reached' if is_whole else 'kept':<10} share {gone:g} of --share={share:g}")
    if method == "magnitude":
        zeros, n_all = pruning.count_zeros(model)
        print(f"zeros      {zeros:,} of {n_all:,} weights in {len(pruning.projections(model))} matrices")
    checkpoint.save(model, options.out_dir, "meta", tokenizer)
    line = f"written    {options.out_dir}: {size_line(model, dtype)}"
    if source is not None:
        loss = source.loss(model.float())  # of the weights as they were written
        line += f", validation loss {loss:.4f} ({loss - before:+.4f}), perplexity {math.exp(loss):.3f}"
    print(line)


def load_text(tokenizer_file: Path, options: PruneOptions) -> text.Text | None:
    """What --data names; without it text of the embedded model's world, for models that read with its tokenizer."""
    tokenizer = Tokenizer(tokenizer_file)
    if options.data is not None:
        evaluated = None if options.eval_data is None else Path(options.eval_data)
        order = CONTEXT, options.batch_size, options.seed
        return text.from_file(Path(options.data), tokenizer, *order, evaluated, options.eval_tokens)
    return text.of_embedded_model(tokenizer, options.batch_size, options.seed) if has_tokenizer(tokenizer) else None


def size_line(model: Transformer, dtype: torch.dtype) -> str:
    """Parameters, and megabytes as stored."""
    n = model.args.n_params()
    return f"{n:,} parameters, {n * dtype.itemsize / devices.MB:,.2f} MB"


def shrink(model: Transformer, options: PruneOptions, source: text.Text, limit: float) -> tuple[Transformer, float]:
    """What is left after all rounds, or after the last whose loss is within the limit; and the share that is gone."""
    settings = Settings(optimizer="adamw", lr=options.lr, schedule="cosine", warmup_steps=2, clip_norm=1.0)
    rounds = options.n_rounds
    ends = [options.n_steps * number // rounds for number in range(rounds + 1)]  # steps that are done after each round

    def train(rest: Transformer, number: int) -> None:
        steps = range(ends[number - 1], ends[number])
        fine_tune(rest, lambda step: [collate([[sample] for sample in source.samples(step)])], steps, settings)

    kept: tuple[Transformer, float] | None = None
    found = source.calibration()
    cuts = pruning.gradually(model, options.method, options.share, rounds, train, source.loss, found)
    for number in range(1, rounds + 1):
        try:
            cut = next(cuts)
        except NonFinite as error:
            if kept is None or limit == math.inf:
                raise
            print(f"stopped    round {number}: {error}")
            return kept
        line = f"share {cut.share:g}: loss {cut.loss_cut:.4f} cut, {cut.loss:.4f} after {ends[number]} steps"
        print(f"round {number:<4} {line}")
        if cut.loss > limit and kept is None:
            raise InputError(f"--max_loss_increase: the first round passes it; use more --rounds or --steps ({line})")
        if cut.loss > limit:
            print(f"stopped    the loss is above {limit:.4f}, the most that --max_loss_increase allows")
            return kept
        # Training goes on in the same tensors; where it may have to be undone, a copy is kept.
        kept = (copy.deepcopy(cut.model) if limit < math.inf and number < rounds else cut.model), cut.share
    return kept


@dataclass(frozen=True)
class MergeOptions(cli.Options):
    """Write a checkpoint with the update of one adapter, or of several, inside its weights."""

    ckpt_dir: str | None = option(None, cli.CKPT_DIR)
    tokenizer_path: str | None = option(None, cli.TOKENIZER_PATH)
    adapter: str | None = option(None, cli.ADAPTER)
    any_base: bool = option(False, cli.ANY_BASE)
    dtype: str = option(
        "auto",
        "auto keeps that of the weights; float32 loses nothing of a small update",
        choices=DTYPES,
    )
    to: str | None = option(
        None,
        "layout; default: gguf for a name that ends in .gguf, hf for a base of that layout, else meta",
        choices=("meta", "hf", "gguf"),
    )
    out_dir: str = option("runs/merged", "directory, for gguf the file's name, ending in .gguf; must be new")


def merge(options: MergeOptions) -> None:
    directory, target = directory_of(options.ckpt_dir), files.require_new(options.out_dir)
    if options.adapter is None:
        raise InputError("--adapter is missing; name the directory of an adapter, or of several with commas between")
    source = checkpoint.open_source(directory)
    if source.quantization is not None:
        raise InputError(
            f"{directory} is quantized; merge into the original, with --any_base where that was not trained on"
        )
    usual = "hf" if isinstance(source, checkpoint.LAYOUTS["hf"].open) else "meta"
    layout = options.to or ("gguf" if target.suffix == ".gguf" else usual)
    require_suffix(options.out_dir, layout)
    tokenizer = tokenizer_file(options.tokenizer_path, directory)
    model = checkpoint.load(source, devices.DTYPES.get(options.dtype), progress=True)
    base = None if options.any_base else partial(checkpoint.fingerprint, source)
    adapters.load(model, options.adapter, base)
    lost = lora.merge(model)
    lora.remove(model)
    checkpoint.save(model, target, layout, tokenizer)
    print(f"{shown(directory)} with {options.adapter}: {size_line(model, model.dtype)}, in {target}")
    if lost > 0.01:
        name = devices.dtype_name(model.dtype)
        print(f"{lost:.0%} of the update was lost to rounding in {name}; --dtype=float32 keeps it")


@dataclass(frozen=True)
class ConvertOptions(cli.Options):
    """Write a checkpoint, whatever its layout, in another one: Meta's, Hugging Face's or a GGUF file for llama.cpp."""

    ckpt_dir: str | None = option(None, cli.CKPT_DIR)
    tokenizer_path: str | None = option(None, cli.TOKENIZER_PATH)
    to: str = option("gguf", "layout", choices=("meta", "hf", "gguf"))
    type: str | None = option(
        None,
        "of the weights: f32, f16, bf16, or for gguf q8_0; default: as stored, bf16 for a quantized GGUF file",
        choices=tuple(CONVERTED),
    )
    shards: int = option(1, "files of the weights, for meta: one for each of so many parallel processes", least=1)
    out_dir: str | None = option(
        None, "directory, for gguf the file's name, ending in .gguf; must be new; default: runs/converted"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shards > 1 and self.to != "meta":
            raise InputError(f"--shards={self.shards}: needs --to=meta; {self.to} does not have them")
        if self.type == "q8_0" and self.to != "gguf":
            raise InputError(f"--type=q8_0: needs --to=gguf; {self.to} has f32, f16 and bf16")
        if self.out_dir is not None:
            require_suffix(self.out_dir, self.to)


def require_suffix(name: str, layout: str) -> None:
    if name.endswith(".gguf") != (layout == "gguf"):
        raise InputError(f"--out_dir={name}: a name ends in .gguf where --to=gguf is given, and only there")


def convert(options: ConvertOptions) -> None:
    directory, is_gguf = directory_of(options.ckpt_dir), options.to == "gguf"
    target = Path(options.out_dir or "runs/converted" + ".gguf" * is_gguf)
    source = checkpoint.open_source(directory)
    if source.quantization is not None:
        raise InputError(f"{directory} is quantized, in codes that other layouts do not have; convert the original")
    tokenizer = tokenizer_file(options.tokenizer_path, directory)
    if is_gguf:
        with files.new_file(target) as scratch:
            gguf_files.convert(source, scratch, tokenizer, options.type)
    else:
        files.require_new(target)
        model = checkpoint.load(source, CONVERTED.get(options.type), progress=True)
        checkpoint.save(model, target, options.to, tokenizer, options.shards)
    size = sum(path.stat().st_size for path in (target, *target.rglob("*")) if path.is_file())
    print(f"{shown(directory)}: {source.args.n_params():,} parameters, {size / devices.MB:,.2f} MB now, in {target}")


COMMANDS = {"quantize": quantize, "prune": prune, "merge": merge, "convert": convert}

if __name__ == "__main__":
    cli.run(COMMANDS)
