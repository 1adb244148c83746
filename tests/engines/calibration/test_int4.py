"""Clipping and error compensation against brute force and the textbook form of GPTQ."""

from __future__ import annotations

import pytest
import torch

from trtbuild.engines.calibration import int4
from trtbuild.engines.calibration.int4 import (
    CLIP_RATIOS,
    SecondMoments,
    choose_scales,
    compensate,
    largest_scales,
    permute,
    round_to_scales,
    unit_upper_factor,
)

WIDTH, ROWS, GROUP = 160, 48, 32


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


def test_each_group_gets_the_scale_with_the_least_error(weight: torch.Tensor, moments: torch.Tensor) -> None:
    found = choose_scales(weight, moments, GROUP, torch.bfloat16)
    amax = weight.unflatten(1, (-1, GROUP)).abs().amax(-1)
    for row, group in ((0, 0), (7, 2), (31, 4)):
        part = slice(group * GROUP, (group + 1) * GROUP)
        losses = {}
        for ratio in CLIP_RATIOS:
            scale = (amax[row, group] / 7 * ratio).bfloat16().float()
            error = (weight[row, part] / scale).round().clamp(-8, 7) * scale - weight[row, part]
            losses[float(scale)] = float(error @ moments[part, part] @ error)
        best = min(losses, key=losses.__getitem__)
        assert losses[float(found[row, group])] == pytest.approx(losses[best], rel=1e-4)
    # Clipping gains, on the whole.
    clipped, unclipped = (
        output_error(weight, round_to_scales(weight, scales).dequantize(), moments)
        for scales in (found, largest_scales(weight, GROUP, torch.bfloat16))
    )
    assert clipped < 0.9 * unclipped


def textbook_gptq(weight: torch.Tensor, scales: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """Algorithm 1 of arXiv 2210.17323 with the order of falling diagonal, in float64, one column at a time."""
    order = moments.diagonal().argsort(descending=True)
    hessian = moments[order][:, order].double()
    hessian += int4.DAMPING * hessian.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64)
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    rest, values = weight[:, order].double().clone(), torch.empty(ROWS, WIDTH, dtype=torch.int8)
    for k in range(WIDTH):
        scale = scales[:, int(order[k]) // GROUP].double()
        rounded = (rest[:, k] / scale).round().clamp(-8, 7)
        values[:, k] = rounded.to(torch.int8)
        error = (rest[:, k] - rounded * scale) / inverse[k, k]
        rest[:, k + 1 :] -= error[:, None] * inverse[k, k + 1 :]
    natural = torch.empty_like(values)
    natural[:, order] = values
    return natural


def test_compensation_is_gptq(weight: torch.Tensor, moments: torch.Tensor) -> None:
    scales = choose_scales(weight, moments, GROUP, torch.bfloat16)
    found, expected = compensate(weight, scales, moments.clone()), textbook_gptq(weight, scales, moments)
    # A tie that falls otherwise in float32 changes what comes after it in its row.
    assert float((found.values == expected).float().mean()) > 0.99
    plain = round_to_scales(weight, scales)
    assert output_error(weight, found.dequantize(), moments) < 0.6 * output_error(weight, plain.dequantize(), moments)


def test_without_correlation_there_is_nothing_to_compensate(weight: torch.Tensor) -> None:
    scales = largest_scales(weight, GROUP, torch.bfloat16)
    found = compensate(weight, scales, torch.diag(torch.rand(WIDTH) + 0.5))
    assert torch.equal(found.values, round_to_scales(weight, scales).values)


@pytest.mark.parametrize("moments", [torch.zeros(WIDTH, WIDTH), torch.ones(WIDTH, WIDTH), torch.eye(WIDTH) * 1e-30])
def test_degenerate_inputs_give_finite_values(weight: torch.Tensor, moments: torch.Tensor) -> None:
    scales = choose_scales(weight, moments, GROUP, torch.float16)
    found = compensate(weight, scales, moments.clone())
    assert bool(found.dequantize().isfinite().all())
    assert float((found.dequantize() - weight).abs().max()) < 2 * float(weight.abs().max())


def test_rows_of_zeros() -> None:
    weight = torch.zeros(4, WIDTH)
    found = compensate(weight, choose_scales(weight, torch.eye(WIDTH), GROUP, torch.bfloat16), torch.eye(WIDTH))
    assert not found.values.any() and bool((found.scales == 1).all())


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
