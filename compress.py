"""Make a model smaller.

    python compress.py quantize --output_dir=runs/int8                    # the embedded model in 8 bits
    python compress.py quantize --bits=4 --output_dir=runs/int4           # in 4 bits, groups of 32 weights
    python compress.py quantize --ckpt_dir=Llama-3.2-1B --output_dir=Llama-3.2-1B-int8

What comes out is a checkpoint directory like any other: inference.py, evaluate.py, benchmark_inference.py and, for
adapters, finetuning.py take it as --ckpt_dir, without further flags. How it works: llama/quantization.py.
"""

from __future__ import annotations

from pathlib import Path

from llama import Transformer, bench, checkpoint, cli, files, quantization
from llama.errors import InputError
from llama.quantization import Quantization
from llama.tokenizer import find_tokenizer

EMBEDDED = Path(__file__).parent / "data" / "tiny"
N_WORST = 3


def quantize(
    *,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    output_dir: str | None = None,
    bits: int = 8,
    group_size: int | None = None,
) -> None:
    """Write a checkpoint whose weights have 8 or 4 bits, and say what each matrix lost.

    Args:
        ckpt_dir: checkpoint directory in Meta's or Hugging Face's layout; without it, the small embedded model.
        tokenizer_path: tokenizer.model, which is copied; default: the one in ckpt_dir.
        output_dir: directory to write; must be new.
        bits: 8, with a scale for each row, or 4, with one for each group of a row; tables have 8 in both.
        group_size: of 4 bits: 32 (the default), 64 or 128 neighbouring weights share a scale.
    """
    directory, target = source(ckpt_dir), new_output(output_dir)
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


def source(ckpt_dir: str | None) -> Path:
    """The checkpoint to start from."""
    return Path(ckpt_dir) if ckpt_dir is not None else EMBEDDED


def new_output(output_dir: str | None) -> Path:
    """Where to write. Raises InputError before any work where that is not said or holds something."""
    if output_dir is None:
        raise InputError("--output_dir is missing; name a new directory for the result")
    files.require_new(output_dir)
    return Path(output_dir)


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
        f"{name}: {before / bench.MB:,.2f} MB in 16 bits, {after / bench.MB:,.2f} MB now "
        f"({after / before:.3f} of it), in {target}"
    )


COMMANDS = {"quantize": quantize}

if __name__ == "__main__":
    cli.run(COMMANDS)
