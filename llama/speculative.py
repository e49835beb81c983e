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
    python inference.py --draft=lookup

Rejected tokens need no undoing: their slots in the cache lie beyond the row's position, and are overwritten before
anything can see them. Left out on purpose: trees of draft tokens, drafts with another tokenizer, trained extra heads.

Shape suffixes: B sequences, k draft tokens, T = k + 1 positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.cache import KVCache
from llama.config import ModelArgs
from llama.decoding import Decoder
from llama.errors import InputError, NonFinite
from llama.model import Transformer
from llama.sampling import Sampling, draw, logits_to_probs, next_token

MOST_DRAFT_TOKENS = 8  # beyond which a chosen k does not go: E(0.8, 8) is already 87 % of E(0.8, infinity)
PROBE_EVERY = 16  # rounds of plain decoding until a draft token is tried again
MEMORY = 0.9  # by which earlier draft tokens count less each round, so that about ten rounds decide
PRIOR = (1.6, 2.0)  # accepted and tested draft tokens to begin with: acceptance 0.8, soon outvoted
# What a draft token of one row adds to the step that verifies it, in steps, and what calling the operations of a layer
# costs, as the bytes that the memory could deliver meanwhile. Rough, but the same in every run: with measured times in
# their place, sampled text would depend on them.
VERIFY_COST = {"cpu": 0.03, "cuda": 0.01}
LAYER_BYTES = {"cpu": 4e6, "cuda": 5e7}
WORTH_IT = 1.05  # an expected speed-up below this is not worth having a draft


class Proposal(NamedTuple):
    """Draft tokens for each row."""

    tokens_Bk: Tensor  # int64
    probs_BkV: Tensor | None  # fp32, the distributions they were drawn from; None: they were no draws, but certain
    counts: list[int]  # how many are proposed for each row; the rest of a row is filler


# Called with the texts so far and how many draft tokens each may get: 0 for one that has ended, but not for all.
Proposer = Callable[[list[list[int]], list[int]], Proposal]


class Draft(Protocol):
    """What proposes tokens."""

    def check(self, target: Transformer) -> None:
        """Raise InputError where it does not fit this target."""
        ...

    def cost(self, target: Transformer) -> float:
        """c: the time of one draft token for each row, as a share of the target's decode step."""
        ...

    def start(self, prompts: Sequence[Sequence[int]], max_len: int, sampling: Sampling) -> Proposer:
        """Begin with these texts, which grow to at most `max_len` tokens, draft tokens included."""
        ...


class ModelDraft:
    """Another model with the same vocabulary, smaller or quantized: any Transformer."""

    def __init__(self, model: Transformer, decoding: str = "auto") -> None:
        self.decoder = Decoder(model, decoding)

    def check(self, target: Transformer) -> None:
        """Raise InputError for another vocabulary, another device, or a step that cannot take several tokens."""
        check_vocabulary(self.decoder.model.args, target.args)
        devices = [model.tok_embeddings.weight.device for model in (self.decoder.model, target)]
        if devices[0] != devices[1]:
            raise InputError(f"the draft is on {devices[0]}, the model on {devices[1]}; put both on one device")
        _check_decoding(self.decoder)

    def cost(self, target: Transformer) -> float:
        """The bytes that a step reads over those of the target's, with what calling the operations is worth."""
        return _step_bytes(self.decoder.model) / _step_bytes(target)

    def start(self, prompts: Sequence[Sequence[int]], max_len: int, sampling: Sampling) -> Proposer:
        """Run the prompts through the draft. Its proposer raises NonFinite for logits that are no numbers."""
        return _ModelProposer(self.decoder, prompts, max_len, sampling)


class _ModelProposer:
    """A draft model with its own cache, kept in step with texts that may go on differently than it proposed."""

    def __init__(self, decoder: Decoder, prompts: Sequence[Sequence[int]], max_len: int, sampling: Sampling) -> None:
        self.sampling = sampling
        self.cache, self.step = decoder.start(len(prompts), max_len)
        prefill(decoder, prompts, self.cache)
        # The cache holds keys and values of the first `known` tokens of each text, and of `ventured` ones after them.
        self.known = [len(prompt) for prompt in prompts]
        self.ventured: list[list[int]] = [[] for _ in prompts]

    def __call__(self, texts: list[list[int]], limits: list[int]) -> Proposal:
        tokens, pos = self._not_yet_seen(texts)
        drafted, probs = [], []
        for _ in range(max(limits)):
            token, q = _draft_token(self.step(tokens, pos)[:, -1], self.sampling)
            drafted.append(token)
            probs.append(q)
            tokens, pos = token[:, None], pos[:, -1:] + 1
        tokens_Bk = torch.stack(drafted, 1)
        self.known = [len(text) for text in texts]
        self.ventured = [row[:-1] for row in tokens_Bk.tolist()]  # the last one was never fed back
        is_greedy = self.sampling.temperature == 0
        return Proposal(tokens_Bk, None if is_greedy else torch.stack(probs, 1), limits)

    def _not_yet_seen(self, texts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """The last tokens of each text and their positions, [B, n]: one after a rejection, two where all were accepted.

        After rounds of plain decoding they are more. Rows that lag less see some tokens again, which writes what is
        there already; before its first token a row has none, and that one is repeated instead.
        """
        lags = []
        for text, known, ventured in zip(texts, self.known, self.ventured, strict=True):
            n_right = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(text[known:], ventured, strict=False))))
            lags.append(max(len(text) - known - n_right, 1))
        width = max(lags)
        places = [[max(len(text) - i, 0) for i in range(width, 0, -1)] for text in texts]
        newest = [[text[i] for i in row] for text, row in zip(texts, places, strict=True)]
        device = self.cache.k.device
        return torch.tensor(newest, device=device), torch.tensor(places, device=device)


