"""How whole sequences and decode steps are computed: in several ways that give the same result.

A step is called with the newest tokens of each sequence and their positions, both [B, T] int64, writes their keys and
values to its cache and returns logits [B, T, V]. Plain decoding has T = 1, speculative decoding verifies several:

    EagerStep      Transformer.forward, the slow twin of the others
    FusedStep      kernels/gpu/fused_step.py: on a GPU, what lies between the products in a few Triton kernels
    CapturedStep   one of these, recorded once for each T as a CUDA graph and replayed: no launch overhead, no Triton
    NativeStep     kernels/cpu/decode_step.py: bfloat16 on a CPU with AVX-512, at the speed of its memory; whole
                   sequences go through kernels/cpu/prefill.py there

`decoding` names the choice: "auto" takes the fastest that the machine has, "eager" the plain one, "compiled" sends the
eager step through torch.compile first, which takes a minute and is therefore never chosen on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from llama import device as devices
from llama.cache import Int8Cache, KVCache
from llama.errors import EnvironmentFailure, InputError
from llama.kernels.cpu import decode_step, prefill
from llama.kernels.cpu.decode_step import NativeStep
from llama.kernels.gpu import fused_step
from llama.kernels.gpu.fused_step import FusedStep
from llama.model import Transformer

DECODING = ("auto", "eager", "compiled")
CACHES = {"auto": KVCache, "int8": Int8Cache}  # "auto": in the dtype of the activations
# Tokens of prompts that go through the network at once: the activations of this many, ACTIVATIONS values per token and
# unit of the feed-forward's hidden size, are what generation needs beyond weights and cache. Far into a long text there
# are fewer, where a kernel needs it: what each may attend to is a mask of as many values as the text has positions,
# MASK_VALUES of them at once.
PREFILL_TOKENS, ACTIVATIONS = 1024, 5
MASK_VALUES = 1 << 23
Step = Callable[[Tensor, Tensor], Tensor]
Result = TypeVar("Result")
WARM_UP = 3  # calls on a side stream before recording, so that libraries have allocated what they need


class EagerStep:
    """The model as it stands; on a CPU over the slots in use alone, where to look at positions waits for nothing."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model, self.cache = model, cache

    def __call__(self, tokens: Tensor, pos: Tensor) -> Tensor:
        """Logits [B, T, V]."""
        cache = self.cache
        if pos.device.type == "cpu" and not torch.compiler.is_compiling():  # else the shapes must stay
            cache = cache.part(0, len(cache.sequences), int(pos.max()) + 1)
        return self.model(tokens, pos, cache)


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


