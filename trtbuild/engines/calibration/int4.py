"""Second moments of a layer's inputs, and GPTQ's compensation of the rounding error by them.

The error of a linear layer's output over the calibration tokens is tr(E H E^T), for the weight's error E [out, in] and
the second moments H = X^T X [in, in] of the inputs. Everything here works on H alone; no activations are kept. H is
the largest thing in memory, and there is one: it is permuted and factored where it lies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trtbuild.checkpoints.quantization import QuantizedWeight
from trtbuild.engines.calibration.int4_grid import HIGHEST, LOWEST, Grid

# Added to the diagonal of H before it is factored, as a share of its mean.
DAMPING = 0.01
# Columns that are compensated at once, and those of the loop inside.
_BLOCK = 128
_INNER = 32
# Rows or columns of H that are moved or factored at once.
_PANEL = 512


class SecondMoments:
    """The sum of x x^T over tokens, H [in, in] in float32."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.sum = torch.zeros(width, width, device=device)
        self.weight = torch.zeros((), device=device)
        self._weight_squares = torch.zeros((), device=device)

    def add(self, x: torch.Tensor, weights: torch.Tensor) -> None:
        """Count tokens x [tokens, in] with weights [tokens]. Only the upper block triangle is kept up."""
        x = x.to(torch.float32, copy=True).mul_(weights.sqrt().unsqueeze(-1))
        for start in range(0, len(self.sum), 1024):
            stop = min(start + 1024, len(self.sum))
            self.sum[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])
        self.weight += weights.sum()
        self._weight_squares += weights.square().sum()

    @property
    def num_tokens(self) -> float:
        """How many equally weighted tokens tell as much."""
        return float(self.weight.square() / self._weight_squares.clamp(min=1e-30))

    def matrix(self) -> torch.Tensor:
        """Mean of x x^T over the tokens, symmetric. It takes over the sum: nothing can be added after it."""
        for start in range(0, len(self.sum), 1024):
            block = self.sum[start : start + 1024, start : start + 1024]
            block.copy_(block.triu() + block.triu(1).T)
            self.sum[start + 1024 :, start : start + 1024] = self.sum[start : start + 1024, start + 1024 :].T
        return self.sum.div_(self.weight.clamp(min=1e-12))


def add_ridge(moments: torch.Tensor, num_tokens: float) -> torch.Tensor:
    """H for other texts than the calibration's, in place: one more token of the mean size along each channel.

    A layer as wide as half of its tokens is fitted to them otherwise, and is worse than rounding on other text.
    """
    moments.diagonal().add_(moments.diagonal().mean() * (len(moments) / max(num_tokens, 1.0)))
    return moments


