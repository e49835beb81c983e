"""What we write for Hugging Face, as transformers takes it: its ids, chats, settings and ends of texts are ours."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import random
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
from conftest import ROOT, SMALL, TINY, asset, random_model
from gguf.vocab import BpeVocab, LlamaHfVocab, SentencePieceVocab, SpecialVocab
from support import same_weights
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, pipeline

from llama import Llama, checkpoint, quantization
from llama.checkpoint import tokenizer_files
from llama.errors import InputError
from llama.quantization import Quantization
from llama.tokenizer import ChatFormat, Tokenizer, find_tokenizer

WORDS = [
    "don't",
    "'\u017f",
    "'LL",
    "  ",
    "    ",
    "\r\n",
    "\t",
    "\u2581",
    "\u3000",
    "\x85",
    "\x00",
    "e\u0301",
    "12345",
    " the",
]
REAL = ("llama3_tokenizer.model", "llama2_tokenizer.model")
DIALOG = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": " Hi\n"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "What is 2 + 2?\n\nIn words."},
]
UNTIED = dataclasses.replace(SMALL, vocab_size=4096, tie_word_embeddings=False, max_seq_len=777)


def random_texts(n: int) -> list[str]:
    """Words, letters of every script, emoji, and code points without a character, with spaces in between."""
    rng = random.Random(0)

    def piece() -> str:
        draw = rng.random()
        if draw < 0.5:
            return rng.choice(WORDS) if draw < 0.2 else chr(rng.randrange(32, 0x600))
        return chr(
            rng.choice([rng.randrange(0x1F300, 0x1FAFF), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])
        )

    return ["".join(piece() for _ in range(rng.randrange(60))) for _ in range(n)]


@functools.cache
def corpus() -> list[str]:
    return [record["output"] for record in json.loads((ROOT / "data" / "alpaca_200.json").read_text())]


def trained_pieces(path: Path, **options) -> Path:
    """A small sentencepiece model with Llama 2's rules."""
    rules = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "minloglevel": 2}
    rules |= {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "vocab_size": 1000}
    file = io.BytesIO()
    train = sentencepiece.SentencePieceTrainer.train
    train(sentence_iterator=iter(corpus()), model_writer=file, **rules | options)
    path.write_bytes(file.getvalue())
    return path


def trained_json(directory: Path, **config) -> Path:
    """A small tokenizer.json like SmolLM2's: no begin-of-text in front of a text, ChatML's tokens."""
    model = tokenizers.ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    model.train_from_iterator(corpus(), vocab_size=800, special_tokens=special, show_progress=False)
    directory.mkdir()
    (directory / "tokenizer.json").write_text(model.to_str())
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "tokenizer_class": "GPT2Tokenizer"} | config
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory / "tokenizer.json"


def written(path: Path, directory: Path):
    """What AutoTokenizer makes of the files that we write for a tokenizer."""
    directory.mkdir()
    tokenizer_files.write(path, directory, UNTIED)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return AutoTokenizer.from_pretrained(directory)


def tokenizer_file(name: str, tmp_path: Path) -> Path:
    if name in REAL:
        return asset(name)
    user_defined = {"user_defined_symbols": ["<tool>", "foo bar", "abc"]} if name == "user-defined" else {}
    return TINY / "tokenizer.model" if name == "ranks" else trained_pieces(tmp_path / "p.model", **user_defined)


@pytest.mark.parametrize(
    "name", ["ranks", "pieces", "user-defined", "llama3_tokenizer.model", "llama2_tokenizer.model"]
)
def test_ids_equal_ours_through_transformers(tmp_path, name):
    path = tokenizer_file(name, tmp_path)
    ours, theirs = Tokenizer(path), written(path, tmp_path / "out")
    again = Tokenizer(tmp_path / "out" / "tokenizer.json")
    texts = [*random_texts(1000), "", " ", "a <tool> foo bar  abcd", " " * 40]
    if name in REAL:
        texts += asset("wikitext2_test.raw").read_text(encoding="utf-8").split("\n = ")
    for text in texts:
        ids = ours.encode(text, bos=True, eos=False)
        assert theirs(text).input_ids == ids == again.encode(text, bos=True, eos=False)
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids[1:])
    assert again.is_same(ours) and again.stop_tokens == ours.stop_tokens


