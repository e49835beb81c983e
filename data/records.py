"""The records of a data file, which is read by what it holds, whatever it is called.

    {"instruction": "Name a colour.", "input": "", "output": "Blue."}                               Alpaca
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}    a chat
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}        a chat, ShareGPT's
    {"prompt": "2 + 2 =", "completion": " 4"}                                                       or "response"
    {"text": "All of it is trained."}

in a JSON list, in JSON lines, or (chats apart) in CSV with a header row. A file that is none of these is plain text.
The first record says which fields all of them have; other fields are not used, and named.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from data import alpaca
from data.samples import Parts
from llama import files
from llama.errors import InputError
from llama.tokenizer import ChatFormat, Message, Tokenizer

MAX_FILE_BYTES = 1 << 30
MAX_FIELD = 1 << 20  # characters
MAX_HEADER = 1 << 16
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
JSON_START = re.compile(r'\s*(\{\s*["}]|\[\s*(["\[\]{]|\Z))')  # prose may begin with a bracket, too
SPACE = re.compile(r"[ \t\n\r]*")
EXCEL_HINT = re.compile(r"\Asep=[,;\t]\r?\n")  # for Excel alone, above the header
FIRST_LINE = re.compile(r"\s*([^\r\n]*)")
SURROGATE = re.compile("[\ud800-\udfff]")
TABLES = (".csv", ".tsv")
NAMED = (*TABLES, ".json", ".jsonl", ".ndjson")  # a file that is called so is not plain text
NOT_TEXT = {  # by its first bytes
    b"PAR1": "a Parquet file; save it as JSON lines, with pandas: .to_json(FILE, orient='records', lines=True)",
    b"PK\x03\x04": "a zip archive, as .xlsx files are; unpack it, or save the table as CSV",
    b"\x1f\x8b": "compressed by gzip; unpack it",
    b"version https://git-lfs": "a git-LFS pointer, not the data; `git lfs pull` fetches that",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
}


@dataclass(frozen=True)
class Chat:
    """A dialog; what the assistant says is trained, its end tokens included."""

    kind: ClassVar[str] = "chats"
    messages: tuple[Message, ...]

    def parts(self, tokenizer: Tokenizer) -> Parts:
        """In the chat format of the vocabulary. Raises InputError for what is no dialog, or has an empty answer."""
        messages = [message for message in self.messages if message["role"] != "system" or message["content"].strip()]
        if any(message["role"] == "assistant" and not message["content"].strip() for message in messages):
            raise InputError("an answer is empty")
        return ChatFormat(tokenizer).encode_dialog(messages)

    @staticmethod
    def ask(tokenizer: Tokenizer, question: str) -> list[int]:
        """A question to a model that was trained on chats."""
        return ChatFormat(tokenizer).encode_dialog_prompt([{"role": "user", "content": question}])


@dataclass(frozen=True)
class Pair:
    """A prompt and what follows it, both as they are, without a template."""

    kind: ClassVar[str] = "prompts and completions"
    prompt: str
    completion: str

    def parts(self, tokenizer: Tokenizer) -> Parts:
        """Raises InputError where there is nothing to train on."""
        if not self.completion.strip():
            raise InputError("no completion")
        return [
            (self.ask(tokenizer, self.prompt), False),
            (tokenizer.encode(self.completion, bos=False, eos=True, continues=True), True),
        ]

    @staticmethod
    def ask(tokenizer: Tokenizer, question: str) -> list[int]:
        """A prompt for a model that was trained on pairs."""
        return tokenizer.encode(question, bos=True, eos=False)


@dataclass(frozen=True)
class Text:
    """A text of which every token is trained, in blocks: data/text.py. has_end: it ends where the record does."""

    kind: ClassVar[str] = "texts"
    text: str
    has_end: bool = True


Record = alpaca.Record | Chat | Pair | Text


@dataclass(frozen=True)
class Records:
    """Records of one kind; what they are, and in which format; fields that some of them have and that are not used."""

    what: str
    records: list[Record]
    unused: tuple[str, ...] = ()


def read(path: str | Path) -> Records:
    """The records of a file; plain text is one. Raises InputError naming file, record (from 1) and field."""
    container, found = entries(Path(path), FORMATS)
    if isinstance(found, str):
        return Records(container, [Text(found, has_end=False)])
    return parse(path, container, found, FORMATS)


def parse(path: str | Path, container: str, found: list[Any], formats: dict[tuple[str, ...], Callable]) -> Records:
    """Entries of a file as records of the format whose fields the first one has."""
    first = require_object(f"{path}:record 1", found[0])
    fields = next((fields for fields in formats if set(fields) <= set(first)), None)
    if fields is None:
        hint = "; pairs are trained on with objective=dpo" if {"chosen", "rejected"} <= set(first) else ""
        raise InputError(f"{path}:record 1 has the fields {listed(first)}; expected {expected(formats)}{hint}")
    records, unused = [], set()
    for number, entry in enumerate(found, 1):
        where = f"{path}:record {number}"
        records.append(formats[fields](where, require_object(where, entry), fields))
        unused |= entry.keys() - {*fields, "input"}
        for turn in entry[fields[0]] if isinstance(entry[fields[0]], list) else ():
            unused |= {f"{fields[0]}.{name}" for name in turn.keys() - {"role", "content", "from", "value"}}
    return Records(f"{len(records):,} {records[0].kind} ({container})", records, tuple(sorted(unused)))


def entries(path: Path, known: Iterable[tuple[str, ...]]) -> tuple[str, list[Any] | str]:
    """The format of a file and its records, at least one, not checked yet; of plain text the text.

    known: sets of fields; the header of a CSV file holds one of them.
    """
    text = read_text(path)
    if JSON_START.match(text):
        container, found = _json_entries(path, text)
    else:
        text = EXCEL_HINT.sub("", text)
        first_line = FIRST_LINE.match(text)[1]
        for delimiter in ",;\t":
            first_row = next(csv.reader([first_line[:MAX_HEADER]], delimiter=delimiter, skipinitialspace=True))
            header = [name.strip() for name in first_row]
            fields = max((fields for fields in known if set(fields) <= set(header)), key=len, default=())
            # One such word in a first line may be prose; a first line of one word is a table only by its name.
            is_prose = len(header) == 1 or (len(fields) == 1 and any(" " in name for name in header))
            if fields and (path.suffix.lower() in TABLES or not is_prose):
                container, found = "CSV", _rows(path, text, delimiter, header, f"{delimiter} " in first_line)
                break
        else:
            if path.suffix.lower() in NAMED:
                reason = f"begins with {first_line[:40]!r}; expected JSON, or a CSV header, with {expected(known)}"
                raise InputError(f"{path} {reason}")
            return "plain text", text
    if not found:
        raise InputError(f"{path} holds no record")
    return container, found


def read_text(path: Path) -> str:
    """The text of a file, line ends as they are. Raises InputError for what is none, with what to do about it."""
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in (*NAMED, ".txt"))
        raise InputError(f"cannot read {path}: it is a directory; pass a file{f' of {listed(names)}' * bool(names)}")
    if path.exists():
        if not path.is_file():
            raise InputError(f"cannot read {path}: it is not a regular file")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"{path} is larger than {MAX_FILE_BYTES >> 30} GiB; split it")
        with path.open("rb") as file:
            start = file.read(64)
        for magic, what in NOT_TEXT.items():
            if start.startswith(magic):
                raise InputError(f"{path} is {what}")
    text = files.read_text(path, newline="")
    if "\0" in text:
        raise InputError(f"{path} holds NUL characters: it is binary, or UTF-16; save it as UTF-8 text")
    if not text.strip():
        raise InputError(f"{path} is empty; there is nothing to read")
    return text


class _Repeated(str):
    """Stands for an object in which this field stands twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Repeated:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            return _Repeated(name)
        content[name] = value
    return content


