"""Pruning measured: rivals that take the same steps, and tables of the newest runs of one device."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re

import pytest
import torch
from conftest import SMALL, TINY, random_model

from benchmarks import pruning as benchmark_pruning
from benchmarks.rows import Row, read_file
from data import text
from llama import checkpoint, cli, files, pruning
from llama.config import PRESETS
from llama.errors import InputError
from llama.evaluation import perplexity
from llama.tokenizer import Tokenizer
from reports import render, tables
from reports.cells import chosen


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """All parts, with as few steps, samples and shares as there can be: the folder, and the rows."""
    work = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "VALIDATION", 1)
        patch.setattr(benchmark_pruning, "INPUT_LEN", 8)
        patch.setattr(benchmark_pruning, "OUTPUT_LEN", 3)
        flags = "--share=0.5 --rounds=2 --steps=1 --batch_size=1 --repeats=2 --device=cpu".split()
        cli.call(benchmark_pruning.main, [*flags, f"--results={work / 'rows.jsonl'}", f"--figures={work}"])
    return work, benchmark_pruning.newest(work / "rows.jsonl")


def by_share(rows: list[Row], **wanted) -> list[Row]:
    return sorted(chosen(rows, **wanted), key=lambda row: row.cell["share"])


def test_one_shot_takes_as_many_steps_as_its_rival(measured):
    _, rows = measured
    for method in ("dimensions", "magnitude"):
        pairs = [by_share(rows, method=method, part=part) for part in ("iterative", "one-shot")]
        found = [[(row.cell["share"], row.cell["steps"]) for row in side] for side in pairs]
        assert found[0] == found[1] == [(0.25, 1), (0.5, 2)]
        brief = by_share(rows, method=method, part="one-round")
        assert [(row.cell["share"], row.cell["steps"]) for row in brief] == [(0.25, 1), (0.5, 1)]
        for a, b in zip(*pairs, strict=True):
            assert a.median("zeros") == b.median("zeros") and a.median("parameters") == b.median("parameters")
            assert (a.median("zeros") > 0) == (method == "magnitude")
    speeds = by_share(rows, part="speed")
    assert [row.cell["share"] for row in speeds] == [0, 0.25, 0.5]
    sizes = [row.median("parameters") for row in speeds]
    assert sizes == [PRESETS["tiny"].with_ffn_dim(n).n_params() for n in (1024, 768, 512)]


def test_a_checkpoint_and_texts_of_your_own(tmp_path, monkeypatch):
    """Rows name the model and both texts, by content too; the loss is that of the second; speed is the checkpoint's."""
    monkeypatch.setattr(benchmark_pruning, "INPUT_LEN", 8)
    monkeypatch.setattr(benchmark_pruning, "OUTPUT_LEN", 3)
    args = dataclasses.replace(SMALL, n_layers=1, vocab_size=PRESETS["tiny"].vocab_size)
    checkpoint.save(random_model(args), tmp_path / "own", "meta", TINY / "tokenizer.model")
    for name in ("train", "eval"):
        (tmp_path / f"{name}.txt").write_text(f"The little fox went to {name}.\n" * 30)
    flags = f"--ckpt_dir={tmp_path / 'own'} --data={tmp_path / 'train.txt'} --eval_data={tmp_path / 'eval.txt'}".split()
    flags += "--eval_tokens=99 --seq_len=32 --share=0.5 --rounds=1 --steps=1 --batch_size=1 --repeats=1".split()
    flags += [
        "--methods=dimensions,heads",
        "--parts=dense,norm,iterative,speed",
        f"--results={tmp_path / 'rows.jsonl'}",
        f"--figures={tmp_path}",
    ]
    cli.call(benchmark_pruning.main, [*flags, "--device=cpu"])
    rows = benchmark_pruning.newest(tmp_path / "rows.jsonl")
    assert {row.cell["model"] for row in rows} == {"own"}
    ids = text.read(tmp_path / "eval.txt", Tokenizer(TINY / "tokenizer.model"))[:99]
    (dense,) = chosen(rows, part="dense", steps=0)
    assert dense.median("loss_nats") == pytest.approx(perplexity.evaluate(random_model(args), ids, 32).loss)
    for row in rows:
        if row.cell["part"] != "speed":
            for prefix, name in (("", "train.txt"), ("eval_", "eval.txt")):
                assert row.cell[f"{prefix}data"] == name
                assert row.cell[f"{prefix}data_sha256"] == files.sha256(tmp_path / name)
            assert (row.cell["seq_len"], row.cell["eval_tokens"]) == (32, 99)
    halves = {"dimensions": args.with_ffn_dim(96), "heads": dataclasses.replace(args, n_heads=2, n_kv_heads=1)}
    for method, half in halves.items():
        for part, (share, size) in itertools.product(("norm", "iterative", "speed"), ((0, args), (0.5, half))):
            found = chosen(rows, part=part, method=method, share=share)
            assert [row.median("parameters") for row in found] == [size.n_params()] * (part == "speed" or share > 0)


