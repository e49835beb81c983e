"""A decode step on a GPU with fewer, larger operations: what lies between the products is fused, in Triton.

A step of Llama 3.2 1B is about 800 operations in PyTorch, of which 113 are products; launching each of the others takes
a GPU longer than their work. Here 81 kernels do it: 65 for RMSNorm with the sum before it, the rotation with the write
into the cache, and SwiGLU, and 16 for attention, which read the cache up to the positions in use. 16 more join the
parts of attention where a cache is long enough to be split. Many tokens at once attend through PyTorch, over all slots.
Products are the modules' own, so adapters, quantized and pruned layers work alike. Its slow twin is
`Transformer.forward` with a cache, which rounds at the same places, but for those inside attention.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llama.cache import KVCache
from llama.kernels import gpu
from llama.model import Attention, FeedForward, RMSNorm, Transformer, TransformerBlock, attend, rope_table

PLAIN = {Transformer, TransformerBlock, Attention, FeedForward, RMSNorm}  # whose forward this replaces


def supports(model: Transformer) -> bool:
    """Whether the step computes what `model` computes, on a device that has its kernels."""
    if gpu.ops(model.norm.weight.device) is None or model.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    blocks = [each for block in model.layers for each in (block, *block.children())]
    return all(_is_plain(module) for module in (model, model.norm, *blocks))


def _is_plain(module: nn.Module) -> bool:
    """One of our own classes, without hooks, which need its forward."""
    return type(module) in PLAIN and not module._forward_hooks and not module._forward_pre_hooks


class FusedStep:
    """One decode step of `model` over `cache`: call it with the newest tokens and their positions, both [B, T]."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self._ops = gpu.ops(cache.k.device)
        self._slots = torch.arange(cache.max_len, device=cache.k.device)

    def __call__(self, tokens: Tensor, pos: Tensor) -> Tensor:
        """Logits [B, T, V]. A position outside the slots is a device assert, as a token outside the vocabulary is.

        Raises ValueError where the cache was made for a different number of sequences, and under autograd.
        """
        ops, model, cache = self._ops, self.model, self.cache
        if torch.is_grad_enabled():
            raise ValueError("a fused step is for inference: run under torch.no_grad()")
        if len(tokens) != cache.k.shape[1]:
            raise ValueError(f"the cache was made for {cache.k.shape[1]} sequences, not {len(tokens)}")
        pos = self._slots.index_select(0, pos.flatten()).view_as(pos)  # which a negative one cannot pass, unlike [pos]
        freqs_cis = rope_table(pos, model.rope_freqs)
        x, delta = model.tok_embeddings(tokens), None
        for block, keys, values in zip(model.layers, cache.k, cache.v, strict=True):
            attention, feed_forward = block.attention, block.feed_forward
            x, h = ops.add_rms_norm(x, delta, block.attention_norm.weight, block.attention_norm.eps)
            q, k, v = attention.wq(h), attention.wk(h), attention.wv(h)
            q = ops.rotate_and_store(q, k, v, freqs_cis, pos, keys, values)
            if ops.attends(q, keys):
                heads = ops.attend(q, keys, values, pos)
            else:
                heads = attend(q, keys, values, self._slots <= pos[:, None, :, None])  # mask [B, 1, T, S]
            delta = attention.wo(heads.transpose(1, 2).flatten(-2))
            x, h = ops.add_rms_norm(x, delta, block.ffn_norm.weight, block.ffn_norm.eps)
            delta = feed_forward.w2(ops.silu_mul(feed_forward.w1(h), feed_forward.w3(h)))
        return model.logits(ops.add_rms_norm(x, delta, model.norm.weight, model.norm.eps)[1])
