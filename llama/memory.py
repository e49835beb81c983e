"""The memory that a generation takes, from shapes alone, and a refusal before the weights are read where it lacks.

    needed = estimate(open_source("Llama3.2-1B"), torch.bfloat16, "auto", n_sequences=1, length=65_536)
    print(needed)                   # weights 2,472 MB, cache 2,147 MB, activations 136 MB
    require(needed, open_source("Llama3.2-1B"), torch.bfloat16, "auto", torch.device("cpu"))

Adapters and drafts are left out. That of training: training/memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from llama import device as devices
from llama import parallel
from llama.checkpoint.source import Source
from llama.decoding import ACTIVATIONS, CACHES, MASK_VALUES, PREFILL_TOKENS
from llama.device import MB
from llama.errors import EnvironmentFailure
from llama.processes import ALONE, World


@dataclass(frozen=True)
class Memory:
    """Bytes. str() is a line for people."""

    weights: int
    cache: int
    activations: int

    def __str__(self) -> str:
        sizes = ((field.name, getattr(self, field.name) / MB) for field in fields(self))
        return ", ".join(f"{name} {size:,.{0 if size >= 10 else 1}f} MB" for name, size in sizes)


def estimate(
    source: Source,
    dtype: torch.dtype,
    cache_dtype: str,
    n_sequences: int,
    length: int,
    use_cache: bool = True,
    me: World = ALONE,
) -> Memory:
    """Of a generation of texts of up to `length` tokens each, by the model of a checkpoint in `dtype`.

    me: of several processes, the memory of each.
    """
    model = source.lay_out()
    if me.size > 1:
        parallel.split(model, me)
    args, state = model.args, model.state_dict()
    weights = sum(weight.numel() * source.codes.get(name, dtype).itemsize for name, weight in state.items())
    slot = CACHES[cache_dtype](args, 1, 1, dtype, "meta")
    cache = n_sequences * length * sum(getattr(slot, name).nbytes for name in slot.parts) if use_cache else 0
    tokens = min(n_sequences * length, PREFILL_TOKENS)
    tokens = tokens if use_cache else max(tokens, length)
    activations = ACTIVATIONS * args.ffn_dim * tokens * dtype.itemsize
    if use_cache and length > PREFILL_TOKENS:  # a mask, and what the attention kernel makes of it
        activations += min(tokens * length, MASK_VALUES) * (1 + dtype.itemsize)
    if use_cache and cache_dtype == "int8":  # keys and values of one layer as they are attended to
        activations += args.kv_cache_bytes(1, length, dtype.itemsize) // args.n_layers
    activations += n_sequences * args.vocab_size * (dtype.itemsize + torch.float32.itemsize)  # logits, probabilities
    return Memory(weights, cache, activations)


def require(needed: Memory, source: Source, dtype: torch.dtype, cache_dtype: str, device: torch.device) -> None:
    """Raise EnvironmentFailure where the device has less memory free than the generation takes.

    Weights that a CPU takes as they are stay in the mapped file, which the system drops and reads again as it needs.
    """
    with source.open() as read:
        is_mapped = device.type == "cpu" and (source.quantization is not None or read("norm.weight").dtype is dtype)
    free, weights = devices.free_bytes(device), 0 if is_mapped else needed.weights
    if weights + needed.cache + needed.activations <= free:
        return
    remedies = ["dtype=bfloat16 or float16"] if dtype is torch.float32 else []
    if weights > free:
        remedies += ["a checkpoint that compress.py has quantized"] if source.quantization is None else []
    else:
        remedies += ["cache_dtype=int8"] if cache_dtype == "auto" and needed.cache else []
        remedies += ["fewer or shorter texts (max_batch_size, max_seq_len)"]
    raise EnvironmentFailure(
        f"{device} has {free / MB:,.0f} MB of memory free, and this takes {needed}; "
        f"use {', '.join(remedies) or 'a smaller model'}"
    )
