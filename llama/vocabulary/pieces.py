"""Llama 2's vocabulary, a sentencepiece model: pieces with U+2581 for a space, single bytes as <0xNN>."""

from __future__ import annotations

from pathlib import Path

import sentencepiece

from llama.errors import InputError

# A message of a protobuf that stands twice is merged: {normalizer_spec: {add_dummy_prefix: false}} in wire format.
NO_LEADING_SPACE = b"\x1a\x02\x18\x00"


class Pieces:
    """From a serialized ModelProto; `model` is sentencepiece's processor of it."""

    kind = "sentencepiece"
    adds_bos = True
    spaces_parts = True

    def __init__(self, proto: bytes, template: str = "") -> None:
        self.model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self._continuing = sentencepiece.SentencePieceProcessor(model_proto=proto + NO_LEADING_SPACE)
        self.n_words = self.model.vocab_size()
        self.bos_id, self.eos_id = self.model.bos_id(), self.model.eos_id()
        self.pad_id = self.model.pad_id() if self.model.pad_id() >= 0 else self.eos_id
        self.stop_ids = [self.eos_id]
        names = self.model.id_to_piece(list(range(self.n_words)))  # a UnicodeDecodeError where one is no text
        self.special = {name: i for i, name in enumerate(names) if self.model.is_control(i) or self.model.is_unknown(i)}
        self.leading_space = self.model.encode("a", out_type=str)[0].startswith("\u2581")
        self.template = template

    def encode(self, text: str, continues: bool = False) -> list[int]:
        return (self._continuing if continues else self.model).encode(text)

    def token_bytes(self, token: int) -> bytes:
        if self.model.is_control(token):
            return b""
        piece = self.model.id_to_piece(token)
        if self.model.is_byte(token):
            return bytes([int(piece[1:-1], 16)])
        if self.model.is_unknown(token):
            piece = " \u2047 "  # what sentencepiece itself shows
        return piece.replace("\u2581", " ").encode()


def read(data: bytes, path: Path, template: str = "") -> Pieces:
    """Raises InputError for what is no sentencepiece model, and for one without begin- and end-of-text tokens."""
    try:
        pieces = Pieces(data, template)
        valid = pieces.n_words < 1 << 24 and pieces.bos_id >= 0 and pieces.eos_id >= 0
    except (RuntimeError, OSError, ValueError, IndexError):
        valid = False
    if not valid:
        raise InputError(
            f"{path} is neither a tiktoken rank file, a sentencepiece model nor a tokenizer.json; download it again"
        )
    return pieces
