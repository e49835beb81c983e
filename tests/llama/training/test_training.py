"""The optimizer step against plain PyTorch: accumulation, scaling, recomputation, dropout, and what must not happen."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import itertools
import math
import random
import textwrap

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, random_model
from support import batches, gap, gradients, lora_model, samples
from torch.utils.flop_counter import FlopCounterMode

import finetuning
from data import alpaca
from data.alpaca import Record
from data.samples import Sample, encode
from llama import Llama, Transformer
from llama.cache import KVCache
from llama.errors import InputError, NonFinite
from llama.evaluation.intervals import confidence
from llama.kernels.cpu import attention_backward
from llama.model import attend
from llama.training import batch as batching
from llama.training import lean
from llama.training.batch import Batch
from llama.training.loss import cross_entropy_sum
from llama.training.options import NORMALIZATIONS, SCHEDULES, Settings, TrainingOptions
from llama.training.step import (
    CheckpointedBlock,
    Evaluation,
    Movement,
    Report,
    Trainer,
    checkpoint_layers,
    checkpointed_layers,
    evaluate,
)


def gradients_of(model: Transformer, window: list[Batch], **settings) -> dict[str, torch.Tensor]:
    """The gradient that the optimizer of one step is given."""
    trainer = Trainer(model, Settings(lr=0.0, **settings), 1)
    seen = {}
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.update({name: w.grad.clone() for name, w in trainer.weights.items()})
    )
    trainer.step(window)
    return seen


# The loss


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunked_loss_equals_cross_entropy_on_all_logits(chunk):
    model = random_model().double()
    window = batches([samples(3)])[0]
    results = []
    for chunked in (True, False):
        model.zero_grad()
        h = model.hidden(window.tokens).flatten(0, 1)
        if chunked:
            loss = cross_entropy_sum(model.logits, h[window.where], window.labels, chunk)
        else:
            labels = torch.full((len(h),), -100).index_put((window.where,), window.labels)
            loss = F.cross_entropy(model.logits(h), labels, reduction="sum")
        loss.backward()
        results.append((loss.detach(), {name: g.clone() for name, g in gradients(model).items()}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=0)
    assert gap(results[0][1], results[1][1]) < 1e-12


def test_no_more_logits_are_held_than_a_chunk():
    """The largest tensor that a loss of 300 labels saves for its backward pass is smaller than 300 logits."""
    model, seen = random_model(), []
    h = model.hidden(torch.zeros(1, 300, dtype=torch.int64))[0]
    pack = lambda t: seen.append(t.numel()) or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        cross_entropy_sum(model.logits, h, torch.zeros(300, dtype=torch.int64), 32)
    assert 0 < max(seen) < 300 * SMALL.vocab_size


@pytest.mark.parametrize(("normalization", "weights"), [("tokens", (1, 99)), ("microbatch", (50, 50))])
def test_known_loss_of_two_micro_batches(normalization, weights):
    """Constant losses a and b of micro-batches with 1 and 99 labels: (1 a + 99 b) / 100, or (a + b) / 2."""
    model = random_model()
    window = batches([[Sample("a", (5, 6), (range(1, 2),))], [Sample("b", (7, *range(1, 100)), (range(1, 100),))]])
    means = [F.cross_entropy(model(b.tokens)[0, :-1], b.tokens[0, 1:]).item() for b in window]
    report = Trainer(model, Settings(loss_normalization=normalization), 1).step(window)
    assert report.loss == pytest.approx(sum(w * m for w, m in zip(weights, means, strict=True)) / 100, rel=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("n", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_any_partition_has_the_gradient_of_one_batch(dtype, tolerance, n):
    model, pool = random_model().to(dtype), samples(12, longest=60)
    whole = gradients_of(model, batches([pool]))
    rng = random.Random(n)
    for _ in range(n):
        cuts = sorted(rng.sample(range(1, 12), rng.randint(0, 11)))
        parts = [pool[a:b] for a, b in itertools.pairwise([0, *cuts, 12])]
        assert gap(gradients_of(model, batches(parts)), whole) <= tolerance


def test_mean_of_means_is_another_gradient():
    """The switch does something: with answers of unequal length the course's loss is another one."""
    model, parts = random_model(), [[sample] for sample in samples(6)]
    tokens, course = (gradients_of(model, batches(parts), loss_normalization=name) for name in NORMALIZATIONS)
    assert gap(course, tokens) > 0.05


