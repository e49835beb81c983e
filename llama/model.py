"""The Llama network, from the smallest part to the whole: RMSNorm, RoPE, Attention, FeedForward, Block, Transformer.

One forward serves training, generation with a KV cache and generation without. The model holds parameters and nothing
that changes: a cache is created by the caller and passed in, and `pos` says where each token stands.

Left out on purpose: sampling and the generation loop (generation.py), file formats (checkpoint/), model parallelism.

Shape suffixes:
    B  sequences      T  tokens of this call     S  keys that they may attend to     V  vocabulary
    H  query heads    K  key/value heads         D  size of one head                 P  rotated pairs, D / 2
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.config import ROPE_HIGH_FREQ_FACTOR, ROPE_LOW_FREQ_FACTOR, ROPE_ORIGINAL_CONTEXT, ModelArgs


class Cache(Protocol):
    """What attention needs of a KV cache, such as cache.KVCache."""

    max_len: int

    def update(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor, pos: Tensor | None) -> tuple[Tensor, Tensor]:
        """Store K and V of the new tokens; return the cached keys and values, each [B, K, S, D]."""
        ...


def _widen(x: Tensor) -> Tensor:
    """As fp32, or as it is where it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension (Zhang and Sennrich 2019). No mean, no bias."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = _widen(x)  # squares of 16-bit activations overflow fp16 and lose digits in bf16
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


def rope_frequencies(args: ModelArgs) -> Tensor:
    """Angle per position of each pair of head dimensions, fp32 [P]: theta^(-2i/D), rescaled for longer texts.

    `rope_linear_factor` slows all pairs down alike. With `use_scaled_rope`, of Llama 3.1 and 3.2, pairs that turn more
    than 4 times within the original context (8,192 positions) keep their frequency, those that turn less than once are
    slowed down by `rope_scale_factor`, those between are interpolated. Computed in fp32 in this order of operations
    because the released weights were trained with exactly those roundings: at position 100,000 one unit in the last
    place of a frequency is 1e-5 rad.
    """
    exponents = torch.arange(0, args.head_dim, 2, dtype=torch.int64, device="cpu").float() / args.head_dim
    freqs = 1.0 / (args.rope_theta**exponents)
    if args.rope_linear_factor is not None:
        return freqs / args.rope_linear_factor
    if not args.use_scaled_rope:
        return freqs
    wavelengths = 2 * math.pi / freqs
    turns = ROPE_ORIGINAL_CONTEXT / wavelengths
    smooth = (turns - ROPE_LOW_FREQ_FACTOR) / (ROPE_HIGH_FREQ_FACTOR - ROPE_LOW_FREQ_FACTOR)
    slowed = freqs / args.rope_scale_factor
    blended = (1 - smooth) * slowed + smooth * freqs
    scaled = torch.where(wavelengths > ROPE_ORIGINAL_CONTEXT / ROPE_LOW_FREQ_FACTOR, slowed, blended)
    return torch.where(wavelengths < ROPE_ORIGINAL_CONTEXT / ROPE_HIGH_FREQ_FACTOR, freqs, scaled)


def rope_table(pos_BT: Tensor, freqs_P: Tensor) -> Tensor:
    """cos and sin of every rotation as `freqs_cis`, fp32 [B, T, 1, P, 2] (the 1 is the head dimension)."""
    angles_BTP = pos_BT[:, :, None].float() * freqs_P
    return torch.stack((angles_BTP.cos(), angles_BTP.sin()), dim=-1)[:, :, None]