class PromptLookup:
    """Proposes what followed the last tokens when they occurred before (Saxena 2023). No model, no cost.

    For text that repeats its prompt or itself: quoting, editing, code. Proposes nothing where the last `min_ngram`
    tokens are new; of several earlier places the longest match counts, then the latest.
    """

    def __init__(self, max_ngram: int = 3, min_ngram: int = 2) -> None:
        self.sizes = range(max_ngram, min_ngram - 1, -1)

    def check(self, target: Transformer) -> None:
        """It fits every model."""

    def cost(self, target: Transformer) -> float:
        """Nothing."""
        return 0.0

    def start(self, prompts: Sequence[Sequence[int]], max_len: int, sampling: Sampling) -> Proposer:
        """Begin an index for each row: where each n-gram was last followed by something."""
        device = sampling.generator.device
        indexes: list[dict[tuple[int, ...], int]] = [{} for _ in prompts]
        known = [1] * len(prompts)

        def propose(texts: list[list[int]], limits: list[int]) -> Proposal:
            found = []
            for row, (text, limit) in enumerate(zip(texts, limits, strict=True)):
                for end in range(known[row], len(text)):
                    indexes[row].update({tuple(text[end - n : end]): end for n in self.sizes if n <= end})
                known[row] = len(text)
                found.append(self._continue(text, indexes[row], limit))
            counts = [len(drafted) for drafted in found]
            k = max(counts)
            padded = [drafted + [0] * (k - len(drafted)) for drafted in found]
            return Proposal(torch.tensor(padded, dtype=torch.int64, device=device), None, counts)

        return propose

    def _continue(self, text: list[int], index: dict[tuple[int, ...], int], limit: int) -> list[int]:
        matches = (index[gram] for n in self.sizes if (gram := tuple(text[-n:])) in index)
        place = next(matches, None)
        if place is None:
            return []
        drafted: list[int] = []
        while len(drafted) < limit:
            beyond = place + len(drafted) - len(text)
            # Past its end, a text that repeats itself goes on with what was drafted; a negative index is inside it.
            drafted.append(drafted[beyond] if beyond >= 0 else text[beyond])
        return drafted


@dataclass
class Counts:
    """What came of the draft tokens. A round is one row's part in one step of the target, prompts left out."""

    rounds: int = 0
    proposed: int = 0
    accepted: int = 0
    rejected: int = 0  # those that ended a run; the ones behind them were not looked at
    cost: float = 0.0  # of the rounds, in steps of plain decoding, by the formula

    @property
    def acceptance(self) -> float:
        """a: the share of accepted draft tokens among those that were looked at; 0 where none was."""
        return self.accepted / max(self.accepted + self.rejected, 1)

    @property
    def tokens_per_round(self) -> float:
        """E as it came out; 1 is plain decoding."""
        return 1 + self.accepted / max(self.rounds, 1)

    @property
    def expected_speedup(self) -> float:
        """Tokens over the cost of the rounds that they took."""
        return (self.rounds + self.accepted) / self.cost if self.cost else 1.0

    @property
    def pays(self) -> bool:
        """Whether having the draft is worth it."""
        return self.expected_speedup >= WORTH_IT


class DraftLength:
    """Chooses k for the next round: the one with the largest E(a, k) / (1 + k c), with a as it was lately.

    0 where none pays; then every so often a single draft token is tried, in case the text has changed.
    """

    def __init__(self, cost: float) -> None:
        self.cost = cost
        self._accepted, self._tested = PRIOR
        self._idle = 0

    def next(self) -> int:
        """k for the next round."""
        a = self._accepted / self._tested
        best = max(range(MOST_DRAFT_TOKENS + 1), key=lambda k: expected_tokens(a, k) / (1 + k * self.cost))
        if best > 0:
            self._idle = 0
            return best
        self._idle += 1
        if self._idle % PROBE_EVERY:
            return 0
        self._accepted, self._tested = a, 1.0  # the past counts as one token, so that this one can change the mind
        return 1

    def observe(self, accepted: int, rejected: int) -> None:
        """Take in what came of a round."""
        if accepted + rejected > 0:
            self._accepted = MEMORY * self._accepted + accepted
            self._tested = MEMORY * self._tested + accepted + rejected