def test_one_cut_looks_at_the_text_and_the_other_at_norms_alone(measured):
    """Of the embedded model: each loss before any step is that of such a cut, and the two differ."""
    tokenizer = Tokenizer(TINY / "tokenizer.model")
    source = text.of_embedded_model(tokenizer, 1, 1)
    source = dataclasses.replace(source, validation=source.validation[: source.context])  # as VALIDATION was patched
    for part, tokens in (("norm", None), ("one-shot", source.calibration()), ("one-round", source.calibration())):
        (row,) = chosen(measured[1], part=part, method="dimensions", share=0.5)
        model = checkpoint.load(TINY, torch.float32)
        expected = source.loss(pruning.cut(model, "dimensions", 0.5, model.args, tokens))
        assert row.median("loss_cut_nats") == pytest.approx(expected, rel=1e-5)


def test_every_figure_of_the_pruning_tables_stands_in_a_row(measured):
    work, rows = measured
    quality, speed = render.markdown(tables.pruning_quality(rows)), render.markdown(tables.pruning_speed(rows))
    for row in rows:
        cell = row.cell
        if cell["part"] == "speed":
            assert f"| {cell['share']:g} | {row.median('parameters'):,.0f} |" in speed
            assert f"{1e3 * row.median('tpot_s'):,.2f}" in speed
        else:
            loss = row.median("loss_cut_nats" if cell["part"] == "norm" else "loss_nats")
            is_brief = cell["part"] in ("norm", "one-round")  # they stand in the line of those that take more steps
            steps = round(cell["share"] / 0.25) if is_brief else cell["steps"]
            lines = [line for line in quality.splitlines() if line.startswith(f"| {cell['share']:g} | {steps} |")]
            assert lines and any(f" {loss:.3f} " in line for line in lines)
    assert " - " not in quality and {path.name for path in work.glob("*.svg")} == {
        f"pruning-{name}-tiny-cpu.svg" for name in ("dimensions", "magnitude", "size", "speed")
    }


def test_the_tables_are_of_one_device_and_its_newest_runs(measured, tmp_path):
    """A second run with other steps takes the place of the first; rows of another device do not mix with these."""
    rows = [row.data for row in measured[1]]
    again = json.loads(json.dumps([row for row in rows if row["cell"]["part"] == "one-shot"]))
    for row in again:
        row["cell"]["steps"] *= 2
        row["metrics"]["loss_nats"]["median"] = 0.001
    gpu = json.loads(json.dumps([row for row in rows if row["cell"]["part"] == "speed"]))
    for row in gpu:
        row["device"]["name"] = "another"
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *gpu, *again]))
    newest = benchmark_pruning.newest(path)
    assert len(newest) == len(rows) and {row.device_name for row in newest} == {rows[0]["device"]["name"]}
    assert render.markdown(tables.pruning_quality(newest)).count(" 0.001 ") == len(again)
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *gpu]))
    assert [row.data for row in benchmark_pruning.newest(path)] == gpu


@pytest.mark.parametrize("line", ["{", "[]", '{"experiment": "ladder", "cell": {}}', '{"experiment": "pruning"}'])
def test_a_damaged_results_file_is_refused_before_anything_is_measured(measured, tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(measured[1][0].data) + f"\n{line}\n")
    with pytest.raises(InputError, match=r"broken row in .*rows\.jsonl:2: "):
        cli.call(benchmark_pruning.main, ["--parts=dense", f"--results={path}", "--device=cpu"])
    assert len(path.read_text().splitlines()) == 2


def test_rows_of_other_experiments_in_the_same_file_are_left_alone(measured, tmp_path):
    path, rows = tmp_path / "rows.jsonl", [row.data for row in measured[1]]
    other = {**rows[0], "experiment": "loading", "cell": {"model": "tiny"}}
    path.write_text("".join(json.dumps(row) + "\n" for row in [other, *rows, other]))
    assert [row.data for row in benchmark_pruning.newest(path)] == rows and len(read_file(path)) == len(rows) + 2


@pytest.mark.parametrize(
    "flag",
    ["--parts=all", "--methods=luck", "--methods=magnitude,magnitude", "--rounds=0", "--share=1.0", "--eval_data=a"],
)
def test_what_cannot_be_measured_is_refused(tmp_path, flag):
    with pytest.raises(InputError, match=re.escape(flag.partition("=")[0])):
        cli.call(benchmark_pruning.main, [flag, f"--results={tmp_path / 'rows.jsonl'}", "--device=cpu"])
    assert not list(tmp_path.iterdir())
