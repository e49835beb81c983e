"""A loss measured on many pieces of text, and how certain its mean is.

What training measures on held-out records and what perplexity.py measures on windows of a text: sums and counts of each
piece are kept, so that two models can be compared on the same pieces.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

LEAST_PIECES = 10  # for an interval; a bootstrap over fewer claims more than it knows, over one it has no width
PICKS_AT_ONCE = 1 << 20  # pieces drawn in one go: 8 MB of indices


@dataclass
class LossSums:
    """Loss of each piece: summed cross entropy in nats and number of label tokens."""

    sums: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """Mean over all label tokens, in nats."""
        return sum(self.sums) / sum(self.counts)


def confidence(
    before: LossSums, after: LossSums | None = None, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval over pieces of the loss of `before`, or of the fall from `before` to `after`.

    Pieces are drawn, not tokens: the tokens of one answer or window are not independent (Efron 1979, percentile
    method). Of two models the same pieces are drawn, so that how hard a piece is cancels out.
    """
    sums, counts = torch.tensor(before.sums, dtype=torch.float64), torch.tensor(before.counts, dtype=torch.float64)
    if after is not None:
        sums = sums - torch.tensor(after.sums, dtype=torch.float64)
    generator, means = torch.Generator().manual_seed(seed), []
    size = max(1, PICKS_AT_ONCE // len(sums))
    for start in range(0, draws, size):
        picks = torch.randint(len(sums), (min(size, draws - start), len(sums)), generator=generator)
        means.append(sums[picks].sum(1) / counts[picks].sum(1))
    low, high = torch.cat(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
