"""Speculative decoding: at temperature 0 the target's own tokens for any draft, above it the target's distribution."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from contextlib import contextmanager

import pytest
import torch
from conftest import TINY, random_model
from torch import nn

from data.tiny.corpus import SAMPLE_PROMPTS
from llama import KVCache, Llama, ModelArgs, Transformer, checkpoint
from llama.decoding import Decoder
from llama.errors import InputError, NonFinite
from llama.kernels.cpu import decode_step
from llama.quantization import Quantization, quantized_copy
from llama.sampling import Sampling, draw, logits_to_probs
from llama.speculative import (
    MOST_DRAFT_TOKENS,
    PROBE_EVERY,
    DraftLength,
    ModelDraft,
    PromptLookup,
    Proposal,
    Speculation,
    expected_tokens,
    is_form_of,
    verify,
)

ARGS = ModelArgs(dim=32, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=64, multiple_of=16)
NEW = 24  # tokens generated where a test does not say
PROMPT = [1, 2, 3]


def small(seed: int = 0, args: ModelArgs = ARGS) -> Transformer:
    """In fp64, where rounding cannot decide between two candidates: a step of 9 tokens adds up in another order."""
    model = random_model(args, seed, std=0.3).double()
    model.norm.weight.data += seed / 100  # by which two models are told from two forms of one
    return model


def rounded_form(model: Transformer) -> Transformer:
    """The same norms, and matrices of few bits: agrees with the model about as often as not."""
    form = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in form.named_parameters():
            if not name.endswith("norm.weight"):
                weight.copy_((weight * 8).round() / 8)
    return form


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama(small(), None, max_seq_len=200, max_batch_size=1000)


def ragged_prompts(n: int, longest: int = 60, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    lengths = [1, longest, *(rng.randint(1, longest) for _ in range(n - 2))]
    return [[rng.randrange(ARGS.vocab_size) for _ in range(length)] for length in lengths]


class Scripted:
    """A draft that knows what the target will say, and proposes `right` such tokens and then wrong ones."""

    def __init__(self, answers: list[list[int]], prompts: list[list[int]], right: int) -> None:
        self.right, self.calls = right, 0
        self.texts = [[*prompt, *answer, *[0] * 9] for prompt, answer in zip(prompts, answers, strict=True)]

    def check(self, target, n_words):
        pass

    def cost(self, target):
        return 0.0

    @contextmanager
    def start(self, prompts, max_len, sampling, target=None):
        assert [text[: len(prompt)] for text, prompt in zip(self.texts, prompts, strict=True)] == list(prompts)

        def propose(texts, limits):
            self.calls += 1
            rows = []
            for text, known in zip(texts, self.texts, strict=True):
                ahead = known[len(text) : len(text) + max(limits)]
                wrong = [(token + 1) % ARGS.vocab_size for token in ahead]
                rows.append(ahead[: self.right] + wrong[self.right :])
            return Proposal([row[:limit] for row, limit in zip(rows, limits, strict=True)], None)

        yield propose


def drafts(llama: Llama, prompts: list[list[int]], answers: list[list[int]]) -> dict:
    return {
        "itself": ModelDraft(llama.model),
        "a form of itself": ModelDraft(rounded_form(llama.model)),
        "another": ModelDraft(small(seed=1)),
        "always wrong": Scripted(answers, prompts, right=0),
        "lookup": PromptLookup(),
    }


def check_greedy(llama: Llama, n_prompts: int, name: str, seed: int) -> None:
    """Plain tokens for prompts one by one and four at a time, k from 1 to 8 and chosen, budgets that end in a round."""
    prompts = ragged_prompts(n_prompts, seed=seed)
    answers = llama.generate(prompts, 18, 0)[0]
    start, sizes, lengths = 0, (4, 1), (*range(1, 9), None)
    for number in range(n_prompts):
        part = slice(start, start + sizes[number % 2])
        if not prompts[part]:
            break
        max_gen_len = 18 - number % 5
        draft = drafts(llama, prompts[part], answers[part])[name]
        speculation = Speculation(draft, lengths[number // 2 % len(lengths)])
        drawn = llama.generate(prompts[part], max_gen_len, 0, speculation=speculation)[0]
        assert drawn == [answer[:max_gen_len] for answer in answers[part]], (number, speculation.draft_tokens)
        assert speculation.counts.proposed > 0 or name == "lookup" or speculation.draft_tokens is None
        start = part.stop
    assert start >= n_prompts


NAMES = ["itself", "a form of itself", "another", "always wrong", "lookup"]


@pytest.mark.parametrize("name", NAMES)
def test_greedy_equals_plain_for_any_draft(llama, name):
    check_greedy(llama, 45, name, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_greedy_equals_plain_for_any_draft_over_a_thousand_prompts(llama, name):
    check_greedy(llama, 1000, name, seed=1)


@pytest.mark.parametrize("name", ["draft", "lookup"])
def test_greedy_equals_plain_in_fp32_on_the_embedded_model(tiny, name):
    """A draft that was trained for its target, on the prompts that it ships with."""
    prompts = [tiny.encode_prompt(prompt) for prompt in SAMPLE_PROMPTS]
    one = PromptLookup() if name == "lookup" else ModelDraft(checkpoint.load(TINY / "draft", torch.float32))
    plain = tiny.generate(prompts, 40, 0)
    for k in (None, 4):
        speculation = Speculation(one, k)
        assert tiny.generate(prompts, 40, 0, speculation=speculation) == plain
        assert speculation.counts.accepted > 20


needs_kernel = pytest.mark.skipif(decode_step.library() is None, reason="no CPU with AVX-512 and a C compiler at hand")


@needs_kernel
def test_greedy_equals_plain_in_bfloat16_on_the_native_step(monkeypatch):
    """One row or several, one token or several: the same bits, so the same tokens."""
    widths = []
    step = decode_step.NativeStep.__call__
    monkeypatch.setattr(
        decode_step.NativeStep, "__call__", lambda self, *a: widths.append(a[0].shape[1]) or step(self, *a)
    )
    target = Llama.build(TINY, TINY / "tokenizer.model", 256, 8, device="cpu", dtype="bfloat16")
    prompts = [target.encode_prompt(text) for text in ("The little fox", "Question: What do cows eat?\nAnswer:")]
    plain = target.generate(prompts, 40, 0)[0]
    assert set(widths) == {1}
    for draft in (ModelDraft(target.model), PromptLookup()):
        assert target.generate(prompts, 40, 0, speculation=Speculation(draft, 4))[0] == plain
    assert max(widths) == 5


@pytest.mark.parametrize("right", [0, 1, 3])
@pytest.mark.parametrize("k", [1, 4, 8])
def test_counts_are_right_for_known_drafts(llama, k, right):
    """A row of 1 + 24 tokens: each round yields min(right, k) + 1 of them, the last round what is left."""
    answers = llama.generate([PROMPT], 25, 0)[0]
    speculation = Speculation(draft := Scripted(answers, [PROMPT], right), k)
    assert llama.generate([PROMPT], 25, 0, speculation=speculation)[0] == answers
    rounds = proposed = accepted = rejected = 0
    left = 24
    while left:
        n = min(k, left - 1)
        rounds, proposed, accepted = rounds + 1, proposed + n, accepted + min(right, n)
        rejected += right < n
        left -= min(right, n) + 1
    counts = speculation.counts
    assert (counts.rounds, counts.proposed, counts.accepted) == (rounds, proposed, accepted)
    assert counts.rejected == rejected and draft.calls in (rounds, rounds - 1)
    assert counts.tokens_per_round == 24 / rounds
    assert counts.acceptance == accepted / (accepted + rejected)
    assert counts.pays == (right > 0)


def test_tokens_behind_a_stop_token_do_not_count(llama):
    """Rounds of 1 + 3 tokens after the first token: what a plain run would have taken a step for, and no more."""
    answers = llama.generate([PROMPT], 25, 0, stop_tokens=[])[0]
    places = [i for i in range(1, 17) if answers[0][i] not in answers[0][:i]]
    assert {(i - 1) % 4 for i in places} == {0, 1, 2, 3}  # in every place of a round
    for place in places:
        speculation = Speculation(Scripted(answers, [PROMPT], right=3), 3)
        kept = llama.generate([PROMPT], 25, 0, stop_tokens=[answers[0][place]], speculation=speculation)[0]
        counts = speculation.counts
        assert kept == [answers[0][:place]] and counts.rounds == (place + 3) // 4
        assert counts.rounds + counts.accepted == place and counts.tokens_per_round == place / counts.rounds


def test_a_lookup_that_could_find_nothing_is_refused():
    for sizes in ((1, 2), (2, 0)):
        with pytest.raises(InputError, match="expected 1 <= min_ngram <= max_ngram"):
            PromptLookup(*sizes)


@pytest.mark.parametrize(
    ("sizes", "text", "proposed"),
    [
        ((3, 1), [1, 2, 3, 4, 9, 4], [9, 4, 9]),  # one token is enough; past its end the text goes on as drafted
        ((3, 2), [1, 2, 3, 4, 9, 4], []),
        ((3, 2), [5, 6, 1, 8, 7, 6, 1, 8, 5, 6, 1, 2, 6, 1], [2, 6, 1]),  # of equally long matches the latest
        ((3, 2), [5, 6, 1, 8, 7, 6, 1, 9, 0, 5, 6, 1], [8, 7, 6]),  # a longer match counts more than a later one
        ((1, 1), [7, 7], [7, 7, 7]),
    ],
)
def test_what_a_lookup_proposes(sizes, text, proposed):
    draft = PromptLookup(*sizes)
    with draft.start([text], 99, Sampling()) as propose:
        assert propose([text], [3]).tokens == [proposed]
    with draft.start([text[:2]], 99, Sampling()) as propose:  # token by token, as a text grows
        for end in range(2, len(text)):
            propose([text[:end]], [3])
        assert propose([text], [3]).tokens == [proposed] and propose([text], [0]).tokens == [[]]


def test_itself_is_always_accepted_also_after_pauses(llama, monkeypatch):
    """Every k in turn, 0 for rounds in which the draft falls behind; sampled too, where p = q accepts everything."""
    pattern = [3, 0, 0, 5, 0, 1, 8, 0, 0, 0, 0, 2, 2]
    monkeypatch.setattr(DraftLength, "next", lambda self: pattern[self.cursor.pop(0)])
    monkeypatch.setattr(DraftLength, "cursor", [], raising=False)
    prompts = ragged_prompts(4, 30)
    for temperature in (0, 1.0):
        DraftLength.cursor[:] = [i % len(pattern) for i in range(100)]
        speculation = Speculation(ModelDraft(llama.model))
        drawn = llama.generate(prompts, 60, temperature, 0.95, seed=0, speculation=speculation)[0]
        assert speculation.counts.accepted == speculation.counts.proposed > 80 and speculation.counts.rejected == 0
        assert temperature or drawn == llama.generate(prompts, 60, 0)[0]


def test_the_draft_is_in_step_after_any_round(llama, monkeypatch):
    """What it proposes is what it would write after the text so far: after rejections, and after pauses."""
    pattern = [3, 0, 0, 5, 4, 0, 1, 8, 2, 0, 0, 0, 0] * 20
    monkeypatch.setattr(DraftLength, "next", lambda self: pattern.pop(0))
    similar = small()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in similar.parameters():  # agrees with the target about as often as not
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.05)
    alone = Llama(similar, None, max_seq_len=200)
    checked = []

    class Checked(ModelDraft):
        @contextmanager
        def start(self, *args):
            def check(texts, limits):
                proposal = propose(texts, limits)
                expected = alone.generate(texts, max(limits), 0)[0]
                assert [row[:limit] for row, limit in zip(expected, limits, strict=True)] == proposal.tokens
                checked.append(limits)
                return proposal

            with super().start(*args) as propose:
                yield check

    speculation = Speculation(Checked(similar))
    prompts = ragged_prompts(4, 30)
    assert llama.generate(prompts, 60, 0, speculation=speculation) == llama.generate(prompts, 60, 0)
    assert len(checked) > 8 and 0.2 < speculation.counts.acceptance < 0.9


@pytest.mark.parametrize("right", [0, 2, 9])
def test_after_rollback_the_caches_hold_the_accepted_text_and_nothing_else_counts(llama, monkeypatch, right):
    """What a plain prefill of the final text writes, wherever a token was accepted; no slot beyond the end."""
    caches, highest = [], []
    new_cache, update = Decoder._new_cache, KVCache.update
    monkeypatch.setattr(Decoder, "_new_cache", lambda self, *a: caches.append(new_cache(self, *a)) or caches[-1])

    def spy(self, layer, k, v, pos):
        highest.append(k.shape[2] - 1 if pos is None else pos.max().item())
        return update(self, layer, k, v, pos)

    monkeypatch.setattr(KVCache, "update", spy)
    prompts = [PROMPT]
    answers = llama.generate(prompts, NEW, 0)[0]

    class Mixed(ModelDraft):
        """A model with a cache of its own, whose tokens are replaced by scripted ones."""

        @contextmanager
        def start(self, *args):
            with super().start(*args) as own, Scripted(answers, prompts, right).start(prompts, 0, None) as script:
                yield lambda texts, limits: own(texts, limits) and script(texts, limits)

    for draft in (Mixed(llama.model), ModelDraft(llama.model), ModelDraft(small(seed=1))):
        caches.clear(), highest.clear()
        text = PROMPT + llama.generate(prompts, NEW, 0, speculation=Speculation(draft, 5))[0][0]
        assert text == PROMPT + answers[0]
        assert max(highest) <= len(text) - 2  # the last token is never fed back
        exact = KVCache(ARGS, 1, len(text), torch.float64, "cpu")
        with torch.no_grad():
            llama.model(torch.tensor([text]), None, exact)
        accepted = slice(0, len(text) - 1)
        torch.testing.assert_close(caches[0].k[..., accepted, :], exact.k[..., accepted, :], atol=1e-12, rtol=0)
        torch.testing.assert_close(caches[0].v[..., accepted, :], exact.v[..., accepted, :], atol=1e-12, rtol=0)


def test_a_form_of_the_target_has_no_cache_of_its_own_and_another_model_has(llama, monkeypatch):
    caches, new_cache = [], Decoder._new_cache
    monkeypatch.setattr(Decoder, "_new_cache", lambda self, *a: caches.append(new_cache(self, *a)) or caches[-1])
    form, other = rounded_form(llama.model), small(seed=1)
    for draft, n_caches in ((llama.model, 1), (form, 1), (other, 2)):
        caches.clear()
        speculation = Speculation(ModelDraft(draft), 4)
        assert llama.generate([PROMPT], NEW, 0, speculation=speculation) == llama.generate([PROMPT], NEW, 0)
        assert len(caches) == n_caches + 1
        assert is_form_of(draft, llama.model) == (n_caches == 1)
    quantized = quantized_copy(small(args=dataclasses.replace(ARGS, dim=64)).float(), Quantization(8))
    assert not is_form_of(quantized, llama.model)


def test_stop_tokens_inside_an_accepted_run_end_the_row_there(llama):
    prompts = ragged_prompts(4, 20, seed=3)
    free = llama.generate(prompts, NEW, 0)[0]
    for stop in {free[1][5], free[2][0], free[0][-1]}:
        plain = llama.generate(prompts, NEW, 0, stop_tokens=[stop])[0]
        assert any(len(row) < NEW for row in plain)
        for draft in (ModelDraft(llama.model), PromptLookup(), Scripted(free, prompts, 2)):
            speculation = Speculation(draft, 7)
            assert llama.generate(prompts, NEW, 0, stop_tokens=[stop], speculation=speculation)[0] == plain
    first = llama.generate([PROMPT], 1, 0)[0][0]
    assert llama.generate([PROMPT], NEW, 0, stop_tokens=first, speculation=Speculation(PromptLookup()))[0] == [[]]


def test_limits(llama):
    """Rows without room, with room for one, for three and for plenty, in one batch; nothing asked for."""
    prompt = ragged_prompts(2, 200)[1]
    mixed = [prompt, prompt[:199], prompt[:197], prompt[:4]]
    plain = llama.generate(mixed, 9, 0)[0]
    assert [len(row) for row in plain] == [0, 1, 3, 9]
    for draft in (ModelDraft(llama.model), ModelDraft(small(seed=1)), PromptLookup()):
        assert llama.generate(mixed, 9, 0, speculation=Speculation(draft, 8))[0] == plain
        assert llama.generate([PROMPT], 0, 0, speculation=Speculation(draft, 8))[0] == [[]]
        assert llama.generate([[5]], 2, 0, speculation=Speculation(draft, 8)) == llama.generate([[5]], 2, 0)


def test_logprobs_echo_and_streaming_are_those_of_plain_decoding(llama):
    prompts = ragged_prompts(3, 12)
    speculation = Speculation(ModelDraft(llama.model), 3)
    plain = llama.generate(prompts, NEW, 0, logprobs=True, echo=True)
    tokens, values = llama.generate(prompts, NEW, 0, logprobs=True, echo=True, speculation=speculation)
    assert tokens == plain[0]
    for row, expected in zip(values, plain[1], strict=True):
        torch.testing.assert_close(torch.tensor(row), torch.tensor(expected), atol=1e-5, rtol=0)
    for temperature in (0, 0.8):
        options = {"temperature": temperature, "seed": 5, "speculation": speculation}
        assert [list(llama.stream(PROMPT, NEW, **options))] == llama.generate([PROMPT], NEW, **options)[0]


@pytest.mark.parametrize("is_form", [True, False])
def test_it_is_really_on(llama, monkeypatch, is_form):
    """The draft is called, and the target runs fewer times than it yields tokens: the prompt, then 24 tokens by 5."""
    calls = {id(llama.model): [], "draft": []}
    other = small()  # equal weights, another object
    if not is_form:
        other.norm.weight.data *= 1 + 1e-12
    forward = Transformer.forward
    monkeypatch.setattr(
        Transformer,
        "forward",
        lambda self, tokens, *rest: (
            calls[id(self) if self is llama.model else "draft"].append(tokens.shape[1]) or forward(self, tokens, *rest)
        ),
    )
    llama.generate([PROMPT], 26, 0, speculation=Speculation(ModelDraft(other), 4))
    assert calls[id(llama.model)] == [5] * 5
    last = 1 if is_form else 2  # with a cache of its own, from the second round on, its own last token too
    assert calls["draft"] == [1, 1, 1, 1, *[last, 1, 1, 1] * 4]
    calls[id(llama.model)].clear()
    llama.generate([PROMPT], 26, 0)
    assert calls[id(llama.model)] == [1] * 25


# Sampling: exactly the target's distribution


def chi_square_limit(cells: int) -> float:
    """What chi-square exceeds with p = 0.001, by Wilson and Hilferty's approximation."""
    dof = cells - 1
    return dof * (1 - 2 / (9 * dof) + 3.09 * math.sqrt(2 / (9 * dof))) ** 3


