"""The table of kernels: everything there is, each beside what it equals, and nothing that no row says."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import random
import re

import pytest
import torch
from conftest import ROOT, random_model

from benchmarks import hardware, rows
from benchmarks import kernels as benchmark_kernels
from benchmarks.kernels import compared, named, take_turns
from benchmarks.rows import Row, read_file
from llama import cli
from llama.config import PRESETS
from llama.errors import InputError, InternalError
from llama.kernels import gpu
from llama.kernels.cpu import decode_step, prefill, prefill_attention, train_ops
from reports import render, tables

TINY = PRESETS["tiny"]
DOUBLE = named("train", "double", "", "test")
TRAIN = "rms_norm rms_norm_backward swiglu swiglu_backward rotate lora_down lora_up_ lora_outer logsumexp".split()
TRAIN += ["softmax_gradient_", "sgd_"]
PREFILL = ["RMSNorm", "RoPE into the cache", "SwiGLU"]
needs_kernels = pytest.mark.skipif(
    train_ops.library() is None or decode_step.library() is None, reason="no CPU with AVX-512 and a C compiler at hand"
)


def measure(path, *flags) -> list[Row]:
    """The rows of a small run."""
    cli.call(benchmark_kernels.main, ["--tokens=16", "--repeats=2", f"--results={path}", *flags])
    return read_file(path)


class Recorder:
    """The kernels, and the names of those that were called."""

    def __init__(self, library):
        self.library, self.names = library, set()

    def __getattr__(self, name):
        self.names.add(name)
        return getattr(self.library, name)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole small run: its rows, what it printed, and the kernels that it called."""
    called = {module: Recorder(module.library()) for module in (train_ops, decode_step)}
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        for module, recorder in called.items():
            patch.setattr(module, "library", lambda recorder=recorder: recorder.library and recorder)
        rows = measure(tmp_path_factory.mktemp("kernels") / "rows.jsonl", "--model=tiny")
    return rows, out.getvalue(), {module: recorder.names for module, recorder in called.items()}


@needs_kernels
def test_every_kernel_is_measured_beside_what_it_equals(run):
    """All kernels are called, each form has its row, and the figures of a row follow from each other."""
    rows, out, called = run
    assert called[train_ops] >= set(train_ops.SIGNATURES)
    assert called[decode_step] >= {"decode_step", "rms_norm", "rotate_heads", "silu_mul", "read_all"}
    cells = [row.cell for row in rows]
    own = [] if prefill.needs_mask(PRESETS["tiny"].head_dim) else ["attention"]
    expected = [("prefill", name) for name in PREFILL + own] + [("train", name) for name in TRAIN]
    both = [(*one, engine) for one in expected for engine in ("kernel", "plain")]
    assert [(c["part"], c["operation"], c["engine"]) for c in cells if c["part"] != "decode"] == both
    kinds = [(c["rows"], c["weights"], c["engine"]) for c in cells if c["part"] == "decode"]
    assert kinds == [(n, w, e) for n in (1, 16) for w in ("bf16", "int8", "int4") for e in ("kernel", "plain")]
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for row in rows:
        m = row.metrics
        assert f"def {row.cell['equality']}(" in sources
        assert all(spread["n"] == 2 for spread in m.values()) and m["run_s"]["min"] > 0
        assert m["moved_gb_s"]["max"] == pytest.approx(m["moved_mb"]["median"] / m["run_s"]["min"] / 1e3)
        is_kernel, is_quantized = row.cell["engine"] == "kernel", row.cell.get("weights") in ("int8", "int4")
        assert ("plain_over_kernel_x" in m) == is_kernel
        assert ("linear_over_kernel_x" in m) == (is_kernel and is_quantized)
    assert render.markdown(tables.kernels(rows)) in out


def moved(rows: list[Row], **wanted) -> set[float]:
    chosen = [row for row in rows if all(row.cell.get(name) == value for name, value in wanted.items())]
    return {row.median("moved_mb") for row in chosen}