def test_a_pair_of_texts_begins_twice(tmp_path):
    theirs = written(TINY / "tokenizer.model", tmp_path / "out")
    assert theirs("a").keys() == {"input_ids", "attention_mask"}
    assert theirs("a", "b").input_ids == theirs("a").input_ids + theirs("b").input_ids


def test_a_token_that_merging_never_builds_has_no_merge():
    rank = {piece: i for i, piece in enumerate([b"a", b"b", b"c", b"ab", b"acb", b"bc", b"abc"])}
    assert tokenizer_files.merges(rank) == [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c")]  # none for acb
    assert tokenizer_files.merges({"x": 0.0, "xx": 1.0, "xxx": 1.0}) == [("xx", "x"), ("x", "x")]


def test_pieces_that_normalize_characters(tmp_path):
    """The rules of sentencepiece's default: compatibility forms are replaced, needless spaces go."""
    rules = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True, "add_dummy_prefix": False}
    path = trained_pieces(tmp_path / "p.model", **rules)
    ours, theirs = Tokenizer(path), written(path, tmp_path / "out")
    again = Tokenizer(tmp_path / "out" / "tokenizer.json")
    for text in (
        *corpus()[:50],
        "  two  spaces \u3000 ",
        "\ufb01ne \u2460 \uff21\uff22",
        "a\u200bb\tc\nd",
        "caf\xe9",
        "  ",
    ):
        ids = ours.encode(text, bos=True, eos=False)
        assert theirs(text).input_ids == ids == again.encode(text, bos=True, eos=False)


def test_a_token_of_a_megabyte_takes_no_time():
    with pytest.raises(InputError, match="more than 1,024"):
        tokenizer_files.merges({b"a": 0, b"a" * (1 << 20): 1})


def test_pieces_that_are_no_byte_pairs_are_refused(tmp_path):
    path = trained_pieces(tmp_path / "p.model", model_type="unigram")
    with pytest.raises(InputError, match="byte pairs"):
        written(path, tmp_path / "out")


@pytest.mark.parametrize("name", ["ranks", "pieces", "chatml"])
def test_chat_templates_give_our_ids(tmp_path, name):
    path = trained_json(tmp_path / "s") if name == "chatml" else tokenizer_file(name, tmp_path)
    ours, theirs = ChatFormat(Tokenizer(path)), written(path, tmp_path / "out")
    for dialog in (DIALOG, DIALOG[1:], DIALOG[:2], DIALOG[1:2]):
        ids = theirs.apply_chat_template(dialog, add_generation_prompt=True, return_dict=False)
        assert ids == ours.encode_dialog_prompt(dialog)
    ids = theirs.apply_chat_template(DIALOG[:3], return_dict=False)
    assert ids == [token for part, _ in ours.encode_dialog(DIALOG[:3]) for token in part]


# The whole folder


@pytest.mark.parametrize("name", ["ranks", "pieces"])
def test_the_converter_of_llama_cpp_finds_what_it_reads(tmp_path, name):
    """By the classes of its package that the converter calls: kind of vocabulary, merges, special ids, template."""
    path = tokenizer_file(name, tmp_path)
    tokenizer = Tokenizer(path)
    args = dataclasses.replace(UNTIED, vocab_size=tokenizer.n_words)
    checkpoint.save(random_model(args), tmp_path / "out", "hf", path)
    special = SpecialVocab(tmp_path / "out", load_merges=True)
    assert special.special_token_ids["bos"] == tokenizer.bos_id and special.add_special_token["bos"]
    assert special.special_token_ids["eos"] == tokenizer.eos_id and special.chat_template
    if name == "pieces":
        assert SentencePieceVocab(tmp_path / "out").vocab_size == LlamaHfVocab(tmp_path / "out").vocab_size == 1000
    else:
        assert special.special_token_ids["pad"] == tokenizer.pad_id and len(special.merges) > 3000
        assert BpeVocab(tmp_path / "out").vocab_size == 4096
        with pytest.raises(TypeError, match="Llama 3 must be converted with BpeVocab"):
            LlamaHfVocab(tmp_path / "out")
        with pytest.raises(FileNotFoundError):  # so the converter goes on to byte pairs
            SentencePieceVocab(tmp_path / "out")


