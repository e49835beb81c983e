"""A generation piece by piece: the text of each token, what it was drawn from, and how long its step took."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llama import Llama
from llama.stops import StopStrings
from llama.tokenizer import StreamDecoder


@dataclass(frozen=True)
class Piece:
    """One token; the last piece has none, but says why the text ends.

    text: the characters that are certain with it: none while a character is unfinished, or while they may belong to a
    stop string. end: how many characters the whole text has with it, were there no stop strings. logprob: of the token
    under the model, before temperature and cuts. likeliest: tokens with theirs, in falling order. seconds: of its step.
    """

    token: int | None
    text: str
    end: int = 0
    seconds: float = 0.0
    logprob: float | None = None
    likeliest: Sequence[tuple[int, float]] = ()
    finish: str | None = None  # "stop": a stop token or string; "length": a limit


def pieces(
    llama: Llama, ids: Sequence[int], max_gen_len: int, top: int | None = None, **settings: Any
) -> Iterator[Piece]:
    """Continue a prompt. top: with the log-probabilities of so many tokens; None: none. settings: of `Llama.stream`."""
    decoder, stop, drawn = StreamDecoder(llama.tokenizer), StopStrings(settings.get("stop", ())), deque()

    def keep(token: int, logits_V: Tensor) -> None:
        values = logits_V[: llama.n_words].float().log_softmax(-1)
        found = values.topk(min(top, llama.n_words))
        likeliest = list(zip(found.indices.tolist(), found.values.tolist(), strict=True))
        drawn.append((values[token].item(), likeliest))

    n, end, began = 0, 0, time.perf_counter()
    for token in llama.stream(ids, max_gen_len, on_drawn=None if top is None else keep, **settings):
        n += 1
        text = decoder.push(token)
        end += len(text)
        yield Piece(token, stop.push(text), end, time.perf_counter() - began, *(drawn.popleft() if drawn else ()))
        began = time.perf_counter()
    rest = stop.push(decoder.flush()) + stop.flush()
    is_full = n == min(max_gen_len, llama.max_seq_len - len(ids)) and not stop.found
    yield Piece(None, rest, finish="length" if is_full else "stop")
