"""The Triton kernels: on a CPU by Triton's interpreter, on a GPU where there is one; and compiled without one.

The interpreter computes wrongly in bfloat16 (it truncates, and multiplies the bits as integers): that needs a GPU.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL, TINY, random_model
from support import full_cache, make_layer, widened
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from llama import KVCache, Llama, Tokenizer, Transformer, lora
from llama.decoding import Decoder, EagerStep
from llama.kernels import gpu
from llama.kernels.gpu import fused_step
from llama.model import RMSNorm, apply_rope, attend, rope_frequencies, rope_table
from llama.pruning import keep_units
from llama.quantization import Quantization, lay_out, quantize, slow_reason
from llama.speculative import PromptLookup, Speculation

triton = pytest.importorskip("triton", reason="Triton is at hand on Linux on x86-64 only")
from llama.kernels.gpu import triton_ops  # noqa: E402 - it needs Triton

CONFIGS = {"int8": Quantization(8), "int4-g32": Quantization(4), "int4-g128": Quantization(4, 128)}
CONFIGS |= {"int8-g64": Quantization(8, 64), "int4-g64-zero": Quantization(4, 64, True)}
DTYPES = {"cpu": (torch.float32, torch.float16), "cuda": (torch.float32, torch.float16, torch.bfloat16)}


@pytest.fixture
def ops(device, monkeypatch):
    """The kernels, on the device of the test."""
    if device.type == "cuda":
        return gpu.ops(device) or pytest.skip("this GPU is too old for Triton")
    return interpret(monkeypatch)


def interpret(monkeypatch):
    """The kernels, taken on a CPU too."""
    if not triton.knobs.runtime.interpret:
        pytest.skip("Triton's interpreter is off where there is a GPU")
    monkeypatch.setattr(gpu, "ops", lambda device: triton_ops)
    return triton_ops


def draw(*shape: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def require_as_exact(found: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    """The error is at most twice that of PyTorch's operation in the same dtype."""
    assert found.shape == eager.shape and found.dtype == eager.dtype
    error, allowed = (found.double() - exact).norm(), (eager.double() - exact).norm()
    assert error <= 2 * allowed + 1e-7 * exact.norm()


@pytest.mark.parametrize("has_delta", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 2048), (2, 3, 100), (5, 1), (0, 64)])
@torch.no_grad()
def test_add_rms_norm(ops, device, shape, has_delta):
    for dtype in DTYPES[device.type]:
        x, delta = (draw(*shape, device=device, dtype=dtype, seed=seed) * 3 for seed in (1, 2))
        norm = RMSNorm(shape[-1], 1e-5).to(device, dtype)
        norm.weight.copy_(draw(shape[-1], device=device, dtype=dtype, seed=3))
        total, normed = ops.add_rms_norm(x, delta if has_delta else None, norm.weight, norm.eps)
        assert torch.equal(total, x + delta if has_delta else x)
        require_as_exact(normed, norm(total), copy.deepcopy(norm).double()(total.double()))


@pytest.mark.parametrize("shape", [(1, 8192), (3, 5, 333), (1, 1), (0, 8)])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of the interpreter; it is right to be infinite
def test_silu_mul(ops, device, shape):
    for dtype in DTYPES[device.type]:
        gate, up = (draw(*shape, device=device, dtype=dtype, seed=seed) * 4 for seed in (1, 2))
        found = ops.silu_mul(gate, up)
        require_as_exact(found, F.silu(gate) * up, F.silu(gate.double()) * up.double())
    gate = torch.tensor([[-1e4, 1e4, 0.0]], device=device, dtype=torch.float16)
    assert ops.silu_mul(gate, torch.ones_like(gate)).tolist() == [[0.0, 1e4, 0.0]]


