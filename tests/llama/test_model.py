"""The network against its slow twin and its own arithmetic: cache, chunks, positions, gradients, counts."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, random_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llama import KVCache, ModelArgs, Transformer
from llama.config import PRESETS
from llama.model import _kernel_groups_heads, attend, rope_frequencies


def new_cache(model, batch: int, max_len: int) -> KVCache:
    weight = model.tok_embeddings.weight
    return KVCache(model.args, batch, max_len, weight.dtype, weight.device)


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 2, 7, 40])
@pytest.mark.parametrize("first", ["at once", "chunked"])
def test_cached_equals_uncached(device, chunk, first):
    """Logits of every position, with the cache filled in chunks, within 1e-5 of one pass without."""
    model, tokens = random_model().to(device), random_tokens(3, 40).to(device)
    cache = new_cache(model, 3, 40)
    parts = []
    for start in range(0, 40, chunk):
        part = tokens[:, start : start + chunk]
        pos = torch.arange(start, start + part.shape[1], device=device).expand_as(part)
        parts.append(model(part, None if start == 0 and first == "at once" else pos, cache))
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), atol=1e-5, rtol=0)


@torch.no_grad()
def test_cached_equals_uncached_in_fp64():
    model = random_model().double()
    tokens = random_tokens(2, 30)
    cache = new_cache(model, 2, 50)
    parts = [model(tokens[:, :11], None, cache)]
    parts += [model(tokens[:, i : i + 1], torch.full((2, 1), i), cache) for i in range(11, 30)]
    # RoPE rotates in fp32 on purpose, in both; everything else is fp64
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), atol=1e-12, rtol=0)


@torch.no_grad()
def test_rows_have_their_own_positions(model):
    """Row 1 is 5 tokens behind row 0 and still computes what it computes alone."""
    tokens = random_tokens(2, 20)
    cache = new_cache(model, 2, 20)
    model(tokens[:, :15], None, cache)
    pos = torch.tensor([[15], [10]])
    stepped = model(tokens.gather(1, pos), pos, cache)
    expected = torch.cat([model(tokens[:1, :16])[:, -1:], model(tokens[1:, :11])[:, -1:]])
    torch.testing.assert_close(stepped, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_rollback_is_a_smaller_position(model):
    """Tokens written and then taken back leave no trace."""
    tokens, wrong = random_tokens(1, 12), random_tokens(1, 12, seed=9)
    cache = new_cache(model, 1, 12)
    model(tokens[:, :8], None, cache)
    model(wrong[:, 8:], torch.arange(8, 12)[None], cache)
    redone = model(tokens[:, 8:], torch.arange(8, 12)[None], cache)
    torch.testing.assert_close(redone, model(tokens)[:, 8:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_future_tokens_and_neighbour_rows_change_nothing(model):
    tokens = random_tokens(2, 16)
    changed = tokens.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % SMALL.vocab_size
    assert torch.equal(model(tokens)[0, :10], model(changed)[0, :10])
    assert torch.equal(model(tokens)[1], model(changed)[1])
    assert not torch.equal(model(tokens)[0, 10:], model(changed)[0, 10:])


@torch.no_grad()
def test_only_distances_matter_without_scaling():
    """RoPE's defining property: shifting all positions changes no logit (fp32 rounding of angles aside)."""
    model = random_model(dataclasses.replace(SMALL, use_scaled_rope=False, rope_scale_factor=None))
    tokens = random_tokens(1, 16)
    shifted = model(tokens, torch.arange(500, 516)[None])
    torch.testing.assert_close(shifted, model(tokens), atol=1e-3, rtol=0)


def test_grouped_heads_equal_repeated_heads():
    q, k, v = torch.randn(2, 8, 5, 16), torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 16)
    repeated = [x.repeat_interleave(4, 1) for x in (k, v)]
    expected = torch.softmax((q @ repeated[0].mT / 4).masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf), -1)
    expected = expected @ repeated[1]
    torch.testing.assert_close(attend(q, k, v, None), expected, atol=1e-5, rtol=0)
    mask = torch.ones(5, 5).tril().bool().expand(2, 1, 5, 5)
    torch.testing.assert_close(attend(q, k, v, mask), expected, atol=1e-5, rtol=0)
    last = attend(q[:, :, 4:], k, v, mask[:, :, 4:])
    torch.testing.assert_close(last, expected[:, :, 4:], atol=1e-5, rtol=0)


def test_kernels_that_cannot_group_heads_get_repeated_keys(monkeypatch):
    q, k = torch.randn(1, 8, 5, 16), torch.randn(1, 2, 5, 16)
    grouped = attend(q, k, k, None)
    monkeypatch.setattr("llama.model._kernel_groups_heads", lambda *_args: False)
    torch.testing.assert_close(attend(q, k, k, None), grouped)


