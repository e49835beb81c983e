"""How whole sequences and decode steps are computed: several ways, one meaning.

A step is called with the newest tokens of each row and their positions, both [B, T] int64, writes their keys and values
to its cache and returns logits [B, T, V]. Plain decoding has T = 1, speculative decoding verifies several at once:

    EagerStep      Transformer.forward, the slow twin of the others
    FusedStep      kernels/fused_step.py: on a GPU, what lies between the products in a few Triton kernels
    CapturedStep   one of these, recorded once for each T as a CUDA graph and replayed: no launch overhead, no Triton
    NativeStep     kernels/decode_step.py: bfloat16 on a CPU with AMX, at the speed of its memory; whole sequences
                   go through kernels/prefill.py there

`decoding` names the choice: "auto" takes the fastest that the machine has, "eager" the plain one, "compiled" sends the
eager step through torch.compile first, which takes a minute and is therefore never chosen on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from llama.cache import KVCache
from llama.errors import EnvironmentFailure
from llama.kernels.cpu import decode_step, prefill
from llama.kernels.cpu.decode_step import NativeStep
from llama.kernels.gpu import fused_step
from llama.kernels.gpu.fused_step import FusedStep
from llama.model import Transformer

DECODING = ("auto", "eager", "compiled")
# Tokens that go through the network at once before the first step (at least one row): the activations of this many,
# 20 bytes a token and unit of the feed-forward's hidden size, are what generation needs beyond weights and cache.
PREFILL_TOKENS = 1024
Step = Callable[[Tensor, Tensor], Tensor]
Result = TypeVar("Result")
WARM_UP = 3  # calls on a side stream before recording, so that libraries have allocated what they need


class EagerStep:
    """The model as it stands."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model, self.cache = model, cache

    def __call__(self, tokens: Tensor, pos: Tensor) -> Tensor:
        """Logits [B, T, V]."""
        return self.model(tokens, pos, self.cache)


def record(work: Callable[[], Result], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Result]:
    """`work` as a CUDA graph and the result that each replay computes anew. It runs some times before, not after."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device):  # a graph is recorded on the current one
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                work()
        with torch.cuda.graph(graph, stream=side):
            result = work()
    torch.cuda.current_stream(device).wait_stream(side)
    return graph, result


@dataclass(frozen=True)
class _Recording:
    """A CUDA graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    pos: Tensor
    logits: Tensor


class CapturedStep:
    """A step recorded as a CUDA graph at its first call with each T. Such a call overwrites the logits of the last."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._recordings: dict[torch.Size, _Recording] = {}

    def __call__(self, tokens: Tensor, pos: Tensor) -> Tensor:
        """Logits [B, T, V], valid until the next call of this shape."""
        recording = self._recordings.get(tokens.shape)
        if recording is None:
            recording = self._recordings[tokens.shape] = self._record(tokens.clone(), pos.clone())
        recording.tokens.copy_(tokens)
        recording.pos.copy_(pos)
        recording.graph.replay()
        return recording.logits

    def _record(self, tokens: Tensor, pos: Tensor) -> _Recording:
        """The calls before recording write the same keys and values to the same slots as the replay after it."""
        graph, logits = record(lambda: self._step(tokens, pos), tokens.device)
        return _Recording(graph, tokens, pos, logits)


class Decoder:
    """Makes caches and steps for one model, and keeps the last recorded or compiled one for calls of the same shape."""

    def __init__(self, model: Transformer, decoding: str) -> None:
        self.model, self.decoding = model, decoding
        self._kept: tuple[tuple, KVCache, Step] | None = None

    @property
    def name(self) -> str:
        """What a step of this model will be: native, eager, captured, or fused or compiled, and captured."""
        ways = {"compiled": self.decoding == "compiled", "fused": self._is_fused}
        ways |= {"captured": self._captures, "native": self._is_native}
        return " and ".join(way for way, is_used in ways.items() if is_used) or "eager"

    @property
    def _is_native(self) -> bool:
        return self.decoding == "auto" and decode_step.supports(self.model)

    @property
    def _is_fused(self) -> bool:
        return self.decoding == "auto" and fused_step.supports(self.model)

    @property
    def _captures(self) -> bool:
        return self.decoding != "eager" and self.model.tok_embeddings.weight.device.type == "cuda"

    def start(self, batch_size: int, max_len: int) -> tuple[KVCache, Step]:
        """An empty cache of `max_len` slots a row and the step that goes with it, until the next call."""
        if self._captures or self.decoding == "compiled":
            return self._start_prepared(batch_size, max_len)
        cache = self._new_cache(batch_size, max_len)
        return cache, self._new_step(cache)

    def _start_prepared(self, batch_size: int, max_len: int) -> tuple[KVCache, Step]:
        """A recorded or compiled step holds addresses: weights that were swapped make another one."""
        key = (batch_size, max_len, *(p.data_ptr() for p in self.model.parameters()))
        if self._kept is not None and self._kept[0] == key:
            _, cache, step = self._kept
            cache.clear()
            return cache, step
        self._kept = None  # frees its memory first
        cache = self._new_cache(batch_size, max_len)
        step = self._new_step(cache)
        step = self._compile(step) if self.decoding == "compiled" else step
        step = CapturedStep(step) if self._captures else step
        self._kept = (key, cache, step)
        return cache, step

    def _new_cache(self, batch_size: int, max_len: int) -> KVCache:
        device = self.model.tok_embeddings.weight.device
        return KVCache(self.model.args, batch_size, max_len, self.model.dtype, device)

    def _new_step(self, cache: KVCache) -> Step:
        if self._is_native:
            return NativeStep(self.model, cache)
        return FusedStep(self.model, cache) if self._is_fused else EagerStep(self.model, cache)

    def last_hidden(self, tokens: Tensor, last: Tensor, cache: KVCache | None) -> Tensor:
        """Final hidden states [B, dim] at position `last` [B] of whole sequences [B, T]; fills the cache if any.

        Some rows at a time, PREFILL_TOKENS says how many.
        """
        n_rows, n_tokens = tokens.shape
        size = max(1, PREFILL_TOKENS // n_tokens)
        part_hidden = prefill.last_hidden if self._is_native else _last_hidden
        states = []
        for start in range(0, n_rows, size):
            stop = min(start + size, n_rows)
            part = cache and cache.part(start, stop)
            states.append(part_hidden(self.model, tokens[start:stop], last[start:stop], part))
        return torch.cat(states)

    def _compile(self, step: Step) -> Step:
        if not torch._dynamo.is_dynamo_supported():
            raise EnvironmentFailure("torch.compile does not work here; use --decoding=auto")
        return torch.compile(step, fullgraph=True, dynamic=False)


def _last_hidden(model: Transformer, tokens: Tensor, last: Tensor, cache: KVCache | None) -> Tensor:
    """The slow twin of prefill.last_hidden."""
    rows = torch.arange(len(tokens), device=tokens.device)
    return model.hidden(tokens, None, cache)[rows, last]
