"""Speculative decoding: a draft proposes k tokens, the target, the model itself, verifies them all in one step.

A decode step spends its time on reading weights, and reads them once for one token or for nine, so verifying is cheap.
Of the draft tokens the longest accepted prefix is kept, and one token of the target's own on top: the correction of the
first that was rejected or, where none was, a bonus (Leviathan et al. 2023; Chen et al. 2023). What comes out is the
target's own text, whatever the draft proposes: token for token at temperature 0, else with exactly its distribution.

If each draft token is accepted with probability a, a round yields E tokens. It costs 1 + k c steps of the target, where
c is what a draft token costs, in such steps:

    E(a, k) = 1 + a + ... + a^k = (1 - a^(k+1)) / (1 - a)        speed-up = E(a, k) / (1 + k c)

Unless k is fixed, it is chosen anew each round from the acceptance so far, and is 0, plain decoding, where no k pays.

    llama.generate(ids, 64, speculation=Speculation(PromptLookup()))

Rejected tokens need no undoing: their slots in the cache lie beyond the position of the text, and are overwritten
before anything can see them. Left out on purpose: trees of draft tokens, a different tokenizer, trained extra heads.

Shape suffixes: B sequences, k draft tokens, T = k + 1 positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.config import ModelArgs
from llama.decoding import Decoder, Generation
from llama.errors import InputError, NonFinite
from llama.model import Transformer
from llama.quantization import Int4Linear, Int8Linear
from llama.sampling import Sampling, draw, next_token

MOST_DRAFT_TOKENS = 8  # beyond which a chosen k does not go: E(0.8, 8) is already 87 % of E(0.8, infinity)
PROBE_EVERY = 16  # rounds of plain decoding until a draft token is tried again
MEMORY = 0.9  # by which earlier draft tokens count less each round, so that about ten rounds decide
PRIOR = (1.6, 2.0)  # accepted and tested draft tokens to begin with: acceptance 0.8, soon outvoted
# What a draft token of one text adds to the step that verifies it, in steps: more where a CPU unpacks codes. And
# what calling the operations of a layer costs, as the bytes that the memory could deliver meanwhile. Rough, but the
# same in every run: with measured times instead, sampled text would depend on them.
VERIFY_COST = {"native": 0.08, "cpu": 0.03, "cuda": 0.01, Int8Linear: 0.2, Int4Linear: 0.3}
LAYER_BYTES = {"native": 5e5, "cpu": 4e6, "cuda": 5e7}
DRAW_BYTES = {"cpu": 900, "cuda": 0}  # drawing from a distribution, for each word that it has: 30 ns on a CPU
WORTH_IT = 1.05  # an expected speed-up below this is not worth having a draft


class Proposal(NamedTuple):
    """Draft tokens for each text, at most k of them."""

    tokens: list[list[int]]
    probs_BkV: Tensor | None  # fp32, the distributions they were drawn from; None: they were certain

    def cut(self, limits: list[int]) -> Proposal:
        """At most so many for each text."""
        return self._replace(tokens=[tokens[:limit] for tokens, limit in zip(self.tokens, limits, strict=True)])


# Called with the texts so far and how many draft tokens each may get: 0 for one that has ended, but not for all.
Proposer = Callable[[list[list[int]], list[int]], Proposal]


class Draft:
    """What proposes tokens. One without a model fits every target and costs nothing."""

    def check(self, target: Transformer, n_words: int) -> None:
        """Raise InputError where it does not fit this target, of which ids below `n_words` are drawn."""

    def cost(self, target: Decoder) -> float:
        """c: the time of one draft token for each text, as a share of the target's decode step."""
        return 0.0

    def start(
        self, prompts: Sequence[Sequence[int]], max_len: int, sampling: Sampling, target: Generation | None = None
    ) -> AbstractContextManager[Proposer]:
        """Begin with these texts, which grow to at most `max_len` tokens, draft tokens included.

        target: the generation that verifies, whose cache holds all but the last token of each text.
        """
        raise NotImplementedError