@pytest.mark.parametrize(
    ("capability", "dtype", "masked", "groups"),
    [((6, 0), torch.float16, False, False), ((9, 0), torch.bfloat16, False, True), ((9, 0), torch.float16, True, False)]
    + [((9, 0), torch.float32, False, False)],
)
def test_which_kernels_group_heads(monkeypatch, capability, dtype, masked, groups):
    """Flash attention alone, which runs from sm_80 on, in 16 bits and without a mask."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    q = types.SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
    assert _kernel_groups_heads(q, torch.ones(1) if masked else None) is groups


def test_decoding_accepts_any_memory_layout_of_attention(monkeypatch):
    """CUDA's memory-efficient kernel returns [B, K, G, D] transposed in memory; a CPU never shows that."""
    q, k, mask = torch.randn(2, 8, 1, 16), torch.randn(2, 2, 5, 16), torch.ones(2, 1, 1, 5, dtype=torch.bool)
    expected = attend(q, k, k, mask)
    plain = torch.nn.functional.scaled_dot_product_attention
    transposed = lambda *args: plain(*args).transpose(1, 2).contiguous().transpose(1, 2)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", transposed)
    assert torch.equal(attend(q, k, k, mask), expected)


def test_training_needs_no_cache_and_every_weight_gets_a_gradient():
    model = random_model().train()
    for _ in range(2):  # twice: nothing of the first pass is kept
        model.zero_grad()
        model(random_tokens(2, 9)).logsumexp(-1).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    with pytest.raises(ValueError, match="for inference"):
        model(random_tokens(2, 9), None, new_cache(model, 2, 9))


def test_the_cache_is_written_and_holds_what_was_asked_for(model):
    cache = new_cache(model, 2, 6)
    assert cache.k.nbytes + cache.v.nbytes == SMALL.kv_cache_bytes(2, 6, 4) == 2 * cache.k.numel() * 4
    with torch.no_grad():
        model(random_tokens(2, 4), None, cache)
        assert cache.k[:, :, :, :4].abs().amin(-1).gt(0).all() and not cache.k[:, :, :, 4:].any()
        with pytest.raises(ValueError, match="2 sequences, not 1"):
            model(random_tokens(1, 4), None, cache)
        with pytest.raises(IndexError):  # past the end is an error, never a lost write
            model(random_tokens(2, 1), torch.full((2, 1), 6), cache)


def test_casting_keeps_the_rope_frequencies(model):
    exact = rope_frequencies(SMALL)
    assert torch.equal(model.to(torch.bfloat16).rope_freqs, exact)
    assert torch.equal(model.half().rope_freqs, exact)
    with torch.device("meta"):
        empty = Transformer(SMALL)
    assert torch.equal(empty.to_empty(device="cpu").rope_freqs, exact)


def test_state_dict_holds_metas_keys_only(model):
    keys = set(model.state_dict())
    assert {"tok_embeddings.weight", "norm.weight", "layers.0.attention.wq.weight", "layers.3.ffn_norm.weight"} <= keys
    assert len(keys) == 2 + 9 * SMALL.n_layers
    untied = Transformer(dataclasses.replace(SMALL, tie_word_embeddings=False))
    assert set(untied.state_dict()) == keys | {"output.weight"}


# The arithmetic of ModelArgs against models that were built


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("llama3.2-1b", 1_235_814_400),
        ("llama3.2-3b", 3_212_749_824),
        ("llama3.1-8b", 8_030_261_248),
        ("llama3.1-70b", 70_553_706_496),
        ("llama2-7b", 6_738_415_616),
        ("smollm2-135m", 134_515_008),
        ("tiny", 4_983_040),
        ("tiny-draft", 410_048),
    ],
)
def test_parameter_count(preset, count):
    args = PRESETS[preset]
    with torch.device("meta"):
        built = Transformer(args)
    assert args.n_params() == sum(p.numel() for p in built.parameters()) == count
    assert args.weight_bytes(2) == sum(p.to(torch.bfloat16).nbytes for p in built.parameters())
    linear = sum(p.numel() for p in built.layers[0].parameters() if p.dim() == 2)
    assert args.block_linear_params() == linear


