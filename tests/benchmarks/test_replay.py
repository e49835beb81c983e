"""What the replay of the results page is made of: recorded runs."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise

import pytest
from conftest import TINY

from benchmarks import replay as record_replay
from llama import cli
from llama.errors import InputError, InternalError


def recorded(path, *flags: str) -> dict[bool, dict]:
    cli.call(record_replay.main, [f"--results={path}", *flags])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["cell"]["use_cache"]: row for row in rows}


def test_every_token_has_its_second_and_the_runs_are_kept_as_they_were(tmp_path, tiny):
    rows = recorded(tmp_path / "rows.jsonl", "--output_len=6", "--repeats=3")
    texts = {"".join(row["series"]["text"]) for row in rows.values()}
    prompt = rows[True]["cell"]["prompt"]
    (expected,) = tiny.text_completion([prompt], temperature=0, max_gen_len=6)
    assert texts == {expected["generation"]}
    for row in rows.values():
        seconds, metrics = row["series"]["token_s"], row["metrics"]
        assert len(seconds) == 6 and all(before < after for before, after in pairwise([0, *seconds]))
        assert seconds[-1] == pytest.approx(metrics["runtime_s"]["median"], abs=1e-6)  # of three, the middle one
        assert metrics["runtime_s"]["n"] == 3 and metrics["replayed_s"]["n"] == 1


def test_random_weights_have_times_and_no_text(tmp_path):
    rows = recorded(tmp_path / "rows.jsonl", "--model=tiny-draft", "--input_len=5", "--output_len=4", "--repeats=1")
    assert set(rows) == {True, False}
    for row in rows.values():
        assert set(row["series"]) == {"token_s"} and row["cell"]["prompt"] is None
        assert (row["cell"]["input_len"], row["cell"]["output_len"], len(row["series"]["token_s"])) == (5, 4, 4)


def test_other_trained_weights_have_texts_under_their_name(tmp_path):
    shutil.copytree(TINY, tmp_path / "other", ignore=shutil.ignore_patterns("*.py", "__pycache__", "draft"))
    flags = (f"--ckpt_dir={tmp_path / 'other'}", "--output_len=4", "--repeats=1")
    rows = recorded(tmp_path / "rows.jsonl", *flags)
    assert {row["cell"]["model"] for row in rows.values()} == {"other"}
    assert len({"".join(row["series"]["text"]) for row in rows.values()}) == 1


def test_two_texts_are_not_replayed_against_each_other(tmp_path, monkeypatch):
    runs = {True: [([1, 2], [0.1, 0.2])], False: [([1, 3], [0.1, 0.2])]}
    monkeypatch.setattr(record_replay, "record", lambda *_: runs)
    with pytest.raises(InternalError, match="would compare two texts") as caught:
        recorded(tmp_path / "rows.jsonl")
    assert cli.explain(caught.value)[1] == 1


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--model=gpt", "--model=gpt: expected one of"),
        ("--model=llama3.2-1b --ckpt_dir=data/tiny", "has random weights"),
        ("--output_len=1", "--output_len=1: expected at least 2"),
        ("--repeats=0", "--repeats=0: expected at least 1"),
        ("--results=/dev/null/rows.jsonl", "cannot be written"),
    ],
)
def test_what_cannot_be_recorded_is_refused(flag, message):
    with pytest.raises(InputError, match=message):
        cli.call(record_replay.main, flag.split())