@pytest.mark.parametrize("packed", [False, True])
def test_samples_in_one_row_do_not_see_each_other(packed):
    model, pool = random_model().double(), samples(6)
    rows = [pool] if packed else [[sample] for sample in pool]
    whole = gradients_of(model, [batching.collate(rows, 0)])
    assert gap(whole, gradients_of(model, batches([[sample] for sample in pool]))) < 1e-12


@pytest.mark.parametrize("is_lean", [False, True])
def test_packed_texts_attend_without_a_mask_of_the_whole_sequence(is_lean, monkeypatch):
    """Equal to attention with a mask of all pairs of positions, but no kernel is given one; nor is the lean one."""
    model = random_model().double()
    pos = torch.tensor([[*range(5), *range(3), *range(1), *range(2)], [*range(4, 9), *range(6)]])
    tokens, start = torch.arange(22).view(2, 11), pos - torch.arange(11)
    with monkeypatch.context() as context:
        mask = (start[:, :, None] == start[:, None]) & (pos[:, :, None] >= pos[:, None])
        context.setattr("llama.model.text_lengths", lambda _: mask[:, None])
        expected = model(tokens, pos)
    if is_lean:
        for block in model.layers:
            block.attention = lean.LeanAttention(block.attention)
        monkeypatch.setattr(attention_backward, "supports", lambda q: True)
        monkeypatch.setattr(attention_backward, "causal_attention", causal_attention)
    masks, kernel = [], F.scaled_dot_product_attention

    def watched(q, k, v, mask=None, **options):
        masks.append((q.shape[2], mask))
        return kernel(q, k, v, mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    torch.testing.assert_close(model(tokens, pos), expected, atol=1e-12, rtol=0)
    assert masks == [(n, None) for n in (5, 3, 1, 2, 5, 6)] * model.args.n_layers


def causal_attention(*q_k_v_BTHD: torch.Tensor) -> torch.Tensor:
    """That of attention_backward, by PyTorch."""
    return attend(*(x.transpose(1, 2) for x in q_k_v_BTHD), None).transpose(1, 2)


# Against a loop that somebody else might have written


def plain_loop(model: Transformer, records: list[list[tuple[list[int], list[int]]]], lr: float) -> list[float]:
    """SGD on windows of (prompt ids, answer ids), one sample at a time, all logits, nothing clever."""
    losses = []
    for window in records:
        total, count = 0.0, sum(len(answer) for _, answer in window)
        for question, answer in window:
            logits = model(torch.tensor([question + answer]))[0]
            log_probs = logits.log_softmax(-1)
            loss = -sum(log_probs[len(question) + i - 1, token] for i, token in enumerate(answer)) / count
            loss.backward()
            total += loss.item()
        with torch.no_grad():
            for weight in model.parameters():
                weight -= lr * weight.grad
                weight.grad = None
        losses.append(total)
    return losses


WORDS = "fox dog tree blue red the a house river walked to and saw"
RECORDS = [
    Record(f"Say {word}.", "" if i % 3 else "now", " ".join(random.Random(i).choices(WORDS.split(), k=1 + 3 * (i % 5))))
    for i, word in enumerate(WORDS.split() * 2)
]


def reader(tokenizer) -> Transformer:
    """SMALL in fp64, with the tokenizer's vocabulary; the same weights each time."""
    return random_model(dataclasses.replace(SMALL, vocab_size=tokenizer.n_words)).double()


class BareRun:
    """What finetuning.train needs of a run: no directory, no clock, no evaluation."""

    def __init__(self, model: Transformer, options: TrainingOptions, windows: list[list[Batch]]) -> None:
        self.options, self.windows, self.total, self.eval_every = options, windows, len(windows), len(windows)
        self.trainer = Trainer(model, options, self.total)
        self.device = self.trainer.device
        self.reports: list[Report] = []
        self.names: list[list[str]] = []

    def window(self) -> list[Batch]:
        return self.windows[self.trainer.progress.windows]

    def log_step(self, report: Report, names: list[str], bar: object) -> None:
        self.reports.append(report)
        self.names.append(names)

    def start_clock(self) -> None: ...

    def share_out(self, window: list[Batch]) -> enumerate[Batch]:
        return enumerate(window)

    def sum_over_processes(self, loss: torch.Tensor, stop: object) -> torch.Tensor:
        return loss

    def save(self) -> None: ...


def train_ours(model: Transformer, tokenizer, n_steps: int) -> tuple[list[float], list[list[int]]]:
    """Losses on RECORDS, and which of them each step took."""
    encoded, _, _ = encode(tokenizer, RECORDS, 512)
    sequences = [[sample] for sample in encoded]
    windows = [batching.window(sequences, step, 1, 3, 7, tokenizer.pad_id) for step in range(n_steps)]
    run = BareRun(model, TrainingOptions(lr=0.3), windows)
    finetuning.train(run, lambda: False)
    return [report.loss for report in run.reports], [
        [int(name.split()[1]) - 1 for name in names] for names in run.names
    ]


def train_plainly(model: Transformer, tokenizer, chosen: list[list[int]]) -> list[float]:
    """The same with plain_loop, on records with their real template."""

    def row(record: Record) -> tuple[list[int], list[int]]:
        prompt = tokenizer.encode(alpaca.prompt(record.instruction, record.input), bos=True, eos=False)
        return prompt, tokenizer.encode(record.output, bos=False, eos=True)

    return plain_loop(model, [[row(RECORDS[i]) for i in window] for window in chosen], 0.3)


@pytest.fixture(scope="module")
def right(tiny) -> list[float]:
    """Losses of the plain loop over an epoch."""
    chosen = train_ours(reader(tiny.tokenizer), tiny.tokenizer, 9)[1]
    return train_plainly(reader(tiny.tokenizer), tiny.tokenizer, chosen)


@pytest.mark.slow
def test_fifty_steps_equal_a_plain_loop(tiny):
    """Tail windows and an epoch border included (26 records, windows of 3)."""
    ours, plain = reader(tiny.tokenizer), reader(tiny.tokenizer)
    losses, chosen = train_ours(ours, tiny.tokenizer, 50)
    assert losses == pytest.approx(train_plainly(plain, tiny.tokenizer, chosen), rel=0, abs=1e-10)
    assert gap(*({name: w.detach() for name, w in model.named_parameters()} for model in (ours, plain))) <= 1e-10
    assert losses[-1] < losses[0] - 0.5


NORMALIZED = 'if options.loss_normalization == "tokens"'
WHERE = "start + answer.start - 1, start + answer.stop - 1"
# What is wrong: where, the code, and what the bug makes of it.
MUTATIONS = {
    "labels are not shifted": (batching, "collate", WHERE, WHERE.replace(" - 1", "")),
    "the mask is one too early": (
        batching,
        "collate",
        "labels += sample.tokens[",
        "labels += (0, *sample.tokens[:-1])[",
    ),
    "the end token is dropped": (alpaca.Record, "parts", "bos=False, eos=True", "bos=False, eos=False"),
    "the prompt is trained too": (alpaca.Record, "parts", "(question, False)", "(question, True)"),
    "no token begins the text": (alpaca, "encode_prompt", "bos=True", "bos=False"),
    "micro-batches are averaged": (finetuning, "train", NORMALIZED, "if False"),
    "gradients are cleared in the loop": (finetuning, "train", "scaler.scale(", "optimizer.zero_grad(); scaler.scale("),
    "a tail takes the full count": (
        finetuning,
        "train",
        "loss_sum / n_terms",
        "loss_sum / max(60, n_terms)",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_comparison_notices_every_known_bug(tiny, right, monkeypatch, name):
    """The bugs of public solutions, put in one by one: each must show in the test above, within one epoch."""
    owner, function, old, new = MUTATIONS[name]
    source = textwrap.dedent(inspect.getsource(getattr(owner, function)))
    assert source.count(old) == 1
    scope = dict(vars(inspect.getmodule(owner)))
    exec(source.replace(old, new), scope)
    monkeypatch.setattr(owner, function, scope[function])
    losses, _ = train_ours(reader(tiny.tokenizer), tiny.tokenizer, len(right))
    assert max(abs(a - b) for a, b in zip(right, losses, strict=True)) > 1e-4


def test_without_a_bug_the_comparison_notices_nothing(tiny, right):
    losses, _ = train_ours(reader(tiny.tokenizer), tiny.tokenizer, len(right))
    assert losses == pytest.approx(right, rel=0, abs=1e-10)


# Scaling, skipping, stopping


class Spy:
    """Records what is called on an object."""

    def __init__(self, thing, monkeypatch, *names: str) -> None:
        self.calls: list[str] = []
        for name in names:
            monkeypatch.setattr(thing, name, self._wrap(name, getattr(thing, name)))

    def _wrap(self, name, function):
        def call(*args, **options):
            self.calls.append(name)
            return function(*args, **options)

        return call


def test_order_of_calls_with_a_scaler(monkeypatch):
    trainer = Trainer(lora_model(), Settings(amp="fp16", clip_norm=1.0), 5)
    scaler = Spy(trainer.scaler, monkeypatch, "scale", "unscale_", "step", "update")
    cleared = Spy(trainer.optimizer, monkeypatch, "zero_grad")
    trainer.step(batches([[s] for s in samples(3)]))
    assert scaler.calls == ["scale"] * 3 + ["unscale_", "step", "update"] and cleared.calls == ["zero_grad"]
    assert all(w.grad is None for w in trainer.weights.values())


def test_scaling_the_loss_changes_neither_gradient_nor_clipping(monkeypatch):
    window = batches([[s] for s in samples(3)])
    plain = Trainer(random_model(), Settings(clip_norm=0.1), 5)
    norm = plain.step(window).grad_norm
    for scale in (1.0, 65536.0):
        scaled = Trainer(random_model(), Settings(clip_norm=0.1), 5)
        scaled.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        assert scaled.step(window).grad_norm == pytest.approx(norm, rel=1e-6)
        weights = zip(plain.weights.values(), scaled.weights.values(), strict=True)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in weights)


def overflow_at(trainer: Trainer, steps: set[int], counter: list[int]) -> None:
    """Make one gradient infinite in the given windows (from 0)."""
    weight = next(iter(trainer.weights.values()))
    weight.register_hook(lambda g: g * math.inf if counter[0] in steps else g)


def digest(trainer: Trainer) -> str:
    saved = trainer.snapshot()
    tensors = (t.numpy().tobytes() for g in ("model", "optimizer") for t in saved.tensors[g].values())
    return hashlib.sha256(b"".join(tensors)).hexdigest()


def test_an_overflow_is_skipped_without_a_trace():
    settings = Settings(optimizer="adamw", lr=1e-2, schedule="linear", amp="fp16")
    trainer, counter = Trainer(lora_model(), settings, 8), [0]
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4)
    overflow_at(trainer, {2, 5}, counter)
    window = batches([[s] for s in samples(2)])
    scales, rates, before = [], [], None
    for counter[0] in range(8):
        before = digest(trainer)
        report = trainer.step(window)
        assert report.skipped == (counter[0] in (2, 5)) == (digest(trainer) == before)
        scales.append(trainer.scaler.get_scale())
        rates.append(report.lr)
    assert scales == [1024, 1024, 512, 512, 512, 256, 256, 256]
    assert rates == [pytest.approx(1e-2 * (1 - step / 8)) for step in (0, 1, 2, 2, 3, 4, 4, 5)]
    assert (trainer.progress.windows, trainer.progress.steps, trainer.progress.skipped) == (8, 6, 2)


def test_twenty_five_overflows_end_the_run():
    trainer, counter = Trainer(lora_model(), Settings(amp="fp16"), 100), [0]
    overflow_at(trainer, {0}, counter)
    before = digest(trainer)
    with pytest.raises(NonFinite, match="25 steps in a row"):
        for _ in range(26):
            trainer.step(batches([samples(1)]))
    assert trainer.progress.windows == 25 and digest(trainer) == before


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_in_fp32_changes_nothing(where):
    trainer = Trainer(random_model(), Settings(), 5)
    if where == "loss":
        trainer.model.layers[2].ffn_norm.weight.data[0] = math.nan
    else:
        overflow_at(trainer, {0}, [0])
    weights = [w.detach().clone() for w in trainer.weights.values()]
    with pytest.raises(NonFinite, match=r"step 1: .*record 0") as error:
        trainer.step(batches([samples(1)]))
    assert where == "gradient" or "layer 2" in str(error.value)
    pairs = zip(weights, trainer.weights.values(), strict=True)
    assert all(torch.equal(a, b.nan_to_num(nan=math.nan)) or a.isnan().any() for a, b in pairs)
    assert trainer.progress.windows == 0 and all(w.grad is None for w in trainer.weights.values())


def test_a_step_is_checked_once_however_many_batches_it_has(monkeypatch):
    """Each check waits for the device."""
    trainer, checks = Trainer(random_model(), Settings(), 5), []
    monkeypatch.setattr(trainer, "require_finite", lambda *_: checks.append(1))
    trainer.step(batches([[sample] for sample in samples(4)]))
    assert len(checks) == 1


def test_weights_that_are_not_finite_are_not_saved():
    trainer = Trainer(random_model(), Settings(), 5)
    trainer.model.norm.weight.data[0] = math.inf
    with pytest.raises(NonFinite, match=r"norm\.weight is not finite"):
        trainer.snapshot()


def test_a_window_without_labels_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="no label"):
        Trainer(random_model(), Settings(), 1).step(batches([[Sample("a", (1, 2), ())]]))