def assert_distribution(drawn: torch.Tensor, probs: torch.Tensor) -> None:
    counts = drawn.bincount(minlength=len(probs)).double()
    expected = probs.double() * len(drawn)
    possible = probs > 0
    assert counts[~possible].sum() == 0
    if possible.sum() > 1:
        statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
        assert statistic < chi_square_limit(int(possible.sum()))


@pytest.mark.parametrize("draft", ["other", "equal", "certain", "disjoint"])
@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(1.0, 1.0, None), (0.7, 0.9, 10)])
def test_what_verify_draws_has_the_targets_distribution(draft, temperature, top_p, top_k):
    """Rounds of two draft tokens over 16 words: each of the three positions, given that it was reached.

    100,000 of a draft that is now right and now wrong, 25,000 of those that always are one or the other.
    """
    n = 100_000 if draft == "other" else 25_000
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(temperature, top_p, top_k, generator=generator)
    logits_TV = 2 * torch.randn(3, 16, generator=generator)
    p_TV = logits_to_probs(logits_TV, *sampling[:3])
    q_logits = {"equal": logits_TV[:2], "disjoint": -30 * (p_TV[:2] > 0).float()}
    q_kV = logits_to_probs(q_logits.get(draft, 2 * torch.randn(2, 16, generator=generator)), *sampling[:3])
    if draft == "certain":
        tokens, q = p_TV[:2].argmax(-1).expand(n, 2), None
    else:
        tokens, q = draw(q_kV.expand(n, 2, 16), generator), q_kV.expand(n, 2, 16)
    proposed = [row[: 2 - (i % 4 == 0)] for i, row in enumerate(tokens.tolist())]  # every fourth row proposes only one
    drawn = verify(logits_TV.expand(n, 3, 16), Proposal(proposed, q), sampling)
    for position in range(3):
        reached = torch.tensor([row[position] for row in drawn if len(row) > position])
        assert len(reached) > 1000 or position > 0
        if len(reached) > 1000:
            assert_distribution(reached, p_TV[position])
    assert all(
        len(row) <= len(tokens) + 1 and row[:-1] == tokens[: len(row) - 1]
        for row, tokens in zip(drawn, proposed, strict=True)
    )
    likely = torch.minimum(p_TV[0], q_kV[0]).sum().item() if draft != "certain" else p_TV[0].max().item()
    share = sum(len(row) > 1 for row in drawn) / n  # the probability of acceptance is the overlap of p and q
    assert share == pytest.approx(likely, abs=0.01) and (draft != "equal" or share == 1)


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["another", "lookup"])
def test_whole_generations_have_the_targets_distribution(draft):
    """20,000 generations over 16 words: the joint distribution of the two tokens after the first."""
    args = ModelArgs(dim=16, n_layers=1, n_heads=1, vocab_size=16, multiple_of=16)
    target = Llama(random_model(args, std=0.5), None, max_seq_len=20, max_batch_size=20_000)
    prompt = [3, 5, 3, 5, 9, 3]  # repeats itself, so that there is something to look up
    one = PromptLookup(2, 1) if draft == "lookup" else ModelDraft(random_model(args, seed=1, std=0.5))
    sampling = {"temperature": 0.9, "top_p": 0.95}
    with torch.no_grad():
        texts = torch.tensor([[*prompt, a, b] for a in range(16) for b in range(16)])
        p = logits_to_probs(target.model(texts), **sampling)[:, -3:].view(16, 16, 3, 16)
    first, second, third = p[0, 0, 0], p[:, 0, 1], p[:, :, 2]
    joint = torch.einsum("a,ab,abc->bc", first, second, third)
    speculation = Speculation(one, 2)
    ids = torch.tensor(target.generate([prompt] * 20_000, 4, **sampling, seed=0, speculation=speculation)[0])
    assert min(speculation.counts.accepted, speculation.counts.rejected) > 200
    assert_distribution(ids[:, 0], first)
    assert_distribution(ids[:, 1] * 16 + ids[:, 2], joint.flatten())


