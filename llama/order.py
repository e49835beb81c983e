"""Which samples an optimizer step takes: a function of seed and step alone, so that resuming needs no state for it."""

from __future__ import annotations

import torch


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The permutation of 0 to n - 1 in which an epoch goes through its samples."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))
    return torch.randperm(n, generator=generator).tolist()


def steps_per_epoch(n: int, per_step: int) -> int:
    """Optimizer steps in an epoch; the last may take fewer samples."""
    return -(-n // per_step)


def indices(n: int, step: int, per_step: int, seed: int) -> list[int]:
    """What step `step` takes (from 0, through all epochs), of n samples; no step spans two epochs."""
    epoch, place = divmod(step, steps_per_epoch(n, per_step))
    return epoch_order(n, seed, epoch)[place * per_step : (place + 1) * per_step]
