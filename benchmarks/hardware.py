"""The hardware limit of a piece of work, measured in the same minute as the work itself.

A roofline has two parts. Work that does little with each byte is limited by memory bandwidth: a decode step cannot be
faster than reading its weights and cache once. Work that does much with each byte is limited by arithmetic: a prefill
cannot be faster than its matrix products at the best rate that any of them reaches. Both rates change with the
neighbours of a shared machine, so they are measured here, on the model at hand, and not taken from a data sheet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import stopwatch
from llama.kernels.cpu import decode_step
from llama.model import Transformer

PRODUCT_TOKENS = (256, 1024, 2048)


def weight_bytes(model: Transformer) -> int:
    """Bytes of all weights as they lie in memory, scales of quantized ones included."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def decode_bytes(model: Transformer, batch_size: int, context: int) -> int:
    """Bytes that one cached decode step cannot avoid reading: each weight once, and the K and V of the context.

    Weights of any format; an untied embedding table is only looked up, so it does not count.
    """
    unread = 0 if model.output is None else sum(t.nbytes for t in model.tok_embeddings.state_dict().values())
    cache = model.args.kv_cache_bytes(batch_size, context, model.dtype.itemsize)
    return weight_bytes(model) - unread + cache


def read_bandwidth(model: Transformer) -> dict[str, float]:
    """Bytes per second at which each reading kernel goes through all matrices of the model, by name of the kernel.

    A whole model is far larger than any cache, so nothing is read from one.
    """
    matrices = [weight.detach() for weight in model.parameters() if weight.dim() == 2]
    readers: dict[str, Callable[[torch.Tensor], Any]] = {
        "sum": lambda w: w.view(torch.float32).sum(),  # as fp32 whatever they are: the values do not matter
        "max": lambda w: w.view(torch.int32).amax(),
    }
    library = decode_step.library()
    if matrices[0].device.type == "cpu" and library is not None:
        readers["streams"] = lambda w: library.read_all(w.data_ptr(), w.nbytes)
    n_bytes, device = sum(w.nbytes for w in matrices), matrices[0].device

    def seconds(reader: Callable[[torch.Tensor], Any]) -> float:
        return stopwatch.measure(lambda: [reader(matrix) for matrix in matrices], device)[1].seconds

    return {name: n_bytes / seconds(reader) for name, reader in readers.items()}


@torch.no_grad()
def product_rate(model: Transformer, dtype: torch.dtype | None = None) -> dict[str, float]:
    """FLOPs per second of the network's largest products, x w1^T and x w2^T, by number of tokens in x.

    Each product takes the weights of a different layer, so that none is in a cache. dtype: to multiply in; default:
    that of the activations.
    """
    args, device, dtype = model.args, model.norm.weight.device, dtype or model.dtype
    blocks = [block.feed_forward for block in model.layers[:4]]
    weights = [(_plain(part.w1, dtype), _plain(part.w2, dtype)) for part in blocks]
    rates = {}
    for n_tokens in PRODUCT_TOKENS:
        x = torch.full((n_tokens, args.dim), 0.5, dtype=dtype, device=device)
        h = torch.full((n_tokens, args.ffn_dim), 0.5, dtype=dtype, device=device)
        used = weights[: 4 if n_tokens <= 1024 else 2]
        F.linear(x, used[0][0])
        seconds = stopwatch.measure(functools.partial(_products, x, h, used), device)[1].seconds
        rates[f"{n_tokens} tokens"] = len(used) * 4 * n_tokens * args.dim * args.ffn_dim / seconds
    return rates


def _plain(layer: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(layer, nn.Linear):
        return layer.weight.to(dtype)
    out = torch.empty(layer.out_features, layer.in_features, dtype=dtype, device=layer.weight.device)
    return layer.widen(slice(None), out)


def _products(x: torch.Tensor, h: torch.Tensor, weights: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for w1, w2 in weights:
        F.linear(x, w1)
        F.linear(h, w2)
