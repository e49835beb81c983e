"""What is measured, what a row says about it, and that tables say nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from support import CUDA, FakeGPU

import benchmark_inference
from benchmark_inference import Cell, CellRunner, Plan
from benchmarks import hardware as floors
from benchmarks import stopwatch
from llama import Llama, cli
from llama.config import PRESETS
from llama.errors import EnvironmentFailure, InputError
from llama.model import Transformer

ROW = "rows.append_row(pathlib.Path('rows.jsonl'), 'x', {}, {}, torch.device('cpu'), 'float32', 0)"


def test_a_row_names_a_command_that_can_be_typed_in_the_repository(tmp_path):
    """No path of the machine that measured it, and `-m` where a module was run."""
    script, results = tmp_path / "measure.py", tmp_path / "rows.jsonl"
    script.write_text(
        f"import pathlib, sys, torch\nsys.path.insert(0, {str(ROOT)!r})\nfrom benchmarks import rows\n{ROW}\n"
    )
    for command, out in ([str(script)], [f"--results={results}"]), (["-m", "measure"], ["--results", results]):
        subprocess.run([sys.executable, *command, "--x=1", *out, "--figure=a b"], cwd=tmp_path, check=True)
    commands = [json.loads(line)["command"] for line in results.read_text().splitlines()]
    assert commands == ["python measure.py --x=1", "python -m measure --x=1"]


def test_measured_time_is_that_of_the_work_all_of_it_and_only_it(monkeypatch):
    gpu = FakeGPU(monkeypatch)
    gpu.queue(100.0, n_bytes=900)  # something else that still runs, and had its own peak
    result, measured = stopwatch.measure(lambda: gpu.queue(2.0, n_bytes=50) or "result", CUDA)
    assert (result, measured.seconds, measured.peak_bytes) == ("result", 2.0, 50)


@pytest.mark.parametrize("omitted", ["synchronize before", "synchronize after", "reset"])
def test_each_precaution_of_measure_matters(monkeypatch, omitted):
    """With any one of them taken out, the test above would fail."""
    gpu = FakeGPU(monkeypatch)
    calls = []

    def synchronize(device=None):
        calls.append(1)
        if omitted != ("synchronize before" if len(calls) == 1 else "synchronize after"):
            gpu.synchronize()

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    if omitted == "reset":
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: None)
    gpu.queue(100.0, n_bytes=900)
    _, measured = stopwatch.measure(lambda: gpu.queue(2.0, n_bytes=50), CUDA)
    assert (measured.seconds, measured.peak_bytes) != (2.0, 50)


def test_a_cell_counts_neither_loading_nor_warm_up_nor_floors(monkeypatch):
    gpu = FakeGPU(monkeypatch)
    monkeypatch.setattr(benchmark_inference.devices, "resolve", lambda *a: (CUDA, torch.float16))
    monkeypatch.setattr(benchmark_inference.cells, "warm_libraries", lambda *a: gpu.queue(1000.0, 5000))
    monkeypatch.setattr(floors, "read_bandwidth", lambda model: gpu.queue(300.0, 5000) or {"sum": 1e12})
    monkeypatch.setattr(floors, "product_rate", lambda model: gpu.queue(300.0, 5000) or {"256 rows": 1e15})
    monkeypatch.setattr(benchmark_inference.time, "perf_counter", lambda: gpu.now)
    calls = []

    def generate(n, at_step):
        calls.append(n)
        gpu.queue(50.0 if len(calls) == 1 else 3.0, n_bytes=70)  # the first call compiles
        if at_step:
            at_step(1)
        gpu.queue(31.0)

    with torch.device("meta"):
        model = Transformer(PRESETS["tiny"])
    llama = SimpleNamespace(model=model, decoder=SimpleNamespace(name="captured"))
    monkeypatch.setattr(benchmark_inference, "load_ours", lambda *a: (gpu.queue(500.0, 5000), (generate, llama))[1])
    plan = Plan("", 256, 32, "cuda", "float16", "auto", 1, None, 1)
    runner = CellRunner(plan, Cell("llama", 1, True))
    for _ in range(2):
        values = runner()
        assert (values["runtime_s"], values["ttft_s"], values["tpot_s"]) == (34.0, 3.0, 1.0)
        assert (values["peak_memory_mb"], values["load_s"], values["warm_up_s"]) == (70 / 1e6, 500.0, 81.0)
    assert calls == [32, 32, 32]


@pytest.mark.slow
def test_benchmark_measures_every_cell(tmp_path):
    """A whole small benchmark, by its command line."""
    flags = "--model=tiny-draft --batch_sizes=1,3 --input_len=20 --output_len=4 --repeats=2 --device=cpu".split()
    paths = [f"--results={tmp_path / 'rows.jsonl'}", f"--figure={tmp_path / 'figure.png'}"]
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
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert benchmark_inference.table(rows) in run.stdout and benchmark_inference.details(rows) in run.stdout


def test_every_number_of_the_tables_stands_in_a_row(tmp_path):
    """Change any median in the rows and the tables change; take a row away and they say x or nothing."""
    plan = Plan("", 256, 32, "cpu", "float16", "auto", 1, None, 1)
    rows = []
    for i, cell in enumerate(Cell("llama", size, use_cache) for size in (1, 8) for use_cache in (True, False)):
        runs = [{"runtime_s": i + 0.25 * n, "peak_memory_mb": 2500.0 + i, "decoding": "eager"} for n in range(3)]
        rows.append(
            benchmark_inference.append_row(tmp_path / "r", "inference", "x", plan, cell, runs, torch.device("cpu"))
        )
    before = benchmark_inference.table(rows)
    for name in ("runtime_s", "peak_memory_mb"):
        changed = json.loads(json.dumps(rows))
        changed[0]["metrics"][name]["median"] += 1000
        assert benchmark_inference.table(changed) != before
    lost = [{**row, "metrics": {}} if row is rows[0] else row for row in rows]
    assert benchmark_inference.table(lost).count("| x ") == 2
    assert len(re.findall(r"\d", benchmark_inference.table(rows[:1]))) < len(re.findall(r"\d", before))


def test_a_cell_out_of_memory_is_an_x_and_the_rest_goes_on(monkeypatch):
    class Scripted:
        def __init__(self, plan, cell):
            self.cell = cell

        def ask(self):
            return None if self.cell.batch_size == 8 else {"runtime_s": 1.0}

        def close(self):
            pass

    monkeypatch.setattr(benchmark_inference, "start", Scripted)
    for device in ("cpu", "cuda"):
        cells = [Cell("llama", size, True) for size in (1, 8, 16)]
        plan = Plan("", 256, 32, device, "float16", "auto", 1, None, 1)
        runs = dict(benchmark_inference.measure(plan, cells, 3))
        assert [len(runs[cell]) for cell in cells] == [3, 0, 3]


def test_a_peer_that_does_not_run_is_left_out_and_said_so(monkeypatch, capsys):
    class Scripted:
        def __init__(self, plan, cell):
            self.cell = cell

        def ask(self):
            if self.cell.engine == "transformers":
                raise EnvironmentFailure("no such kernel")
            return {"runtime_s": 1.0}

        def close(self):
            pass

    monkeypatch.setattr(benchmark_inference, "start", Scripted)
    cells = [Cell("llama", 1, True), Cell("transformers", 1, True)]
    plan = Plan("", 256, 32, "cpu", "float16", "auto", 1, None, 1)
    runs = dict(benchmark_inference.measure(plan, cells, 2))
    assert runs == {cells[0]: [{"runtime_s": 1.0}] * 2}
    assert "batch 1, transformers, cache on does not run here: no such kernel" in capsys.readouterr().err


def test_nothing_is_timed_where_the_cache_changes_a_token(monkeypatch):
    """Tokens with and without the cache, in fp32: a difference ends the benchmark."""
    plan = Plan(str(ROOT / "data" / "tiny"), 20, 4, "cpu", "bfloat16", "auto", 1, None, 1)
    assert benchmark_inference.check_tokens(plan, torch.device("cpu")) == {"tokens_equal": 16}
    generate = Llama.generate

    def broken(self, prompts, n, *rest, use_cache=True, **options):
        tokens, logprobs = generate(self, prompts, n, *rest, use_cache=use_cache, **options)
        return [[token + use_cache for token in row] for row in tokens], logprobs

    monkeypatch.setattr(Llama, "generate", broken)
    with pytest.raises(InputError, match="tokens with and without the KV cache differ in float32"):
        benchmark_inference.check_tokens(plan, torch.device("cpu"))


def test_a_worker_says_what_went_wrong(tmp_path):
    plan = Plan(str(tmp_path / "nothing"), 8, 2, "cpu", "float32", "auto", 1, None, 1)
    worker = benchmark_inference.start(plan, Cell("llama", 1, True))
    with pytest.raises(EnvironmentFailure, match=r"ended with 2: error: .*nothing"):
        worker.ask()
    worker.close()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch_sizes=0", "--batch_sizes=0: expected different numbers above 0"),
        ("--batch_sizes=1,x", "expected different numbers"),
        ("--input_len=0", "--input_len=0: expected at least 1"),
        ("--output_len=1", "--output_len=1: expected at least 2"),
        ("--repeats=0", "--repeats=0: expected at least 1"),
        ("--cache=maybe", "--cache=maybe: expected both, on or off"),
        ("--model=gpt2", "--model=gpt2: expected one of llama3.2-1b"),
        ("--device=tpu", "device 'tpu' is"),
        ("--dtype=int3", "dtype 'int3' is unknown"),
        ("--decoding=fast", "--decoding=fast: expected one of auto, eager, compiled"),
        ("--weights=int8,int3", "--weights=int8,int3: expected different ones of bf16, int8, int4"),
        ("--weights=int8 --ckpt_dir=data/tiny", "--weights: is for random weights"),
        ("--against=vllm", "--against=vllm: expected transformers"),
        ("--device=cpu --memory_limit_gb=16", "--memory_limit_gb=16.0: expected more than 0, and a CUDA device"),
        ("--results=/dev/null/rows.jsonl", "results file /dev/null/rows.jsonl cannot be written"),
        ("--input_len=1000000", "--input_len=1000000 --output_len=32: more positions than"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_measured(flags, message):
    with pytest.raises(InputError, match=re.escape(message)):
        cli.call(benchmark_inference.main, ["--model=tiny", *flags.split()][(1 if "--model" in flags else 0) :])