def test_trained_weights_are_fp32():
    with pytest.raises(InputError, match="must be float32"):
        Trainer(random_model().to(torch.bfloat16), Settings(), 1)
    with pytest.raises(InputError, match="no weight is trainable"):
        Trainer(random_model().requires_grad_(False), Settings(), 1)
    Trainer(lora_model(dtype=torch.bfloat16), Settings(), 1)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("size", [8, 64])
def test_weights_move_and_that_is_noticed(optimizer, size):
    """After one step nearly every value whose gradient is not zero has changed; after one of lr 1e-30 none has."""
    args = type(SMALL)(**{**vars(SMALL), "vocab_size": 64 * size})
    window = batches([samples(2, vocab=64 * size)])
    for lr, expected in ((1.0 if optimizer == "sgd" else 1e-3, 1.0), (1e-30, 0.0)):
        trainer = Trainer(random_model(args), Settings(optimizer=optimizer, lr=lr), 1)
        movement = Movement(trainer.weights)
        trainer.step(window)
        assert movement.share() == pytest.approx(expected, abs=0.05)


def test_adapters_over_16_bits_learn():
    """The frozen base has 16 bits; every adapter has a gradient and moves from the second step on."""
    trainer = Trainer(lora_model(dtype=torch.bfloat16), Settings(optimizer="adamw", lr=1e-2), 20)
    base = {n: w.clone() for n, w in trainer.model.state_dict().items() if ".lora_" not in n}
    window = batches([samples(4)])
    losses = [trainer.step(window).loss for _ in range(20)]
    assert losses[-1] < losses[0] - 0.5
    state = trainer.model.state_dict()
    assert all(torch.equal(w, state[n]) for n, w in base.items())


