"""Exact ids, text that stays text, streams that hold back half characters, files that are not tokenizers."""

from __future__ import annotations

import base64
import json
import random
import time

import pytest
import vocabularies
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from llama import Tokenizer
from llama.errors import InputError
from llama.tokenizer import StreamDecoder, find_tokenizer, llama3_special_tokens
from llama.vocabulary.ranks import MAX_RUN

EMBEDDED = Tokenizer(TINY / "tokenizer.model")
TEXTS = [
    "Hello world",
    "  two spaces",
    "naïve café\n\n\ttab",
    "日本語の文",
    "👩‍👩‍👧 and 👋🏽",
    "1234567890",
    "a\r\nb",
    "",
    "\x00",
]
KINDS = ["embedded", "llama3", "llama2"]


@pytest.fixture(params=KINDS)
def tokenizer(request) -> Tokenizer:
    return EMBEDDED if request.param == "embedded" else request.getfixturevalue(f"{request.param}_tokenizer")


def test_ids_of_llama_3(llama3_tokenizer):
    encode = llama3_tokenizer.encode
    assert (llama3_tokenizer.n_words, llama3_tokenizer.bos_id, llama3_tokenizer.eos_id) == (128_256, 128_000, 128_001)
    assert encode("This is a test sentence.", bos=True, eos=True) == [128000, 2028, 374, 264, 1296, 11914, 13, 128001]


def test_ids_of_llama_2(llama2_tokenizer):
    assert (llama2_tokenizer.n_words, llama2_tokenizer.bos_id, llama2_tokenizer.eos_id) == (32_000, 1, 2)
    assert llama2_tokenizer.encode("Hello world", bos=True, eos=True) == [1, 15043, 3186, 2]


def test_the_embedded_tokenizer_has_llama_3s_special_tokens():
    special = llama3_special_tokens()
    assert len(special) == len(set(special)) == 256 and EMBEDDED.n_words == 4096
    assert EMBEDDED.decode(range(3840, 4096)) == "".join(special)
    assert special[:2] == ["<|begin_of_text|>", "<|end_of_text|>"] and special[9] == "<|eot_id|>"
    assert special[5] == "<|reserved_special_token_2|>" and special[255] == "<|reserved_special_token_247|>"


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text, bos=False, eos=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text, bos=True, eos=True) == [tokenizer.bos_id, *ids, tokenizer.eos_id]


def test_a_prompt_begins_once(tokenizer):
    ids = tokenizer.encode_prompt("Hi")
    assert ids == [tokenizer.bos_id, *tokenizer.encode("Hi", bos=False, eos=False)]


@settings(max_examples=300)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_round_trips_and_stays_ordinary(text):
    ids = EMBEDDED.encode(text, bos=False, eos=False)
    assert EMBEDDED.decode(ids) == text
    assert all(token < 3840 for token in ids)


@pytest.mark.parametrize("special", [*llama3_special_tokens()[:12], "<s>", "</s>", "<unk>", "<0x0A>"])
def test_text_never_becomes_a_special_token(tokenizer, special):
    for text in (special, f"a{special}b", special * 2, special[:4] + special):
        ids = tokenizer.encode(text, bos=False, eos=False)
        control = range(128_000, 128_256) if tokenizer.n_words == 128_256 else range(3840, 4096)
        control = range(3) if tokenizer.kind == "sentencepiece" else control
        assert not set(ids) & set(control)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", [" ", "\n", "a", "^", "7", "\u200d", "\u0301", "日", "=", "\x00"])
def test_a_million_of_one_character(tokenizer, text):
    began = time.process_time()  # of this process: the tests' other worker is not the tokenizer's doing
    ids = tokenizer.encode(text * 1_000_000, bos=False, eos=False)
    assert time.process_time() - began < 2.0
    start = tokenizer.decode(ids[:60])
    assert start.rstrip("\ufffd") == text * len(start.rstrip("\ufffd"))