def pipeline_ids(folder: Path, prompt: str, n: int) -> list[int]:
    generate = pipeline("text-generation", model=str(folder), dtype=torch.float32)
    out = generate(prompt, do_sample=False, max_new_tokens=n, return_tensors=True)
    return out[0]["generated_token_ids"]


@pytest.mark.parametrize("stop", range(3))
def test_the_pipeline_stops_where_we_stop(tmp_path, stop):
    """Each stop token in turn is made what the model says next, after some tokens of greedy decoding."""
    tokenizer, model = Tokenizer(TINY / "tokenizer.model"), random_model(UNTIED)
    stop = tokenizer.stop_tokens[stop]
    prompt = tokenizer.encode("Once upon", bos=True, eos=False)
    llama = Llama(model, tokenizer, 64, 1)
    (said,), _ = llama.generate([prompt], max_gen_len=20, temperature=0.0, stop_tokens=[])
    last = next(i for i in range(5, 20) if said[i] not in said[:i])
    for table in (model.tok_embeddings.weight, model.output.weight):
        table.data[[said[last], stop]] = table.data[[stop, said[last]]]
    checkpoint.save(model, tmp_path / "out", "hf", TINY / "tokenizer.model")
    llama = Llama.build(tmp_path / "out", tmp_path / "out" / "tokenizer.json", 64, 1, device="cpu", dtype="float32")
    (ours,), _ = llama.generate([prompt], max_gen_len=20, temperature=0.0)
    assert ours == said[:last]
    assert pipeline_ids(tmp_path / "out", "Once upon", 20) == [*prompt, *ours, stop]


def test_the_pipeline_never_draws_what_the_tokenizer_has_not(tmp_path):
    model = random_model(dataclasses.replace(UNTIED, vocab_size=4104))
    model.output.weight.data[4096:] *= 50
    checkpoint.save(model, tmp_path / "out", "hf", TINY / "tokenizer.model")
    llama = Llama.build(tmp_path / "out", tmp_path / "out" / "tokenizer.json", 64, 1, device="cpu", dtype="float32")
    prompt = llama.tokenizer.encode("Once upon", bos=True, eos=False)
    (ours,), _ = llama.generate([prompt], max_gen_len=20, temperature=0.0)
    assert pipeline_ids(tmp_path / "out", "Once upon", 20) == [*prompt, *ours]
    llama.model.output.weight.data[4096:] = 0
    assert llama.generate([prompt], max_gen_len=20, temperature=0.0)[0] == [ours]


def test_the_embedded_model_lives_in_transformers(tmp_path):
    checkpoint.save(checkpoint.load(TINY, torch.float32), tmp_path / "out", "hf", TINY / "tokenizer.model")
    assert same_weights(checkpoint.load(tmp_path / "out"), checkpoint.load(TINY, torch.float32))
    llama = Llama.build(tmp_path / "out", find_tokenizer(tmp_path / "out"), 128, 1, device="cpu", dtype="float32")
    prompt = llama.tokenizer.encode("The fox", bos=True, eos=False)
    (ours,), _ = llama.generate([prompt], max_gen_len=40, temperature=0.0)
    theirs = pipeline_ids(tmp_path / "out", "The fox", 40)
    assert theirs[: len(prompt) + len(ours)] == prompt + ours
    assert theirs[len(prompt) + len(ours) :] in ([], *([stop] for stop in llama.tokenizer.stop_tokens))


@pytest.mark.parametrize("name", ["ranks", "pieces"])
def test_what_transformers_writes_of_it_again_is_the_same(tmp_path, name):
    path = tokenizer_file(name, tmp_path)
    model = random_model(dataclasses.replace(UNTIED, vocab_size=Tokenizer(path).n_words))
    checkpoint.save(model, tmp_path / "out", "hf", path)
    for kind in (AutoModelForCausalLM, AutoTokenizer):
        kind.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    first, again = Tokenizer(tmp_path / "out" / "tokenizer.json"), Tokenizer(find_tokenizer(tmp_path / "again"))
    assert again.is_same(first) and again.stop_tokens == first.stop_tokens and again.template == first.template
    loaded = checkpoint.load(tmp_path / "again")
    assert loaded.args.trained_context == 777 and same_weights(loaded, model)