# Settings


@pytest.mark.parametrize("settings", [{"weight_decay": 0.1}, {"weight_decay": 0.1, "momentum": 0.9}, {}])
def test_sgd_by_formula(settings):
    """Two steps: v = momentum v + g + weight_decay w; w = w - lr v."""
    model = random_model()
    trainer = Trainer(model, Settings(optimizer="sgd", lr=0.01, schedule="constant", **settings), 2)
    before = {name: w.detach().double().clone() for name, w in trainer.weights.items()}
    velocity, seen = dict.fromkeys(before, 0.0), []
    keep = lambda *_: seen.append({name: w.grad.double().clone() for name, w in trainer.weights.items()})  # noqa: E731
    trainer.optimizer.register_step_pre_hook(keep)
    for window in (batches([samples(2)]), batches([samples(2, seed=1)])):
        trainer.step(window)
        for name, w in before.items():
            velocity[name] = settings.get("momentum", 0) * velocity[name] + seen[-1][name]
            velocity[name] = velocity[name] + settings.get("weight_decay", 0) * w
            before[name] = w - 0.01 * velocity[name]
    for name, w in trainer.weights.items():
        torch.testing.assert_close(w.double(), before[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 5])
def test_learning_rate_by_formula(schedule, warmup):
    settings, total = Settings(lr=0.1, schedule=schedule, warmup_steps=warmup), 24
    for step in range(total):
        x = (step - warmup) / (total - warmup)
        shape = {"constant": 1, "linear": 1 - x, "cosine": 0.5 + 0.5 * math.cos(math.pi * x)}[schedule]
        wanted = 0.1 * ((step + 1) / (warmup + 1) if step < warmup else shape)
        assert settings.lr_at(step, total) == pytest.approx(wanted) and 0 < settings.lr_at(step, total) <= 0.1
    assert 0 <= settings.lr_at(10 * total, total) <= 0.1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer", "adam"),
        ("schedule", "step"),
        ("amp", "fp8"),
        ("loss_normalization", "mean"),
        ("lr", -1.0),
        ("lr", math.nan),
        ("momentum", 1.0),
        ("weight_decay", math.inf),
        ("clip_norm", 0.0),
        ("warmup_steps", -1),
    ],
)
def test_bad_settings_name_the_field(field, value):
    with pytest.raises(InputError, match=f"^(--)?{field}="):
        Settings(**{field: value})


