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


@torch.no_grad()
def quantize_row_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """int8 codes [N, K] and fp16 scales [N, ceil(K / group_size)] of a matrix: |w - codes * scales| <= 0.57 scales.

    Half a scale, and at the ends what rounding the scale to 11 bits takes away, 127 / 2048 of one.
    """
    return _in_groups(weight, group_size, torch.float16, _fit_absmax)


@torch.no_grad()
def quantize_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes -8 to 7 as int8 [N, K] and bfloat16 scales [N, ceil(K / group_size)], for the least squared error."""
    return _in_groups(weight, group_size, torch.bfloat16, _fit_symmetric)


@torch.no_grad()
def quantize_ranges(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 to 15 as int8 [N, K], scales and offsets fp16 [N, ceil(K / group_size)], for the least squared error."""
    return _in_groups(weight, group_size, torch.float16, _fit_range)


def _in_groups(
    weight: Tensor, group_size: int, dtype: torch.dtype, fit: Callable[[Tensor], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Codes of all groups, and what else `fit` returns for groups [members, G] in fp32: numbers [G] of this dtype."""
    n, k = weight.shape
    codes, others = torch.empty(n, k, dtype=torch.int8, device=weight.device), []
    n_rows, n_whole = max(1, CHUNK // k), k // group_size * group_size
    for start in range(0, n, n_rows):
        rows = slice(start, start + n_rows)
        found = []
        for columns in (slice(0, n_whole), slice(n_whole, k)):  # the groups, and the shorter one at the end
            part = weight[rows, columns]
            if part.numel() == 0:
                continue
            # Members of a group below each other: sums over a group then run over many groups at once.
            q, *numbers = fit(part.float().reshape(-1, min(group_size, part.shape[1])).t().contiguous())
            codes[rows, columns] = q.t().reshape(part.shape)
            found.append([number.view(len(part), -1).to(dtype) for number in numbers])
        others.append([torch.cat(numbers, 1) for numbers in zip(*found, strict=True)])
    return codes, *(torch.cat(numbers) for numbers in zip(*others, strict=True))


def _fit_absmax(groups: Tensor) -> tuple[Tensor, Tensor]:
    scales = _in_half(groups.abs().amax(0) / 127)
    return torch.div(groups, scales).round_().clamp_(-127, 127), scales


def _fit_symmetric(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The best codes [group_size, G], as fp32, and scales [G] for groups [group_size, G]."""
    high, low = groups.amax(0), groups.amin(0)
    largest = torch.where(high < -low, low, high)
    least = torch.full_like(largest, torch.inf)
    best = torch.ones_like(largest)
    q, error = torch.empty_like(groups), torch.empty_like(groups)

    def consider(scales: Tensor) -> None:
        scales = _usable(scales.bfloat16().float())
        _round(groups, scales, q)
        squared = torch.mul(q, scales, out=error).sub_(groups).square_().sum(0)
        is_better = squared < least
        torch.where(is_better, squared, least, out=least)
        torch.where(is_better, scales, best, out=best)

    for divisor in DIVISORS:
        consider(largest / divisor)
    _round(groups, best, q)
    # The scale with the least error for the codes just found: sum(w q) / sum(q q).
    consider((groups * q).sum(0) / q.square().sum(0).clamp_min_(1))
    return _round(groups, best, q), best


def _fit_range(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best codes [group_size, G], as fp32, scales [G] and offsets [G] for groups [group_size, G].

    Each candidate is followed by the line through its codes that has the least error: w = scale * code + offset.
    """
    low = groups.amin(0)
    width, mean = groups.amax(0) - low, groups.mean(0)
    centred = groups - mean
    least, best = torch.full_like(low, torch.inf), torch.zeros(2, len(low), device=groups.device)
    q, error = torch.empty_like(groups), torch.empty_like(groups)

    def consider(scales: Tensor, offsets: Tensor) -> None:
        codes_in_range(groups, scales, offsets, q)
        squared = torch.mul(q, scales, out=error).add_(offsets).sub_(groups).square_().sum(0)
        is_better = squared < least
        torch.where(is_better, squared, least, out=least)
        torch.where(is_better, torch.stack((scales, offsets)), best, out=best)

    def consider_line(scales: Tensor) -> None:
        middle = q.mean(0)
        spread = torch.sub(q, middle, out=error)
        slope = (spread * centred).sum(0) / spread.square_().sum(0).clamp_min_(1e-3)
        scales = torch.where(slope > 0, _in_half(slope), scales)  # 0 where all codes are equal
        consider(scales, (mean - scales * middle).half().float())

    for divisor, below in RANGES:
        scales = _in_half(width / divisor)
        consider(scales, (low + scales * (below * max(0.0, divisor - 15))).half().float())
        consider_line(scales)
    scales, offsets = best.clone()
    codes_in_range(groups, scales, offsets, q)
    consider_line(scales)
    scales, offsets = best
    return codes_in_range(groups, scales, offsets, q), scales, offsets


def codes_in_range(values: Tensor, scales: Tensor, offsets: Tensor, out: Tensor) -> Tensor:
    """The nearest of codes 0 to 15."""
    return torch.sub(values, offsets, out=out).div_(scales).round_().clamp_(0, 15)


def _round(groups: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    return torch.div(groups, scales, out=out).round_().clamp_(-8, 7)


def _usable(scales: Tensor) -> Tensor:
    """1 for rows of zeros; and where a scale would be subnormal, the smallest that is not."""
    tiny = torch.finfo(scales.dtype).tiny
    raised = torch.where(scales.abs() < tiny, tiny, scales)
    return torch.where(scales == 0, 1.0, raised)


def _in_half(scales: Tensor) -> Tensor:
    """The nearest numbers of fp16 above 0."""
    return scales.half().float().clamp_min_(LEAST_SCALE)


def pack(codes: Tensor, least: int = -8) -> Tensor:
    """Codes from `least` to least + 15, int8 [N, K], as uint8 [N, 16 ceil(K / 32)], in the order described above."""
    nibbles = F.pad((codes - least).to(torch.uint8), (0, -codes.shape[1] % BLOCK))
    low, high = nibbles.unflatten(1, (-1, 2, BLOCK // 2)).unbind(2)
    return (low | high << 4).flatten(1)