def compensate(weight: torch.Tensor, grid: Grid, moments: torch.Tensor) -> QuantizedWeight:
    """Round column by column, each time moving what was lost to the columns to come (GPTQ, arXiv 2210.17323).

    In the form of QuIP's LDLQ (arXiv 2307.13304), which rounds to the same values without an inverse:
    H = U D U^T with a unit upper triangular U, and column k becomes round(w_k + sum_{i<k} e_i U_ik). Columns go in the
    order of falling H_kk; the groups stay as they are. `moments` [in, in], contiguous, is overwritten: the largest
    layer's is what a calibration's memory goes to.
    """
    order = moments.diagonal().argsort(descending=True)
    permute(moments, order)
    factor = unit_upper_factor(moments)
    num_groups = grid.scales.shape[1]
    # Columns as rows: each is contiguous.
    columns = weight.float().T[order].contiguous()
    groups = (order // (weight.shape[1] // num_groups)).tolist()
    steps = _Steps.of(grid)
    errors, values = torch.empty_like(columns), torch.empty(columns.shape, dtype=torch.int8, device=columns.device)
    for start in range(0, len(columns), _BLOCK):
        stop = min(start + _BLOCK, len(columns))
        target = columns[start:stop].clone()
        target.addmm_(factor[:start, start:stop].T, errors[:start])
        _round_block(target, columns, steps.take(groups[start:stop]), factor, errors, values, start)
    natural = torch.empty_like(values)
    natural[order] = values
    found = natural.T.contiguous()
    if grid.zeros is not None:
        found.unflatten(1, (num_groups, -1)).add_(grid.zeros.to(torch.int8).unsqueeze(-1))
    return QuantizedWeight(found, grid.scales, grid.zeros)


@dataclass(frozen=True)
class _Steps:
    """A grid for columns that are rows: value = scale * n for lowest <= n <= highest, each [groups or columns, out]."""

    scales: torch.Tensor
    lowest: torch.Tensor
    highest: torch.Tensor

    @classmethod
    def of(cls, grid: Grid) -> _Steps:
        zeros = torch.zeros_like(grid.scales) if grid.zeros is None else grid.zeros
        return cls(grid.scales.T.contiguous(), (LOWEST - zeros).T.contiguous(), (HIGHEST - zeros).T.contiguous())

    def take(self, groups: list[int]) -> _Steps:
        """Those of each column, by its group."""
        return _Steps(self.scales[groups], self.lowest[groups], self.highest[groups])


def _round_block(
    target: torch.Tensor,
    columns: torch.Tensor,
    steps: _Steps,
    factor: torch.Tensor,
    errors: torch.Tensor,
    values: torch.Tensor,
    start: int,
) -> None:
    """Columns start.. of one block, whose targets hold what earlier blocks lost. `values` become the n of `_Steps`."""
    size = len(target)
    for inner in range(0, size, _INNER):
        stop = min(inner + _INNER, size)
        for j in range(inner, stop):
            k = start + j
            rounded = (target[j] / steps.scales[j]).round_().clamp_(steps.lowest[j], steps.highest[j])
            values[k] = rounded
            torch.addcmul(columns[k], rounded, steps.scales[j], value=-1, out=errors[k])
            if j + 1 < stop:
                target[j + 1 : stop].addr_(factor[k, k + 1 : start + stop], errors[k])
        done = slice(start + inner, start + stop)
        target[stop:].addmm_(factor[done, start + stop : start + size].T, errors[done])


def permute(moments: torch.Tensor, order: torch.Tensor) -> None:
    """Bring a symmetric matrix's rows and columns into `order`, in place."""
    for _ in range(2):
        for start in range(0, len(moments), _BLOCK):
            rows = moments[start : start + _BLOCK]
            rows.copy_(rows[:, order])
        # What is left to exchange, the rows, are the transpose's columns.
        _transpose(moments)


def _transpose(matrix: torch.Tensor) -> None:
    """In place, for a square matrix."""
    for start in range(0, len(matrix), _PANEL):
        stop = min(start + _PANEL, len(matrix))
        matrix[start:stop, start:stop] = matrix[start:stop, start:stop].T.clone()
        for other in range(stop, len(matrix), _PANEL):
            right, below = matrix[start:stop, other : other + _PANEL], matrix[other : other + _PANEL, start:stop]
            kept = right.clone()
            right.copy_(below.T)
            below.copy_(kept.T)


def unit_upper_factor(moments: torch.Tensor) -> torch.Tensor:
    """U of H = U D U^T for a symmetric H, damped until it is positive definite.

    U is above the diagonal of the result, which takes H's place in memory; the diagonal's ones and the zeros below it
    are not written.
    """
    diagonal = moments.diagonal().clone()
    mean, damping = float(diagonal.mean()) or 1.0, DAMPING
    moments.diagonal().add_(damping * mean)
    while not _factor_from_the_end(moments):
        damping *= 10
        # Below the diagonal H is as it was.
        for start in range(0, len(moments), _PANEL):
            stop = min(start + _PANEL, len(moments))
            block = moments[start:stop, start:stop]
            block.copy_(block.tril() + block.tril(-1).T)
            moments[start:stop, stop:] = moments[stop:, start:stop].T
        moments.diagonal().copy_(diagonal).add_(damping * mean)
    roots = moments.diagonal().clone()
    for start in range(0, len(moments), _PANEL):
        stop = min(start + _PANEL, len(moments))
        moments[start:stop, start:].div_(roots[start:])
    return moments


def _factor_from_the_end(matrix: torch.Tensor) -> bool:
    """R of H = R R^T over H's upper triangle, the diagonal included; False where H is not positive definite.

    The last columns go first, each panel's share is then taken from all that is left of it.
    """
    for start in reversed(range(0, len(matrix), _PANEL)):
        stop = min(start + _PANEL, len(matrix))
        block = matrix[start:stop, start:stop]
        lower, failed = torch.linalg.cholesky_ex(block.flip(0, 1))
        if int(failed):
            return False
        upper = lower.flip(0, 1)
        block.copy_(upper + block.tril(-1))
        panel = torch.linalg.solve_triangular(upper.T, matrix[:start, start:stop], upper=False, left=False)
        matrix[:start, start:stop] = panel
        for row in range(0, start, _PANEL):
            last = min(row + _PANEL, start)
            # In the blocks of the diagonal the lower half must stay.
            inside = matrix[row:last, row:last]
            inside.sub_((panel[row:last] @ panel[row:last].T).triu_())
            matrix[row:last, last:start].addmm_(panel[row:last], panel[last:].T, alpha=-1)
    return True
