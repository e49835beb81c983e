"""The distribution that tokens are drawn from, and that they are drawn from it."""

from __future__ import annotations

import pytest
import torch
import transformers

from llama import sampling
from llama.sampling import Sampling, draw, logits_to_probs, next_token, penalize


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_plain_softmax():
    x = logits(4, 50)
    torch.testing.assert_close(logits_to_probs(x), x.softmax(-1))
    torch.testing.assert_close(logits_to_probs(x, temperature=0.5), (2 * x).softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temperature_zero_is_exactly_one_hot(dtype):
    x = logits(8, 50).to(dtype)
    x[0] = 0.0  # all equal: still one token
    for options in ({}, {"top_p": 0.1}, {"top_k": 3}):
        probs = logits_to_probs(x, temperature=0, **options)
        assert torch.equal(probs.sum(-1), torch.ones(8)) and set(probs.unique().tolist()) == {0.0, 1.0}
        assert torch.equal(probs.argmax(-1), x.argmax(-1))
        assert torch.equal(draw(probs), next_token(x, Sampling(temperature=0)))


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 100.0])
def test_extreme_temperatures_stay_distributions(temperature):
    probs = logits_to_probs(1e4 * logits(5, 30), temperature)
    assert probs.isfinite().all()
    torch.testing.assert_close(probs.sum(-1), torch.ones(5))


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999])
def test_nucleus_is_the_smallest_set_that_reaches_top_p(top_p):
    full, cut = logits_to_probs(logits(20, 40)), logits_to_probs(logits(20, 40), top_p=top_p)
    for before, after in zip(full, cut, strict=True):
        kept = after > 0
        assert kept.any() and before[kept].min() >= before[~kept].max()
        assert before[kept].sum() >= top_p - 1e-5
        assert before[kept].sum() - before[kept].min() < top_p + 1e-5  # one fewer would not reach it
        torch.testing.assert_close(after[kept], before[kept] / before[kept].sum())


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_the_nucleus_is_the_same_found_among_a_few_or_all(monkeypatch, top_p):
    """Whether the few reach it or not, in some rows or all, and beside what is no number."""
    x = logits(3, 20, 40)
    x[0, 1, 2] = float("nan")
    found = []
    for head in (40, 20, 3):
        monkeypatch.setattr(sampling, "HEAD", head)
        found += [logits_to_probs(x, top_p=top_p), logits_to_probs(x[1:, :1], top_k=5, top_p=top_p)]
    for other in found[2:]:
        torch.testing.assert_close(other, found[len(other) == 2], rtol=0, atol=0, equal_nan=True)


def test_top_k_then_top_p():
    x = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    torch.testing.assert_close(logits_to_probs(x, top_k=2), torch.tensor([[4 / 7, 3 / 7, 0.0, 0.0]]))
    torch.testing.assert_close(logits_to_probs(x, top_k=1), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(logits_to_probs(x, top_k=99), x.exp())
    # the nucleus is taken of what top_k left: 4/7 alone reaches 0.5 of it
    torch.testing.assert_close(logits_to_probs(x, top_k=2, top_p=0.5), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))


def test_min_p_and_the_repetition_penalty_are_those_of_transformers():
    x, ids = logits(20, 40, seed=1), torch.randint(40, (20, 12), generator=torch.Generator().manual_seed(2))
    for min_p in (0.02, 0.1, 0.5, 1.0):
        theirs = transformers.MinPLogitsWarper(min_p=min_p)(ids, x / 0.7).softmax(-1)
        torch.testing.assert_close(logits_to_probs(x, temperature=0.7, min_p=min_p), theirs)
    theirs = transformers.TopPLogitsWarper(0.9)(ids, transformers.TopKLogitsWarper(9)(ids, x))
    theirs = transformers.MinPLogitsWarper(min_p=0.2)(ids, theirs).softmax(-1)
    torch.testing.assert_close(logits_to_probs(x, top_k=9, top_p=0.9, min_p=0.2), theirs)
    seen = torch.zeros(20, 40, dtype=torch.bool).scatter_(1, ids, True)
    for penalty in (0.5, 1.3, 10.0):
        theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids, x.clone())
        torch.testing.assert_close(penalize(x, seen, penalty), theirs)


def test_draw_has_the_right_distribution():
    """Chi-square over 100,000 draws; 15 degrees of freedom, p = 0.001 at 37.7."""
    probs = logits_to_probs(logits(16), temperature=1.5)
    generator = torch.Generator().manual_seed(0)
    counts = draw(probs.expand(100_000, 16), generator).bincount(minlength=16)
    expected = 100_000 * probs
    assert ((counts - expected) ** 2 / expected).sum() < 37.7
    assert counts[probs == 0].sum() == 0


def test_zero_probability_is_never_drawn():
    probs = torch.tensor([0.0, 1.0, 0.0]).expand(50_000, 3)
    assert (draw(probs, torch.Generator().manual_seed(0)) == 1).all()


def test_the_next_token_is_drawn_with_all_settings_from_the_words_alone():
    x = logits(40)
    settings = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.02}
    drawn = set()
    for seed in range(200):
        first, second = (torch.Generator().manual_seed(seed) for _ in range(2))
        token = next_token(x, Sampling(**settings, generator=first, n_words=30))
        assert token == draw(logits_to_probs(x[..., :30], *settings.values()), second)
        drawn.add(token.item())
    assert 1 < len(drawn) <= 5 and max(drawn) < 30
    plain = Sampling(generator=torch.Generator().manual_seed(0))  # temperature 1 draws, too
    assert len({next_token(torch.zeros(40), plain).item() for _ in range(20)}) > 1
    assert next_token(torch.arange(40.0), Sampling(temperature=0, n_words=30)) == 29