# Checkpointing


@pytest.mark.parametrize(
    ("spec", "layers"),
    [("none", []), ("all", [0, 1, 2, 3, 4, 5]), ("every:1", [0, 1, 2, 3, 4, 5]), ("every:2", [1, 3, 5]),
     ("every:4", [3]), ("0,4", [0, 4]), ("5", [5]), ("4,4,0", [0, 4])],
)  # fmt: skip
def test_which_layers_are_checkpointed(spec, layers):
    assert checkpointed_layers(spec, 6) == layers


@pytest.mark.parametrize("spec", ["", "some", "every", "every:", "every:0", "every:-1", "6", "-1", "0,x", "1.5"])
def test_bad_checkpointing_is_named(spec):
    with pytest.raises(InputError, match=r"^checkpointing="):
        checkpointed_layers(spec, 6)


@pytest.mark.parametrize(
    ("amp", "dropout"),
    [
        ("none", 0.5),
        ("bf16", 0.05),
        pytest.param("none", 0.05, marks=pytest.mark.slow),
        pytest.param("fp16", 0.5, marks=pytest.mark.slow),
    ],
)
def test_checkpointing_any_layers_is_bit_equal(amp, dropout):
    window = batches([samples(2), samples(1, seed=9)])
    seen = set()
    for layers in itertools.chain.from_iterable(itertools.combinations(range(4), n) for n in range(5)):
        model = lora_model(dropout)
        checkpoint_layers(model, layers)
        assert [isinstance(block, CheckpointedBlock) for block in model.layers] == [i in layers for i in range(4)]
        torch.manual_seed(3)
        found = gradients_of(model, window, amp=amp)
        seen.add(hashlib.sha256(b"".join(g.numpy().tobytes() for g in found.values())).hexdigest())
    assert len(seen) == 1


