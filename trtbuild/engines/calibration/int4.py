"""Calibrated int4: scales that clip where the layer's output gains by it, and error compensation.

The error of a linear layer's output over the calibration tokens is tr(E H E^T), for the weight's error E [out, in] and
the second moments H = X^T X [in, in] of the inputs. Everything here works on H alone; no activations are kept.
"""

from __future__ import annotations

import torch

from trtbuild.checkpoints.quantization import INT4_MAX, QuantizedWeight

# Shares of amax / 7 that are tried as a group's scale. 7/8 uses the value -8 in full.
CLIP_RATIOS = tuple(1.0 - 0.05 * i for i in range(10))
# Added to the diagonal of H, as a share of its mean: directions that the calibration text does not show.
DAMPING = 0.01
# Columns that are compensated at once, and those of the loop inside.
_BLOCK = 128
_INNER = 32


class SecondMoments:
    """The sum of x x^T over tokens, H [in, in] in float32, and the mean of |x| [in]."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.sum = torch.zeros(width, width, device=device)
        self.magnitude = torch.zeros(width, device=device)
        self.weight = 0.0

    def add(self, x: torch.Tensor, weight: float = 1.0) -> None:
        """Count tokens x [tokens, in], each with this weight. Only the upper block triangle is kept up."""
        x = x.float()
        for start in range(0, len(self.sum), 1024):
            stop = min(start + 1024, len(self.sum))
            self.sum[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:], alpha=weight)
        self.magnitude += x.abs().sum(0) * weight
        self.weight += weight * len(x)

    def matrix(self) -> torch.Tensor:
        """Mean of x x^T over the tokens, symmetric. It takes over the sum: nothing can be added after it."""
        for start in range(0, len(self.sum), 1024):
            block = self.sum[start : start + 1024, start : start + 1024]
            block.copy_(block.triu() + block.triu(1).T)
            self.sum[start + 1024 :, start : start + 1024] = self.sum[start : start + 1024, start + 1024 :].T
        return self.sum.div_(max(self.weight, 1e-12))


def largest_scales(weight: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    """Scales that clip nothing: amax / 7 of each row and group, [out, in / group], rounded to `dtype`, in float32."""
    amax = weight.float().unflatten(1, (-1, group)).abs().amax(-1)
    scales = (amax / INT4_MAX).to(dtype).float()
    return torch.where(scales > 0, scales, 1.0)


def choose_scales(
    weight: torch.Tensor, moments: torch.Tensor, group: int, dtype: torch.dtype, ratios: tuple[float, ...] = CLIP_RATIOS
) -> torch.Tensor:
    """A scale for each row and group, [out, in / group], rounded to `dtype` and returned in float32.

    Of amax / 7 times each ratio, the one with the least output error of the group alone, by its block of `moments`.
    """
    groups = weight.float().unflatten(1, (-1, group))
    blocks = torch.stack([moments[i : i + group, i : i + group] for i in range(0, len(moments), group)])
    amax = groups.abs().amax(-1) / INT4_MAX
    best = torch.full_like(amax, torch.inf)
    scales = torch.ones_like(amax)
    for ratio in ratios:
        tried = (amax * ratio).to(dtype).float()
        tried = torch.where(tried > 0, tried, 1.0)
        error = (groups / tried.unsqueeze(-1)).round_().clamp_(-8, 7).mul_(tried.unsqueeze(-1)).sub_(groups)
        # [groups, out, group] x [groups, group, group]
        loss = (torch.matmul(error.transpose(0, 1), blocks) * error.transpose(0, 1)).sum(-1).T
        better = loss < best
        best, scales = torch.where(better, loss, best), torch.where(better, tried, scales)
    return scales


def round_to_scales(weight: torch.Tensor, scales: torch.Tensor) -> QuantizedWeight:
    """The nearest value in [-8, 7] of each weight."""
    groups = weight.float().unflatten(1, (scales.shape[1], -1))
    return QuantizedWeight((groups / scales.unsqueeze(-1)).round_().clamp_(-8, 7).flatten(1).to(torch.int8), scales)


def compensate(weight: torch.Tensor, scales: torch.Tensor, moments: torch.Tensor) -> QuantizedWeight:
    """Round column by column, each time moving what was lost to the columns to come (GPTQ, arXiv 2210.17323).

    In the form of QuIP's LDLQ (arXiv 2307.13304), which rounds to the same values without an inverse:
    H = U D U^T with a unit upper triangular U, and column k becomes round(w_k + sum_{i<k} e_i U_ik). Columns go in the
    order of falling H_kk; the groups stay as they are.
    """
    order = moments.diagonal().argsort(descending=True)
    factor = _unit_upper_factor(moments, order)
    group = weight.shape[1] // scales.shape[1]
    # Columns as rows: each is contiguous.
    columns = weight.float().T[order].contiguous()
    steps = scales.T[order // group].contiguous()
    errors, values = torch.empty_like(columns), torch.empty(columns.shape, dtype=torch.int8, device=columns.device)
    for start in range(0, len(columns), _BLOCK):
        stop = min(start + _BLOCK, len(columns))
        target = columns[start:stop].clone()
        target.addmm_(factor[:start, start:stop].T, errors[:start])
        _round_block(target, columns, steps, factor, errors, values, start)
    natural = torch.empty_like(values)
    natural[order] = values
    return QuantizedWeight(natural.T.contiguous(), scales)


def _round_block(
    target: torch.Tensor,
    columns: torch.Tensor,
    steps: torch.Tensor,
    factor: torch.Tensor,
    errors: torch.Tensor,
    values: torch.Tensor,
    start: int,
) -> None:
    """Columns start.. of one block, whose targets hold what earlier blocks lost."""
    size = len(target)
    for inner in range(0, size, _INNER):
        stop = min(inner + _INNER, size)
        for j in range(inner, stop):
            k = start + j
            rounded = (target[j] / steps[k]).round_().clamp_(-8, 7)
            values[k] = rounded
            torch.addcmul(columns[k], rounded, steps[k], value=-1, out=errors[k])
            if j + 1 < stop:
                target[j + 1 : stop].addr_(factor[k, k + 1 : start + stop], errors[k])
        done = slice(start + inner, start + stop)
        target[stop:].addmm_(factor[done, start + stop : start + size].T, errors[done])


def _unit_upper_factor(moments: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """U of H = U D U^T, for H in this order of columns, damped until it is positive definite.

    Two matrices besides H at a time: the largest layer's are what a calibration's memory goes to.
    """
    backwards = order.flip(0)
    damped = moments.index_select(0, backwards).index_select(1, backwards)
    mean = float(moments.diagonal().mean()) or 1.0
    damping = DAMPING
    damped.diagonal().add_(damping * mean)
    while True:
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            break
        damped.diagonal().add_(9 * damping * mean)
        damping *= 10
    del damped
    upper = lower.flip(0, 1)
    return upper.div_(upper.diagonal().clone())
