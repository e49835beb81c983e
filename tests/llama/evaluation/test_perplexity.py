"""Perplexity against its definition, against `transformers`, and evaluate.py as a user runs it."""

from __future__ import annotations

import base64
import copy
import dataclasses
import json
import math
import random
import re
import sys

import pytest
import torch
from conftest import SMALL, TINY, asset, random_model

import evaluate
from benchmarks import stopwatch
from benchmarks.rows import Row
from data import text as data_text
from data.tiny.sequences import held_out
from data.tiny.train import loss_of
from llama import Transformer, adapters, checkpoint, cli, lora
from llama import device as devices
from llama.cache import Int8Cache, KVCache
from llama.config import PRESETS
from llama.decoding import EagerStep
from llama.errors import InputError, NonFinite
from llama.evaluation import perplexity
from llama.training.loss import CHUNK
from reports import render, tables


def random_ids(n: int, seed: int = 0) -> list[int]:
    return torch.randint(SMALL.vocab_size, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


# Windows


def test_sliding_windows_score_every_token_but_the_first_once():
    """And each after at least context - stride tokens, or all that there are."""
    rng = random.Random(0)
    for _ in range(300):
        context = rng.randint(2, 40)
        n, stride = rng.randint(2, 150), rng.randint(1, context - 1)
        found = perplexity.windows(n, context, stride)
        assert [t for w in found for t in range(w.first, w.stop)] == list(range(1, n))
        assert all(w.first - w.start >= min(context - stride, w.first) for w in found)
        assert all(w.stop - w.start == context for w in found[:-1]) and found[-1].stop - found[-1].start <= context


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (24, [(0, 1, 8), (8, 9, 16), (16, 17, 24)]),
        (27, [(0, 1, 8), (8, 9, 16), (16, 17, 24), (24, 25, 27)]),
        (25, [(0, 1, 8), (8, 9, 16), (16, 17, 24)]),  # nothing predicts a token that is alone in its chunk
        (5, [(0, 1, 5)]),
    ],
)
def test_chunks_do_not_score_their_first_token(n, expected):
    assert [dataclasses.astuple(window) for window in perplexity.windows(n, 8, 8)] == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((1, 8, 8), "too few tokens"),
        ((9, 1, 1), "context=1"),
        ((9, 8, 0), "stride=0"),
        ((9, 8, 9), "stride=9 is out of range; use 1 to context=8"),
    ],
)
def test_impossible_windows(settings, message):
    with pytest.raises(InputError, match=message):
        perplexity.windows(*settings)


def test_the_counts_of_wikitext_2(llama3_tokenizer):
    """Chunks of 2,048, as papers on quantization cut it: 141 whole ones, which are all that GPTQ scores, and a rest."""
    ids = data_text.to_measure(str(asset("wikitext2_test.raw")), llama3_tokenizer)
    assert len(ids) == 1 + 289_076 and ids.count(llama3_tokenizer.bos_id) == 1 and ids[0] == llama3_tokenizer.bos_id
    chunks = perplexity.windows(len(ids), 2048, 2048)
    scored = [window.stop - window.first for window in chunks]
    assert scored == [2047] * 141 + [308]
    sliding = perplexity.windows(len(ids), 2048, 512)
    assert sum(window.stop - window.first for window in sliding) == 289_076


def test_a_text_is_encoded_as_a_whole(tiny):
    """Line by line the ids are those of one call, which a tokenizer that cuts at a fixed length does not give."""
    rng, parts = random.Random(0), ["a", "B", "é", "7", ".", '"', " ", "  ", "\n", "\r\n", "\t", "\u3000", "'s"]
    for _ in range(200):
        text = "".join(rng.choices(parts, k=60))
        whole = tiny.tokenizer.vocabulary.model.encode_ordinary(text)
        assert data_text.encode(text, tiny.tokenizer) == [tiny.tokenizer.bos_id, *whole]


def test_llama_2s_text_gets_one_leading_space(llama2_tokenizer):
    text = "One line.\nAnother."
    assert data_text.encode(text, llama2_tokenizer) == llama2_tokenizer.encode(text, bos=True, eos=False)