def test_checkpointing_is_bit_equal_in_full_training():
    window, seen = batches([samples(2)]), set()
    for layers in ((), (1, 2), range(4)):
        model = random_model()
        checkpoint_layers(model, layers)
        assert model.state_dict().keys() == random_model().state_dict().keys()
        seen.add(
            hashlib.sha256(b"".join(g.numpy().tobytes() for g in gradients_of(model, window).values())).hexdigest()
        )
    assert len(seen) == 1


@pytest.mark.parametrize("lean", [False, True])
def test_checkpointing_packed_rows_is_bit_equal(lean):
    """Rows of several samples have positions and a mask of their own, which the second run needs as well."""
    seen = []
    for layers in ((), (0, 2), range(4)):
        model = lora_model(0.05)
        checkpoint_layers(model, layers)
        torch.manual_seed(3)
        seen.append(gradients_of(model, [batching.collate([samples(3), samples(2, seed=9)], 0)], lean=lean))
    for found in seen[1:]:
        assert all(torch.equal(found[name], seen[0][name]) for name in seen[0])


def test_checkpointing_recomputes_and_saves_memory():
    """FLOPs grow by one forward of the chosen blocks; bytes kept for the backward pass shrink."""
    tokens = batches([samples(1, longest=40)])[0]
    flops, kept = {}, {}
    for n in (0, 2, 4):
        model = random_model()
        checkpoint_layers(model, range(n))
        trainer, sizes = Trainer(model, Settings(), 1), []
        pack = lambda t, sizes=sizes: sizes.append(t.nbytes) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = trainer.loss_sum(tokens)
        kept[n] = sum(sizes)
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        flops[n] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        random_model().hidden(tokens.tokens)
    # A block's last product, w2, is not needed for any gradient, and recomputation stops before it.
    block = counter.get_total_flops() / 4 - 2 * tokens.tokens.numel() * SMALL.dim * SMALL.ffn_dim
    assert flops[2] - flops[0] == pytest.approx(2 * block) and flops[4] - flops[0] == pytest.approx(4 * block)
    assert kept[4] < kept[2] < kept[0] and kept[4] < 0.35 * kept[0]


