"""Make a Llama model smaller.

    python compress.py quantize                                     # the embedded model in 8 bits
    python compress.py quantize --bits=4 --out_dir=runs/int4        # in 4 bits, groups of 32 weights
    python compress.py quantize --ckpt_dir=Llama-3.2-1B --out_dir=Llama-3.2-1B-int8
    python compress.py prune --method=dimensions --share=0.5 --steps=100    # cut at once, then fine-tune
    python compress.py prune --method=dimensions --share=0.5 --iterative    # cut a little, fine-tune, cut again
    python compress.py prune --method=magnitude --share=0.5                 # half of each matrix becomes zero
    python compress.py prune --ckpt_dir=Llama-3.2-1B --data=train.txt --share=0.25 --iterative

What comes out is a checkpoint directory like any other, which every script here takes as --ckpt_dir; a quantized one is
run, measured and given adapters, and its own weights stay. How it works: llama/quantization.py, llama/pruning.py.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch

from data import text
from llama import Transformer, checkpoint, cli, files, pruning, quantization
from llama import device as devices
from llama.errors import InputError, NonFinite
from llama.quantization import Quantization
from llama.tokenizer import Tokenizer, find_tokenizer
from llama.training.batch import collate
from llama.training.step import Settings
from llama.training.step import fine_tune as train

EMBEDDED = Path(__file__).parent / "data" / "tiny"
N_WORST = 3  # matrices that are named
CONTEXT = 512  # tokens of a row of a text file
ROUNDS = 8  # of --iterative, where --rounds does not say
STEPS_A_ROUND = 20  # of --iterative, where --steps does not say


def quantize(
    *,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    bits: int = 8,
    group_size: int | None = None,
    out_dir: str = "runs/quantized",
) -> None:
    """Write a checkpoint whose weights have 8 or 4 bits, and say what each matrix lost.

    Args:
        ckpt_dir: checkpoint directory in Meta's or Hugging Face's layout; without it, the small embedded model.
        tokenizer_path: tokenizer.model, which is copied; default: the one in ckpt_dir.
        bits: 8, with a scale for each row, or 4, with one for each group of a row; tables have 8 in both.
        group_size: of 4 bits: 32 (the default), 64 or 128 neighbouring weights share a scale.
        out_dir: directory of the checkpoint; must be new.
    """
    directory, target = Path(ckpt_dir) if ckpt_dir is not None else EMBEDDED, files.require_new(out_dir)
    try:
        config = Quantization(bits, group_size)
    except ValueError as error:
        raise InputError(f"--{error}") from None
    found = checkpoint.read_quantization(directory)
    if found is not None:
        raise InputError(f"{directory} is quantized already, in {found.bits} bits; quantize the original")
    tokenizer = Path(tokenizer_path) if tokenizer_path is not None else find_tokenizer(directory)
    if not tokenizer.is_file():
        raise InputError(f"--tokenizer_path={tokenizer} is not a file")
    model = checkpoint.load(directory, progress=True)
    try:
        errors = quantization.quantize(model, config, progress=True)
    except InputError as error:
        raise InputError(f"{directory}:{error}") from None
    checkpoint.save(model, target, tokenizer_path=tokenizer)
    print(report(model, errors))
    print(sizes(directory, model, target))


def report(model: Transformer, errors: dict[str, float]) -> str:
    """The relative error of each matrix, a line for each layer, and the worst by name."""
    parts = [name.removeprefix("layers.0.") for name in errors if name.startswith("layers.0.")]
    heads = [part.split(".")[-1] for part in parts]
    lines = ["relative error of each matrix (%)", "layer " + "".join(f"{head:>7}" for head in heads)]
    for layer in range(model.args.n_layers):
        lines.append(
            f"{layer:<6}" + "".join(f"{errors[f'layers.{layer}.{part}']:7.2%}"[:-1].rjust(7) for part in parts)
        )
    lines += [f"{name:<15}{error:6.2%}"[:-1] for name, error in errors.items() if not name.startswith("layers.")]
    worst = sorted(errors, key=errors.__getitem__, reverse=True)[:N_WORST]
    return "\n".join([*lines, "worst: " + ", ".join(f"{name} {errors[name]:.2%}" for name in worst), ""])


def sizes(directory: Path, model: Transformer, target: Path) -> str:
    """What the weights take in 16 bits, and what they take now."""
    before, after = model.args.weight_bytes(2), (target / "model.safetensors").stat().st_size
    name = "embedded model" if directory == EMBEDDED else str(directory)
    return (
        f"{name}: {before / devices.MB:,.2f} MB in 16 bits, {after / devices.MB:,.2f} MB now "
        f"({after / before:.3f} of it), in {target}"
    )


def prune(
    *,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    method: str = "dimensions",
    share: float = 0.5,
    iterative: bool = False,
    rounds: int | None = None,
    steps: int | None = None,
    max_loss_increase: float | None = None,
    data: str | None = None,
    batch_size: int = 8,
    lr: float = 1e-3,
    out_dir: str = "runs/pruned",
    seed: int = 1,
    device: str = "auto",
) -> None:
    """Take weights out of a Llama model, at once or little by little with fine-tuning in between.

    Args:
        ckpt_dir: checkpoint directory in Meta's or Hugging Face's layout; without it, the small embedded model.
        tokenizer_path: tokenizer.model; default: the one in ckpt_dir.
        method: dimensions takes hidden units of the feed-forward out, which makes the model smaller and faster;
            magnitude sets the smallest weights of each matrix to zero, which makes it neither.
        share: of the hidden units, or of the weights, that goes.
        iterative: cut in equal parts and fine-tune after each; without it, cut once and fine-tune then.
        rounds: with --iterative, how many parts; default: 8.
        steps: fine-tuning steps of all weights in total; default: none without --iterative, 20 a round with it.
        max_loss_increase: with --iterative, stop before the validation loss has risen by more nats a token than this.
        data: a text file in UTF-8 to fine-tune on; its last tenth validates. Models with the embedded model's tokenizer
            need none: there is text of its world.
        batch_size: rows of a step.
        lr: peak learning rate of AdamW in each round; it falls to 0 as a cosine.
        out_dir: directory of the checkpoint; must be new.
        seed: of the order of the rows.
        device: auto, cpu, cuda or cuda:N.
    """
    rounds, steps = check_flags(iterative, rounds, steps, max_loss_increase, batch_size, lr, seed)
    directory = Path(ckpt_dir) if ckpt_dir is not None else EMBEDDED
    files.require_new(out_dir)
    target, _ = devices.resolve(device, "float32")
    args = checkpoint.read_args(directory)
    pruning.check(args, method, share, rounds)
    tokenizer_file = Path(tokenizer_path) if tokenizer_path is not None else find_tokenizer(directory)
    source = load_text(tokenizer_file, data, batch_size, seed)
    if source is None and steps:
        raise InputError("--data is missing; fine-tuning takes a text file, and so does --iterative")
    model = checkpoint.load(directory, device=target, progress=True)
    pruning.require_plain(model)
    dtype = model.tok_embeddings.weight.dtype
    name = "embedded model" if ckpt_dir is None else ckpt_dir
    line = f"model      {name}, {size_line(model, dtype)}"
    if source is not None:
        model = model.float()
        before = source.loss(model)
        line += f", validation loss {before:.4f}"
    print(line)
    if steps == 0:
        model, gone = pruning.cut(model, method, share, args.ffn_dim), pruning.gone(method, share, args.ffn_dim)
    else:
        settings = Settings(optimizer="adamw", lr=lr, schedule="cosine", warmup_steps=2, clip_norm=1.0)
        limit = math.inf if max_loss_increase is None else before + max_loss_increase
        model, gone = shrink(model, method, share, rounds, steps, settings, source, limit)
    pruning.remove_masks(model.to(dtype))
    is_whole = gone == pruning.gone(method, share, args.ffn_dim)
    print(f"{'reached' if is_whole else 'kept':<10} share {gone:g} of --share={share:g}")
    if method == "magnitude":
        zeros, n_all = pruning.count_zeros(model)
        print(f"zeros      {zeros:,} of {n_all:,} weights in {len(pruning.projections(model))} matrices")
    checkpoint.save(model, out_dir, "meta", tokenizer_file)
    line = f"written    {out_dir}: {size_line(model, dtype)}"
    if source is not None:
        loss = source.loss(model.float())  # of the weights as they were written
        line += f", validation loss {loss:.4f} ({loss - before:+.4f}), perplexity {math.exp(loss):.3f}"
    print(line)


def check_flags(
    iterative: bool,
    rounds: int | None,
    steps: int | None,
    max_loss_increase: float | None,
    batch_size: int,
    lr: float,
    seed: int,
) -> tuple[int, int]:
    """How many rounds and steps there will be. Raises InputError for what is out of range or would have no effect."""
    if rounds is not None and not iterative:
        raise InputError(f"--rounds={rounds}: needs --iterative; without it there is one cut")
    rounds = (ROUNDS if rounds is None else rounds) if iterative else 1
    cli.require_at_least(1, batch_size=batch_size, rounds=rounds)
    cli.require_at_least(0, seed=seed)
    if steps is None:
        steps = STEPS_A_ROUND * rounds if iterative else 0
    if steps < (rounds if iterative else 0):
        raise InputError(f"--steps={steps}: expected at least {rounds if iterative else 0}, one in each round")
    if max_loss_increase is not None and (not iterative or not 0 <= max_loss_increase < math.inf):
        raise InputError(f"--max_loss_increase={max_loss_increase:g}: expected 0 or more, with --iterative")
    Settings(lr=lr)
    return rounds, steps


def load_text(tokenizer_file: Path, data: str | None, batch_size: int, seed: int) -> text.Text | None:
    """What --data names; without it text of the embedded model's world, for models that read with its tokenizer."""
    tokenizer = Tokenizer(tokenizer_file)
    is_embedded = files.sha256(tokenizer_file) == files.sha256(EMBEDDED / "tokenizer.model")
    if data is not None:
        return text.from_file(Path(data), tokenizer, CONTEXT, batch_size, seed)
    return text.of_embedded_model(tokenizer, batch_size, seed) if is_embedded else None


