"""The embedded model's corpus and training script."""

from __future__ import annotations

import hashlib
import json
import random
import re

import pytest
import torch
from conftest import TINY, random_model

from data.tiny import corpus, has_tokenizer, train
from llama import ModelArgs, Tokenizer, checkpoint
from llama.errors import InputError
from llama.tokenizer import find_tokenizer


def documents(n: int, mix: corpus.Mix = corpus.BALANCED) -> list[corpus.Document]:
    rng = random.Random("test")
    return [corpus.document(rng, mix) for _ in range(n)]


def text_of(doc: corpus.Document) -> str:
    return doc.text or "\n".join(content for _, content in doc.dialog)


def test_documents_are_well_formed_and_never_repeat_a_story():
    for doc in documents(3000):
        text = text_of(doc)
        assert text and text == text.strip() and text.isascii()
        assert not re.search(r"  | [,.!?]|[{}~|]|\b[Aa] [aeio]\w|###", text), text
        assert all(role in ("user", "assistant") and content for role, content in doc.dialog)
        assert [role for role, _ in doc.dialog] == ["user", "assistant"] * (len(doc.dialog) // 2)
    stories = [doc.text for doc in documents(3000, {"story": 1.0})]
    assert len(set(stories)) == 3000


def test_documents_are_a_function_of_the_seed_and_those_that_the_embedded_model_was_trained_on():
    """A change of their digest is another corpus, for which the model has to be trained again."""
    found = documents(3000)
    assert found[:50] == documents(50)
    digest = hashlib.sha256(repr(found).encode()).hexdigest()
    assert digest == "d813bd981b7040ba11972f763ced16eedf5486b4a4878fe60a4482c46bd0cd08"


def test_sums_in_the_corpus_are_right():
    text = "\n".join(text_of(doc) for doc in documents(3000, {"qa": 1.0}))
    found = re.findall(r"What is (\d+) (plus|minus) (\d+)\?\nAnswer: .*?(\d+)\.\n", text)
    assert len(found) > 50
    for a, sign, b, result in found:
        assert int(result) == (int(a) + int(b) if sign == "plus" else int(a) - int(b)), (a, sign, b, result)


def test_the_shipped_records_are_those_of_the_corpus():
    assert json.loads((TINY / "alpaca_200.json").read_text()) == corpus.records(200, 1)
    texts = [r["instruction"] + r["input"] for r in corpus.records(500, 2)]
    assert len(set(texts)) == 500 and 140 < sum(bool(r["input"]) for r in corpus.records(500, 2)) < 190


def test_no_two_steps_see_the_same_text():
    tokenizer = Tokenizer(TINY / "tokenizer.model")
    steps = [train.batch(tokenizer, 1, step, corpus.BALANCED) for step in (0, 1, 0)]
    assert torch.equal(steps[0], steps[2]) and not torch.equal(steps[0], steps[1])
    assert (steps[0][:, 0] == tokenizer.bos_id).all()


@pytest.fixture
def short_run(tmp_path, monkeypatch):
    """Six steps of the draft in two phases, in a folder of its own."""
    (tmp_path / "draft").mkdir()
    phases = [(corpus.BALANCED, 4, 1e-3), (corpus.QUESTIONS, 2, 1e-3)]
    monkeypatch.setitem(train.MODELS, "draft", ("tiny-draft", tmp_path / "draft", phases))
    monkeypatch.setattr(train, "BATCH_SIZE", 2)
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    return tmp_path


def test_an_interrupted_training_continues_to_the_same_weights(short_run, monkeypatch):
    device, folder = torch.device("cpu"), short_run / "draft"
    train.train_model("draft", 1, device, short_run / "whole")
    whole = checkpoint.load(folder).state_dict()
    calls, batch = [], train.batch

    def killed(*args):
        calls.append(args)
        if len(calls) == 4:  # after the state of step 2 was saved, before that of step 4
            raise KeyboardInterrupt
        return batch(*args)

    monkeypatch.setattr(train, "batch", killed)
    with pytest.raises(KeyboardInterrupt):
        train.train_model("draft", 1, device, short_run / "cut")
    train.train_model("draft", 1, device, short_run / "cut")
    assert [step for _, _, step, _ in calls] == [0, 1, 2, 3, 2, 3, 4, 5]
    resumed = checkpoint.load(folder).state_dict()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    monkeypatch.setattr(train, "SEQ_LEN", 128)
    with pytest.raises(InputError, match="a different corpus, tokenizer or schedule"):
        train.train_model("draft", 1, device, short_run / "cut")


def test_schedule_warms_up_and_decays_in_each_phase():
    plan = list(train.schedule(train.MODELS["model"][2]))
    assert [mix for mix, _ in plan] == [corpus.BALANCED] * 3000 + [corpus.QUESTIONS] * 3000
    for start, peak in ((0, 3e-3), (3000, 2e-3)):
        rates = [rate for _, rate in plan[start : start + 3000]]
        assert max(rates) == pytest.approx(peak, rel=0.01) and rates[0] < peak / 50 and rates[-1] < peak / 40


def test_byte_alphabet_covers_every_byte():
    import tokenizers

    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    assert sorted(train._piece_bytes(char) for char in alphabet) == [bytes([byte]) for byte in range(256)]
    shown = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(" é\n")
    assert train._piece_bytes("".join(piece for piece, _ in shown)).decode() == " é\n"


@pytest.mark.parametrize("layout", ["meta", "hf", "gguf"])
def test_the_tokenizer_is_known_in_every_layout(tmp_path, layout):
    """So evaluate.py and compress.py need no text for what was exported from the embedded model."""
    checkpoint.save(
        random_model(ModelArgs(32, 1, 2, vocab_size=4096)), tmp_path / "m", layout, TINY / "tokenizer.model"
    )
    assert has_tokenizer(Tokenizer(find_tokenizer(tmp_path / "m")))
