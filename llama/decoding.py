"""How whole sequences and decode steps are computed: several ways, one meaning.

A step is called with the newest token of each row and its position, both [B] int64, writes their keys and values to its
cache and returns logits [B, V]:

    EagerStep      Transformer.forward, the slow twin of the others
    CapturedStep   the same, recorded once as a CUDA graph and replayed: no launch overhead, no Triton, any NVIDIA card
    NativeStep     kernels/decode_step.py: bfloat16 on a CPU with AMX, at the speed of its memory; whole sequences
                   go through kernels/prefill.py there

`decoding` names the choice: "auto" takes the fastest that the machine has, "eager" the plain one, "compiled" sends the
eager step through torch.compile first, which takes a minute and is therefore never chosen on its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llama.cache import KVCache
from llama.errors import EnvironmentFailure
from llama.kernels import prefill
from llama.kernels.decode_step import NativeStep, supports
from llama.model import Transformer

DECODING = ("auto", "eager", "compiled")
Step = Callable[[Tensor, Tensor], Tensor]


class EagerStep:
    """The model as it stands."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model, self.cache = model, cache

    def __call__(self, token: Tensor, pos: Tensor) -> Tensor:
        """Logits [B, V]."""
        return self.model(token[:, None], pos[:, None], self.cache)[:, 0]


class CapturedStep:
    """A step recorded as a CUDA graph at its first call. Its logits are overwritten by the next call."""

    WARM_UP = 3  # calls on a side stream before recording, so that libraries have allocated what they need

    def __init__(self, step: Step) -> None:
        self._step, self._graph = step, None

    def __call__(self, token: Tensor, pos: Tensor) -> Tensor:
        """Logits [B, V], valid until the next call."""
        if self._graph is None:
            self._record(token, pos)
        self._token.copy_(token)
        self._pos.copy_(pos)
        self._graph.replay()
        return self._logits

    def _record(self, token: Tensor, pos: Tensor) -> None:
        """The calls before recording write the same keys and values to the same slots as the replay after it."""
        self._token, self._pos = token.clone(), pos.clone()
        side = torch.cuda.Stream(token.device)
        side.wait_stream(torch.cuda.current_stream(token.device))
        with torch.cuda.stream(side):
            for _ in range(self.WARM_UP):
                self._step(self._token, self._pos)
        torch.cuda.current_stream(token.device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._step(self._token, self._pos)


class Decoder:
    """Makes caches and steps for one model, and keeps the last recorded or compiled one for calls of the same shape."""

    def __init__(self, model: Transformer, decoding: str) -> None:
        self.model, self.decoding = model, decoding
        self._kept: tuple[tuple, KVCache, Step] | None = None

    @property
    def name(self) -> str:
        """What a step of this model will be: native, captured, eager, compiled, or compiled and captured."""
        ways = {"compiled": self.decoding == "compiled", "captured": self._captures, "native": self._is_native}
        return " and ".join(way for way, is_used in ways.items() if is_used) or "eager"

    @property
    def _is_native(self) -> bool:
        return self.decoding == "auto" and supports(self.model)

    @property
    def _captures(self) -> bool:
        return self.decoding != "eager" and self.model.tok_embeddings.weight.device.type == "cuda"

    def start(self, batch_size: int, max_len: int) -> tuple[KVCache, Step]:
        """An empty cache of `max_len` slots a row and the step that goes with it, until the next call."""
        if self._captures or self.decoding == "compiled":
            return self._start_prepared(batch_size, max_len)
        cache = self._new_cache(batch_size, max_len)
        return cache, NativeStep(self.model, cache) if self._is_native else EagerStep(self.model, cache)

    def _start_prepared(self, batch_size: int, max_len: int) -> tuple[KVCache, Step]:
        """A recorded or compiled step holds addresses: weights that were swapped make another one."""
        key = (batch_size, max_len, *(p.data_ptr() for p in self.model.parameters()))
        if self._kept is not None and self._kept[0] == key:
            _, cache, step = self._kept
            cache.clear()
            return cache, step
        self._kept = None  # frees its memory first
        cache = self._new_cache(batch_size, max_len)
        step = EagerStep(self.model, cache)
        step = self._compile(step) if self.decoding == "compiled" else step
        step = CapturedStep(step) if self._captures else step
        self._kept = (key, cache, step)
        return cache, step

    def _new_cache(self, batch_size: int, max_len: int) -> KVCache:
        weight = self.model.tok_embeddings.weight
        return KVCache(self.model.args, batch_size, max_len, weight.dtype, weight.device)

    def last_hidden(self, tokens: Tensor, last: Tensor, cache: KVCache | None) -> Tensor:
        """Final hidden states [B, dim] at position `last` [B] of whole sequences [B, T]; fills the cache if any."""
        if self._is_native:
            return prefill.last_hidden(self.model, tokens, last, cache)
        rows = torch.arange(len(tokens), device=tokens.device)
        return self.model.hidden(tokens, None, cache)[rows, last]

    def _compile(self, step: EagerStep) -> Step:
        if not torch._dynamo.is_dynamo_supported():
            raise EnvironmentFailure("torch.compile does not work here; use --decoding=auto")
        return torch.compile(step, fullgraph=True, dynamic=False)
