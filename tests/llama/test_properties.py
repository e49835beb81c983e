"""What holds for every input, tried on inputs that hypothesis makes up, the same ones in each run."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import SMALL, TINY, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from support import FORMATS, linear_of, widened

from data import text
from data.samples import Sample
from llama import KVCache, Llama, Tokenizer, order
from llama.codes import pack
from llama.config import PRESETS
from llama.model import apply_rope, rope_frequencies, rope_table
from llama.sampling import draw, logits_to_probs, penalize
from llama.training import batch as batching
from llama.training.options import SCHEDULES, TrainingOptions

FREQUENCIES = rope_frequencies(SMALL)
SEEDS = st.integers(0, 2**32)


@pytest.fixture(scope="module")
def small():
    return random_model()


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Positions and masks.


@settings(max_examples=20)
@given(st.lists(st.integers(0, 131_071), min_size=1, max_size=6), SEEDS)
def test_a_rotation_keeps_lengths_and_depends_on_its_own_position_alone(positions, seed):
    x = noise(seed, 1, len(positions), 2, 2 * len(FREQUENCIES))
    table = rope_table(torch.tensor([positions]), FREQUENCIES)
    torch.testing.assert_close(apply_rope(x, table).norm(dim=-1), x.norm(dim=-1))
    for i, position in enumerate(positions):
        assert torch.equal(table[:, i], rope_table(torch.tensor([[position]]), FREQUENCIES)[:, 0])
    assert torch.equal(apply_rope(x, rope_table(torch.zeros(1, len(positions)).long(), FREQUENCIES)), x)


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(2, 12), SEEDS, st.data())
@torch.no_grad()
def test_any_chunks_at_any_positions_are_the_whole(small, n_rows, length, seed, data):
    """Through the cache in parts of any size; a sequence that stays behind computes the same part again."""
    tokens = torch.randint(SMALL.vocab_size, (n_rows, length), generator=torch.Generator().manual_seed(seed))
    cache = KVCache(small.args, n_rows, length, small.dtype, "cpu")
    found, at = torch.zeros(n_rows, length, SMALL.vocab_size), [0] * n_rows
    for last in itertools.chain([False] * data.draw(st.integers(0, 4)), itertools.repeat(True)):
        n = data.draw(st.integers(1, length))
        start = torch.tensor([min(i, length - n) for i in at])  # what is computed again is written again
        pos = start[:, None] + torch.arange(n)
        rows = torch.arange(n_rows)[:, None]
        found[rows, pos] = small(tokens.gather(1, pos), pos, cache)
        at = [i + n if last or data.draw(st.booleans()) else i for i in start.tolist()]
        if min(at) >= length:
            break
    torch.testing.assert_close(found, small(tokens), atol=1e-5, rtol=0)


@settings(max_examples=25)
@given(st.lists(st.integers(2, 12), min_size=1, max_size=8), st.integers(12, 24), SEEDS)
@torch.no_grad()
def test_packed_samples_compute_what_each_computes_alone(small, lengths, max_seq_len, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(SMALL.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    samples = [Sample(str(i), tuple(tokens), (range(1, len(tokens)),)) for i, tokens in enumerate(ids)]
    packed = batching.collate(batching.pack(samples, max_seq_len), pad_id=7)
    found = small(packed.tokens, packed.pos).flatten(0, 1)[packed.where].split(list(packed.n_labels))
    for name, logits in zip(packed.names, found, strict=True):
        torch.testing.assert_close(logits, small(torch.tensor([ids[int(name)]]))[0, :-1], atol=1e-5, rtol=0)


# Ragged batches.


@pytest.fixture(scope="module")
def llama():
    return Llama(random_model(PRESETS["tiny-draft"], std=0.3), Tokenizer(TINY / "tokenizer.model"), 64)


@settings(max_examples=10)
@given(
    st.lists(st.lists(st.integers(0, 4095), min_size=1, max_size=20), min_size=1, max_size=5),
    st.booleans(),
    st.integers(1, 8),
)
def test_any_prompts_together_say_what_each_says_alone(llama, prompts, use_cache, steps):
    together, _ = llama.generate(prompts, steps, 0, use_cache=use_cache)
    assert together == [llama.generate([prompt], steps, 0, use_cache=use_cache)[0][0] for prompt in prompts]


# Sampling.

LOGIT = st.one_of(st.floats(-1e4, 1e4, width=32), st.sampled_from([0.0, 1.0, float("-inf"), 3e38, -3e38]))
TEMPERATURE = st.one_of(st.just(0.0), st.floats(1e-6, 1e6))


@settings(max_examples=150)
@given(
    st.lists(LOGIT, min_size=1, max_size=40).filter(lambda row: max(row) > float("-inf")),
    TEMPERATURE,
    st.floats(1e-3, 1.0),
    st.one_of(st.none(), st.integers(1, 45)),
    st.floats(0.0, 1.0),
    SEEDS,
)
def test_any_settings_give_a_distribution_over_the_most_probable_tokens(row, temperature, top_p, top_k, min_p, seed):
    logits = torch.tensor(row)
    full, probs = logits_to_probs(logits, temperature), logits_to_probs(logits, temperature, top_p, top_k, min_p)
    assert probs.isfinite().all() and (probs >= 0).all() and abs(probs.sum() - 1) < 1e-5
    kept = probs > 0
    assert full[kept].max() == full.max()
    if (~kept).any():
        assert full[kept].min() >= full[~kept].max()  # nothing less probable is kept in place of something more so
    if top_k is not None:
        assert kept.sum() <= max(top_k, (full >= full.sort(descending=True).values[min(top_k, len(row)) - 1]).sum())
    assert full[kept].min() >= min_p * full.max() * (1 - 1e-5)
    if top_k is None and min_p == 0 and temperature > 0:
        assert full[kept].sum() >= top_p - 1e-5
        assert full[kept].sum() - full[kept].min() < top_p + 1e-5  # one fewer would not reach it
    drawn = draw(probs.expand(20, -1), torch.Generator().manual_seed(seed))
    assert kept[drawn].all()


@settings(max_examples=100)
@given(st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=30), st.floats(1.0, 10.0), st.data())
def test_a_penalty_makes_what_was_seen_less_probable_and_leaves_the_rest(row, penalty, data):
    logits = torch.tensor([row])
    seen = torch.tensor([data.draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row)))])
    found = penalize(logits, seen, penalty)
    assert (found <= logits).all() and torch.equal(found[~seen], logits[~seen])


# Quantization.


@settings(max_examples=40)
@given(
    st.sampled_from(FORMATS),
    st.integers(1, 5),
    st.one_of(st.integers(1, 300), st.sampled_from([31, 32, 33, 64, 127, 128, 129, 255, 256, 257])),
    st.sampled_from([1e-6, 1e-2, 1.0, 1e3]),
    SEEDS,
)
def test_codes_of_any_shape_are_near_and_are_kept_when_they_are_packed(config, n, k, size, seed):
    """int8 by half a code, and 127 times the rounding of a scale in fp16; int4 by one and a half of its range."""
    weight = size * noise(seed, n, k)
    layer = linear_of(weight, config)
    values = widened(layer)
    width = config.group_size or k
    for start in range(0, k, width):
        group, error = weight[:, start : start + width].double(), (values - weight)[:, start : start + width].abs()
        step = group.abs().amax(1) / (127 if config.bits == 8 else 7)
        assert (error.amax(1) <= (0.58 if config.bits == 8 else 1.5) * step + 128 * 2.0**-25).all()


@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(1, 5), SEEDS, st.sampled_from([-8, 0]))
def test_packed_codes_are_unpacked_to_themselves(n, n_blocks, seed, least):
    codes = torch.randint(least, least + 16, (n, 32 * n_blocks), generator=torch.Generator().manual_seed(seed)).char()
    blocks = pack(codes, least).view(n, n_blocks, 16)
    assert torch.equal(torch.cat([blocks & 15, blocks >> 4], -1).flatten(1).char() + least, codes)


# Packing, batches and blocks of text.


@settings(max_examples=200)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(30, 60))
def test_packing_keeps_every_sample_in_order_and_leaves_no_room_for_a_later_one(lengths, max_seq_len):
    samples = [Sample(str(i), tuple(range(n)), (range(1, n),)) for i, n in enumerate(lengths)]
    rows = batching.pack(samples, max_seq_len)
    numbers = [[int(sample.name) for sample in row] for row in rows]
    assert sorted(itertools.chain(*numbers)) == list(range(len(samples)))
    assert all(row == sorted(row) for row in numbers)
    for row, later in itertools.combinations(rows, 2):
        before = [sample for sample in row if int(sample.name) < int(later[0].name)]
        assert sum(len(s.tokens) for s in before) + len(later[0].tokens) > max_seq_len
    assert all(sum(len(sample.tokens) for sample in row) <= max_seq_len for row in rows)


@settings(max_examples=100)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**63 - 1), st.integers(0, 3))
def test_the_windows_of_an_epoch_are_every_sequence_once(n, batch_size, accumulation, seed, epoch):
    rows = [[Sample(str(i), (1, 2), (range(1, 2),))] for i in range(n)]
    steps = order.steps_per_epoch(n, batch_size * accumulation)
    windows = [batching.window(rows, epoch * steps + i, batch_size, accumulation, seed, 0) for i in range(steps)]
    assert sorted(int(name) for window in windows for part in window for name in part.names) == list(range(n))
    assert all(1 <= len(window) <= accumulation for window in windows)
    assert all(1 <= len(part.tokens) <= batch_size for window in windows for part in window)
    assert all(len(part.tokens) == batch_size for window in windows for part in window[:-1])


@settings(max_examples=200)
@given(st.integers(2, 200), st.integers(2, 50))
def test_the_blocks_of_a_text_make_each_token_a_label_once(n, length):
    ids = list(range(n))
    blocks = text.blocks(ids, length)
    labels = [block.tokens[answer.start : answer.stop] for block in blocks for answer in block.answers]
    assert list(itertools.chain(*labels)) == ids[1:]
    assert all(2 <= len(block.tokens) <= length for block in blocks)


# Learning rates.


@settings(max_examples=200)
@given(st.floats(1e-8, 10.0), st.integers(0, 50), st.integers(1, 300), st.sampled_from(SCHEDULES))
def test_learning_rates_rise_through_the_warm_up_and_never_after(lr, warmup, total, schedule):
    options = TrainingOptions(lr=lr, warmup_steps=warmup, schedule=schedule)
    rates = [options.lr_at(step, total) for step in range(total)]
    assert all(0 < rate <= lr for rate in rates)
    rising, falling = rates[: warmup + 1], rates[warmup:]
    assert all(a < b for a, b in itertools.pairwise(rising)) and all(a >= b for a, b in itertools.pairwise(falling))
    if schedule == "constant":
        assert set(falling) <= {lr}
    elif warmup < total:
        assert options.lr_at(total, total) == pytest.approx(0, abs=1e-12 * lr)
    assert all(0 <= options.lr_at(step, total) <= lr for step in (total, total + 1, 10**6))
