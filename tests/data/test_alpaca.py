"""Records to samples: one template, labels on the answer and its end."""

from __future__ import annotations

import torch
import vocabularies
from conftest import ROOT, asset
from hypothesis import given, settings
from hypothesis import strategies as st

from data import alpaca, records
from data.alpaca import Record
from data.samples import encode, show
from llama import Tokenizer
from llama.training.batch import collate

RECORDS = [Record("Name a colour.", "", "Blue."), Record("Make it plural.", "fox", "foxes")]


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
    samples, cut, left_out = encode(tiny.tokenizer, RECORDS, 512)
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


@settings(max_examples=300)
@given(st.text(max_size=40), st.text(max_size=20), st.text(min_size=1, max_size=40))
def test_what_is_asked_is_how_training_samples_begin(tiny, instruction, input, output):
    texts = (instruction, input, output)
    if any("\ud800" <= char <= "\udfff" for text in texts for char in text) or not (
        instruction.strip() and output.strip()
    ):
        return
    (sample,), _, _ = encode(tiny.tokenizer, [Record(*texts)], 4096)
    asked = alpaca.encode_prompt(tiny.tokenizer, instruction, input)
    assert list(sample.tokens[: len(asked)]) == asked and sample.n_prompt == len(asked)
    assert tiny.tokenizer.decode(list(sample.tokens[sample.n_prompt : -1])) == output


def test_the_colon_never_melts_into_the_answer(llama3_tokenizer):
    """With the real tokenizer: the prompts of real records end alike, whatever their answers begin with."""
    found = records.read(asset("alpaca_5000.json")).records[:300]
    samples, _, _ = encode(llama3_tokenizer, found, 4096)
    assert len({sample.tokens[sample.n_prompt - 3 : sample.n_prompt] for sample in samples}) == 1


def test_an_answer_has_no_space_of_its_own(tmp_path):
    """Llama 2's kind of vocabulary puts one before each text: "No" behind ":" would be trained as " No"."""
    tokenizer = Tokenizer(vocabularies.write(tmp_path, "tinyllama"))
    for record in [Record("Is 7 even?", "", "No"), *records.read(ROOT / "data" / "alpaca_200.json").records]:
        joint = tokenizer.encode(alpaca.prompt(record.instruction, record.input) + record.output, bos=True, eos=True)
        assert [token for part, _ in record.parts(tokenizer) for token in part] == joint


def test_long_samples_are_cut_without_an_end_and_named(tiny):
    long = Record("Name a colour.", "", "blue " * 200)
    full = len(alpaca.encode_prompt(tiny.tokenizer, long.instruction))
    samples, cut, left_out = encode(tiny.tokenizer, [RECORDS[0], long, Record("Hm.", "", " ")], full + 20)
    assert cut == ["record 2"] and left_out == ["record 3: no answer"]
    assert [len(sample.tokens) for sample in samples][1] == full + 20
    assert samples[0].tokens[-1] == tiny.tokenizer.eos_id and samples[1].tokens[-1] != tiny.tokenizer.eos_id
    assert encode(tiny.tokenizer, [long], full)[2] == ["record 1: no room for an answer"]


def test_a_sample_is_shown_with_its_trained_tokens_marked(tiny):
    (sample, _), _, _ = encode(tiny.tokenizer, RECORDS, 512)
    text = "\n".join(show(sample, tiny.tokenizer))
    assert text.startswith(f"record 1: {sample.n_prompt} tokens of prompt, {sample.n_labels} trained")
    shown = text.split("### Response:\n")[1]
    assert shown.endswith("[<end of text>]") and shown.replace("[", "").replace("]", "") == "Blue.<end of text>"


def test_the_shipped_records():
    found = records.read(ROOT / "data" / "alpaca_200.json").records
    assert len(found) == 200 and len({(r.instruction, r.input) for r in found}) == 200
    assert 60 <= sum(bool(r.input) for r in found) <= 70  # a third
    assert all(text == text.strip() and text for r in found for text in (r.instruction, r.output))
    lengths = [len(r.output.split()) for r in found]
    assert min(lengths) == 1 and sorted(lengths)[100] > 15 and max(lengths) < 160
