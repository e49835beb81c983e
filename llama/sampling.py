"""From logits to a token. All decoding (cached or not, batched, speculative) shares these functions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

HEAD = 512  # tokens that the nucleus is looked for among, before all are sorted


class Sampling(NamedTuple):
    """How tokens are drawn. min_p and repetition_penalty are what transformers calls so.

    Only ids below `n_words` are: a table may be padded, or extended for words to come, beyond the tokenizer's.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    generator: torch.Generator | None = None
    n_words: int | None = None  # None: all

    def probs(self, logits: Tensor) -> Tensor:
        """The distribution [..., n_words] for logits [..., V]."""
        return logits_to_probs(logits[..., : self.n_words], self.temperature, self.top_p, self.top_k, self.min_p)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [B, V] in which the tokens that a sequence holds already, `seen` [B, V], are less probable.

    A positive logit is divided by `penalty`, a negative one multiplied (Keskar et al. 2019).
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def logits_to_probs(
    logits: Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int | None = None, min_p: float = 0.0
) -> Tensor:
    """The distribution that a token is drawn from: fp32 [..., V], each summing to 1.

    softmax(logits / temperature), then only the top_k most probable tokens, then only the nucleus: the smallest set of
    most probable tokens whose probabilities reach top_p (Holtzman et al. 2020), then only those that are at least min_p
    times as probable as the most probable one (Nguyen et al. 2024). Exactly one-hot at temperature 0.
    """
    logits = logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    # The largest logit is taken off before the division, so that a small temperature cannot give inf - inf.
    probs = torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, dim=-1)
    if top_k is not None and top_k < probs.shape[-1]:
        smallest_kept = probs.topk(top_k, dim=-1).values[..., -1:]
        probs = torch.where(probs < smallest_kept, 0.0, probs)
    if top_p < 1.0:
        least = top_p * probs.sum(-1, keepdim=True)  # the sum is less than 1 after top_k
        ordered, order = _most_probable(probs, least)
        before = ordered.cumsum(-1) - ordered  # mass of the tokens that are more probable: 0 for the first, so it stays
        ordered = torch.where(before >= least, 0.0, ordered)
        probs = torch.zeros_like(probs).scatter_(-1, order, ordered)
    if min_p > 0:
        probs = torch.where(probs < min_p * probs.amax(-1, keepdim=True), 0.0, probs)
    return probs / probs.sum(-1, keepdim=True)


def _most_probable(probs: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities in falling order and their tokens: all, or so many that they reach `least` [..., 1].

    On a CPU a vocabulary of 128,256 takes 10 ms to sort, and its most probable few, which nearly always are enough,
    half of one to find. A GPU would have to wait for the answer whether they are.
    """
    if probs.device.type == "cpu" and probs.shape[-1] > HEAD:
        head = probs.topk(HEAD, dim=-1)
        if (head.values.sum(-1, keepdim=True) > least).all():
            return head.values, head.indices
    ordered = probs.sort(dim=-1, descending=True)
    return ordered.values, ordered.indices


def draw(probs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """An index into the last dimension of [..., V], drawn with those probabilities, as int64 [...].

    With independent E_i ~ Exp(1), argmax p_i / E_i is i with probability p_i. Unlike torch.multinomial this needs no
    check of its input on the host, so the device never waits.
    """
    noise = torch.empty_like(probs).exponential_(generator=generator)
    return (probs / noise.clamp_min_(torch.finfo(probs.dtype).tiny)).argmax(-1)


def next_token(logits: Tensor, sampling: Sampling) -> Tensor:
    """The next token for logits [..., V], int64 [...]; the most probable one at temperature 0."""
    if sampling.temperature == 0:  # what draw() would give for a one-hot distribution, without V random numbers
        return logits[..., : sampling.n_words].max(-1).indices  # a third of argmax's time on a CPU in 16 bits
    return draw(sampling.probs(logits), sampling.generator)