@pytest.mark.parametrize("run", [1, 999, MAX_RUN - 1, MAX_RUN, MAX_RUN + 1])
def test_many_long_runs_take_no_longer(tokenizer, run):
    text = ("a" * run + " ") * (1_000_000 // (run + 1))
    began = time.process_time()
    tokenizer.encode(text, bos=False, eos=False)
    assert time.process_time() - began < 2.0


def test_cuts_change_ids_only_at_the_cut(llama3_tokenizer):
    model = llama3_tokenizer.vocabulary.model
    text = "word " * 1000 + "x" * MAX_RUN + " end"
    assert llama3_tokenizer.encode(text, bos=False, eos=False) == model.encode_ordinary(text)


@pytest.mark.parametrize("text", ["\ud800", "fine \udcff not", "a\udfff"])
def test_lone_surrogates_are_refused(tokenizer, text):
    with pytest.raises(InputError, match="lone surrogate"):
        tokenizer.encode(text, bos=True, eos=False)


def test_a_stream_joins_to_the_full_decode(tokenizer):
    """Random ids, which cut characters anywhere; a replacement character only where the full text has one."""
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.n_words) for _ in range(rng.randint(0, 12))]
        decoder = StreamDecoder(tokenizer)
        parts = [decoder.push(token) for token in ids] + [decoder.flush()]
        assert "".join(parts) == tokenizer.decode(ids)
        data = b"".join(tokenizer.token_bytes(token) for token in ids)
        leading = tokenizer.kind == "sentencepiece"
        assert tokenizer.decode(ids) == (data.removeprefix(b" ") if leading else data).decode(errors="replace")


def test_a_stream_never_emits_half_a_character(tokenizer):
    text = "👩‍👩‍👧 日本語 naïve 👋🏽"
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.push(token) for token in tokenizer.encode(text, bos=False, eos=False)]
    assert "\ufffd" not in "".join(parts) and "".join(parts) == text and decoder.flush() == ""
    assert any(part == "" for part in parts)  # something was held back


def test_sentencepiece_agrees_with_itself(llama2_tokenizer):
    for text in TEXTS:
        ids = llama2_tokenizer.encode(text, bos=True, eos=True)
        assert llama2_tokenizer.decode(ids) == llama2_tokenizer.vocabulary.model.decode(ids)


def ranks(n: int = 300) -> list[str]:
    pieces = [bytes([i]) for i in range(256)] + [f"t{i}".encode() for i in range(n - 256)]
    return [f"{base64.b64encode(piece).decode()} {i}" for i, piece in enumerate(pieces)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r[:200], "single byte"),
        (lambda r: [*r[:280], *r[281:]], "tokenizer.model:281"),
        (lambda r: [*r[:270], r[260].split()[0] + " 270", *r[271:]], "tokenizer.model:271"),
        (lambda r: [*r[:270], "not!base64 270", *r[271:]], "tokenizer.model:271"),
        (lambda r: [*r, "=== 300"], "tokenizer.model:301"),
        (lambda r: [*r, "dDk= x"], "tokenizer.model:301"),
        (lambda r: ["{}"], "model: is missing"),
        (lambda r: ["hello"], "neither"),
        (lambda r: [""], "neither"),
        (lambda r: ["\x0a\x0e\x0a\x05<unk>"], "neither"),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path, change, message):
    path = tmp_path / "tokenizer.model"
    path.write_text("\n".join(change(ranks())))
    with pytest.raises(InputError, match=message) as caught:
        Tokenizer(path)
    assert "\n" not in str(caught.value)


def test_truncated_sentencepiece_model(tmp_path, llama2_tokenizer):
    data = llama2_tokenizer.vocabulary.model.serialized_model_proto()
    (tmp_path / "t.model").write_bytes(data[:100_000])
    with pytest.raises(InputError, match="neither"):
        Tokenizer(tmp_path / "t.model")


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_pointer_in_place_of_the_file(tmp_path, name):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 2183982\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(InputError, match=r"git-LFS pointer, .*git lfs pull"):
        Tokenizer(find_tokenizer(tmp_path))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"model": ' + b"[" * 100_000, b"\xef\xbb\xbf{}", b"\xff{"])
def test_a_tokenizer_json_that_is_none(tmp_path, data):
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(InputError) as caught:
        Tokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_huge_file_is_no_tokenizer(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match="larger than 64 MiB"):
        Tokenizer(tmp_path / "tokenizer.json")