def apply_rope(x_BTHD: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotate the pairs (x0, x1), (x2, x3), ... of each head by the angle of their position (Su et al. 2021).

    Meta's checkpoints pair neighbours; Hugging Face's pair x_i with x_{i + D/2}, and their rows are reordered as they
    are loaded. In fp32 or wider: a 16-bit cosine is wrong by 1/500, a whole turn for distant positions.
    """
    pairs = _widen(x_BTHD).unflatten(-1, (-1, 2))
    x0, x1 = pairs.unbind(-1)
    cos, sin = freqs_cis.unbind(-1)
    return torch.stack((x0 * cos - x1 * sin, x0 * sin + x1 * cos), dim=-1).flatten(-2).to(x_BTHD.dtype)


Mask = Tensor | list[int] | None  # see `attend`


def attend(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask) -> Tensor:
    """softmax(q k^T / sqrt(D)) v as [B, H, T, D], for grouped heads: query head h reads key/value head h // (H / K).

    `mask` is [B, 1, T, S], True where attention is allowed; None means causal with S = T; a list has the lengths of
    texts that lie end to end through the batch, each causal by itself.
    """
    if isinstance(mask, list):
        given = (x.transpose(1, 2) for x in (q_BHTD, k_BKSD, v_BKSD))
        out = in_texts(lambda *text: attend(*(x.transpose(1, 2) for x in text), None).transpose(1, 2), *given, mask)
        return out.transpose(1, 2)
    (B, H, T, D), K = q_BHTD.shape, k_BKSD.shape[1]
    if mask is not None and (T == 1 or (H != K and not _kernel_groups_heads(q_BHTD, mask))):
        # With a cache S >> T. The H / K query heads of a key/value head, T rows each, become H / K * T rows of one
        # head, so that no kernel ever repeats K and V: only the small q and mask are rearranged.
        mask = mask if T == 1 else mask.repeat(1, 1, H // K, 1)
        out = F.scaled_dot_product_attention(q_BHTD.reshape(B, K, H // K * T, D), k_BKSD, v_BKSD, mask)
        return out.reshape(B, H, T, D)  # not view: the memory-efficient kernel returns a different memory layout
    if H != K and not _kernel_groups_heads(q_BHTD, mask):
        k_BKSD, v_BKSD = k_BKSD.repeat_interleave(H // K, dim=1), v_BKSD.repeat_interleave(H // K, dim=1)
    grouped = k_BKSD.shape[1] != H
    return F.scaled_dot_product_attention(q_BHTD, k_BKSD, v_BKSD, mask, is_causal=mask is None, enable_gqa=grouped)


def in_texts(causal: Callable, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, lengths: list[int]) -> Tensor:
    """`causal` attention [B, T, H, D] of each text: of all T * T scores, only those within texts are computed."""
    parts = (x.flatten(0, 1).split(lengths) for x in (q_BTHD, k_BTKD, v_BTKD))
    texts = [causal(*(part[None] for part in text)) for text in zip(*parts, strict=True)]
    return torch.cat(texts, 1).view(q_BTHD.shape)


def text_lengths(pos_BT: Tensor) -> list[int]:
    """A position that does not follow the one before it begins a new text."""
    starts = F.pad(pos_BT[:, 1:] != pos_BT[:, :-1] + 1, (1, 0), value=True).flatten().nonzero()[:, 0]
    return starts.diff(append=starts.new_tensor([pos_BT.numel()])).tolist()


def _kernel_groups_heads(q: Tensor, mask: Tensor | None) -> bool:
    """Whether the fused kernel that will run takes fewer K/V heads than query heads.

    On a CPU it does. On CUDA only flash attention does, which needs sm_80, 16 bits and no mask; asking elsewhere would
    fall back to arithmetic that stores all T * S scores, far more than K and V repeated.
    """
    if q.device.type != "cuda":
        return True
    is_flash = mask is None and q.dtype in (torch.float16, torch.bfloat16)
    return is_flash and torch.cuda.get_device_capability(q.device) >= (8, 0)


class Attention(nn.Module):
    """Causal self-attention, rotary positions, H / K query heads per key/value head (GQA, Ainslie et al. 2023)."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, args.head_dim
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def forward(self, x: Tensor, freqs_cis: Tensor, mask: Mask, pos: Tensor | None, cache: Cache | None) -> Tensor:
        # .unflatten instead of a stored head count: a pruned projection may have fewer heads
        q_BTHD, k_BTKD, v_BTKD = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q = apply_rope(q_BTHD, freqs_cis).transpose(1, 2)
        k = apply_rope(k_BTKD, freqs_cis).transpose(1, 2)
        v = v_BTKD.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(self.layer, k, v, pos)  # as the cache returns them: int8 is the same in parts or whole
            if mask is None:  # the tokens start at position 0, and attend to each other alone
                k, v = k[:, :, : x.shape[1]], v[:, :, : x.shape[1]]
        return self.wo(attend(q, k, v, mask).transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): w2(silu(w1 x) * w3 x)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.ffn_dim, bias=False)  # gate
        self.w2 = nn.Linear(args.ffn_dim, args.dim, bias=False)  # down
        self.w3 = nn.Linear(args.dim, args.ffn_dim, bias=False)  # up

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)): the norm is inside the residual branch."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.attention = Attention(args, layer)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: Tensor, freqs_cis: Tensor, mask: Mask, pos: Tensor | None, cache: Cache | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), freqs_cis, mask, pos, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class TokenEmbedding(nn.Embedding):
    """The table of token vectors, which is also the output head of a model with tied embeddings."""

    def reset_parameters(self) -> None:
        # nn.Embedding draws from N(0, 1); on the meta device that alone imports half of PyTorch, 1.7 s and 75 MB.
        nn.init.uniform_(self.weight, -0.02, 0.02)

    def project(self, h: Tensor) -> Tensor:
        """Logits [..., V]: the dot product of each hidden state with each row of the table."""
        return F.linear(h, self.weight)


