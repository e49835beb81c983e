"""Texts that end at the first of some strings, token by token: none of the string is shown, nor what may be its start.

stop = StopStrings(["###", "User:"])
for piece in pieces:
    print(stop.push(piece), end="")
    if stop.found:
        break
else:
    print(stop.flush(), end="")
"""

from __future__ import annotations

from collections.abc import Sequence

from llama.errors import InputError
from llama.tokenizer import StreamDecoder, Tokenizer


class StopStrings:
    """`found` is true once one of the strings has come. Raises InputError for an empty one."""

    def __init__(self, strings: Sequence[str]) -> None:
        if not all(strings):
            raise InputError("stop: a string to stop at must have at least one character")
        self.strings, self.found, self._held = tuple(strings), False, ""

    def push(self, piece: str) -> str:
        """The text that `piece` makes certain to stand before any of the strings."""
        if self.found:
            return ""
        text = self._held + piece
        starts = [start for string in self.strings if (start := text.find(string)) >= 0]
        self.found = bool(starts)
        end = min(starts) if starts else len(text) - self._possible(text)
        self._held = text[end:]
        return text[:end]

    def flush(self) -> str:
        """What was held back, where no string has come."""
        held, self._held = self._held, ""
        return "" if self.found else held

    def _possible(self, text: str) -> int:
        """Length of the longest end of `text` with which one of the strings may begin."""
        longest = max((len(string) - 1 for string in self.strings), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(string.startswith(text[-length:]) for string in self.strings):
                return length
        return 0


class TokenStop:
    """The same for tokens: `length` is how many there were when one of the strings was complete, None before."""

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]) -> None:
        self._decoder, self._stop = StreamDecoder(tokenizer), StopStrings(strings)
        self._n, self.length = 0, None

    def push(self, token: int) -> bool:
        """Whether one of the strings is complete."""
        self._n += 1
        self._stop.push(self._decoder.push(token))
        if self._stop.found and self.length is None:
            self.length = self._n
        return self._stop.found


def cut(text: str, strings: Sequence[str]) -> str:
    """A text up to the first of the strings."""
    stop = StopStrings(strings)
    return stop.push(text) + stop.flush()
