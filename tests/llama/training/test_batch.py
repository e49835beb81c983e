"""Samples to batches and windows: every sample once an epoch, nothing lost where several share a sequence."""

from __future__ import annotations

import pytest
import torch

from data.samples import Sample
from llama import order
from llama.training import batch as batching


def test_packed_rows_hold_every_sample_once():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 60, (50,), generator=generator).tolist()
    samples = [Sample(str(i), tuple(range(1, n + 1)), (range(1, n),)) for i, n in enumerate(lengths)]
    rows = batching.pack(samples, 64)
    assert sorted((s for row in rows for s in row), key=lambda s: int(s.name)) == samples
    assert max(sum(len(s.tokens) for s in row) for row in rows) <= 64
    assert len(rows) < 1.3 * sum(lengths) / 64  # well filled
    packed = batching.collate(rows, 0)
    assert len(packed.labels) == sum(n - 1 for n in lengths)
    assert torch.equal(packed.tokens.flatten()[packed.where + 1], packed.labels)
    assert packed.n_tokens == sum(lengths) < packed.tokens.numel()


@pytest.mark.parametrize("n", range(1, 11))
@pytest.mark.parametrize("accumulation", [1, 3, 8])
def test_an_epoch_is_every_row_once_and_windows_do_not_span_epochs(n, accumulation):
    rows = [[Sample(str(i), (1, 2, 3), (range(1, 3),))] for i in range(n)]
    per_epoch = order.steps_per_epoch(n, accumulation)
    assert per_epoch == -(-n // accumulation)
    orders = []
    for epoch in range(2):
        windows = [batching.window(rows, epoch * per_epoch + i, 1, accumulation, 5, 0) for i in range(per_epoch)]
        orders.append([name for window in windows for part in window for name in part.names])
        assert sorted(orders[-1], key=int) == [str(i) for i in range(n)]
    assert n < 6 or orders[0] != orders[1]
