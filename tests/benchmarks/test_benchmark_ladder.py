"""The ladder: each row is one change, is held by a test that exists, and shows only what was measured."""

from __future__ import annotations

import ast
import copy
import dataclasses
import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY

from benchmarks import ladder as benchmark_ladder
from benchmarks import rows, workers
from benchmarks.ladder import OWN, REPETITIVE, LadderSetup, Rung, RungRunner, ladder
from benchmarks.rows import Row, read_file
from llama import cli
from llama.errors import InputError
from reports import render, tables

RUNGS, CPU = ladder(True), torch.device("cpu")
SETUP = LadderSetup({"whole": str(TINY)}, {OWN: [[1, 2, 3]] * 2, REPETITIVE: [[4, 5, 6]] * 2}, 4, "cpu", "float32")
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?")


def imagined_rows() -> list[Row]:
    """Rows as a run of the embedded model leaves them; the last but one ran out of memory."""
    runs = {rung: [imagined_run(rung, turn) for turn in range(3)] for rung in RUNGS}
    runs[RUNGS[-2]] = []
    found = []
    for rung in RUNGS:
        quality = {"perplexity_x": 1.5 + rung.row / 7, "loss_nats": 0.4, "scored_tokens": 65_536}
        cell, metrics, series = benchmark_ladder.describe("tiny", SETUP, rung, runs, quality)
        found.append(rows.record(None, "ladder", cell, metrics, CPU, "bfloat16", 1, series))
    return found


def imagined_run(rung: Rung, turn: int) -> dict:
    values = {"runtime_s": 10 / rung.row + turn / 8, "tokens_per_s": 900.0 * rung.row, "weights_mb": 9.9 / rung.row}
    values["peak_memory_mb"] = 20.0 + rung.row
    if rung.draft:
        values |= {"acceptance": 0.8 - rung.row / 50, "tokens_a_round": 2.5 + rung.row / 50}
    return values | {"decoding": "native", "ids": [[7, 8, 9, rung.row], [7, 8, 9, 9]]}


def shown_text(found: list[Row]) -> str:
    return render.markdown(tables.ladder(found) + tables.drafts(found))


def measured(setup: LadderSetup, rung: Rung) -> dict:
    runner = RungRunner(setup, rung)
    runner.prepare()
    return runner.measure()


