"""Attention by itself: the textbook's softmax(q k^T) v, which keeps all scores, beside the fused kernels.

    python -m benchmarks.attention                               # one key/value head of Llama 3.2 1B; five minutes
    python -m benchmarks.attention --lengths=256,1024 --kv_heads=8    # all its heads, of shorter texts

Causal self-attention of a whole sequence, as in a prefill or a training step; forward, and backward to the gradients of
queries, keys and values. "fused" is llama/model.py's `attend`, for which PyTorch chooses a kernel; on a GPU each of
those that run there is measured by its name, too.

A fused kernel goes through tiles of keys and values that a cache holds. For each query it keeps the largest score m so
far, the sum l of the exponentials, and the weighted sum o of the values; a tile with scores s and values v makes them

    m' = max(m, max s)    l' = e^(m - m') l + sum e^(s - m')    o' = e^(m - m') o + e^(s - m') v,    result o / l

(online softmax: Milakov and Gimelshein 2018), so scores never go to memory; the backward pass computes them again, tile
by tile (FlashAttention: Dao et al. 2022). The arithmetic is that of the textbook, the memory grows with the length and
not with its square, and so does what is read and written.

Memory is what the process holds at most beyond the operands. The error is the largest one relative to the largest
value, against the textbook in fp64, some queries at a time. Times are measured after both, all forms of one length in
turns, in shuffled order; there freed blocks below a gigabyte are kept, so that runs need not wait for new pages.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from benchmarks import options as shared
from benchmarks import rows, stopwatch
from llama import cli
from llama import device as devices
from llama.cli import option
from llama.config import PRESETS, ModelArgs
from llama.model import attend
from reports import tables

LENGTHS = (256, 1024, 4096, 8192, 16384, 32768)
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
BACKENDS |= {"cudnn": SDPBackend.CUDNN_ATTENTION}
KEPT = (
    4  # matrices of scores that the textbook has at once, backward: probabilities, their gradient, and two on the way
)
WARM_UP = 64  # positions
EXACT_QUERIES = 512  # of the reference in fp64 at once
Form = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [1, H, T, D], k and v [1, K, T, D] -> [1, H, T, D]
Key = tuple[str, str]  # a form's engine and dtype


@dataclass(frozen=True)
class Options(shared.DeviceOptions):
    """Measure attention that keeps all scores beside fused kernels: time, memory and error by length."""

    model: str = option("llama3.2-1b", f"whose heads: {', '.join(PRESETS)}", choices=PRESETS)
    kv_heads: int = option(1, "key/value heads, each with as many query heads as in the model", least=1)
    lengths: str = option(",".join(map(str, LENGTHS)), "positions of the sequences")
    dtypes: str | None = option(
        None,
        "of float32, bfloat16 and float16; default: float32 and the device's 16-bit type",
        choices=devices.DTYPES,
        several=True,
    )
    textbook_limit_gb: float = option(8.0, "memory for the textbook's scores; it stops where they need more", above=0)
    repeats: int = option(3, "timed runs of each form", least=1)
    figures: str | None = option(None, shared.FIGURES)

    @property
    def sizes(self) -> list[int]:
        return shared.sizes_of(self.lengths, "lengths")


def main(options: Options) -> None:
    """Measure every form at every length, keep their rows, and show the table."""
    device, half = devices.resolve_half(options.device)
    names = [devices.dtype_name(torch.float32), devices.dtype_name(half)]
    names = names if options.dtypes is None else options.dtypes.split(",")
    for name in names:
        devices.resolve(device, name)
    path, args, lengths = options.results_file("attention"), PRESETS[options.model], options.sizes
    forms = {
        (engine, name): form
        for name in names
        for engine, form in forms_of(device, devices.DTYPES[name], args, options.seed).items()
    }
    measured = measure(forms, args, lengths, device, options)
    heads = {"heads": options.kv_heads * args.n_heads // args.n_kv_heads, "kv_heads": options.kv_heads}
    same = {"model": options.model, **heads, "textbook_limit_gb": options.textbook_limit_gb}
    found = []
    for length, (engine, name) in itertools.product(lengths, forms):
        cell, runs = {**same, "positions": length, "engine": engine}, measured[length, engine, name]
        found.append(rows.record(path, "attention", cell, runs, device, name, options.seed))
    shared.finish(path, "attention", found, tables.attention(found), options.figures)


# The forms


def textbook(q: Tensor, k: Tensor, v: Tensor, first: int = 0) -> Tensor:
    """softmax(q k^T / sqrt(D)) v with all T x S scores in memory; the queries stand at `first` and behind it."""
    (_, H, T, D), (K, S) = q.shape, k.shape[1:3]
    future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu_(first + 1)
    scores = (q / math.sqrt(D)).unflatten(1, (K, H // K)) @ k[:, :, None].transpose(-2, -1)
    scores = scores.masked_fill(future, -math.inf)
    return (scores.softmax(-1) @ v[:, :, None]).flatten(1, 2)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the model calls."""
    return attend(q, k, v, None)


def by_backend(backend: SDPBackend) -> Form:
    """One of PyTorch's kernels. All but flash attention take as many key/value heads as query heads: repeated ones."""

    def form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        is_grouped = backend is SDPBackend.FLASH_ATTENTION and q.shape[1] != k.shape[1]
        if not is_grouped:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)

    return form


