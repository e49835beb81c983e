"""The vocabulary in a GGUF file: the ids of the tokenizer that it was made from; metadata that are refused."""

from __future__ import annotations

import functools
import io
import json
import warnings

import gguf
import numpy as np
import pytest
import sentencepiece
import vocabularies
from conftest import TINY, asset, random_model

from llama import ModelArgs, Tokenizer, checkpoint
from llama.checkpoint import tokenizer_files
from llama.errors import InputError, Notice
from llama.tokenizer import find_tokenizer
from llama.vocabulary.gguf import CUTS


def written(folder, path, extra=0):
    """A GGUF file of a small model whose table has `extra` more rows than the tokenizer at `path` has tokens."""
    args = ModelArgs(dim=32, n_layers=1, n_heads=2, vocab_size=Tokenizer(path).n_words + extra, multiple_of=32)
    checkpoint.save(random_model(args), folder / "m.gguf", "gguf", path)
    return folder / "m.gguf"


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """A GGUF file with the embedded model's tokenizer."""
    return written(tmp_path_factory.mktemp("embedded"), TINY / "tokenizer.model")


@functools.cache
def fields_of(path):
    prefix = "tokenizer.ggml."
    fields = gguf.GGUFReader(path).fields.items()
    return {name.removeprefix(prefix): field.contents() for name, field in fields if name.startswith(prefix)}


def assert_same(ours, theirs, texts):
    assert ours.is_same(theirs)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.adds_bos) == (
        theirs.bos_id, theirs.eos_id, theirs.pad_id, theirs.adds_bos
    )  # fmt: skip
    assert set(ours.stop_tokens) == set(theirs.stop_tokens)
    for text in texts:
        ids = theirs.encode(text, bos=True, eos=True)
        assert ours.encode(text, bos=True, eos=True) == ids, text
        assert ours.decode(ids[ours.adds_bos : -1]) == theirs.decode(ids[ours.adds_bos : -1])
        assert ours.encode(text, False, False, continues=True) == theirs.encode(text, False, False, continues=True)


@pytest.mark.parametrize("extra", [0, 5])
def test_ids_of_the_embedded_tokenizer(tmp_path, extra):
    path = written(tmp_path, TINY / "tokenizer.model", extra)
    assert find_tokenizer(path) == path
    tokenizer = Tokenizer(path)
    assert_same(tokenizer, Tokenizer(TINY / "tokenizer.model"), vocabularies.random_texts(1000))
    tokenizer.check_vocabulary(checkpoint.read_args(path).vocab_size)
    fields = fields_of(path)
    assert (fields["model"], fields["pre"], fields["eot_token_id"]) == ("gpt2", "llama-bpe", 3849)
    assert len(fields["tokens"]) == len(fields["token_type"]) == checkpoint.read_args(path).vocab_size


@pytest.mark.parametrize("style", vocabularies.STYLES)
def test_ids_of_a_tokenizer_json(tmp_path, style):
    """GGUF cannot say that an added token takes the space before it, or is a whole word: not tested."""
    source = vocabularies.write(tmp_path, style)
    path = written(tmp_path, source)
    texts = [text for text in vocabularies.random_texts(1000) if "<tool>" not in text and "word" not in text]
    assert_same(Tokenizer(path), Tokenizer(source), texts)
    assert Tokenizer(path).template == vocabularies.CONFIGS[style]["chat_template"]
    assert fields_of(path)["pre"] == {"llama3": "llama-bpe", "smollm2": "smollm", "tinyllama": "default"}[style]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama2_tokenizer.model", "llama3_tokenizer.model"])
def test_ids_of_the_real_tokenizers(tmp_path, name):
    source = asset(name)
    lines = asset("wikitext2_test.raw").read_text(encoding="utf-8").splitlines()
    path = written(tmp_path, source)
    assert_same(Tokenizer(path), Tokenizer(source), [*lines, *vocabularies.random_texts(1000)])


def test_pieces_keep_scores_and_types(tmp_path, llama2_tokenizer):
    source, model = asset("llama2_tokenizer.model"), llama2_tokenizer.vocabulary.model
    path = written(tmp_path, source)
    assert_same(Tokenizer(path), llama2_tokenizer, vocabularies.random_texts(300))
    fields = fields_of(path)
    assert fields["scores"] == [model.get_score(i) for i in range(32_000)]
    assert fields["token_type"][:4] == [2, 3, 3, 6] and set(fields["token_type"][259:]) == {1}
    assert (fields["model"], fields["unknown_token_id"], fields["add_space_prefix"]) == ("llama", 0, True)