def test_the_same_seed_gives_the_same_text(llama):
    prompts = ragged_prompts(3, 10)
    for draft in (ModelDraft(small(seed=1)), PromptLookup()):
        first, again, other = (
            llama.generate(prompts, NEW, 1.0, seed=seed, speculation=Speculation(draft))[0] for seed in (7, 7, 8)
        )
        assert first == again != other


# How many tokens are proposed


def test_expected_tokens_is_the_papers_formula():
    for a in (0.0, 0.3, 0.8):
        for k in (0, 1, 5):
            assert expected_tokens(a, k) == pytest.approx((1 - a ** (k + 1)) / (1 - a))
    assert expected_tokens(1.0, 4) == 5


@needs_kernel
def test_a_small_draft_costs_less_where_calls_cost_little():
    """In the C kernel by its bytes; in PyTorch, where its operations are as many a layer as the target's, far more."""
    target, draft = (checkpoint.load(path, torch.bfloat16) for path in (TINY, TINY / "draft"))
    costs = [ModelDraft(draft, way).cost(Decoder(target, way)) for way in ("auto", "eager")]
    assert costs[0] < 0.25 < costs[1]


def test_a_draft_that_could_not_pay_if_it_were_always_right_is_never_tried():
    for cost, is_tried in ((0.9, True), (0.99, False), (1.5, False)):
        length, tried = DraftLength(cost), 0
        for _ in range(5 * PROBE_EVERY):
            tried += length.next()
            length.observe(0, 0)
        assert (tried > 0) == is_tried


