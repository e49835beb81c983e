"""The layouts that a checkpoint directory may have. A new one is a file beside this one and an entry here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from llama import files
from llama.checkpoint import hf, hf_files, meta, quantized
from llama.checkpoint.source import Source
from llama.errors import InputError
from llama.model import Transformer


class Layout(NamedTuple):
    """How a directory is recognised, read and written."""

    is_here: Callable[[Path], bool]
    open: Callable[[Path], Source]
    write: Callable[[Transformer, Path, Path | None], None]  # model, directory, tokenizer file or None
    marker: str  # what is_here goes by, for messages


def _has_params(directory: Path, is_quantized: bool) -> bool:
    path = directory / meta.PARAMS
    return path.exists() and ("quantization" in files.read_json(path)) == is_quantized


LAYOUTS = {
    "meta": Layout(lambda d: _has_params(d, False), meta.MetaSource, meta.write, "params.json (Meta)"),
    "quantized": Layout(lambda d: _has_params(d, True), quantized.QuantizedSource, quantized.write, "params.json"),
    "hf": Layout(lambda d: (d / hf.CONFIG).exists(), hf.HfSource, hf_files.write, "config.json (HF)"),
}


def open_source(ckpt_dir: str | Path | Source) -> Source:
    """Open a checkpoint directory in whichever layout it is. Raises InputError for none, several, or a broken one."""
    if isinstance(ckpt_dir, Source):
        return ckpt_dir
    directory = Path(ckpt_dir)
    if not directory.is_dir():
        raise InputError(f"checkpoint directory {directory} does not exist; check its name")
    matching = [layout for layout in LAYOUTS.values() if layout.is_here(directory)]
    if len(matching) != 1:
        markers = matching or [LAYOUTS["meta"], LAYOUTS["hf"]]
        names = (" and " if matching else " nor ").join(layout.marker for layout in markers)
        raise InputError(
            f"{directory} holds {'both' if matching else 'neither'} {names}; exactly one says which layout it is"
        )
    return matching[0].open(directory)
