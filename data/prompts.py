"""Sample prompts, and prompts from a file: one per line, a JSON list, or records with a field for the prompt."""

from __future__ import annotations

from pathlib import Path

from data import records
from llama.errors import InputError

FIELDS = (("prompt",), ("instruction",), ("text",))
COURSE_PROMPTS = (  # of the course's kinds: a continuation, a definition, a message, a translation; and one of ours
    "The most important thing that travelling teaches you is",
    "In simple words, photosynthesis is the process in which",
    "A short message to thank the team after the launch:\n\nHi everyone,\n\nI just wanted to",
    "Translate English to French:\n\nthank you => merci\ngood night => bonne nuit\nthe red house => la maison rouge\n"
    "cheese =>",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
)


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
