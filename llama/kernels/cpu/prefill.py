"""Whole sequences on a CPU in bfloat16: PyTorch's matrix products, and C for what lies between two of them.

For prompts, and for every step without the KV cache. What makes it faster than its slow twin, `Transformer.hidden`:

- oneDNN copies the second operand of a product into its own layout. `F.linear` makes that the weight, 33 MB of it; here
  the feed-forward runs with features first, w x^T, and the copy is of the activations.
- RMSNorm, RoPE and SwiGLU are one pass each, in place where they can be.
- Only the hidden state at the last position of each sequence is needed. So the last block computes keys and values for
  all positions, and everything else for that one.
- Of quantized matrices some rows at a time become bfloat16 and are multiplied while the cache holds them, which takes
  no longer than with weights that are bfloat16 in memory. This rounds each weight once more, by 2^-9 of itself at most;
  the slow twin rounds as much: int8 the sum before its scale, int4 the weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.cache import KVCache
from llama.kernels.cpu.decode_step import Matrix, library
from llama.model import FeedForward, RMSNorm, Transformer, TransformerBlock, apply_rope, attend, rope_table

SLAB = 1 << 22  # weights that are widened at once: 8 MB, in the cache of every CPU that has AMX


@torch.no_grad()
def last_hidden(model: Transformer, tokens: Tensor, last: Tensor, cache: KVCache | None) -> Tensor:
    """Final hidden states [B, dim] at position `last` [B] of `tokens` [B, T], normalised.

    The model must be one that decode_step supports. Keys and values of positions 0..T-1 are written to the cache. The
    residual stream x is a matrix of a row per token, [B * T, dim]. In the last block it shrinks to a row per sequence:

                     all blocks but the last        the last block
        keys, values   every row of x                 every row of x
        queries        every row, causal              row b * T + last[b], over positions 0..last[b]
        wo, w1 w2 w3   every row                      that row; x is [B, dim] from here on
    """
    args, (B, T) = model.args, tokens.shape
    if cache is None:  # room for one layer, which every layer overwrites
        cache = KVCache(args, B, T, torch.bfloat16, tokens.device, n_layers=1)
    freqs_cis = rope_table(torch.arange(T)[None], model.rope_freqs)[0, :, 0].contiguous()  # [T, P, 2]
    x = model.tok_embeddings(tokens).flatten(0, 1)
    gate, up = x.new_empty(2, args.ffn_dim, B * T)  # once for all layers: new memory of this size costs page faults
    slab = x.new_empty(SLAB)
    last_rows = torch.arange(B) * T + last
    for i, block in enumerate(model.layers):
        h = _norm(block.attention_norm, x)
        keys, values = _store(block, h, freqs_cis, cache, i % len(cache.k), (B, T), slab)
        if i + 1 < args.n_layers:
            out = _attend(block, h, freqs_cis, keys, values, (B, T), slab)
        else:
            x, h = x[last_rows], h[last_rows]
            mask = (torch.arange(T) <= last[:, None])[:, None, None]
            out = _attend_last(block, h, freqs_cis[last], keys, values, mask, slab)
        x += _linear(block.attention.wo, out, slab)
        x += _feed_forward(block.feed_forward, _norm(block.ffn_norm, x), gate, up, slab)
    return _norm(model.norm, x)


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    library().rms_norm(x.data_ptr(), norm.weight.data_ptr(), y.data_ptr(), norm.eps, *x.shape)
    return y


def _heads(x: Tensor, freqs_cis: Tensor | None, out: Tensor, size: tuple[int, int]) -> Tensor:
    """[B * T, heads * D] rotated into the first T slots of `out` [B, heads, slots, D]."""
    angles = None if freqs_cis is None else freqs_cis.data_ptr()
    _, heads, slots, D = out.shape
    library().rotate_heads(x.data_ptr(), angles, out.data_ptr(), *size, heads, D, slots)
    return out


def _store(
    block: TransformerBlock,
    h: Tensor,
    freqs_cis: Tensor,
    cache: KVCache,
    layer: int,
    size: tuple[int, int],
    slab: Tensor,
) -> tuple[Tensor, Tensor]:
    """Keys and values of all positions, written to the cache and returned, [B, K, T, D] each."""
    attention, T = block.attention, size[1]
    keys = _heads(_linear(attention.wk, h, slab), freqs_cis, cache.k[layer], size)
    values = _heads(_linear(attention.wv, h, slab), None, cache.v[layer], size)
    return keys[:, :, :T], values[:, :, :T]


def _attend(
    block: TransformerBlock,
    h: Tensor,
    freqs_cis: Tensor,
    keys: Tensor,
    values: Tensor,
    size: tuple[int, int],
    slab: Tensor,
) -> Tensor:
    """Causal attention of every position, [B * T, dim]."""
    q = _linear(block.attention.wq, h, slab)
    D = keys.shape[-1]
    q = _heads(q, freqs_cis, q.new_empty(size[0], q.shape[-1] // D, size[1], D), size)
    return attend(q, keys, values, None).transpose(1, 2).reshape(h.shape[0], -1)


def _attend_last(
    block: TransformerBlock, h: Tensor, freqs_cis: Tensor, keys: Tensor, values: Tensor, mask: Tensor, slab: Tensor
) -> Tensor:
    """Attention of one position per sequence, [B, dim]; `freqs_cis` [B, P, 2] holds the angles of that position."""
    q_BTHD = _linear(block.attention.wq, h, slab)[:, None].unflatten(-1, (-1, keys.shape[-1]))
    q = apply_rope(q_BTHD, freqs_cis[:, None, None]).transpose(1, 2)
    return attend(q, keys, values, mask).flatten(1)


def _feed_forward(feed_forward: FeedForward, h: Tensor, gate: Tensor, up: Tensor, slab: Tensor) -> Tensor:
    """SwiGLU of h [rows, dim], features first inside; gate and up [F, at least rows] are overwritten."""
    gate, up = (buffer.view(-1)[: len(buffer) * len(h)].view(-1, len(h)) for buffer in (gate, up))
    _transposed_linear(feed_forward.w1, h.t(), gate, slab)
    _transposed_linear(feed_forward.w3, h.t(), up, slab)
    library().silu_mul(gate.data_ptr(), up.data_ptr(), gate.numel())
    # Adding the transposed view would take four times as long as this copy, for which h has room.
    out = _transposed_linear(feed_forward.w2, gate, h.new_empty(h.shape[1], len(h)), slab)
    return h.copy_(out.t())


def _linear(layer: nn.Module, h: Tensor, slab: Tensor) -> Tensor:
    """h w^T, [rows, N]."""
    if type(layer) is nn.Linear:
        return F.linear(h, layer.weight)
    y = h.new_empty(len(h), layer.out_features)
    for rows, w in _widened(layer, slab):
        torch.mm(h, w.t(), out=y[:, rows])
    return y


def _transposed_linear(layer: nn.Module, h: Tensor, out: Tensor, slab: Tensor) -> Tensor:
    """w h for h [K, rows], into `out` [N, rows]."""
    for rows, w in _widened(layer, slab):
        torch.mm(w, h, out=out[rows])
    return out


def _widened(layer: nn.Module, slab: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The weight in bfloat16: the whole of a plain layer, otherwise a slab at a time, which the next one overwrites."""
    n, k = layer.out_features, layer.in_features
    if type(layer) is nn.Linear:
        yield slice(0, n), layer.weight
        return
    matrix, size = Matrix.of(layer), max(1, len(slab) // k)
    slab = slab if len(slab) >= k else slab.new_empty(k)
    for start in range(0, n, size):
        stop = min(start + size, n)
        library().widen_rows(matrix, start, stop - start, k, slab.data_ptr())
        yield slice(start, stop), slab[: (stop - start) * k].view(-1, k)
