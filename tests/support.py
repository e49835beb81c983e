"""Random models, samples, caches and layers, and a GPU that is none, for several test files."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch
from conftest import SMALL, random_model

from benchmarks import stopwatch
from benchmarks.rows import Row, read_folder
from data.samples import Sample
from llama import KVCache, ModelArgs, Transformer, lora
from llama.config import PRESETS
from llama.kernels.cpu import decode_step
from llama.lora import LoRAConfig
from llama.quantization import GROUP_SIZES, Quantization, rounded
from llama.surgery import plain_linear
from llama.training.batch import Batch, collate
from reports import build, tables
from reports.cells import Table


def same_weights(a, b) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def mutant(good: bytes, rng: random.Random) -> bytes:
    """Cut off, some bits flipped, or some bytes near the start or the end replaced."""
    data = bytearray(good)
    kind = rng.randrange(4)
    if kind == 0:
        return good[: rng.randrange(len(good))]
    if kind == 1:
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)
    start = rng.randrange(min(len(data), 2000)) if kind == 2 else max(0, len(data) - rng.randint(1, 2000))
    data[start : start + rng.randint(1, 16)] = rng.randbytes(rng.randint(0, 20))
    return bytes(data)


needs_kernel = pytest.mark.skipif(decode_step.library() is None, reason="no CPU with AVX-512 and a C compiler at hand")


SHAPES = {
    "tiny": PRESETS["tiny"],
    "heads of 32": dataclasses.replace(SMALL, head_dim=None, dim=256, n_heads=8, n_kv_heads=2, multiple_of=96),
    "heads of 96": ModelArgs(dim=192, n_layers=2, n_heads=2, vocab_size=208, multiple_of=32),
    "nothing divides": ModelArgs(dim=72, n_layers=2, n_heads=6, n_kv_heads=3, vocab_size=203, multiple_of=2),
}


def full_cache(args: ModelArgs, batch_size: int, max_len: int, dtype: torch.dtype = torch.bfloat16) -> KVCache:
    """A cache of earlier tokens, random and the same for all dtypes."""
    cache = KVCache(args, batch_size, max_len, dtype, "cpu")
    generator = torch.Generator().manual_seed(1)
    for part in (cache.k, cache.v):
        part.copy_(torch.randn(part.shape, generator=generator).bfloat16())
    return cache


def hard_rows(dtype: torch.dtype = torch.float32, n_columns: int = 256) -> torch.Tensor:
    """Ordinary rows, and those that break naive quantization: zeros, 1e-8, one outlier, subnormal, one sign, ties."""
    w = torch.randn(64, n_columns, generator=torch.Generator().manual_seed(0))
    w[1] = 0
    w[2] *= 1e-8
    w[3, 5] = 1e4
    w[4] *= 1e-41
    w[5] = w[5].abs()
    w[6] = -w[6].abs()
    w[7] = torch.arange(n_columns) / 2 - 63.5  # halves of a code
    w[8, :100] = 0
    return w.to(dtype)


def make_layer(config: Quantization, n: int = 300, k: int = 256):
    """A layer of hard rows, 64 of them again and again."""
    return linear_of(hard_rows(n_columns=k).repeat(5, 1)[:n], config)


FORMATS = [Quantization(8), *(Quantization(8, size) for size in GROUP_SIZES)]
FORMATS += [Quantization(4, size, zero_points) for size in GROUP_SIZES for zero_points in (False, True)]


def linear_of(weight: torch.Tensor, config: Quantization):
    """A layer with the nearest codes of a weight."""
    return rounded(plain_linear(torch.nn.Parameter(weight, requires_grad=False)), "a matrix", config)


def widened(layer) -> torch.Tensor:
    """The weight that the codes stand for, in fp64."""
    n, k = layer.out_features, layer.in_features
    return layer.widen(slice(0, n), torch.empty(n, k, dtype=torch.float64))


ALL = tuple(lora.META_NAMES)


def samples(n: int, seed: int = 0, longest: int = 40, vocab: int = SMALL.vocab_size) -> list[Sample]:
    """Random ids: prompts of 1 to 9 tokens, answers of 1 to `longest`."""
    rng = random.Random(seed)
    made = []
    for i in range(n):
        n_prompt, n_answer = rng.randint(1, 9), rng.randint(1, longest)
        ids = tuple(rng.randrange(vocab) for _ in range(n_prompt + n_answer))
        made.append(Sample(f"record {i}", ids, (range(n_prompt, len(ids)),)))
    return made


def batches(parts: list[list[Sample]]) -> list[Batch]:
    return [collate([[sample] for sample in part], 0) for part in parts]


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: w.grad for name, w in model.named_parameters() if w.grad is not None}


def gap(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Relative L2 distance of two gradients."""
    assert a.keys() == b.keys()
    distance = sum((a[name].double() - b[name].double()).square().sum() for name in a)
    return math.sqrt(distance / sum(w.double().square().sum() for w in b.values()))


def lora_model(dropout: float = 0.0, dtype: torch.dtype = torch.float32, targets=ALL) -> Transformer:
    model = random_model().to(dtype)
    lora.apply(model, LoRAConfig(r=4, dropout=dropout, targets=targets))
    for module in lora.layers(model).values():
        module.lora_B.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return model


CUDA = torch.device("cuda")


class FakeGPU:
    """A device that works behind the host's back, on a clock of its own: work is queued in no time and done later."""

    def __init__(self, monkeypatch):
        self.now, self.busy_until, self.allocated, self.peak = 0.0, 0.0, 0, 0
        monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: self.reset())
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: self.peak)

    def synchronize(self, device=None):
        self.now = max(self.now, self.busy_until)

    def reset(self):
        self.peak = self.allocated

    def queue(self, seconds, n_bytes=0):
        self.busy_until = max(self.busy_until, self.now) + seconds
        self.peak = max(self.peak, self.allocated + n_bytes)


def tables_of_committed_rows() -> list[Table]:
    """Every table of every row in reports/results; rows without a table of their own come as plain tables."""
    rows = read_folder(build.RESULTS)
    return [table for name in rows for make in tables.TABLES.get(name, (tables.generic,)) for table in make(rows[name])]


def measured_row(metrics: dict, line: int = 1, **cell) -> Row:
    """A row of medians, or of lists of median, least and most."""
    spreads = {}
    for name, value in metrics.items():
        median, low, high = value if isinstance(value, list) else (value, value, value)
        spreads[name] = {"median": median, "min": low, "max": high, "n": 3 if isinstance(value, list) else 1}
    about = {"device": {"kind": "cpu", "name": "A CPU"}, "dtype": "float32", "threads": 2, "torch": "2.13.0"}
    about |= {"commit": "0123456789ab", "command": "python x.py", "time": "2026-11-22T10:00:00+00:00"}
    return Row("rows.jsonl", line, {"experiment": "e", "cell": cell, "metrics": spreads, **about})
