"""GPTQ and the sweeps after it: against the paper's elimination in fp64, and that no step makes an error larger."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import hard_rows

from llama import gptq
from llama.codes import INT4, INT4_ZERO_POINTS, INT8_GROUPS, INT8_ROWS, Codes, quantize_groups
from llama.gptq import round_for, row_errors

GRIDS = {"int4": INT4, "int4-zero": INT4_ZERO_POINTS, "int8-groups": INT8_GROUPS, "int8-rows": INT8_ROWS}


def inputs(n_tokens: int, width: int) -> torch.Tensor:
    """Correlated, of very different size, one column always 0."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(n_tokens, width, generator=generator) @ torch.randn(width, width, generator=generator)
    x = mixed / width**0.5 * torch.randn(width, generator=generator).exp()
    x[:, 3] = 0
    return x


def values(codes: Codes, group_size: int) -> torch.Tensor:
    k = codes.codes.shape[1]
    wide = codes.codes.double() * codes.scales.double().repeat_interleave(group_size, 1)[:, :k]
    return wide if codes.offsets is None else wide + codes.offsets.double().repeat_interleave(group_size, 1)[:, :k]


def lost(w: torch.Tensor, codes: Codes, group_size: int, hessian: torch.Tensor) -> float:
    return row_errors(values(codes, group_size) - w.double(), hessian.double()).sum().item()


def damped(hessian: torch.Tensor) -> torch.Tensor:
    return hessian + gptq.DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian))


@pytest.mark.parametrize("width", [128, 172])
@pytest.mark.parametrize("name", GRIDS)
def test_it_is_the_elimination_of_the_paper(name, width, monkeypatch):
    """Column by column, with the inverse Hessian of the columns that are left, in fp64. Ties may fall elsewhere."""
    monkeypatch.setattr(gptq, "SWEEPS", 0)
    grid, size = GRIDS[name], width if name == "int8-rows" else 32
    x, w = inputs(500, width), torch.randn(20, width, generator=torch.Generator().manual_seed(1))
    hessian = x.t() @ x
    found = round_for(w, hessian, grid, size)
    left, inverse = w.double(), damped(hessian).double().inverse()
    expected = torch.empty_like(left)
    for start in range(0, width, size):
        stop = min(start + size, width)
        later, costs = inverse.clone(), []
        for j in range(start, stop):
            costs.append(1 / later[j, j])
            later -= torch.outer(later[:, j], later[j]) / later[j, j]
        scales, offsets = grid.fit(left[:, start:stop].t().float().contiguous(), torch.stack(costs)[:, None].float())
        for j in range(start, stop):
            code = grid.nearest(left[:, j].float(), scales, offsets)
            expected[:, j] = code
            step = (left[:, j] - grid.value(code, scales, offsets)) / inverse[j, j]
            left[:, j:] -= torch.outer(step, inverse[j, j:])
            inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    assert (found.codes == expected).float().mean() > 0.97
    reference = Codes(expected, found.scales, found.offsets)
    assert lost(w, found, size, hessian) == pytest.approx(lost(w, reference, size, hessian), rel=0.05)


@pytest.mark.parametrize(("width", "size"), [(128, 32), (172, 32), (172, 128), (33, 32)])
@pytest.mark.parametrize("name", GRIDS)
def test_sweeps_lose_less_and_all_of_it_less_than_the_nearest_codes(name, width, size, monkeypatch):
    """On the damped Hessian, up to rounding, no sweep loses more than what is there before it."""
    grid, size = GRIDS[name], width if name == "int8-rows" else size
    x, w = inputs(500, width), hard_rows(n_columns=width)[5:]
    hessian = x.t() @ x
    errors = []
    for sweeps in range(4):
        monkeypatch.setattr(gptq, "SWEEPS", sweeps)
        errors.append(lost(w, found := round_for(w, hessian, grid, size), size, damped(hessian)))
        assert found.codes.dtype is torch.int8 and found.codes.min() >= grid.low and found.codes.max() <= grid.high
        assert found.scales.shape == (len(w), -(-width // size)) and found.scales.dtype is grid.dtype
        assert (found.offsets is None) == (name != "int4-zero")
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))
    assert errors[1] < 0.999 * errors[0]
    assert errors[2] < 0.6 * lost(w, quantize_groups(w, size, grid), size, damped(hessian))


def test_weights_that_are_on_a_grid_already_stay_there():
    w = torch.randint(0, 16, (9, 64), generator=torch.Generator().manual_seed(0)).float() / 8 - 1
    w[:, ::32], w[:, 31::32] = -1, 7 / 8
    x = inputs(300, 64)
    assert torch.equal(values(round_for(w, x.t() @ x, INT4_ZERO_POINTS, 32), 32), w.double())


def test_fewer_tokens_than_columns_are_enough():
    x, w = inputs(10, 64), torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    hessian = x.t() @ x
    found = round_for(w, hessian, INT4_ZERO_POINTS, 32)
    assert lost(w, found, 32, hessian) < 0.5 * lost(w, quantize_groups(w, 32, INT4_ZERO_POINTS), 32, hessian)