def test_the_context_that_a_config_says_counts(tmp_path, monkeypatch, capsys):
    """Theta 100,000 alone would look like Llama 2 and its 4,096."""
    args = dataclasses.replace(SMALL, vocab_size=4096, use_scaled_rope=False, rope_scale_factor=None, rope_theta=1e5)
    model = random_model(dataclasses.replace(args, head_dim=None, dim=16, n_layers=1, max_seq_len=8192))
    checkpoint.save(model, tmp_path / "m", "hf", TINY / "tokenizer.model")
    (tmp_path / "t.txt").write_text("The little fox ran home. " * 4)
    flags = (f"--ckpt_dir={tmp_path / 'm'}", f"--data={tmp_path / 't.txt'}")
    assert call(monkeypatch, capsys, *flags, "--context=8192")[0] == 0
    code, _, err = call(monkeypatch, capsys, *flags, "--context=8193")
    assert code == 2 and "on 8192 tokens at most" in err


@pytest.mark.parametrize(("preset", "n_tokens"), [("llama3.2-1b", 131_072), ("llama2-7b", 4096), ("tiny", 131_072)])
def test_the_context_of_released_models(preset, n_tokens):
    assert PRESETS[preset].trained_context == n_tokens
    assert dataclasses.replace(PRESETS["llama2-7b"], rope_theta=500_000.0).trained_context == 8192  # Llama 3


# The figure


@torch.no_grad()
def by_definition(model: Transformer, ids: list[int], context: int, stride: int) -> dict[int, float]:
    """-log p of each scored token, by a call of its own, in the first window that has something before it."""
    nats = {}
    for t in range(1, len(ids)):
        starts = [start for start in range(0, len(ids), stride) if start < t < start + context]
        if starts:
            logits = model(torch.tensor([ids[starts[0] : t]]))[0, -1]
            nats[t] = (logits.logsumexp(0) - logits[ids[t]]).item()
    return nats


@pytest.mark.parametrize(
    ("n", "context", "stride"),
    [(37, 8, 8), (33, 8, 8), (37, 8, 3), (24, 8, 4), (20, 64, 64), (20, 64, 9), (19, 2, 1), (2, 2, 2)],
)
def test_it_is_its_definition(n, context, stride):
    """In fp64; windows one by one or several at once, the last one shorter, a context longer than the text."""
    model, ids = random_model().double(), random_ids(n)
    expected = by_definition(model, ids, context, stride)
    for batch_size in (1, 3):
        found = perplexity.evaluate(model, ids, context, stride, batch_size)
        assert found.tokens == len(expected) and found.windows == len(perplexity.windows(n, context, stride))
        assert sum(found.sums) == pytest.approx(sum(expected.values()), abs=1e-10)
        assert found.perplexity == pytest.approx(math.exp(sum(expected.values()) / len(expected)), rel=1e-12)
        for window, nats in zip(perplexity.windows(n, context, stride), found.sums, strict=True):
            assert nats == pytest.approx(sum(expected[t] for t in range(window.first, window.stop)), abs=1e-10)
    if stride == context:
        assert perplexity.evaluate(model, ids, context).sums == perplexity.evaluate(model, ids, context, stride).sums


@torch.no_grad()
@pytest.mark.parametrize("stride", [48, 20])
def test_it_is_what_transformers_computes(tmp_path, stride):
    """Hugging Face's loop: labels outside the new part of a window are -100; a mean loss times the labels it is of."""
    from transformers import LlamaForCausalLM

    model, ids, context = random_model(), random_ids(200), 48
    checkpoint.save(model, tmp_path / "hf", "hf")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    nats, tokens, done = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        part = torch.tensor([ids[begin:end]])
        labels = part.clone()
        labels[:, : -(end - done)] = -100
        n_labels = (labels[:, 1:] != -100).sum().item()  # transformers shifts by itself
        nats, tokens, done = nats + theirs(part, labels=labels).loss.item() * n_labels, tokens + n_labels, end
        if end == len(ids):
            break
    found = perplexity.evaluate(model, ids, context, stride, batch_size=2)
    assert found.tokens == tokens
    assert found.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    model = random_model()
    torch.nn.init.zeros_(model.norm.weight)
    assert perplexity.evaluate(model, random_ids(50), 16).perplexity == pytest.approx(SMALL.vocab_size, rel=1e-6)


