"""A real trained model, SmolLM2-135M-Instruct, through everything: skipped, and said so, where it was not fetched."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import gguf
import pytest
import tokenizers
import torch
import vocabularies
from conftest import REAL, ROOT

import compress
import inference
from llama import Llama, Tokenizer, checkpoint, cli, quantization
from llama.conversation import Conversation
from llama.evaluation import perplexity
from llama.quantization import Quantization

pytestmark = pytest.mark.model
QUESTIONS = ("What is the capital of France?", "How many people live there?", "Name a museum in that city.")


def long_text() -> str:
    """WikiText-2's test text where it is at hand, else the licence of this repository."""
    path = Path(os.environ.get("LLAMA_ASSETS", "")) / "wikitext2_test.raw"
    return (path if path.is_file() else ROOT / "LICENSE").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(REAL)


@pytest.fixture(scope="module")
def llama(tokenizer) -> Llama:
    return Llama.build(REAL, tokenizer, max_seq_len=512, max_batch_size=4, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def ids(tokenizer) -> list[int]:
    """1,024 tokens of running text, without a begin token, which the model has none of."""
    return tokenizer.encode(long_text()[:10_000], bos=False, eos=False)[:1024]


def run(monkeypatch, capsys, main, *argv: str) -> str:
    """What a script prints, without the seconds that starting Python and torch takes."""
    monkeypatch.setattr(sys, "argv", list(argv))
    with pytest.raises(SystemExit) as exit_:
        cli.run(main)
    assert exit_.value.code == 0
    return capsys.readouterr().out


def test_the_answer_is_paris(monkeypatch, capsys):
    flags = ("--chat", f"--prompt={QUESTIONS[0]}", "--temperature=0", "--device=cpu")
    out = run(monkeypatch, capsys, inference.main, "inference.py", f"--ckpt_dir={REAL.parent}", *flags)
    assert "134,515,008 parameters" in out and "The capital of France is Paris." in out


def test_ids_equal_an_independent_reading(tokenizer):
    """Tokens and merges as the gguf package reads them, cut as the original tokenizer.json says it."""
    fields = gguf.GGUFReader(REAL).fields
    tokens, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    vocab = {token: i for i, token in enumerate(tokens)}
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    digits, level = tokenizers.pre_tokenizers.Digits(individual_digits=True), tokenizers.pre_tokenizers.ByteLevel(False)
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, level])
    theirs.decoder = tokenizers.decoders.ByteLevel()
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "llama").glob("*.py")]  # code, and runs of spaces
    prose = [long_text()[:100_000], (ROOT / "data" / "alpaca_200.json").read_text(encoding="utf-8")]
    spaces = ["", " ", "  \n\n\t  x", "\r\n" * 5, "\u00a0 \u2003a", "3.14159, 1,000,000 and 2024-12-31", "don't  we'LL"]
    for text in [*sources, *prose, *spaces, *vocabularies.random_texts(1000)]:
        expected = theirs.encode(text).ids
        assert tokenizer.encode(text, bos=True, eos=False) == expected, text[:200]
        assert tokenizer.decode(expected) == theirs.decode(expected)
    assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (49_152, 1, 2, False)


def test_perplexity_equals_that_of_transformers(llama, ids, tmp_path, monkeypatch, capsys):
    """Of the folder that compress.py exports."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "hf"
    flags = (f"--ckpt_dir={REAL}", "--to=hf", "--type=f32", f"--out_dir={folder}")
    run(monkeypatch, capsys, compress.COMMANDS, "compress.py", "convert", *flags)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    (folder / "model.safetensors").unlink()  # half a gigabyte that pytest would keep
    text = torch.tensor([ids])
    with torch.no_grad():
        loss = theirs(text, labels=text).loss.item()
    ours = perplexity.evaluate(llama.model, ids, context=1024)
    assert ours.tokens == 1023 and ours.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert ours.perplexity < 40


def test_the_cache_changes_no_token(llama):
    prompts = [llama.encode_prompt(text) for text in ("The capital of France is", "def fibonacci(n):\n")]
    cached, uncached = (llama.generate(prompts, 12, 0, use_cache=is_on)[0] for is_on in (True, False))
    assert cached == uncached and "Paris" in llama.tokenizer.decode(cached[0])


def test_a_conversation_says_what_fresh_runs_say(llama):
    settings = {"temperature": 0, "max_gen_len": 12}
    with llama.start_session() as session:
        conversation = Conversation(llama, session, settings)
        for question in QUESTIONS:
            known = len(session.tokens)
            ids = llama.formatter.encode_dialog_prompt([*conversation.messages, {"role": "user", "content": question}])
            before = session.n_computed
            said = "".join(conversation.answer(question))
            assert said == llama.tokenizer.decode(list(llama.stream(ids, **settings)))
            assert session.n_computed - before <= len(ids) - known + 12 + 3  # the end of an answer is encoded anew
        assert session.n_computed < len(ids) + 12 + 3 * len(QUESTIONS)


def test_int8_costs_less_than_one_percent_of_perplexity(ids):
    model = checkpoint.load(REAL, torch.bfloat16)
    plain = perplexity.evaluate(model, ids, context=1024).perplexity
    quantization.quantize(model, Quantization(8))
    assert perplexity.evaluate(model, ids, context=1024).perplexity == pytest.approx(plain, rel=0.01)
