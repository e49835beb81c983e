"""The leaderboard: each figure is of the work that its title names, and the table shows nothing but rows."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import vocabularies
from conftest import ROOT, TINY, random_model
from conftest import SMALL as SHAPE

from benchmarks import leaderboard, stopwatch, workers
from benchmarks.leaderboard import ADAPTERS, ALL_WEIGHTS, GENERATION, LOSS, Cell, CellRunner, Setup, cells_of
from benchmarks.rows import Row, read_file
from data.tiny.sequences import held_out
from llama import Tokenizer, checkpoint, cli, lora, quantization
from llama.errors import InputError
from llama.evaluation import perplexity
from llama.quantization import Quantization
from reports import render, tables

INT4 = "int4 with zero-points"
EMBEDDED = Tokenizer(TINY / "tokenizer.model")
MODEL = f"--ckpt_dir={TINY / 'draft'} --tokenizer_path={TINY / 'tokenizer.model'}"  # a tenth of the embedded model
SMALL = "--batch_sizes=1,3 --accumulation=2 --seq_len=9 --input_len=7 --output_len=5 --max_tokens=600 --device=cpu"
SIZES = {"seq_len": 9, "accumulation": 2, "input_len": 7, "output_len": 5, "tokens": 600, "context": 257}


class InProcess:
    """A worker without a process."""

    def __init__(self, runner):
        self.runner, self.is_prepared = runner, False

    def ask(self):
        if not self.is_prepared:
            self.runner.prepare()
            self.is_prepared = True
        return self.runner.measure()

    def close(self):
        pass


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return held_out(EMBEDDED, n=4).flatten().tolist()


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[list[Row], str]:
    """The rows of a whole small leaderboard, and what it printed."""
    path = tmp_path_factory.mktemp("leaderboard") / "rows.jsonl"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(workers, "Worker", InProcess)
        cli.call(leaderboard.main, f"{MODEL} {SMALL} --repeats=2 --results={path}".split())
    return read_file(path), printed.getvalue()


def prepared(ids: list[int], cell: Cell, **changes) -> CellRunner:
    directories = dict.fromkeys(("whole", "int8", INT4), str(TINY / "draft"))
    setup = Setup(directories, ids, **{**SIZES, **changes}, device="cpu", half="bfloat16")
    runner = CellRunner(setup, cell)
    runner.prepare()
    return runner


def test_every_cell_has_its_row_and_every_row_its_place_in_the_table(measured):
    rows, printed = measured
    cells = cells_of([1, 3], "bf16")
    names = [field.name for field in dataclasses.fields(Cell)]
    assert [Cell(**{name: row.cell[name] for name in names}) for row in rows] == cells
    assert len(cells) == 4 + 4 * 2 + 5 * 2
    (table,) = tables.leaderboard(rows)
    assert table.rows == rows and render.markdown([table]) in printed
    assert [line[0] for line in table.body] == [
        "fp32, all weights", "bf16, all weights", "bf16, LoRA", "int8, LoRA", f"{INT4}, LoRA"
    ]  # fmt: skip
    assert not {cell for line in table.body for cell in line} & {"-", "x"}
    before = render.markdown([table])
    for number, row in enumerate(rows):
        for name in ("tokens_per_s", "loss_nats", "peak_memory_mb"):
            changed = copy.deepcopy(rows)
            if row.has(name):
                changed[number].metrics[name]["median"] += 1000
                is_shown = name != "tokens_per_s" if row.cell["work"] == LOSS else True
                is_shown &= name != "peak_memory_mb" or row.cell["batch_size"] == 3
                assert (render.markdown(tables.leaderboard(changed)) != before) == is_shown, (row.cell, name)
    lost = [
        Row(row.file, row.line, {**row.data, "metrics": {}}) if row.cell["work"] == ADAPTERS else row for row in rows
    ]
    (table,) = tables.leaderboard(lost)
    assert [line[2] == "x" for line in table.body] == [False, False, True, True, True]


def test_other_sizes_make_a_table_of_their_own(measured):
    rows, _ = measured
    others = [Row("other.jsonl", row.line, copy.deepcopy(row.data)) for row in rows]
    for row in others:
        row.cell["accumulation"] = 40
    assert len(tables.leaderboard([*rows, *others])) == 2 and not tables.leaderboard([])


def test_throughput_is_of_whole_steps_and_of_generated_tokens(measured):
    rows, _ = measured
    for row in rows:
        count = {LOSS: 600 - 3, GENERATION: (row.cell["batch_size"] or 0) * 5}  # of three windows, one token each
        tokens = count.get(row.cell["work"], 2 * (row.cell["batch_size"] or 0) * 9)
        runs = {LOSS: 1}.get(row.cell["work"], 2)
        assert row.metrics["runtime_s"]["n"] == runs and row.has("peak_memory_mb")
        slowest, fastest = (row.metrics["tokens_per_s"][end] for end in ("min", "max"))
        assert slowest == pytest.approx(tokens / row.metrics["runtime_s"]["max"])
        assert fastest == pytest.approx(tokens / row.metrics["runtime_s"]["min"])
    weights = {row.cell["weights"]: row.median("weights_mb") for row in rows if row.cell["work"] == GENERATION}
    assert weights["fp32"] == 2 * weights["bf16"] and weights["bf16"] > weights["int8"] > weights[INT4]
    assert {row.data["dtype"] for row in rows if "fp32" in row.cell["weights"]} == {"float32"}
    assert {row.data["dtype"] for row in rows if row.cell["work"] == GENERATION and row.cell["weights"] == INT4} == {
        "bfloat16"
    }


def test_the_loss_is_that_of_evaluate(measured, ids):
    rows, _ = measured
    loss = {row.cell["weights"]: row.median("loss_nats") for row in rows if row.cell["work"] == LOSS}
    plain = perplexity.evaluate(checkpoint.load(TINY / "draft", torch.float32), ids[:600], 257).loss
    assert loss["fp32"] == pytest.approx(plain, rel=1e-6)
    assert all(0 < abs(loss[name] - plain) < 0.1 for name in ("bf16", "int8", INT4))
    assert rows[0].cell["data"] == "the embedded model's held-out text" and rows[0].cell["tokens"] == 600


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_what_is_trained_is_what_the_entry_says(ids, weights):
    """All weights in fp32, under autocast where it says bf16; adapters alone, of a lean step."""
    runner = prepared(ids, Cell(weights, ALL_WEIGHTS, 3))
    before = {name: weight.detach().clone() for name, weight in runner.model.named_parameters()}
    seen = []
    hook = runner.model.layers[0].feed_forward.w1.register_forward_hook(lambda _, x, y: seen.append(y.dtype))
    assert runner.work() == 2 * 3 * 9
    hook.remove()
    assert set(seen) == {torch.float32 if weights == "fp32" else torch.bfloat16} and len(seen) == 2
    for name, weight in runner.model.named_parameters():
        assert weight.dtype is torch.float32 and not torch.equal(weight, before[name]), name
    if weights == "bf16":
        runner = prepared(ids, Cell(weights, ADAPTERS, 3))
        trained = {name for name, weight in runner.model.named_parameters() if weight.requires_grad}
        assert trained == lora.state_dict(runner.model).keys() and runner.model.norm.weight.dtype is torch.bfloat16
        assert runner.work() == 2 * 3 * 9


def test_only_whole_steps_are_taken(ids):
    """With text for a step and a half, each of them has all of its sequences."""
    runner = prepared(ids[: 9 * 8 + 1], Cell("fp32", ALL_WEIGHTS, 3))
    assert [runner.work() for _ in range(3)] == [54] * 3


def test_only_the_work_is_timed(ids, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: clock.now)
    load = checkpoint.load

    def slow_load(*arguments):
        clock.now += 100
        return load(*arguments)

    monkeypatch.setattr(leaderboard.checkpoint, "load", slow_load)
    runner = prepared(ids, Cell("fp32", GENERATION, 2))
    work = runner.work

    def slow_work():
        clock.now += 4
        return work()

    runner.work = slow_work
    found = runner.measure()
    assert (found["runtime_s"], found["tokens_per_s"]) == (4, 2 * 5 / 4)


@pytest.mark.slow
def test_it_measures_the_embedded_model(tmp_path):
    """By its command line, each cell in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.leaderboard", *SMALL.split(), "--repeats=1"]
    run = subprocess.run([*command, f"--results={tmp_path / 'rows'}"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = read_file(tmp_path / "rows")
    assert render.markdown(tables.leaderboard(found)) in run.stdout and found[0].cell["model"] == "tiny"
    memory = {row.cell["weights"]: row.median("peak_memory_mb") for row in found if row.cell["work"] == ALL_WEIGHTS}
    assert all(n > 4 * 20 for n in memory.values())  # weights, gradients and AdamW's two averages, in fp32


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch_sizes=4,4", "--batch_sizes=4,4: expected different numbers above 0"),
        ("--batch_sizes=four", "--batch_sizes=four: expected different numbers"),
        ("--accumulation=0", "--accumulation=0: expected at least 1"),
        ("--seq_len=1", "--seq_len=1: expected at least 2"),
        ("--max_tokens=1", "--max_tokens=1: expected at least 2"),
        ("--input_len=131072", "--seq_len=64 --input_len=131072 --output_len=32: more than the model's 131,072 tokens"),
        ("--data=absent.txt", "cannot read absent.txt"),
        ("--ckpt_dir=absent", "absent"),
        ("--device=tpu", "--device=tpu is"),
        ("--results=/dev/null/rows.jsonl", "results file /dev/null/rows.jsonl cannot be written"),
        ("--accumulation=400", "the text has 65,792 tokens; --batch_sizes=4,12 with --accumulation=400"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_measured(tmp_path, flags, message):
    given = [f"--results={tmp_path / 'rows'}"] if "--results" not in flags else []
    with pytest.raises(InputError, match=re.escape(message)):
        cli.call(leaderboard.main, [*given, *flags.split()])


def test_a_model_of_another_world_needs_a_text_and_every_model_its_original(tmp_path):
    tokenizer = vocabularies.write(tmp_path, "smollm2")
    args = dataclasses.replace(SHAPE, vocab_size=Tokenizer(tokenizer).n_words)
    checkpoint.save(model := random_model(args), tmp_path / "model")
    flags = [f"--results={tmp_path / 'rows'}", f"--tokenizer_path={tokenizer}"]
    with pytest.raises(InputError, match="--data is missing; pass a text file to measure on"):
        cli.call(leaderboard.main, [*flags, f"--ckpt_dir={tmp_path / 'model'}"])
    quantization.quantize(model, Quantization(8))
    checkpoint.save(model, tmp_path / "int8")
    with pytest.raises(InputError, match="int8 is quantized; pass the original"):
        cli.call(leaderboard.main, [*flags, f"--ckpt_dir={tmp_path / 'int8'}"])