def forms_of(device: torch.device, dtype: torch.dtype, args: ModelArgs, seed: int) -> dict[str, Form]:
    """By the name of the engine: the textbook's, the model's and on a GPU each kernel that runs there.

    Each has run once, so that what libraries set up belongs to none.
    """
    forms: dict[str, Form] = {"textbook": textbook, "fused": fused}
    if device.type == "cuda":
        forms |= {name: by_backend(backend) for name, backend in BACKENDS.items()}
    few = draw(args, 1, WARM_UP, device, seed)
    for name in list(forms):
        try:
            run(forms[name], few, dtype)
        except RuntimeError:  # "No available kernel": too old a GPU, or not in this dtype
            if name not in BACKENDS:
                raise
            del forms[name]
    return forms


# Measuring


def draw(args: ModelArgs, kv_heads: int, length: int, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    """q, k, v and a gradient of the result, from N(0, 1): numbers that fp32, bf16 and fp16 all have, in fp32."""
    generator = torch.Generator().manual_seed(seed)
    heads = kv_heads * args.n_heads // args.n_kv_heads
    shapes = [(1, n, length, args.head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return tuple(torch.randn(shape, generator=generator).bfloat16().float().to(device) for shape in shapes)


def textbook_fits(q: Tensor, dtype: torch.dtype, limit_gb: float) -> bool:
    """Whether the scores of the textbook go into the limit and the memory; where not, a line says so."""
    _, H, T, _ = q.shape
    needed = KEPT * H * T * T * dtype.itemsize
    free = torch.cuda.mem_get_info(q.device)[0] if q.device.type == "cuda" else psutil.virtual_memory().available
    if needed <= min(limit_gb * 1e9, free):
        return True
    what = f"textbook, {T:,} positions, {devices.dtype_name(dtype)}: left out"
    why = f"the limit is {limit_gb:g} GB" if limit_gb * 1e9 < free else f"{free / 1e9:.1f} GB are free"
    tqdm.write(f"{what}, {KEPT} matrices of its scores take {needed / 1e9:.1f} GB and {why}")
    return False


def measure(
    forms: dict[Key, Form], args: ModelArgs, lengths: Sequence[int], device: torch.device, options: Options
) -> dict[tuple[int, str, str], dict[str, list[float]]]:
    """The metrics of each form at each length; none where the textbook is left out."""
    found: dict[tuple[int, str, str], dict[str, list[float]]] = {}
    for length in tqdm(lengths, desc="memory and error", unit="length"):
        operands = draw(args, options.kv_heads, length, device, options.seed)
        exact = results_in_parts(*operands)
        for (engine, name), form in forms.items():
            values = found[length, engine, name] = {}
            dtype = devices.DTYPES[name]
            if engine != "textbook" or textbook_fits(operands[0], dtype, options.textbook_limit_gb):
                devices.return_freed_memory()  # so that what is resident is what is in use
                results, _, peaks = run(form, operands, dtype)
                values |= {name: [value] for name, value in (*peaks.items(), *errors(results, exact))}
                del results
    order = random.Random(options.seed)
    devices.keep_freed_memory()  # so that no run waits for new pages
    for length in tqdm(lengths, desc="time", unit="length"):
        operands = draw(args, options.kv_heads, length, device, options.seed)
        keys = [key for key in forms if found[length, *key]]
        for _ in range(options.repeats):
            for key in order.sample(keys, len(keys)):
                _, seconds, _ = run(forms[key], operands, devices.DTYPES[key[1]])
                for name, value in seconds.items():
                    found[length, *key].setdefault(name, []).append(value)
    return found


def run(
    form: Form, operands: Sequence[Tensor], dtype: torch.dtype
) -> tuple[list[Tensor], dict[str, float], dict[str, float]]:
    """The result and the gradients of q, k and v; the seconds of both passes; their peaks beyond the operands in MB.

    The peak of the backward pass counts what the forward pass kept for it.
    """
    device = operands[0].device
    q, k, v = (x.to(dtype, copy=True).requires_grad_() for x in operands[:3])
    gradient = operands[3].to(dtype)
    before = devices.memory_bytes(device)
    result, forward = stopwatch.measure(lambda: form(q, k, v), device)
    gradients, backward = stopwatch.measure(lambda: torch.autograd.grad(result, (q, k, v), gradient), device)
    passes = {"forward": forward, "backward": backward}
    peaks = {name: one.peak_bytes - before for name, one in passes.items() if one.peak_bytes is not None}
    return (
        [result.detach(), *gradients],
        {f"{name}_s": one.seconds for name, one in passes.items()},
        {f"{name}_peak_mb": peak / devices.MB for name, peak in peaks.items()},
    )


def results_in_parts(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> list[Tensor]:
    """What `run` returns of the textbook in fp64: some queries at a time, each with the keys up to its own."""
    k, v, gradient = (x.double() for x in (k, v, gradient))
    found = [torch.zeros_like(x, dtype=torch.float64) for x in (q, q, k, v)]
    for start in range(0, q.shape[2], EXACT_QUERIES):
        part = slice(start, min(start + EXACT_QUERIES, q.shape[2]))
        leaves = [q[:, :, part].double(), k[:, :, : part.stop], v[:, :, : part.stop]]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        result = textbook(*leaves, first=start)
        found[0][:, :, part] = result.detach()
        found[1][:, :, part], *others = torch.autograd.grad(result, leaves, gradient[:, :, part])
        for total, other in zip(found[2:], others, strict=True):
            total[:, :, : part.stop] += other
    return found


def errors(results: Sequence[Tensor], exact: Sequence[Tensor]) -> Iterator[tuple[str, float]]:
    """The largest error of the result, and of the gradients, each relative to the largest value of its tensor."""
    relative = [
        ((ours - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in zip(results, exact, strict=True)
    ]
    yield "forward_error_x", relative[0]
    yield "backward_error_x", max(relative[1:])


if __name__ == "__main__":
    cli.run(main)