def bigram_model(p: float) -> Transformer:
    """Blocks that add nothing, one-hot embeddings and a head that gives token a + 1 the probability p after token a."""
    args = dataclasses.replace(SMALL, vocab_size=32, tie_word_embeddings=False)
    model = random_model(args)
    with torch.no_grad():
        for block in model.layers:
            block.attention.wo.weight.zero_()
            block.feed_forward.w2.weight.zero_()
        model.norm.weight.fill_(1.0)
        model.tok_embeddings.weight.copy_(torch.eye(32, 64))
        model.output.weight.zero_()
        for a in range(32):  # the norm makes the one of a one-hot vector sqrt(dim)
            model.output.weight[:, a] = math.log((1 - p) / 31) / math.sqrt(64)
            model.output.weight[(a + 1) % 32, a] = math.log(p) / math.sqrt(64)
    return model


@pytest.mark.parametrize("stride", [16, 5])
def test_a_repeated_pattern_has_the_perplexity_that_arithmetic_says(stride):
    """Of 0 1 2 3 | 0 1 2 3 | ..., three steps of four are likely and one is not."""
    found = perplexity.evaluate(bigram_model(0.9), [0, 1, 2, 3] * 16 + [0], 65, batch_size=2)
    expected = -(3 * math.log(0.9) + math.log(0.1 / 31)) / 4
    assert found.loss == pytest.approx(expected, rel=1e-3)  # the norm's eps is one thousandth of its input
    steady = perplexity.evaluate(bigram_model(0.9), list(range(32)) * 3, 16, stride)
    assert steady.perplexity == pytest.approx(1 / 0.9, rel=1e-3)


