"""tokenizer.json: ids as transformers gives them, text that stays text, exact decoding, files that are refused."""

from __future__ import annotations

import base64
import functools
import io
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter

import pytest
import sentencepiece
import transformers
import vocabularies
from conftest import ROOT

from llama import Tokenizer
from llama.checkpoint.tokenizer_files import last_values
from llama.errors import InputError
from llama.tokenizer import StreamDecoder


@pytest.fixture(params=vocabularies.STYLES)
def folder(request, tmp_path):
    return vocabularies.write(tmp_path, request.param).parent


def test_ids_equal_transformers(folder):
    """On 3,000 random texts, which spell special tokens too; and with the token that begins a text."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    ours = Tokenizer(folder / "tokenizer.json")
    for text in vocabularies.random_texts(3000):
        ids = ours.encode(text, bos=True, eos=False)
        assert ids == theirs(text)["input_ids"], text
        assert not set(ids[ours.adds_bos :]) & set(ours.special_tokens.values())


def test_decoding_equals_transformers_and_the_stream(folder):
    """Texts, and random ids that cut characters anywhere; special tokens show as their names."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder, clean_up_tokenization_spaces=False)
    ours, rng = Tokenizer(folder / "tokenizer.json"), random.Random(0)
    for text in vocabularies.random_texts(500):
        ids = ours.encode(text, bos=False, eos=True)
        assert ours.decode(ids) == theirs.decode(ids)
    for _ in range(500):
        ids = [rng.randrange(ours.n_words) for _ in range(rng.randint(0, 12))]
        decoder = StreamDecoder(ours)
        assert "".join([*map(decoder.push, ids), decoder.flush()]) == ours.decode(ids)
        if "\ufffd" not in theirs.decode(ids):  # next to broken bytes they give up whole characters too
            assert ours.decode(ids) == theirs.decode(ids)


def test_special_ids_come_from_the_files_beside_it(tmp_path):
    """The text of a token before its id; lists; every stop, which may be an ordinary token such as a line feed."""
    path = vocabularies.write(
        tmp_path,
        "tinyllama",
        tokenizer_config={"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": "<unk>"},
        generation_config={"eos_token_id": [2, 300], "bos_token_id": 7},
        config={"eos_token_id": 301, "pad_token_id": -1},
    )
    tokenizer = Tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)
    assert tokenizer.stop_tokens == [2, 300, 301] and tokenizer.adds_bos
    piece = tokenizer.vocabulary.model.id_to_token(300)
    assert tokenizer.encode(piece, bos=False, eos=False, continues=True) == [300]
    assert list(tokenizer.special_tokens) == ["<unk>", "<s>", "</s>"]
    smol = Tokenizer(vocabularies.write(tmp_path / "smol", "smollm2"))
    assert (smol.bos_id, smol.eos_id, smol.pad_id, smol.adds_bos) == (1, 2, 2, False)
    assert smol.stop_tokens == [2, 0] and smol.encode("", bos=True, eos=True) == [2]
    llama3 = Tokenizer(vocabularies.write(tmp_path / "llama3", "llama3", tokenizer_config={"add_bos_token": False}))
    assert [llama3.decode([i]) for i in llama3.stop_tokens] == ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    assert llama3.bos_id == llama3.special_tokens["<|begin_of_text|>"] and not llama3.adds_bos


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config", {"eos_token": "<|fin|>"}, "tokenizer_config.json:eos_token: '<|fin|>' is not in"),
        ("generation_config", {"eos_token_id": "2"}, "eos_token_id: must be ids"),
        ("config", {"bos_token_id": [1.5]}, "bos_token_id: must be ids"),
    ],
)
def test_special_ids_that_make_no_sense(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message.replace("|", "\\|")):
        Tokenizer(vocabularies.write(tmp_path, "tinyllama", **{name: content}))


def test_an_end_that_the_file_does_not_call_special(tmp_path):
    """It becomes special, as transformers makes it; and where ordinary text is merged into it, that is an error."""
    content = json.loads(vocabularies.tokenizer_json("smollm2"))
    content["added_tokens"] = []
    path = vocabularies.write(tmp_path, "smollm2")
    path.write_text(json.dumps(content), encoding="utf-8")
    assert Tokenizer(path).special_tokens == {"<|im_start|>": 1, "<|im_end|>": 2}
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "in"}')
    with pytest.raises(InputError, match="make a special token of ordinary text"):
        Tokenizer(path).encode("in", bos=False, eos=False)


