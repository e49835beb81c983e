"""What gives the same bits again, and how far apart the rest is: lines of docs/trust.md that no other test holds."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import SMALL, random_model

WIDE = dataclasses.replace(SMALL, dim=256, n_layers=2, vocab_size=1024)  # enough for 2 threads

TOKENS = torch.randint(WIDE.vocab_size, (3, 64), generator=torch.Generator().manual_seed(0))


def computed(dtype: torch.dtype, n_threads: int) -> list[torch.Tensor]:
    """Logits [B, T, V] and the gradients of a loss of them, in one vector."""
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        model = random_model(WIDE, std=0.05).to(dtype)
        logits = model(TOKENS)
        logits.float().log_softmax(-1)[..., 0].mean().backward()
        return [logits.detach(), torch.cat([weight.grad.flatten() for weight in model.parameters()])]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_call_again_has_the_same_bits(dtype, n_threads):
    for first, again in zip(computed(dtype, n_threads), computed(dtype, n_threads), strict=True):
        assert torch.equal(first, again)


def test_the_number_of_threads_changes_no_more_than_the_order_of_sums():
    (logits, gradients), (others, other_gradients) = computed(torch.float32, 1), computed(torch.float32, 2)
    torch.testing.assert_close(others, logits, atol=1e-5, rtol=0)
    assert (other_gradients - gradients).norm() <= 1e-6 * gradients.norm()


@pytest.mark.parametrize("length", [64, 40])
@torch.no_grad()
def test_other_sequences_and_what_follows_change_no_more_than_the_order_of_sums(length):
    model = random_model(WIDE, std=0.05)
    torch.testing.assert_close(model(TOKENS[1:2, :length]), model(TOKENS)[1:2, :length], atol=1e-5, rtol=0)