@dataclass(frozen=True)
class Generation:
    """What one generation computes with, and no other one meanwhile."""

    model: Transformer
    cache: KVCache | None  # None: without it, whole sequences are all that can be computed
    kernel: Step | None  # that computes a step
    is_native: bool

    def step(self, tokens: Tensor, pos: Tensor) -> Tensor:
        """Logits [B, T, V] of the newest tokens at their positions, both [B, T]; writes the cache."""
        with self._threads(tokens):
            return self.kernel(tokens, pos)

    def last_logits(self, tokens: Tensor, last: Tensor, start: int = 0) -> Tensor:
        """Logits [B, V] at position `last` [B] of whole sequences [B, T]; fills the cache if any.

        start: the sequences stand behind so many positions that the cache holds already.
        """
        with self._threads(tokens):
            return self.model.logits(self.last_hidden(tokens, last, start))

    def _threads(self, tokens: Tensor) -> AbstractContextManager[None]:
        return devices.threads_for(2 * self.model.args.n_params() * tokens.numel(), tokens.device)

    def last_hidden(self, tokens: Tensor, last: Tensor, start: int = 0) -> Tensor:
        """Final hidden states [B, dim], as `last_logits`.

        Neighbours go through together while they are PREFILL_TOKENS at most, padding included. Longer ones go alone,
        without padding, and in parts, which attend to those before them in the cache.
        """
        fits = self.cache is None or tokens.numel() <= PREFILL_TOKENS
        lengths = [tokens.shape[1]] * len(tokens) if fits else (last + 1).tolist()
        states, first = [], 0
        while first < len(tokens):
            stop, longest = first + 1, lengths[first]
            while stop < len(tokens) and max(longest, lengths[stop]) * (stop + 1 - first) <= PREFILL_TOKENS:
                longest = max(longest, lengths[stop])
                stop += 1
            part = self.cache and self.cache.part(first, stop)
            states.append(self._hidden_in_parts(tokens[first:stop, :longest], last[first:stop], part, start))
            first = stop
        return torch.cat(states)

    def _hidden_in_parts(self, tokens: Tensor, last: Tensor, cache: KVCache | None, start: int) -> Tensor:
        """Of several sequences, or of one in parts."""
        T, part_hidden = tokens.shape[1], prefill.last_hidden if self.is_native else _last_hidden
        has_mask = not self.is_native or prefill.needs_mask(self.model.args.head_dim)
        most = MASK_VALUES // (start + T) if has_mask else PREFILL_TOKENS
        size = T if cache is None else max(1, min(PREFILL_TOKENS, most))
        for first in range(0, T, size):
            part = tokens[:, first : first + size]
            held = cache and cache.part(0, len(tokens), start + first + part.shape[1])
            with self._threads(part):
                h = part_hidden(self.model, part, (last - first).clamp(max=part.shape[1] - 1), held, start + first)
        return h


class Session:
    """A generation that stays open from prompt to prompt: what its cache holds of a new one is not computed again.

    The positions after the tokens that both have in common are taken back, which costs nothing: they are overwritten.
    """

    def __init__(self, run: Generation) -> None:
        self.run = run
        self.tokens: list[int] = []  # whose keys and values are in the cache
        self.n_computed = 0  # tokens that went through the network, in all

    @torch.no_grad()
    def read(self, prompt: list[int]) -> None:
        """Put a prompt into the cache. Raises InputError where it has no room there."""
        if not 1 <= len(prompt) <= self.run.cache.max_len:
            raise InputError(
                f"the prompt has {len(prompt)} tokens, outside 1 to max_seq_len={self.run.cache.max_len}; shorten it "
                "or raise max_seq_len"
            )
        tokens = torch.tensor([prompt], device=self.run.cache.k.device)
        self.last_logits(tokens, torch.tensor([len(prompt) - 1], device=tokens.device))

    def last_logits(self, tokens: Tensor, last: Tensor) -> Tensor:
        """Logits [1, V] at the end of a prompt [1, T]."""
        prompt, known = tokens[0].tolist(), 0
        while known < min(len(self.tokens), len(prompt) - 1) and self.tokens[known] == prompt[known]:
            known += 1
        self.tokens = self.tokens[:known]
        logits = self.run.last_logits(tokens[:, known:], last - known, known)
        self.tokens = prompt
        self.n_computed += len(prompt) - known
        return logits

    def step(self, tokens: Tensor, pos: Tensor) -> Tensor:
        """Logits [1, 1, V] of the newest token [1, 1] at its position."""
        logits = self.run.step(tokens, pos)
        self.tokens.append(tokens.item())  # it stands behind them: a prompt comes first, and steps follow
        self.n_computed += 1
        return logits


