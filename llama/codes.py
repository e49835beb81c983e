"""Numbers as codes of 8 or 4 bits: how scales and offsets of a matrix are chosen, and how codes are packed.

    int8   one scale per row:            w[n, k] = codes[n, k] * scales[n],   scales[n] = max |w[n]| / 127, in fp32
           or one per group of a row:    w[n, k] = codes[n, k] * scales[n, k // group_size], likewise, in fp16
    int4   symmetric, codes -8 to 7:     w[n, k] = codes[n, k] * scales[n, k // group_size]
           chosen for the least squared error among candidates, in bfloat16; a scale may be negative
           with zero-points, codes 0 to 15, the same + offsets[n, k // group_size]
           chosen likewise, both in fp16

fp16 is what GGUF files have: weights that come from a Q4_1 file keep their value in groups of 32 with offsets, and
those from a Q8_0 file in groups of 32 of int8. Where a group size does not divide the columns of a matrix, the last
group of each row is shorter.

Layout of int4: each 32 columns of a row, a block, are 16 bytes, in which a code without offset is stored as code + 8.
One shift and two masks give 32 codes in order:

    byte           0        1        2             15
    high nibble    col 16   col 17   col 18  ...   col 31
    low nibble     col  0   col  1   col  2  ...   col 15

Where 32 does not divide the columns, the last block is filled up with nibbles of 0, which stand for nothing: whatever
multiplies by a whole block puts zeros in the place of the x that is not there. Scales and offsets have a column for
each group, [N, ceil(K / group_size)]; a group begins with a block, so block b belongs to group b * 32 // group_size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32  # columns that are packed together
# Weights that are quantized at once: small enough for a core's cache, and not worth PyTorch's waking a second thread.
CHUNK = 1 << 15
# A group's candidates for the scale: its value of largest magnitude, with its sign, over each of these. 7 loses nothing
# at the ends; beyond 8 the largest value itself is cut for a finer grid. A greedy choice out of 38 divisors, for normal
# weights: seven of them are within 1.2 % of what all 38 reach.
DIVISORS = (7.0, 7.25, -7.75, -8.0, -8.25, -8.5, -8.75)
# With offsets: the width of its range over the first of each pair. Up to 15 nothing is cut; beyond, the second says how
# much of what is cut lies at the lower end. A greedy choice, too, within 3 % of what 60 pairs reach.
RANGES = ((15.0, 0.0), (14.0, 0.0), (15.5, 0.5), (15.5, 0.0), (15.5, 1.0), (16.5, 0.25), (16.5, 0.75))
LEAST_SCALE = 2.0**-24  # the smallest number of fp16


@torch.no_grad()
def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [N, K] and fp32 scales [N] of a matrix: |w - codes * scales| <= scales / 2, exactly.

    In fp64, in which no quotient of two fp32 numbers is rounded across the middle between two codes.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    n_rows = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), n_rows):
        rows = slice(start, start + n_rows)
        w = weight[rows].double()
        scales[rows] = _usable((w.abs().amax(1) / 127).float())
        codes[rows] = w.div_(scales[rows, None]).round_()
    return codes, scales


@dataclass(frozen=True)
class Grid:
    """The values that the codes of a group can stand for: code * scale + offset, codes from `low` to `high`.

    Groups are [members, G], members below each other: sums over a group then run over many groups at once. Scales and
    offsets are fp32 [G], numbers that `dtype` holds; offsets are None without zero-points. Weights [members, 1] say how
    much an error of each member counts; None: all the same.
    """

    low: int
    high: int
    dtype: torch.dtype  # of stored scales and offsets
    search: Callable[[_Search], None]

    @property
    def has_offsets(self) -> bool:
        return self.low == 0

    def fit(self, groups: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Scales and offsets for groups in fp32."""
        search = _Search(self, groups, weights)
        self.search(search)
        return search.scales, search.offsets

    def nearest(self, values: Tensor, scales: Tensor, offsets: Tensor | None, out: Tensor | None = None) -> Tensor:
        """The codes, as fp32, that stand for the numbers closest to `values`."""
        if offsets is not None:
            values = torch.sub(values, offsets, out=out)
        return torch.div(values, scales, out=out).round_().clamp_(self.low, self.high)

    def value(self, codes: Tensor, scales: Tensor, offsets: Tensor | None, out: Tensor | None = None) -> Tensor:
        """The numbers that codes stand for."""
        values = torch.mul(codes, scales, out=out)
        return values if offsets is None else values.add_(offsets)

    def stored(self, scales: Tensor) -> Tensor:
        """The nearest scales that can be stored and divided by."""
        if self.dtype == torch.float16:
            return scales.half().float().clamp_min_(LEAST_SCALE)
        return _usable(scales.to(self.dtype).float())