def test_bytes_are_those_of_operands_results_and_weights(run):
    rows, T, dim, ffn = run[0], 16, TINY.dim, TINY.ffn_dim
    n_weights, n_rows = TINY.block_linear_params(), 2 * dim + 2 * TINY.n_kv_heads * TINY.head_dim + 2 * ffn + dim
    assert moved(rows, operation="swiglu") == {3 * T * ffn * 2 / 1e6}
    assert moved(rows, operation="swiglu_backward") == {5 * T * ffn * 2 / 1e6}
    assert moved(rows, operation="rms_norm") == {((2 * T + 1) * dim * 2 + T * 4) / 1e6}
    assert moved(rows, operation="sgd_") == {dim * ffn * (4 + 2 + 4) / 1e6}
    assert moved(rows, weights="bf16") == {n_weights * 2 / 1e6}
    assert moved(rows, weights="int8") == {(n_weights + 4 * n_rows) / 1e6}
    assert moved(rows, weights="int4") == {(n_weights / 2 + n_weights / 32 * 2) / 1e6}


def test_a_machine_without_kernels_measures_the_plain_twins(tmp_path, capsys, monkeypatch):
    for module in (train_ops, decode_step):
        monkeypatch.setattr(module, "library", lambda: None)
    monkeypatch.setattr(prefill_attention, "library", lambda: None)
    rows = measure(tmp_path / "rows.jsonl", "--model=tiny-draft")
    assert {row.cell["engine"] for row in rows} == {"plain"} and len(rows) == 6 + len(PREFILL) + len(TRAIN)
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith("no kernels here for decode, prefill, train (they need Linux, AVX-512")
    assert "No kernel runs here." in out and "times as fast" in out and render.markdown(tables.kernels(rows)) in out


def test_only_the_operation_is_timed_on_operands_of_its_own(monkeypatch):
    """Neither the copies nor the bandwidth count; what a run overwrites, the next one has anew; ratios are by round."""
    clock, reads = [0.0], []
    monkeypatch.setattr(benchmark_kernels.stopwatch.time, "perf_counter", lambda: clock[0])

    def takes(seconds):
        def run(x):
            assert torch.equal(x, torch.ones(4))
            clock[0] += seconds
            return x.zero_()

        return run

    def read_bandwidth(reader):
        clock[0] += 1000.0
        reads.append(1)
        return {"sum": 1.0, "max": 4.0}

    monkeypatch.setattr(hardware, "read_bandwidth", read_bandwidth)
    for is_cold, n_reads in ((False, 3), (True, 9)):
        one = compared(named("train", "x", "", "test"), takes(2.0), takes(5.0), (torch.ones(4),), is_cold=is_cold)
        reads.clear()
        (runs,) = take_turns([one], random_model(), 3, random.Random(0))
        assert len(reads) == n_reads
        assert {run["run_s"] for run in runs["kernel"]} == {2.0} and {run["run_s"] for run in runs["plain"]} == {5.0}
        assert {(run["plain_over_kernel_x"], run["of_reading_x"]) for run in runs["kernel"]} == {(2.5, 32 / 2.0 / 4.0)}


def test_nothing_is_timed_that_does_not_do_the_same():
    def wrong(x):
        return x * 1.1

    message = "double: the kernel's result differs from that of plain PyTorch"
    for broken in (wrong, lambda x: x * float("nan")):
        with pytest.raises(InternalError, match=message) as caught:
            compared(DOUBLE, broken, lambda x: x, (torch.ones(4),))
        assert cli.explain(caught.value)[1] == 1
    assert compared(DOUBLE, lambda x: x * 1.001, lambda x: x, (torch.ones(4),)).moved == 32


def made_rows(kernel: float, plain: float) -> list[Row]:
    """The two rows of an operation."""
    metrics = {"run_s": kernel, "moved_mb": 77.7, "moved_gb_s": 66.6, "read_gb_s": 21.5, "of_reading_x": 3.25}
    sides = {"kernel": {**metrics, "plain_over_kernel_x": plain / kernel}, "plain": {**metrics, "run_s": plain}}
    found = []
    for side, values in sides.items():
        runs = {name: [value, value / 2, value * 2] for name, value in values.items()}
        cell = {"model": "tiny", "engine": side, **named("train", "norm", "x [2]", "test_norm")}
        found.append(rows.record(None, "kernels", cell, runs, torch.device("cpu"), "bfloat16"))
    return found


