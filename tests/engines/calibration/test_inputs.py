"""Weighted tokens: means, and a sample that stands for all of them."""

from __future__ import annotations

import pytest
import torch

from trtbuild.engines.calibration.inputs import Inputs

WIDTH = 24


@pytest.fixture
def inputs() -> Inputs:
    """Two parts, one with a weight for each token; more tokens than one chunk."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(2500, WIDTH, generator=generator).bfloat16() * torch.arange(1, WIDTH + 1)
    second = torch.randn(300, WIDTH, generator=generator).bfloat16()
    return Inputs([(first, torch.rand(2500, generator=generator)), (second, 0.25)])


def test_means_are_weighted(inputs: Inputs) -> None:
    (first, weights), (second, weight) = inputs.parts
    wide = torch.cat([first, second]).double()
    each = torch.cat([torch.as_tensor(weights), torch.full((300,), float(weight))]).double()
    moments = (wide * each[:, None]).T @ wide / each.sum()
    # One more token of the mean size along each channel, beside as many as tell as much as these.
    moments += torch.eye(WIDTH) * moments.diagonal().mean() * WIDTH * each.square().sum() / each.sum().square()
    assert torch.allclose(inputs.moments().double(), moments, rtol=1e-4, atol=1e-3)
    assert torch.allclose(inputs.magnitude().double(), (wide.abs() * each[:, None]).sum(0) / each.sum(), rtol=1e-4)


def test_a_sample_has_the_same_second_moments_and_is_always_the_same(inputs: Inputs) -> None:
    sample = inputs.sample()
    assert len(sample) == 1024 and torch.equal(sample, inputs.sample())
    each = [torch.as_tensor(weight).expand(len(x)).unsqueeze(-1) for x, weight in inputs.parts]
    squares = sum((x.float().square() * w).sum(0) for (x, _), w in zip(inputs.parts, each, strict=True))
    assert torch.allclose(sample.square().sum(0) * 2800 / 1024, torch.as_tensor(squares), rtol=0.35)


def test_tokens_without_weight_count_for_nothing() -> None:
    tokens = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(2))
    alone, beside = Inputs([(tokens, 1.0)]), Inputs([(tokens, 1.0), (torch.ones(9, WIDTH), 0.0)])
    assert torch.allclose(alone.moments(), beside.moments(), atol=1e-6)
    assert torch.allclose(alone.magnitude(), beside.magnitude(), atol=1e-6)
    assert float(beside.sample().square().sum()) == pytest.approx(float(tokens.square().sum()), rel=1e-5)
