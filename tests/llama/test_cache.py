"""The int8 KV cache: codes and scales, every path that writes or reads them, and that it takes the memory it says."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from conftest import SMALL, random_model
from support import SHAPES, hard_rows, needs_kernel

from llama import KVCache, Llama
from llama.cache import Int8Cache, encode
from llama.decoding import CACHES, Decoder, EagerStep
from llama.errors import InputError
from llama.kernels.cpu import prefill
from llama.kernels.cpu.decode_step import NativeStep
from llama.speculative import PromptLookup, Speculation
from llama.training.memory import Tracker


def filled(args, batch_size: int, max_len: int, dtype: torch.dtype = torch.bfloat16) -> Int8Cache:
    """Earlier tokens, random and the same for all dtypes."""
    cache = Int8Cache(args, batch_size, max_len, dtype, "cpu")
    generator = torch.Generator().manual_seed(1)
    for name in ("k", "v"):
        codes, scales = encode(torch.randn(cache.k.shape, generator=generator))
        getattr(cache, name).copy_(codes)
        getattr(cache, f"{name}_scales").copy_(scales)
    return cache


def test_a_code_is_the_nearest_one_and_what_is_not_finite_stays_so():
    x = hard_rows()
    codes, scales = encode(x)
    values = codes.double() * scales.double()[:, None]
    assert ((values - x).abs() <= 0.500001 * scales.double()[:, None]).all()
    assert codes.abs().max() == 127 and not values[1].any()
    for value in (float("nan"), float("inf")):
        x[3, 7] = value
        codes, scales = encode(x)
        assert not (codes[3] * scales[3]).isfinite().all()
        assert (codes[4:] * scales[4:, None]).isfinite().all()


@torch.no_grad()
def test_it_holds_the_codes_of_what_is_written_where_it_is_written():
    cache = Int8Cache(SMALL, 3, 9, torch.float32, "cpu")
    shape = (3, SMALL.n_kv_heads, 2, SMALL.head_dim)
    k, v = torch.randn(shape), torch.randn(shape)
    pos = torch.tensor([[0, 1], [4, 5], [7, 8]])
    read = cache.update(1, k, v, pos)
    for values, found in zip((k, v), read, strict=True):
        codes, scales = encode(values)
        for row in range(3):
            assert torch.equal(found[row][:, pos[row]], codes[row] * scales[row][..., None])
        assert (found != 0).any(-1).sum() == 3 * SMALL.n_kv_heads * 2
    part = cache.part(1, 3)
    part.update(0, k[1:], v[1:], None)
    assert cache.k[0, 1:, :, :2].any() and not cache.k[0, 0].any() and not cache.k[0, :, :, 2:].any()
    cache.clear()
    assert not any(getattr(cache, name).any() for name in cache.parts)


def test_it_takes_half_the_memory_of_16_bits_and_a_scale_for_each_position():
    int8, bf16 = (kind(SHAPES["tiny"], 2, 50, torch.bfloat16, "cpu") for kind in (Int8Cache, KVCache))
    sizes = [sum(getattr(cache, name).nbytes for name in cache.parts) for cache in (int8, bf16)]
    assert sizes[0] * 128 == sizes[1] * 68  # heads of 64


@needs_kernel
@pytest.mark.parametrize(("batch_size", "n_tokens"), [(1, 1), (3, 1), (1, 5), (4, 6)])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_native_step_is_as_exact_as_the_eager_one(shape, batch_size, n_tokens):
    """Against the same weights and codes in fp64 the error is at most twice that of the eager step."""
    args = SHAPES[shape]
    model = random_model(args, std=0.05).bfloat16()
    tokens = torch.arange(batch_size * n_tokens).view(batch_size, n_tokens) * 7 % args.vocab_size
    pos = torch.arange(batch_size)[:, None] * 25 % (101 - n_tokens) + torch.arange(n_tokens)
    runs = []
    for kind, dtype in ((NativeStep, torch.bfloat16), (EagerStep, torch.bfloat16), (EagerStep, torch.float64)):
        cache = filled(args, batch_size, 101, dtype)
        logits = kind(copy.deepcopy(model).to(dtype), cache)(tokens, pos)
        runs.append([logits.double(), *(getattr(cache, name).double() for name in cache.parts)])
    for native, eager, exact in zip(*runs, strict=True):
        assert (native - exact).norm() <= 2 * (eager - exact).norm() + 1e-6 * exact.abs().max()
    written = (runs[0][1] != filled(args, batch_size, 101).k.double()).any(-1).any(2).any(0)
    assert torch.equal(written.nonzero()[:, 1], pos.flatten())


@needs_kernel
@torch.no_grad()
def test_tokens_at_once_have_the_bits_of_tokens_one_by_one():
    args = SHAPES["nothing divides"]
    model, pos = random_model(args, std=0.05).bfloat16(), torch.arange(63, 68)[None]
    at_once, alone = (NativeStep(model, filled(args, 1, 80)) for _ in range(2))
    tokens = torch.arange(5)[None]
    whole = at_once(tokens, pos)
    parts = [alone(tokens[:, i : i + 1], pos[:, i : i + 1]) for i in range(5)]
    assert torch.equal(whole, torch.cat(parts, 1))
    assert all(torch.equal(getattr(at_once.cache, name), getattr(alone.cache, name)) for name in alone.cache.parts)


@needs_kernel
@pytest.mark.parametrize("in_fp32", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_prompt_that_reads_some_heads_at_a_time_has_the_bits_of_one_that_reads_layers(shape, in_fp32, monkeypatch):
    """Of two sequences in two parts, with products in bfloat16 and in fp32."""
    args, sizes = SHAPES[shape], []
    model, tokens = random_model(args, std=0.05).bfloat16(), torch.arange(90).view(2, 45) * 7 % args.vocab_size
    monkeypatch.setattr(prefill, "fp32_is_faster", lambda: in_fp32)
    monkeypatch.setattr(prefill, "FEWEST_WIDE", 1)
    monkeypatch.setattr(prefill, "SLAB", 2 * 2 * 25 * args.head_dim)  # two heads of the first part, one of the second
    monkeypatch.setattr("llama.cache.AT_ONCE", 1000)  # codes: nor all positions of a head
    read = Int8Cache.read

    def counted(*which):
        found = read(*which)
        sizes.append(found[0].numel())
        return found

    def run() -> list[torch.Tensor]:
        cache, hidden = Int8Cache(args, 2, 99, torch.bfloat16, "cpu"), []
        for start, stop in ((0, 25), (25, 45)):
            last = torch.tensor([stop - start - 1, 3])
            hidden.append(prefill.last_hidden(model, tokens[:, start:stop], last, cache, start))
        return [*hidden, *(getattr(cache, name) for name in cache.parts)]

    monkeypatch.setattr(Int8Cache, "read", counted)
    by_heads, n_reads = run(), len(sizes)
    assert max(sizes) <= prefill.SLAB and n_reads > 2 * args.n_layers
    monkeypatch.setattr(prefill._Run, "_stored", lambda self, cache, layer, q: [(slice(None), *cache.read(layer))])
    assert all(torch.equal(*parts) for parts in zip(by_heads, run(), strict=True))
    assert max(sizes) > prefill.SLAB and len(sizes) == n_reads + 2 * args.n_layers


@needs_kernel
@torch.no_grad()
def test_a_part_of_a_long_prompt_takes_hardly_more_memory_with_it_than_with_16_bits(monkeypatch):
    """Keys and values of two heads, this one and the last; of all eight, as `update` returns them, it would be four."""
    args = dataclasses.replace(SMALL, head_dim=16, n_heads=8, n_kv_heads=8)
    monkeypatch.setattr(prefill, "SLAB", 4096 * args.head_dim)
    monkeypatch.setattr("llama.cache.AT_ONCE", 1 << 12)
    model, took = random_model(args).bfloat16(), {}
    for name, kind in CACHES.items():
        cache = kind(args, 1, 4096, torch.bfloat16, "cpu")
        with Tracker(model) as tracker:
            prefill.last_hidden(model, torch.arange(96)[None], torch.tensor([95]), cache, 4000)
        took[name] = tracker.footprint().peak - sum(getattr(cache, part).nbytes for part in cache.parts)
    assert took["int8"] <= took["auto"] + 2 * (2 * prefill.SLAB * torch.bfloat16.itemsize)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@needs_kernel
def test_what_is_not_finite_stays_so_and_in_its_row(value):
    args = SHAPES["tiny"]
    model = random_model(args, std=0.05).bfloat16()
    tokens, pos = torch.tensor([[1], [2], [3]]), torch.full((3, 1), 4)
    healthy = NativeStep(model, filled(args, 3, 9))(tokens, pos)
    broken = filled(args, 3, 9)
    broken.v_scales[0, 1, :, 2] = value
    logits = NativeStep(model, broken)(tokens, pos)
    assert not logits[1].isfinite().any()
    assert torch.equal(logits[[0, 2]], healthy[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_with_it_hardly_differs_and_speculation_changes_nothing(tiny, dtype):
    model = copy.deepcopy(tiny.model).to(dtype)
    plain, int8 = (Llama(model, tiny.tokenizer, 128, 2, cache_dtype=kind) for kind in ("auto", "int8"))
    assert plain.decoder.name == int8.decoder.name
    prompts = [tiny.tokenizer.encode(text, bos=True, eos=False) for text in ("The little fox", "Once upon a")]
    settings = {"max_gen_len": 24, "temperature": 0, "stop_tokens": [], "logprobs": True}
    (_, ours), (_, theirs) = int8.generate(prompts, **settings), plain.generate(prompts, **settings)
    assert abs(torch.tensor(ours[0][:4]) - torch.tensor(theirs[0][:4])).max() < 0.05
    lookup = int8.generate(prompts[:1], **settings, speculation=Speculation(PromptLookup()))
    assert lookup[0][0] == int8.generate(prompts[:1], **settings)[0][0]


def test_an_unknown_one_is_refused():
    with pytest.raises(InputError, match="cache_dtype=int4 is unknown; use auto, int8"):
        Llama(random_model(), None, cache_dtype="int4")


def test_a_fused_step_which_knows_no_codes_is_not_taken(monkeypatch):
    monkeypatch.setattr("llama.decoding.fused_step.supports", lambda model: True)
    plain, int8 = (Decoder(random_model(), "auto", kind) for kind in ("auto", "int8"))
    assert plain.name == "fused" and int8.name == "eager"
    assert "widens the int8 cache" in int8.why_slower and plain.why_slower is None


@pytest.mark.parametrize("kind", [KVCache, Int8Cache])
def test_a_part_is_the_same_storage_with_its_own_sequences(kind):
    cache = kind(SMALL, 5, 9, torch.float32, "cpu")
    part = cache.part(2, 4, 6)
    assert part.max_len == 6 and cache.part(0, 5).max_len == cache.max_len == 9 and len(part.sequences) == 2
    k, v = torch.randn(2, 2, SMALL.n_kv_heads, 1, SMALL.head_dim)
    found = part.update(1, k, v, torch.tensor([[5], [3]]))
    assert found[0].shape == (2, SMALL.n_kv_heads, 6, SMALL.head_dim)
    where = cache.k[1].ne(0).any(-1).any(1).nonzero().tolist()
    assert where == [[2, 5], [3, 3]] and not cache.k[[0, 2, 3]].any()
    cache.clear()
    assert not any(getattr(cache, name).any() for name in cache.parts)
    assert cache.k.data_ptr() == kind.part(cache, 0, 5).k.data_ptr()


def test_a_cache_of_some_layers_of_a_model():
    assert KVCache(SMALL, 2, 7, torch.float32, "cpu", n_layers=3).k.shape == (3, 2, SMALL.n_kv_heads, 7, SMALL.head_dim)


@pytest.mark.parametrize("kind", [KVCache, Int8Cache])
def test_what_a_cache_is_not_for_is_refused(kind):
    cache = kind(SMALL, 2, 7, torch.float32, "cpu")
    k = torch.ones(2, SMALL.n_kv_heads, 1, SMALL.head_dim)
    with pytest.raises(ValueError, match="for inference"):
        cache.update(0, k.clone().requires_grad_(), k, None)
    with pytest.raises(ValueError, match="made for 2 sequences, not 1"):
        cache.update(0, k[:1], k[:1], None)
    with pytest.raises(IndexError):
        cache.update(0, k, k, torch.tensor([[0], [7]]))