def shown(found: list[Row]) -> str:
    return render.markdown(tables.kernels(found))


def test_every_figure_of_the_table_stands_in_a_row_and_what_does_not_pay_is_named():
    found = made_rows(0.004, 0.006)
    text = shown(found)
    assert "| 4.000 (2.000 to 8.000) | 6.000 (3.000 to 12.000) | 1.50 | - | 77.7 | 66.6 | 3.25 | test_norm |" in text
    assert "of 3 runs" in text and "tiny: kernels, train" in text and "No kernel is slower than plain PyTorch." in text
    for i, name in [(0, name) for name in found[0].metrics] + [(1, "run_s")]:
        changed = copy.deepcopy(found)
        changed[i].metrics[name]["median"] *= 1.5
        assert shown(changed) != text, name
    assert "Slower than plain PyTorch: norm (x [2])." in shown(made_rows(0.006, 0.004))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model=gpt2", "--model=gpt2: expected one of llama3.2-1b"),
        ("--tokens=0", "--tokens=0: expected at least 1"),
        ("--tokens=200000", "--tokens=200000: more positions than the 131,072 of llama3.2-1b"),
        ("--repeats=0", "--repeats=0: expected at least 1"),
        ("--parts=decode,decode", "--parts=decode,decode: expected a choice of decode,prefill,train,gpu, each once"),
        ("--parts=gpu", "--parts=gpu: expected a choice of decode,prefill,train, each once"),
        ("--parts=all", "--parts=all: expected a choice of"),
        ("--results=/dev/null/rows.jsonl", "results file /dev/null/rows.jsonl cannot be written"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_measured(flags, message):
    with pytest.raises(InputError, match=re.escape(message)):
        cli.call(benchmark_kernels.main, flags.split())


def test_kernels_of_a_gpu_are_measured_beside_what_they_equal(monkeypatch):
    """On a CPU by Triton's interpreter: each is called, its results are compared, and its row says what it moves."""
    pytest.importorskip("triton")
    from llama.kernels.gpu import triton_ops

    called = Recorder(triton_ops)
    monkeypatch.setattr(gpu, "ops", lambda device: called)
    monkeypatch.setitem(triton_ops.ROW_TILES, "few", (64, 256))  # the interpreter takes as long for a small tile
    monkeypatch.setattr(benchmark_kernels, "GRAPH_CALLS", 2)
    monkeypatch.setattr(benchmark_kernels, "BATCH_SIZES", (1,))
    monkeypatch.setitem(benchmark_kernels.PARTS, "cpu", ("gpu",))
    args = dataclasses.replace(PRESETS["tiny-draft"], n_layers=1)
    with torch.no_grad():
        found = list(benchmark_kernels.operation_runs(args, 16, ("gpu",), 2, 1, torch.device("cpu"), torch.float16))
    assert called.names >= {"add_rms_norm", "rotate_and_store", "silu_mul", "int8_linear", "int4_linear"}
    shown = [(one.about["operation"], one.about.get("weights"), sorted(runs)) for one, runs in found]
    both, name = ["kernel", "plain"], "products of a block"
    assert shown[:3] == [(fused, None, both) for fused in ("sum and RMSNorm", "RoPE into the cache", "SwiGLU")]
    assert shown[3:] == [(name, "float16", ["plain"]), (name, "int8", both), (name, "int4", both)]
    sources = (ROOT / "tests" / "llama" / "kernels" / "test_gpu_kernels.py").read_text()
    assert all(f"def {one.about['equality']}(" in sources for one, _ in found)
    moved = {one.about["operation"]: one.moved for one, _ in found[:3]}
    assert moved == {
        "sum and RMSNorm": 5 * args.dim * 2,  # two read, two written, and the weight
        "RoPE into the cache": 2 * (args.n_heads + 2 * args.n_kv_heads) * args.head_dim * 2,
        "SwiGLU": 3 * args.ffn_dim * 2,
    }
