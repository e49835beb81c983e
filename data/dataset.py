"""A data file as what a run trains on: samples, some of them held out, and questions in the form that it teaches."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data import pairs, records, samples, text
from data.samples import Sample
from llama import order
from llama.errors import InputError
from llama.tokenizer import Tokenizer

Entry = Sample | tuple[Sample, Sample]  # what one record becomes; of a preference, chosen and rejected
OPENING = 16  # tokens of a text that a model is given to continue


@dataclass(frozen=True)
class Dataset:
    """Samples, or pairs of them, to train on and held out; questions, with the ids of their prompts; the format, and
    what was left out."""

    training: list[Entry]
    held_out: list[Entry]
    questions: dict[str, list[int]]
    what: str
    notes: str


@dataclass(frozen=True)
class _Encoded:
    """A file's samples. left_out: why others are not among them; notes: that, and what was not used as it came."""

    found: records.Records
    samples: list[Entry]
    left_out: str
    notes: str

    @property
    def is_text(self) -> bool:
        return isinstance(self.found.records[0], records.Text)


def load(
    path: Path,
    tokenizer: Tokenizer,
    max_seq_len: int,
    n_held_out: int,
    seed: int,
    questions: Sequence[str],
    eval_path: Path | None = None,
    of_pairs: bool = False,
) -> Dataset:
    """Of records a seeded choice of n_held_out samples is held out, of texts the last blocks, a tenth at most.

    of_pairs: the files hold preference pairs (pairs.py).
    With eval_path nothing of `path` is: the first n_held_out samples of that file are, of whatever format, or all that
    it has. Raises InputError as records.read does, and where there would be nothing to train or to measure on.
    """
    data = _read(path, tokenizer, max_seq_len, "data", "trained", of_pairs)
    if eval_path is None:
        source, notes = data, data.notes
        training, held_out = _split(path, data, max_seq_len, n_held_out, seed)
    else:
        source = _read(eval_path, tokenizer, max_seq_len, "eval_data", "measured", of_pairs)
        training, held_out = data.samples, source.samples[:n_held_out]
        of_all = f"the first of {len(source.samples)} samples of {eval_path}, {source.found.what}"
        notes = f"{data.notes}; held out: {of_all}{source.notes}"
    if data.is_text:
        tokens = (held_out if held_out and source.is_text else training)[0].tokens
        opening = list(tokens[: min(OPENING, len(tokens) // 2)])
        asked = {" ".join(tokenizer.decode(opening[opening[0] == tokenizer.bos_id :]).split()): opening}
    else:
        asked = {question: data.found.records[0].ask(tokenizer, question) for question in questions}
    return Dataset(training, held_out, asked, data.found.what, notes)


def _read(path: Path, tokenizer: Tokenizer, max_seq_len: int, option: str, use: str, of_pairs: bool) -> _Encoded:
    """The samples of a file. option: what gave it; use: what is done with them, both for the error."""
    found = _records(path, of_pairs)
    encoded, cut, names = _encode(found.records, tokenizer, max_seq_len)
    left_out = _about(names, "left out")
    if not encoded:
        reason = f"nothing can be {use} on within max_seq_len={max_seq_len}{left_out}"
        raise InputError(f"{option}={path}: {found.what}, of which {reason}")
    return _Encoded(found, encoded, left_out, _notes(found, tokenizer, cut, names))


def _records(path: Path, of_pairs: bool) -> records.Records:
    return pairs.read(path) if of_pairs else records.read(path)


def _split(path: Path, data: _Encoded, max_seq_len: int, n_held_out: int, seed: int) -> tuple[list[Entry], list[Entry]]:
    """Samples to train on, and those set aside."""
    every = data.samples
    n = min(n_held_out, max(1, len(every) // 10)) if data.is_text else n_held_out
    if len(every) <= n:
        raise InputError(
            f"data={path}: {data.found.what}, {len(every)} samples within max_seq_len={max_seq_len}; "
            f"held_out={n} leaves none of them to train on, use a smaller one{data.left_out}"
        )
    chosen = set(range(len(every) - n, len(every)) if data.is_text else order.epoch_order(len(every), seed, 0)[:n])
    return [sample for i, sample in enumerate(every) if i not in chosen], [every[i] for i in sorted(chosen)]


def _encode(
    entries: list[records.Record] | list[pairs.Preference], tokenizer: Tokenizer, max_seq_len: int
) -> tuple[list[Entry], list[str], list[str]]:
    """As samples.encode; of texts every block, and nothing is cut."""
    if isinstance(entries[0], pairs.Preference):
        return pairs.encode(tokenizer, entries, max_seq_len)
    if not isinstance(entries[0], records.Text):
        return samples.encode(tokenizer, entries, max_seq_len)
    blocks, left_out = [], []
    for number, record in enumerate(entries, 1):
        if not record.text.strip():
            left_out.append(f"record {number}: no text")
            continue
        ids = text.encode(record.text, tokenizer) + [tokenizer.eos_id] * record.has_end
        blocks += text.blocks(ids, max_seq_len, f"record {number} token")
    return blocks, [], left_out


def show(path: Path, tokenizer: Tokenizer, max_seq_len: int, n_shown: int, of_pairs: bool = False) -> Iterator[str]:
    """Lines: the first samples as the model will see them, and how the file was read."""
    found = _records(path, of_pairs)
    for end in (max(1, n_shown), 20 * n_shown, len(found.records)):  # the first of them may be left out
        shown, cut, left_out = _encode(found.records[:end], tokenizer, max_seq_len)
        if len(shown) >= n_shown:
            break
    for entry in shown[:n_shown]:
        for sample in entry if isinstance(entry, tuple) else (entry,):
            yield from (*samples.show(sample, tokenizer), "")
    yield f"{len(shown[:n_shown])} samples of {path}, {found.what}{_notes(found, tokenizer, cut, left_out)}"


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
