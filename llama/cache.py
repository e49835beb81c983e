"""The KV cache: keys and values of every layer and position in one preallocated pair of tensors.

In the dtype of the activations, or in int8. Created by the generation loop, passed down through `Transformer.forward`,
owned by one generation; taking tokens back (speculative decoding) is a smaller `pos`. Shapes never change, so that a
decode step can be captured or compiled.
Two prompts, three tokens later; each sequence writes at its own `pos`, over the padding of the shorter prompt:

    slot          0      1      2      3      4      5
    sequence 0    The    little fox    ran    away   -        next write at slot 5
    sequence 1    Once   upon   a      time   -      -        next write at slot 4
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from llama.config import ModelArgs


class KVCache:
    """Keys and values, each [n_layers, batch, n_kv_heads, max_len, head_dim]; 2 * that many values of `dtype`."""

    parts: tuple[str, ...] = ("k", "v")

    def __init__(
        self,
        args: ModelArgs,
        batch_size: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device | str,
        n_layers: int | None = None,
    ) -> None:
        shape = (n_layers or args.n_layers, batch_size, args.n_kv_heads, max_len, args.head_dim)
        # Zeros, not empty: a masked slot still enters as 0 * v, and 0 * NaN would be NaN.
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.sequences = torch.arange(batch_size, device=device)[:, None]
        self.max_len = max_len

    def clear(self) -> None:
        """Start over in place, for a recorded step that holds the addresses."""
        for name in self.parts:
            getattr(self, name).zero_()

    def part(self, start: int, stop: int, max_len: int | None = None) -> KVCache:
        """Sequences start..stop-1 of the same storage, and their first `max_len` slots."""
        view = copy.copy(self)
        for name in self.parts:
            setattr(view, name, getattr(self, name)[:, start:stop, :, :max_len])
        view.sequences = self.sequences[: stop - start]
        view.max_len = max_len or self.max_len
        return view

    def update(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor, pos: Tensor | None) -> tuple[Tensor, Tensor]:
        """Write K and V of T new tokens at `pos` ([B, T]; None: 0..T-1) and return the cached K and V of the layer.

        Raises ValueError under autograd: a cache is written in place, so it cannot be part of a backward pass. A
        position outside the slots is an IndexError on the CPU and a device assert on CUDA, never a lost write.
        """
        self.write(layer, k_BKTD, v_BKTD, pos)
        return self.read(layer)

    def write(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor, pos: Tensor | None) -> None:
        """The first half of `update`."""
        if k_BKTD.requires_grad:
            raise ValueError("a KV cache is for inference: run under torch.no_grad(), or train with cache=None")
        if len(k_BKTD) != self.k.shape[1]:
            raise ValueError(f"the cache was made for {self.k.shape[1]} sequences, not {len(k_BKTD)}")
        self._keep("k", layer, k_BKTD, pos)
        self._keep("v", layer, v_BKTD, pos)

    def read(self, layer: int, heads: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The second half of `update`, of some key/value heads or all."""
        return self._held("k", layer, heads), self._held("v", layer, heads)

    def _keep(self, name: str, layer: int, values: Tensor, pos: Tensor | None) -> None:
        self._write(getattr(self, name)[layer], values, pos)

    def _held(self, name: str, layer: int, heads: slice) -> Tensor:
        return getattr(self, name)[layer][:, heads]

    def _write(self, slots: Tensor, values: Tensor, pos: Tensor | None) -> None:
        """`values` [B, K, T, ...] into the slots [B, K, S, ...] at `pos`."""
        if pos is None:
            slots[:, :, : values.shape[2]] = values
        else:
            # Indexed assignment touches T slots per sequence; scatter_ on a CPU copies the whole layer first (45 ms).
            # Unlike a slice, it does not convert: under autocast K and V come in a different dtype.
            slots.transpose(1, 2)[self.sequences, pos] = values.transpose(1, 2).to(slots.dtype)


AT_ONCE = 1 << 20  # codes of some positions that are widened at once: a CPU's cache holds what they are in fp32


class Int8Cache(KVCache):
    """The same in little more than half the memory: int8 codes, and an fp32 scale for each position of each head.

    A value is code * scale, with scale = max |values of the position| / 127. `read` widens to `dtype`, which takes
    longer than reading 16 bits; the C step reads the codes.
    """

    parts = ("k", "v", "k_scales", "v_scales")

    def __init__(
        self,
        args: ModelArgs,
        batch_size: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device | str,
        n_layers: int | None = None,
    ) -> None:
        super().__init__(args, batch_size, max_len, torch.int8, device, n_layers)
        self.dtype = dtype
        self.k_scales = torch.zeros(self.k.shape[:-1], device=device)
        self.v_scales = torch.zeros_like(self.k_scales)

    def _keep(self, name: str, layer: int, values: Tensor, pos: Tensor | None) -> None:
        codes, scales = encode(values)
        super()._keep(name, layer, codes, pos)
        super()._keep(f"{name}_scales", layer, scales, pos)

    def _held(self, name: str, layer: int, heads: slice) -> Tensor:
        codes, scales = super()._held(name, layer, heads), super()._held(f"{name}_scales", layer, heads)
        values = codes.new_empty(codes.shape, dtype=self.dtype)
        n = max(1, AT_ONCE // codes[:, :, 0].numel())
        for value, code, scale in zip(*(x.split(n, dim=2) for x in (values, codes, scales)), strict=True):
            value.copy_(code * scale[..., None])
        return values


def encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of x [..., D], and scales fp32 [...]: |x - code * scale| <= scale / 2."""
    largest = x.float().abs().amax(-1)
    scales = torch.where(largest == 0, 1.0, largest / 127)
    return (x.float() / scales[..., None]).round().to(torch.int8), scales