@pytest.mark.parametrize("cost", [0.03, 0.4])
def test_the_length_goes_to_what_pays(cost):
    """All right: the most there is. All wrong: none within a few rounds, a try now and then, 3 % in all at no cost."""
    good, bad = DraftLength(cost), DraftLength(cost)
    for _ in range(30):
        good.observe(good.next(), 0)
    assert good.next() == MOST_DRAFT_TOKENS
    lengths = []
    for _ in range(200):
        lengths.append(bad.next())
        bad.observe(0, min(lengths[-1], 1))
    assert lengths[0] > 0 and sum(n > 0 for n in lengths[20:]) == len(lengths[20:]) // PROBE_EVERY
    assert sum(lengths) * cost <= 0.03 * 200 or cost > 0.1
    for _ in range(3 * PROBE_EVERY):  # the text has changed
        n = bad.next()
        bad.observe(n, 0)
    assert bad.next() > 0


def test_a_useless_draft_costs_next_to_nothing(llama):
    """The tokens proposed in 180 rounds to one that is always wrong; the summary says that it does not pay."""
    answers = llama.generate([PROMPT], 180, 0)[0]
    speculation = Speculation(Scripted(answers, [PROMPT], 0))
    assert llama.generate([PROMPT], 180, 0, speculation=speculation)[0] == answers
    assert speculation.counts.rounds == 179 and speculation.counts.proposed < 60
    assert not speculation.counts.pays and speculation.counts.expected_speedup > 0.97