@pytest.mark.parametrize("args", [SMALL, dataclasses.replace(SMALL, tie_word_embeddings=False)])
def test_flop_count(args):
    """Every matrix product of a decode step, as PyTorch counts them (it knows those of the unfused attention only)."""
    model = random_model(args)
    cache = new_cache(model, 1, 24)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        h = model.hidden(random_tokens(1, 1), torch.tensor([[23]]), cache)
        model.logits(h)
    assert counter.get_total_flops() == args.forward_flops(1, start=23)
    per_token = [args.forward_flops(1, start=i, logit_rows=0) for i in range(9)]
    assert args.forward_flops(9, logit_rows=0) == sum(per_token)


def test_params_round_trip_and_stay_metas_where_the_shape_says_the_rest():
    for args in PRESETS.values():
        assert ModelArgs.from_params(args.to_params()) == args
    assert not {"rope_scale_factor", "tie_word_embeddings"} & set(PRESETS["llama3.2-1b"].to_params())
    assert PRESETS["tiny"].to_params()["rope_scale_factor"] == 32.0


def test_heads_may_be_of_another_size_than_dim_over_their_number():
    args = dataclasses.replace(SMALL, n_heads=6, n_kv_heads=2, head_dim=32, max_seq_len=8192)  # 192 wide over dim 64
    assert ModelArgs.from_params(args.to_params()) == args
    assert ModelArgs.from_params({**args.to_params(), "max_batch_size": 32}) == args  # a limit of Meta's cache
    assert args.trained_context == 8192
    model = random_model(args)
    assert args.n_params() == sum(p.numel() for p in model.parameters())
    tokens = random_tokens(2, 9)
    cache = new_cache(model, 2, 9)
    with torch.no_grad():
        model(tokens[:, :8], None, cache)
        stepped = model(tokens[:, 8:], torch.full((2, 1), 8), cache)
        torch.testing.assert_close(stepped, model(tokens)[:, 8:], atol=1e-5, rtol=0)


def test_linear_scaling_slows_every_pair_alike():
    args = dataclasses.replace(SMALL, use_scaled_rope=False, rope_scale_factor=None)
    slowed = dataclasses.replace(args, rope_linear_factor=4.0)
    assert torch.equal(rope_frequencies(slowed), rope_frequencies(args) / 4)
    with pytest.raises(ValueError, match="rope_linear_factor"):
        dataclasses.replace(SMALL, rope_linear_factor=4.0)


@pytest.mark.parametrize("preset", ["llama3.2-1b", "llama3.2-3b", "llama3.1-8b", "llama3.1-70b"])
def test_scaling_factor_follows_from_the_shape(preset):
    assert PRESETS[preset].rope_scale_factor == (32.0 if preset.startswith("llama3.2") else 8.0)


@pytest.mark.parametrize(("T", "S", "n_heads", "n_kv_heads"), [(1, 9, 4, 2), (5, 9, 4, 2), (9, 40, 8, 1), (3, 7, 2, 2)])
def test_a_masked_query_of_several_tokens_never_repeats_the_cache(monkeypatch, T, S, n_heads, n_kv_heads):
    """As on a GPU, whose masked kernels take no groups: K and V go in as they are; as exact as with repeated heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = (3, n_heads, T, 16), (3, n_kv_heads, S, 16), (3, n_kv_heads, S, 16)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    last = torch.tensor([0, 1, S - T])
    mask = torch.arange(S) <= (last[:, None] + torch.arange(T))[:, None, :, None]
    exact = attend(q.double(), k.double(), v.double(), mask)
    plain = attend(q, k, v, mask)
    taken, product = [], F.scaled_dot_product_attention

    def spy(*args, **named):
        taken.append(args)
        return product(*args, **named)

    monkeypatch.setattr("llama.model._kernel_groups_heads", lambda q, mask: False)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    folded = attend(q, k, v, mask)
    assert taken[0][1] is k and taken[0][2] is v
    torch.testing.assert_close(attend(q.double(), k.double(), v.double(), mask), exact, atol=1e-12, rtol=0)
    assert folded.shape == exact.shape and (folded - exact).norm() <= 2 * (plain - exact).norm() + 1e-7 * exact.norm()


def test_random_weights_are_small_and_those_into_the_residual_smaller():
    args = dataclasses.replace(SMALL, dim=256, n_heads=8, n_kv_heads=4, n_layers=8, tie_word_embeddings=False)
    model = Transformer(args)
    fresh = model.tok_embeddings.weight
    assert 0.0199 < fresh.abs().max() <= 0.02 and fresh.mean().abs() < 1e-3
    model.init_weights(torch.Generator().manual_seed(0), std=0.1)
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (weight == 1).all()
        else:
            expected = 0.1 / 4 if name.endswith(("wo.weight", "w2.weight")) else 0.1  # sqrt(2 * 8 layers) is 4
            assert weight.std().item() == pytest.approx(expected, rel=0.05) and weight.mean().abs() < 0.05 * expected