def expected_tokens(acceptance: float, k: int) -> float:
    """E(a, k) = 1 + a + ... + a^k: the tokens that a round yields on average (Leviathan et al. 2023, eq. 1)."""
    return sum(acceptance**i for i in range(k + 1))


class Speculation:
    """How a generation speculates, and what has come of it in all calls so far (`counts`).

    draft_tokens: k in every round; None: as many as pay. Fewer near the end of a row, and where a prompt lookup finds
    nothing. Raises InputError for less than 1.
    """

    def __init__(self, draft: Draft, draft_tokens: int | None = None) -> None:
        if draft_tokens is not None and draft_tokens < 1:
            raise InputError(f"draft_tokens {draft_tokens} is out of range; use at least 1, or leave it out")
        self.draft, self.draft_tokens = draft, draft_tokens
        self.counts = Counts()

    def check(self, decoder: Decoder, max_seq_len: int) -> None:
        """Raise InputError where this draft or length cannot work for the model behind `decoder`."""
        if self.draft_tokens is not None and self.draft_tokens >= max_seq_len:
            raise InputError(
                f"draft_tokens {self.draft_tokens} leaves no room in max_seq_len {max_seq_len}; lower it or raise that"
            )
        _check_decoding(decoder)
        self.draft.check(decoder.model)

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
        """Yield round by round what each row gets, without stop tokens, until all have stopped or used their budgets.

        The tokens; their log-probabilities under the model, where asked for; and the logits [B, T, V], valid until the
        next round, for whoever looks for NaN. The first round has no draft tokens: the prompt's logits are at hand.
        """
        texts, room = [list(prompt) for prompt in prompts], list(budgets)
        if not any(room):
            return
        # A row at its end takes part in rounds of k draft tokens as long as others go on: k slots more than it needs.
        max_len = max(map(sum, zip(map(len, texts), room, strict=True))) + (self.draft_tokens or MOST_DRAFT_TOKENS)
        cache, step = decoder.start(len(texts), max_len)
        logits = decoder.model.logits(prefill(decoder, prompts, cache))[:, None]
        propose = self.draft.start(prompts, max_len, sampling)
        length = DraftLength(self.draft.cost(decoder.model) + len(texts) * VERIFY_COST[logits.device.type])
        nothing = Proposal(torch.empty(len(texts), 0, dtype=torch.int64, device=logits.device), None, [0] * len(texts))
        proposal, is_first = nothing, True
        while True:
            n_accepted, tokens = verify(logits, proposal, sampling)
            lengths = n_accepted.tolist()
            if not is_first:
                self._count(lengths, proposal.counts, room, length)
            kept = _keep(texts, room, tokens.tolist(), lengths, stops)
            values = _logprobs(logits, tokens).tolist() if logprobs else [[] for _ in kept]
            yield kept, [v[: len(row)] for v, row in zip(values, kept, strict=True)], logits
            if not any(room):
                return
            k = self.draft_tokens or length.next()
            limits = [min(k, n - 1) if n else 0 for n in room]
            proposal, is_first = propose(texts, limits) if any(limits) else nothing, False
            newest = torch.tensor([[text[-1]] for text in texts], device=logits.device)
            tokens = torch.cat((newest, proposal.tokens_Bk), 1)
            first = torch.tensor([[len(text) - 1] for text in texts], device=logits.device)
            logits = step(tokens, first + torch.arange(tokens.shape[1], device=logits.device))

    def _count(self, accepted: list[int], proposed: list[int], room: list[int], length: DraftLength) -> None:
        """Add a round of the rows that have not ended."""
        results = [(a, n) for a, n, left in zip(accepted, proposed, room, strict=True) if left]
        kept, stopped = sum(a for a, _ in results), sum(a < n for a, n in results)
        length.observe(kept, stopped)
        self.counts.rounds += len(results)
        self.counts.proposed += sum(n for _, n in results)
        self.counts.accepted += kept
        self.counts.rejected += stopped
        self.counts.cost += sum(1 + n * length.cost for _, n in results)


