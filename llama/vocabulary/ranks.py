"""Llama 3's vocabulary: byte-pair ranks in tiktoken's format first, then 256 special tokens."""

from __future__ import annotations

import base64
import binascii
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import tiktoken

from llama.errors import InputError

# How Llama 3 cuts text into pieces before byte-pair merging. Part of the vocabulary: other cuts give other ids.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
N_SPECIAL = 256
# Names by offset from the first special id (128,000 in the released vocabulary); the rest are reserved.
NAMED_SPECIAL = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
# The regular expression engine backtracks over long runs and gives up at about a million characters. Meta's tokenizer
# cuts at these lengths; the same cuts give the same ids.
MAX_CHARS = 400_000
MAX_RUN = 25_000
RUN = re.compile(r"\s+|\S+")


def llama3_special_tokens() -> list[str]:
    """The 256 special tokens in the order of their ids."""
    reserved = itertools.count()
    return [NAMED_SPECIAL.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(N_SPECIAL)]


class Ranks:
    """`model` is tiktoken's Encoding."""

    kind = "tiktoken"
    leading_space = False
    adds_bos = True
    spaces_parts = True
    template = ""

    def __init__(self, ranks: dict[bytes, int]) -> None:
        self.special = {name: len(ranks) + i for i, name in enumerate(llama3_special_tokens())}
        self.model = tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=self.special
        )
        self.n_words = self.model.n_vocab
        self.bos_id, self.eos_id = self.special["<|begin_of_text|>"], self.special["<|end_of_text|>"]
        self.pad_id = self.special["<|finetune_right_pad_id|>"]
        self.stop_ids = [self.eos_id, self.special["<|eom_id|>"], self.special["<|eot_id|>"]]

    def encode(self, text: str, continues: bool = False) -> list[int]:
        blocks = (text[start : start + MAX_CHARS] for start in range(0, len(text), MAX_CHARS))
        return [token for block in blocks for part in _cut_runs(block) for token in self.model.encode_ordinary(part)]

    def token_bytes(self, token: int) -> bytes:
        return self.model.decode_single_token_bytes(token)


def _cut_runs(text: str) -> Iterator[str]:
    """Cut where a run of spaces, or of anything else, exceeds MAX_RUN characters."""
    start = 0
    for run in RUN.finditer(text):
        for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
            yield text[start:cut]
            start = cut
    yield text[start:]


def read(data: bytes, path: Path) -> Ranks:
    """Parse lines of `base64 rank`. tiktoken itself panics on gaps and on missing single bytes, so both are checked."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        token, _, rank = line.partition(b" ")
        try:
            piece = base64.b64decode(token, validate=True)
            valid = int(rank) == len(ranks) and piece not in ranks and piece != b""
        except (binascii.Error, ValueError):
            valid = False
        if not valid:
            raise InputError(f"{path}:{number}: expected a new base64 token and rank {len(ranks)}; download it again")
        ranks[piece] = len(ranks)
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise InputError(f"{path}: not every single byte has a rank, so some text could not be encoded")
    return Ranks(ranks)