def _json_entries(path: Path, text: str) -> tuple[str, list[Any]]:
    """A list, or objects one after another, each on a line or spread over several."""
    decoder, found, at = json.JSONDecoder(object_pairs_hook=_once), [], SPACE.match(text).end()
    try:
        while at < len(text):
            entry, at = decoder.raw_decode(text, at)
            found.append(entry)
            at = SPACE.match(text, at).end()
    except (ValueError, RecursionError) as error:
        behind = f" behind record {len(found)}" if found else ""
        raise InputError(f"{path} is not valid JSON{behind}: {error}") from error
    if not isinstance(found[0], list):
        return "JSON lines", found
    if len(found) > 1:
        raise InputError(f"{path} is not valid JSON: something follows the list")
    return "JSON", found[0]


def _rows(path: Path, text: str, delimiter: str, header: list[str], is_spaced: bool) -> list[dict[str, str]]:
    """The rows of a CSV file, below its header. is_spaced: spaces behind a delimiter are no part of a field."""
    names = [name for name in header if name]  # Excel writes columns that were used once, without a name
    if len(set(names)) < len(names):
        raise InputError(f"{path}: a column stands twice in the header: {listed(header)}")
    usual, found = csv.field_size_limit(len(text)), []  # the limit of the module, for all its readers
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=is_spaced)
        for row in filter(any, rows):
            if len(row) != len(header):
                reason = f"has {len(row)} fields, the header {len(header)}; quote a field that holds {delimiter!r}"
                raise InputError(f"{path}:record {len(found)}: {reason}")
            found.append(dict(zip(header, row, strict=True)))
    except csv.Error as error:
        raise InputError(f"{path}:record {len(found)}: is not valid CSV ({error}); check its quotes") from error
    finally:
        csv.field_size_limit(usual)
    return found[1:]


