"""Perplexity of a text longer than a model's context: token ids in, exp(mean -log p) out.

    result = evaluate(model, tokenizer.encode(text, bos=True, eos=False), context=2048)
    result.perplexity, result.loss, result.tokens

A model that sees `context` tokens at once reads a long text in windows. Which tokens are scored, and after how much
text, decides the figure as much as the model does:

    stride == context   chunks side by side, as papers on quantization count (GPTQ and those after it): a chunk knows
                        nothing of the one before, so its first token is not predicted and not scored.
    stride < context    sliding windows ("Perplexity of fixed-length models" of Hugging Face): every token but the first
                        of the text is scored, once, after at least context - stride tokens (or all before it).

The last window is as short as the text leaves it, and is scored; GPTQ drops it. llama.cpp counts otherwise: of each
chunk it scores the second half only. Hugging Face's published loop weighs the windows after the first by one token
too few each; here all tokens weigh alike.

Left out on purpose: text and files (evaluate.py), the begin-of-text token, which belongs to the ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from llama.cache import KVCache
from llama.device import dtype_name
from llama.errors import InputError, NonFinite
from llama.evaluation.intervals import LossSums
from llama.model import Transformer
from llama.training.loss import CHUNK, cross_entropy_sum


@dataclass(frozen=True)
class Window:
    """Tokens [start, stop) of a text, seen without any before them; those of [first, stop) are scored."""

    start: int
    first: int
    stop: int


@dataclass
class Perplexity(LossSums):
    """Loss of each window of a text: summed cross entropy in nats and number of scored tokens."""

    @property
    def tokens(self) -> int:
        return sum(self.counts)

    @property
    def windows(self) -> int:
        return len(self.sums)

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    def stretches(self, n_tokens: int) -> LossSums:
        """Sums over neighbouring windows, each stretch with at least `n_tokens` scored tokens where the text has them.

        For `confidence`: the few tokens by which a window slides are not independent of those around them.
        """
        merged = LossSums()
        for nats, count in zip(self.sums, self.counts, strict=True):
            if not merged.counts or merged.counts[-1] >= n_tokens:
                merged.sums.append(0.0)
                merged.counts.append(0)
            merged.sums[-1] += nats
            merged.counts[-1] += count
        return merged


def windows(n_tokens: int, context: int, stride: int) -> list[Window]:
    """The windows of a text, in order. Raises InputError where a setting is out of range."""
    if context < 2:
        raise InputError(f"context={context} is out of range; use at least 2 tokens, one to see and one to predict")
    if not 1 <= stride <= context:
        raise InputError(f"stride={stride} is out of range; use 1 to context={context} (more would skip text)")
    if n_tokens < 2:
        raise InputError(f"the text has too few tokens ({n_tokens}); it takes 2, one to see and one to predict")
    result, scored = [], 1  # nothing predicts the first token of the text
    for start in range(0, n_tokens, stride):
        stop = min(start + context, n_tokens)
        first = max(scored, start + 1)
        if first < stop:
            result.append(Window(start, first, stop))
        scored = stop
        if stop == n_tokens:
            break
    return result


@torch.no_grad()
def evaluate(
    model: Transformer,
    ids: Sequence[int],
    context: int,
    stride: int | None = None,
    batch_size: int = 1,
    progress: bool = False,
    cache_type: type[KVCache] | None = None,
) -> Perplexity:
    """Perplexity of a text, given as token ids, under any model, without dropout.

    context: tokens of a window. stride: tokens from one window's start to the next's; None: context. batch_size:
    windows that go through the network at once. progress: show a bar on a terminal. cache_type: attend to keys and
    values as such a cache gives them back, as decoding does; None: as they are.

    Logits are computed in the dtype of the model and everything after them in fp32 or wider, `CHUNK` positions at a
    time; sums over more than that are fp64. Raises InputError for settings out of range or ids outside the vocabulary,
    NonFinite naming the first window whose loss is not finite.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} is out of range; use at least 1")
    plan = list(windows(len(ids), context, context if stride is None else stride))
    if not 0 <= min(ids) <= max(ids) < model.args.vocab_size:
        raise InputError(f"the text holds a token outside the vocabulary of {model.args.vocab_size}")
    text = torch.tensor(ids, device=model.tok_embeddings.weight.device)
    result, was_training = Perplexity(), model.training
    total = sum(window.stop - window.first for window in plan)
    model.eval()
    try:
        with tqdm(total=total, unit="token", desc="perplexity", disable=None if progress else True, leave=False) as bar:
            for start in range(0, len(plan), batch_size):
                batch = plan[start : start + batch_size]
                for window, nats in zip(batch, _nats(model, text, batch, cache_type), strict=True):
                    _require_finite(model, window, nats)
                    result.sums.append(nats)
                    result.counts.append(window.stop - window.first)
                    bar.update(result.counts[-1])
    finally:
        model.train(was_training)
    return result


def _nats(model: Transformer, text: Tensor, batch: Sequence[Window], cache_type: type[KVCache] | None) -> list[float]:
    """-log p of the scored tokens of each window.

    Shorter windows are padded on the right, where causal attention hides the padding from everything that is scored.
    Nothing is predicted from the last token of a window, so it is not fed in.
    """
    tokens = text.new_zeros(len(batch), max(window.stop - 1 - window.start for window in batch))
    for sequence, window in zip(tokens, batch, strict=True):
        sequence[: window.stop - 1 - window.start] = text[window.start : window.stop - 1]
    cache = pos = None
    if cache_type is not None:
        cache = cache_type(model.args, *tokens.shape, model.dtype, tokens.device)
        pos = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    sums = []
    for h, window in zip(model.hidden(tokens, pos, cache), batch, strict=True):
        scored = h[window.first - 1 - window.start : window.stop - 1 - window.start]
        labels = text[window.first : window.stop]
        parts = zip(scored.split(CHUNK), labels.split(CHUNK), strict=True)
        sums.append(torch.stack([cross_entropy_sum(model.logits, *part).double() for part in parts]).sum())
    return torch.stack(sums).tolist()


def _require_finite(model: Transformer, window: Window, nats: float) -> None:
    """A mean loss whose exponential exceeds fp64 is as useless as infinity."""
    if not nats < 700 * (window.stop - window.first):  # also refuses NaN
        dtype = dtype_name(model.dtype)
        raise NonFinite(
            f"tokens {window.start} to {window.stop} of the text: the loss is not finite in {dtype} ({nats:g} nats); "
            "use dtype=float32, and if it already is, the weights are damaged"
        )
