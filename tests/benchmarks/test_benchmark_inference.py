"""Table 1: only generations are timed, and only where the tokens are right."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from support import CUDA, FakeGPU

import benchmark_inference
from benchmark_inference import GenerationCell, GenerationRunner, Options, TokenCheck
from benchmarks import hardware, workers
from benchmarks.rows import read_file
from llama import Llama, Transformer, cli
from llama.config import PRESETS
from llama.errors import InputError, InternalError
from reports import render, tables

OPTIONS = Options(model="tiny", device="cpu", dtype="float16")


def test_a_cell_counts_neither_loading_nor_warm_up_nor_limits(monkeypatch):
    gpu = FakeGPU(monkeypatch)
    monkeypatch.setattr(benchmark_inference.devices, "resolve", lambda *a: (CUDA, torch.float16))
    monkeypatch.setattr(workers, "warm_libraries", lambda *a: gpu.queue(1000.0, 5000))
    monkeypatch.setattr(hardware, "read_bandwidth", lambda model: gpu.queue(300.0, 5000) or {"sum": 1e12})
    monkeypatch.setattr(hardware, "product_rate", lambda model: gpu.queue(300.0, 5000) or {"256 tokens": 1e15})
    calls = []

    def generate(n, on_step):
        calls.append(n)
        gpu.queue(50.0 if len(calls) == 1 else 3.0, n_bytes=70)  # the first call compiles
        if on_step:
            on_step(1)
        gpu.queue(31.0)

    with torch.device("meta"):
        model = Transformer(PRESETS["tiny"])
    llama = SimpleNamespace(model=model, decoder=SimpleNamespace(name="captured"))
    loaded = lambda self: (gpu.queue(500.0, 5000), (generate, llama))[1]  # noqa: E731
    monkeypatch.setattr(GenerationRunner, "_load_ours", loaded)
    monkeypatch.setattr(benchmark_inference, "weights_of", lambda model: "fp16")
    runner = GenerationRunner(OPTIONS, GenerationCell("llama", 1, True), Path())
    runner.prepare()
    for _ in range(2):
        values = runner.measure()
        assert (values["runtime_s"], values["ttft_s"], values["tpot_s"]) == (34.0, 3.0, 1.0)
        assert (values["peak_memory_mb"], values["load_s"], values["warm_up_s"]) == (70 / 1e6, 500.0, 81.0)
    assert calls == [32, 32, 32]


@pytest.mark.slow
def test_benchmark_measures_every_cell(tmp_path):
    """A whole small benchmark, by its command line."""
    flags = "--model=tiny-draft --batch_sizes=1,3 --input_len=20 --output_len=4 --repeats=2 --device=cpu".split()
    paths = [f"--results={tmp_path / 'rows.jsonl'}", f"--figures={tmp_path}"]
    run = subprocess.run(
        [sys.executable, "benchmark_inference.py", *flags, *paths], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    places = [(row["cell"]["engine"], row["cell"]["batch_size"], row["cell"]["use_cache"]) for row in rows]
    assert sorted(places) == [("llama", n, cache) for n in (1, 3) for cache in (False, True)]
    for row in rows:
        value = {name: spread["median"] for name, spread in row["metrics"].items()}
        assert all(spread["n"] == 2 for spread in row["metrics"].values())
        assert row["cell"]["decoding"] in ("native", "eager")
        assert 0 < value["ttft_s"] < value["runtime_s"] and value["tpot_s"] > 0
        assert value["floor_runtime_s"] == pytest.approx(value["floor_ttft_s"] + 3 * value["floor_tpot_s"], rel=0.5)
        args = PRESETS["tiny-draft"]
        cache = args.kv_cache_bytes(row["cell"]["batch_size"], 23, 2) if row["cell"]["use_cache"] else 0
        logits = row["cell"]["batch_size"] * args.vocab_size * 2
        assert value["floor_peak_memory_mb"] == (args.weight_bytes(2) + cache + logits) / 1e6
    assert {path.name for path in tmp_path.glob("*.svg")} == {
        f"generation-{what}-tiny-draft-cpu.svg" for what in ("runtime", "memory")
    }
    found = read_file(tmp_path / "rows.jsonl")
    assert render.markdown(tables.table_1(found) + tables.generation_details(found)) in run.stdout


def test_a_cell_out_of_memory_is_an_x():
    """Its row has no metrics, and says what was to be measured."""
    run = {"runtime_s": 1.25, "decoding": "eager", "weights": "fp16"}
    cells = {GenerationCell("llama", 1, True): [run] * 3, GenerationCell("llama", 8, True): []}
    found = [benchmark_inference.keep(None, "inference", OPTIONS, *item) for item in cells.items()]
    assert [row.cell["decoding"] for row in found] == ["eager", "auto"] and found[1].metrics == {}
    assert "| with KV cache: runtime (s) | 1.25 | x |" in render.markdown(tables.table_1(found))


def test_cells_of_one_batch_size_take_turns_on_a_cpu_and_each_runs_alone_on_a_gpu():
    cells = [GenerationCell("llama", size, use_cache) for size in (1, 8) for use_cache in (True, False)]
    groups = workers.turns(cells, torch.device("cpu"), lambda cell: cell.batch_size)
    assert groups == [cells[:2], cells[2:]]
    assert workers.turns(cells, CUDA, lambda cell: cell.batch_size) == [[cell] for cell in cells]


def test_nothing_is_timed_where_the_cache_changes_a_token(monkeypatch):
    """Tokens with and without the cache, in fp32: a difference ends the benchmark, as a fault of this code."""
    check = TokenCheck(Options(input_len=20, device="cpu", dtype="bfloat16"), ROOT / "data" / "tiny")
    check.prepare()
    assert check.measure() == {"tokens_equal": 16}
    generate = Llama.generate

    def broken(self, prompts, n, *rest, use_cache=True, **options):
        tokens, logprobs = generate(self, prompts, n, *rest, use_cache=use_cache, **options)
        return [[token + use_cache for token in row] for row in tokens], logprobs

    monkeypatch.setattr(Llama, "generate", broken)
    with pytest.raises(InternalError, match="tokens with and without the KV cache differ in float32") as caught:
        check.measure()
    assert cli.explain(caught.value)[1] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch_sizes=0", "--batch_sizes=0: expected different numbers above 0"),
        ("--batch_sizes=1,x", "expected different numbers"),
        ("--input_len=0", "--input_len=0: expected at least 1"),
        ("--output_len=1", "--output_len=1: expected at least 2"),
        ("--repeats=0", "--repeats=0: expected at least 1"),
        ("--cache=maybe", "--cache=maybe: expected one of both, on, off"),
        ("--model=gpt2", "--model=gpt2: expected one of llama3.2-1b"),
        ("--device=tpu", "--device=tpu is"),
        ("--dtype=int3", "dtype=int3 is unknown"),
        ("--decoding=fast", "--decoding=fast: expected one of auto, eager, compiled"),
        ("--weights=int8,int3", "--weights=int8,int3: expected a choice of fp32,bf16,fp16,int8,int4, each once"),
        ("--weights=fp16", "--weights=fp16: expected different ones of bf16, int8, int4"),
        ("--weights=int8 --ckpt_dir=data/tiny", "--weights=int8: is for random weights"),
        ("--against=vllm", "--against=vllm: expected one of transformers"),
        ("--device=cpu --memory_limit_gb=16", "--memory_limit_gb=16.0: expected a CUDA device"),
        ("--memory_limit_gb=0", "--memory_limit_gb=0.0: expected more than 0"),
        ("--results=/dev/null/rows.jsonl", "results file /dev/null/rows.jsonl cannot be written"),
        ("--input_len=1000000", "--input_len=1000000 --output_len=32: more positions than"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_measured(flags, message):
    with pytest.raises(InputError, match=re.escape(message)):
        cli.call(benchmark_inference.main, ["--model=tiny", *flags.split()][(1 if "--model" in flags else 0) :])
