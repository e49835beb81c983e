"""What the benchmarks measure on: random weights, plain or quantized, and random prompts, the same for every engine."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from llama import Transformer, checkpoint, quantization
from llama.config import PRESETS, ModelArgs
from llama.model import RMSNorm
from llama.quantization import Quantization

PLAIN = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # what plain weights of a dtype are called
QUANTIZED = {"int8": Quantization(8), "int4": Quantization(4)}


def random_prompts(vocab_size: int, batch_size: int, length: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (batch_size, length), generator=generator).tolist()


def provide_weights(
    folder: Path, model: str, ckpt_dir: str | None, dtype: torch.dtype, seed: int, for_peers: bool = False
) -> Path:
    """A directory for all cells: the user's, or random weights; in Hugging Face's layout where peers need it."""
    if ckpt_dir is not None:
        directory = checkpoint.locate(ckpt_dir)
        checkpoint.read_args(directory)
        if not for_peers or (directory / "config.json").exists():
            return directory
        network = checkpoint.load(directory, dtype)
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
    """A quantized model with random codes, of the size of random weights: made far sooner than by quantizing some."""
    with torch.device("meta"):
        model = Transformer(args).to(dtype)
        quantization.lay_out(model, config)
    model = model.to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "scales"):
            module.weight.random_(generator=generator)  # every value of the type
            scale = 0.02 / (4.6 if module.weight.dtype == torch.uint8 else 74)  # codes' deviation
            module.scales.fill_(scale)
            if getattr(module, "offsets", None) is not None:
                module.offsets.fill_(-7.5 * scale)
        elif isinstance(module, RMSNorm):
            module.weight.fill_(1.0)
    return model
