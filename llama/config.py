"""Hyper-parameters of the Llama family, and the arithmetic that follows from them.

`ModelArgs` has Meta's field names, so that a `params.json` reads straight into it. Sizes, FLOPs and bytes are methods
here, so that no benchmark derives them again; the tests compare each with a model that was really built.
Needs no torch.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

# RoPE scaling of Llama 3.1 and 3.2: wavelengths beyond the original context are stretched by `rope_scale_factor`.
ROPE_ORIGINAL_CONTEXT = 8192
ROPE_LOW_FREQ_FACTOR = 1.0
ROPE_HIGH_FREQ_FACTOR = 4.0

# Meta's params.json says `use_scaled_rope` but neither the factor nor whether the head is tied; both follow from the
# shape (dim, n_layers, n_heads, n_kv_heads). Meta's own code uses 8 for every shape, which is wrong for 1B and 3B.
KNOWN_SHAPES: dict[tuple[int, int, int, int], dict[str, Any]] = {
    (2048, 16, 32, 8): {"rope_scale_factor": 32.0, "tie_word_embeddings": True},  # Llama 3.2 1B
    (3072, 28, 24, 8): {"rope_scale_factor": 32.0, "tie_word_embeddings": True},  # Llama 3.2 3B
    (4096, 32, 32, 8): {"rope_scale_factor": 8.0, "tie_word_embeddings": False},  # Llama 3.1 8B
    (8192, 80, 64, 8): {"rope_scale_factor": 8.0, "tie_word_embeddings": False},  # Llama 3.1 and 3.3 70B
    (16384, 126, 128, 8): {"rope_scale_factor": 8.0, "tie_word_embeddings": False},  # Llama 3.1 405B
    (16384, 126, 128, 16): {"rope_scale_factor": 8.0, "tie_word_embeddings": False},  # the same, MP16 release
}

# Beyond these nothing is a Llama; they keep a hostile file from costing more than an error.
LARGEST = {"dim": 1 << 20, "n_layers": 1024, "n_heads": 1 << 16, "multiple_of": 1 << 20}


@dataclass(frozen=True)
class ModelArgs:
    """The shape of one Llama model. Raises ValueError naming the field where a value is impossible.

    The defaults are what Meta's loader assumes for a field that `params.json` leaves out: those of Llama 2 7B.
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # None: one per query head (no grouping)
    head_dim: int | None = None  # not Meta's; None: dim / n_heads
    vocab_size: int = -1  # -1 in Llama 2's params.json: taken from the checkpoint
    multiple_of: int = 256  # ffn_dim is rounded up to a multiple of this
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    use_scaled_rope: bool = False
    rope_scale_factor: float | None = None  # not Meta's; None: from KNOWN_SHAPES if use_scaled_rope
    rope_linear_factor: float | None = None  # not Meta's; positions are divided by it (Chen et al. 2023)
    tie_word_embeddings: bool | None = None  # not Meta's; None: from KNOWN_SHAPES, else False
    max_seq_len: int | None = None  # the longest text that the model is meant for; None: see `trained_context`

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "n_heads", "multiple_of"):
            _require(name, getattr(self, name), int, 1, LARGEST[name])
        if self.n_kv_heads is not None:
            _require("n_kv_heads", self.n_kv_heads, int, 1, self.n_heads)
        known = KNOWN_SHAPES.get((self.dim, self.n_layers, self.n_heads, self.n_kv_heads or self.n_heads), {})
        if self.n_kv_heads is None:
            self._set("n_kv_heads", self.n_heads)
        if self.head_dim is None:
            if self.dim % self.n_heads:
                raise ValueError(f"n_heads: {self.n_heads} does not divide dim {self.dim}, and there is no head_dim")
            self._set("head_dim", self.dim // self.n_heads)
        if self.tie_word_embeddings is None:
            self._set("tie_word_embeddings", known.get("tie_word_embeddings", False) and self.use_scaled_rope)
        if self.use_scaled_rope and self.rope_scale_factor is None:
            if not known:
                raise ValueError(
                    "rope_scale_factor: use_scaled_rope is set for a shape that is not a known Llama; "
                    "say which factor it was trained with (32 for Llama 3.2, 8 for Llama 3.1)"
                )
            self._set("rope_scale_factor", known["rope_scale_factor"])
        self._check()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the documented way to fill in a field of a frozen dataclass

    def _check(self) -> None:
        if self.vocab_size != -1:
            _require("vocab_size", self.vocab_size, int, 1, 1 << 24)
        if self.max_seq_len is not None:
            _require("max_seq_len", self.max_seq_len, int, 1, 1 << 30)
        _require("head_dim", self.head_dim, int, 1, LARGEST["dim"])
        for name in ("norm_eps", "rope_theta"):
            _require(name, getattr(self, name), float, 1e-12, 1e12)
        if self.ffn_dim_multiplier is not None:
            _require("ffn_dim_multiplier", self.ffn_dim_multiplier, float, 1e-3, 1e3)
        if self.rope_scale_factor is not None:
            if not self.use_scaled_rope:
                raise ValueError("rope_scale_factor: has no effect without use_scaled_rope; set that, or leave it out")
            _require("rope_scale_factor", self.rope_scale_factor, float, 1.0, 1e6)
        if self.rope_linear_factor is not None:
            if self.use_scaled_rope:
                raise ValueError("rope_linear_factor: excludes use_scaled_rope, which scales in another way")
            _require("rope_linear_factor", self.rope_linear_factor, float, 1e-3, 1e6)
        for name in ("use_scaled_rope", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: must be true or false, not {getattr(self, name)!r}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: {self.head_dim} is odd; RoPE rotates pairs")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads: {self.n_kv_heads} does not divide n_heads {self.n_heads}")

    @classmethod
    def from_params(cls, params: dict[str, Any]) -> ModelArgs:
        """Read the content of a `params.json`. Raises ValueError for a field that this code would not honour.

        Meta's own dataclass has `max_batch_size` as well, for a cache that is made to measure here: it is passed over.
        """
        params = {name: value for name, value in params.items() if name != "max_batch_size"}
        names = {field.name for field in fields(cls)}
        for name in params:
            if name not in names:
                raise ValueError(f"{name}: unknown field; known are {', '.join(sorted(names))}")
        return cls(**params)

    def to_params(self) -> dict[str, Any]:
        """The content of a `params.json`; fields outside Meta's schema only where the shape does not imply them."""
        params = {name: value for name, value in asdict(self).items() if value is not None}
        for name in ("head_dim", "tie_word_embeddings", "rope_scale_factor"):
            lean = {key: value for key, value in params.items() if key != name}
            with contextlib.suppress(ValueError):  # scaled RoPE, unknown shape: the factor has to be written down
                params = lean if ModelArgs(**lean) == self else params
        return params

    # Shapes

    @property
    def ffn_dim(self) -> int:
        """Hidden size of the feed-forward: 2/3 of 4 * dim, times the multiplier, rounded up to `multiple_of`."""
        hidden = 2 * (4 * self.dim) // 3
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * math.ceil(hidden / self.multiple_of)

    def with_ffn_dim(self, ffn_dim: int) -> ModelArgs:
        """The same shape with a feed-forward of this hidden size.

        Meta's params.json has no field for the size itself, so a multiplier and a rounding are chosen that give it.
        """
        _require("ffn_dim", ffn_dim, int, 1, LARGEST["dim"])
        for multiple_of in (256, 1024):
            for multiplier in (None, 1.0, 1.3, 1.5):  # those of the released models
                args = replace(self, multiple_of=multiple_of, ffn_dim_multiplier=multiplier)
                if args.ffn_dim == ffn_dim:
                    return args
        exact = (ffn_dim + 0.5) / (2 * (4 * self.dim) // 3)  # rounded down when used, hence the half
        return replace(self, multiple_of=1, ffn_dim_multiplier=exact)

    @property
    def trained_context(self) -> int:
        """The longest text that the model is meant for. Nothing in the network depends on it.

        Where no field says it, what the released models of this kind were trained on: 131,072 tokens where RoPE is
        scaled (Llama 3.1, 3.2), 8,192 for Llama 3 (theta 500,000), 4,096 for Llama 2.
        """
        if self.max_seq_len is not None or self.use_scaled_rope:
            return self.max_seq_len or 131_072
        return ROPE_ORIGINAL_CONTEXT if self.rope_theta >= 500_000 else 4096

    # Counts

    def block_linear_params(self) -> int:
        """Weights in the matrix products of one block: wq, wk, wv, wo, w1, w2, w3."""
        q_dim, kv_dim = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        return 2 * self.dim * q_dim + 2 * self.dim * kv_dim + 3 * self.dim * self.ffn_dim

    def n_params(self) -> int:
        """Stored parameters; a tied head is counted once."""
        tables = self.vocab_size * self.dim * (1 if self.tie_word_embeddings else 2)
        norms = (2 * self.n_layers + 1) * self.dim
        return tables + self.n_layers * self.block_linear_params() + norms

    def weight_bytes(self, bytes_per_param: float) -> int:
        return int(self.n_params() * bytes_per_param)

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """K and V of all layers: 2 * n_layers * n_kv_heads * head_dim values."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * bytes_per_value

    def kv_cache_bytes(self, batch_size: int, max_len: int, bytes_per_value: int) -> int:
        return batch_size * max_len * self.kv_bytes_per_token(bytes_per_value)

    def forward_flops(self, n_tokens: int, start: int = 0, logit_rows: int = 1) -> int:
        """Floating-point operations in the matrix products of one sequence's forward pass.

        Two per weight and token, plus attention: a token at position p multiplies its query with p + 1 keys and sums
        p + 1 values (2 * n_heads * head_dim each, times 2). `start` tokens are in the cache already; `logit_rows`
        positions are projected to the vocabulary.
        """
        body = 2 * self.n_layers * self.block_linear_params() * n_tokens
        attention = self.n_layers * 4 * self.n_heads * self.head_dim * sum(range(start + 1, start + n_tokens + 1))
        return body + attention + 2 * self.vocab_size * self.dim * logit_rows


def _require(name: str, value: Any, kind: type, low: float, high: float) -> None:
    """A number of the right kind within sane bounds, so that nothing huge is allocated before the error."""
    right = isinstance(value, int) if kind is int else isinstance(value, (int, float))
    if not right or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name}: {value!r} is not a{'n integer' if kind is int else ' number'} in {low:g}..{high:g}")


_LLAMA3 = {"vocab_size": 128_256, "norm_eps": 1e-5, "rope_theta": 500_000.0, "use_scaled_rope": True}
_TINY = {**_LLAMA3, "vocab_size": 4096, "rope_scale_factor": 32.0, "tie_word_embeddings": True}

PRESETS: dict[str, ModelArgs] = {
    "llama3.2-1b": ModelArgs(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, ffn_dim_multiplier=1.5, **_LLAMA3),
    "llama3.2-3b": ModelArgs(dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, ffn_dim_multiplier=1.0, **_LLAMA3),
    "llama3.1-8b": ModelArgs(n_kv_heads=8, ffn_dim_multiplier=1.3, multiple_of=1024, **_LLAMA3),
    "llama3.1-70b": ModelArgs(
        dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, ffn_dim_multiplier=1.3, multiple_of=4096, **_LLAMA3
    ),
    "llama2-7b": ModelArgs(vocab_size=32_000),
    "smollm2-135m": ModelArgs(
        dim=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        multiple_of=256,
        vocab_size=49_152,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
        max_seq_len=8192,
    ),
    # The embedded model (data/tiny) and the draft for it: 3.2's architecture, small enough to ship.
    "tiny": ModelArgs(dim=256, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim_multiplier=1.5, **_TINY),
    "tiny-draft": ModelArgs(dim=64, n_layers=3, n_heads=2, n_kv_heads=1, multiple_of=64, **_TINY),
}