def test_the_source_keeps_its_word(tmp_path):
    """Context length, special ids, sampling and chat template of a Hugging Face folder are in what we write again."""
    path = trained_json(tmp_path / "s", chat_template="{{ 'mine <|im_start|>' }}", model_max_length=99)
    args = dataclasses.replace(UNTIED, vocab_size=Tokenizer(path).n_words)
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (path.parent / "generation_config.json").write_text(json.dumps(sampling | {"eos_token_id": [2, 5], "x": {}}))
    checkpoint.save(random_model(args), tmp_path / "first", "hf", path)
    checkpoint.save(checkpoint.load(tmp_path / "first"), tmp_path / "out", "hf", tmp_path / "first" / "tokenizer.json")
    for name in ("first", "out"):
        config, generation = (c.from_pretrained(tmp_path / name) for c in (LlamaConfig, GenerationConfig))
        assert config.max_position_embeddings == 777 and config.architectures == ["LlamaForCausalLM"]
        assert config.dtype == torch.float32
        assert config.bos_token_id == generation.bos_token_id == 1
        assert set(config.eos_token_id) == set(generation.eos_token_id) == {0, 2, 5}
        assert config.eos_token_id[0] == 2
        assert (generation.do_sample, generation.temperature, generation.top_p) == (True, 0.6, 0.9)
        theirs = AutoTokenizer.from_pretrained(tmp_path / name)
        assert theirs.chat_template == "{{ 'mine <|im_start|>' }}" and theirs.model_max_length == 99
        assert (tmp_path / name / "tokenizer.json").read_bytes() == path.read_bytes()
    assert same_weights(checkpoint.load(tmp_path / "first"), checkpoint.load(tmp_path / "out"))


@pytest.mark.parametrize("name", ["ranks", "pieces", "chatml"])
@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_the_tokenizer_of_a_gguf_file_goes_on(tmp_path, name, layout):
    path = trained_json(tmp_path / "s") if name == "chatml" else tokenizer_file(name, tmp_path)
    first = Tokenizer(path)
    model = random_model(dataclasses.replace(UNTIED, vocab_size=first.n_words))
    checkpoint.save(model, tmp_path / "m.gguf", "gguf", path)
    checkpoint.save(checkpoint.load(tmp_path / "m.gguf"), tmp_path / "out", layout, tmp_path / "m.gguf")
    ours = Tokenizer(find_tokenizer(tmp_path / "out"))
    assert ours.is_same(first) and set(ours.stop_tokens) == set(first.stop_tokens) and ours.adds_bos == first.adds_bos
    (tmp_path / "out" / "config.json").write_text('{"model_type": "llama"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in random_texts(100):
        assert (
            theirs(text).input_ids == ours.encode(text, bos=True, eos=False) == first.encode(text, bos=True, eos=False)
        )
    ids = theirs.apply_chat_template(DIALOG, add_generation_prompt=True, return_dict=False)
    assert ids == ChatFormat(ours).encode_dialog_prompt(DIALOG)
    assert theirs.chat_template == Tokenizer(tmp_path / "m.gguf").template


def test_a_text_may_end_with_a_word(tmp_path):
    """A mirror with a tokenizer.json alone, whose end is no special token and named by its id only."""
    path = trained_json(tmp_path / "s")
    word = Tokenizer(path).vocabulary.model.token_to_id("\u0120the")
    (path.parent / "tokenizer_config.json").unlink()
    (path.parent / "generation_config.json").write_text(json.dumps({"eos_token_id": word, "pad_token_id": word}))
    theirs = written(path, tmp_path / "out")
    assert theirs.eos_token == "\u0120the" and theirs.eos_token_id == word
    assert word in GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id


@pytest.mark.parametrize("bits", [None, 8])
def test_our_other_layouts_carry_a_tokenizer_json(tmp_path, bits):
    path = trained_json(tmp_path / "s")
    (path.parent / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    model = random_model(dataclasses.replace(UNTIED, vocab_size=Tokenizer(path).n_words))
    if bits:
        quantization.quantize(model.bfloat16(), Quantization(bits))
    checkpoint.save(model, tmp_path / "out", "meta", path)
    found = find_tokenizer(tmp_path / "out")
    assert found.name == "tokenizer.json"
    assert Tokenizer(found).is_same(Tokenizer(path)) and Tokenizer(found).stop_tokens == Tokenizer(path).stop_tokens
    assert same_weights(checkpoint.load(tmp_path / "out"), model)
