"""Decoding int8 and int4 weights: every native step and prefill against the slow twin, and that they are really on."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, random_model
from support import SHAPES, full_cache, needs_kernel

from benchmarks import hardware
from llama import Llama, Transformer
from llama.config import PRESETS
from llama.decoding import Decoder, EagerStep
from llama.kernels.cpu import decode_step, prefill
from llama.quantization import Int4Linear, Int8Embedding, Int8Linear, Quantization, quantize

pytestmark = needs_kernel

FORMATS = {
    "int8": Quantization(8),
    "int8 groups of 32": Quantization(8, 32),
    "int8 groups of 64": Quantization(8, 64),
    "int4": Quantization(4, 32),
    "int4 groups of 64": Quantization(4, 64),
    "int4 groups of 128": Quantization(4, 128),
    "zero-points": Quantization(4, 32, True),
    "zero-points, groups of 64": Quantization(4, 64, True),
    "zero-points, groups of 128": Quantization(4, 128, True),
    "mixed": Quantization(4, 64, True, int8=("layers.0.attention.wk", "layers.0.feed_forward.w2")),
}
WIDE = dataclasses.replace(PRESETS["tiny"], n_layers=1, vocab_size=512)
# Untied head; a key/value width of 64, which leaves a core with one block of rows; a hidden size of 6 * 128.
OTHER = dataclasses.replace(SHAPES["heads of 32"], n_layers=1, tie_word_embeddings=False)
ODD = dataclasses.replace(SHAPES["nothing divides"], n_layers=1)
OFTEN = ("int8", "int4", "zero-points, groups of 64")
KINDS = [*OFTEN, *(pytest.param(kind, marks=pytest.mark.slow) for kind in FORMATS if kind not in OFTEN)]
SIZES = [(1, 1), (2, 1), (5, 1), (6, 1), (9, 1), (16, 1), (17, 1), (1, 7), (4, 6)]  # sequences, tokens of each


def quantized(args, kind: str) -> Transformer:
    return copy.deepcopy(_quantized(args, kind))


@functools.cache
def _quantized(args, kind: str) -> Transformer:
    model = random_model(args, std=0.05).bfloat16()
    quantize(model, FORMATS[kind])
    return model


def dense(model: Transformer) -> Transformer:
    """The same codes and scales as plain weights, in fp64."""
    plain = Transformer(model.args).double().eval()
    for name, module in model.named_modules():
        if isinstance(module, (Int8Linear, Int8Embedding, Int4Linear)):
            w = torch.empty(module.out_features, module.in_features, dtype=torch.float64)
            plain.get_submodule(name).weight.data = module.widen(slice(None), w)
        elif name.endswith("norm"):
            plain.get_submodule(name).weight.data = module.weight.double()
    return plain


@pytest.mark.parametrize("args", [WIDE, OTHER, ODD], ids=["tied", "untied", "odd"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_native_step_is_as_exact_as_the_eager_one(kind, args):
    """Against the dequantized model in fp64 the error is at most twice that of the eager step: 1 to 24 rows."""
    model = quantized(args, kind)
    assert decode_step.supports(model)
    plain = dense(model)
    for batch_size, n_tokens in SIZES:
        tokens = torch.arange(batch_size * n_tokens).view(batch_size, n_tokens) * 7 % args.vocab_size
        pos = torch.arange(batch_size)[:, None] * 5 % (41 - n_tokens) + torch.arange(n_tokens)
        runs = []
        for step, network in ((decode_step.NativeStep, model), (EagerStep, model), (EagerStep, plain)):
            cache = full_cache(args, batch_size, 41, network.norm.weight.dtype)
            logits = step(network, cache)(tokens, pos)
            runs.append([part.double() for part in (logits, cache.k, cache.v)])
        for native_part, eager, exact in zip(*runs, strict=True):
            assert (native_part - exact).norm() <= 2 * (eager - exact).norm() + 1e-6 * exact.abs().max()


@pytest.mark.parametrize(("batch_size", "n_tokens"), [(1, 2), (2, 5), (3, 9)])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_tokens_at_once_have_the_bits_of_tokens_one_by_one(kind, batch_size, n_tokens):
    """Rows are multiplied one, two or four at a time, and sum to the same."""
    model = quantized(ODD, kind)
    tokens = torch.arange(batch_size * n_tokens).view(batch_size, n_tokens) * 7 % ODD.vocab_size
    pos = torch.arange(batch_size)[:, None] * 4 + torch.arange(n_tokens)
    whole = full_cache(model.args, batch_size, 20)
    at_once = decode_step.NativeStep(model, whole)(tokens, pos)
    caches = [full_cache(model.args, batch_size, 20) for _ in range(batch_size)]
    for row in range(batch_size):  # each row alone: one token of one sequence is the form that all others must equal
        alone = caches[row].part(row, row + 1)
        alone.k, alone.v = alone.k.contiguous(), alone.v.contiguous()
        step = decode_step.NativeStep(model, alone)
        for t in range(n_tokens):
            logits = step(tokens[row : row + 1, t : t + 1], pos[row : row + 1, t : t + 1])
            assert torch.equal(logits[0, 0], at_once[row, t])
        assert torch.equal(whole.k[:, row], alone.k[:, 0]) and torch.equal(whole.v[:, row], alone.v[:, 0])


@pytest.mark.parametrize("kind", ["int8", "int4"])
@torch.no_grad()
def test_activations_of_very_different_size_keep_their_digits(kind):
    """One value a thousand times the others, as the residual stream of trained models has them, and zeros."""
    model = quantized(WIDE, kind)
    for norm in (model.layers[0].attention_norm, model.layers[0].ffn_norm, model.norm):
        norm.weight[5], norm.weight[40:80] = 1000.0, 0.0
    n = 64  # one rounding of the large value moves all of a row: whose luck is better shows in many rows only
    tokens, pos, plain = torch.arange(n)[:, None] * 7, torch.full((n, 1), 30), dense(model)
    native = decode_step.NativeStep(model, full_cache(WIDE, n, 41))(tokens, pos).double()
    eager = EagerStep(model, full_cache(WIDE, n, 41))(tokens, pos).double()
    exact = EagerStep(plain, full_cache(WIDE, n, 41, torch.float64))(tokens, pos)
    assert (native - exact).norm() <= 2 * (eager - exact).norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_what_is_not_finite_stays_so_and_in_its_row(kind, value):
    """Digits have no NaN: the row that holds one must not come out as numbers, nor touch its neighbours."""
    model = quantized(WIDE, kind)
    tokens, pos = torch.tensor([[1], [2], [3]]), torch.full((3, 1), 4)
    healthy = decode_step.NativeStep(model, full_cache(WIDE, 3, 9))(tokens, pos)
    broken = full_cache(WIDE, 3, 9)
    broken.v[0, 1, :, 2] = value
    logits = decode_step.NativeStep(model, broken)(tokens, pos)
    assert logits[1].isnan().all()
    assert torch.equal(logits[[0, 2]], healthy[[0, 2]])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_native_prefill_is_as_exact_as_the_eager_one(kind, use_cache, monkeypatch):
    """Slabs of a size that no matrix is a multiple of."""
    monkeypatch.setattr(prefill, "SLAB", 100 * 256)
    model = quantized(OTHER, kind)
    plain = dense(model)
    for batch_size, length in ((1, 1), (2, 7), (3, 40)):
        tokens = (torch.arange(batch_size * length).view(batch_size, length) * 7) % OTHER.vocab_size
        last = (length - 1 - torch.arange(batch_size)).clamp(min=0)
        runs = []
        for network, decoding in ((model, "auto"), (model, "eager"), (plain, "eager")):
            with Decoder(network, decoding).start(batch_size, length + 3 if use_cache else None) as run:
                hidden, cache = run.last_hidden(tokens, last), run.cache
            runs.append([part.double() for part in (hidden, *((cache.k, cache.v) if use_cache else ()))])
        for native_part, eager, exact in zip(*runs, strict=True):
            assert (native_part - exact).norm() <= 2 * (eager - exact).norm() + 1e-6 * exact.abs().max()


def test_native_step_refuses_what_is_out_of_range():
    model = quantized(WIDE, "int8")
    cache = full_cache(WIDE, 2, 9)
    before = cache.k.clone()
    step = decode_step.NativeStep(model, cache)
    for tokens, pos in (([0, 1], [0, 9]), ([0, 1], [-1, 0]), ([0, 512], [0, 0]), ([-1, 0], [0, 0])):
        with pytest.raises(IndexError, match="outside"):
            step(torch.tensor(tokens)[:, None], torch.tensor(pos)[:, None])
    assert torch.equal(cache.k, before)


def test_native_step_leaves_what_it_cannot_read_to_the_eager_one():
    def changed(change, kind="int8", args=WIDE):
        model = quantized(args, kind)
        change(model)
        return model

    def strided(model):
        w2 = model.layers[0].feed_forward.w2
        w2.weight.data = w2.weight.data.t().contiguous().t()

    def wide_scales(model):
        model.layers[0].feed_forward.w2.scales = model.layers[0].feed_forward.w2.scales.double()

    assert decode_step.supports(changed(lambda m: None))
    assert not decode_step.supports(changed(lambda m: m.float()))
    assert not decode_step.supports(changed(strided))
    assert not decode_step.supports(changed(wide_scales))
    assert not decode_step.supports(changed(lambda m: m.layers[0].register_forward_hook(print)))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_generation_uses_the_native_step_by_default(kind, monkeypatch):
    calls, widened = [], []
    library, step = decode_step.library(), decode_step.NativeStep.__call__
    monkeypatch.setattr(decode_step.NativeStep, "__call__", lambda self, *a: calls.append(1) or step(self, *a))

    class Counting:
        def __getattr__(self, name):
            if name == "widen_rows":
                widened.append(1)
            return getattr(library, name)

    monkeypatch.setattr(prefill, "library", lambda: Counting())
    model = quantized(WIDE, kind)
    fast, slow = (Llama(model, None, 64, 2, decoding=decoding) for decoding in ("auto", "eager"))
    assert (fast.decoder.name, slow.decoder.name) == ("native", "eager")
    slow.generate([[1, 2, 3], [4]], 6, 0, stop_tokens=[])
    assert not calls and not widened
    fast.generate([[1, 2, 3], [4]], 6, 0, stop_tokens=[])
    assert len(calls) == 5 and len(widened) == 7  # the first token comes from the prompts; seven matrices of one block


def test_limits_of_quantized_weights_count_the_bytes_that_lie_in_memory():
    for kind in ("int8", "int4"):
        model = quantized(OTHER, kind)
        scales = sum(m.scales.nbytes for m in model.modules() if hasattr(m, "scales"))
        n_bytes = sum(p.nbytes for p in model.parameters()) + scales
        assert hardware.weight_bytes(model) == n_bytes
        table = model.tok_embeddings.weight.nbytes + model.tok_embeddings.scales.nbytes
        assert hardware.decode_bytes(model, 3, 10) == n_bytes - table + OTHER.kv_cache_bytes(3, 10, 2)


def test_limits_of_plain_weights_count_a_tied_table_as_the_head_and_leave_out_an_untied_one():
    with torch.device("meta"):
        tied, untied = (Transformer(PRESETS[name]).bfloat16() for name in ("llama3.2-1b", "llama3.1-8b"))
    assert hardware.decode_bytes(tied, 1, 0) == tied.args.weight_bytes(2) == 2_471_628_800
    assert hardware.decode_bytes(tied, 8, 100) - hardware.decode_bytes(tied, 8, 0) == 8 * 100 * 32_768
    assert untied.args.weight_bytes(2) - hardware.decode_bytes(untied, 1, 0) == 128_256 * 4096 * 2


@pytest.mark.slow
def test_benchmark_measures_formats_side_by_side(tmp_path):
    flags = "--model=tiny --weights=bf16,int8,int4 --batch_sizes=1 --input_len=20 --output_len=4 --repeats=2 --cache=on"
    paths = [f"--results={tmp_path / 'rows.jsonl'}", f"--figures={tmp_path}"]
    command = [sys.executable, "benchmark_inference.py", *flags.split(), "--device=cpu", *paths]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    moved = {row["cell"]["weights"]: row["metrics"]["step_bytes_gb"]["median"] for row in rows}
    assert list(sorted(moved)) == ["bf16", "int4", "int8"] and moved["bf16"] > moved["int8"] > moved["int4"]
    assert {row["cell"]["decoding"] for row in rows} == {"native"}
    for weights in moved:
        assert f"with KV cache, {weights}: runtime (s)" in run.stdout