def test_adapters_count_and_dropout_does_not():
    """An adapted model in training mode gives what the merged one gives, draws nothing and stays in its mode."""
    model, ids = random_model(), random_ids(60)
    plain = perplexity.evaluate(model, ids, 16, 7)
    adapted = copy.deepcopy(model)
    lora.apply(adapted, lora.LoRAConfig(r=4, dropout=0.5))
    adapted.train()
    assert perplexity.evaluate(adapted, ids, 16, 7).sums == plain.sums  # B starts at zero
    for module in lora.layers(adapted).values():
        torch.nn.init.normal_(module.lora_B, std=0.05)
    state = torch.get_rng_state()
    found = perplexity.evaluate(adapted, ids, 16, 7)
    assert torch.equal(torch.get_rng_state(), state) and adapted.training
    assert abs(found.loss - plain.loss) > 1e-3
    lora.merge(adapted)
    assert perplexity.evaluate(adapted, ids, 16, 7).loss == pytest.approx(found.loss, abs=1e-6)
    assert all(weight.grad is None for weight in adapted.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(device, dtype):
    model, ids = random_model().to(device), random_ids(100)
    exact = perplexity.evaluate(model, ids, 32, 16, 2).loss
    rounded = perplexity.evaluate(model.to(dtype), ids, 32, 16, 2).loss
    assert 0 < abs(rounded - exact) < 0.02


@pytest.mark.parametrize(("context", "stride", "batch_size"), [(16, 16, 3), (16, 5, 1)])
def test_through_a_cache_it_is_what_decoding_token_by_token_gives(model, context, stride, batch_size):
    ids = random_ids(60)
    plain = perplexity.evaluate(model, ids, context, stride, batch_size)
    exact = perplexity.evaluate(model, ids, context, stride, batch_size, cache_type=KVCache)
    assert exact.sums == pytest.approx(plain.sums, rel=1e-5)
    found = perplexity.evaluate(model, ids, context, stride, batch_size, cache_type=Int8Cache)
    assert found.loss != exact.loss and found.loss == pytest.approx(exact.loss, abs=0.01)
    for nats, window in zip(found.sums, perplexity.windows(len(ids), context, stride), strict=True):
        step = EagerStep(model, Int8Cache(SMALL, 1, context, model.dtype, "cpu"))
        text = torch.tensor(ids[window.start : window.stop])[None]
        with torch.no_grad():
            parts = [step(text[:, i : i + 1], torch.tensor([[i]])) for i in range(text.shape[1] - 1)]
        scores = torch.cat(parts, 1)[0].log_softmax(-1)[torch.arange(text.shape[1] - 1), text[0, 1:]]
        assert -scores[window.first - window.start - 1 :].sum().item() == pytest.approx(nats, rel=1e-4)


def test_only_scored_positions_are_projected_and_only_so_many_at_once(model, monkeypatch):
    rows, project = [], model.logits
    monkeypatch.setattr(model, "logits", lambda h: rows.append(len(h)) or project(h))
    found = perplexity.evaluate(model, random_ids(500), 300, 200, batch_size=2)
    assert sum(rows) == found.tokens == 499 and max(rows) == CHUNK


def test_what_is_not_finite_names_its_place(model):
    ids = [1, 2, 3, 4] * 4
    with torch.no_grad():
        model.tok_embeddings.weight[9] = math.nan
    model.output = torch.nn.Linear(64, 512, bias=False)  # untied, so that only text with token 9 in it meets the NaN
    assert perplexity.evaluate(model, ids, 4).windows == 4
    with pytest.raises(NonFinite, match="tokens 8 to 12 of the text: the loss is not finite in float32"):
        perplexity.evaluate(model, [*ids[:9], 9, *ids[10:]], 4, batch_size=3)


@pytest.mark.parametrize("ids", [[1, 2, 512], [-1, 3]])
def test_ids_outside_the_vocabulary(model, ids):
    with pytest.raises(InputError, match="outside the vocabulary of 512"):
        perplexity.evaluate(model, ids, 8)


def test_a_batch_of_no_windows(model):
    with pytest.raises(InputError, match="batch_size=0"):
        perplexity.evaluate(model, [1, 2], 8, batch_size=0)


def test_stretches_are_sums_of_neighbours():
    result = perplexity.Perplexity([1.0, 2.0, 4.0, 8.0, 16.0], [7, 2, 2, 2, 2])
    assert (merged := result.stretches(4)).sums == [1.0, 6.0, 24.0] and merged.counts == [7, 4, 4]
    assert result.stretches(1).counts == result.counts and merged.loss == result.loss
    assert result.stretches(99).counts == [15]


# evaluate.py


def call(monkeypatch, capsys, *flags: str) -> tuple[int, str, str]:
    """evaluate.py with these flags: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags, "--device=cpu"])
    with pytest.raises(SystemExit) as exit_:
        cli.run(evaluate.main)
    return exit_.value.code, *capsys.readouterr()


def newest(path, n: int = 1) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()[-n:]]


def table(rows: list[dict]) -> str:
    """What evaluate.py prints of these rows."""
    return render.markdown(tables.perplexity([Row("r", line, row) for line, row in enumerate(rows, 1)]))


def value(row: dict, name: str) -> float:
    assert row["metrics"][name]["n"] == 1
    return row["metrics"][name]["median"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A random model of 512 tokens with a tokenizer of single bytes and Llama 3's special tokens, and a text for it."""
    folder = tmp_path_factory.mktemp("small")
    checkpoint.save(random_model(), folder / "m")
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)]
    (folder / "m" / "tokenizer.model").write_text("".join(lines))
    (folder / "text.txt").write_bytes("Zwölf Boxkämpfer jagen Viktor.\r\n".encode() * 20)
    return folder


def test_the_default_is_the_published_held_out_text(tiny, tmp_path, monkeypatch, capsys):
    """Without flags, each window is one held-out sequence; here the first four of them."""
    flags = (f"--max_tokens={4 * 257}", f"--results={tmp_path}/rows.jsonl")
    code, out, err = call(monkeypatch, capsys, *flags)
    assert (code, err) == (0, "") and out.startswith(
        "**Perplexity on the embedded model's held-out text**\n\n| model | loss | perplexity |"
    )
    (row,) = newest(tmp_path / "rows.jsonl")
    with torch.no_grad():
        loss = loss_of(tiny.model, held_out(tiny.tokenizer, n=4)).item()
    assert value(row, "loss_nats") == pytest.approx(loss, abs=1e-6)
    assert row["cell"]["model"] == "tiny" and row["cell"]["context"] == row["cell"]["stride"] == 257
    assert row["experiment"] == "perplexity" and value(row, "windows") == 4 and value(row, "scored_tokens") == 4 * 256


