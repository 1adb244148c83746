"""Grids of int4: where the values of a group of weights may lie, chosen so that the layer's output loses little.

A group has a scale and, in the asymmetric precisions, a zero point: q in [-8, 7] is worth scale * (q - zero). The
scale is rounded to the 16-bit type that stores it before anything is rounded to it. A zero point lies among the
values, as AutoAWQ, GPTQ and compressed-tensors store it: 0 is always worth 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trtbuild.checkpoints.quantization import INT4_MAX, QuantizedWeight

# Shares of the widest grid that are tried. 7/8 of a symmetric one uses the value -8 in full.
CLIP_RATIOS = tuple(1.0 - 0.05 * i for i in range(10))
# What four bits hold.
LOWEST, HIGHEST = -8, 7


@dataclass(frozen=True)
class GridForm:
    """`group` weights along the input share a scale of type `dtype`, and with `zero_points` a zero point."""

    group: int
    dtype: torch.dtype
    zero_points: bool = False


@dataclass(frozen=True)
class Grid:
    """Of a matrix [out, in]: `scales` and `zeros` (None: 0 everywhere), float32 [out, in / group]."""

    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    def nearest(self, groups: torch.Tensor) -> torch.Tensor:
        """The q of each weight, float32; groups [out, in / group, group]."""
        values = groups / self.scales.unsqueeze(-1)
        if self.zeros is not None:
            values += self.zeros.unsqueeze(-1)
        return values.round_().clamp_(LOWEST, HIGHEST)

    def dequantized(self, values: torch.Tensor) -> torch.Tensor:
        """What q are worth, in place; values as `nearest` gives them."""
        if self.zeros is not None:
            values -= self.zeros.unsqueeze(-1)
        return values.mul_(self.scales.unsqueeze(-1))

    def better(self, other: Grid, where: torch.Tensor) -> Grid:
        """`other` in the groups that `where` [out, in / group] names."""
        scales = torch.where(where, other.scales, self.scales)
        if self.zeros is None or other.zeros is None:
            return Grid(scales)
        return Grid(scales, torch.where(where, other.zeros, self.zeros))


def widest_grid(weight: torch.Tensor, form: GridForm) -> Grid:
    """The grid that clips nothing: amax / 7 of each group, or with zero points (max - min) / 15, 0 being between."""
    return _scaled(*_range(weight.float().unflatten(1, (-1, form.group)), form), 1.0, form)


def choose_grid(
    weight: torch.Tensor, moments: torch.Tensor, form: GridForm, ratios: tuple[float, ...] = CLIP_RATIOS
) -> Grid:
    """Of the widest grid times each ratio, for each group the one with the least output error of the group alone.

    The error is measured by the group's block of `moments` [in, in], the mean of x x^T.
    """
    group = form.group
    groups = weight.float().unflatten(1, (-1, group))
    blocks = torch.stack([moments[i : i + group, i : i + group] for i in range(0, len(moments), group)])
    low, high = _range(groups, form)
    chosen = _scaled(low, high, ratios[0], form)
    best = torch.full_like(chosen.scales, torch.inf)
    for ratio in ratios:
        tried = _scaled(low, high, ratio, form)
        error = tried.dequantized(tried.nearest(groups)).sub_(groups)
        # [groups, out, group] x [groups, group, group]
        loss = (torch.matmul(error.transpose(0, 1), blocks) * error.transpose(0, 1)).sum(-1).T
        chosen, best = chosen.better(tried, loss < best), torch.minimum(loss, best)
    return chosen


def round_to_grid(weight: torch.Tensor, grid: Grid) -> QuantizedWeight:
    """The nearest value of each weight [out, in]."""
    groups = weight.float().unflatten(1, (grid.scales.shape[1], -1))
    return QuantizedWeight(grid.nearest(groups).flatten(1).to(torch.int8), grid.scales, grid.zeros)


def _range(groups: torch.Tensor, form: GridForm) -> tuple[torch.Tensor, torch.Tensor]:
    """What the widest grid reaches from and to, in each group."""
    if form.zero_points:
        return groups.amin(-1).clamp_(max=0.0), groups.amax(-1).clamp_(min=0.0)
    amax = groups.abs().amax(-1)
    return -amax, amax


def _scaled(low: torch.Tensor, high: torch.Tensor, ratio: float, form: GridForm) -> Grid:
    steps = (high - low) / (HIGHEST - LOWEST) if form.zero_points else high / INT4_MAX
    scales = (steps * ratio).to(form.dtype).float()
    scales = torch.where(scales > 0, scales, 1.0)
    if not form.zero_points:
        return Grid(scales)
    return Grid(scales, (LOWEST - low * ratio / scales).round_().clamp_(LOWEST, HIGHEST))
