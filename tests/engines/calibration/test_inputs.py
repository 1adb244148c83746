"""Weighted tokens: means, a sample that stands for all of them, and what a close fit pays attention to."""

from __future__ import annotations

import pytest
import torch

from trtbuild.engines.calibration.inputs import FIRST_COUNTS, LARGEST_SIZE, Inputs, Tokens

WIDTH = 24


@pytest.fixture
def inputs() -> Inputs:
    """Two parts, one with a weight for each token; more tokens than one chunk."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(2500, WIDTH, generator=generator).bfloat16() * torch.arange(1, WIDTH + 1)
    second = torch.randn(300, WIDTH, generator=generator).bfloat16()
    return Inputs([Tokens(first, torch.rand(2500, generator=generator)), Tokens(second, 0.25)])


def test_means_are_weighted(inputs: Inputs) -> None:
    first, second = inputs.parts
    wide = torch.cat([first.x, second.x]).double()
    each = torch.cat([torch.as_tensor(first.weight), torch.full((300,), float(second.weight))]).double()
    moments = (wide * each[:, None]).T @ wide / each.sum()
    assert torch.allclose(inputs.moments(fitted=False).double(), moments, rtol=1e-4, atol=1e-3)
    # One more token of the mean size along each channel, beside as many as tell as much as these.
    moments += torch.eye(WIDTH) * moments.diagonal().mean() * WIDTH * each.square().sum() / each.sum().square()
    assert torch.allclose(inputs.moments().double(), moments, rtol=1e-4, atol=1e-3)
    assert torch.allclose(inputs.magnitude().double(), (wide.abs() * each[:, None]).sum(0) / each.sum(), rtol=1e-4)


def test_a_sample_has_the_same_second_moments_and_is_always_the_same(inputs: Inputs) -> None:
    sample = inputs.sample()
    assert len(sample) == 1024 and torch.equal(sample, inputs.sample())
    squares = sum((part.x.float().square() * part.each().unsqueeze(-1)).sum(0) for part in inputs.parts)
    assert torch.allclose(sample.square().sum(0) * 2800 / 1024, torch.as_tensor(squares), rtol=0.35)


def test_tokens_without_weight_count_for_nothing() -> None:
    tokens = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(2))
    alone, beside = Inputs([Tokens(tokens)]), Inputs([Tokens(tokens), Tokens(torch.ones(9, WIDTH), 0.0)])
    assert torch.allclose(alone.moments(), beside.moments(), atol=1e-6)
    assert torch.allclose(alone.magnitude(), beside.magnitude(), atol=1e-6)
    assert float(beside.sample().square().sum()) == pytest.approx(float(tokens.square().sum()), rel=1e-5)


def test_first_tokens_count_for_many_and_large_ones_for_few() -> None:
    """One direction for each of three kinds of tokens; the ridge is the same along all."""
    tokens = torch.zeros(64, WIDTH)
    tokens[:, 0], tokens[0], tokens[32], tokens[5] = 1.0, 0.0, 0.0, 0.0
    tokens[0, 1], tokens[32, 1], tokens[5, 2] = 1.0, 1.0, 1000.0
    kept = tokens.clone()
    first = torch.arange(64) % 32 == 0
    moments = Inputs([Tokens(tokens, first=first)]).moments()
    assert torch.equal(tokens, kept)
    by_kind = (moments - moments[-1, -1] * torch.eye(WIDTH)).diagonal()[:3]
    expected = torch.tensor([61.0, 2 * FIRST_COUNTS, LARGEST_SIZE])
    assert torch.allclose(by_kind / by_kind.sum(), expected / expected.sum(), rtol=1e-4)
    # What is only chosen, not fitted, sees them as they are.
    plain = Inputs([Tokens(tokens, first=first)]).moments(fitted=False).diagonal()[:3]
    assert torch.allclose(plain * 64, torch.tensor([61.0, 2.0, 1e6]))


def test_an_expert_without_tokens_has_no_moments() -> None:
    nothing = Tokens(torch.zeros(0, WIDTH), torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    assert not Inputs([nothing]).moments().any()
