"""The layouts that a checkpoint directory may have. A new one is a file beside this one and an entry here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from llama import files
from llama.checkpoint import gguf, gguf_files, hf, hf_files, meta, quantized
from llama.checkpoint.locate import is_gguf, locate, remedy
from llama.checkpoint.source import Source
from llama.errors import InputError


class Layout(NamedTuple):
    """How a checkpoint is recognised, read and written."""

    is_here: Callable[[Path], bool]
    open: Callable[[Path], Source]
    write: Callable[..., None]  # model, directory, tokenizer file or None; Meta's: number of shards
    marker: str  # what is_here goes by, for messages
    weights: tuple[str, ...] = ()  # patterns of the names of its files; none: the path is the file

    def has_weights(self, directory: Path) -> bool:
        return not self.weights or any(any(directory.glob(pattern)) for pattern in self.weights)


def _has_params(directory: Path, is_quantized: bool) -> bool:
    path = directory / meta.PARAMS
    return path.exists() and ("quantization" in files.read_json(path)) == is_quantized


# Where a directory is several things at once, the first whose weights are there counts: a configuration of Hugging Face
# says all that Meta's does, and how RoPE is scaled and whether the head is tied as well.
LAYOUTS = {
    "quantized": Layout(
        lambda d: _has_params(d, True), quantized.QuantizedSource, quantized.write, "params.json", quantized.WEIGHTS
    ),
    "hf": Layout(lambda d: (d / hf.CONFIG).exists(), hf.HfSource, hf_files.write, "config.json (HF)", hf.WEIGHTS),
    "meta": Layout(lambda d: _has_params(d, False), meta.MetaSource, meta.write, "params.json (Meta)", meta.WEIGHTS),
    "gguf": Layout(is_gguf, gguf.GgufSource, gguf_files.write, "a GGUF file"),
}


def open_source(ckpt_dir: str | Path | Source) -> Source:
    """Open a checkpoint in whichever layout it is: a directory, a file in it, a GGUF file (see locate.py).

    Where a directory has no weights but its folder original/ has, as Meta's repositories on Hugging Face do, those are
    meant. Raises InputError where there is no checkpoint, or a broken one.
    """
    if isinstance(ckpt_dir, Source):
        return ckpt_dir
    path = locate(ckpt_dir)
    for place in (path, path / "original"):
        for layout in LAYOUTS.values():
            if layout.is_here(place) and layout.has_weights(place):
                return layout.open(place)
    here = [f"{it.marker} but no {' or '.join(it.weights)}" for it in LAYOUTS.values() if it.is_here(path)]
    found = ", ".join(here) or "neither params.json (Meta) nor config.json (HF)"
    raise InputError(f"{path} holds {found}; {remedy(path)}")
