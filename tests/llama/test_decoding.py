"""Every fast decode step against the eager one, and that it is really on."""

from __future__ import annotations

import copy
import dataclasses
import shutil

import pytest
import torch
from conftest import SMALL, TINY, random_model
from support import SHAPES, full_cache, needs_kernel
from torch import nn

from llama import Llama, Tokenizer, Transformer, lora, speculative
from llama.config import PRESETS
from llama.conversation import Conversation
from llama.decoding import CACHES, CapturedStep, Decoder, EagerStep, _last_hidden
from llama.errors import InputError
from llama.kernels import gpu
from llama.kernels.cpu import decode_step, native, prefill, train_ops
from llama.kernels.cpu.decode_step import NativeStep
from llama.model import rope_table
from llama.speculative import ModelDraft, PromptLookup, Speculation

TOKENIZER = Tokenizer(TINY / "tokenizer.model")


@needs_kernel
@pytest.mark.parametrize(("batch_size", "n_tokens"), [(1, 1), (3, 1), (16, 1), (19, 1), (1, 5), (4, 6)])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_native_step_is_as_exact_as_the_eager_one(shape, batch_size, n_tokens):
    """Against the same weights in fp64 the error is at most twice that of the eager step, in logits and cache."""
    args = SHAPES[shape]
    model = random_model(args, std=0.05).bfloat16()
    assert decode_step.supports(model)
    tokens = torch.arange(batch_size * n_tokens).view(batch_size, n_tokens) * 7 % args.vocab_size
    pos = torch.arange(batch_size)[:, None] * 5 % (41 - n_tokens) + torch.arange(n_tokens)
    runs = {}
    for name, kind in (("native", decode_step.NativeStep), ("eager", EagerStep), ("exact", EagerStep)):
        dtype = torch.float64 if name == "exact" else torch.bfloat16
        cache = full_cache(args, batch_size, 41, dtype)
        logits = kind(copy.deepcopy(model).to(dtype), cache)(tokens, pos)
        runs[name] = [part.double() for part in (logits, cache.k, cache.v)]
    for native_part, eager, exact in zip(*runs.values(), strict=True):
        scale = exact.abs().max()
        error = (native_part - exact).norm()
        assert error <= 2 * (eager - exact).norm() + 1e-6 * scale
    written = (runs["native"][1] != full_cache(args, batch_size, 41).k.double()).any(-1).any(2).any(0)
    assert torch.equal(written.nonzero()[:, 1], pos.flatten())  # a slot for each token, and no other


@needs_kernel
@pytest.mark.parametrize(("batch_size", "n_tokens"), [(1, 2), (2, 5), (3, 9)])
@torch.no_grad()
def test_tokens_at_once_have_the_bits_of_tokens_one_by_one(batch_size, n_tokens):
    """What makes speculative decoding give plain decoding's tokens in 16 bits too."""
    model = random_model(PRESETS["tiny"], std=0.05).bfloat16()
    tokens = torch.arange(batch_size * n_tokens).view(batch_size, n_tokens) * 7
    pos = torch.arange(batch_size)[:, None] * 4 + torch.arange(n_tokens)
    whole, alone = full_cache(model.args, batch_size, 20), full_cache(model.args, batch_size, 20)
    at_once = decode_step.NativeStep(model, whole)(tokens, pos)
    step = decode_step.NativeStep(model, alone)
    one_by_one = [step(token[:, None], p[:, None]) for token, p in zip(tokens.T, pos.T, strict=True)]
    assert torch.equal(at_once, torch.cat(one_by_one, 1))
    assert torch.equal(whole.k, alone.k) and torch.equal(whole.v, alone.v)


@needs_kernel
@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_attention_over_a_long_cache_is_exact_and_the_same_for_any_number_of_threads(shape, cache_dtype):
    """Positions on both sides of the borders of its parts, which are 512 long, and one far behind the others'."""
    args = dataclasses.replace(SHAPES[shape], n_layers=1)
    model = random_model(args, std=0.05).bfloat16()
    pos = torch.tensor([0, 510, 511, 512, 1023, 1700])[:, None] + torch.arange(3)
    tokens = pos * 7 % args.vocab_size
    keys, values = (torch.randn(len(pos), args.n_kv_heads, 1703, args.head_dim).bfloat16() for _ in range(2))

    def step(kind, dtype=torch.bfloat16):
        cache = CACHES[cache_dtype](args, len(pos), 1703, dtype, "cpu")
        cache.update(0, keys.to(dtype), values.to(dtype), None)
        return kind(copy.deepcopy(model).to(dtype), cache)(tokens, pos).double()

    native, eager, exact = step(NativeStep), step(EagerStep), step(EagerStep, torch.float64)
    for row in range(len(pos)):  # a row by itself: the error of one must not hide behind others'
        assert (native[row] - exact[row]).norm() <= 2 * (eager[row] - exact[row]).norm() + 1e-6 * exact.abs().max()
    usual = torch.get_num_threads()
    try:
        for n_threads in (1, 2, 3, 8):
            torch.set_num_threads(n_threads)
            assert torch.equal(step(NativeStep), native)
    finally:
        torch.set_num_threads(usual)