class ModelDraft(Draft):
    """Another model with the same vocabulary: any Transformer.

    A lighter form of the target itself, quantized or pruned, works on the target's cache: it has nothing to prefill and
    to hold, and sees the text as the target does. What it writes lies where the target writes next.
    """

    def __init__(self, model: Transformer, decoding: str = "auto") -> None:
        self.decoder = Decoder(model, decoding)

    def check(self, target: Transformer, n_words: int) -> None:
        """Raise InputError for a different vocabulary or device, or a step that cannot take several tokens."""
        check_vocabulary(self.decoder.model.args, n_words)
        devices = [model.tok_embeddings.weight.device for model in (self.decoder.model, target)]
        if devices[0] != devices[1]:
            raise InputError(f"the draft is on {devices[0]}, the model on {devices[1]}; put both on one device")
        _check_decoding(self.decoder)

    def cost(self, target: Decoder) -> float:
        """The bytes that a step reads over those of the target's, with what calling the operations is worth."""
        return _step_bytes(self.decoder) / _step_bytes(target)

    @contextmanager
    def start(
        self, prompts: Sequence[Sequence[int]], max_len: int, sampling: Sampling, target: Generation | None = None
    ) -> Iterator[Proposer]:
        """Run the prompts through the draft. Its proposer raises NonFinite for logits that are no numbers."""
        if target is not None and is_form_of(self.decoder.model, target.model):
            with self.decoder.start(len(prompts), max_len, target.cache) as run:
                yield _FormProposer(run, sampling)
        else:
            with self.decoder.start(len(prompts), max_len) as run:
                yield _ModelProposer(run, prompts, sampling)


def is_form_of(model: Transformer, other: Transformer) -> bool:
    """Whether one model is another in a lighter form: equal norms, which quantization and pruning leave as they are,
    and keys and values of the same shape. A process's part of a model (parallel.py), with fewer rows, is none of it."""

    def norms(network: Transformer) -> list[Tensor]:
        return [network.norm.weight, *(block.attention_norm.weight for block in network.layers)]

    def shape(network: Transformer) -> tuple:
        args = network.args
        return args.n_layers, args.n_kv_heads, args.head_dim, len(network.tok_embeddings.weight), network.dtype

    return shape(model) == shape(other) and all(
        torch.equal(*pair) for pair in zip(norms(model), norms(other), strict=True)
    )


class _FormProposer:
    """A form of the target on the target's cache, which holds all but the last token of each text."""

    def __init__(self, run: Generation, sampling: Sampling) -> None:
        self.run, self.sampling = run, sampling

    def __call__(self, texts: list[list[int]], limits: list[int]) -> Proposal:
        device = self.run.cache.k.device
        tokens = torch.tensor([[text[-1]] for text in texts], device=device)
        pos = torch.tensor([[len(text) - 1] for text in texts], device=device)
        return _drafted(self.run, tokens, pos, max(limits), self.sampling).cut(limits)


