"""Preference pairs from every form in which people have them: one prompt, two answers; what is refused or left out."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT, TINY

from data import dataset, records
from data.tiny import pairs as embedded
from llama import Tokenizer
from llama.errors import InputError
from llama.tokenizer import ChatFormat

EMBEDDED = Tokenizer(TINY / "tokenizer.model")
USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Hello!"), ("assistant", "What?"))
)


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def load(path, max_seq_len=512, held_out=0):
    return dataset.load(path, EMBEDDED, max_seq_len, held_out, 1, ("Hi",), of_pairs=True)


def said(path) -> list[tuple[str, str, str]]:
    """Prompt and answers of each pair in plain text."""
    found = []
    for pair in load(path).training:
        prompts = {sample.tokens[: sample.n_prompt] for sample in pair}
        assert len(prompts) == 1 and all(sample.answers[-1].stop == len(sample.tokens) for sample in pair)
        assert all(sample.tokens[-1] in EMBEDDED.stop_tokens for sample in pair)
        answers = [EMBEDDED.decode(sample.tokens[sample.n_prompt : -1]) for sample in pair]
        found.append((EMBEDDED.decode(prompts.pop()), *answers))
    return found


CHAT = EMBEDDED.decode(ChatFormat(EMBEDDED).encode_dialog_prompt([USER]))
FORMS = {
    "messages and texts": {"messages": [USER], "chosen": "Hello!", "rejected": "What?"},
    "messages and one message": {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    "a prompt of messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "a prompt that is repeated": {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "a prompt that is a question": {"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]},
    "whole chats": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "Hello!"},
        "rejected": {"from": "gpt", "value": "What?"},
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_chats_in_every_form_are_the_same_pair(form, tmp_path):
    assert said(write(tmp_path / "pairs", [FORMS[form]])) == [(CHAT, "Hello!", "What?")]


def test_texts_and_instructions(tmp_path):
    record = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
    (found,) = said(write(tmp_path / "a.jsonl", json.dumps(record)))
    assert found == ("<|begin_of_text|>2 + 2 =", " 4", " 5")
    table = "instruction,input,chosen,rejected\nAdd.,2 and 3,5,6\n"
    ((prompt, *answers),) = said(write(tmp_path / "a.csv", table))
    assert "### Instruction:\nAdd.\n\n### Input:\n2 and 3\n\n### Response:" in prompt and answers == ["5", "6"]


def test_what_both_chats_have_in_common_is_no_label(tmp_path):
    """Of several turns the earlier answers are the prompt, and all answers that differ are compared."""
    again, more = {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "See you"}
    found = load(write(tmp_path / "a", [{"chosen": [USER, GOOD, again, more], "rejected": [USER, GOOD, again, BAD]}]))
    ((chosen, rejected),) = found.training
    assert [EMBEDDED.decode(s.tokens[s.n_prompt : -1]) for s in (chosen, rejected)] == ["See you", "What?"]
    assert len(chosen.answers) == len(rejected.answers) == 1
    found = load(write(tmp_path / "a", [{"chosen": [USER, GOOD, again, more], "rejected": [USER, BAD, again, more]}]))
    assert [len(sample.answers) for sample in found.training[0]] == [2, 2]


MALFORMED = {
    "record 2:rejected: is missing, beside prompt, chosen": [{"prompt": "a", "chosen": "b"}],
    "record 2:chosen: must be a text, not int": [{"prompt": "a", "chosen": 3, "rejected": "c"}],
    "record 2:rejected 1:role: is 'tool'": [
        {"prompt": "a", "chosen": "b", "rejected": [{"role": "tool", "content": "c"}]}
    ],
    "record 2: chosen and rejected do not begin with the same message": [
        {"prompt": "a", "chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "Ho"}, BAD]}
    ],
}


@pytest.mark.parametrize("message", MALFORMED)
def test_malformed_pairs_are_refused_by_record_and_field(message, tmp_path):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(InputError) as error:
        load(write(tmp_path / "pairs.json", [good, *MALFORMED[message]]))
    assert f"pairs.json:{message}" in str(error.value) and "\n" not in str(error.value)


UNUSABLE = {
    "chosen and rejected are the same": {"chosen": "b", "rejected": "b"},
    "chosen: no completion": {"chosen": " ", "rejected": "b"},
    "rejected: no completion": {"chosen": "b", "rejected": ""},
    "no room for an answer": {"prompt": "a " * 600, "chosen": "b", "rejected": "c"},
    "rejected: no answer behind what both have in common": {
        "chosen": [USER, GOOD, USER, GOOD],
        "rejected": [USER, GOOD],
    },
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_pairs_that_teach_nothing_are_left_out_by_name(reason, tmp_path):
    good, bad = {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", **UNUSABLE[reason]}
    found = load(write(tmp_path / "pairs.json", [good, bad]))
    assert len(found.training) == 1 and found.notes == f"; 1 left out (record 2: {reason})"
    with pytest.raises(
        InputError, match=rf"pairs.json: 1 preference pairs .*1 left out \(record 1: {reason}\)"
    ) as error:
        load(write(tmp_path / "pairs.json", [bad]))
    assert "\n" not in str(error.value)


def test_long_answers_lose_their_end_and_are_counted(tmp_path):
    path = write(tmp_path / "pairs", [{"prompt": "a", "chosen": "b " * 50, "rejected": "c"}])
    found = load(path, max_seq_len=20)
    assert [len(sample.tokens) <= 20 for sample in found.training[0]] == [True, True]
    assert found.notes == "; 1 cut at max_seq_len (record 1)"
    same = write(tmp_path / "same", [{"prompt": "a", "chosen": "b " * 50, "rejected": "b " * 60}])
    with pytest.raises(InputError, match="chosen and rejected are the same"):
        load(same, max_seq_len=20)


def test_other_data_and_the_other_objective_are_told_apart(tmp_path):
    with pytest.raises(
        InputError, match="fields instruction, output; expected instruction and chosen and rejected, or"
    ):
        load(write(tmp_path / "a.json", [{"instruction": "a", "output": "b"}]))
    with pytest.raises(InputError, match="is plain text, not pairs; expected instruction and chosen"):
        load(write(tmp_path / "a.txt", "Once upon a time."))
    with pytest.raises(InputError, match=r"expected .*; pairs are trained on with objective=dpo"):
        records.read(write(tmp_path / "b.json", [{"prompt": "a", "chosen": "b", "rejected": "c"}]))


def test_both_answers_are_shown(tmp_path):
    lines = list(dataset.show(write(tmp_path / "a", [FORMS["whole chats"]]), EMBEDDED, 512, 1, of_pairs=True))
    assert lines[0].startswith("record 1, chosen: ") and lines[-1].startswith("1 samples of ")
    assert any(line.startswith("record 1, rejected: ") for line in lines)


def test_the_shipped_pairs(tmp_path):
    """200 each, all usable, no prompt twice; the embedded model's are those that its generator makes."""
    assert json.loads((TINY / "pairs_200.json").read_text()) == embedded.pairs(200, 1)
    for path in (TINY / "pairs_200.json", ROOT / "data" / "pairs_200.json"):
        found = load(path)
        content = json.loads(path.read_text(encoding="utf-8"))
        prompts = {record["messages"][0]["content"] for record in content}
        assert len(found.training) == len(prompts) == len(content) == 200 and not found.notes
        # Neither is the shorter answer always the better one, nor the longer one.
        shorter = sum(len(record["chosen"]) < len(record["rejected"]) for record in content)
        assert 40 < shorter < 160
    assert len({record["chosen"] for record in content}) == 200
