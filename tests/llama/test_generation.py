"""Generation: cache on = off, a batch = its rows alone, Meta's interface and return shapes, limits."""

from __future__ import annotations

import dataclasses
import functools
import gc
import os
import random
import subprocess
import sys

import pytest
import torch
import vocabularies
from conftest import ROOT, SMALL, TINY, random_model
from torch.utils._python_dispatch import TorchDispatchMode

from data.tiny.corpus import SAMPLE_PROMPTS, document
from llama import KVCache, Llama, Tokenizer, Transformer
from llama import sampling as samplers
from llama.config import PRESETS
from llama.device import resolve
from llama.errors import InputError, NonFinite
from llama.generation import STOP_CHECK_EVERY, _Batch
from llama.speculative import ModelDraft, PromptLookup, Speculation
from llama.tokenizer import StreamDecoder

TOKENIZER = Tokenizer(TINY / "tokenizer.model")


@pytest.fixture(scope="module")
def llama() -> Llama:
    """Random weights in the embedded model's shape."""
    return Llama(random_model(PRESETS["tiny"], std=0.05), TOKENIZER, max_seq_len=300, max_batch_size=16)


def ragged_prompts(n: int = 16, longest: int = 200, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    lengths = [1, longest] + [rng.randint(1, longest) for _ in range(n - 2)]
    return [[rng.randrange(TOKENIZER.n_words) for _ in range(length)] for length in lengths]


def widened(model: Transformer, n: int) -> Transformer:
    """The same network with `n` more rows in its tables, of which some would win against every word."""
    args = dataclasses.replace(model.args, vocab_size=model.args.vocab_size + n)
    wide = Transformer(args).to(model.dtype).eval()
    rows = 100 * torch.randn(n // 2, args.dim, dtype=model.dtype, generator=torch.Generator().manual_seed(3))
    table = torch.cat([model.tok_embeddings.weight, rows, -rows])
    wide.load_state_dict({**model.state_dict(), "tok_embeddings.weight": table})
    return wide


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_rows_beyond_the_tokenizer_are_never_drawn(temperature):
    """A padded or extended table gives the text of the plain one: cached, uncached, streamed, with any draft."""
    plain = random_model(dataclasses.replace(PRESETS["tiny-draft"], n_layers=2), std=0.3).double()
    padded = widened(plain, 64)
    prompts, options = [[5, 6, 7], [9]], {"max_gen_len": 12, "temperature": temperature, "seed": 4}
    expected, _ = Llama(plain, TOKENIZER, 64).generate(prompts, **options)
    extra, _ = Llama(padded, None, 64).generate(prompts, **options)
    assert max(map(max, extra)) >= TOKENIZER.n_words  # they would win
    llama = Llama(padded, TOKENIZER, 64)
    assert llama.generate(prompts, **options)[0] == expected
    assert llama.generate(prompts, **options, use_cache=False)[0] == expected
    alone, _ = Llama(plain, TOKENIZER, 64).generate(prompts[:1], **options)
    assert list(llama.stream(prompts[0], **options)) == alone[0]
    for draft in (PromptLookup(), ModelDraft(plain), ModelDraft(padded), ModelDraft(widened(plain, 16))):
        tokens, _ = llama.generate(prompts, **options, speculation=Speculation(draft, 3))
        assert tokens == expected if temperature == 0 else max(map(max, tokens)) < TOKENIZER.n_words
    with pytest.raises(InputError, match="token outside the vocabulary of 4096"):
        llama.generate([[4096]], 1)


@pytest.mark.slow
def test_cache_on_equals_off_over_a_thousand_tokens(tiny):
    """The embedded model on 40 openings of its corpus: the greedy tokens agree, all of them."""
    texts = [text for seed in range(80) if (text := document(random.Random(seed)).text)][:40]
    prompts = [TOKENIZER.encode(text, bos=True, eos=False)[: 5 + i % 20] for i, text in enumerate(texts)]
    on, off = [], []
    for start in range(0, 40, 8):
        part = prompts[start : start + 8]
        on += tiny.generate(part, 40, temperature=0, stop_tokens=[])[0]
        off += tiny.generate(part, 40, temperature=0, stop_tokens=[], use_cache=False)[0]
    assert sum(map(len, on)) == 1600
    assert on == off


def test_cache_on_equals_off_per_step_logits(device):
    """The logits of the whole vocabulary at each step, within 1e-5."""
    llama = Llama(random_model(PRESETS["tiny"], std=0.05).to(device), TOKENIZER)
    sampling = llama._sampling(0, 1.0, None, 0.0, 1.0, None)
    runs = []
    for use_cache in (True, False):
        batch = _Batch(ragged_prompts(4, 30), 20, 300, TOKENIZER.pad_id, device)
        with torch.no_grad():
            steps = [(token, logits.clone()) for token, logits in llama._steps(batch, sampling, use_cache)]
            runs.append([torch.stack(parts) for parts in zip(*steps, strict=True)])
    (tokens, logits), (other_tokens, other_logits) = runs
    assert logits.shape == (20, 4, 4096) and torch.equal(tokens, other_tokens)
    torch.testing.assert_close(logits, other_logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_half_precision_differs_by_rounding_only(device, dtype):
    """Where cached and uncached tokens part in 16 bits, the exact logits of the two candidates are nearly tied."""
    half, exact = (
        Llama.build(TINY, TINY / "tokenizer.model", 256, 32, device=str(device), dtype=d) for d in (dtype, "float32")
    )
    prompts = [half.encode_prompt(prompt) for prompt in SAMPLE_PROMPTS] + ragged_prompts(10, 30, seed=5)
    on, off = (half.generate(prompts, 40, 0, stop_tokens=[], use_cache=c)[0] for c in (True, False))
    for prompt, cached, uncached in zip(prompts, on, off, strict=True):
        if cached == uncached:
            continue
        same = next(i for i, (a, b) in enumerate(zip(cached, uncached, strict=True)) if a != b)
        with torch.no_grad():
            logits = exact.model(torch.tensor([prompt + cached[:same]], device=device))[0, -1]
        assert abs(logits[cached[same]] - logits[uncached[same]]) <= 0.1


@pytest.mark.parametrize("use_cache", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_ragged_batch_equals_one_by_one(device, use_cache):
    llama = Llama(random_model(PRESETS["tiny"], std=0.05).to(device), TOKENIZER)
    prompts = ragged_prompts()
    steps = 24 if use_cache else 6
    together = llama.generate(prompts, steps, 0, logprobs=True, use_cache=use_cache)
    alone = [llama.generate([prompt], steps, 0, logprobs=True, use_cache=use_cache) for prompt in prompts]
    assert together[0] == [tokens[0] for tokens, _ in alone]
    for row, (_, values) in enumerate(alone):
        torch.testing.assert_close(torch.tensor(together[1][row]), torch.tensor(values[0]), atol=1e-5, rtol=0)


def test_the_cache_toggle_is_really_on(llama, monkeypatch):
    """With the cache each step computes one position and writes it; without, all positions and no cache at all."""
    widths, writes = [], []
    hidden, update = Transformer.hidden, KVCache.update
    monkeypatch.setattr(
        Transformer, "hidden", lambda self, tokens, *rest: widths.append(tokens.shape[1]) or hidden(self, tokens, *rest)
    )
    monkeypatch.setattr(
        KVCache, "update", lambda self, layer, *rest: writes.append(layer) or update(self, layer, *rest)
    )
    llama.generate([[1, 2, 3]], 4, 0, stop_tokens=[])
    assert widths == [3, 1, 1, 1] and writes == [0, 1, 2, 3] * 4
    widths.clear(), writes.clear()
    llama.generate([[1, 2, 3]], 4, 0, stop_tokens=[], use_cache=False)
    assert widths == [3, 7, 7, 7] and writes == []  # rounded up, here to all there is room for


def test_only_the_last_position_is_projected_and_the_cache_is_exact(llama, monkeypatch):
    rows, lengths = [], []
    logits, init = Transformer.logits, KVCache.__init__
    monkeypatch.setattr(Transformer, "logits", lambda self, h: rows.append(h.shape[:-1].numel()) or logits(self, h))
    monkeypatch.setattr(
        KVCache, "__init__", lambda self, args, b, n, *rest: lengths.append(n) or init(self, args, b, n, *rest)
    )
    llama.generate(ragged_prompts(3, 50), 5, 0, stop_tokens=[])
    assert rows == [3] * 5 and lengths == [54]  # the fifth token is never fed back


def test_limits(llama):
    """At the limit nothing is generated, one before it one token is, beyond it the prompt is refused; never cut."""
    prompt = ragged_prompts(2, 300)[1]
    assert llama.generate([prompt], 10, 0, stop_tokens=[])[0] == [[]]
    assert len(llama.generate([prompt[:299]], 10, 0, stop_tokens=[])[0][0]) == 1
    with pytest.raises(InputError, match=r"301 tokens.*max_seq_len=300"):
        llama.generate([[*prompt, 1]], 10, 0)
    assert llama.generate([prompt[:5]], 0, 0)[0] == [[]]
    assert len(llama.generate([prompt[:5]], 10**9, 0, stop_tokens=[])[0][0]) == 295
    # a row without room, one with room for 3 and one with plenty, in one batch
    mixed = [prompt, prompt[:297], prompt[:4]]
    together = llama.generate(mixed, 9, 0, stop_tokens=[])[0]
    assert [len(row) for row in together] == [0, 3, 9]
    assert together == [llama.generate([p], 9, 0, stop_tokens=[])[0][0] for p in mixed]


@pytest.mark.parametrize(
    ("prompts", "max_gen_len", "message"),
    [
        ([], 5, "no prompt"),
        ([[]], 5, "prompt 0 has 0 tokens"),
        ([[1]] * 17, 5, "17 prompts exceed max_batch_size=16"),
        ([[1, 4096]], 5, "outside the vocabulary"),
        ([[1, -1]], 5, "outside the vocabulary"),
        ([[1]], -1, "max_gen_len=-1"),
    ],
)
def test_bad_requests(llama, prompts, max_gen_len, message):
    with pytest.raises(InputError, match=message):
        llama.generate(prompts, max_gen_len)
    with pytest.raises(InputError):
        next(llama.stream(prompts[0] if prompts else [], max_gen_len if max_gen_len < 0 else -1))


def test_stop_tokens_end_a_row_and_are_not_returned(llama):
    prompts = ragged_prompts(4, 20)
    free = llama.generate(prompts, 12, 0, stop_tokens=[])[0]
    stop = free[1][5]
    stopped = llama.generate(prompts, 12, 0, stop_tokens=[stop])[0]
    for row, tokens in enumerate(free):
        assert stopped[row] == (tokens[: tokens.index(stop)] if stop in tokens else tokens)


def test_generation_ends_once_every_row_has_stopped(llama, monkeypatch):
    steps = []
    hidden = Transformer.hidden
    monkeypatch.setattr(Transformer, "hidden", lambda self, *args: steps.append(1) or hidden(self, *args))
    first = llama.generate([[5, 6]], 1, 0, stop_tokens=[])[0][0]
    steps.clear()
    assert llama.generate([[5, 6]], 200, 0, stop_tokens=first)[0] == [[]]
    assert len(steps) == 1


class ReadBacks(TorchDispatchMode):
    """Counts the operations that make the host wait for a value from the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_nothing_is_read_back_while_tokens_are_made(llama, monkeypatch, use_cache, temperature):
    """40 tokens with a look at the stop flags every 16, as on a GPU: two looks, and one check of the last logits."""
    monkeypatch.setitem(STOP_CHECK_EVERY, "cpu", STOP_CHECK_EVERY["cuda"])
    monkeypatch.setattr(samplers, "HEAD", 1 << 20)  # a GPU sorts all
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # and attends to all slots
    with ReadBacks() as seen:
        llama.generate([[1, 2, 3], [4]], 40, temperature, 0.9, top_k=40, use_cache=use_cache, stop_tokens=[])
    assert seen.count == 2 + 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is at hand")
@pytest.mark.parametrize("use_cache", [True, False])
def test_the_host_never_waits_on_a_gpu(use_cache):
    llama = Llama(random_model(PRESETS["tiny"], std=0.05).to("cuda"), TOKENIZER)
    sampling = llama._sampling(0.8, 0.9, 40, None)
    batch = _Batch([[1, 2, 3], [4]], 12, 300, TOKENIZER.pad_id, llama.device)
    with torch.no_grad():
        list(llama._steps(batch, sampling, use_cache))  # records the step, which does wait
    batch = _Batch([[1, 2, 3], [4]], 12, 300, TOKENIZER.pad_id, llama.device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            assert len(list(llama._steps(batch, sampling, use_cache))) == 12
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is at hand")
def test_the_real_shape_generates_on_a_gpu(llama3_tokenizer):
    """3.2 1B with random weights, in the card's own 16-bit type."""
    device, dtype = resolve("cuda", "auto")
    model = Transformer.random(PRESETS["llama3.2-1b"], dtype, device)
    llama = Llama(model.eval(), llama3_tokenizer)
    assert [len(row) for row in llama.generate([[128_000, 5, 6], [128_000]], 20, 0, stop_tokens=[])[0]] == [20, 20]


def test_stop_sets_by_kind_of_model(llama3_tokenizer):
    assert llama3_tokenizer.stop_tokens == [128_001, 128_008, 128_009]


def test_seed_makes_sampling_repeatable(llama):
    prompts = ragged_prompts(3, 10)
    first, again, other = (llama.generate(prompts, 10, 1.0, seed=seed)[0] for seed in (7, 7, 8))
    assert first == again != other
    twin = Llama(llama.model, TOKENIZER, 300, 16, seed=7)
    assert twin.generate(prompts, 10, 1.0)[0] == first  # the same stream ...
    assert twin.generate(prompts, 10, 1.0)[0] != first  # ... which goes on across calls


def test_sampled_tokens_equal_with_and_without_cache(llama):
    prompts = ragged_prompts(3, 10)
    options = {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": 3}
    assert llama.generate(prompts, 15, **options) == llama.generate(prompts, 15, **options, use_cache=False)


def test_logprobs_and_echo(llama):
    """Against log_softmax of one plain forward pass over everything."""
    prompts = ragged_prompts(3, 12)
    tokens, values = llama.generate(prompts, 6, 0, logprobs=True, echo=True, stop_tokens=[])
    bare, bare_values = llama.generate(prompts, 6, 0, logprobs=True, stop_tokens=[])
    for row, prompt in enumerate(prompts):
        assert tokens[row] == prompt + bare[row]
        assert values[row][len(prompt) :] == bare_values[row]
        ids = torch.tensor(tokens[row])
        with torch.no_grad():
            expected = llama.model(ids[None])[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        assert values[row][0] == 0.0
        torch.testing.assert_close(torch.tensor(values[row][1:]), expected, atol=1e-5, rtol=0)
    assert llama.generate(prompts, 6, 0)[1] is None


def test_streaming_yields_what_generate_returns(tiny):
    ids = tiny.encode_prompt("One day, a little fox named")
    tokens = list(tiny.stream(ids, 30, temperature=0.7, seed=5))
    assert [tokens] == tiny.generate([ids], 30, temperature=0.7, seed=5)[0]
    decoder = StreamDecoder(tiny.tokenizer)
    assert "".join([decoder.push(token) for token in tokens]) + decoder.flush() == tiny.tokenizer.decode(tokens)


def test_calls_are_independent(llama):
    """Prompts in any order, with a failing call between, give what a fresh object gives."""
    a, b = ragged_prompts(2, 20)
    fresh = [Llama(llama.model, TOKENIZER, 300, 16).generate([p], 8, 0)[0] for p in (a, b)]
    for order in ((0, 1, 0), (1, 1, 0)):
        for which in order:
            assert llama.generate([(a, b)[which]], 8, 0)[0] == fresh[which]
            with pytest.raises(InputError):
                llama.generate([[99_999]], 8)


def test_a_generation_leaves_no_cache_behind():
    """One that ends, one that is refused and one that nobody reads to its end."""
    llama = Llama(random_model(PRESETS["tiny-draft"]), TOKENIZER, 64, 4)

    def n_caches() -> int:
        gc.collect()
        return sum(type(thing) is KVCache for thing in gc.get_objects())

    before = n_caches()
    for _ in range(3):
        llama.generate([[1, 2, 3], [4]], 5, 0)
        next(llama.stream([1, 2, 3], 5))
        with pytest.raises(InputError):
            llama.generate([[99_999]], 5)
    assert n_caches() == before


def test_generating_between_training_steps_changes_nothing():
    model = random_model(PRESETS["tiny-draft"]).train()
    llama = Llama(model, TOKENIZER, 64, 4)

    def gradients(sample: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model.zero_grad()
        loss = model(torch.arange(20)[None]).logsumexp(-1).mean()
        if sample:
            llama.generate([[1, 2, 3]], 5, 0.8)
        loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True), strict=True))


@pytest.mark.parametrize("bad_step", [1, 3, 5])
def test_non_finite_logits_are_an_error_at_any_step(monkeypatch, bad_step):
    llama = Llama(random_model(PRESETS["tiny-draft"]), TOKENIZER, 64, 4)
    count, logits = [], Transformer.logits

    def damaged(self, h):
        count.append(1)
        return logits(self, h) * (float("nan") if len(count) == bad_step else 1.0)

    monkeypatch.setattr(Transformer, "logits", damaged)
    for call in (
        lambda: llama.generate([[1, 2, 3]], 5, 0, stop_tokens=[]),
        lambda: list(llama.stream([1, 2, 3], 5, 0, stop_tokens=[])),
    ):
        count.clear()
        with pytest.raises(NonFinite, match="not finite in float32; the weights are damaged"):
            call()
    count.clear()
    if bad_step == 1:  # the logits of the prompt, projected first
        with pytest.raises(NonFinite):
            llama.generate([[1, 2, 3]], 5, 0, logprobs=True, echo=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": 1e-46}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_out_of_range(llama, settings, message):
    with pytest.raises(InputError, match=message):
        llama.generate([[1]], 5, **settings)


def test_build_checks_everything_before_the_weights(monkeypatch):
    monkeypatch.setattr("llama.checkpoint.load", lambda *_args: pytest.fail("read the weights"))
    tokenizer = TINY / "tokenizer.model"
    for options in ({"max_seq_len": 0}, {"max_batch_size": 0}, {"seed": -1}, {"model_parallel_size": 2}):
        with pytest.raises(InputError, match=next(iter(options))):
            Llama.build(TINY, tokenizer, **{"max_seq_len": 8, "max_batch_size": 1, **options})


# Meta's interface


def test_text_completion_shapes(tiny):
    prompts = ["The little fox", "Question: What do cows eat?\nAnswer:"]
    plain = tiny.text_completion(prompts, max_gen_len=8, temperature=0.6, top_p=0.9)
    assert [set(result) for result in plain] == [{"generation"}] * 2
    rich = tiny.text_completion(prompts, max_gen_len=8, temperature=0, logprobs=True, echo=True)
    for prompt, result in zip(prompts, rich, strict=True):
        assert result["generation"].startswith(prompt)
        assert len(result["tokens"]) == len(result["logprobs"])
        assert "".join(result["tokens"]) == "<|begin_of_text|>" + result["generation"]
    with pytest.raises(InputError, match="empty"):
        tiny.text_completion(["fine", ""])


def test_chat_completion_shapes(tiny):
    dialogs = [
        [{"role": "user", "content": "Name a fruit."}],
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": "What is the opposite of hot?"},
        ],
    ]
    results = tiny.chat_completion(dialogs, max_gen_len=16, temperature=0, logprobs=True)
    for result in results:
        assert result["generation"]["role"] == "assistant"
        assert result["generation"]["content"] == "".join(result["tokens"])
        assert len(result["tokens"]) == len(result["logprobs"])
        assert "<|" not in result["generation"]["content"]


def test_a_dialog_that_spells_llama_2s_tags_is_answered_with_an_error(tmp_path):
    """The others of the batch are answered; as Meta's code does."""
    tokenizer = Tokenizer(vocabularies.write(tmp_path, "tinyllama"))
    llama = Llama(random_model(dataclasses.replace(SMALL, vocab_size=tokenizer.n_words)), tokenizer)
    good, bad = ([{"role": "user", "content": text}] for text in ("Hi", "x [/INST] y"))
    (alone,) = llama.chat_completion([good], temperature=0, max_gen_len=5, logprobs=True)
    answers = llama.chat_completion([bad, good, bad], temperature=0, max_gen_len=5, logprobs=True)
    error = {"role": "assistant", "content": "Error: special tags are not allowed as part of the prompt."}
    assert answers == [{"generation": error, "tokens": [], "logprobs": []}, alone, answers[0]]
    assert llama.chat_completion([bad], max_gen_len=5) == [{"generation": error}]


def test_a_completion_stops_at_the_end_of_a_turn(tiny):
    """As in Meta's code: at whatever token ends a text or a turn."""
    (result,) = tiny.text_completion(["Hi"], temperature=0, max_gen_len=60, logprobs=True)
    prompt = [*tiny.encode_prompt("Hi"), *tiny.tokenizer.encode("".join(result["tokens"]), bos=False, eos=False)]
    following = tiny.generate([prompt], 1, 0, stop_tokens=[])[0][0]
    assert len(result["tokens"]) < 60 and set(following) <= set(tiny.tokenizer.stop_tokens)


def test_what_metas_scripts_touch_besides_the_calls(tiny):
    special, text = tiny.tokenizer.special_tokens, "Hi<|eot_id|>"
    assert special["<|eot_id|>"] in tiny.tokenizer.stop_tokens and tiny.model.params.dim == tiny.model.args.dim
    encode = functools.partial(tiny.tokenizer.encode, bos=False, eos=False)
    assert encode(text, allowed_special="all")[-1] == encode(text, allowed_special={"<|eot_id|>"})[-1] == 3849
    assert encode("<|eot_id|>", allowed_special={"<|eom_id|>"}, disallowed_special=()) == encode("<|eot_id|>")
    assert tiny.tokenizer.decode(encode(text)) == text and 3849 not in encode(text)
    with pytest.raises(ValueError, match="spells the special token"):
        encode(text, disallowed_special="all")
    header = tiny.formatter.encode_header({"role": "user", "content": "Hi"})
    assert tiny.tokenizer.decode(header) == "<|start_header_id|>user<|end_header_id|>\n\n"


def test_a_script_written_for_metas_package_runs(tmp_path):
    """The calls, keywords and result keys of the example scripts that Meta publishes, in a process of their own."""
    script = tmp_path / "example.py"
    script.write_text(
        "from typing import List\n"
        "import fire\n"
        "from llama import Dialog, Llama\n"
        "def main(ckpt_dir: str, tokenizer_path: str, temperature: float = 0.6, top_p: float = 0.9,\n"
        "         max_seq_len: int = 128, max_gen_len: int = 16, max_batch_size: int = 4):\n"
        "    generator = Llama.build(ckpt_dir=ckpt_dir, tokenizer_path=tokenizer_path, max_seq_len=max_seq_len,\n"
        "                            max_batch_size=max_batch_size)\n"
        "    prompts: List[str] = ['The fox', 'The bear went']\n"
        "    for r in generator.text_completion(prompts, max_gen_len=max_gen_len, temperature=temperature,\n"
        "                                       top_p=top_p):\n"
        "        print('>', r['generation'])\n"
        "    dialogs: List[Dialog] = [[{'role': 'user', 'content': 'Name a pet.'}]]\n"
        "    for r in generator.chat_completion(dialogs, max_gen_len=None, temperature=temperature, top_p=top_p):\n"
        "        print(r['generation']['role'].capitalize(), r['generation']['content'])\n"
        "fire.Fire(main)\n"
    )
    command = [sys.executable, script, "--ckpt_dir", TINY, "--tokenizer_path", TINY / "tokenizer.model"]
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.count(">") >= 2 and "Assistant" in run.stdout
