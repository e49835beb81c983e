"""Prompts from a file: one per line, a JSON list of strings, or records with a field for the prompt."""

from __future__ import annotations

from pathlib import Path

from data import records
from llama.errors import InputError

FIELDS = (("prompt",), ("instruction",), ("text",))


def read(path: Path) -> list[str]:
    """The prompts. Raises InputError for a file that cannot be read or holds none."""
    _, found = records.entries(path, FIELDS)
    if isinstance(found, str):
        return [line for line in found.replace("\r\n", "\n").split("\n") if line.strip()]
    prompts = []
    for number, entry in enumerate(found, 1):
        where = f"{path}:record {number}"
        if isinstance(entry, str):
            entry = {"prompt": entry}
        names = [name for (name,) in FIELDS if name in records.require_object(where, entry)]
        if not names:
            raise InputError(f"{where} has the fields {records.listed(entry)}; expected {records.expected(FIELDS)}")
        prompts.append(records.value_of(where, entry, names[0]))
    return prompts
