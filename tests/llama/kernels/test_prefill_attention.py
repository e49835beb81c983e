"""Attention of prompts on a CPU, beside PyTorch's in fp64: any length, part, head count; any memory around them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llama.kernels.cpu import prefill_attention
from llama.kernels.cpu.prefill_attention import attention

pytestmark = pytest.mark.skipif(prefill_attention.library() is None, reason="this CPU has no kernel for it")


def slow(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int) -> torch.Tensor:
    seen = torch.arange(k.shape[2]) <= torch.arange(start, start + q.shape[2])[:, None]
    return F.scaled_dot_product_attention(q, k, v, seen[None, None], enable_gqa=True).transpose(1, 2)


def case(B: int, H: int, K: int, T: int, D: int, start: int, std: float = 1.0) -> tuple[torch.Tensor, ...]:
    """q, and k and v as the first slots of a cache, in which NaN stands behind them."""
    generator = torch.Generator().manual_seed(B + 10 * H + 100 * T + start)
    q = torch.randn(B, H, T, D, generator=generator) * std
    k, v = torch.randn(2, B, K, start + T + 3, D, generator=generator)
    k[:, :, start + T :] = v[:, :, start + T :] = torch.nan
    return (q.bfloat16(), *(x.bfloat16()[:, :, : start + T] for x in (k, v)))


@pytest.mark.parametrize(
    ("B", "H", "K", "D"), [(1, 4, 1, 64), (2, 8, 2, 64), (3, 6, 3, 32), (1, 3, 3, 16), (1, 2, 1, 128)]
)
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize("start", [0, 1, 61, 200])
def test_it_is_as_exact_as_pytorchs(B, H, K, D, T, start):
    """Rounded once, and weights to 8 bits, as there; against fp64 of the same numbers."""
    q, k, v = case(B, H, K, T, D, start)
    exact = slow(q.double(), k.double(), v.double(), start)
    ours, theirs = attention(q, k, v, start), slow(q, k, v, start)
    assert ours.dtype is torch.bfloat16 and ours.shape == (B, T, H, D)
    assert (ours.double() - exact).norm() <= 1.5 * (theirs.double() - exact).norm() + 1e-3 * exact.norm()


def test_the_same_bits_every_time_and_for_any_number_of_threads():
    q, k, v = case(2, 8, 2, 150, 64, 77)
    usual, first = torch.get_num_threads(), attention(q, k, v, 77)
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(attention(q, k, v, 77), first)
    finally:
        torch.set_num_threads(usual)


def test_a_query_does_not_depend_on_its_neighbours_nor_on_its_part():
    q, k, v = case(1, 4, 2, 100, 64, 40)
    whole = attention(q, k, v, 40)
    for first, stop in ((0, 1), (1, 64), (64, 100), (37, 90)):
        part = attention(q[:, :, first:stop], k[:, :, : 40 + stop], v[:, :, : 40 + stop], 40 + first)
        assert torch.allclose(part, whole[:, first:stop], atol=1e-2, rtol=2e-2)


def test_large_scores_do_not_overflow_and_what_is_not_finite_stays_so():
    q, k, v = case(1, 2, 1, 70, 64, 5, std=1e4)
    exact = slow(q.double(), k.double(), v.double(), 5)
    assert torch.allclose(attention(q, k, v, 5).double(), exact, atol=2e-2)
    v[0, 0, 20, 3] = torch.nan
    out = attention(*case(1, 2, 1, 70, 64, 5)[:2], v, 5)
    assert out[0, 15:, :, 3].isnan().all() and out[..., :3].isfinite().all()  # position 15 + 5 is the first to see it


def test_other_layouts_are_refused():
    q, k, v = case(1, 4, 2, 10, 64, 0)
    for bad in ((q, k, v.clone(), 0), (q, k, v, 1), (q[..., :8], k[..., :8], v[..., :8], 0), (q[:, :3], k, v, 0)):
        with pytest.raises(ValueError, match="not what the kernel takes"):
            attention(*bad)