def require_object(where: str, entry: Any) -> dict[str, Any]:
    """The entry, where it is an object. Raises InputError."""
    if isinstance(entry, _Repeated):
        raise InputError(f"{where}:{entry[:40]}: stands twice in one object")
    if not isinstance(entry, dict):
        raise InputError(f"{where} must be an object with fields, not {type(entry).__name__}")
    return entry


def value_of(where: str, entry: dict[str, Any], name: str, kind: type = str, limit: int = MAX_FIELD) -> Any:
    """A field, a text or a list. Raises InputError naming it."""
    value = entry.get(name)
    if not isinstance(value, kind) or isinstance(value, _Repeated):
        wrong = f"must be a {'text' if kind is str else 'list'}, not {type(value).__name__}"
        raise InputError(f"{where}:{name}: {wrong if name in entry else f'is missing, beside {listed(entry)}'}")
    if len(value) > limit:
        raise InputError(f"{where}:{name}: has {len(value):,} characters, more than {limit:,}")
    if kind is str and SURROGATE.search(value):
        raise InputError(f"{where}:{name}: holds half of a surrogate pair; it is not Unicode text")
    return value


def listed(names: Iterable[str]) -> str:
    """The first of the names that a file has."""
    names = [name[:40] or "(no name)" for name in names]
    return ", ".join(names[:8]) + ", ..." * (len(names) > 8)


def expected(known: Iterable[tuple[str, ...]]) -> str:
    """Sets of fields in words."""
    return ", or ".join(" and ".join(fields) for fields in known)


def _alpaca(where: str, entry: dict[str, Any], fields: tuple[str, ...]) -> alpaca.Record:
    """Where the instruction is empty, the input is one."""
    instruction, output = (value_of(where, entry, name) for name in fields)
    input = "" if entry.get("input") is None else value_of(where, entry, "input")
    return alpaca.Record(instruction, input, output) if instruction.strip() else alpaca.Record(input, "", output)


def messages_of(where: str, entry: dict[str, Any], field: str) -> tuple[Message, ...]:
    """A field that is a list of messages. Raises InputError naming it."""
    messages: list[Message] = []
    for number, turn in enumerate(value_of(where, entry, field, list), 1):
        place = f"{where}:{field} {number}"
        names = ("from", "value") if "from" in require_object(place, turn) else ("role", "content")
        role, content = (value_of(place, turn, name) for name in names)
        if role not in ROLES:
            raise InputError(f"{place}:{names[0]}: is {role[:40]!r}; expected {', '.join(ROLES)}")
        messages.append({"role": ROLES[role], "content": content})
    return tuple(messages)


def _chat(where: str, entry: dict[str, Any], fields: tuple[str, ...]) -> Chat:
    return Chat(messages_of(where, entry, fields[0]))


def _pair(where: str, entry: dict[str, Any], fields: tuple[str, ...]) -> Pair:
    return Pair(*(value_of(where, entry, name) for name in fields))


def _text(where: str, entry: dict[str, Any], fields: tuple[str, ...]) -> Text:
    return Text(value_of(where, entry, fields[0], limit=MAX_FILE_BYTES))


FORMATS = {
    ("instruction", "output"): _alpaca,
    ("messages",): _chat,
    ("conversations",): _chat,
    ("prompt", "completion"): _pair,
    ("prompt", "response"): _pair,
    ("text",): _text,
}
