"""The benchmark of speculative decoding: every draft on every text, beside plain decoding of the same prompts."""

from __future__ import annotations

import json

import pytest

from benchmarks import speculation as benchmark
from benchmarks.rows import read_file
from llama import cli, quantization
from llama.errors import InputError
from llama.speculative import is_form_of
from reports import render, tables

FLAGS = ("--device=cpu", "--dtype=float32", "--repeats=1", "--prompts=1", "--input_len=24", "--output_len=8")


def measured(path, *flags: str) -> list[dict]:
    cli.call(benchmark.main, [f"--results={path}", *FLAGS, *flags])
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_draft_is_measured_on_every_text_and_changes_no_greedy_token(tmp_path, capsys):
    rows = measured(tmp_path / "rows.jsonl")
    found = [(row["cell"]["text"], row["cell"]["temperature"], row["cell"]["draft"]) for row in rows]
    assert found == [(t, heat, d) for t in benchmark.TEXTS for heat in benchmark.TEMPERATURES for d in benchmark.DRAFTS]
    for row in rows:
        metrics = {name: values["median"] for name, values in row["metrics"].items()}
        assert metrics["speedup_x"] == metrics["tokens_per_s"] / metrics["plain_tokens_per_s"]
        assert 1 <= metrics["tokens_a_round"] <= 9 and 0 <= metrics["acceptance"] <= 1
        assert metrics.get("tokens_equal", 8) == 8
    [table] = tables.speculation(read_file(tmp_path / "rows.jsonl"))
    assert len(table.body) == len(rows) and render.markdown([table]) in capsys.readouterr().out


def test_only_the_tokens_after_the_first_are_timed_and_the_first_run_is_not_counted(tmp_path, monkeypatch, tiny):
    clock, drawn = [0.0], []
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])
    stream = benchmark.Llama.stream

    def slow(self, prompt, *arguments, **named):
        for number, token in enumerate(stream(self, prompt, *arguments, **named)):
            clock[0] += 100.0 if number == 0 else 1.0
            drawn.append(token)
            yield token

    monkeypatch.setattr(benchmark.Llama, "stream", slow)
    rows = measured(tmp_path / "rows.jsonl", "--drafts=lookup")
    assert all(row["metrics"]["plain_tokens_per_s"]["median"] == 1.0 for row in rows)
    assert all(row["metrics"]["tokens_per_s"]["n"] == 1 for row in rows)
    assert len(drawn) == 2 * 2 * 2 * 2 * 8  # texts, temperatures, a run to warm up and one that counts, ways, tokens


def test_a_quoting_prompt_ends_as_it_begins(tiny):
    options = benchmark.Options(input_len=16, prompts=2)
    running, quoting = (benchmark.make_prompts(kind, range(100), options) for kind in benchmark.TEXTS)
    assert running == [list(range(16)), list(range(50, 66))]
    assert quoting == [[*range(14), 0, 1], [*range(50, 64), 50, 51]]
    with pytest.raises(InputError, match="more than the text's 31 tokens"):
        benchmark.make_prompts("running", range(31), options)


def test_drafts_are_forms_of_the_model_which_stays_as_it_is(tiny):
    for name in ("int8", "int4", "pruned"):
        model = benchmark.make_draft(name, tiny.model).decoder.model
        assert is_form_of(model, tiny.model) and model.args.weight_bytes(4) <= tiny.model.args.weight_bytes(4)
    assert quantization.quantization_of(tiny.model) is None
    with pytest.raises(InputError, match="drafts=int2: expected some of"):
        benchmark.Options(drafts="int2")
