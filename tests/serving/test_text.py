"""Pieces are what a generation says: the same text, the same log-probabilities, and why it ended."""

from __future__ import annotations

import pytest
import torch

from llama.speculative import PromptLookup, Speculation
from llama.stops import cut
from serving.text import pieces

PROMPT = "Once upon a time, there was a little fox. The fox"


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 0.9, "top_p": 1.0, "seed": 3}], ids=str)
@pytest.mark.parametrize("draft", [None, PromptLookup()], ids=["plain", "draft"])
def test_they_are_the_tokens_and_log_probabilities_of_generate(tiny, settings, draft):
    ids = tiny.encode_prompt(PROMPT)
    settings = {**settings, "speculation": draft and Speculation(draft)}
    tokens, values = tiny.generate([ids], 40, logprobs=True, **settings)
    *found, last = pieces(tiny, ids, 40, top=3, **settings)
    assert [piece.token for piece in found] == tokens[0]
    assert [piece.logprob for piece in found] == pytest.approx(values[0], abs=1e-4)
    text = "".join(piece.text for piece in [*found, last])
    assert text == tiny.tokenizer.decode(tokens[0]) and found[-1].end == len(text) and last.token is None
    for piece in found:
        listed = [value for _, value in piece.likeliest]
        assert len(listed) == 3 and listed == sorted(listed, reverse=True) and piece.logprob <= listed[0] + 1e-6
        assert piece.seconds > 0
    if settings["temperature"] == 0:
        assert all(piece.token == piece.likeliest[0][0] for piece in found)


def test_why_a_text_ends(tiny):
    ids = tiny.encode_prompt(PROMPT)
    assert list(pieces(tiny, ids, 5, temperature=0))[-1].finish == "length"
    whole = "".join(piece.text for piece in pieces(tiny, ids, 400, temperature=0))
    found = list(pieces(tiny, ids, 400, temperature=0, stop=(whole[10:14],)))
    assert found[-1].finish == "stop" and "".join(piece.text for piece in found) == cut(whole, [whole[10:14]])
    chat = tiny.formatter.encode_dialog_prompt([{"role": "user", "content": "What do cows eat?"}])
    assert list(pieces(tiny, chat, 60, temperature=0))[-1].finish == "stop"
    assert [piece.finish for piece in pieces(tiny, ids, 0)] == ["length"]


@pytest.mark.parametrize("draft", [None, PromptLookup()], ids=["plain", "draft"])
def test_on_drawn_gets_the_logits_of_each_token(tiny, draft):
    """Those that the whole text has there."""
    ids, seen = tiny.encode_prompt(PROMPT), []
    settings = {"temperature": 0, "speculation": draft and Speculation(draft)}
    tokens = list(tiny.stream(ids, 30, on_drawn=lambda token, logits: seen.append((token, logits.clone())), **settings))
    assert [token for token, _ in seen][: len(tokens)] == tokens
    with torch.no_grad():
        logits = tiny.model(torch.tensor([ids + tokens]))[0, len(ids) - 1 : -1]
    assert torch.allclose(torch.stack([row for _, row in seen[: len(tokens)]]), logits, atol=1e-4)