@pytest.mark.parametrize(("D", "K", "groups"), [(64, 2, 4), (96, 1, 3), (16, 3, 1)])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 1), (2, 4)])
def test_rotate_and_store(ops, device, B, T, D, K, groups):
    """Queries, keys and values as apply_rope and KVCache.update leave them, at far positions too; no other slot."""
    args = dataclasses.replace(SMALL, head_dim=None, n_layers=2, dim=D * K * groups, n_heads=K * groups, n_kv_heads=K)
    pos = torch.tensor([[3], [0], [11]], device=device)[:B] + torch.arange(T, device=device)
    freqs_cis = rope_table(pos * 1000, rope_frequencies(args).to(device))
    for dtype in DTYPES[device.type]:
        q, k, v = (
            draw(B, T, heads * D, device=device, dtype=dtype, seed=heads + i)
            for i, heads in enumerate((K * groups, K, K))
        )
        caches = [KVCache(args, B, 16, dtype, device) for _ in range(2)]
        for cache in caches:
            cache.k.fill_(7), cache.v.fill_(8)
        found = ops.rotate_and_store(q, k, v, freqs_cis, pos, caches[0].k[1], caches[0].v[1])
        heads = [x.unflatten(-1, (-1, D)) for x in (q, k, v)]
        rotated, keys = (apply_rope(x, freqs_cis).transpose(1, 2) for x in heads[:2])
        caches[1].update(1, keys, heads[2].transpose(1, 2), pos)
        exact = apply_rope(heads[0].double(), freqs_cis).transpose(1, 2)
        require_as_exact(found, rotated, exact)
        torch.testing.assert_close(caches[0].k, caches[1].k, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        assert torch.equal(caches[0].v, caches[1].v)


@pytest.fixture
def products(monkeypatch):
    """Shapes of the products that the interpreter computes, which are of numbers in bfloat16 too."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _convert_float

    shapes, plain = [], InterpreterBuilder.create_dot

    def create_dot(self, a, b, *others):
        shapes.append((a.data.shape, b.data.shape))
        if a.dtype == triton.language.bfloat16:
            wide = (_convert_float(x.data, x.dtype, triton.language.float32, None).view("float32") for x in (a, b))
            a, b = (TensorHandle(x, triton.language.float32) for x in wide)
        return plain(self, a, b, *others)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    return shapes


def part_of_a_cache(K: int, D: int, S: int, B: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Keys and values of a layer as they lie in a part of a larger cache."""
    args = dataclasses.replace(SMALL, dim=K * D, head_dim=D, n_layers=2, n_heads=K, n_kv_heads=K)
    cache = KVCache(args, B + 2, S + 7, dtype, device).part(1, B + 1, S)
    for seed, x in enumerate((cache.k, cache.v)):
        x.copy_(draw(*x.shape, device=device, dtype=dtype, seed=seed))
    return [cache.k[1], cache.v[1]]


QUERIES = [(1, 4, 64, 1), (1, 4, 64, 8), (1, 1, 16, 2), (1, 3, 128, 3), (2, 4, 80, 3), (5, 3, 64, 2), (5, 4, 16, 8)]
QUERIES += [pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 3, 80, 1), (2, 1, 64, 2), (5, 4, 64, 1))]


