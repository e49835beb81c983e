"""Counts, bytes and operations of a model by arithmetic, for sentences of the reports; nothing measured is in them."""

from __future__ import annotations

import math

from llama.config import ROPE_HIGH_FREQ_FACTOR, ROPE_LOW_FREQ_FACTOR, ROPE_ORIGINAL_CONTEXT, ModelArgs
from llama.lora import LoRAConfig
from reports.training_tables import CHANGED, SLOWER


def facts(args: ModelArgs) -> dict[str, str]:
    """Each fact as text. 256 + 32 tokens is the work of Table 1; bytes are of 16-bit numbers unless named 32."""
    lora = LoRAConfig()
    widths = {"wq": args.dim, "wv": args.n_kv_heads * args.head_dim}
    trained = args.n_layers * sum(lora.r * (args.dim + widths[name]) for name in lora.targets)
    turns = [
        ROPE_ORIGINAL_CONTEXT / 2 / math.pi * args.rope_theta ** (-i / args.head_dim)
        for i in range(0, args.head_dim, 2)
    ]
    kept, slowed = sum(t > ROPE_HIGH_FREQ_FACTOR for t in turns), sum(t < ROPE_LOW_FREQ_FACTOR for t in turns)
    cached = args.forward_flops(256) + sum(args.forward_flops(1, start=256 + i) for i in range(31))
    uncached = sum(args.forward_flops(256 + i) for i in range(32))
    kv_token = args.kv_bytes_per_token(2)
    return {
        "n_params": f"{args.n_params():,}",
        "weights_16": f"{args.weight_bytes(2) / 1e6:,.1f}",
        "weights_32": f"{args.weight_bytes(4) / 1e6:,.1f}",
        "embedding": f"{args.vocab_size * args.dim:,}",
        "kv_values": f"{kv_token // 2:,}",
        "kv_token": f"{kv_token:,}",
        "kv_token_mha": f"{kv_token * args.n_heads // args.n_kv_heads:,}",
        "kv_288": f"{288 * kv_token / 1e6:.2f}",
        "kv_context": f"{args.trained_context * kv_token / 1e9:.1f}",
        "kv_context_mha": f"{args.trained_context * kv_token * args.n_heads // args.n_kv_heads / 1e9:.1f}",
        "cached_tflop": f"{cached / 1e12:.3f}",
        "uncached_tflop": f"{uncached / 1e12:.2f}",
        "flop_ratio": f"{uncached / cached:.1f}",
        "prompt_ratio": f"{uncached / args.forward_flops(256):.1f}",
        "logits_mb": f"{16 * 256 * args.vocab_size * 6 / 1e6:,.0f}",
        "lora_params": f"{trained:,}",
        "lora_share": f"{trained / (args.n_params() + trained):.4%}",
        "rope_kept": str(kept),
        "rope_blended": str(len(turns) - kept - slowed),
        "rope_slowed": str(slowed),
        "changed": f"{CHANGED:.0%}",
        "slower": f"{SLOWER:.0%}",
    }
