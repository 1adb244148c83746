"""Clipping, zero points and error compensation against brute force and the textbook form of GPTQ."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trtbuild.engines.calibration import int4
from trtbuild.engines.calibration.int4 import SecondMoments, compensate, permute, unit_upper_factor
from trtbuild.engines.calibration.int4_grid import (
    CLIP_RATIOS,
    Grid,
    GridForm,
    choose_grid,
    round_to_grid,
    widest_grid,
)

WIDTH, ROWS, GROUP = 160, 48, 32
SYMMETRIC = GridForm(GROUP, torch.bfloat16)
ASYMMETRIC = GridForm(GROUP, torch.bfloat16, zero_points=True)
both_forms = pytest.mark.parametrize("form", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])


def output_error(weight: torch.Tensor, found: torch.Tensor, moments: torch.Tensor) -> float:
    """tr(E H E^T): the mean squared error of the layer's output, summed over its rows."""
    error = found - weight
    return float(((error @ moments) * error).sum())


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    """Correlated inputs of uneven size."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5 + torch.eye(WIDTH)
    return torch.randn(700, WIDTH, generator=generator) @ mixing * torch.rand(WIDTH, generator=generator)


@pytest.fixture(scope="module")
def moments(tokens: torch.Tensor) -> torch.Tensor:
    found = SecondMoments(WIDTH, torch.device("cpu"))
    found.add(tokens, torch.ones(len(tokens)))
    return found.matrix()


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(4))


def test_second_moments_are_weighted_means(tokens: torch.Tensor) -> None:
    found = SecondMoments(WIDTH, torch.device("cpu"))
    found.add(tokens[:300], torch.ones(300))
    found.add(tokens[300:], torch.full((400,), 0.25))
    weights = torch.cat([torch.ones(300), torch.full((400,), 0.25)]).double()
    wide = tokens.double()
    expected = (wide * weights[:, None]).T @ wide / weights.sum()
    assert torch.allclose(found.matrix().double(), expected, atol=1e-5)


def test_blocks_of_the_matrix_fit_together() -> None:
    wide = torch.randn(40, 2500, generator=torch.Generator().manual_seed(5))
    found = SecondMoments(2500, torch.device("cpu"))
    found.add(wide, torch.ones(40))
    assert torch.allclose(found.matrix(), wide.T @ wide / 40, atol=1e-4)


def grids_by_hand(group: torch.Tensor, form: GridForm) -> list[tuple[float, float]]:
    """(scale, zero point) for each ratio of clipping, of one group of weights."""
    low, high = min(float(group.min()), 0.0), max(float(group.max()), 0.0)
    step = (high - low) / 15 if form.zero_points else float(group.abs().max()) / 7
    scales = [float(torch.tensor(step * ratio).bfloat16()) for ratio in CLIP_RATIOS]
    if not form.zero_points:
        return [(scale, 0.0) for scale in scales]
    return [(scale, float(round(-8 - low * r / scale))) for r, scale in zip(CLIP_RATIOS, scales, strict=True)]


@both_forms
def test_each_group_gets_the_grid_with_the_least_error(
    weight: torch.Tensor, moments: torch.Tensor, form: GridForm
) -> None:
    found = choose_grid(weight, moments, form)
    for row, group in ((0, 0), (7, 2), (31, 4)):
        part = slice(group * GROUP, (group + 1) * GROUP)
        losses = {}
        for scale, zero in grids_by_hand(weight[row, part], form):
            rounded = (weight[row, part] / scale + zero).round().clamp(-8, 7)
            error = (rounded - zero) * scale - weight[row, part]
            losses[scale, zero] = float(error @ moments[part, part] @ error)
        best = min(losses, key=losses.__getitem__)
        chosen = (float(found.scales[row, group]), 0.0 if found.zeros is None else float(found.zeros[row, group]))
        assert losses[chosen] == pytest.approx(losses[best], rel=1e-4)
    # Clipping gains, on the whole.
    clipped, unclipped = (
        output_error(weight, round_to_grid(weight, grid).dequantize(), moments)
        for grid in (found, widest_grid(weight, form))
    )
    assert clipped < 0.9 * unclipped


@pytest.mark.parametrize("shift", [-9.0, -0.7, 0.0, 0.7, 9.0])
def test_a_zero_point_is_a_value_and_zero_stays_zero(weight: torch.Tensor, shift: float) -> None:
    grid = widest_grid(weight + shift, ASYMMETRIC)
    assert grid.zeros is not None and bool(((grid.zeros >= -8) & (grid.zeros <= 7)).all())
    assert torch.equal(grid.zeros, grid.zeros.round())
    found = round_to_grid(weight + shift, grid).dequantize()
    # Half a step, and as much where the zero point itself was rounded.
    error = (found - weight - shift).abs().unflatten(1, (-1, GROUP)) / grid.scales.unsqueeze(-1)
    assert float(error.max()) < 1.1
    assert not round_to_grid(torch.zeros_like(weight), grid).dequantize().any()


def test_zero_points_gain_where_groups_lie_to_one_side(weight: torch.Tensor, moments: torch.Tensor) -> None:
    aside = weight + 1
    plain, shifted = (
        output_error(aside, round_to_grid(aside, widest_grid(aside, form)).dequantize(), moments)
        for form in (SYMMETRIC, ASYMMETRIC)
    )
    assert shifted < 0.6 * plain


def textbook_gptq(weight: torch.Tensor, grid: Grid, moments: torch.Tensor) -> torch.Tensor:
    """Algorithm 1 of arXiv 2210.17323 with the order of falling diagonal, in float64, one column at a time."""
    order = moments.diagonal().argsort(descending=True)
    hessian = moments[order][:, order].double()
    hessian += int4.DAMPING * hessian.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64)
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    rest, values = weight[:, order].double().clone(), torch.empty(ROWS, WIDTH, dtype=torch.int8)
    for k in range(WIDTH):
        scale = grid.scales[:, int(order[k]) // GROUP].double()
        zero = scale * 0 if grid.zeros is None else grid.zeros[:, int(order[k]) // GROUP].double()
        rounded = (rest[:, k] / scale + zero).round().clamp(-8, 7)
        values[:, k] = rounded.to(torch.int8)
        error = (rest[:, k] - (rounded - zero) * scale) / inverse[k, k]
        rest[:, k + 1 :] -= error[:, None] * inverse[k, k + 1 :]
    natural = torch.empty_like(values)
    natural[:, order] = values
    return natural


@both_forms
def test_compensation_is_gptq(weight: torch.Tensor, moments: torch.Tensor, form: GridForm) -> None:
    grid = choose_grid(weight, moments, form)
    found, expected = compensate(weight, grid, moments.clone()), textbook_gptq(weight, grid, moments)
    # A tie that falls otherwise in float32 changes what comes after it in its row.
    assert float((found.values == expected).float().mean()) > 0.99
    plain = round_to_grid(weight, grid)
    assert output_error(weight, found.dequantize(), moments) < 0.6 * output_error(weight, plain.dequantize(), moments)


@both_forms
def test_without_correlation_there_is_nothing_to_compensate(weight: torch.Tensor, form: GridForm) -> None:
    grid = widest_grid(weight, form)
    found = compensate(weight, grid, torch.diag(torch.rand(WIDTH) + 0.5))
    assert torch.equal(found.values, round_to_grid(weight, grid).values)


@both_forms
@pytest.mark.parametrize("moments", [torch.zeros(WIDTH, WIDTH), torch.ones(WIDTH, WIDTH), torch.eye(WIDTH) * 1e-30])
def test_degenerate_inputs_give_finite_values(weight: torch.Tensor, moments: torch.Tensor, form: GridForm) -> None:
    found = compensate(weight, choose_grid(weight, moments, replace(form, dtype=torch.float16)), moments.clone())
    assert bool(found.dequantize().isfinite().all())
    assert float((found.dequantize() - weight).abs().max()) < 2 * float(weight.abs().max())


@both_forms
def test_rows_of_zeros(form: GridForm) -> None:
    weight = torch.zeros(4, WIDTH)
    found = compensate(weight, choose_grid(weight, torch.eye(WIDTH), form), torch.eye(WIDTH))
    assert not found.dequantize().any() and bool((found.scales == 1).all())


def test_a_matrix_is_permuted_where_it_is() -> None:
    matrix = torch.randn(1300, 1300, generator=torch.Generator().manual_seed(6))
    matrix = matrix + matrix.T
    order = torch.randperm(1300, generator=torch.Generator().manual_seed(7))
    expected = matrix[order][:, order]
    permute(matrix, order)
    assert torch.equal(matrix, expected)


def test_a_factor_of_several_panels_is_that_of_the_whole_matrix() -> None:
    tokens = torch.randn(2600, 1300, generator=torch.Generator().manual_seed(8)).double()
    matrix = tokens.T @ tokens / len(tokens)
    damped = matrix + int4.DAMPING * matrix.diagonal().mean() * torch.eye(1300, dtype=torch.float64)
    upper = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    found = unit_upper_factor(matrix.float()).triu(1) + torch.eye(1300)
    assert float((found - upper / upper.diagonal()).abs().max()) < 1e-5


def test_a_matrix_that_is_not_positive_definite_is_damped_until_it_is() -> None:
    """A second try begins with the matrix as it was, though the first has written over half of it."""
    generator = torch.Generator().manual_seed(9)
    tokens = torch.randn(900, 1300, generator=generator)
    matrix = tokens.T @ tokens / 900 - 0.05 * torch.eye(1300)
    expected = None
    for damping in (0.01, 0.1):
        damped = matrix.double() + damping * matrix.diagonal().mean() * torch.eye(1300)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        expected = None if int(failed) else lower.flip(0, 1)
    assert expected is not None
    found = unit_upper_factor(matrix.clone()).triu(1) + torch.eye(1300)
    assert float((found - expected / expected.diagonal()).abs().max()) < 1e-4
