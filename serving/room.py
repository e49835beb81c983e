"""What one loaded model offers the page: its forms side by side, its drafts, and the visitors' conversations.

The forms share what they can: an adapter stands on the base's own weights, and a quantized form is made when somebody
first asks for it. All generations of all visitors go through one engine.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from llama import Llama, adapters
from llama.conversation import Conversation
from llama.decoding import ACTIVATIONS, CACHES
from llama.model import Transformer
from llama.quantization import Quantization, quantization_of, quantized_copy
from llama.speculative import Draft, ModelDraft, PromptLookup, Proposal, Proposer, Speculation
from serving.engine import Engine
from serving.text import Piece, pieces

FORMS = {8: Quantization(8), 4: Quantization(4, 32, zero_points=True)}
KINDS = ("compare", "chat", "tokens")  # of generations that a visitor may have at once, one of each
CONVERSATIONS = 8  # whose caches are kept; those of visitors that were longest away go first


def with_adapter(llama: Llama, adapter: str, base: Callable[[], str] | None) -> Llama:
    """The model with an adapter on it, beside the model without: they share the weights."""
    shared = {id(tensor): tensor for tensor in (*llama.model.parameters(), *llama.model.buffers())}
    model = copy.deepcopy(llama.model, shared)
    adapters.load(model, adapter, base)
    return like(llama, model.eval())


def like(llama: Llama, model: Transformer) -> Llama:
    """Another model, with a model's tokenizer and limits."""
    decoder = llama.decoder
    return Llama(
        model, llama.tokenizer, llama.max_seq_len, 1, decoding=decoder.decoding, cache_dtype=decoder.cache_dtype
    )


@dataclass(frozen=True)
class Side:
    """One column: a form of the model, and how it generates. build: the form, made by the worker when it is needed."""

    label: str
    build: Callable[[], Llama]
    use_cache: bool = True
    draft: Callable[[], Draft] | None = None

    def start(self, ids: list[int], max_gen_len: int, top: int, **settings: Any) -> Iterator[Marked]:
        """The generation, greedy unless settings say otherwise. All work is the iterator's, that is the worker's."""
        draft = None if self.draft is None else Watched(self.draft())
        settings = {"temperature": 0, "use_cache": self.use_cache, **settings}
        speculation = None if draft is None else Speculation(draft)
        yield from marked(pieces(self.build(), ids, max_gen_len, top, speculation=speculation, **settings), draft)

    def memory(self, n_tokens: int) -> tuple[int, int]:
        """Bytes by shapes: of the weights, and of the cache with so many tokens, or of what takes its place."""
        model, decoder = self.build().model, self.build().decoder
        tensors = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
        if self.use_cache:
            slot = CACHES[decoder.cache_dtype](model.args, 1, 1, model.dtype, "meta")
            return sum(tensors.values()), n_tokens * sum(getattr(slot, name).nbytes for name in slot.parts)
        return sum(tensors.values()), ACTIVATIONS * model.args.ffn_dim * n_tokens * model.dtype.itemsize


class Watched(Draft):
    """A draft whose last proposal can be looked at."""

    def __init__(self, draft: Draft) -> None:
        self.draft, self.last, self.n = draft, [], 0
        self.check, self.cost = draft.check, draft.cost

    @contextmanager
    def start(self, *args: Any) -> Iterator[Proposer]:
        """That of the draft."""
        with self.draft.start(*args) as propose:

            def watched(texts: list[list[int]], limits: list[int]) -> Proposal:
                proposal = propose(texts, limits)
                self.last, self.n = list(proposal.tokens[0]), self.n + 1
                return proposal

            yield watched


@dataclass(frozen=True)
class Marked:
    """A piece, whether a draft proposed its token, and the tokens that it proposed in place of it and behind."""

    piece: Piece
    is_accepted: bool = False
    rejected: tuple[int, ...] = ()