def test_a_control_token_is_never_the_unknown_one(tmp_path):
    """SmolLM2 has no token for some bytes, and calls its end-of-text token the unknown one."""
    content = json.loads(vocabularies.tokenizer_json("smollm2"))
    content["model"]["unk_token"] = "<|endoftext|>"
    path = vocabularies.write(tmp_path, "smollm2")
    path.write_text(json.dumps(content))
    assert Tokenizer(path).encode("\x04\x16", bos=False, eos=False) == []


@pytest.mark.parametrize("style", vocabularies.STYLES)
def test_a_text_that_continues_another_has_no_space_of_its_own(tmp_path, style):
    tokenizer = Tokenizer(vocabularies.write(tmp_path, style))
    question, answer = "### Response:", "No"
    joint = tokenizer.encode(question + answer, bos=True, eos=True)
    parts = tokenizer.encode(question, bos=True, eos=False), tokenizer.encode(answer, False, True, continues=True)
    assert parts[0] + parts[1] == joint
    assert (tokenizer.encode(answer, False, True) == parts[1]) == (style != "tinyllama")


def test_parts_that_do_nothing(tmp_path):
    """An empty sequence of normalizers, as some models have; truncation and padding, which are for training."""
    path = vocabularies.write(tmp_path, "llama3")
    expected = Tokenizer(path).encode("Hello there" * 9, bos=True, eos=True)
    content = json.loads(path.read_text(encoding="utf-8"))
    content["normalizer"] = {"type": "Sequence", "normalizers": []}
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(content))
    assert Tokenizer(path).encode("Hello there" * 9, bos=True, eos=True) == expected


def changed(**changes):
    """A change to the file: a value by its path, where None takes it away."""

    def apply(content):
        for place, value in changes.items():
            *parents, last = place.split("__")
            owner = content
            for parent in parents:
                owner = owner[parent]
            owner[last] = value

    return apply


def merge(*pair):
    return lambda content: content["model"]["merges"].insert(0, list(pair))


BAD = {
    "model.type: 'Unigram'": changed(model__type="Unigram"),
    "model: is missing": changed(model=[]),
    "model.dropout: 0.5": changed(model__dropout=0.5),
    "model.end_of_word_suffix": changed(model__end_of_word_suffix="</w>"),
    "model.surprise: is not supported": changed(model__surprise=1),
    "surprise: is not supported": changed(surprise=1),
    "normalizer: 'Lowercase'": changed(normalizer={"type": "Lowercase"}),
    "pre_tokenizer: 'Whitespace'": changed(pre_tokenizer={"type": "Whitespace"}),
    "pre_tokenizer: 'Sequence' is not": changed(
        pre_tokenizer=functools.reduce(
            lambda inner, _: {"type": "Sequence", "pretokenizers": [inner]}, range(9), {"type": "ByteLevel"}
        )
    ),
    "post_processor: 'BertProcessing'": changed(post_processor={"type": "BertProcessing"}),
    "decoder: 'CTC'": changed(decoder={"type": "CTC"}),
    "decoder: Strip is supported only": changed(decoder={"type": "Strip", "content": "x", "start": 1, "stop": 0}),
    "ByteLevel must be in both": changed(decoder=None),
    "pattern of more than": changed(pre_tokenizer={"type": "Split", "pattern": {"Regex": "a" * 3000}}),
    "vocab: must be a dict": changed(model__vocab=[]),
    "added_tokens: must be a list": changed(added_tokens={}),
    r"added_tokens\[0\]: must be": changed(added_tokens=[{"content": "", "id": 1}]),
    "ids 0 to 599, each once": changed(model__vocab__a=599),
    "ids 0 to 600, each once": changed(model__vocab__new=4_000_000_000),
    "ids 0 to 601, each once": changed(model__vocab__new=None, model__vocab__other=-1),
    r"merges\[0\]: .*'zzz'.* must be two pieces that make a third": merge("a", "zzz"),
    r"merges\[0\]: .*'a', ''.* must be two": merge("a", ""),  # a piece that is made of itself
    r"merges\[0\]: .*'c'.* must be two": merge("a", "b", "c"),
    r"merges\[0\]: .*1, 2.* must be two": merge(1, 2),
    "model.unk_token: is not in": changed(model__unk_token="<none>"),
    "spelled in bytes": changed(**{"model__vocab__new 1": 600}),
    "library cannot read it": changed(pre_tokenizer={"type": "Split"}, decoder={"type": "Fuse"}),
}


