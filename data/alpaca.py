"""Stanford Alpaca's records as training samples: one template for training and inference, labels on the answer alone.

    {"instruction": "Name a colour.", "input": "", "output": "Blue."}

The prompt and the answer are tokenized apart. In one string the prompt's last ":" would melt into one token with the
first word of some answers (41 % of Alpaca's, with Llama 3's tokenizer): the model would learn from a prompt that it
never sees in use. Every answer ends with the end-of-text token, which is a label like the others: without it
a model does not learn to stop.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama import files
from llama.errors import InputError
from llama.tokenizer import Tokenizer

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
MAX_FILE_BYTES = 1 << 30
MAX_FIELD = 1 << 20  # characters


@dataclass(frozen=True)
class Record:
    """One task: what to do, the input to do it with (may be empty), and the answer."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class Sample:
    """A record as ids: `tokens` is prompt and answer, the first `n_prompt` of them the prompt; `name` says which."""

    name: str
    tokens: tuple[int, ...]
    n_prompt: int

    @property
    def n_labels(self) -> int:
        return len(self.tokens) - self.n_prompt


def read(path: str | Path) -> list[Record]:
    """The records of a JSON list, or of a .jsonl file with one object per line.

    Raises InputError naming file, record (from 1) and field. A missing `input` is an empty one.
    """
    path = Path(path)
    if path.is_file() and path.stat().st_size > MAX_FILE_BYTES:
        raise InputError(f"{path} is larger than {MAX_FILE_BYTES >> 30} GiB; split it")
    text = files.read_text(path)
    if path.suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        entries = [(f"{path}:line {number}", _parse(line, f"{path}:line {number}")) for number, line in lines]
    else:
        content = _parse(text, str(path))
        if not isinstance(content, list):
            raise InputError(f"{path} must hold a JSON list of records, one object each")
        entries = [(f"{path}:record {number}", entry) for number, entry in enumerate(content, 1)]
    if not entries:
        raise InputError(f"{path} holds no record")
    return [_record(where, entry) for where, entry in entries]


def _parse(text: str, where: str) -> object:
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        content = dict(pairs)
        if len(content) < len(pairs):
            raise InputError(f"{where}: a field stands twice in one object")
        return content

    try:
        return json.loads(text, object_pairs_hook=once)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON: {error}") from error


def _record(where: str, entry: object) -> Record:
    if not isinstance(entry, dict):
        raise InputError(f"{where} must be an object with instruction, input and output")
    values = {}
    for name in ("instruction", "input", "output"):
        value = entry.get(name, "" if name == "input" else None)
        if not isinstance(value, str):
            raise InputError(f"{where}:{name}: {'is missing' if name not in entry else 'must be a text'}")
        if len(value) > MAX_FIELD:
            raise InputError(f"{where}:{name}: has {len(value):,} characters, more than {MAX_FIELD:,}")
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise InputError(f"{where}:{name}: holds half of a surrogate pair; it is not Unicode text")
        values[name] = value
    if not values["instruction"].strip():
        raise InputError(f"{where}:instruction: is empty")
    return Record(**values)


def prompt(instruction: str, input: str = "") -> str:
    """What the model is given, in training and in use; it ends with "### Response:"."""
    template = WITH_INPUT if input.strip() else WITHOUT_INPUT
    return template.format(instruction=instruction, input=input)


def encode_prompt(tokenizer: Tokenizer, instruction: str, input: str = "") -> list[int]:
    """Begin-of-text and the ids of the prompt."""
    return tokenizer.encode(prompt(instruction, input), bos=True, eos=False)


def encode(
    tokenizer: Tokenizer, records: Sequence[Record], max_seq_len: int, first: int = 1
) -> tuple[list[Sample], list[str], list[str]]:
    """Samples of at most max_seq_len tokens; and the names of those that were cut, and of those left out.

    A cut answer loses its end, end-of-text included, so that it does not teach to stop there. A record without an
    answer (Alpaca has some), or without room for one, is left out. Samples are called "record N" with N from `first`.
    """
    samples, cut, left_out = [], [], []
    for number, record in enumerate(records, first):
        name = f"record {number}"
        question = encode_prompt(tokenizer, record.instruction, record.input)
        answer = tokenizer.encode(record.output, bos=False, eos=True, continues=True)
        if len(question) >= max_seq_len or not record.output.strip():
            left_out.append(name)
            continue
        if len(question) + len(answer) > max_seq_len:
            cut.append(name)
        tokens = (question + answer)[:max_seq_len]
        samples.append(Sample(name, tuple(tokens), len(question)))
    return samples, cut, left_out


def show(sample: Sample, tokenizer: Tokenizer) -> Iterator[str]:
    """Lines that show a sample token by token: prompt first, then the trained tokens, each in brackets."""
    question, answer = sample.tokens[: sample.n_prompt], sample.tokens[sample.n_prompt :]
    yield f"{sample.name}: {sample.n_prompt} tokens of prompt, {sample.n_labels} trained (in brackets)"
    yield tokenizer.decode(list(question))
    pieces = [tokenizer.token_bytes(token).decode("utf-8", errors="replace") for token in answer[:-1]]
    last = answer[-1]
    pieces.append("<end of text>" if last == tokenizer.eos_id else tokenizer.decode([last]))
    yield "".join(f"[{piece}]" for piece in pieces)