def test_lookup_proposes_what_followed_before():
    greedy = Sampling(0, generator=torch.Generator())

    def proposed(text: list[int], limit: int) -> list[int]:
        with PromptLookup().start([text], 0, greedy) as propose:
            tokens, probs = propose([text], [limit])
        assert probs is None and len(tokens) == 1
        return tokens[0]

    assert proposed([1, 2, 3, 4, 9, 1, 2], 3) == [3, 4, 9]
    assert proposed([1, 2, 3, 1, 2, 4, 1, 2], 1) == [4]  # the latest
    assert proposed([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], 1) == [3]  # the longest before the latest
    assert proposed([1, 2, 3, 4], 3) == proposed([1], 3) == proposed([3, 4, 3], 3) == []
    assert proposed([5, 6, 7, 5, 6, 7, 5, 6], 7) == [7, 5, 6, 7, 5, 6, 7]  # on beyond the end
    texts = [[1, 2, 3, 1, 2], [4, 5], [1, 1, 1, 1]]
    with PromptLookup().start(texts, 0, greedy) as propose:
        assert propose(texts, [2, 2, 0]).tokens == [[3, 1], [], []]
    grown = []
    with PromptLookup().start([[]], 0, greedy) as propose:
        for token in [1, 2, 3, 4, 1, 2]:  # kept up to date as the text grows
            grown.append(token)
            last = propose([grown], [2])
    assert last.tokens == [[3, 4]]


