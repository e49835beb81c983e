"""The KV cache: keys and values of every layer and position in one preallocated pair of tensors.

Created by the generation loop, passed down through `Transformer.forward`, owned by one generation; taking tokens back
(speculative decoding) is a smaller `pos`. Shapes never change, so that a decode step can be captured or compiled.
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
        self.k.zero_()
        self.v.zero_()

    def part(self, start: int, stop: int) -> KVCache:
        """Sequences start..stop-1 of the same storage."""
        view = copy.copy(self)
        view.k, view.v, view.sequences = self.k[:, start:stop], self.v[:, start:stop], self.sequences[: stop - start]
        return view

    def update(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor, pos: Tensor | None) -> tuple[Tensor, Tensor]:
        """Write K and V of T new tokens at `pos` ([B, T]; None: 0..T-1) and return the cached K and V of the layer.

        Raises ValueError under autograd: a cache is written in place, so it cannot be part of a backward pass. A
        position outside the slots is an IndexError on the CPU and a device assert on CUDA, never a lost write.
        """
        if k_BKTD.requires_grad:
            raise ValueError("a KV cache is for inference: run under torch.no_grad(), or train with cache=None")
        keys, values = self.k[layer], self.v[layer]
        if len(k_BKTD) != len(keys):
            raise ValueError(f"the cache was made for {len(keys)} sequences, not {len(k_BKTD)}")
        if pos is None:
            T = k_BKTD.shape[2]
            keys[:, :, :T], values[:, :, :T] = k_BKTD, v_BKTD
        else:
            # Indexed assignment touches T slots per sequence; scatter_ on a CPU copies the whole layer first (45 ms).
            # Unlike a slice, it does not convert: under autocast K and V come in a different dtype.
            keys.transpose(1, 2)[self.sequences, pos] = k_BKTD.transpose(1, 2).to(keys.dtype)
            values.transpose(1, 2)[self.sequences, pos] = v_BKTD.transpose(1, 2).to(values.dtype)
        return keys, values