@pytest.mark.parametrize("has_text", [True, False])
def test_a_row_is_one_change_to_the_row_it_names(has_text):
    cells = ladder(has_text)
    assert [cell.row for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        if cell.changes is None:
            assert (cell.name, cell.use_cache, cell.draft, cell.weights) == ("no cache", False, None, "whole")
            continue
        base = cells[cell.changes - 1]
        kinds = [field.name for field in dataclasses.fields(Rung) if field.name not in ("row", "name", "changes")]
        assert base.row < cell.row and sum(getattr(cell, kind) != getattr(base, kind) for kind in kinds) == 1
    assert has_text or not any(cell.draft for cell in cells)  # what a draft knows of random weights means nothing


def test_every_row_is_held_by_a_test_that_exists():
    names = set(benchmark_ladder.STEPS.values())
    names |= {cell.name for cell in RUNGS}
    assert benchmark_ladder.TESTS.keys() == names
    for place in benchmark_ladder.TESTS.values():
        file, _, name = place.partition("::")
        tree = ast.parse((ROOT / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, place


def test_every_number_of_the_table_stands_in_a_row():
    found = imagined_rows()
    text = shown_text(found)
    values = {v[part] for row in found for v in row.metrics.values() for part in ("median", "min", "max", "n")}
    times = [row.median("runtime_s") for row in found if row.metrics]
    values |= {a / b for a in times for b in times}
    known = {format(value, form) for value in values for form in (",.0f", ",.1f", ".2f", ".3f", ".4f")}
    known |= {number.strip(",") for row in found for number in NUMBER.findall(json.dumps(row.data))}
    known.add("8")  # tokens of two prompts
    assert {number.strip(",.") for number in NUMBER.findall(text)} <= known
    for number, row in enumerate(found):
        for name in ("runtime_s", "tokens_per_s", "weights_mb", "peak_memory_mb", "perplexity_x", "acceptance"):
            if row.has(name):
                changed = copy.deepcopy(found)
                changed[number].metrics[name]["median"] += 1000
                assert shown_text(changed) != text, (row.cell["name"], name)


def test_ratios_are_to_the_row_that_is_changed_and_to_the_first_on_the_same_text():
    found = imagined_rows()
    [table] = tables.ladder(found)
    lines = [[render.text(cell) for cell in line] for line in table.body]
    shown = {int(line[0].partition(".")[0]): line for line in lines}
    time = {row.cell["row"]: row.median("runtime_s") for row in found if row.metrics}
    assert shown[1][5:8] == ["-", "-", "-"] and shown[3][0] == "3. C step"
    assert shown[6][5:7] == [f"{time[3] / time[6]:.2f}", f"{time[1] / time[6]:.2f}"]
    assert shown[13][5:7] == [f"{time[11] / time[13]:.2f}", f"{time[9] / time[13]:.2f}"]
    assert shown[6][7] == "7 of 8"  # the imagined ids part at the last token of the first text
    assert shown[12][3:11] == ["x"] * 8
    assert "| draft | repetitive |" not in render.markdown(tables.drafts(found))


def test_equal_tokens_end_where_texts_part():
    assert benchmark_ladder.equal_tokens([[1, 2, 3], [4, 5, 6]], [[1, 9, 3], [4, 5, 6]]) == 1 + 3


def test_speculation_is_measured_with_the_drafts_own_weights_and_the_same_tokens():
    prompts = benchmark_ladder.make_prompts("tiny", 40, 1)
    assert {len(ids) for ids in prompts[OWN]} == {40} and len({len(ids) for ids in prompts[REPETITIVE]}) == 1
    plan = dataclasses.replace(SETUP, prompts={REPETITIVE: prompts[REPETITIVE][:2]}, output_len=12)
    plain, draft, lookup = (measured(plan, rung) for rung in RUNGS[-3:])
    assert plain["ids"] == draft["ids"] == lookup["ids"] and all(len(ids) == 12 for ids in plain["ids"])
    assert lookup["weights_mb"] == plain["weights_mb"] < draft["weights_mb"]
    for run in (draft, lookup):
        assert 0 <= run["acceptance"] <= 1 <= run["tokens_a_round"]
        assert run["tokens_per_s"] == pytest.approx(24 / run["runtime_s"])


def test_it_measures_random_weights_without_perplexity_and_drafts(tmp_path, monkeypatch, capsys):
    """A whole small benchmark, without the processes."""

    class InProcess:
        def __init__(self, runner):
            runner.prepare()
            self.ask = runner.measure

        def close(self):
            pass

    monkeypatch.setattr(workers, "Worker", InProcess)
    flags = "--model=tiny-draft --input_len=12 --output_len=4 --repeats=2 --device=cpu --dtype=float32".split()
    paths = [f"--results={tmp_path / 'rows.jsonl'}", f"--figures={tmp_path}"]
    cli.call(benchmark_ladder.main, [*flags, *paths])
    found = read_file(tmp_path / "rows.jsonl")
    assert [row.cell["name"] for row in found] == ["no cache", "KV cache", "auto", "int8", "int4", "pruned"]
    size = [row.median("weights_mb") for row in found]
    assert size[0] == size[1] == size[2] > size[3] > size[4] and size[5] < size[2]
    for row in found:
        assert all(values["n"] == 2 for values in row.metrics.values()) and "perplexity_x" not in row.metrics
        assert row.data["series"]["test"] == [benchmark_ladder.TESTS[row.cell["name"]]]
    assert [row.metrics["tokens_equal"]["min"] for row in found[1:3]] == [4, 4]
    assert (tmp_path / "ladder-speed-tiny-draft-cpu.svg").exists()
    out = capsys.readouterr().out
    assert shown_text(found) in out and "no draft, whose acceptance would mean nothing" in out


@pytest.mark.slow
def test_it_measures_every_row(tmp_path):
    """A whole small benchmark of the embedded model, by its command line."""
    flags = "--input_len=24 --output_len=8 --repeats=1 --max_tokens=600 --device=cpu".split()
    paths = [f"--results={tmp_path / 'rows.jsonl'}", f"--figures={tmp_path}"]
    command = [sys.executable, "-m", "benchmarks.ladder", *flags, *paths]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = read_file(tmp_path / "rows.jsonl")
    assert [row.cell["row"] for row in found] == [cell.row for cell in RUNGS]
    quality = {row.cell["weights"]: row.median("perplexity_x") for row in found}
    assert quality["whole"] < quality["int4"] < quality["pruned"]
    assert all(row.median("peak_memory_mb") > 0 for row in found)
    assert shown_text(found) in run.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model=gpt2", "--model=gpt2: expected one of llama3.2-1b"),
        ("--input_len=1", "--input_len=1: expected at least 2"),
        ("--output_len=1", "--output_len=1: expected at least 2"),
        ("--repeats=0", "--repeats=0: expected at least 1"),
        ("--max_tokens=1", "--max_tokens=1: expected at least 2"),
        ("--model=tiny-draft --max_tokens=100", "--max_tokens=100: is for the perplexity of the embedded model"),
        ("--input_len=250", "--input_len=250 --output_len=64: more than the model's 256 tokens"),
        ("--device=tpu", "--device=tpu is"),
        ("--dtype=int3", "dtype=int3 is unknown"),
        ("--results=/dev/null/rows.jsonl", "results file /dev/null/rows.jsonl cannot be written"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_measured(flags, message):
    with pytest.raises(InputError, match=re.escape(message)):
        cli.call(benchmark_ladder.main, flags.split())