def size_line(model: Transformer, dtype: torch.dtype) -> str:
    """Parameters, and megabytes as stored."""
    n = model.args.n_params()
    return f"{n:,} parameters, {n * dtype.itemsize / devices.MB:,.2f} MB"


def shrink(
    model: Transformer,
    method: str,
    share: float,
    rounds: int,
    steps: int,
    settings: Settings,
    source: text.Text,
    limit: float,
) -> tuple[Transformer, float]:
    """What is left after all rounds, or after the last whose loss is within the limit; and the share that is gone."""

    def fine_tune(rest: Transformer, number: int) -> None:
        numbers = range(steps * (number - 1) // rounds, steps * number // rounds)
        train(rest, lambda step: [collate([[sample] for sample in source.samples(step)])], numbers, settings)

    kept: tuple[Transformer, float] | None = None
    cuts = pruning.gradually(model, method, share, rounds, fine_tune, source.loss)
    for number in range(1, rounds + 1):
        try:
            cut = next(cuts)
        except NonFinite as error:
            if kept is None or limit == math.inf:
                raise
            print(f"stopped    round {number}: {error}")
            return kept
        found = (
            f"share {cut.share:g}: loss {cut.loss_cut:.4f} cut, {cut.loss:.4f} after {steps * number // rounds} steps"
        )
        print(f"round {number:<4} {found}")
        if cut.loss > limit:
            if kept is None:
                raise InputError(
                    f"--max_loss_increase: the first round passes it; use more --rounds or --steps ({found})"
                )
            print(f"stopped    the loss is above {limit:.4f}, the most that --max_loss_increase allows")
            return kept
        # Training goes on in the same tensors; where it may have to be undone, a copy is kept.
        kept = (copy.deepcopy(cut.model) if limit < math.inf and number < rounds else cut.model), cut.share
    return kept


COMMANDS = {"quantize": quantize, "prune": prune}

if __name__ == "__main__":
    cli.run(COMMANDS)
