"""Whole sequences on a CPU in bfloat16: PyTorch's matrix products, and C for what lies between two of them.

For prompts, and for every step without the KV cache. What makes it faster than its slow twin, `Transformer.hidden`:

- oneDNN copies the second operand of a product into its own layout. `F.linear` makes that the weight, 33 MB of it; here
  the feed-forward runs with features first, w x^T, and the copy is of the activations.
- RMSNorm, RoPE and SwiGLU are one pass each, in place where they can be.
- Only the hidden state at the last position of each sequence is needed. So the last block computes keys and values for
  all positions, and everything else for that one.
- Intel's CPUs multiply fp32 faster than bfloat16 where they have no AMX, a Xeon 1.7 times as fast. There some rows
  of a matrix at a time become fp32, and so do some heads of keys and values; what is kept is bfloat16 all the same.
- Where there is neither AMX nor faster fp32, attention is a kernel of our own (prefill_attention.py).
- Of an int8 cache some heads at a time become bfloat16, not a layer: 134 MB of 65,536 positions of Llama 3.2 1B.
- Of quantized matrices some rows at a time become bfloat16 and are multiplied while the cache holds them, which takes
  no longer than with weights that are bfloat16 in memory. This rounds each weight once more, by 2^-9 of itself at most;
  the slow twin rounds as much: int8 the sum before its scale, int4 the weight.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.cache import Int8Cache, KVCache
from llama.kernels.cpu import prefill_attention
from llama.kernels.cpu.decode_step import Matrix, library
from llama.model import Attention, FeedForward, RMSNorm, Transformer, apply_rope, attend, rope_table

SLAB = 1 << 22  # bytes / 2 of weights that are widened at once: 8 MB, which a CPU's cache holds
FEWEST_WIDE = 128  # rows below which the time goes into widening


@functools.cache
def fp32_is_faster() -> bool:
    """Whether this CPU multiplies fp32 in less time than bfloat16."""
    about = Path("/proc/cpuinfo")
    return not torch.cpu._is_amx_tile_supported() and about.exists() and "GenuineIntel" in about.read_text()


def needs_mask(head_dim: int) -> bool:
    """Whether tokens behind others take a mask [T, start + T]; PyTorch's kernels do, our own does not."""
    return fp32_is_faster() or not prefill_attention.is_faster(head_dim)


@torch.no_grad()
def last_hidden(model: Transformer, tokens: Tensor, last: Tensor, cache: KVCache | None, start: int = 0) -> Tensor:
    """Final hidden states [B, dim] at token `last` [B] of `tokens` [B, T], normalised.

    The model must be one that decode_step supports. The tokens stand at positions start..start + T - 1, where their
    keys and values are written to the cache; those before them are in it. The residual stream x is a matrix of a row
    per token, [B * T, dim]. In the last block it shrinks to a row per sequence:

                     all blocks but the last        the last block
        keys, values   every row of x                 every row of x
        queries        every row, causal              row b * T + last[b], over positions 0..start + last[b]
        wo, w1 w2 w3   every row                      that row; x is [B, dim] from here on
    """
    B, T = tokens.shape
    if cache is None:  # room for one layer, which every layer overwrites
        cache = KVCache(model.args, B, T, torch.bfloat16, tokens.device, n_layers=1)
    cache = cache.part(0, B, start + T)
    run = _Run(model, B, T, start)
    x = model.tok_embeddings(tokens).flatten(0, 1)
    last_rows = torch.arange(B) * T + last
    for i, block in enumerate(model.layers):
        h = _norm(block.attention_norm, x)
        layer = i % len(cache.k)
        run.store(block.attention, h, cache, layer)
        if i + 1 < len(model.layers):
            out = run.attend(block.attention, h, cache, layer)
        else:
            x, h = x[last_rows], h[last_rows]
            out = run.attend_last(block.attention, h, cache, layer, last)
        x += run.linear(block.attention.wo, out)
        x += run.feed_forward(block.feed_forward, _norm(block.ffn_norm, x))
    return _norm(model.norm, x)