def test_amp_computes_in_16_bits_and_keeps_fp32_weights():
    for amp, dtype in (("none", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        trainer, seen = Trainer(lora_model(), Settings(amp=amp), 1), set()
        trainer.model.layers[0].feed_forward.w2.register_forward_hook(lambda _, __, y, seen=seen: seen.add(y.dtype))
        trainer.step(batches([samples(1)]))
        assert seen == {dtype} and trainer.scaler.is_enabled() == (amp == "fp16")
        assert {w.dtype for w in trainer.model.parameters()} == {torch.float32}


def test_autocast_ends_with_each_forward_pass():
    """It keeps 16-bit copies of the weights until it ends: they would outlive the step that changes the weights."""
    trainer, inside = Trainer(lora_model(), Settings(amp="bf16"), 2), []
    trainer.model.norm.register_forward_hook(lambda *_: inside.append(torch.is_autocast_enabled("cpu")))
    trainer.step(batches([[sample] for sample in samples(2)]))
    assert inside == [True, True] and not torch.is_autocast_enabled("cpu")


def test_frozen_embeddings_do_not_stop_the_gradient():
    """The reentrant kind of checkpointing gives adapters none, and only warns."""
    model = lora_model()
    checkpoint_layers(model, range(4))
    found = gradients_of(model, batches([samples(2)]))
    assert len(found) == 2 * 7 * 4 and all(g.abs().max() > 0 for g in found.values())


# Sampling, caches, stopping, state


def test_training_with_a_cache_is_refused():
    model = random_model()
    cache = KVCache(SMALL, 1, 8, torch.float32, "cpu")
    with pytest.raises(ValueError, match="for inference"):
        model(torch.zeros(1, 4, dtype=torch.int64), cache=cache)


def test_sampling_between_steps_changes_nothing():
    results = []
    for sampled in (False, True):
        model = lora_model(dropout=0.1)
        trainer = Trainer(model, Settings(optimizer="adamw", lr=1e-2), 4)
        llama_ = Llama(model, None, 64, 2, decoding="eager")
        torch.manual_seed(0)
        for step in range(4):
            if sampled:
                model.eval()
                context = torch.inference_mode if step % 2 else torch.no_grad
                with context(), torch.autocast("cpu", torch.bfloat16, enabled=step == 2):
                    llama_.generate([[1, 2, 3], [4]], 5, temperature=0.8, use_cache=step != 3)
                evaluate(trainer, batches([samples(1)]))
            trainer.step(batches([[s] for s in samples(2, seed=step)]))
        results.append(digest(trainer))
    assert results[0] == results[1]


def test_a_stopped_window_leaves_no_trace():
    windows = [batches([[s] for s in samples(3, seed=step)]) for step in range(2)]
    results = []
    for calls in (None, 8):  # stop() is called before each step and before each of its three batches
        run = BareRun(lora_model(dropout=0.5), TrainingOptions(lr=1.0), windows)
        torch.manual_seed(0)
        if calls is not None:
            answers = iter([False] * (calls - 1) + [True])
            finetuning.train(run, lambda: next(answers))  # noqa: B023
            assert all(w.grad is None for w in run.trainer.weights.values()) and run.trainer.progress.windows == 1
        finetuning.train(run, lambda: False)
        results.append(digest(run.trainer))
    assert results[0] == results[1]


LOOPS = {
    "course": {},
    "mean of means, fp16": {"loss_normalization": "microbatch", "amp": "fp16"},
    "AdamW, clipped": {"optimizer": "adamw", "clip_norm": 0.5, "schedule": "cosine", "warmup_steps": 1},
    "lean adapters": {"lean": True, "amp": "bf16", "optimizer": "adamw"},
    "lean SGD of all weights": {"lean": True, "lora": False, "accumulation": 1},
}


@pytest.mark.parametrize("name", LOOPS)
def test_the_loop_of_finetuning_takes_the_trainers_step(name):
    """finetuning.train, written out, and Trainer.step: the same reports, weights and random state, bit by bit."""
    options = TrainingOptions(**{"lr": 0.01, **LOOPS[name]})
    parts = 3 if options.accumulation > 1 else 1
    windows = [batches([[s] for s in samples(parts, seed=step)]) for step in range(4)]
    runs = [
        BareRun(lora_model(dropout=0.2) if options.lora else random_model().requires_grad_(True), options, windows)
        for _ in range(2)
    ]
    torch.manual_seed(0)
    finetuning.train(runs[0], lambda: False)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    assert str(runs[0].reports) == str([runs[1].trainer.step(window) for window in windows])  # NaN is not equal to NaN
    assert digest(runs[0].trainer) == digest(runs[1].trainer)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9}, {"optimizer": "adamw", "schedule": "cosine", "weight_decay": 0.1}, {"amp": "fp16"}],
    ids=str,
)
def test_restoring_continues_to_the_same_bits(options):
    """Saved after every step, restored into a fresh trainer with another random state."""
    settings = Settings(lr=0.05, **options)

    def fresh() -> Trainer:
        trainer = Trainer(lora_model(dropout=0.2), settings, 6)
        if trainer.scaler.is_enabled():
            trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        return trainer

    windows = [batches([[s] for s in samples(2, seed=step)]) for step in range(6)]
    straight, hopping = fresh(), fresh()
    torch.manual_seed(0)
    reports = [straight.step(window) for window in windows]
    torch.manual_seed(0)
    for window, report in zip(windows, reports, strict=True):
        saved = hopping.snapshot()
        saved.tensors = {g: {n: t.clone() for n, t in group.items()} for g, group in saved.tensors.items()}
        hopping = fresh()
        torch.manual_seed(99)
        hopping.restore(saved)
        assert hopping.step(window) == report
    assert digest(hopping) == digest(straight) and hopping.progress == straight.progress
    assert hopping.scaler.state_dict() == straight.scaler.state_dict()