def test_a_text_file(small, tmp_path, monkeypatch, capsys):
    """Begin-of-text once, then every byte of the file, line ends included."""
    data = small / "text.txt"
    flags = (f"--ckpt_dir={small}/m", f"--data={data}", "--context=64", "--stride=24", "--batch_size=5")
    code, out, _ = call(monkeypatch, capsys, *flags, f"--results={tmp_path}/rows.jsonl")
    assert code == 0 and "sliding" in out
    ids = [256, *data.read_bytes()]  # a text's begin is the first special token
    expected = perplexity.evaluate(random_model(), ids, 64, 24, 5)
    (row,) = newest(tmp_path / "rows.jsonl")
    assert value(row, "loss_nats") == expected.loss and value(row, "perplexity_x") == expected.perplexity
    assert value(row, "scored_tokens") == len(ids) - 1 and row["cell"]["data"] == "text.txt"
    assert value(row, "tokens_per_s") > 0 and "peak_memory_mb" in row["metrics"]
    assert value(row, "weights_mb") == random_model().args.weight_bytes(4) / 1e6 and value(row, "weight_bits") == 32
    code, out, _ = call(monkeypatch, capsys, *flags[:2])  # no file of rows, the default context
    assert code == 0 and "1 windows of 2048, stride 2048: side by side" in out


def test_against_itself_the_difference_is_zero(small, tmp_path, monkeypatch, capsys):
    flags = (f"--ckpt_dir={small}/m", f"--data={small}/text.txt", "--context=32", f"--results={tmp_path}/r")
    hf = tmp_path / "hf" / "m"  # its tokenizer.json is another file, and the same tokenizer
    checkpoint.save(checkpoint.load(small / "m"), hf, "hf", small / "m" / "tokenizer.model")
    for second in (f"--against={small}/m", f"--against={hf}", "--against_dtype=float32"):
        code, out, _ = call(monkeypatch, capsys, *flags, second)
        assert code == 0 and out.count("| m, float32 |") == 2
        ours, theirs = newest(tmp_path / "r", 2)
        for name in ("difference_nats", "difference_low_nats", "difference_high_nats"):
            assert value(ours, name) == 0.0
        assert value(ours, "loss_nats") == value(theirs, "loss_nats")
        assert "+0.00000, so 1.0000 times its perplexity [95 %: +0.00000 to +0.00000]: no difference" in out


def test_a_cache_in_8_bits_is_a_cell_of_its_own_and_the_second_model_has_none(small, tmp_path, monkeypatch, capsys):
    flags = (f"--ckpt_dir={small}/m", f"--data={small}/text.txt", "--context=32", f"--results={tmp_path}/r")
    code, out, _ = call(monkeypatch, capsys, *flags, "--cache_dtype=int8", f"--against={small}/m")
    assert code == 0 and out.count("| m, float32, int8 cache |") == out.count("| m, float32 |") == 1
    ours, theirs = newest(tmp_path / "r", 2)
    assert ours["cell"]["cache_dtype"] == "int8" and "cache_dtype" not in theirs["cell"]
    assert value(ours, "loss_nats") != value(theirs, "loss_nats")


