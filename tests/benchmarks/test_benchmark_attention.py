"""The benchmark of attention: textbook and fused do the same, are measured at every length, and the error is one."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch.nn.attention import SDPBackend

from benchmarks import attention as benchmark
from benchmarks.rows import Row, read_file
from llama import cli
from llama.config import PRESETS
from llama.errors import InputError
from reports import charts, render, tables

ARGS, CPU = PRESETS["llama3.2-1b"], torch.device("cpu")
FLAGS = ("--device=cpu", "--lengths=16,40", "--repeats=2")


def measure(folder, *flags: str) -> list[Row]:
    path = folder / "rows.jsonl"
    cli.call(benchmark.main, [f"--results={path}", f"--figures={folder}", *FLAGS, *flags])
    return read_file(path)


def test_every_form_is_measured_at_every_length(tmp_path, capsys):
    found = measure(tmp_path)
    cells = [(row.cell["positions"], row.data["dtype"], row.cell["engine"]) for row in found]
    dtypes, engines = ("float32", "bfloat16"), ("textbook", "fused")
    assert cells == [(n, dtype, engine) for n in (16, 40) for dtype in dtypes for engine in engines]
    for row in found:
        assert row.cell["heads"] == 4 and row.cell["kv_heads"] == 1
        assert row.metrics["forward_s"]["n"] == row.metrics["backward_s"]["n"] == 2 and row.median("forward_s") > 0
        assert row.metrics["backward_peak_mb"]["n"] == 1
        most = 1e-6 if row.data["dtype"] == "float32" else 2e-2
        assert 0 < row.median("forward_error_x") < most and 0 < row.median("backward_error_x") < most
    [table] = tables.attention(found)
    assert len(table.body) == len(found) and render.markdown([table]) in capsys.readouterr().out
    drawn = charts.attention(found)
    assert len(drawn) == 2 and all((tmp_path / f"{name}.svg").exists() for name in drawn)


def test_all_forms_are_the_same_function():
    """Of grouped heads, with gradients; and those of PyTorch by name, with keys and values repeated where needed."""
    operands = benchmark.draw(ARGS, 2, 33, CPU, 0)
    expected = benchmark.results_in_parts(*operands)
    forms = [benchmark.textbook, benchmark.fused]
    forms += [benchmark.by_backend(one) for one in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)]
    for form in forms:
        results, *_ = benchmark.run(form, operands, torch.float64)
        for ours, theirs in zip(results, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_the_reference_in_parts_is_the_textbook(monkeypatch):
    operands = benchmark.draw(ARGS, 1, 21, CPU, 3)
    whole, *_ = benchmark.run(benchmark.textbook, operands, torch.float64)
    for size in (1, 4, 20, 64):
        monkeypatch.setattr(benchmark, "EXACT_QUERIES", size)
        for ours, theirs in zip(benchmark.results_in_parts(*operands), whole, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_the_textbook_stops_where_its_scores_do_not_fit(tmp_path, capfd):
    """Four matrices of 4 heads and 40 x 40 numbers: 102,400 bytes in fp32, half of it in bf16."""
    found = measure(tmp_path, "--textbook_limit_gb=6e-5")
    lost = [(row.cell["positions"], row.data["dtype"], row.cell["engine"]) for row in found if not row.metrics]
    assert lost == [(40, "float32", "textbook")]
    out, err = capfd.readouterr()
    assert "textbook, 40 positions, float32: left out" in out + err
    line = next(line for line in out.splitlines() if line.startswith("| 40 | fp32 | textbook |"))
    assert set(line.split("|")[4:-1]) == {" x ", " - "}


PEAKS = """
from benchmarks.attention import *
operands = draw(PRESETS["llama3.2-1b"], 1, 1024, torch.device("cpu"), 0)
for form in (textbook, fused):
    run(form, draw(PRESETS["llama3.2-1b"], 1, WARM_UP, torch.device("cpu"), 0), torch.float32)
for form in (textbook, fused):
    devices.return_freed_memory()
    print(*run(form, operands, torch.float32)[2].values())
"""


def test_memory_counts_the_matrices_of_scores():
    """Two in the textbook's forward pass, three with the backward pass; none of them in the fused kernel.

    In a fresh process: in one that has freed a lot, new blocks lie in pages that it has already.
    """
    matrix = 4 * 1024 * 1024 * 4 / 1e6
    run = subprocess.run([sys.executable, "-c", PEAKS], cwd=ROOT, capture_output=True, text=True, check=True)
    textbook, fused = ([float(peak) / matrix for peak in line.split()] for line in run.stdout.splitlines())
    if not fused:
        pytest.skip("the peak is not measurable on this system")
    assert 1.9 < textbook[0] < 3 and 2.9 < textbook[1] < 4.5 and max(fused) < 1


def test_kernels_that_do_not_run_here_are_left_out(monkeypatch):
    """As on a GPU that is too old for one; what fails in a form of ours is an error."""

    def broken(q, k, v):
        raise RuntimeError("No available kernel")

    named = {"flash": benchmark.fused, "cudnn": broken}
    monkeypatch.setattr(benchmark, "by_backend", lambda backend: named[backend])
    monkeypatch.setattr(benchmark, "BACKENDS", {name: name for name in named})
    gpu = type("Device", (), {"type": "cuda"})()
    draw, run = benchmark.draw, benchmark.run
    monkeypatch.setattr(benchmark, "draw", lambda args, heads, n, device, seed: draw(args, heads, n, CPU, seed))
    assert list(benchmark.forms_of(gpu, torch.float32, ARGS, 0)) == ["textbook", "fused", "flash"]
    monkeypatch.setattr(benchmark, "run", lambda form, *rest: run(broken, *rest))
    with pytest.raises(RuntimeError):
        benchmark.forms_of(gpu, torch.float32, ARGS, 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lengths=16,0", "--lengths=16,0: expected different numbers above 0"),
        ("--kv_heads=0", "--kv_heads=0: expected at least 1"),
        ("--dtypes=int8", "--dtypes=int8: expected a choice of float32,bfloat16,float16, each once"),
        ("--textbook_limit_gb=0", "--textbook_limit_gb=0.0: expected more than 0"),
        ("--results=/dev/null/rows.jsonl", "results file /dev/null/rows.jsonl cannot be written"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_measured(flags, message):
    with pytest.raises(InputError, match=re.escape(message)):
        cli.call(benchmark.main, flags.split())