class _ModelProposer:
    """A draft model with its own cache, kept in step with texts that may go on differently than it proposed.

    Of each text the cache holds the first `known` tokens, and after them those of `ventured`: what the draft proposed
    last time, but for the last token, which it was never fed. Say it proposed D X Y after the text A B C:

        cache                      A B C D X      known 3, ventured D X
        text now                   A B C D E      the target took D, and wrote E in place of X
        to be fed next                     E      at position 4, over X; one token, as after every rejection

        text, had all been right   A B C D X Y F
        to be fed next                       Y F  at positions 5 and 6
    """

    def __init__(self, run: Generation, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        self.sampling, self.run = sampling, run
        prefill(run, prompts)
        self.known = [len(prompt) for prompt in prompts]
        self.ventured: list[list[int]] = [[] for _ in prompts]

    def __call__(self, texts: list[list[int]], limits: list[int]) -> Proposal:
        drafted = _drafted(self.run, *self._unseen(texts), max(limits), self.sampling)
        self.known = [len(text) for text in texts]
        self.ventured = [tokens[:-1] for tokens in drafted.tokens]
        return drafted.cut(limits)

    def _unseen(self, texts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """The tokens of each text that the cache does not hold, and their positions, both [B, n].

        After rounds of plain decoding they are more than two. A text with fewer than others begins earlier, which
        writes again what the cache holds; before its first token it has none, and that one is repeated instead.
        """
        held = [
            known + n_equal(text[known:], ventured)
            for text, known, ventured in zip(texts, self.known, self.ventured, strict=True)
        ]
        n = max(max(len(text) - n_held, 1) for text, n_held in zip(texts, held, strict=True))
        pos = [[max(i, 0) for i in range(len(text) - n, len(text))] for text in texts]
        tokens = [[text[i] for i in indices] for text, indices in zip(texts, pos, strict=True)]
        device = self.run.cache.k.device
        return torch.tensor(tokens, device=device), torch.tensor(pos, device=device)


class PromptLookup(Draft):
    """Proposes what followed the last tokens when they occurred before (Saxena 2023). No model, no cost.

    For text that repeats its prompt or itself: quoting, editing, code. Proposes nothing where the last `min_ngram`
    tokens are new; of several earlier places the longest match counts, then the latest.
    """

    def __init__(self, max_ngram: int = 3, min_ngram: int = 2) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise InputError(f"min_ngram {min_ngram} and max_ngram {max_ngram}: expected 1 <= min_ngram <= max_ngram")
        self.sizes = range(max_ngram, min_ngram - 1, -1)

    def check(self, target: Transformer, n_words: int) -> None:
        """It fits every model."""

    def cost(self, target: Decoder) -> float:
        return 0.0

    @contextmanager
    def start(
        self, prompts: Sequence[Sequence[int]], max_len: int, sampling: Sampling, target: Generation | None = None
    ) -> Iterator[Proposer]:
        """Begin an index for each text: where each n-gram was last followed by something."""
        indexes: list[dict[tuple[int, ...], int]] = [{} for _ in prompts]
        known = [1] * len(prompts)

        def propose(texts: list[list[int]], limits: list[int]) -> Proposal:
            proposed = []
            for i, (text, index, limit) in enumerate(zip(texts, indexes, limits, strict=True)):
                for end in range(known[i], len(text)):
                    index.update({tuple(text[end - n : end]): end for n in self.sizes if n <= end})
                known[i] = len(text)
                proposed.append(self._continue(text, index, limit))
            return Proposal(proposed, None)

        yield propose

    def _continue(self, text: list[int], index: dict[tuple[int, ...], int], limit: int) -> list[int]:
        matches = (index[gram] for n in self.sizes if (gram := tuple(text[-n:])) in index)
        start = next(matches, None)
        if start is None:
            return []
        drafted: list[int] = []
        while len(drafted) < limit:
            beyond = start + len(drafted) - len(text)
            # Past its end, a text that repeats itself goes on with what was drafted; a negative index is inside it.
            drafted.append(drafted[beyond] if beyond >= 0 else text[beyond])
        return drafted


@dataclass
class Counts:
    """What became of the draft tokens. A round is one step of the target for one text, prompts left out."""

    rounds: int = 0
    proposed: int = 0
    accepted: int = 0  # and used: none behind a stop token
    rejected: int = 0  # those that ended a run; the ones behind them do not count
    cost: float = 0.0  # of the rounds, in steps of plain decoding, by the formula

    @property
    def acceptance(self) -> float:
        """a: accepted draft tokens over accepted and rejected ones; 0 where there were none."""
        return self.accepted / max(self.accepted + self.rejected, 1)

    @property
    def tokens_per_round(self) -> float:
        """E as measured; 1 is plain decoding."""
        return 1 + self.accepted / max(self.rounds, 1)

    @property
    def expected_speedup(self) -> float:
        """Tokens over the cost of the rounds that they took."""
        return (self.rounds + self.accepted) / self.cost if self.cost else 1.0

    @property
    def pays(self) -> bool:
        return self.expected_speedup >= WORTH_IT


class DraftLength:
    """Chooses k for the next round: the one with the largest E(a, k) / (1 + k c), with a as it was lately.

    0 where none pays; then every so often a single draft token is tried, in case the text has changed. A draft that
    would not pay if it were always right is never tried.
    """

    def __init__(self, cost: float) -> None:
        self.cost = cost
        self._can_pay = max(self._gain(k, 1.0) for k in range(MOST_DRAFT_TOKENS + 1)) >= WORTH_IT
        self._accepted, self._tested = PRIOR
        self._idle = 0

    def next(self) -> int:
        if not self._can_pay:
            return 0
        a = self._accepted / self._tested
        best = max(range(MOST_DRAFT_TOKENS + 1), key=lambda k: self._gain(k, a))
        self._idle = 0 if best > 0 else self._idle + 1
        if best > 0 or self._idle % PROBE_EVERY:
            return best
        self._accepted, self._tested = a, 1.0  # the past counts as one token, so that this one can change the mind
        return 1

    def _gain(self, k: int, a: float) -> float:
        return expected_tokens(a, k) / (1 + k * self.cost)

    def observe(self, accepted: int, rejected: int) -> None:
        """Learn from a round."""
        if accepted + rejected > 0:
            self._accepted = MEMORY * self._accepted + accepted
            self._tested = MEMORY * self._tested + accepted + rejected


def expected_tokens(acceptance: float, k: int) -> float:
    """E(a, k) = 1 + a + ... + a^k: the tokens that a round yields on average (Leviathan et al. 2023, eq. 1)."""
    return sum(acceptance**i for i in range(k + 1))


class Speculation:
    """How a generation speculates, and what has come of it in all calls so far (`counts`).

    draft_tokens: k in every round; None: as many as pay. Fewer near the end of a text, and where a prompt lookup finds
    nothing. Raises InputError for less than 1.
    """

    def __init__(self, draft: Draft, draft_tokens: int | None = None) -> None:
        if draft_tokens is not None and draft_tokens < 1:
            raise InputError(f"draft_tokens={draft_tokens} is out of range; use at least 1, or leave it out")
        self.draft, self.draft_tokens = draft, draft_tokens
        self.counts = Counts()

    def check(self, decoder: Decoder, max_seq_len: int, n_words: int) -> None:
        """Raise InputError where this draft or length cannot work for the model behind `decoder`."""
        if self.draft_tokens is not None and self.draft_tokens >= max_seq_len:
            raise InputError(
                f"draft_tokens={self.draft_tokens} leaves no room in max_seq_len={max_seq_len}; lower it or raise that"
            )
        _check_decoding(decoder)
        self.draft.check(decoder.model, n_words)

    @torch.no_grad()
    def rounds(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        budgets: Sequence[int],
        sampling: Sampling,
        stops: Sequence[int],
        logprobs: bool,
    ) -> Iterator[tuple[list[list[int]], list[list[float]], Tensor]]:
        """Yield round by round what each text gets, without stop tokens, until all have stopped or used their budgets.

        The tokens; with `logprobs`, their log-probabilities under the model; and the logits [B, T, V], valid until the
        next round, to be checked for NaN. A round in which the draft is right twice:

            text so far        The  little
            drafted                         fox   ran   home
            the target reads        little  fox   ran   home     at positions 1 to 4
            its next tokens         fox     ran   away  ...
            kept                            fox   ran   away     two that were accepted, and one drawn anew

        The first round drafts nothing: the logits of the prompts are at hand.
        """
        texts = [_Text(list(prompt), budget) for prompt, budget in zip(prompts, budgets, strict=True)]
        if not any(text.room for text in texts):
            return
        # A text at its end takes part in rounds of k draft tokens as long as others go on: k slots more than it needs.
        max_len = max(len(text.tokens) + text.room for text in texts) + (self.draft_tokens or MOST_DRAFT_TOKENS)
        cost = _verify_cost(decoder)
        if sampling.temperature > 0 and isinstance(self.draft, ModelDraft):
            n_words = decoder.model.args.vocab_size
            cost += DRAW_BYTES[decoder.model.tok_embeddings.weight.device.type] * n_words / _step_bytes(decoder)
        length = DraftLength(self.draft.cost(decoder) + len(texts) * cost)
        with decoder.start(len(texts), max_len) as run, self.draft.start(prompts, max_len, sampling, run) as propose:
            logits = decoder.model.logits(prefill(run, prompts))[:, None]
            proposal = nothing = Proposal([[] for _ in texts], None)
            is_first = True
            while True:
                drawn = verify(logits, proposal, sampling)
                if not is_first:
                    self._count(texts, proposal, drawn, stops, length)
                kept = [text.take(tokens, stops) for text, tokens in zip(texts, drawn, strict=True)]
                values = _logprobs(logits, drawn) if logprobs else drawn
                yield kept, [v[: len(new)] if logprobs else [] for v, new in zip(values, kept, strict=True)], logits
                if not any(text.room for text in texts):
                    return
                k, is_first = self.draft_tokens or length.next(), False
                limits = [min(k, text.room - 1) if text.room else 0 for text in texts]
                proposal = propose([text.tokens for text in texts], limits) if any(limits) else nothing
                tokens = _padded([[text.tokens[-1], *new] for text, new in zip(texts, proposal.tokens, strict=True)])
                pos = torch.tensor([[len(text.tokens) - 1] for text in texts]) + torch.arange(tokens.shape[1])
                logits = run.step(tokens.to(logits.device), pos.to(logits.device))

    def _count(
        self, texts: list[_Text], proposal: Proposal, drawn: list[list[int]], stops: Sequence[int], length: DraftLength
    ) -> None:
        """Add a round of the texts that have not ended."""
        results = [
            (new[:-1], len(drafted))
            for text, drafted, new in zip(texts, proposal.tokens, drawn, strict=True)
            if text.room
        ]
        rejected = sum(len(accepted) < n for accepted, n in results)
        length.observe(sum(len(accepted) for accepted, _ in results), rejected)
        self.counts.rounds += len(results)
        self.counts.proposed += sum(n for _, n in results)
        # A stop token takes the place of the one that a round has beside the accepted ones.
        self.counts.accepted += sum(before_stop(accepted, stops) for accepted, _ in results)
        self.counts.rejected += rejected
        self.counts.cost += sum(1 + n * length.cost for _, n in results)


@dataclass
class _Text:
    """A prompt as it grows."""

    tokens: list[int]
    room: int  # tokens that it may still get; 0 once it has ended

    def take(self, drawn: list[int], stops: Sequence[int]) -> list[int]:
        """Append tokens up to a stop token or the budget, and return them."""
        new = drawn[: self.room]
        end = before_stop(new, stops)
        self.room = self.room - len(new) if end == len(new) else 0
        self.tokens += new[:end]
        return new[:end]


def verify(logits_BTV: Tensor, proposal: Proposal, sampling: Sampling) -> list[list[int]]:
    """What each text gets: the draft tokens that are accepted, up to the first that is not, and one more.

    `logits_BTV` are the target's at the newest token and at each draft token. At temperature 0 one is accepted if it is
    the target's choice. Otherwise with probability min(1, p / q), p being the target's distribution and q the draft's.
    In place of the first that is not, a token is drawn from max(p - q, 0), normalised; after the last, from p. So each
    token has distribution p (Leviathan et al. 2023, A.1). Both are what the sampler makes of the logits.
    """
    drafted, q_BkV = proposal
    if sampling.temperature == 0 or not any(drafted):
        choices = next_token(logits_BTV, sampling).tolist()
        return [chosen[: n_equal(chosen, tokens) + 1] for chosen, tokens in zip(choices, drafted, strict=True)]
    tokens_Bk, device = _padded(drafted).to(logits_BTV.device), logits_BTV.device
    counts = torch.tensor([len(tokens) for tokens in drafted], device=device)
    proposed_Bk = torch.arange(tokens_Bk.shape[1], device=device) < counts[:, None]
    p_BTV = sampling.probs(logits_BTV)
    if q_BkV is None:
        q_BkV = F.one_hot(tokens_Bk, p_BTV.shape[-1]).to(p_BTV.dtype)
    q_BkV = torch.where(proposed_Bk[..., None], q_BkV, 0.0)
    p_Bk, q_Bk = (probs.gather(-1, tokens_Bk[..., None])[..., 0] for probs in (p_BTV[:, :-1], q_BkV))
    noise_Bk = torch.rand(p_Bk.shape, generator=sampling.generator, device=device)
    accepted_Bk = proposed_Bk & (noise_Bk * q_Bk < p_Bk)
    n = accepted_Bk.long().cumprod(1).sum(1)
    rows = torch.arange(len(n), device=device)
    p_BV, q_BV = p_BTV[rows, n], F.pad(q_BkV, (0, 0, 0, 1))[rows, n]  # q is 0 where nothing was proposed
    rest_BV = (p_BV - q_BV).clamp_min_(0)
    total_B1 = rest_BV.sum(-1, keepdim=True)
    # Nothing is left only where p and q are the same but for rounding.
    last = draw(torch.where(total_B1 > 0, rest_BV / total_B1, p_BV), sampling.generator)
    return [[*tokens[:i], end] for tokens, (i, end) in zip(drafted, torch.stack((n, last), 1).tolist(), strict=True)]


def prefill(run: Generation, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Fill the cache with prompts of unequal length; final hidden states [B, dim] at the last token of each."""
    last = torch.tensor([len(prompt) - 1 for prompt in prompts])
    device = run.cache.k.device
    return run.last_hidden(_padded(prompts).to(device), last.to(device))


def _drafted(run: Generation, tokens: Tensor, pos: Tensor, k: int, sampling: Sampling) -> Proposal:
    """k draft tokens of each text after `tokens` at `pos`, both [B, n]."""
    columns, probs = [], []
    for _ in range(k):
        token, q = _draft_token(run.step(tokens, pos)[:, -1:], sampling)
        columns.append(token)
        probs.append(q)
        tokens, pos = token, pos[:, -1:] + 1
    return Proposal(torch.cat(columns, 1).tolist(), None if sampling.temperature == 0 else torch.cat(probs, 1))


def _draft_token(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """A draft's next token [B, 1] and the distribution [B, 1, V] it was drawn from, None at temperature 0."""
    if sampling.temperature == 0:
        return next_token(logits, sampling), None
    probs = sampling.probs(logits)
    if not probs.isfinite().all():
        raise NonFinite("the draft's logits are not finite; its weights are damaged, or dtype=float32 helps")
    return draw(probs, sampling.generator), probs


def n_equal(tokens: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    pairs = zip(tokens, others, strict=False)
    return next((i for i, (token, other) in enumerate(pairs) if token != other), min(len(tokens), len(others)))


def _padded(texts: Sequence[Sequence[int]]) -> Tensor:
    """Tokens of unequal length as int64 [B, longest], filled up with zeros."""
    longest = max(map(len, texts))
    return torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], dtype=torch.int64)


def _logprobs(logits_BTV: Tensor, tokens: Sequence[Sequence[int]]) -> list[list[float]]:
    """log p of each token under the model, before temperature and cuts; those of a text come first, then padding."""
    tokens_BT = _padded(tokens).to(logits_BTV.device)
    return logits_BTV[:, : tokens_BT.shape[1]].float().log_softmax(-1).gather(-1, tokens_BT[..., None])[..., 0].tolist()


def before_stop(tokens: list[int], stops: Sequence[int]) -> int:
    """How many tokens stand before the first stop token."""
    return next((i for i, token in enumerate(tokens) if token in stops), len(tokens))


def _step_bytes(decoder: Decoder) -> float:
    """The time of a decode step, as the bytes that memory delivers meanwhile: weights, and calls of operations."""
    model = decoder.model
    table = model.tok_embeddings.weight
    looked_up = 0 if model.output is None else table.nbytes
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    name = decoder.name if decoder.name in LAYER_BYTES else table.device.type
    return weights - looked_up + model.args.n_layers * LAYER_BYTES[name]


def _verify_cost(target: Decoder) -> float:
    """What a draft token of one text adds to a step."""
    kind, device = type(target.model.layers[0].attention.wq), target.model.tok_embeddings.weight.device.type
    name = "native" if target.name == "native" else device
    return VERIFY_COST[kind if device == "cpu" and kind in VERIFY_COST else name]


def check_vocabulary(draft: ModelArgs, n_words: int) -> None:
    """Raise InputError for a draft whose ids cannot be the target's; its table may be padded in a different way."""
    if not n_words <= draft.vocab_size <= n_words * 9 // 8:
        raise InputError(
            f"the draft has a vocabulary of {draft.vocab_size}, the model of {n_words}; "
            "a draft must have been trained with the model's tokenizer"
        )


def _check_decoding(decoder: Decoder) -> None:
    if decoder.decoding == "compiled":
        raise InputError("decoding 'compiled' would compile anew for each number of draft tokens; use auto or eager")
