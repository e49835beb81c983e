"""Records to samples: one template, labels on the answer and its end, nothing read wrongly or in silence."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import ROOT, asset
from hypothesis import given, settings
from hypothesis import strategies as st

from data import alpaca
from data.alpaca import Record
from llama.errors import InputError
from llama.training.batch import collate

RECORDS = [Record("Name a colour.", "", "Blue."), Record("Make it plural.", "fox", "foxes")]


def write(path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def test_the_template_is_stanfords():
    assert alpaca.prompt("Name a colour.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a colour.\n\n### Response:"
    )
    assert alpaca.prompt("Make it plural.", "fox") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nMake it plural.\n\n### Input:\nfox\n\n### Response:"
    )
    assert "{input}" in alpaca.prompt("Explain {input} and {0}.")  # a record is not a template


def test_labels_are_the_answer_and_its_end_token(tiny):
    """Position t predicts token t + 1; the first label is the first token of the answer, the last the end of text."""
    samples, cut, left_out = alpaca.encode(tiny.tokenizer, RECORDS, 512)
    assert not cut and not left_out
    batch = collate([[sample] for sample in samples], tiny.tokenizer.pad_id)
    flat = batch.tokens.flatten()
    for row, (sample, record) in enumerate(zip(samples, RECORDS, strict=True)):
        places = batch.where[batch.where // batch.tokens.shape[1] == row]
        assert torch.equal(flat[places + 1], batch.labels[batch.where // batch.tokens.shape[1] == row])
        labels = flat[places + 1].tolist()
        assert labels[-1] == tiny.tokenizer.eos_id
        assert tiny.tokenizer.decode(labels[:-1]) == record.output
        before = tiny.tokenizer.decode(batch.tokens[row, 1 : sample.n_prompt].tolist())
        assert before == alpaca.prompt(record.instruction, record.input)
    assert batch.tokens[0, 0] == tiny.tokenizer.bos_id and (batch.tokens == tiny.tokenizer.bos_id).sum() == 2


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40), st.text(max_size=20), st.text(min_size=1, max_size=40))
def test_what_is_asked_is_how_training_samples_begin(tiny, instruction, input, output):
    texts = (instruction, input, output)
    if any("\ud800" <= char <= "\udfff" for text in texts for char in text) or not output.strip():
        return
    (sample,), _, _ = alpaca.encode(tiny.tokenizer, [Record(*texts)], 4096)
    asked = alpaca.encode_prompt(tiny.tokenizer, instruction, input)
    assert list(sample.tokens[: len(asked)]) == asked and sample.n_prompt == len(asked)
    assert tiny.tokenizer.decode(list(sample.tokens[sample.n_prompt : -1])) == output


def test_the_colon_never_melts_into_the_answer(llama3_tokenizer):
    """With the real tokenizer: the prompts of real records end alike, whatever their answers begin with."""
    records = alpaca.read(asset("alpaca_5000.json"))[:300]
    samples, _, _ = alpaca.encode(llama3_tokenizer, records, 4096)
    assert len({sample.tokens[sample.n_prompt - 3 : sample.n_prompt] for sample in samples}) == 1


def test_long_samples_are_cut_without_an_end_and_named(tiny):
    long = Record("Name a colour.", "", "blue " * 200)
    full = len(alpaca.encode_prompt(tiny.tokenizer, long.instruction))
    samples, cut, left_out = alpaca.encode(tiny.tokenizer, [RECORDS[0], long, Record("Hm.", "", " ")], full + 20)
    assert cut == ["record 2"] and left_out == ["record 3"]
    assert [len(sample.tokens) for sample in samples][1] == full + 20
    assert samples[0].tokens[-1] == tiny.tokenizer.eos_id and samples[1].tokens[-1] != tiny.tokenizer.eos_id
    assert alpaca.encode(tiny.tokenizer, [long], full)[2] == ["record 1"]


def test_a_sample_is_shown_with_its_trained_tokens_marked(tiny):
    (sample, _), _, _ = alpaca.encode(tiny.tokenizer, RECORDS, 512)
    text = "\n".join(alpaca.show(sample, tiny.tokenizer))
    assert text.startswith(f"record 1: {sample.n_prompt} tokens of prompt, {sample.n_labels} trained")
    shown = text.split("### Response:\n")[1]
    assert shown.endswith("[<end of text>]") and shown.replace("[", "").replace("]", "") == "Blue.<end of text>"


# Reading

GOOD = {"instruction": "Name a colour.", "input": "", "output": "Blue."}
BAD = {
    "empty file": ("", "is not valid JSON"),
    "no record": ([], "holds no record"),
    "an object": (GOOD, "must hold a JSON list"),
    "a number": ("3", "must hold a JSON list"),
    "cut off": (json.dumps([GOOD])[:-5], "is not valid JSON"),
    "record is a list": ([["a"]], "record 1 must be an object"),
    "record is null": ([GOOD, None], "record 2 must be an object"),
    "no instruction": ([{"output": "x"}], "record 1:instruction: is missing"),
    "no output": ([GOOD, {"instruction": "x"}], "record 2:output: is missing"),
    "instruction null": ([{**GOOD, "instruction": None}], "record 1:instruction: must be a text"),
    "instruction a number": ([{**GOOD, "instruction": 7}], "record 1:instruction: must be a text"),
    "instruction a list": ([{**GOOD, "instruction": ["a"]}], "record 1:instruction: must be a text"),
    "instruction blank": ([{**GOOD, "instruction": " \n"}], "record 1:instruction: is empty"),
    "output null": ([{**GOOD, "output": None}], "record 1:output: must be a text"),
    "output true": ([{**GOOD, "output": True}], "record 1:output: must be a text"),
    "input a dict": ([{**GOOD, "input": {}}], "record 1:input: must be a text"),
    "input null": ([{**GOOD, "input": None}], "record 1:input: must be a text"),
    "NaN literal": ('[{"instruction": NaN, "output": "x"}]', "record 1:instruction: must be a text"),
    "field twice": ('[{"instruction": "a", "instruction": "b", "output": "c"}]', "stands twice"),
    "lone surrogate": ('[{"instruction": "\\ud800", "output": "c"}]', "surrogate"),
    "nested deep": ("[" * 100_000 + "]" * 100_000, "is not valid JSON"),
    "huge field": ([{**GOOD, "output": "x" * (2 << 20)}], "2,097,152 characters"),
    "two documents": ("[][]", "is not valid JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_records_are_named(tmp_path, case):
    content, message = BAD[case]
    with pytest.raises(InputError) as error:
        alpaca.read(write(tmp_path / "data.json", content))
    assert message in str(error.value) and "data.json" in str(error.value)


def test_files_that_are_none(tmp_path):
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(InputError, match="cannot read"):
            alpaca.read(path)
    (tmp_path / "wide.json").write_bytes(json.dumps([GOOD]).encode("utf-16"))
    with pytest.raises(InputError, match="not UTF-8"):
        alpaca.read(tmp_path / "wide.json")


def test_encodings_and_line_ends_make_no_difference(tmp_path):
    records = [GOOD, {"instruction": "Größe? 🦊", "output": "Ja\nnein"}]
    text = json.dumps(records, ensure_ascii=False, indent=1)
    wanted = alpaca.read(write(tmp_path / "plain.json", text))
    assert wanted == [Record("Name a colour.", "", "Blue."), Record("Größe? 🦊", "", "Ja\nnein")]
    lines = "\n".join(json.dumps(record) for record in records)
    strange = tmp_path / "a folder 🦊"
    strange.mkdir()
    for name, data in {
        "bom.json": b"\xef\xbb\xbf" + text.encode(),
        "crlf.json": text.replace("\n", "\r\n").encode(),
        "lines.jsonl": lines.encode() + b"\n\n",
        "no end.jsonl": lines.replace("\n", "\r\n").encode(),
    }.items():
        (strange / name).write_bytes(data)
        assert alpaca.read(strange / name) == wanted, name
    with pytest.raises(InputError, match="line 3 is not valid JSON"):
        alpaca.read(write(tmp_path / "partial.jsonl", lines + '\n{"instruction": "a"'))


def test_the_shipped_records():
    records = alpaca.read(ROOT / "data" / "alpaca_200.json")
    assert len(records) == 200 and len({(r.instruction, r.input) for r in records}) == 200
    assert 60 <= sum(bool(r.input) for r in records) <= 70  # a third
    assert all(text == text.strip() and text for r in records for text in (r.instruction, r.output))
    lengths = [len(r.output.split()) for r in records]
    assert min(lengths) == 1 and sorted(lengths)[100] > 15 and max(lengths) < 160