class _Search:
    """Scales and offsets of groups: of all that are considered, those with the least squared error."""

    def __init__(self, grid: Grid, groups: Tensor, weights: Tensor | None) -> None:
        self.grid, self.groups = grid, groups
        self.weights = None if weights is None else weights / weights.sum(0)
        self.least = torch.full_like(groups[0], torch.inf)
        self.scales = torch.ones_like(groups[0])
        self.offsets = torch.zeros_like(groups[0]) if grid.has_offsets else None
        self._q, self._error = torch.empty_like(groups), torch.empty_like(groups)

    def consider(self, scales: Tensor, offsets: Tensor | None) -> None:
        scales = self.grid.stored(scales)
        offsets = None if offsets is None else offsets.to(self.grid.dtype).float()
        self.grid.nearest(self.groups, scales, offsets, self._q)
        error = self._sum(self.grid.value(self._q, scales, offsets, self._error).sub_(self.groups).square_())
        is_better = error < self.least
        torch.where(is_better, error, self.least, out=self.least)
        torch.where(is_better, scales, self.scales, out=self.scales)
        if offsets is not None:
            torch.where(is_better, offsets, self.offsets, out=self.offsets)

    def consider_line(self) -> None:
        """What has the least error for the codes of the last candidate: the line through (code, value)."""
        if self.offsets is None:
            dots = self._sum(self.groups * self._q), self._sum(self._q.square())
            self.consider(dots[0] / dots[1].clamp_min_(torch.finfo(torch.float32).eps), None)
            return
        code, value = self._mean(self._q), self._mean(self.groups)
        spread = torch.sub(self._q, code, out=self._error)
        dots = self._sum((self.groups - value).mul_(spread)), self._sum(spread.square_())
        scales = self.grid.stored(dots[0] / dots[1].clamp_min_(torch.finfo(torch.float32).eps))
        self.consider(scales, value - scales * code)

    def consider_best_line(self) -> None:
        self.grid.nearest(self.groups, self.scales, self.offsets, self._q)
        self.consider_line()

    def _sum(self, values: Tensor) -> Tensor:
        return values.sum(0) if self.weights is None else values.mul_(self.weights).sum(0)

    def _mean(self, values: Tensor) -> Tensor:
        return values.mean(0) if self.weights is None else (values * self.weights).sum(0)


def _search_absmax(search: _Search) -> None:
    search.consider(search.groups.abs().amax(0) / search.grid.high, None)


def _search_symmetric(search: _Search) -> None:
    high, low = search.groups.amax(0), search.groups.amin(0)
    largest = torch.where(high < -low, low, high)
    for divisor in DIVISORS:
        search.consider(largest / divisor, None)
    search.consider_best_line()


def _search_range(search: _Search) -> None:
    low = search.groups.amin(0)
    width = search.groups.amax(0) - low
    for divisor, below in RANGES:
        scales = search.grid.stored(width / divisor)
        search.consider(scales, low + scales * (below * max(0.0, divisor - 15)))
        search.consider_line()
    search.consider_best_line()


INT8_ROWS = Grid(-127, 127, torch.float32, _search_absmax)
INT8_GROUPS = Grid(-127, 127, torch.float16, _search_absmax)
INT4 = Grid(-8, 7, torch.bfloat16, _search_symmetric)
INT4_ZERO_POINTS = Grid(0, 15, torch.float16, _search_range)


class Codes(NamedTuple):
    """A matrix [N, K] in codes: int8 [N, K], scales and offsets [N, ceil(K / group_size)] as they are stored."""

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None


@torch.no_grad()
def quantize_groups(weight: Tensor, group_size: int, grid: Grid) -> Codes:
    """Codes of a matrix for the least squared error, a scale for each `group_size` columns of a row.

    In groups of int8 |w - codes * scales| <= 0.57 scales: half of one, and at the ends what rounding it to 11 bits
    takes away, 127 / 2048 of one. Where a group's largest value is below 0.008, fp16 holds its scale less exactly:
    then up to 127 * 2**-25 more.
    """
    k, parts = weight.shape[1], []
    n_rows, n_whole = max(1, CHUNK // k), k // group_size * group_size
    for rows in weight.split(n_rows):
        found = []
        for part in (rows[:, :n_whole], rows[:, n_whole:]):  # the groups, and the shorter one at the end
            if part.numel() > 0:
                groups = part.float().reshape(-1, min(group_size, part.shape[1])).t().contiguous()
                scales, offsets = grid.fit(groups)
                q = grid.nearest(groups, scales, offsets).t().reshape(part.shape).to(torch.int8)
                numbers = (None if x is None else x.view(len(part), -1).to(grid.dtype) for x in (scales, offsets))
                found.append(Codes(q, *numbers))
        parts.append(joined(found, 1))
    return joined(parts, 0)


def joined(parts: list[Codes], dim: int) -> Codes:
    return Codes(*(None if some[0] is None else torch.cat(some, dim) for some in zip(*parts, strict=True)))


def _usable(scales: Tensor) -> Tensor:
    """1 for rows of zeros; and where a scale would be subnormal, the smallest that is not."""
    tiny = torch.finfo(scales.dtype).tiny
    raised = torch.where(scales.abs() < tiny, tiny, scales)
    return torch.where(scales == 0, 1.0, raised)


def pack(codes: Tensor, least: int = -8) -> Tensor:
    """Codes from `least` to least + 15, int8 [N, K], as uint8 [N, 16 ceil(K / 32)], in the order described above."""
    nibbles = F.pad((codes - least).to(torch.uint8), (0, -codes.shape[1] % BLOCK))
    low, high = nibbles.unflatten(1, (-1, 2, BLOCK // 2)).unbind(2)
    return (low | high << 4).flatten(1)
