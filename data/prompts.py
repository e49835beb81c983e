"""Prompts from a file: one per line, or a JSON list of strings."""

from __future__ import annotations

import json
from pathlib import Path

from llama import files
from llama.errors import InputError


def read(path: Path) -> list[str]:
    """The prompts; a .json file holds a list. Raises InputError for a file that cannot be read or holds none."""
    content = files.read_text(path)
    try:
        prompts = json.loads(content) if path.suffix == ".json" else content.split("\n")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts):
        raise InputError(f"{path} must hold a JSON list of strings")
    if path.suffix != ".json":
        prompts = [line for line in prompts if line.strip()]
    if not prompts:
        raise InputError(f"{path} holds no prompt")
    return prompts