def changed(path, **fields):
    """A file with the same tokenizer but for some fields; None takes one away."""
    writer = gguf.GGUFWriter(path.with_name("changed.gguf"), "llama")
    for key, value in {**fields_of(path), **fields}.items():
        if value is not None:
            name = "tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}"
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    writer.add_tensor("x", np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_name("changed.gguf")


def pieces(path, **options):
    """A small sentencepiece model; by default without anything that changes a text."""
    plain = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    texts, file = (TINY / "alpaca_200.json").read_text().splitlines(), io.BytesIO()
    rules = {"byte_fallback": True, "vocab_size": 500, "minloglevel": 2, **plain, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=file, **rules)
    path.write_bytes(file.getvalue())
    return path


def test_user_defined_pieces_stay_what_they_are(tmp_path):
    source = pieces(tmp_path / "p.model", user_defined_symbols=["<tool>", "ab c"])
    path = written(tmp_path, source)
    assert fields_of(path)["token_type"][3:5] == [4, 4]
    assert_same(Tokenizer(path), Tokenizer(source), ["a <tool>b", "ab cab c", *vocabularies.random_texts(100)])


def test_pieces_that_gguf_cannot_say(tmp_path):
    """Scores of a unigram model are no order of merges; texts that are changed first are a warning."""
    with pytest.raises(InputError, match="only where it is of byte pairs"):
        written(tmp_path, pieces(tmp_path / "u.model", model_type="unigram"))
    for options in ({"remove_extra_whitespaces": True}, {"normalization_rule_name": "nmt_nfkc"}):
        source, folder = pieces(tmp_path / "n.model", **options), tmp_path / next(iter(options))
        folder.mkdir()
        with pytest.warns(Notice, match="ids may differ"):
            written(folder, source)
        tokenizer_files.write(source, folder)
        with pytest.warns(Notice, match="ids may differ"):
            written(tmp_path, folder / "tokenizer.json")
        (tmp_path / "m.gguf").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        written(tmp_path, pieces(tmp_path / "p.model"))


BAD = {
    "model": ("bert", "model: 'bert' is not supported"),
    "pre": ("tekken", "pre: 'tekken' is not supported"),
    "eos_token_id": (None, "eos_token_id: is missing"),
    "bos_token_id": (600_000, "bos_token_id: 600000 is not the id"),
    "eot_token_id": (-1, "eot_token_id: -1 is not the id"),
    "tokens": (["a", "b"], "must be lists of the same length"),
    "token_type": (None, "must be lists of the same length"),
    "merges": (None, "merges: must be a list"),
}
BAD_MERGES = {
    "cycle": ["i n", "n in"],
    "one piece": ["in"],
    "not text": [1, 2],
    "unknown piece": ["qqqqqqq w"],
}


@pytest.mark.parametrize("name", BAD)
def test_metadata_that_are_refused(embedded, name):
    value, message = BAD[name]
    path = changed(embedded, **{name: value})
    with pytest.raises(InputError, match=message) as error:
        Tokenizer(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", BAD_MERGES)
def test_merges_that_are_refused(embedded, name):
    path = changed(embedded, merges=BAD_MERGES[name])
    with pytest.raises(InputError, match="merges") as error:
        Tokenizer(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_pieces_that_are_refused(tmp_path):
    path = written(tmp_path, vocabularies.write(tmp_path, "tinyllama"))
    types = fields_of(path)["token_type"]
    for change in ({"scores": None}, {"scores": [1.0]}, {"token_type": [7, *types[1:]]}, {"bos_token_id": 300}):
        with pytest.raises(InputError) as error:
            Tokenizer(changed(path, **change))
        assert "changed.gguf" in str(error.value) and "\n" not in str(error.value)


def test_names_of_cuts(embedded):
    """A name that is missing, in files from before there were any, is Llama 3's where its tokens are."""
    source = TINY / "tokenizer.model"
    path, texts = embedded, ["Don't  panic: 12345 + 67!\n\n  ok", "x=f(1234)+$99^2"]
    expected = [Tokenizer(source).encode(text, True, False) for text in texts]
    for pre in (None, "llama-v3"):
        tokenizer = Tokenizer(changed(path, pre=pre))
        assert [tokenizer.encode(text, True, False) for text in texts] == expected and tokenizer.adds_bos
    tokens = [token.replace("<|begin_of_text|>", "<|bos|>") for token in fields_of(path)["tokens"]]
    cut = {
        pre: Tokenizer(changed(path, pre=pre, tokens=tokens, add_bos_token=None)) for pre in ("default", "gpt-2", None)
    }
    assert not cut["default"].adds_bos and set(CUTS) >= {"default", "gpt-2", "smollm", "llama-bpe"}
    assert cut["default"].encode(texts[1], False, False) == cut[None].encode(texts[1], False, False)
    assert cut["default"].encode(texts[0], False, False) != cut["gpt-2"].encode(texts[0], False, False)


def test_a_chat_template_is_text(embedded):
    """It tells formats apart, and is never executed."""
    path = changed(embedded, chat_template="{{ 1 / 0 }} <|start_header_id|>")
    assert Tokenizer(path).template == "{{ 1 / 0 }} <|start_header_id|>"
    assert json.dumps(Tokenizer(path).special_tokens)
