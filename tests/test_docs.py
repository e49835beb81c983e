"""The documents tell the truth: commands run, tests and files exist, figures stand in a measured row."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY

import benchmark_finetuning
import benchmark_inference
import finetuning
from benchmarks import kernels as benchmark_kernels
from benchmarks import ladder as benchmark_ladder
from benchmarks import loading as benchmark_loading
from benchmarks import pruning as benchmark_pruning
from data.tiny import train
from llama import checkpoint
from llama.config import PRESETS

README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY_README = (TINY / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks, except those that say why the tests cannot run them."""
    found = re.findall(rf"(<!-- not run by the tests: [^\n]+ -->\n)?```{language}\n(.*?)```", text, re.DOTALL)
    return [block for skipped, block in found if not skipped]


def commands() -> list[str]:
    lines = [line for text in (README, TINY_README) for block in blocks(text, "sh") for line in block.splitlines()]
    return [line for line in lines if shlex.split(line, comments=True)]


@pytest.mark.parametrize("line", commands())
def test_commands_run(line, monkeypatch, capsys):
    words = shlex.split(line, comments=True)
    if words[0] == "make":  # would start over; that the targets exist is what can be checked from inside
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        return
    assert words[0] == "python"
    if words[1] == "-m":
        run = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0 and run.stdout, run.stderr
        return
    # As from the shell, but for the two seconds that Python and torch take to start.
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", words[1:])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(words[1], run_name="__main__")
    out, err = capsys.readouterr()
    assert end.value.code == 0, err
    assert out or "--help" in words


@pytest.mark.parametrize("block", blocks(README, "python"))
def test_python_runs(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(block, {})
    assert out.getvalue()


def test_named_tests_and_files_exist():
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    names = set(re.findall(r"`(test_\w+)`", README))
    assert len(names) > 15 and not {name for name in names if f"def {name}(" not in sources}
    for path in re.findall(r"`((?:llama|data|reports)/[\w/.]+)`", README) + re.findall(r"\]\((\w[\w/.]+)\)", README):
        assert (ROOT / path).exists(), path


def newest_rows(experiment: str) -> list[dict]:
    """The last measured row of each cell."""
    lines = (ROOT / "reports" / "results" / f"{experiment}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["experiment"] for row in rows} == {experiment}
    return list({(json.dumps(row["cell"]), row["dtype"]): row for row in rows}.values())


def table_of(text: str, name: str) -> str:
    return re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", text, re.DOTALL)[1]


def test_loading_figures_are_the_measured_rows():
    rows = newest_rows("loading")
    assert table_of(README, "figures: loading") == benchmark_loading.markdown(rows)
    for row in rows:
        assert row["cell"]["model"] == "llama3.2-1b" and row["metrics"]["load_s"]["n"] >= 5
        assert row["metrics"]["peak_over_weights_x"]["max"] <= 1.15


def test_table_1_is_the_measured_rows():
    rows = [row for row in newest_rows("inference") if row["cell"]["model"] == "llama3.2-1b"]
    assert len({(row["device"]["name"], row["dtype"], row["commit"]) for row in rows}) == 1
    assert min(row["metrics"]["runtime_s"]["n"] for row in rows) >= 5
    printed = benchmark_inference.table(rows) + "\n" + benchmark_inference.details(rows)
    assert table_of(README, "figures: table 1") == printed


def test_figures_of_quantized_weights_are_the_measured_rows():
    rows = [row for row in newest_rows("formats") if row["cell"]["model"] == "llama3.2-1b"]
    assert len({(row["device"]["name"], row["dtype"], row["commit"]) for row in rows}) == 1
    assert {row["cell"]["weights"] for row in rows} == {"bf16", "int8", "int4"}
    assert min(row["metrics"]["runtime_s"]["n"] for row in rows) >= 5
    assert table_of(README, "figures: formats") == benchmark_inference.details(rows)


def test_ladder_figures_are_the_measured_rows():
    rows = newest_rows("ladder")
    tiny = [row for row in rows if row["cell"]["model"] == "tiny"]
    assert len({(row["device"]["name"], row["dtype"], row["commit"]) for row in tiny}) == 1
    assert sorted(row["cell"]["row"] for row in tiny) == [cell.row for cell in benchmark_ladder.ladder(True)]
    assert min(row["metrics"]["runtime_s"]["n"] for row in tiny) >= 5
    assert table_of(README, "figures: ladder") == benchmark_ladder.report(rows)


def test_tables_2_and_3_are_the_measured_rows():
    rows = [row for row in newest_rows("benchmark_finetuning") if row["cell"]["model"] == "llama3.2-1b"]
    assert len({(row["device"]["name"], row["commit"]) for row in rows}) == 1
    assert table_of(README, "figures: tables 2 and 3") == benchmark_finetuning.report(rows) + "\n"


def test_finetuning_figures_are_the_measured_rows():
    rows = [row for row in newest_rows("finetuning") if row["cell"]["model"] == "tiny"]
    assert {row["cell"]["preset"] for row in rows} == set(finetuning.PRESETS)
    assert table_of(README, "figures: finetuning") == finetuning.table(rows)


def test_pruning_figures_are_the_measured_rows():
    rows = newest_rows("pruning")
    printed = benchmark_pruning.quality_table(rows) + "\n" + benchmark_pruning.speed_table(rows)
    assert table_of(README, "figures: pruning") == printed


def test_kernel_figures_are_the_measured_rows():
    rows = [row for row in newest_rows("kernels") if row["cell"]["model"] == "llama3.2-1b"]
    assert table_of(README, "figures: kernels") == benchmark_kernels.table(rows)
    assert {row["cell"]["part"] for row in rows} == set(benchmark_kernels.PARTS["cpu"])
    assert all(row["metrics"]["run_s"]["n"] >= 5 for row in rows)


@pytest.mark.slow
def test_the_estimates_are_computed():
    wanted = [cell for name in ("course", "lean", "half") for cell in benchmark_finetuning.SETS[name]]
    found = benchmark_finetuning.estimates(PRESETS["llama3.2-1b"], wanted, 512, benchmark_finetuning.P100_GB)
    assert table_of(README, "figures: estimate") == found + "\n"


def test_figures_of_the_embedded_model_are_the_measured_rows():
    assert table_of(TINY_README, "figures") == train.figures_table(newest_rows("tiny"))


def test_the_embedded_model_is_what_its_page_says(tiny):
    """Measured again: the held-out loss of both models, the samples, the size of what ships."""
    for row in newest_rows("tiny"):
        directory = {preset: folder for preset, folder, *_ in train.MODELS.values()}[row["cell"]["model"]]
        loss = train.held_out_loss(checkpoint.load(directory, torch.float32), tiny.tokenizer, n_rows=16)
        assert loss == pytest.approx(row["metrics"]["held_out_loss_nats"]["median"], abs=0.1)
    assert table_of(TINY_README, "samples") == train.samples(tiny)
    shipped = [path for path in TINY.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(os.path.getsize(path) for path in shipped) <= 12e6
    main, draft = (checkpoint.load(TINY / part).args.n_params() for part in ("", "draft"))
    assert draft * 10 <= main