class Decoder:
    """Makes caches and steps for one model, and keeps the last recorded or compiled one for calls of the same shape."""

    def __init__(self, model: Transformer, decoding: str, cache_dtype: str = "auto") -> None:
        self.model, self.decoding, self.cache_dtype = model, decoding, cache_dtype
        self._kept: tuple[tuple, KVCache, Step] | None = None  # of a generation that has ended

    @property
    def name(self) -> str:
        """What a step of this model will be: native, eager, captured, or fused or compiled, and captured."""
        modes = {"compiled": self.decoding == "compiled", "fused": self._is_fused}
        modes |= {"captured": self._captures, "native": self._is_native}
        return " and ".join(mode for mode, is_used in modes.items() if is_used) or "eager"

    @property
    def why_slower(self) -> str | None:
        """What keeps this model from the fastest step, where it could have it."""
        if self.cache_dtype == "int8" and not self._is_native:
            return "which widens the int8 cache at each step: it saves memory and no time"
        return decode_step.why_not(self.model) if self.decoding == "auto" else None

    @property
    def _is_native(self) -> bool:
        return self.decoding == "auto" and decode_step.supports(self.model)

    @property
    def _is_fused(self) -> bool:
        return self.decoding == "auto" and self.cache_dtype == "auto" and fused_step.supports(self.model)

    @property
    def _captures(self) -> bool:
        return self.decoding != "eager" and self.model.tok_embeddings.weight.device.type == "cuda"

    @contextmanager
    def start(self, batch_size: int, max_len: int | None, cache: KVCache | None = None) -> Iterator[Generation]:
        """What a generation needs, its own until the block ends: an empty cache of `max_len` slots for each sequence
        and the step that goes with it, neither where `max_len` is None.

        cache: that of another generation, to read and write in place of an own one. Which kernels compute it is decided
        here, from the modules as they are now.
        """
        is_native = self._is_native
        if max_len is None:
            yield Generation(self.model, None, None, is_native)
        elif self._captures or self.decoding == "compiled":
            key = (batch_size, max_len, cache and cache.k.data_ptr(), *self._addresses())
            cache, step = self._take_prepared(key, cache) or self._prepare(batch_size, max_len, is_native, cache)
            try:
                yield Generation(self.model, cache, step, is_native)
            finally:
                self._kept = key, cache, step
        else:
            cache = cache or self._new_cache(batch_size, max_len)
            yield Generation(self.model, cache, self._new_step(cache, is_native), is_native)

    def _addresses(self) -> Iterator[int]:
        """What a recorded step reads; swapped weights need a new one."""
        return (tensor.data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers()))

    def _take_prepared(self, key: tuple, others: KVCache | None) -> tuple[KVCache, Step] | None:
        """The kept cache and step, if they are of this kind; else their memory is freed."""
        kept, self._kept = self._kept, None
        if kept is None or kept[0] != key:
            return None
        _, cache, step = kept
        if others is None:
            cache.clear()
        return cache, step

    def _prepare(self, batch_size: int, max_len: int, is_native: bool, cache: KVCache | None) -> tuple[KVCache, Step]:
        cache = cache or self._new_cache(batch_size, max_len)
        step = self._new_step(cache, is_native)
        step = self._compile(step) if self.decoding == "compiled" else step
        return cache, CapturedStep(step) if self._captures else step

    def _new_cache(self, batch_size: int, max_len: int) -> KVCache:
        device = self.model.tok_embeddings.weight.device
        kind = CACHES[self.cache_dtype]
        return kind(self.model.args, batch_size, max_len, self.model.dtype, device)

    def _new_step(self, cache: KVCache, is_native: bool) -> Step:
        if is_native:
            return NativeStep(self.model, cache)
        is_fused = self._is_fused and not isinstance(cache, Int8Cache)
        return FusedStep(self.model, cache) if is_fused else EagerStep(self.model, cache)

    def _compile(self, step: Step) -> Step:
        if not torch._dynamo.is_dynamo_supported():
            raise EnvironmentFailure("torch.compile does not work here; use decoding=auto")
        return torch.compile(step, fullgraph=True, dynamic=False)


def _last_hidden(model: Transformer, tokens: Tensor, last: Tensor, cache: KVCache | None, start: int) -> Tensor:
    """The slow twin of prefill.last_hidden."""
    B, T = tokens.shape
    pos = None if start == 0 else torch.arange(start, start + T, device=tokens.device).expand(B, T)
    return model.hidden(tokens, pos, cache)[torch.arange(B, device=tokens.device), last]
