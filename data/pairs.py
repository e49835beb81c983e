"""Preference pairs: a prompt, an answer that was chosen and one that was rejected.

    {"instruction": "Name a colour.", "input": "", "chosen": "Blue.", "rejected": "Blue is not a number."}      Alpaca
    {"messages": [{"role": "user", "content": "Hi"}], "chosen": "Hello", "rejected": "What?"}                   a chat
    {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}                                           without template
    {"chosen": [{"role": "user", ...}, {"role": "assistant", ...}], "rejected": [the same, another answer]}

Answers of a chat may be texts, messages, or lists of them as in Hugging Face's preference sets, which may repeat the
prompt. What the two have in common is the prompt; all that the assistant says after it is compared. Files are read as
in records.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from data import alpaca, records, samples
from data.records import Chat, Pair
from data.samples import Sample
from llama.errors import InputError
from llama.tokenizer import Message, Tokenizer


@dataclass(frozen=True)
class Preference:
    """The prompt with either answer. n_shared: answers in what the two have in common, as in a chat of many turns."""

    kind: ClassVar[str] = "preference pairs"
    chosen: alpaca.Record | Chat | Pair
    rejected: alpaca.Record | Chat | Pair
    n_shared: int = 0

    def ask(self, tokenizer: Tokenizer, question: str) -> list[int]:
        """A question in the form of these records."""
        return self.chosen.ask(tokenizer, question)

    def sample(self, name: str, side: str, tokenizer: Tokenizer) -> Sample:
        """side: chosen or rejected. Raises InputError where there is no such answer."""
        try:
            sample = samples.from_parts(f"{name}, {side}", getattr(self, side).parts(tokenizer))
            if len(sample.answers) <= self.n_shared:
                raise InputError("no answer behind what both have in common")
        except InputError as error:
            raise InputError(f"{side}: {error}") from error
        return Sample(sample.name, sample.tokens, sample.answers[self.n_shared :])


def read(path: str | Path) -> records.Records:
    """The pairs of a file. Raises InputError naming file, record (from 1) and field."""
    container, found = records.entries(Path(path), FORMATS)
    if isinstance(found, str):
        raise InputError(f"{path} is plain text, not pairs; expected {records.expected(FORMATS)}")
    return records.parse(path, container, found, FORMATS)


def encode(
    tokenizer: Tokenizer, entries: Sequence[Preference], max_seq_len: int
) -> tuple[list[tuple[Sample, Sample]], list[str], list[str]]:
    """Chosen and rejected samples of at most max_seq_len tokens; records that were cut; those left out, and why."""
    pairs, cut, left_out = [], [], []
    for number, record in enumerate(entries, 1):
        name = f"record {number}"
        try:
            whole = [record.sample(name, side, tokenizer) for side in ("chosen", "rejected")]
            chosen, rejected = (samples.within(sample, max_seq_len) for sample in whole)
            if chosen.tokens == rejected.tokens:
                raise InputError("chosen and rejected are the same")
        except InputError as error:
            left_out.append(f"{name}: {str(error)[:100]}")
            continue
        if [chosen, rejected] != whole:
            cut.append(name)
        pairs.append((chosen, rejected))
    return pairs, cut, left_out


def _alpaca(where: str, entry: dict[str, Any], fields: tuple[str, ...]) -> Preference:
    instruction, chosen, rejected = (records.value_of(where, entry, name) for name in fields)
    input = "" if entry.get("input") is None else records.value_of(where, entry, "input")
    return Preference(*(alpaca.Record(instruction, input, answer) for answer in (chosen, rejected)))


def _answered(where: str, entry: dict[str, Any], fields: tuple[str, ...]) -> Preference:
    """A prompt, text or messages, with two answers."""
    prompt = fields[0]
    if all(isinstance(entry.get(name), str) for name in fields):
        return Preference(*(Pair(entry[prompt], records.value_of(where, entry, name)) for name in fields[1:]))
    if isinstance(entry.get(prompt), str):
        history = ({"role": "user", "content": records.value_of(where, entry, prompt)},)
    else:
        history = records.messages_of(where, entry, prompt)
    return _chats(where, *(_answer(where, entry, name) for name in fields[1:]), history)


def _whole_chats(where: str, entry: dict[str, Any], fields: tuple[str, ...]) -> Preference:
    return _chats(where, *(records.messages_of(where, entry, name) for name in fields))


def _answer(where: str, entry: dict[str, Any], name: str) -> tuple[Message, ...]:
    value = entry.get(name)
    if isinstance(value, (list, dict)):
        return records.messages_of(where, entry | {name: value if isinstance(value, list) else [value]}, name)
    return ({"role": "assistant", "content": records.value_of(where, entry, name)},)


def _chats(
    where: str, chosen: tuple[Message, ...], rejected: tuple[Message, ...], history: tuple[Message, ...] = ()
) -> Preference:
    """history: what stands before the answers, unless they begin with messages of their own."""
    whole = [messages if _begins(messages) else (*history, *messages) for messages in (chosen, rejected)]
    n_same = next((i for i, pair in enumerate(zip(*whole, strict=False)) if pair[0] != pair[1]), min(map(len, whole)))
    if not n_same:
        raise InputError(f"{where}: chosen and rejected do not begin with the same message; they answer one prompt")
    n_shared = sum(message["role"] == "assistant" for message in whole[0][:n_same])
    return Preference(*map(Chat, whole), n_shared)


def _begins(messages: tuple[Message, ...]) -> bool:
    return bool(messages) and messages[0]["role"] != "assistant"


FORMATS = {
    ("instruction", "chosen", "rejected"): _alpaca,
    ("prompt", "chosen", "rejected"): _answered,
    ("messages", "chosen", "rejected"): _answered,
    ("conversations", "chosen", "rejected"): _answered,
    ("chosen", "rejected"): _whole_chats,
}