@pytest.mark.parametrize(("T", "groups", "D", "n_parts"), QUERIES)
@torch.no_grad()
def test_attention_of_a_few_queries(ops, device, products, T, groups, D, n_parts, monkeypatch):
    """As model.attend has it with a mask, whatever slots hold behind the position of their sequence: positions at the
    ends of a block, parts of which some are empty."""
    monkeypatch.setattr(ops, "_n_parts", lambda heads, S: n_parts)
    block, K, S = ops.TILE_SLOTS, 2, 4 * ops.TILE_SLOTS + 3
    last = torch.tensor([T - 1, block - 1, block, S - 1], device=device)
    pos = last[:, None] - torch.arange(T, device=device).flip(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        q = draw(len(pos), K * groups, T, D, device=device, dtype=dtype, seed=3)
        keys, values = part_of_a_cache(K, D, S, len(pos), dtype, device)
        if not ops.attends(q, keys):
            assert T * groups > 16 and dtype == torch.float32
            continue
        mask = torch.arange(S, device=device) <= pos[:, None, :, None]
        eager, exact = attend(q, keys, values, mask), attend(q.double(), keys.double(), values.double(), mask)
        for x in (keys, values):
            x.masked_fill_(~mask[:, :, -1, :, None], torch.finfo(dtype).max)
        found = ops.attend(q, keys, values, pos)
        if dtype == torch.bfloat16 and device.type == "cpu":  # rounded down by the interpreter, weights and result
            assert found.dtype == dtype and (found.double() - exact).norm() < 2**-7 * exact.norm()
        else:
            require_as_exact(found, eager, exact)


@torch.no_grad()
def test_attention_reads_the_positions_in_use_once(products, monkeypatch):
    """Two products for each block of slots and key/value head, shared by all queries, however long the cache is."""
    ops, K, S, block = interpret(monkeypatch), 2, 4096, triton_ops.TILE_SLOTS
    pos = torch.tensor([[0], [2 * block], [7 * block - 1]])
    for n_parts in (1, 3):
        monkeypatch.setattr(ops, "_n_parts", lambda heads, S, n_parts=n_parts: n_parts)
        products.clear()
        ops.attend(torch.ones(3, 4 * K, 1, 16), *part_of_a_cache(K, 16, S, 3, torch.float32, pos.device), pos)
        assert len(products) == 2 * K * (1 + 3 + 7)


def test_what_attention_takes_and_in_how_many_parts():
    """Up to 32 rows per key/value head, 16 in fp32; about 256 programs, of 256 slots at least."""

    def takes(groups: int, T: int, D: int, dtype: torch.dtype) -> bool:
        return triton_ops.attends(torch.empty(1, 2 * groups, T, D, dtype=dtype), torch.empty(1, 2, 9, D, dtype=dtype))

    half, single = torch.float16, torch.float32
    assert takes(4, 8, 64, half) and takes(4, 4, 64, single) and takes(1, 1, 128, half)
    assert not (takes(4, 9, 64, half) or takes(4, 5, 64, single) or takes(1, 1, 256, half))
    assert [triton_ops._n_parts(8, S) for S in (9, 511, 512, 2048, 8192, 131072)] == [1, 1, 2, 8, 32, 32]
    assert [triton_ops._n_parts(heads, 131072) for heads in (1, 3, 64, 300)] == [64, 64, 4, 1]


@torch.no_grad()
def test_steps_with_attention_in_parts_equal_those_of_the_model(ops, device, monkeypatch):
    """Logits and greedy tokens over 20 steps of one and two tokens; the second part is empty at first."""
    monkeypatch.setattr(ops, "_n_parts", lambda heads, S: 2)
    model = random_model(dataclasses.replace(SMALL, n_layers=1)).to(device)
    caches = [KVCache(model.args, 1, 70, torch.float32, device) for _ in range(2)]
    fused, plain = fused_step.FusedStep(model, caches[0]), EagerStep(model, caches[1])
    tokens, pos = torch.tensor([[1, 2]], device=device), torch.tensor([[15, 16]], device=device)
    for _ in range(20):
        found, expected = fused(tokens, pos), plain(tokens, pos)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        assert torch.equal(found.argmax(-1), expected.argmax(-1))
        n = 3 - tokens.shape[1]  # 1, 2, 1, ...
        tokens, pos = expected.argmax(-1)[:, -1:].expand(1, n), pos[:, -1:] + 1 + torch.arange(n, device=device)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("many", [1, 1000])
@pytest.mark.parametrize("shape", [(1, 70, 256), (1, 5, 2176), (2, 1, 128), (16, 70, 384), (1, 9, 172), (5, 9, 172)])
@torch.no_grad()
def test_products(ops, device, name, shape, many, monkeypatch):
    """y beside the product with the weights that the codes stand for, in both tiles of a row."""
    monkeypatch.setattr(ops, "MANY", many)
    M, N, K = shape
    layer = make_layer(CONFIGS[name], N, K)
    exact_weight = widened(layer)
    layer = layer.to(device)
    for dtype in DTYPES[device.type]:
        x = draw(M, K, device=device, dtype=dtype) / 64  # one weight is 1e4
        assert ops.multiplies(x) == (M <= 4 or dtype != torch.float32)
        if not ops.multiplies(x):
            continue
        found = layer(x)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpu, "ops", lambda device: None)
            slabs = layer(x)
        exact = x.double() @ exact_weight.to(device).t()
        # One weight is so large that the luck of the order decides how exact a sum is: that of the unluckiest of some.
        orders = [torch.randperm(K, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
        w = exact_weight.to(device, dtype)
        sums = [slabs, *(x[:, order] @ w[:, order].t() for order in orders)]
        require_as_exact(found, max(sums, key=lambda y: (y.double() - exact).norm()), exact)


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_take_the_kernels_for_a_few_rows_and_slabs_otherwise(ops, device, name, monkeypatch):
    monkeypatch.setitem(ops.ROW_TILES, "few", (64, 256))
    calls = []
    for kernel in ("int8_linear", "int4_linear"):
        plain = getattr(ops, kernel)
        monkeypatch.setattr(ops, kernel, lambda *a, plain=plain: calls.append(len(a[0])) or plain(*a))
    layer = make_layer(CONFIGS[name]).to(device)
    for M, dtype in (
        (1, torch.float32),
        (16, torch.float16),
        (17, torch.float16),
        (4, torch.float32),
        (5, torch.float32),
    ):
        layer(draw(M, 256, device=device, dtype=dtype))
    layer(draw(0, 256, device=device, dtype=torch.float16))
    layer(draw(1, 256, device=device, dtype=torch.float64))
    assert calls == [1, 16, 4]
    x = draw(1, 256, device=device, dtype=torch.float32).requires_grad_()
    layer(x).sum().backward()  # an adapter below it is trained
    assert calls == [1, 16, 4, 1] and x.grad.isfinite().all()


def changed(kind: str):
    """A small model as it comes, quantized, pruned, with an adapter."""
    args = dataclasses.replace(
        SMALL, head_dim=None, dim=128, n_layers=2 if kind == "plain" else 1, vocab_size=64, multiple_of=128
    )
    model = random_model(args, std=0.05)
    if kind in CONFIGS:
        quantize(model, CONFIGS[kind])
    elif kind == "pruned":
        model = keep_units(model, model.args.ffn_dim // 2)
    elif kind == "lora":
        lora.apply(model, lora.LoRAConfig(dropout=0.0))
        for name, weight in model.named_parameters():
            if name.endswith("lora_B"):
                nn.init.normal_(weight, std=0.05)
    return model.eval()


STEPS = [(1, 1, "plain"), (3, 1, "plain"), (2, 4, "plain"), (1, 1, "int8"), (2, 2, "int8"), (1, 1, "int4-g128")]
STEPS += [(1, 17, "plain")]  # more queries than the kernel of attention takes
STEPS += [pytest.param(2, 2, "int4-g32", marks=pytest.mark.slow), (2, 1, "pruned"), (2, 1, "lora")]


@pytest.mark.parametrize(("batch_size", "n_tokens", "kind"), STEPS)
@torch.no_grad()
def test_fused_step_is_as_exact_as_the_eager_one(ops, device, batch_size, n_tokens, kind, monkeypatch):
    """Against the same weights in fp64 the error is at most twice that of the eager step, in logits and cache."""
    monkeypatch.setitem(ops.ROW_TILES, "few", (64, 128))  # the interpreter takes as long for a small tile
    model = changed(kind)
    args = model.args
    tokens = torch.arange(batch_size * n_tokens).view(batch_size, n_tokens) * 7 % args.vocab_size
    pos = torch.arange(batch_size)[:, None] * 5 + torch.arange(n_tokens)
    for dtype in DTYPES[device.type]:
        runs = {}
        for name, cls in (("fused", fused_step.FusedStep), ("eager", EagerStep), ("exact", EagerStep)):
            kept = copy.deepcopy(model).to(device, torch.float64 if name == "exact" else dtype)
            cache = full_cache(args, batch_size, 21, kept.dtype)
            cache.k, cache.v = cache.k.to(device), cache.v.to(device)
            cache.sequences = cache.sequences.to(device)
            assert name == "exact" or fused_step.supports(kept)
            logits = cls(kept, cache)(tokens.to(device), pos.to(device))
            runs[name] = [part.double() for part in (logits, cache.k, cache.v)]
        for fused, eager, exact in zip(*runs.values(), strict=True):
            assert (fused - exact).norm() <= 2 * (eager - exact).norm() + 1e-6 * exact.abs().max()


@pytest.mark.parametrize("speculate", [pytest.param(False, marks=pytest.mark.slow), True])
def test_generation_takes_the_fused_step(ops, device, speculate, monkeypatch):
    """From prompts to tokens, of several at once too; equal to those of the eager step, which has no such kernels."""
    calls = []
    plain = ops.rotate_and_store
    monkeypatch.setattr(ops, "rotate_and_store", lambda *a: calls.append(a[0].shape[1]) or plain(*a))
    model = random_model(dataclasses.replace(SMALL, vocab_size=4096)).to(device)
    tokenizer = Tokenizer(TINY / "tokenizer.model")
    fast, slow = (Llama(model, tokenizer, decoding=decoding) for decoding in ("auto", "eager"))
    assert fast.decoder.name == ("fused" if device.type == "cpu" else "fused and captured")
    prompts = [[1, 2, 3, 1, 2, 3, 1], [4]]
    found = fast.generate(prompts, 6, 0, stop_tokens=[], speculation=Speculation(PromptLookup()) if speculate else None)
    assert calls and (max(calls) > 1) == speculate
    calls.clear()
    assert slow.generate(prompts, 6, 0, stop_tokens=[]) == found and not calls


@torch.no_grad()
def test_a_fused_step_is_a_quarter_of_the_operations(monkeypatch):
    """Counted as PyTorch dispatches them, views aside; the kernels themselves are counted and not run."""
    NO_WORK = "empty_like new_empty lift_fresh scalar_tensor promote_types _unsafe_view unbind".split()

    class Count(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            alias = next((r.alias_info for r in function._schema.returns if isinstance(r.type, torch.TensorType)), None)
            is_view = alias is not None and not alias.is_write
            Count.n += not is_view and function._opname not in NO_WORK
            return function(*args, **(kwargs or {}))

    def counted(step) -> int:
        Count.n = 0
        with Count():
            step(torch.tensor([[1]]), torch.tensor([[0]]))
        return Count.n

    model = random_model(dataclasses.replace(SMALL, n_layers=16)).half()
    kernels = []
    monkeypatch.setattr(interpret(monkeypatch), "_launch", lambda kernel, *a, **k: kernels.append(kernel))
    caches = [KVCache(model.args, 1, 9, torch.float16, "cpu") for _ in range(2)]
    eager = counted(EagerStep(model, caches[0]))
    fused = counted(fused_step.FusedStep(model, caches[1])) + len(kernels)
    assert len(kernels) == 65 + 16 and eager > 780 and fused < 220, (eager, fused)


@torch.no_grad()
def test_fused_step_refuses_what_would_be_written_elsewhere(ops, device):
    """Another number of rows, and gradients; on a CPU also positions, which on a GPU end the process."""
    model = random_model().to(device)
    cache = KVCache(model.args, 2, 9, torch.float32, device)
    step, tokens = fused_step.FusedStep(model, cache), torch.tensor([[1], [2]], device=device)
    with pytest.raises(ValueError, match="made for 2 sequences, not 3"):
        step(tokens[[0, 1, 1]], torch.zeros(3, 1, dtype=torch.int64, device=device))
    with torch.enable_grad(), pytest.raises(ValueError, match=r"run under torch\.no_grad"):
        step(tokens, tokens)
    for pos in ([[0], [9]], [[-1], [0]]) if device.type == "cpu" else ():
        with pytest.raises(IndexError, match="out of range"):
            step(tokens, torch.tensor(pos))
    assert not cache.k.any() and not cache.v.any()


def test_a_fused_step_keeps_an_index_per_slot_and_no_table(ops):
    """Of 131,072 slots, RoPE's would take 33 MB."""
    step = fused_step.FusedStep(random_model(), KVCache(SMALL, 1, 1000, torch.float32, "cpu"))
    assert sum(kept.nbytes for kept in vars(step).values() if isinstance(kept, torch.Tensor)) == 8 * 1000


@torch.no_grad()
def test_positions_may_lie_in_any_order_in_memory(ops, device):
    model = random_model().to(device)
    caches = [KVCache(model.args, 2, 9, torch.float32, device) for _ in range(2)]
    tokens, pos = torch.tensor([[1, 2], [3, 4]], device=device), torch.tensor([[0, 4], [1, 5]], device=device).t()
    runs = [
        kind(model, cache)(tokens, pos) for kind, cache in zip((fused_step.FusedStep, EagerStep), caches, strict=True)
    ]
    torch.testing.assert_close(*runs, atol=1e-4, rtol=0)
    torch.testing.assert_close(caches[0].k, caches[1].k, atol=1e-5, rtol=0)


def test_every_changed_model_is_left_to_the_eager_step(monkeypatch):
    class Other(nn.Module):
        pass

    def supports(change) -> bool:
        model = random_model()
        change(model)
        return fused_step.supports(model)

    assert not supports(lambda m: None) and Decoder(random_model(), "auto").name == "eager"  # on a CPU
    interpret(monkeypatch)
    assert supports(lambda m: None)
    assert not supports(lambda m: m.double())
    assert not supports(lambda m: m.layers[1].register_forward_hook(print))
    assert not supports(lambda m: m.layers[1].ffn_norm.register_forward_pre_hook(print))
    assert not supports(lambda m: setattr(m.layers[0], "feed_forward", Other()))
    assert not supports(lambda m: setattr(m, "norm", nn.LayerNorm(64)))
    assert Decoder(random_model(), "eager").name == "eager"


def test_where_there_are_kernels(monkeypatch):
    """Not on a CPU, not before sm_70, not without Triton or where it fails, not while torch.compile looks on."""
    cuda, ones, capability = torch.device("cuda"), torch.ones, [(6, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))

    def found():
        gpu._load.cache_clear()
        return gpu.ops(cuda)

    assert gpu.ops(torch.device("cpu")) is None
    assert found() is None and gpu.why_not(cuda) == "Triton needs compute capability 7.0"
    capability[0] = (9, 0)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "llama.kernels.gpu.triton_ops", None)
        assert found() is None and "Triton does not run here (import of llama" in gpu.why_not(cuda)

    def fails(*_):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    with monkeypatch.context() as patch:
        patch.setattr(triton_ops, "silu_mul", fails)
        assert found() is None
        assert gpu.why_not(cuda) == "Triton does not run here (Failed to find C compiler. Please specify via CC)"
    if triton.knobs.runtime.interpret:
        assert found() is triton_ops
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert gpu.ops(cuda) is None
    gpu._load.cache_clear()


def test_codes_that_do_not_pay_say_so(monkeypatch):
    """On a device that is no CPU and has no kernels; a model of shapes alone stands for one."""
    with torch.device("meta"):
        model = Transformer(SMALL)
    assert slow_reason(model) is None
    lay_out(model, Quantization(8))
    monkeypatch.setattr(gpu, "why_not", lambda device: "Triton needs another card")
    assert "int8 weights save memory here and no time: Triton needs another card, so" in slow_reason(model)
    interpret(monkeypatch)
    assert slow_reason(model) is None


# Compiled, without a GPU


@pytest.mark.slow
def test_kernels_compile_and_fit_the_registers():
    """For sm_70 to sm_90, in a process without the interpreter. Products read 16 bytes at a time, rows by plain loads,
    tiles by asynchronous copies, as keys and values are, none a byte at a time; tiles are multiplied by the matrix
    units. And what a row of
    codes is widened to stays in the registers: no [rows, columns] of it changes threads.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tests" / "llama" / "kernels" / "compile_triton.py")]
    built = json.loads(subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, check=True).stdout)
    kernels = {name for name in vars(triton_ops) if name.startswith("_") and hasattr(getattr(triton_ops, name), "fn")}
    assert {one["kernel"] for one in built} == kernels - {"_rotate_head"}  # which another calls
    assert {one["capability"] for one in built} == {70, 75, 80, 90}
    for one in built:
        assert one["spilled_bytes"] <= 16, one
    products = [one for one in built if one["kernel"].startswith("_int")]
    # Four formats; two sizes of rows, with two types of x, on all; tiles from sm_80 on.
    assert len(products) == 4 * (4 * 2 * 2 + 2)
    for one in products:
        is_tile = one["kernel"].endswith("_tile")
        assert one["reads"]["cp.async.cg" if is_tile else "ld.global.v4"] > 0 and one["reads"]["bytes"] == 0, one
        assert (one["products"] > 0) == is_tile and (is_tile or one["moved"] == 0), one
    for one in (one for one in built if one["kernel"] == "_attend_part"):
        reads = "cp.async.cg" if one["capability"] >= 80 else "ld.global.v4"
        assert one["reads"][reads] > 1, one  # not of queries alone