class Transformer(nn.Module):
    """A Llama text model. State-dict keys are Meta's; a tied head has no key (`output` is None)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        if args.vocab_size == -1:
            raise ValueError("vocab_size: must be resolved (dataclasses.replace) before a model is built")
        self.args = args
        self.tok_embeddings = TokenEmbedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(args, layer) for layer in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = None if args.tie_word_embeddings else nn.Linear(args.dim, args.vocab_size, bias=False)
        self.register_buffer("rope_freqs", rope_frequencies(args), persistent=False)

    def _apply(self, fn, recurse: bool = True):
        # model.to(bfloat16) casts buffers too and would round the frequencies; to_empty() would leave them undefined.
        super()._apply(fn, recurse)
        if self.rope_freqs.device.type != "meta":
            self.rope_freqs = rope_frequencies(self.args).to(self.rope_freqs.device)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and the KV cache: that of the norms, which quantization leaves alone."""
        return self.norm.weight.dtype

    @property
    def params(self) -> ModelArgs:
        """Meta's name of `args`."""
        return self.args

    @classmethod
    def random(
        cls, args: ModelArgs, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
    ) -> Transformer:
        """A model of random weights, made in `dtype` on `device` at once, not in fp32 on the CPU first."""
        with torch.device("meta"):
            model = cls(args)
        model = model.to(dtype).to_empty(device=device)
        model.init_weights(torch.Generator(device).manual_seed(seed))
        return model

    def init_weights(self, generator: torch.Generator | None = None, std: float = 0.02) -> None:
        """Random weights as GPT-2 starts: N(0, std), those that write to the residual divided by sqrt(2 n_layers)."""
        for name, weight in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(weight)
            else:
                residual = name.endswith(("wo.weight", "w2.weight"))
                scale = std / math.sqrt(2 * self.args.n_layers) if residual else std
                nn.init.normal_(weight, std=scale, generator=generator)

    def hidden(self, tokens: Tensor, pos: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Final hidden states [B, T, dim], normalised, ready for `logits`. Arguments as in `forward`.

        Public so that prefill projects only the positions it needs and a loss need not hold all logits at once.
        """
        B, T = tokens.shape
        if pos is None:  # from the start of the sequence: plain causal attention, no mask needed
            mask = None
            pos_BT = torch.arange(T, device=tokens.device).expand(B, T)
        else:
            pos_BT = pos
            if cache is None:
                mask = text_lengths(pos)
            else:
                mask = torch.arange(cache.max_len, device=pos.device) <= pos[:, None, :, None]  # [B, 1, T, S]
        freqs_cis = rope_table(pos_BT, self.rope_freqs)
        x = self.tok_embeddings(tokens)
        for block in self.layers:
            x = block(x, freqs_cis, mask, pos, cache)
        return self.norm(x)

    def logits(self, h: Tensor) -> Tensor:
        """Project hidden states [..., dim] to the vocabulary [..., V]."""
        return self.tok_embeddings.project(h) if self.output is None else self.output(h)

    def forward(self, tokens: Tensor, pos: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Logits [B, T, V] in the dtype of the weights.

        tokens: [B, T] int64.
        pos: [B, T] int64, the position of each token, default 0..T-1 in every sequence; it alone drives RoPE, the
            cache writes and the mask (a key is visible where its position is <= the query's). Without a cache a
            sequence may hold several texts end to end, each with positions from 0: they do not see each other.
        cache: keys and values of earlier positions are read from it and those of `tokens` written to it; None is
            "KV cache off", and the form used in training.
        """
        return self.logits(self.hidden(tokens, pos, cache))