@needs_kernel
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(("batch_size", "length", "at_once"), [(1, 1, 1024), (2, 7, 1024), (5, 48, 1024), (2, 48, 7)])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_native_prefill_is_as_exact_as_the_eager_one(shape, batch_size, length, at_once, use_cache, monkeypatch):
    """As above, for whole sequences, in parts too, of which another position of each row is wanted."""
    monkeypatch.setattr("llama.decoding.PREFILL_TOKENS", at_once)
    args = SHAPES[shape]
    model = random_model(args, std=0.05).bfloat16()
    tokens = (torch.arange(batch_size * length).view(batch_size, length) * 7) % args.vocab_size
    last = (length - 1 - torch.arange(batch_size)).clamp(min=0)
    runs = {}
    for name, decoding in (("native", "auto"), ("eager", "eager"), ("exact", "eager")):
        dtype = torch.float64 if name == "exact" else torch.bfloat16
        decoder = Decoder(copy.deepcopy(model).to(dtype), decoding)
        with decoder.start(batch_size, length + 3 if use_cache else None) as run:
            hidden, cache = run.last_hidden(tokens, last), run.cache
        runs[name] = [part.double() for part in (hidden, *((cache.k, cache.v) if use_cache else ()))]
    for native_part, eager, exact in zip(*runs.values(), strict=True):
        assert (native_part - exact).norm() <= 2 * (eager - exact).norm() + 1e-6 * exact.abs().max()


@needs_kernel
def test_native_step_refuses_what_is_out_of_range():
    model = random_model(PRESETS["tiny"]).bfloat16()
    cache = full_cache(model.args, 2, 9)
    before = cache.k.clone()
    step = decode_step.NativeStep(model, cache)
    for tokens, pos in (([0, 1], [0, 9]), ([0, 1], [-1, 0]), ([0, 4096], [0, 0]), ([-1, 0], [0, 0])):
        with pytest.raises(IndexError, match="outside"):
            step(torch.tensor(tokens)[:, None], torch.tensor(pos)[:, None])
    with pytest.raises(ValueError, match="made for 2 sequences, not 1"):
        step(torch.tensor([[0]]), torch.tensor([[0]]))
    assert torch.equal(cache.k, before)


@needs_kernel
def test_native_step_leaves_every_changed_model_to_the_eager_one():
    def changed(change):
        model = random_model(PRESETS["tiny"]).bfloat16()
        change(model)
        return model

    class Other(nn.Linear):
        pass

    block = "layers.1.feed_forward"
    assert decode_step.supports(changed(lambda m: None))
    assert not decode_step.supports(changed(lambda m: m.float()))
    assert not decode_step.supports(changed(lambda m: m.norm.float()))
    assert not decode_step.supports(changed(lambda m: setattr(m.get_submodule(block), "w2", Other(1024, 256, False))))
    assert not decode_step.supports(changed(lambda m: setattr(m.get_submodule(block), "w2", nn.Linear(1024, 256))))
    assert not decode_step.supports(changed(lambda m: m.layers[0].register_forward_hook(print)))
    wide = dataclasses.replace(SMALL, dim=640, n_heads=2, n_kv_heads=1, head_dim=320)
    assert not decode_step.supports(random_model(wide).bfloat16())


@needs_kernel
def test_generation_uses_the_native_step_by_default(monkeypatch):
    calls = []
    step = decode_step.NativeStep.__call__
    monkeypatch.setattr(decode_step.NativeStep, "__call__", lambda self, *a: calls.append(1) or step(self, *a))
    fast, slow = (
        Llama.build(TINY, TINY / "tokenizer.model", 256, 8, device="cpu", dtype="bfloat16", decoding=decoding)
        for decoding in ("auto", "eager")
    )
    assert (fast.decoder.name, slow.decoder.name) == ("native", "eager")
    prompts = [[1, 2, 3], [4]]
    slow.generate(prompts, 10, 0, stop_tokens=[])
    assert not calls
    fast.generate(prompts, 10, 0, stop_tokens=[], use_cache=False)
    assert not calls
    fast.generate(prompts, 10, 0, stop_tokens=[])
    assert len(calls) == 9  # the first token comes from the prompts