def verify(logits_BTV: Tensor, proposal: Proposal, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """How many draft tokens of each row are accepted, n [B], and tokens [B, T]: the first n + 1 are the row's next.

    `logits_BTV` are the target's at the newest token and at each draft token. At temperature 0 one is accepted if it is
    the target's choice. Otherwise with probability min(1, p / q), p being the target's distribution and q the draft's.
    In place of the first that is not, a token is drawn from max(p - q, 0), normalised; after the last, from p. So each
    token has distribution p (Leviathan et al. 2023, A.1). Both are what the sampler makes of the logits.
    """
    tokens_Bk, q_BkV, counts = proposal
    k, device = tokens_Bk.shape[1], tokens_Bk.device
    proposed_Bk = torch.arange(k, device=device) < torch.tensor(counts, device=device)[:, None]
    if sampling.temperature == 0 or k == 0:
        choices_BT = next_token(logits_BTV, *sampling)
        return _run_length(proposed_Bk & (choices_BT[:, :k] == tokens_Bk)), choices_BT
    p_BTV = logits_to_probs(logits_BTV, sampling.temperature, sampling.top_p, sampling.top_k)
    if q_BkV is None:
        q_BkV = F.one_hot(tokens_Bk, p_BTV.shape[-1]).to(p_BTV.dtype)
    q_BkV = torch.where(proposed_Bk[..., None], q_BkV, 0.0)
    p_Bk, q_Bk = (probs.gather(-1, tokens_Bk[..., None])[..., 0] for probs in (p_BTV[:, :k], q_BkV))
    noise_Bk = torch.rand(p_Bk.shape, generator=sampling.generator, device=device)
    n = _run_length(proposed_Bk & (noise_Bk * q_Bk < p_Bk))
    rows = torch.arange(len(n), device=device)
    p_BV, q_BV = p_BTV[rows, n], F.pad(q_BkV, (0, 0, 0, 1))[rows, n]  # q is 0 where nothing was proposed
    rest_BV = (p_BV - q_BV).clamp_min_(0)
    total_B1 = rest_BV.sum(-1, keepdim=True)
    # Nothing is left only where p and q are the same but for rounding.
    last = draw(torch.where(total_B1 > 0, rest_BV / total_B1, p_BV), sampling.generator)
    return n, F.pad(tokens_Bk, (0, 1)).scatter_(1, n[:, None], last[:, None])


def prefill(decoder: Decoder, prompts: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
    """Fill the cache with prompts of unequal length; final hidden states [B, dim] at the last token of each."""
    longest, device = max(map(len, prompts)), cache.k.device
    tokens = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    return decoder.last_hidden(tokens, last, cache)


def _draft_token(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """A draft's next token [B] and the distribution [B, V] it was drawn from, None at temperature 0."""
    if sampling.temperature == 0:
        return next_token(logits, *sampling), None
    probs = logits_to_probs(logits, sampling.temperature, sampling.top_p, sampling.top_k)
    if not probs.isfinite().all():
        raise NonFinite("the draft's logits are not finite; its weights are damaged, or --dtype=float32 helps")
    return draw(probs, sampling.generator), probs


def _run_length(accepted_Bk: Tensor) -> Tensor:
    """Length of the run of True that each row begins with, int64 [B]."""
    return accepted_Bk.long().cumprod(1).sum(1)


def _logprobs(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    """log p of each token under the model, before temperature and cuts, [B, T]."""
    return logits_BTV.float().log_softmax(-1).gather(-1, tokens_BT[..., None])[..., 0]


def _keep(
    texts: list[list[int]], room: list[int], tokens: list[list[int]], accepted: list[int], stops: Sequence[int]
) -> list[list[int]]:
    """Append to each text what its row gets: the accepted draft tokens and one more, up to a stop token or the budget.

    Updates `texts` and `room`, the tokens that each row may still get. Returns what was appended.
    """
    kept = []
    for row, (text, drawn, n) in enumerate(zip(texts, tokens, accepted, strict=True)):
        new = drawn[: min(n + 1, room[row])]
        end = next((i for i, token in enumerate(new) if token in stops), None)
        room[row] = room[row] - len(new) if end is None else 0
        text += new[:end]
        kept.append(new[:end])
    return kept


def _step_bytes(model: Transformer) -> float:
    """The time of a decode step, as the bytes that memory delivers meanwhile: weights, and calls of operations."""
    table = model.tok_embeddings.weight
    looked_up = 0 if model.output is None else table.nbytes
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return weights - looked_up + model.args.n_layers * LAYER_BYTES[table.device.type]


def check_vocabulary(draft: ModelArgs, target: ModelArgs) -> None:
    """Raise InputError for a draft whose ids cannot be the target's."""
    if draft.vocab_size != target.vocab_size:
        raise InputError(
            f"the draft has a vocabulary of {draft.vocab_size}, the model of {target.vocab_size}; "
            "a draft must have been trained with the model's tokenizer"
        )


def _check_decoding(decoder: Decoder) -> None:
    if decoder.decoding == "compiled":
        raise InputError("decoding 'compiled' would compile anew for each number of draft tokens; use auto or eager")
