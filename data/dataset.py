"""A data file as what a run trains on: samples, some of them held out, and questions in the form that it teaches."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data import records, samples, text
from data.samples import Sample
from llama import order
from llama.errors import InputError
from llama.tokenizer import Tokenizer

OPENING = 16  # tokens of a text that a model is given to continue


@dataclass(frozen=True)
class Dataset:
    """Samples to train on and held out; questions, with the ids of their prompts; the format, and what was left out."""

    training: list[Sample]
    held_out: list[Sample]
    questions: dict[str, list[int]]
    what: str
    notes: str


def load(
    path: Path, tokenizer: Tokenizer, max_seq_len: int, n_held_out: int, seed: int, questions: Sequence[str]
) -> Dataset:
    """Records: a seeded choice of n_held_out samples is held out. Texts: so many blocks of their end, a tenth at most.

    Raises InputError as records.read does, and where nothing would be left to train on.
    """
    found = records.read(path)
    kind = type(found.records[0])
    if kind is records.Text:
        return _load_texts(path, found, tokenizer, max_seq_len, n_held_out)
    asked = {question: kind.ask(tokenizer, question) for question in questions}
    encoded, cut, left_out = samples.encode(tokenizer, found.records, max_seq_len)
    if len(encoded) <= n_held_out:
        raise InputError(
            f"data={path}: {len(encoded)} records have an answer within max_seq_len={max_seq_len}; "
            f"held_out={n_held_out} leaves none of them to train on{_about(left_out, 'left out')}"
        )
    chosen = set(order.epoch_order(len(encoded), seed, 0)[:n_held_out])
    held_out = [encoded[i] for i in sorted(chosen)]
    training = [sample for i, sample in enumerate(encoded) if i not in chosen]
    return Dataset(training, held_out, asked, found.what, _notes(found, tokenizer, cut, left_out))


def _load_texts(path: Path, found: records.Records, tokenizer: Tokenizer, max_seq_len: int, n_held_out: int) -> Dataset:
    blocks = _blocks(found, tokenizer, max_seq_len)
    n_last = min(n_held_out, max(1, len(blocks) // 10))
    if len(blocks) <= n_last:
        raise InputError(
            f"data={path}: has {len(blocks)} blocks of max_seq_len={max_seq_len} tokens; held_out={n_held_out} leaves "
            "none to train on; use a smaller max_seq_len or held_out=0"
        )
    training, held_out = blocks[: len(blocks) - n_last], blocks[len(blocks) - n_last :]
    opening = list((held_out or training)[0].tokens[:OPENING])
    words = tokenizer.decode([token for token in opening if token != tokenizer.bos_id])
    questions = {" ".join(words.split()): opening}
    return Dataset(training, held_out, questions, found.what, _notes(found, tokenizer, [], []))


def _blocks(found: records.Records, tokenizer: Tokenizer, max_seq_len: int) -> list[Sample]:
    """Plain text in one stream of blocks; of texts in records, each by itself, with its end."""
    if found.what == "plain text":
        return text.blocks(text.encode(found.records[0].text, tokenizer), max_seq_len)
    return [
        block
        for number, record in enumerate(found.records, 1)
        for block in text.blocks(
            [*text.encode(record.text, tokenizer), tokenizer.eos_id], max_seq_len, f"record {number} token"
        )
    ]


def show(path: Path, tokenizer: Tokenizer, max_seq_len: int, n_shown: int) -> Iterator[str]:
    """Lines: the first samples as the model will see them, and how the file was read."""
    found, cut, left_out = records.read(path), [], []
    if isinstance(found.records[0], records.Text):
        blocks = _blocks(found, tokenizer, max_seq_len)
        shown, all_of_them = blocks[:n_shown], f"{len(blocks)} blocks"
    else:
        shown, cut, left_out = samples.encode(tokenizer, found.records[:n_shown], max_seq_len)
        all_of_them = f"{len(found.records)} records"
    for sample in shown:
        yield from (*samples.show(sample, tokenizer), "")
    yield f"{len(shown)} of {all_of_them} of {path}, {found.what}{_notes(found, tokenizer, cut, left_out)}"


def _notes(found: records.Records, tokenizer: Tokenizer, cut: Sequence[str], left_out: Sequence[str]) -> str:
    """What was not used as it came, by name."""
    special = re.compile("|".join(map(re.escape, tokenizer.special_tokens)) or "(?!)")
    spelled = [f"record {number}" for number, record in enumerate(found.records, 1) if special.search(repr(record))]
    return (
        _about(cut, "cut at max_seq_len")
        + _about(left_out, "left out")
        + _about(spelled, "spell special tokens, which stay text")
        + (f"; fields not used: {records.listed(found.unused)}" if found.unused else "")
    )


def _about(names: Sequence[str], what: str) -> str:
    return f"; {len(names)} {what} ({', '.join(names[:5])}{', ...' * (len(names) > 5)})" if names else ""