def test_restoring_brings_the_random_state_back():
    """What draws from torch's own generator goes on where it was."""
    trainer = Trainer(lora_model(), Settings(), 6)
    torch.manual_seed(7)
    saved, expected = trainer.snapshot(), torch.rand(3)
    torch.manual_seed(8)
    trainer.restore(saved)
    assert torch.equal(torch.rand(3), expected)


def test_restoring_takes_nothing_but_the_whole():
    """Each part taken away or changed is an error of its own."""
    trainer = Trainer(lora_model(), Settings(optimizer="adamw", amp="fp16"), 6)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    assert not trainer.step(batches([samples(1)])).skipped
    for group, name in [(g, n) for g, tensors in trainer.snapshot().tensors.items() for n in list(tensors)[:2]]:
        saved = trainer.snapshot()
        saved.tensors[group] = {n: t for n, t in saved.tensors[group].items() if n != name}
        with pytest.raises(InputError, match=group):
            trainer.restore(saved)
    for part in ("model", "optimizer", "rng", "scaler", "progress"):
        saved = trainer.snapshot()
        saved.tensors.pop(part, None)
        saved.state.pop(part, None)
        with pytest.raises(InputError, match=part):
            trainer.restore(saved)
    for field in vars(trainer.progress):
        saved = trainer.snapshot()
        saved.state["progress"] = {n: v for n, v in saved.state["progress"].items() if n != field}
        with pytest.raises(InputError, match="progress"):
            trainer.restore(saved)
    with pytest.raises(InputError, match="scaler"):
        Trainer(lora_model(), Settings(optimizer="adamw"), 6).restore(trainer.snapshot())
    with pytest.raises(InputError, match="optimizer"):
        Trainer(lora_model(), Settings(amp="fp16"), 6).restore(trainer.snapshot())


# What is said about it


@pytest.mark.slow
def test_end_of_text_is_learned(tiny):
    """Four samples, trained for a while: greedy generation gives the answers and stops by itself."""
    args = type(SMALL)(**{**vars(SMALL), "vocab_size": tiny.tokenizer.n_words})
    model = random_model(args, std=0.02)
    encoded, _, _ = encode(tiny.tokenizer, RECORDS[:4], 512)
    trainer = Trainer(model, Settings(optimizer="adamw", lr=3e-3), 200)
    window = [batching.collate([[sample] for sample in encoded], tiny.tokenizer.pad_id)]
    for _ in range(120):
        trainer.step(window)
    model.eval()
    prompts = [alpaca.encode_prompt(tiny.tokenizer, r.instruction, r.input) for r in RECORDS[:4]]
    ids, _ = Llama(model, tiny.tokenizer, 512).generate(prompts, 60, temperature=0)
    assert [tiny.tokenizer.decode(row) for row in ids] == [r.output for r in RECORDS[:4]]


def test_confidence_intervals_cover():
    """95 % intervals of samples from a known mean cover it about as often as they say."""
    generator, covered = torch.Generator().manual_seed(0), 0
    for trial in range(100):
        counts = torch.randint(1, 50, (60,), generator=generator)
        sums = counts * (2 + 0.5 * torch.randn(60, generator=generator))
        before = Evaluation(sums.tolist(), counts.tolist(), sums.tolist())
        low, high = confidence(before, seed=trial)
        covered += low <= 2 <= high
        after = Evaluation((sums - 0.1 * counts).tolist(), counts.tolist(), sums.tolist())
        assert confidence(before, after, seed=trial) == (pytest.approx(0.1, rel=1e-3), pytest.approx(0.1, rel=1e-3))
    assert 87 <= covered <= 100


def test_a_model_that_copies_is_recognised():
    """copy_loss is the loss of saying again what was just read."""
    trainer = Trainer(random_model(), Settings(optimizer="adamw", lr=1e-2), 40)
    batch = batches([samples(3, longest=20)])[0]
    unshifted = Batch(batch.tokens, None, batch.where, batch.tokens.flatten()[batch.where])
    for _ in range(40):
        trainer.step([unshifted])
    single = batches([[s] for s in samples(3, longest=20)])
    found = evaluate(trainer, single)
    assert found.copy_loss < 1 < math.log(SMALL.vocab_size) < found.loss
    assert found.counts == [len(b.labels) for b in single]