def test_is_same_compares_what_ids_mean(tmp_path, llama2_tokenizer):
    """The kind of file does not matter, nor how it is told that a text begins; one different piece does."""
    path = vocabularies.write(tmp_path, "llama3")
    ours = Tokenizer(path)
    assert ours.is_same(Tokenizer(vocabularies.write(tmp_path, "llama3", tokenizer_config={"add_bos_token": False})))
    content = json.loads(path.read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    longest = sorted(vocab, key=vocab.get)[-2:]
    vocab[longest[0]], vocab[longest[1]] = vocab[longest[1]], vocab[longest[0]]
    path.write_text(json.dumps(content), encoding="utf-8")
    assert not ours.is_same(Tokenizer(path)) and not ours.is_same(llama2_tokenizer) and not EMBEDDED.is_same(ours)


def test_the_same_vocabulary_in_two_kinds_of_file(tmp_path, llama2_tokenizer):
    """Llama 2's sentencepiece model, and a tokenizer.json with its pieces: the same tokenizer, the same ids."""
    path, model = vocabularies.write(tmp_path, "tinyllama"), llama2_tokenizer.vocabulary.model
    vocab = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    splits = ((piece, at) for piece in list(vocab)[259:] for at in range(1, len(piece)))
    merges = [(piece[:at], piece[at:]) for piece, at in splits if piece[:at] in vocab and piece[at:] in vocab]
    merges.sort(key=lambda pair: -model.get_score(vocab["".join(pair)]))
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"] |= {"vocab": vocab, "merges": merges}
    path.write_text(json.dumps(content), encoding="utf-8")
    ours = Tokenizer(path)
    assert ours.is_same(llama2_tokenizer) and llama2_tokenizer.is_same(ours)
    for text in vocabularies.random_texts(300):
        assert ours.encode(text, bos=True, eos=True) == llama2_tokenizer.encode(text, bos=True, eos=True)


def test_a_table_may_be_larger_than_its_tokenizer():
    """Padded or extended; not smaller, and not another model's altogether."""
    for vocab_size in (4096, 4097, 4608):
        EMBEDDED.check_vocabulary(vocab_size)
    for vocab_size in (4095, 4609, 128_256):
        with pytest.raises(InputError, match="the tokenizer has 4096 words"):
            EMBEDDED.check_vocabulary(vocab_size)


def test_a_token_that_was_added_without_a_row_is_named(tmp_path):
    path = vocabularies.write(tmp_path, "llama3")
    before = Tokenizer(path).n_words
    content = json.loads(path.read_text())
    added = {"id": before, "content": "[PAD]", "special": True}
    switches = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    path.write_text(json.dumps({**content, "added_tokens": [*content["added_tokens"], added | switches]}))
    with pytest.raises(InputError, match=r"take \[PAD\] out of its added_tokens, for which the model has no row"):
        Tokenizer(path).check_vocabulary(before)
    Tokenizer(path).check_vocabulary(before + 1)


def test_where_a_tokenizer_is_looked_for(tmp_path):
    with pytest.raises(InputError, match="tokenizer_path=FILE"):
        find_tokenizer(tmp_path)
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tokenizer.model").touch()
    assert find_tokenizer(tmp_path).parent.name == "original"
    (tmp_path / "tokenizer.model").touch()
    assert find_tokenizer(tmp_path).parent == tmp_path
    (tmp_path / "tokenizer.json").touch()
    (tmp_path / "model.safetensors").touch()
    assert find_tokenizer(tmp_path) == find_tokenizer(tmp_path / "model.safetensors") == tmp_path / "tokenizer.json"
    assert find_tokenizer("/nowhere", tmp_path) == tmp_path / "tokenizer.json"
    (tmp_path / "named.bin").write_bytes(b"GGUF....")
    assert find_tokenizer(tmp_path / "named.bin") == tmp_path / "named.bin"
    with pytest.raises(InputError, match="is not a file"):
        Tokenizer(tmp_path / "absent")


def test_ids_outside_the_vocabulary():
    for token in (-1, 4096):
        with pytest.raises(InputError, match="outside the vocabulary"):
            EMBEDDED.decode([token])