def marked(work: Iterator[Piece], draft: Watched | None) -> Iterator[Marked]:
    """Pieces with what the draft proposed. The proposal of a round is there before the first of its tokens comes."""
    n, drafted = 0, []
    for piece in work:
        if draft is not None and draft.n != n:
            n, drafted = draft.n, draft.last
        is_accepted = bool(drafted) and drafted[0] == piece.token
        yield Marked(piece, is_accepted, () if is_accepted or piece.token is None else tuple(drafted))
        drafted = drafted[1:] if is_accepted else []


class Kept(Conversation):
    """A conversation with a session of its own, whose cache is free when nobody holds the conversation any more."""

    def __init__(self, llama: Llama) -> None:
        self._held = ExitStack()
        super().__init__(llama, self._held.enter_context(llama.start_session()), {})


class Room:
    """base: the model that was loaded. adapted: with an adapter, if any; it is then what talks and completes."""

    def __init__(
        self, base: Llama, engine: Engine, adapted: Llama | None = None, draft: Transformer | None = None
    ) -> None:
        self.base, self.engine, self.adapted, self._draft_model = base, engine, adapted, draft
        self.llama = adapted or base
        self._made: dict[int, Llama] = {}
        self._conversations: OrderedDict[str, Kept] = OrderedDict()

    @property
    def can_chat(self) -> bool:
        """Whether the tokenizer has a chat format."""
        try:
            return bool(self.llama.formatter.kind())
        except ValueError:
            return False

    @cached_property
    def drafts(self) -> dict[str, Callable[[], Draft]]:
        """Drafts by name."""
        found: dict[str, Callable[[], Draft]] = {"lookup in the text": PromptLookup}
        if self._draft_model is not None:
            found["a smaller model"] = lambda: ModelDraft(self._draft_model, self.base.decoder.decoding)
        if self._is_plain:
            found["its own weights in 4 bits"] = lambda: ModelDraft(self.form(4).model, self.base.decoder.decoding)
        return found

    @cached_property
    def comparisons(self) -> dict[str, tuple[Side, Side]]:
        """What can stand side by side."""
        plain = Side("KV cache on", lambda: self.llama)
        found = {"KV cache on or off": (plain, replace(plain, label="KV cache off", use_cache=False))}
        if self._is_plain:
            bits = torch.finfo(self.base.model.dtype).bits
            forms = {n: Side(f"{n} bits", lambda n=n: self.form(n)) for n in FORMS}
            forms = {bits: Side(f"{bits} bits", lambda: self.base)} | forms
            for many, few in ((bits, 8), (bits, 4), (8, 4)):
                found[f"{many} or {few} bits"] = forms[many], forms[few]
        for name, draft in self.drafts.items():
            found[f"draft: {name}"] = replace(plain, label="without a draft"), replace(plain, label=name, draft=draft)
        if self.adapted is not None:
            found["base or adapter"] = Side("base", lambda: self.base), Side("adapter", lambda: self.adapted)
        return found

    @property
    def _is_plain(self) -> bool:
        """Whether there are weights to quantize."""
        return quantization_of(self.base.model) is None

    def form(self, bits: int) -> Llama:
        """The base quantized, made once, which may take a while. For the worker."""
        if bits not in self._made:
            self._made[bits] = like(self.base, quantized_copy(self.base.model, FORMS[bits]))
        return self._made[bits]

    def conversation(self, visitor: str) -> Conversation:
        """A visitor's, with the cache that his last turn left; or a new one. For the worker."""
        found = self._conversations[visitor] = self._conversations.pop(visitor, None) or Kept(self.llama)
        while len(self._conversations) > CONVERSATIONS:
            self._conversations.popitem(last=False)
        return found

    def forget(self, visitor: str) -> None:
        """A visitor has left: end what he has running, and free his cache."""
        for kind in KINDS:
            self.engine.cancel(f"{visitor} {kind}")
        self.engine.soon(lambda: self._conversations.pop(visitor, None))
