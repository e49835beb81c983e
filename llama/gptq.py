"""Codes of a matrix that keep what it computes, not what it is: GPTQ (Frantar et al. 2022), and sweeps after it.

    found = round_for(weight, hessian, grid, group_size)

For inputs x of a layer the error of W' in the place of W is the sum over tokens of |(W' - W) x|^2, which is
tr(D H D^T) for D = W' - W and H, the sum of x x^T: the Hessian. All of it happens in each row of W for itself.

GPTQ rounds column after column. What column j loses, e, the later columns make up for as well as they can, and what
cannot be made up for costs e^2 / U[j, j]^2, where U is the upper triangular matrix with U^T U = H^-1: row j of U, over
its first entry, says how the later columns change. Scales and offsets of a group are chosen when its first column is
reached, from weights as they have become, for the least sum of those costs.

A sweep goes through the groups once more. Scale and offset become those with the least error for the codes of the group
and all that is outside of it; then each code becomes the best for all the others (coordinate descent). No step
increases the error.

Left out on purpose: other orders of the columns (sorted by H[j, j] they would need groups that are fixed beforehand).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama.codes import Codes, Grid, joined

DAMPING = 0.01  # of the mean of H[j, j], added to each: inputs that calibration has not seen count as well
ROWS = 4096  # that are rounded at once: of a head's 128,256 rows not all
SWEEPS = 2  # the second takes another 1 to 4 % off the error, a third hardly anything


def row_errors(difference: Tensor, hessian: Tensor) -> Tensor:
    """|d x|^2 summed over inputs with this Hessian [K, K], for each row d of `difference` [N, K]."""
    return ((difference @ hessian) * difference).sum(1)


@torch.no_grad()
def round_for(weight: Tensor, hessian: Tensor, grid: Grid, group_size: int, damping: float = DAMPING) -> Codes:
    """Codes for weight [N, K] whose inputs have this Hessian, fp32 [K, K], which must not be all zeros."""
    damped = hessian.clone()
    damped.diagonal().add_(damping * hessian.diagonal().mean())
    root, parts = _inverse_root(damped), []
    for rows in weight.split(ROWS):
        state = _Rounding(rows.float(), damped, grid, group_size)
        state.compensate(root)
        for _ in range(SWEEPS):
            state.sweep()
        found = (state.scales, state.offsets)
        numbers = (None if some is None else torch.stack(some, 1).to(grid.dtype) for some in found)
        parts.append(Codes(state.codes.t().to(torch.int8).contiguous(), *numbers))
    return joined(parts, 0)


class _Rounding:
    """A matrix on its way to codes. Columns of W are rows here, [K, N], so that each lies in one piece."""

    def __init__(self, weight: Tensor, hessian: Tensor, grid: Grid, group_size: int) -> None:
        self.weight, self.hessian, self.grid = weight.t().contiguous(), hessian, grid
        self.groups = [slice(j, min(j + group_size, len(hessian))) for j in range(0, len(hessian), group_size)]
        self.codes, self.values = torch.empty_like(self.weight), torch.empty_like(self.weight)
        self.scales: list[Tensor] = []
        self.offsets: list[Tensor] | None = [] if grid.has_offsets else None

    def compensate(self, U: Tensor) -> None:
        """GPTQ."""
        weight = self.weight.clone()
        for group in self.groups:
            w, u = weight[group], U[group, group]
            scales, offsets = self.grid.fit(w, u.diagonal()[:, None] ** -2)
            self.scales.append(scales)
            if self.offsets is not None:
                self.offsets.append(offsets)
            lost = torch.empty_like(w)
            for i in range(len(w)):
                code = self.grid.nearest(w[i], scales, offsets, self.codes[group][i])
                value = self.grid.value(code, scales, offsets, self.values[group][i])
                torch.sub(w[i], value, out=lost[i]).div_(u[i, i])
                w[i + 1 :].addr_(u[i, i + 1 :], lost[i], alpha=-1)
            weight[group.stop :].addmm_(U[group, group.stop :].t(), lost, alpha=-1)

    def sweep(self) -> None:
        """Coordinate descent. `slope` is half the derivative of the error by each value, H D^T."""
        slope = self.hessian @ (self.values - self.weight)
        for g, group in enumerate(self.groups):
            H, values, s = self.hessian[group, group], self.values[group], slope[group]
            before = values.clone()
            self._fit_line(g, H, s)
            s.addmm_(H, values - before)
            scales, offsets = self.scales[g], None if self.offsets is None else self.offsets[g]
            for i in range(len(values)):
                best = torch.addcdiv(values[i], s[i], H[i, i], value=-1)
                code = self.grid.nearest(best, scales, offsets, self.codes[group][i])
                value = self.grid.value(code, scales, offsets)
                s.addr_(H[i], value - values[i])
                values[i] = value
            slope[group.stop :].addmm_(self.hessian[group.stop :, group], values - before)

    def _fit_line(self, g: int, H: Tensor, slope: Tensor) -> None:
        """The scales and offsets of a group with the least error for its codes q, where that is less than it was.

        In these the error of a row is quadratic: with A = [q, 1] and t = H v - slope, whose v are the values of now, it
        is |A (scale, offset)|^2 in the norm of H, less twice A (scale, offset) times t, and a constant.
        """
        q, values, grid = self.codes[self.groups[g]], self.values[self.groups[g]], self.grid
        scales, offsets = self.scales[g], None if self.offsets is None else self.offsets[g]
        t, Hq = H @ values - slope, H @ q
        qq, q1, qt, t1 = (q * Hq).sum(0), Hq.sum(0), (q * t).sum(0), t.sum(0)
        if offsets is None:
            better = grid.stored(qt / qq)
            gain = (scales - better) * ((scales + better) * qq - 2 * qt)
        else:
            determinant = qq * H.sum() - q1.square()
            better = grid.stored((H.sum() * qt - q1 * t1) / determinant)
            shift = ((t1 - better * q1) / H.sum()).to(grid.dtype).float()  # the best for the scale as it is stored

            def error(scale: Tensor, offset: Tensor) -> Tensor:
                return scale * (scale * qq + 2 * (offset * q1 - qt)) + offset * (offset * H.sum() - 2 * t1)

            gain = error(scales, offsets) - error(better, shift)
            offsets.copy_(torch.where(gain > 0, shift, offsets))
        scales.copy_(torch.where(gain > 0, better, scales))
        grid.value(q, scales, offsets, values)


def _inverse_root(H: Tensor) -> Tensor:
    """The upper triangular U with U^T U = H^-1."""
    flipped = torch.linalg.cholesky(H.flip(0, 1))  # lower, so H = R R^T with the upper R = flipped.flip(0, 1)
    identity = torch.eye(len(H), device=H.device)
    return torch.linalg.solve_triangular(flipped.flip(0, 1), identity, upper=True)