def test_the_difference_has_the_right_sign(tmp_path, monkeypatch, capsys):
    """The draft is a far smaller model of the same text. The interval is that of the windows in pairs."""
    code, out, _ = call(
        monkeypatch, capsys, f"--max_tokens={10 * 257}", f"--against={TINY}/draft", f"--results={tmp_path}/r"
    )
    assert code == 0 and "the first is better." in out
    ours, theirs = newest(tmp_path / "r", 2)
    change = value(ours, "loss_nats") - value(theirs, "loss_nats")
    assert value(ours, "difference_nats") == change < 0
    assert value(ours, "difference_low_nats") < change < value(ours, "difference_high_nats") < 0
    assert ours["cell"]["against"] == {"model": "draft", "adapter": None, "dtype": "float32"}
    assert theirs["cell"]["model"] == "draft" and "against" not in theirs["cell"]
    for name, value_of in (("difference", 0.5), ("difference_low", 0.4), ("difference_high", 0.6)):
        ours["metrics"][f"{name}_nats"]["median"] = value_of
    turned = table([ours, theirs])
    assert "+0.50000, so 1.6487 times its perplexity [95 %: +0.40000 to +0.60000]: the first is worse." in turned


def test_little_text_gives_no_interval(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "--max_tokens=300", "--against_dtype=bfloat16")
    assert code == 0 and "too little text for an interval" in out and "95 %" not in out
    assert "| tiny, float32 |" in out and "| tiny, bfloat16 |" in out


def test_memory_that_was_freed_is_returned_before_memory_is_measured():
    """Else what one model leaves behind would hide as much of the next one's peak."""
    cpu = torch.device("cpu")
    blocks = [torch.zeros(25_000) for _ in range(600)]  # 60 MB in pieces that stay in the process's heap
    kept = blocks[::100]
    before = stopwatch.memory_baseline(cpu)
    del blocks
    devices.return_freed_memory()
    assert before == 0 or stopwatch.memory_baseline(cpu) < before - 40e6
    assert len(kept) == 6


def save_adapter(model: Transformer, directory, base: str) -> None:
    adapted = copy.deepcopy(model)
    lora.apply(adapted, lora.LoRAConfig(r=2))
    for module in lora.layers(adapted).values():
        torch.nn.init.normal_(module.lora_B, std=0.1)
    adapters.save(adapted, lora.LoRAConfig(r=2), directory, base)


def test_an_adapter_against_its_base(small, tmp_path, monkeypatch, capsys):
    model = random_model()
    save_adapter(model, tmp_path / "a", checkpoint.fingerprint(small / "m"))
    save_adapter(model, tmp_path / "foreign", "0" * 64)
    flags = (f"--ckpt_dir={small}/m", f"--data={small}/text.txt", "--context=32", f"--against={small}/m")
    code, out, _ = call(monkeypatch, capsys, *flags, f"--adapter={tmp_path}/a", f"--results={tmp_path}/r")
    assert code == 0 and "| m with adapter, float32 |" in out and "| m, float32 |" in out
    ours, theirs = newest(tmp_path / "r", 2)
    adapters.load(model, tmp_path / "a")
    ids = [256, *(small / "text.txt").read_bytes()]
    assert value(ours, "loss_nats") == perplexity.evaluate(model, ids, 32).loss != value(theirs, "loss_nats")
    code, _, err = call(monkeypatch, capsys, *flags, f"--adapter={tmp_path}/foreign")
    assert code == 2 and "was trained on a different base model" in err and err.count("\n") == 1


def test_adapters_of_one_name_are_two_cells(small, tmp_path, monkeypatch, capsys):
    """Every run of finetuning.py calls its adapter `adapter`: the content tells them apart."""
    for seed in (0, 1):
        model = random_model(seed=seed)
        save_adapter(model, tmp_path / str(seed) / "adapter", checkpoint.fingerprint(small / "m"))
        flags = (f"--ckpt_dir={small}/m", f"--data={small}/text.txt", f"--adapter={tmp_path}/{seed}/adapter")
        assert call(monkeypatch, capsys, *flags, f"--results={tmp_path}/r")[0] == 0
    first, second = (row["cell"] for row in newest(tmp_path / "r", 2))
    assert first["adapter"] == second["adapter"] == "adapter" and first != second


