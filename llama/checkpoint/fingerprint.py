"""What a checkpoint is known by: its weights, whatever files they are in."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llama.checkpoint.layouts import open_source
from llama.checkpoint.source import Source, by_block

ROWS = 4096  # converted at once: an fp32 copy of a whole 16-bit table would be a gigabyte


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
