"""Checkpoints on disk: what `layouts.py` lists is read, and written as well.

    model = load("Llama3.2-1B", torch.bfloat16)
    save(model, "converted", "hf", tokenizer_path)

    layouts.py      the table of layouts; meta.py, hf.py, gguf.py and quantized.py, a layout each
    hf_config.py    what a config.json says; source.py, what all layouts are read as; locate.py, where a path leads to

Reading is strict: every key is accounted for and every shape checked, against a model that is first built on the meta
device, so nothing is allocated before the files are known to fit. The weights are memory-mapped and assigned block by
block: where the dtype is kept on the CPU they are the mapped file itself; where it changes, one block at a time is in
memory twice. Nothing is unpickled beyond tensors (`weights_only=True`).

Left out on purpose: training state (training/snapshot.py), downloading.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from llama import files, parallel, quantization
from llama.checkpoint.layouts import LAYOUTS, open_source
from llama.checkpoint.locate import locate
from llama.checkpoint.source import Source, by_block
from llama.code_layers import Quantized
from llama.config import ModelArgs
from llama.errors import EnvironmentFailure, InputError
from llama.model import Transformer
from llama.processes import ALONE, World
from llama.quantization import Quantization

__all__ = [
    "LAYOUTS",
    "Source",
    "fingerprint",
    "load",
    "locate",
    "open_source",
    "read_args",
    "read_quantization",
    "save",
]

ROWS = 4096  # converted at once: an fp32 copy of a whole 16-bit table would be a gigabyte


def load(
    ckpt_dir: str | Path | Source,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
    me: World = ALONE,
) -> Transformer:
    """Build the model of a checkpoint directory, in evaluation mode, with `dtype` (None: as stored) on `device`.

    me: of several processes, each gets its part of every matrix (parallel.py).
    Raises InputError naming file and field for anything missing, malformed, unexpected or not representable in `dtype`.
    """
    source = open_source(ckpt_dir)
    dtype = dtype or source.dtype
    model = source.lay_out()
    names = list(model.state_dict())
    if me.size > 1:
        parallel.split(model, me)
    with tqdm(
        total=len(names), desc="loading weights", unit="tensor", disable=None if progress else True, leave=False
    ) as bar:
        for block in by_block(names):
            with source.open_part(me) as read:
                for name in block:
                    _assign(model, name, _convert(read(name), source, name, dtype, device))
                    bar.update()
    _check_codes(model, source, dtype)
    stored = {weight.dtype for name, weight in model.named_parameters() if name not in source.codes}
    if len(stored) > 1:
        raise InputError(
            f"{source.where}: weights of several dtypes ({', '.join(map(str, stored))}); pass dtype=float32"
        )
    # Moves the RoPE frequencies, the only thing not on it yet, and tells a quantized table what the norms compute in.
    model.to(device, model.dtype)
    return model.eval()


def read_args(ckpt_dir: str | Path) -> ModelArgs:
    """The shape of a checkpoint, without reading its weights. Raises InputError as `load` does."""
    return open_source(ckpt_dir).args


def read_quantization(ckpt_dir: str | Path) -> Quantization | None:
    """How a checkpoint is quantized, None where it is not, without reading its weights. Raises InputError as `load`."""
    return open_source(ckpt_dir).quantization


def save(
    model: Transformer,
    directory: str | Path,
    layout: Literal["meta", "hf", "gguf"] = "meta",
    tokenizer_path: Path | None = None,
    shards: int = 1,
) -> None:
    """Write a model as a new checkpoint directory in Meta's or Hugging Face's ("hf") layout, with its tokenizer if any.

    "gguf" is a file, which gets the name `directory`. Meta's has a file for each of `shards` parallel processes. A
    quantized model is written in the layout of quantized.py. What is written appears under its name only when complete.
    Raises InputError where there is something already or a quantized model should get a foreign layout or shards,
    EnvironmentFailure where it cannot be written.
    """
    chosen = LAYOUTS[layout]
    if quantization.quantization_of(model) is not None:
        if layout != "meta":
            raise InputError(f"a quantized model cannot be written as {layout}; write that of the original")
        chosen = LAYOUTS["quantized"]
    if shards > 1 and chosen is not LAYOUTS["meta"]:
        raise InputError(f"shards={shards}: only weights in Meta's layout are written in several")
    more = () if shards == 1 else (shards,)
    with (files.new_directory if chosen.weights else files.new_file)(directory) as scratch:
        chosen.write(model, scratch, tokenizer_path, *more)


def fingerprint(ckpt_dir: str | Path | Source) -> str:
    """sha256 of the shapes and values (as fp32) of the weights in a checkpoint directory.

    The same for every layout and every stored dtype that holds the values exactly, and in whatever dtype they are then
    used. Raises InputError as `load` does.
    """
    source = open_source(ckpt_dir)
    digest = hashlib.sha256()
    for block in by_block(list(source.lay_out().state_dict())):
        with source.open() as read:
            for name in block:
                weight = read(name)
                digest.update(f"{name} {list(weight.shape)}\n".encode())
                for part in weight.split(ROWS):
                    digest.update(part.float().contiguous().numpy().data)
    return digest.hexdigest()


def _convert(
    stored: Tensor, source: Source, name: str, dtype: torch.dtype | None, device: torch.device | str
) -> Tensor:
    place = source.place(name)
    if name in source.codes:
        dtype = stored.dtype
    elif stored.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"{place}: holds {stored.dtype}; expected float32, bfloat16 or float16 weights")
    try:
        weight = stored.to(device=device, dtype=dtype or stored.dtype).contiguous()
    except torch.OutOfMemoryError as error:
        raise EnvironmentFailure(
            f"{device} has too little memory for the weights; use dtype=bfloat16 or float16"
        ) from error
    if weight.dtype == torch.float16 and stored.dtype != torch.float16 and not weight.isfinite().all():
        raise InputError(f"{place}: values exceed float16; use dtype=bfloat16 or float32")
    return weight


def _check_codes(model: Transformer, source: Source, dtype: torch.dtype | None) -> None:
    """What scales and offsets make of the codes are numbers of fp32, and of `dtype`; any code is one."""
    for name, module in model.named_modules():
        if not isinstance(module, Quantized):
            continue
        place, largest = source.place(f"{name}.scales"), module.largest()
        if not largest <= torch.finfo(torch.float32).max:
            raise InputError(f"{place}: holds scales that are no finite numbers; quantize the original again")
        if dtype == torch.float16 and largest > torch.finfo(dtype).max:
            raise InputError(f"{place}: values exceed float16; use dtype=bfloat16 or float32")


def _assign(model: Transformer, name: str, weight: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
    setattr(module, leaf, weight)