@pytest.mark.parametrize("message", BAD)
def test_files_that_are_refused(tmp_path, message):
    path = vocabularies.write(tmp_path, "smollm2")
    content = json.loads(path.read_text(encoding="utf-8"))
    BAD[message](content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as caught:
        Tokenizer(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert ("tokenizer_path=FILE" in str(caught.value)) == ("supported" in str(caught.value))


@pytest.mark.parametrize("style", vocabularies.STYLES)
@pytest.mark.parametrize("text", [" ", "a", "日", "7", "\n"])
def test_long_runs_take_no_time(tmp_path, style, text):
    tokenizer = Tokenizer(vocabularies.write(tmp_path, style))
    began = time.process_time()
    ids = tokenizer.encode(text * 100_000, bos=False, eos=False)
    assert time.process_time() - began < 2.0 and tokenizer.decode(ids) == text * 100_000


def test_tables_of_characters_to_replace(tmp_path):
    """sentencepiece's own are sound; those that would lead a search astray are refused, so that none panics."""
    model, rng, found = io.BytesIO(), random.Random(0), Counter()
    options = {"vocab_size": 20, "hard_vocab_limit": False, "normalization_rule_name": "nmt_nfkc", "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["a b c"] * 9), model_writer=model, **options)
    good = last_values(last_values(model.getvalue())[3])[2]
    path = vocabularies.write(tmp_path, "tinyllama")
    content = json.loads(path.read_text(encoding="utf-8"))
    for number in range(60):
        data = bytearray(good)
        for _ in range(number):
            data[rng.randrange(4, 180_000)] ^= 1 << rng.randrange(8)
        blob = base64.b64encode(data[: len(data) - 10 * (number % 7 == 6)]).decode()
        content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": blob}
        path.write_text(json.dumps(content))
        try:
            tokenizer = Tokenizer(path)
            assert [tokenizer.decode(tokenizer.encode("\uff21\u2460", False, False))] == ["A1"] or number
            found["sound"] += 1
        except InputError as error:
            found[str(error).partition(": ")[2]] += 1
    assert found["sound"] and found["normalizer: precompiled_charsmap is broken; download it again"]
    assert sum(found.values()) == 60 and len(found) == 2


FUZZ = """
import json, random, sys
from pathlib import Path
import vocabularies
from support import mutant
from llama import Tokenizer
from llama.errors import InputError

def nodes(value, place=()):
    yield place
    if isinstance(value, (dict, list)):
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        for key, child in items if len(items) < 20 else items[:3]:
            yield from nodes(child, (*place, key))

def changed(good, rng):
    content = json.loads(good)
    *parents, last = rng.choice([place for place in nodes(content) if place])
    owner = content
    for key in parents:
        owner = owner[key]
    others = [None, -1, 2**31, 2**70, 0.5, "", "a", "\\u2581" * 300, [], {}, [[]], {"type": "Sequence"}, True, owner]
    if rng.random() < 0.2:
        del owner[last]
    else:
        owner[last] = rng.choice(others)
    try:
        return json.dumps(content).encode()
    except ValueError:  # it would hold itself
        return b"{}"

folder, loaded = Path(sys.argv[1]), 0
for style in vocabularies.STYLES:
    path = vocabularies.write(folder, style)
    good, rng, texts = path.read_bytes(), random.Random(1), vocabularies.random_texts(4)
    for number in range(834):
        path.write_bytes(mutant(good, rng) if number % 2 else changed(good, rng))
        try:
            tokenizer = Tokenizer(path)
            for text in texts:
                tokenizer.decode(tokenizer.encode(text, bos=True, eos=True, continues=number % 3 == 0))
            loaded += 1
        except InputError as error:
            assert "\\n" not in str(error) and len(str(error)) < 600, error
print(loaded)
"""


@pytest.mark.slow
def test_2500_mutants_of_a_tokenizer_json_load_or_end_in_one_line(tmp_path):
    """In a process of its own, which the library might end: bytes changed anywhere, and values of the file."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    command = [sys.executable, "-c", FUZZ, tmp_path / "mutant"]
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and run.stderr == "", run.stderr
    assert 100 < int(run.stdout) < 2000
