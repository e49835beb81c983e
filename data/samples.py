"""Samples: records as token ids, with what is trained of them.

Question and answer are tokenized apart. In one string the prompt's last ":" would melt into one token with the first
word of some answers (41 % of Alpaca's, with Llama 3's tokenizer): the model would learn from a prompt that it never
sees in use. Otherwise the ids are those of one string: Llama 2's tokenizer puts a space before a text, but not before
an answer. Every answer ends with a token that ends it, which is a label like the others: without it a model does not
learn to stop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from llama.errors import InputError
from llama.tokenizer import Tokenizer

Parts = list[tuple[list[int], bool]]  # ids in their order, and whether they are trained


class Record(Protocol):
    """data.alpaca.Record, data.records.Chat, ..."""

    def parts(self, tokenizer: Tokenizer) -> Parts: ...


@dataclass(frozen=True)
class Sample:
    """A record as ids. answers: the ranges of the tokens that are labels, in order. name: which record it is."""

    name: str
    tokens: tuple[int, ...]
    answers: tuple[range, ...]

    @property
    def n_prompt(self) -> int:
        """Tokens before the first answer."""
        return self.answers[0].start

    @property
    def n_labels(self) -> int:
        return sum(map(len, self.answers))


def encode(
    tokenizer: Tokenizer, records: Sequence[Record], max_seq_len: int
) -> tuple[list[Sample], list[str], list[str]]:
    """Samples of at most max_seq_len tokens, called "record N" from 1; those that were cut; those left out, and why.

    A record without an answer (Alpaca has some), or without room for one, is left out.
    """
    samples, cut, left_out = [], [], []
    for number, record in enumerate(records, 1):
        name = f"record {number}"
        try:
            whole = from_parts(name, record.parts(tokenizer))
            sample = within(whole, max_seq_len)
        except InputError as error:
            left_out.append(f"{name}: {str(error)[:100]}")
            continue
        if sample is not whole:
            cut.append(name)
        samples.append(sample)
    return samples, cut, left_out


def within(sample: Sample, max_seq_len: int) -> Sample:
    """The sample, or what of it is within max_seq_len tokens. Raises InputError where no part of an answer is.

    A cut answer loses its end, so that it does not teach to stop there.
    """
    if sample.n_prompt >= max_seq_len:
        raise InputError("no room for an answer")
    if len(sample.tokens) <= max_seq_len:
        return sample
    inside = [range(part.start, min(part.stop, max_seq_len)) for part in sample.answers]
    answers = tuple(part for part in inside if part)
    return Sample(sample.name, sample.tokens[: answers[-1].stop], answers)


def from_parts(name: str, parts: Parts) -> Sample:
    """The sample of a record, up to the end of its last answer. Raises InputError where there is none."""
    ids: list[int] = []
    answers: list[range] = []
    for part, is_answer in parts:
        start = max(1, len(ids))  # nothing predicts the first token
        ids += part
        if is_answer and start < len(ids):
            answers.append(range(start, len(ids)))
    if not answers:
        raise InputError("no answer")
    return Sample(name, tuple(ids[: answers[-1].stop]), tuple(answers))


def show(sample: Sample, tokenizer: Tokenizer) -> Iterator[str]:
    """Lines that show a sample token by token: those that are trained each in brackets."""
    n_others = len(sample.tokens) - sample.n_labels
    yield f"{sample.name}: {n_others} tokens of prompt, {sample.n_labels} trained (in brackets)"
    done = 0
    for answer in sample.answers:
        yield tokenizer.decode(sample.tokens[done : answer.start])
        yield "".join(f"[{_name(token, tokenizer)}]" for token in sample.tokens[answer.start : answer.stop])
        done = answer.stop


def _name(token: int, tokenizer: Tokenizer) -> str:
    is_end = token == tokenizer.eos_id
    return "<end of text>" if is_end else tokenizer.token_bytes(token).decode("utf-8", errors="replace")