BAD = {
    "--data={small}/nothing": "nothing: No such file",
    "--data={small}": "it is a directory; pass a file",
    "--data=/dev/zero": "it is not a regular file",
    "--data={small}/empty": "empty is empty",
    "--data={small}/latin1": r"latin1 is not UTF-8 text \(byte 2: ",
    "": "--data is missing",
    "--data={small}/text.txt --max_tokens=1": "--max_tokens=1: expected at least 2",
    "--data={small}/text.txt --stride=0": "--stride=0 is out of range",
    "--data={small}/text.txt --context=32 --stride=33": "--stride=33 is out of range; use 1 to --context=32",
    "--data={small}/text.txt --context=1": "--context=1 is out of range",
    "--data={small}/text.txt --context=131073": "--context=131073: .* 131072 tokens",
    "--data={small}/text.txt --batch_size=0": "--batch_size=0: expected at least 1",
    "--data={small}/text.txt --dtype=int3": "--dtype=int3",
    "--data={small}/text.txt --against_dtype=int3": "--against_dtype=int3: expected one of auto, float32",
    "--data={small}/text.txt --against=/nowhere": "/nowhere does not exist",
    "--data={small}/text.txt --against={tiny}": "512 words, the model in .* 4096",
    "--data={small}/text.txt --against={small}/other": "is not the tokenizer in use",
    "--data={small}/text.txt --adapter=/nowhere": "adapter directory /nowhere does not exist",
    "--data={small}/text.txt --tokenizer_path={tiny}/tokenizer.model": "4096 words, the model in .* 512",
    "--data={small}/text.txt --results={small}": "cannot be written",
    "--datum=x": "unknown flag --datum; did you mean --data",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line_and_exit_2(small, monkeypatch, capsys, flags):
    (small / "empty").write_bytes(b"")
    (small / "latin1").write_bytes("Zw\xf6lf".encode("latin-1"))
    if not (small / "other").exists():
        checkpoint.save(random_model(), small / "other")
        text = (small / "m" / "tokenizer.model").read_text()
        swapped = text.replace("AA== 0\nAQ== 1\n", "AQ== 0\nAA== 1\n")
        assert swapped != text and (small / "other" / "tokenizer.model").write_text(swapped)
    monkeypatch.setattr(perplexity, "evaluate", lambda *_args, **_options: pytest.fail("it was found too late"))
    given = flags.format(small=small, tiny=TINY).split()
    code, out, err = call(monkeypatch, capsys, f"--ckpt_dir={small}/m", *given)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(BAD[flags], err)


def test_a_device_that_is_not_there_is_exit_3(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--device=cuda"])
    with pytest.raises(SystemExit) as exit_:
        cli.run(evaluate.main)
    assert exit_.value.code == 3 and "no CUDA device" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_exit_4(small, tmp_path, monkeypatch, capsys):
    model = random_model()
    with torch.no_grad():
        model.norm.weight[3] = math.inf
    checkpoint.save(model, tmp_path / "m", tokenizer_path=small / "m" / "tokenizer.model")
    code, out, err = call(monkeypatch, capsys, f"--ckpt_dir={tmp_path}/m", f"--data={small}/text.txt")
    assert (code, out) == (4, "") and "the loss is not finite in float32" in err and err.count("\n") == 1


def test_every_number_of_the_table_stands_in_a_row(small, tmp_path, monkeypatch, capsys):
    flags = (f"--ckpt_dir={small}/m", f"--data={small}/text.txt", "--context=32", "--against_dtype=bfloat16")
    _, out, _ = call(monkeypatch, capsys, *flags, f"--results={tmp_path}/r")
    rows = newest(tmp_path / "r", 2)
    assert table(rows) == out
    shown = ("loss_nats", "perplexity_x", "scored_tokens", "tokens_per_s", "peak_memory_mb")
    compared = ("windows", "difference_nats", "difference_low_nats", "difference_high_nats")
    for row, names in ((rows[0], shown + compared), (rows[1], shown)):
        for name in names:
            before = row["metrics"][name]["median"]
            row["metrics"][name]["median"] = before + 123
            assert table(rows) != out
            row["metrics"][name]["median"] = before
    for name in ("context", "stride", "tokens"):
        rows[0]["cell"][name] += 1
        assert table(rows) != out
        rows[0]["cell"][name] -= 1
    del rows[0]["metrics"]["peak_memory_mb"]  # where the system does not tell
    assert table(rows).splitlines()[4].endswith("| - |")
