"""The benchmark of a conversation: both ways answer the same, and what is timed is what each computes."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import vocabularies

from benchmarks import conversation as benchmark
from benchmarks.rows import read_file
from llama import cli
from llama.errors import InputError
from reports import render, tables


def measured(path, *flags: str) -> list[dict]:
    cli.call(benchmark.main, [f"--results={path}", "--device=cpu", *flags])
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_turn_is_measured_and_says_what_a_fresh_run_says(tmp_path, capsys, tiny):
    rows = measured(tmp_path / "rows.jsonl", "--repeats=2", "--answer_len=6")
    assert [row["cell"]["turn"] for row in rows] == [1, 2, 3, 4, 5] and {row["cell"]["model"] for row in rows} == {
        "tiny"
    }
    dialog = []
    for row, message in zip(rows, benchmark.MESSAGES, strict=True):
        dialog.append({"role": "user", "content": message})
        ids = tiny.formatter.encode_dialog_prompt(dialog)
        metrics = {name: values["median"] for name, values in row["metrics"].items()}
        assert metrics["dialog_tokens"] == len(ids)
        assert metrics["tokens_equal"] == metrics["answer_tokens"] <= 6
        alone = tiny.formatter.encode_dialog_prompt(dialog[-1:])
        is_first = row["cell"]["turn"] == 1
        assert (metrics["computed_tokens"] == len(ids)) == is_first
        assert metrics["computed_tokens"] <= len(alone) + 3  # the end of the last answer may be encoded anew
        assert row["metrics"]["ttft_kept_s"]["n"] == row["metrics"]["ttft_fresh_s"]["n"] == 2
        assert row["series"]["message"] == [message]
        expected = tiny.tokenizer.decode(tiny.generate([ids], 6, 0)[0][0]).strip()
        assert row["series"]["answer"] == [expected]
        dialog.append({"role": "assistant", "content": expected})
    [table] = tables.conversation(read_file(tmp_path / "rows.jsonl"))
    assert len(table.body) == 5 and render.markdown([table]) in capsys.readouterr().out


def test_ways_take_turns_and_the_first_round_is_not_counted(tmp_path, monkeypatch):
    """What is kept of each turn is its own round's times, and a slow first run hits neither way alone."""
    calls, usual = [], benchmark.answer

    def answer(llama, dialog, answer_len, session):
        calls.append("fresh" if session is None else "kept")
        return usual(llama, dialog, answer_len, session)._replace(ttft_s=float(len(calls)))

    monkeypatch.setattr(benchmark, "answer", answer)
    rows = measured(tmp_path / "rows.jsonl", "--repeats=2", "--answer_len=2")
    turns = list(zip(calls[::2], calls[1::2], strict=True))
    assert len(turns) == 15 and all(set(turn) == {"kept", "fresh"} for turn in turns)
    assert all(first != second for first, second in pairwise(turns[:5]))
    for number, row in enumerate(rows):
        own = {name: [] for name in ("kept", "fresh")}
        for i in (5 + number, 10 + number):
            for j, name in enumerate(turns[i]):
                own[name].append(2 * i + j + 1.0)
        for name, times in own.items():
            assert (row["metrics"][f"ttft_{name}_s"]["min"], row["metrics"][f"ttft_{name}_s"]["max"]) == tuple(times)


def test_the_time_to_the_first_token_has_the_encoding_in_it_and_no_other_token(tiny, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    encode, stream = tiny.formatter.encode_dialog_prompt, tiny.stream

    def slow_encode(dialog):
        now[0] += 1
        return encode(dialog)

    def slow_stream(*args, **options):
        for token in stream(*args, **options):
            now[0] += 10
            yield token

    monkeypatch.setattr(tiny.formatter, "encode_dialog_prompt", slow_encode)
    monkeypatch.setattr(tiny, "stream", slow_stream)
    found = benchmark.answer(tiny, [{"role": "user", "content": benchmark.MESSAGES[0]}], 4, None)
    assert (found.ttft_s, len(found.tokens), found.computed_tokens) == (11, 4, found.dialog_tokens)


def test_an_answer_that_ends_at_once_has_a_time_too(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "stop_tokens", list(range(tiny.n_words)))
    turns = benchmark.converse(tiny, 4, 0)
    assert all(turn.kept.tokens == turn.fresh.tokens == [] and turn.kept.ttft_s > 0 for turn in turns)


def test_a_difference_is_shown(tmp_path, capsys, monkeypatch):
    usual = benchmark.answer

    def answer(llama, dialog, answer_len, session):
        found = usual(llama, dialog, answer_len, session)
        return found if session else found._replace(tokens=[*found.tokens[:2], *(0 for _ in found.tokens[2:])])

    monkeypatch.setattr(benchmark, "answer", answer)
    rows = measured(tmp_path / "rows.jsonl", "--repeats=1", "--answer_len=4")
    assert rows[0]["metrics"]["tokens_equal"]["median"] == 2 and "| 2 of 4 |" in capsys.readouterr().out


def test_a_model_that_cannot_chat_is_refused_before_its_weights_are_read(tmp_path):
    config = {**vocabularies.CONFIGS["llama3"], "chat_template": "{{ messages }}"}
    vocabularies.write(tmp_path / "model", "llama3", tokenizer_config=config)
    with pytest.raises(InputError, match="no chat format known here"):
        measured(tmp_path / "rows.jsonl", f"--ckpt_dir={tmp_path / 'model'}")