@pytest.fixture
def fresh_kernels():
    """Kernels are looked for anew in the test, and again after it."""
    caches = native.load, native._cache_directory, decode_step.library
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


def no_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)


def no_home_and_nothing_writable(monkeypatch):
    def refuse(*_args, **_named):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(native.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    monkeypatch.setattr(native.tempfile, "mkdtemp", refuse)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")


@pytest.mark.parametrize(
    ("lack", "said"),
    [(no_compiler, "no C compiler is installed"), (no_home_and_nothing_writable, "no directory can be written")],
)
def test_a_machine_that_cannot_compile_kernels_says_so_and_goes_on(monkeypatch, fresh_kernels, lack, said):
    lack(monkeypatch)
    monkeypatch.setattr(decode_step, "has_instructions", lambda: True)
    monkeypatch.setattr(native.sys, "platform", "linux")
    monkeypatch.setattr(native.platform, "machine", lambda: "x86_64")
    llama = Llama(random_model(PRESETS["tiny"]).bfloat16(), TOKENIZER)
    assert llama.decoder.name == "eager" and said in llama.decoder.why_slower
    assert len(llama.generate([[1, 2]], 3, 0, stop_tokens=[])[0][0]) == 3
    assert Llama(random_model(PRESETS["tiny"]), TOKENIZER).decoder.why_slower is None  # fp32 has no kernel to lack


def test_a_cpu_without_the_instructions_and_a_model_with_other_layers_are_named(monkeypatch):
    model = random_model(PRESETS["tiny"]).bfloat16()
    model.layers[0].register_forward_hook(print)
    monkeypatch.setattr(decode_step, "library", lambda: "compiled")
    for there, said in ((False, "this CPU has no AVX-512"), (True, "the model has layers that the C step does not")):
        monkeypatch.setattr(decode_step, "has_instructions", lambda there=there: there)
        assert said in Decoder(model, "auto").why_slower
        assert Decoder(model, "eager").why_slower is None


def test_kernels_are_compiled_once_and_outlive_an_unwritable_home(monkeypatch, tmp_path):
    if decode_step.library() is None:
        pytest.skip("no CPU with AVX-512 and a C compiler at hand")
    (tmp_path / "file").write_text("")
    for home, is_shared in ((tmp_path, True), (tmp_path / "file" / "below", False)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        native._cache_directory.cache_clear()
        native.load.cache_clear()
        assert native.load("train_ops", train_ops.FLAGS) is not None  # compiled in a sixth of the time of the longest
        assert native._cache_directory().is_relative_to(home) == is_shared
        assert len(list(native._cache_directory().glob("*.so"))) == 1
    native._cache_directory.cache_clear()
    native.load.cache_clear()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@torch.no_grad()
@pytest.mark.slow
def test_compiled_step_equals_eager():
    """Logits within 1e-4, tokens equal, one graph (fullgraph is set), and no second compilation."""
    model = random_model(dataclasses.replace(SMALL, n_layers=1, vocab_size=4096))
    llama, eager = (Llama(model, TOKENIZER, decoding=decoding) for decoding in ("compiled", "eager"))
    assert llama.decoder.name == "compiled"
    prompts = [[1, 2, 3], [4], [5, 6]]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        assert llama.generate(prompts, 8, 0, stop_tokens=[]) == eager.generate(prompts, 8, 0, stop_tokens=[])
    runs = []
    for each in (llama, eager):
        with each.decoder.start(3, 10) as run:
            runs.append(run.step(torch.tensor([[1], [2], [3]]), torch.tensor([[0], [0], [0]])))
    torch.testing.assert_close(*runs, atol=1e-4, rtol=0)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is at hand")
@torch.no_grad()
def test_captured_step_equals_eager():
    """Same logits step by step, same tokens, one recording for calls of one shape, none for swapped weights."""
    model = random_model(PRESETS["tiny"], std=0.05).cuda()
    fast, slow = (Llama(model, TOKENIZER, decoding=decoding) for decoding in ("auto", "eager"))
    assert fast.decoder.name == ("captured" if gpu.ops(model.norm.weight.device) is None else "fused and captured")
    prompts = [[1, 2, 3], [4]]
    for _ in range(2):
        assert fast.generate(prompts, 20, 0, stop_tokens=[]) == slow.generate(prompts, 20, 0, stop_tokens=[])
    with fast.decoder.start(2, 22) as run, slow.decoder.start(2, 22) as plain:
        step = run.kernel
        assert isinstance(step, CapturedStep)
        for n_tokens in (1, 4, 1):
            tokens = torch.arange(2 * n_tokens).view(2, n_tokens).cuda()
            pos = torch.arange(n_tokens).expand(2, -1).cuda()
            torch.testing.assert_close(step(tokens, pos), plain.step(tokens, pos), atol=1e-4, rtol=0)
    with fast.decoder.start(2, 22) as run:
        assert run.kernel is step
    model.norm.weight = nn.Parameter(model.norm.weight * 2)
    with fast.decoder.start(2, 22) as run:
        assert run.kernel is not step


@pytest.mark.parametrize(("preset", "batch_size", "n_threads"), [("tiny-draft", 2, 1), ("tiny", 20, 3)])
def test_a_step_too_small_for_several_threads_runs_on_one(preset, batch_size, n_threads, monkeypatch):
    """With the cache and without, for the prompt and for the tokens after it."""
    usual, seen, forward = torch.get_num_threads(), [], Transformer.hidden
    monkeypatch.setattr(Transformer, "hidden", lambda *args: (seen.append(torch.get_num_threads()), forward(*args))[1])
    llama = Llama(random_model(PRESETS[preset]), None)
    try:
        torch.set_num_threads(3)
        for use_cache in (True, False):
            llama.generate([[1]] * batch_size, 3, 0, use_cache=use_cache)
        assert set(seen) == {n_threads} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(usual)


@pytest.mark.parametrize("kind", CACHES)
@torch.no_grad()
def test_slots_that_are_not_in_use_cost_an_eager_step_on_a_cpu_nothing(model, monkeypatch, kind):
    """Not even a bit of the logits: those of a cache with just the slots that it needs, at ragged positions."""
    tokens, pos, seen, usual = torch.tensor([[7], [9]]), torch.tensor([[3], [5]]), [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda t, p, cache: seen.append(cache.k.shape[3]) or usual(t, p, cache))
    logits = []
    for max_len in (6, 4096):
        cache = CACHES[kind](model.args, 2, max_len, model.dtype, "cpu")
        _last_hidden(model, torch.arange(10).view(2, 5), torch.tensor([2, 4]), cache, 0)
        seen.clear()
        logits.append(EagerStep(model, cache)(tokens, pos))
        assert seen == [6] and cache.k[:, 0, :, 3].any() and cache.k[:, 1, :, 5].any() and not cache.k[..., 6:, :].any()
    assert torch.equal(*logits)
    for outside in ([[3], [4096]], [[-5000], [0]]):
        with pytest.raises(IndexError):
            EagerStep(model, cache)(tokens, torch.tensor(outside))


def test_unknown_decoding_is_refused():
    with pytest.raises(InputError, match="decoding=fast is unknown; use auto, eager, compiled"):
        Llama(random_model(PRESETS["tiny"]), TOKENIZER, decoding="fast")


@pytest.mark.parametrize("use_cache", [True, False])
def test_prefill_by_parts_equals_prefill_at_once(tiny, monkeypatch, use_cache):
    """However many rows go through the network at once, each gets the same tokens."""
    prompts = [list(range(300 + i, 310 + 3 * i)) for i in range(5)]
    whole = tiny.generate(prompts, 8, 0, stop_tokens=[], use_cache=use_cache, logprobs=True)
    monkeypatch.setattr("llama.decoding.PREFILL_TOKENS", 50)
    parts = tiny.generate(prompts, 8, 0, stop_tokens=[], use_cache=use_cache, logprobs=True)
    assert whole[0] == parts[0]
    torch.testing.assert_close(torch.tensor(whole[1]), torch.tensor(parts[1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize(
    ("at_once", "mask_values"),
    [
        *((1, 2000), (7, 2000), (256, 2000), (7, 1 << 24), (256, 1 << 24)),
        pytest.param(1, 1 << 24, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_a_long_prompt_in_parts_equals_it_at_once(at_once, cache_dtype, mask_values, monkeypatch):
    """Also one that ends within a part, one that fits into it, and what is decoded after them.

    An int8 cache in fp64: in fp32 the order of sums decides here and there between a code and its neighbour.
    """
    model = random_model(std=0.05).to(torch.float64 if cache_dtype == "int8" else torch.float32)
    prompts = [list(range(i, i + n)) for i, n in enumerate((300, 5, 40, 7))]
    decoder = Decoder(model, "auto", cache_dtype)
    runs = []
    for limit, values in ((10**6, 10**9), (at_once, mask_values)):
        monkeypatch.setattr("llama.decoding.PREFILL_TOKENS", limit)
        monkeypatch.setattr("llama.decoding.MASK_VALUES", values)
        with decoder.start(4, 302) as run:
            hidden = speculative.prefill(run, prompts)
            pos = torch.tensor([[len(prompt)] for prompt in prompts])
            step = run.step(torch.full((4, 1), 9), pos)
            runs.append((hidden, step, run.cache.k[:, 0, :, :300].float(), run.cache.v[:, 2, :, :40].float()))
    for whole, parts in zip(*runs, strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)


@torch.no_grad()
def test_parts_of_a_long_prompt_are_small_and_without_padding(monkeypatch):
    """No part has more tokens than go through at once, nor a mask of more values; short rows do not wait."""
    monkeypatch.setattr("llama.decoding.PREFILL_TOKENS", 64)
    monkeypatch.setattr("llama.decoding.MASK_VALUES", 3000)
    parts = []

    def part_hidden(model, tokens, last, cache, start):
        parts.append((*tokens.shape, start, cache.max_len))
        return _last_hidden(model, tokens, last, cache, start)

    monkeypatch.setattr("llama.decoding._last_hidden", part_hidden)
    with Decoder(random_model(), "eager").start(5, 100) as run:
        speculative.prefill(run, [[1] * n for n in (100, 3, 9, 70, 2)])
    assert parts == [
        *((1, min(30, 100 - start), start, min(100, start + 30)) for start in (0, 30, 60, 90)),
        (2, 9, 0, 9),
        *((1, min(42, 70 - start), start, min(70, start + 42)) for start in (0, 42)),
        (1, 2, 0, 2),
    ]


@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize(
    ("at_once", "dtype"),
    [
        *((n, dtype) for n in (7, 256) for dtype in (torch.float16, torch.bfloat16)),
        (1, torch.bfloat16),
        pytest.param(1, torch.float16, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_parts_in_16_bits_are_as_exact_as_the_whole(at_once, cache_dtype, dtype, monkeypatch):
    """Against the same weights in fp64, of the eager path, a prompt that ends within a part."""
    model, tokens = random_model(std=0.05).to(dtype), torch.arange(300)[None]
    runs = []
    for kind, limit in ((dtype, at_once), (dtype, 10**6), (torch.float64, 10**6)):
        monkeypatch.setattr("llama.decoding.PREFILL_TOKENS", limit)
        with Decoder(copy.deepcopy(model).to(kind), "eager", cache_dtype).start(1, 300) as run:
            runs.append(run.last_hidden(tokens, torch.tensor([299])).double())
    parts, whole, exact = runs
    assert (parts - exact).norm() <= 2 * (whole - exact).norm()


@pytest.mark.parametrize("at_once", [1, 7])
def test_drafts_and_conversations_say_the_same_behind_prompts_in_parts(tiny, monkeypatch, at_once):
    prompt = tiny.encode_prompt("The little fox saw the moon. The little fox saw the")

    def said() -> list:
        drafted = tiny.generate([prompt], 20, 0, speculation=Speculation(PromptLookup()))[0]
        with tiny.start_session() as session:
            conversation = Conversation(tiny, session, {"temperature": 0, "max_gen_len": 12})
            return [drafted, *("".join(conversation.answer(text)) for text in ("Name two fruits.", "Why?"))]

    whole = said()
    monkeypatch.setattr("llama.decoding.PREFILL_TOKENS", at_once)
    assert said() == whole


@torch.no_grad()
def test_rotations_are_computed_for_the_positions_in_use_alone(monkeypatch):
    """A model holds an angle per pair of dimensions, whatever the length of texts; a part has those of its tokens."""
    model, seen = random_model(dataclasses.replace(SMALL, max_seq_len=131_072)), []
    assert [buffer.numel() for buffer in model.buffers()] == [SMALL.head_dim // 2]
    usual = rope_table
    monkeypatch.setattr("llama.model.rope_table", lambda pos, freqs: seen.append(pos.tolist()) or usual(pos, freqs))
    with Decoder(model, "eager").start(1, 5000) as run:
        run.last_logits(torch.arange(9)[None], torch.tensor([8]), 4000)
        run.step(torch.tensor([[1]]), torch.tensor([[4009]]))
    assert seen == [[list(range(4000, 4009))], [[4009]]]


class FakeCapture:
    """A recorded step, as a GPU has it: it owns the tensors that it reads and writes, so two callers mix them up."""

    def __init__(self, step):
        self.step, self.logits = step, {}

    def __call__(self, tokens, pos):
        logits = self.step(tokens, pos)
        return self.logits.setdefault(logits.shape, logits.clone()).copy_(logits)


@pytest.fixture(params=["eager", "compiled", "captured"])
def prepared(request, monkeypatch) -> str:
    """The decoding, with steps that are prepared as on a GPU."""
    monkeypatch.setattr(Decoder, "_compile", lambda self, step: FakeCapture(step))
    if request.param == "captured":
        monkeypatch.setattr(Decoder, "_captures", True)
        monkeypatch.setattr("llama.decoding.CapturedStep", FakeCapture)
    return "auto" if request.param == "captured" else request.param


@pytest.mark.parametrize("draft", [None, "model", "lookup"])
def test_live_generations_do_not_disturb_each_other(prepared, draft):
    """Two streams of equal shape token by token, a generate in between, and one that is dropped half-way."""
    if draft and prepared == "compiled":
        pytest.skip("speculation takes several tokens a step, for which this one is not compiled")
    llama = Llama(random_model(), None, max_seq_len=64, decoding=prepared)
    speculation = Speculation(ModelDraft(llama.model, prepared), 3) if draft == "model" else None
    speculation = Speculation(PromptLookup(2, 1), 3) if draft == "lookup" else speculation
    options = {"temperature": 0, "speculation": speculation}
    prompts = [[1, 2, 3], [9, 8, 7], [4, 5, 6]]
    alone = [llama.generate([prompt], 20, **options)[0][0] for prompt in prompts]
    for _ in range(2):
        streams = [llama.stream(prompt, 20, **options) for prompt in prompts[:2]]
        dropped = llama.stream(prompts[2], 20, **options)
        together = [[], []]
        for number in range(20):
            for tokens, stream in zip(together, streams, strict=True):
                tokens.append(next(stream))
            if number in (3, 11):
                assert llama.generate([prompts[2]], 20, **options)[0][0] == alone[2]
                next(dropped)
        del dropped
        assert together == alone[:2]
        assert all(next(stream, None) is None for stream in streams)


def test_a_finished_generation_gives_its_prepared_step_back(prepared):
    if prepared == "eager":
        pytest.skip("nothing is prepared")
    decoder = Decoder(random_model(), prepared)
    with decoder.start(2, 9) as first, decoder.start(2, 9) as second:
        assert first.kernel is not second.kernel and first.cache is not second.cache
        first.cache.k.fill_(1)
    with decoder.start(2, 9) as third:
        assert third.kernel is first.kernel and not third.cache.k.any()
    decoder.model.norm.weight = nn.Parameter(decoder.model.norm.weight * 2)
    with decoder.start(2, 9) as fourth:
        assert fourth.kernel is not first.kernel


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_kernels_are_chosen_once_a_generation_and_anew_for_changed_modules(monkeypatch, use_cache):
    """What a model is made of is looked at before the first token, not at each of them; swapped modules are seen."""
    looks = []

    def supports(model):
        looks.append(1)
        return type(model.layers[1].feed_forward.w2) is nn.Linear

    class Step(EagerStep):
        pass

    monkeypatch.setattr(decode_step, "supports", supports)
    monkeypatch.setattr("llama.decoding.NativeStep", Step)
    monkeypatch.setattr(prefill, "last_hidden", _last_hidden)
    llama = Llama(random_model(), None)
    llama.generate([[1, 2, 3]], 9, 0, use_cache=use_cache)
    assert len(looks) == 1
    with llama.decoder.start(1, 9) as run:
        assert type(run.kernel) is Step
    lora.apply(llama.model, lora.LoRAConfig(targets=("w2",)))
    with llama.decoder.start(1, 9) as run:
        assert type(run.kernel) is EagerStep
    with torch.no_grad():
        for module in lora.layers(llama.model).values():
            module.lora_B.fill_(1.0)
    tokens = llama.generate([[1, 2, 3]], 9, 0, use_cache=use_cache)
    assert tokens == Llama(llama.model, None, decoding="eager").generate([[1, 2, 3]], 9, 0, use_cache=use_cache)
