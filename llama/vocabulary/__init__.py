"""What stands behind a Tokenizer: a vocabulary, one class for each kind of file.

ranks.py    Llama 3's tokenizer.model: tiktoken ranks
pieces.py   Llama 2's tokenizer.model: a sentencepiece model
hf.py       tokenizer.json, read by Hugging Face's `tokenizers`
gguf.py     a GGUF file, whose metadata hold what the others do
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from llama import files, gguf_header
from llama.errors import InputError
from llama.vocabulary import gguf, hf, pieces, ranks

MAX_FILE_BYTES = 64 << 20


class Vocabulary(Protocol):
    """Ids of text and bytes of ids. A text never becomes a special token, whatever it spells."""

    kind: str
    n_words: int
    special: dict[str, int]  # control tokens by their text
    bos_id: int | None
    eos_id: int
    pad_id: int
    adds_bos: bool  # whether a text begins with bos: Llama's does, SmolLM2's does not
    stop_ids: list[int]  # any of them ends a completion and an answer
    leading_space: bool  # whether encoding puts a space before a text, which decoding takes away
    spaces_parts: bool  # whether text behind a special token gets that space, too
    template: str  # the chat template that came with it, to tell formats apart; never executed

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Ids of a text; of one that goes on behind other text, without a leading space, where it `continues`."""

    def token_bytes(self, token: int) -> bytes:
        """What one id below n_words stands for."""


def read(path: Path) -> Vocabulary:
    """The vocabulary in a file, whose kind its content tells. Raises InputError for a file of no kind, or a bad one."""
    if not path.is_file():
        raise InputError(f"tokenizer {path} is not a file; pass tokenizer_path=FILE")
    if files.head(path).startswith(gguf_header.MAGIC):
        return gguf.read(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read tokenizer {path}: {error.strerror}; pass tokenizer_path=FILE") from error
    if len(data) > MAX_FILE_BYTES:
        raise InputError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB; it is no tokenizer")
    if (reason := files.stand_in(path)) is not None:
        raise InputError(f"{path} is {reason}")
    if data.lstrip()[:1] == b"{":
        return hf.read(data, path)
    first_line = data.split(b"\n", 1)[0].split(b" ")
    if len(first_line) == 2 and first_line[1].strip().isdigit():
        return ranks.read(data, path)
    return pieces.read(data, path, hf.template_of(path.parent))
