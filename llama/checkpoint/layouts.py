"""The layouts that a checkpoint directory may have. A new one is a file beside this one and an entry here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from llama.checkpoint import hf, meta, quantized
from llama.checkpoint.source import Source
from llama.errors import InputError
from llama.model import Transformer


class Layout(NamedTuple):
    """How a directory is recognised, read and written."""

    marker: str  # what only a directory of this layout holds, for messages
    is_here: Callable[[Path], bool]
    open: Callable[[Path], Source]
    write: Callable[[Transformer, Path], None]
    tokenizer: str  # where the released directories have tokenizer.model


LAYOUTS = {
    "meta": Layout("params.json (Meta)", meta.is_here, meta.MetaSource, meta.write, "tokenizer.model"),
    "hf": Layout("config.json (HF)", hf.is_here, hf.HfSource, hf.write, "original/tokenizer.model"),
    "quantized": Layout(
        "params.json (quantized)", quantized.is_here, quantized.QuantizedSource, quantized.write, "tokenizer.model"
    ),
}


def open_source(ckpt_dir: str | Path | Source) -> Source:
    """Open a checkpoint directory in whichever layout it is. Raises InputError for none, several, or a broken one."""
    if isinstance(ckpt_dir, Source):
        return ckpt_dir
    directory = Path(ckpt_dir)
    if not directory.is_dir():
        raise InputError(f"checkpoint directory {directory} does not exist; check its name")
    matching = [layout for layout in LAYOUTS.values() if layout.is_here(directory)]
    if not matching:
        raise InputError(
            f"{directory} holds neither params.json (Meta) nor config.json (HF); one says which layout it is"
        )
    if len(matching) > 1:
        markers = " and ".join(layout.marker for layout in matching)
        raise InputError(f"{directory} holds both {markers}; exactly one says which layout it is")
    return matching[0].open(directory)
