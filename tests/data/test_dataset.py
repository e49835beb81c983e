"""From a data file to samples: what is trained of each kind of record, what is held out, what is left out."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
import vocabularies
from conftest import SMALL, TINY, random_model
from support import gap, gradients

from data import dataset, text
from data.records import Chat
from data.samples import Sample, encode, from_parts
from llama import Tokenizer
from llama.errors import InputError
from llama.tokenizer import ChatFormat
from llama.training.batch import collate, pack
from llama.training.options import Settings
from llama.training.step import Trainer

EMBEDDED = Tokenizer(TINY / "tokenizer.model")
TURNS = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "See you")]
DIALOG = [{"role": role, "content": content} for role, content in TURNS]
QUESTIONS = ("Name three colours.",)


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def load(path, max_seq_len=512, held_out=0, seed=1, tokenizer=EMBEDDED, eval_path=None):
    return dataset.load(path, tokenizer, max_seq_len, held_out, seed, QUESTIONS, eval_path)


@pytest.mark.parametrize("name", ["embedded", "smollm2", "llama3", "llama2"])
def test_what_the_assistant_says_is_trained_and_nothing_else(name, request, tmp_path):
    """Each answer with its end token, in the chat format of the vocabulary; the prompts are those of use."""
    if name in ("embedded", "smollm2"):  # ChatML, without a token that begins a text
        tokenizer = EMBEDDED if name == "embedded" else Tokenizer(vocabularies.write(tmp_path, name))
    else:
        tokenizer = request.getfixturevalue(f"{name}_tokenizer")
    chat = ChatFormat(tokenizer)
    for messages in (DIALOG, [{"role": "system", "content": ""}, *DIALOG[1:]], [*DIALOG, DIALOG[1]]):
        (sample,), cut, left_out = encode(tokenizer, [Chat(tuple(messages))], 512)
        assert not cut and not left_out
        answers = [sample.tokens[part.start : part.stop] for part in sample.answers]
        assert [tokenizer.decode(answer[:-1]).strip() for answer in answers] == ["Hello", "See you"]
        assert all(answer[-1] in tokenizer.stop_tokens for answer in answers)
        asked = DIALOG if messages[0]["content"] else DIALOG[1:]
        for part, behind in zip(sample.answers, (3, 1), strict=True):
            assert list(sample.tokens[: part.start]) == chat.encode_dialog_prompt(asked[: len(asked) - behind])
        assert sample.tokens[sample.answers[-1].stop :] == ()  # a question without an answer is left out


def test_gradients_on_chats_are_those_of_a_masked_loss():
    """Against cross-entropy on all logits with -100 in place of what is no label; packed or not."""
    chats = [Chat(tuple(DIALOG[: 2 * n + 1])) for n in (1, 2)] + [Chat(tuple(DIALOG[1:]))]
    encoded, _, _ = encode(EMBEDDED, chats, 512)
    encoded = [Sample(s.name, tuple(token % SMALL.vocab_size for token in s.tokens), s.answers) for s in encoded]
    plain = random_model().double()
    nats, count = 0.0, 0
    for sample in encoded:
        labels = torch.full((len(sample.tokens),), -100)
        for part in sample.answers:
            labels[part.start : part.stop] = torch.tensor(sample.tokens[part.start : part.stop])
        logits = plain(torch.tensor([sample.tokens]))[0]
        nats = nats + F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
        count += int((labels[1:] != -100).sum())
    (nats / count).backward()
    said = ("Hello", "Hello", "See you", "Hello", "See you")
    n_labels = sum(len(EMBEDDED.encode(words, bos=False, eos=True)) for words in said)
    assert count == sum(sample.n_labels for sample in encoded) == n_labels
    for sequences in (pack(encoded, 512), [[sample] for sample in encoded]):
        model = random_model().double()
        trainer = Trainer(model, Settings(lr=0.0), 1)
        seen = {}
        trainer.optimizer.register_step_pre_hook(lambda *_, m=model, seen=seen: seen.update(gradients(m)))
        report = trainer.step([collate(sequences)])
        assert report.loss == pytest.approx((nats / count).item(), rel=1e-9)
        assert gap(seen, gradients(plain)) < 1e-9


def test_a_long_chat_loses_its_end():
    (whole,), _, _ = encode(EMBEDDED, [Chat(tuple(DIALOG))], 512)
    first, second = whole.answers
    for length, answers in (
        (second.stop - 1, (first, range(second.start, second.stop - 1))),
        (second.start, (first,)),
        (first.start + 1, (range(first.start, first.start + 1),)),
    ):
        (sample,), cut, _ = encode(EMBEDDED, [Chat(tuple(DIALOG))], length)
        assert sample.answers == answers and sample.tokens == whole.tokens[: answers[-1].stop] and cut == ["record 1"]
    assert encode(EMBEDDED, [Chat(tuple(DIALOG))], first.start)[2] == ["record 1: no room for an answer"]


def test_the_first_token_is_no_label():
    assert from_parts("a", [([1, 2], True), ([3], False)]) == Sample("a", (1, 2), (range(1, 2),))
    assert from_parts("a", [([], False), ([5], False), ([6], True)]).answers == (range(1, 2),)
    for parts in ([], [([1, 2], False)], [([1], True)]):
        with pytest.raises(InputError, match="no answer"):
            from_parts("a", parts)


def test_records_that_teach_nothing_are_counted_and_named(tmp_path):
    user, assistant = DIALOG[1], DIALOG[2]
    dialogs = [[user, assistant], [assistant, user], [user], [], [user, {**assistant, "content": " "}], [user] * 2]
    found = load(write(tmp_path / "chats", [{"messages": dialog, "id": 3} for dialog in dialogs]))
    assert [sample.name for sample in found.training] == ["record 1"]
    assert found.notes.startswith("; 5 left out (record 2: roles must be an optional system, then user and assistant")
    assert (
        "record 3: no answer, record 4: a dialog needs at least one message, record 5: an answer is empty"
        in found.notes
    )
    assert found.notes.endswith("; fields not used: id") and found.what == "6 chats (JSON)"
    with pytest.raises(
        InputError, match=r"held_out=1 leaves none of them to train on, use a smaller one; 5 left out \(record 2: roles"
    ):
        load(tmp_path / "chats", held_out=1)
    (shown,) = dataset.show(write(tmp_path / "late", [{"messages": dialogs[1]}] * 30), EMBEDDED, 512, 1)
    assert shown.startswith("0 samples") and "30 left out (record 1: roles" in shown
    late = [{"messages": dialog} for dialog in [*dialogs[1:], *dialogs]]
    assert next(dataset.show(write(tmp_path / "late", late), EMBEDDED, 512, 1)).startswith("record 6: ")
    with pytest.raises(
        InputError, match=r"nothing can be trained on within max_seq_len=3; 6 left out \(record 1: no ro"
    ):
        load(tmp_path / "chats", max_seq_len=3)
    pairs = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "<|eot_id|>", "completion": "b"},
        {"prompt": "a", "completion": ""},
    ]
    notes = load(write(tmp_path / "pairs", pairs)).notes
    assert notes == "; 1 left out (record 3: no completion); 1 spell special tokens, which stay text (record 2)"
    empty = {"instruction": "", "input": "", "output": "b"}
    notes = load(
        write(tmp_path / "alpaca", [empty, {**empty, "input": "a"}, {**empty, "instruction": "a", "output": ""}])
    ).notes
    assert notes == "; 2 left out (record 1: no instruction, record 3: no answer)"
    found = load(write(tmp_path / "texts", [{"text": text} for text in ("", "The fox", " \n")]))
    assert found.notes == "; 2 left out (record 1: no text, record 3: no text)" and len(found.training) == 1


def test_a_pair_is_what_it_says(tmp_path):
    (sample,) = load(write(tmp_path / "pairs", {"prompt": "2 + 2 =", "response": " 4"})).training
    prompt, answer = EMBEDDED.encode("2 + 2 =", bos=True, eos=False), EMBEDDED.encode(" 4", bos=False, eos=True)
    assert list(sample.tokens) == prompt + answer and sample.answers == (range(len(prompt), len(sample.tokens)),)


def test_questions_have_the_form_of_the_data(tmp_path):
    question = QUESTIONS[0]
    user = [{"role": "user", "content": question}]
    for entry, wanted in (
        ({"prompt": "a", "completion": "b"}, EMBEDDED.encode(question, bos=True, eos=False)),
        ({"messages": DIALOG}, ChatFormat(EMBEDDED).encode_dialog_prompt(user)),
    ):
        assert load(write(tmp_path / "data", [entry, entry])).questions == {question: wanted}
    (instruction, ids), *_ = load(write(tmp_path / "data", {"instruction": "a", "output": "b"})).questions.items()
    assert instruction == question and EMBEDDED.decode(ids).endswith(f"### Instruction:\n{question}\n\n### Response:")


# Text

STORY = "".join(f"The fox saw {n} bears.\nThey ran home.\r\n" for n in range(150))


@pytest.mark.parametrize("max_seq_len", [2, 33, 64, 4000])
@pytest.mark.parametrize("held_out", [0, 3])
def test_every_token_of_a_text_is_trained_once_or_held_out(tmp_path, max_seq_len, held_out):
    ids = EMBEDDED.encode(STORY, bos=True, eos=False)
    path = write(tmp_path / "corpus.txt", STORY)
    if max_seq_len > len(ids) and held_out:
        with pytest.raises(
            InputError,
            match=r"plain text, 1 samples within max_seq_len=4000; held_out=1 leaves none of them to train on",
        ):
            load(path, max_seq_len, held_out)
        return
    path.write_bytes(STORY.encode())  # line ends as they are
    found = load(path, max_seq_len, held_out)
    labels = []
    for sample in [*found.training, *found.held_out]:
        start = int(sample.name.split()[3])
        assert 2 <= len(sample.tokens) <= max_seq_len and list(sample.tokens) == ids[start : start + len(sample.tokens)]
        assert sample.answers == (range(1, len(sample.tokens)),)
        labels += range(start + 1, start + len(sample.tokens))
    assert labels == list(range(1, len(ids)))  # the end of the file is held out
    assert len(found.held_out) == held_out and found.what == "plain text" and found.notes == ""
    ((question, prompt),) = found.questions.items()
    assert prompt == list(
        (tokens := (found.held_out or found.training)[0].tokens)[: min(16, len(tokens) // 2)]
    ) and question in " ".join(STORY.split())


def test_texts_in_records_do_not_run_into_each_other(tmp_path):
    rows = [{"text": f"The fox saw {n} bears. " * n} for n in (1, 9, 2)]
    found = load(write(tmp_path / "texts.jsonl", "\n".join(map(json.dumps, rows))), max_seq_len=40)
    whole = [[*text.encode(row["text"], EMBEDDED), EMBEDDED.eos_id] for row in rows]
    assert [s.name for s in found.training if s.name.endswith(" 0")] == [f"record {n} token 0" for n in (1, 2, 3)]
    for number, ids in enumerate(whole, 1):
        parts = [list(s.tokens) for s in found.training if s.name.startswith(f"record {number} ")]
        assert parts[0] + [token for part in parts[1:] for token in part[1:]] == ids


# A file of its own for the held-out loss

PAIRS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(5)]


@pytest.mark.parametrize("data", [STORY, PAIRS], ids=["text", "pairs"])
@pytest.mark.parametrize("other", [STORY.replace("fox", "owl"), [{"messages": DIALOG}] * 30], ids=["text", "chats"])
def test_held_out_are_the_first_samples_of_the_file_for_it_and_all_others_are_trained(tmp_path, data, other):
    """Of any two formats; questions have the form of what is trained, and the opening of a text is a held-out one."""
    path, eval_path = write(tmp_path / "data", data), write(tmp_path / "other", other)
    found, alone, there = load(path, 33, 3, eval_path=eval_path), load(path, 33), load(eval_path, 33)
    assert found.training == alone.training and found.held_out == there.training[:3] and found.what == alone.what
    n = len(there.training)
    assert found.notes == f"; held out: the first of {n} samples of {eval_path}, {there.what}{there.notes}"
    ((question, prompt),) = found.questions.items()
    if data is PAIRS:
        assert found.questions == alone.questions
    else:
        opened = found.held_out[0] if isinstance(other, str) else found.training[0]
        assert tuple(prompt) == opened.tokens[:16] and question == " ".join(EMBEDDED.decode(prompt[1:]).split())


def test_a_file_with_fewer_samples_is_all_held_out(tmp_path):
    path, eval_path = write(tmp_path / "data", STORY), write(tmp_path / "other", PAIRS)
    found = load(path, 33, 20, eval_path=eval_path)
    assert len(found.held_out) == 5 and "; held out: the first of 5 samples of " in found.notes


def test_a_file_that_nothing_can_be_measured_on_is_refused_by_name(tmp_path):
    path = write(tmp_path / "data", STORY)
    for content, length, message in (
        ("", 33, "other is empty"),
        (" \n", 33, "other is empty"),
        ('[{"prompt": "a"}]', 33, "other:record 1 has the fields prompt; expected"),
        (PAIRS, 4, r"other: 5 .*, of which nothing can be measured on within max_seq_len=4; 5 left out \(record"),
    ):
        with pytest.raises(InputError, match=f"^(eval_data=)?.*{message}"):
            load(path, length, 3, eval_path=write(tmp_path / "other", content))


# Showing


def test_each_format_is_shown(tmp_path):
    def shown(content, name="data", n=1, max_seq_len=512) -> str:
        return "\n".join(dataset.show(write(tmp_path / name, content), EMBEDDED, max_seq_len, n))

    chat = shown([{"messages": DIALOG}] * 3)
    assert "user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n\n[H" in chat
    assert chat.count("[<|eot_id|>]") == 2 and chat.endswith(f"1 samples of {tmp_path / 'data'}, 3 chats (JSON)")
    pair = shown([{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "a", "completion": ""}], n=2)
    assert "<|begin_of_text|>2 + 2 =\n[ ][4][<end of text>]" in pair and "left out (record 2: no completion)" in pair
    plain = shown(STORY, "a.txt", 2, 16)
    assert (
        "record 1 token 0: 1 tokens of prompt, 15 trained" in plain and "<|begin_of_text|>\n[The][ fox][ saw]" in plain
    )
    assert "\nrecord 1 token 15: 1" in plain and plain.endswith(", plain text")