class _Run:
    """The parts of a block, and the buffers that all blocks share: new memory of this size costs page faults."""

    def __init__(self, model: Transformer, B: int, T: int, start: int) -> None:
        self.B, self.T, self.start, self.head_dim = B, T, start, model.args.head_dim
        pos = torch.arange(start, start + T)
        self.freqs_cis = rope_table(pos[None], model.rope_freqs)[0, :, 0].contiguous()  # [T, P, 2]
        self.dtype = torch.float32 if fp32_is_faster() and B * T >= FEWEST_WIDE else torch.bfloat16
        self.mask = None  # the first tokens need none; else [1, 1, T, start + T], to be added to the scores
        self.is_own = not needs_mask(self.head_dim)
        if start > 0 and not self.is_own:
            hidden = torch.arange(start + T) > pos[:, None]
            self.mask = torch.zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, -torch.inf)[None, None]
        self.gate, self.up = torch.empty(2, model.args.ffn_dim, B * T, dtype=torch.bfloat16)
        self.slab, self.wide = torch.empty(SLAB, dtype=torch.bfloat16), torch.empty(SLAB // 2)

    def store(self, attention: Attention, h: Tensor, cache: KVCache, layer: int) -> None:
        """Write keys and values to the cache."""
        k, v = self.linear(attention.wk, h), self.linear(attention.wv, h)
        if isinstance(cache, Int8Cache):
            shape = (self.B, k.shape[-1] // self.head_dim, self.T, self.head_dim)
            keys, values = self._heads(k, k.new_empty(shape)), self._heads(v, v.new_empty(shape), rotated=False)
            pos = torch.arange(self.start, self.start + self.T).expand(self.B, self.T)
            cache.write(layer, keys, values, pos)
        else:
            self._heads(k, cache.k[layer, :, :, self.start :])
            self._heads(v, cache.v[layer, :, :, self.start :], rotated=False)

    def attend(self, attention: Attention, h: Tensor, cache: KVCache, layer: int) -> Tensor:
        """Causal attention of every position, [B * T, dim]."""
        q = self.linear(attention.wq, h)
        q = self._heads(q, q.new_empty(self.B, q.shape[-1] // self.head_dim, self.T, self.head_dim))
        parts = []
        for heads, keys, values in self._stored(cache, layer, q):
            if self.is_own:
                parts.append(prefill_attention.attention(q[:, heads], keys, values, self.start))
                continue
            out = attend(q[:, heads].to(self.dtype), keys.to(self.dtype), values.to(self.dtype), self.mask)
            parts.append(out.transpose(1, 2).to(h.dtype))
        return torch.cat(parts, 2).view(len(h), -1)

    def attend_last(self, attention: Attention, h: Tensor, cache: KVCache, layer: int, last: Tensor) -> Tensor:
        """Attention of position `last` of each sequence, [B, dim], for h [B, dim] at those positions."""
        q_BTHD = self.linear(attention.wq, h)[:, None].unflatten(-1, (-1, self.head_dim))
        q = apply_rope(q_BTHD, self.freqs_cis[last][:, None, None]).transpose(1, 2)
        mask = (torch.arange(cache.max_len) <= self.start + last[:, None])[:, None, None]
        parts = [attend(q[:, heads], keys, values, mask) for heads, keys, values in self._stored(cache, layer, q)]
        return torch.cat(parts, 1).flatten(1)

    def _stored(self, cache: KVCache, layer: int, q: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Heads of q, and keys and values [B, n, S, D] that they attend to; some at a time where these are widened."""
        K, is_widened = cache.k.shape[2], isinstance(cache, Int8Cache) or self.dtype is torch.float32
        n, group = max(1, SLAB // cache.k[0, :, 0].numel()) if is_widened else K, q.shape[1] // K
        for first in range(0, K, n):
            yield slice(first * group, (first + n) * group), *cache.read(layer, slice(first, first + n))

    def _heads(self, x: Tensor, out: Tensor, rotated: bool = True) -> Tensor:
        """[B * T, heads * D] into the first T slots of `out` [B, heads, slots, D], a part of a cache or all of it."""
        angles = self.freqs_cis.data_ptr() if rotated else None
        heads, D = out.shape[1], out.shape[3]
        slots = out.stride(1) // D  # from one head to the next
        library().rotate_heads(x.data_ptr(), angles, out.data_ptr(), self.B, self.T, heads, D, slots)
        return out

    def feed_forward(self, feed_forward: FeedForward, h: Tensor) -> Tensor:
        """SwiGLU of h [M, dim], features first inside; h is overwritten."""
        gate, up = (part.view(-1)[: len(part) * len(h)].view(-1, len(h)) for part in (self.gate, self.up))
        self._transposed_linear(feed_forward.w1, h.t(), gate)
        self._transposed_linear(feed_forward.w3, h.t(), up)
        library().silu_mul(gate.data_ptr(), up.data_ptr(), gate.numel())
        # Adding the transposed view would take four times as long as this copy, for which h has room.
        out = self._transposed_linear(feed_forward.w2, gate, h.new_empty(h.shape[1], len(h)))
        return h.copy_(out.t())

    def linear(self, layer: nn.Module, h: Tensor) -> Tensor:
        """h w^T, [M, N]."""
        if type(layer) is nn.Linear and self.dtype is h.dtype:
            return F.linear(h, layer.weight)
        y = h.new_empty(len(h), layer.out_features)
        h = h.to(self.dtype)
        for rows, w in self._widened(layer):
            _multiply(h, w.t(), y[:, rows])
        return y

    def _transposed_linear(self, layer: nn.Module, h: Tensor, out: Tensor) -> Tensor:
        """w h for h [K, M], into `out` [N, M]."""
        h = h.to(self.dtype)
        for rows, w in self._widened(layer):
            _multiply(w, h, out[rows])
        return out

    def _widened(self, layer: nn.Module) -> Iterator[tuple[slice, Tensor]]:
        """The weight in the dtype of products: as it is if it has that, else some rows, overwritten by the next."""
        n, k = layer.out_features, layer.in_features
        is_plain, is_wide = type(layer) is nn.Linear, self.dtype is torch.float32
        if is_plain and not is_wide:
            yield slice(0, n), layer.weight
            return
        matrix, size = Matrix.of(layer), max(1, SLAB // (1 + is_wide) // k)
        slab, wide = (_at_least(x, size * k) for x in (self.slab, self.wide))
        for start in range(0, n, size):
            rows = slice(start, min(start + size, n))
            w = layer.weight[rows] if is_plain else slab[: (rows.stop - start) * k].view(-1, k)
            if not is_plain:
                library().widen_rows(matrix, start, rows.stop - start, w.data_ptr())
            yield rows, wide[: w.numel()].view(w.shape).copy_(w) if is_wide else w


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype is out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))


def _at_least(x: Tensor, n: int) -> Tensor:
    return x if len(x) >= n else x.new_empty(n)


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    library().rms_norm(x.data_ptr(), norm.weight.data_ptr(), y.data_ptr(), norm.eps, *x.shape)
    return y