# What is refused


def test_bad_settings_are_refused(llama):
    for k in (0, -1):
        with pytest.raises(InputError, match=f"draft_tokens={k} is out of range"):
            Speculation(PromptLookup(), k)
    other = ModelDraft(small(args=ModelArgs(dim=32, n_layers=1, n_heads=2, vocab_size=48, multiple_of=16)))
    compiled = Llama(llama.model, None, decoding="compiled")
    cases = [
        (llama, Speculation(other), {}, "a vocabulary of 48, the model of 64"),
        (llama, Speculation(PromptLookup(), 200), {}, "draft_tokens=200 leaves no room in max_seq_len=200"),
        (llama, Speculation(PromptLookup()), {"use_cache": False}, "needs the KV cache"),
        (llama, Speculation(ModelDraft(small().to("meta"))), {}, "the draft is on meta, the model on cpu"),
        (compiled, Speculation(PromptLookup()), {}, "compile anew for each number of draft tokens"),
        (llama, Speculation(ModelDraft(small(), "compiled")), {}, "compile anew for each number of draft tokens"),
    ]
    for one, speculation, options, message in cases:
        with pytest.raises(InputError, match=message):
            one.generate([PROMPT], 5, 0, speculation=speculation, **options)
        with pytest.raises(InputError, match=message):
            next(one.stream(PROMPT, 5, 0, speculation=speculation, **options))
    with pytest.raises(InputError, match="on_step"):
        llama.generate([PROMPT], 5, 0, speculation=Speculation(PromptLookup()), on_step=print)


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_numbers_that_are_none(llama, temperature):
    """In the target an error. In the draft too where its distribution matters; else it is merely never right."""
    broken = small()
    broken.norm.weight = nn.Parameter(broken.norm.weight * float("nan"))
    with pytest.raises(NonFinite, match="the model's logits are not finite"):
        speculation = Speculation(ModelDraft(llama.model), 2)
        Llama(broken, None).generate([PROMPT], 5, temperature, speculation=speculation)
    speculation = Speculation(ModelDraft(broken), 2)
    if temperature:
        with pytest.raises(NonFinite, match="the draft's logits are not finite"):
            llama.generate([PROMPT], 5, temperature, speculation=speculation)
    else:
        assert llama.generate([PROMPT], 5, 0, speculation=speculation) == llama.generate([PROMPT], 5, 0)
