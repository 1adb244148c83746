"""Quantized values and scales: round trips, exact formulas, packing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trtbuild.checkpoints.precision import INT4_GROUPS, int4_group
from trtbuild.checkpoints.quantization import (
    QuantizedWeight,
    fp8_scale,
    pack_int4,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
    unpack_int4,
)
from trtbuild.errors import Refused

SEEDS = st.integers(0, 2**31)
MAGNITUDES = st.sampled_from([1e-6, 1e-3, 0.05, 1.0, 300.0])


def weight_of(seed: int, magnitude: float, rows: int = 6, columns: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * magnitude
    weight[seed % rows] = 0
    return weight.bfloat16()


@given(st.lists(st.integers(-8, 7), min_size=2, max_size=40).filter(lambda v: len(v) % 2 == 0))
def test_nibbles_pack_low_first_and_back(values: list[int]) -> None:
    packed = pack_int4(torch.tensor([values], dtype=torch.int8))
    assert packed.dtype == torch.uint8
    assert packed[0].tolist() == [
        (low & 15) + 16 * (high & 15) for low, high in zip(values[::2], values[1::2], strict=True)
    ]
    assert unpack_int4(packed)[0].tolist() == values


def test_every_byte_unpacks_to_the_nibbles_that_pack_it() -> None:
    packed = torch.arange(256, dtype=torch.uint8).reshape(2, 4, 32)
    values = unpack_int4(packed)
    assert values.shape == (2, 4, 64)
    assert (int(values.min()), int(values.max())) == (-8, 7)
    assert torch.equal(pack_int4(values), packed)


@given(SEEDS, MAGNITUDES)
def test_int8_is_within_half_a_step_of_each_row(seed: int, magnitude: float) -> None:
    weight = weight_of(seed, magnitude)
    amax = weight.abs().amax(1)
    quantized = quantize_int8(weight, amax)
    assert quantized.values.dtype == torch.int8
    assert quantized.values.int().abs().max() == 127
    step = np.where(amax.float().numpy() > 0, amax.float().numpy() / np.float32(127), np.float32(1))
    assert quantized.scales.tolist() == step.tolist()
    assert (quantized.dequantize() - weight.float()).abs().amax(1).le(torch.tensor(step) * 0.5001).all()


@given(SEEDS, MAGNITUDES)
def test_int8_of_a_slice_is_a_slice_of_the_whole(seed: int, magnitude: float) -> None:
    weight = weight_of(seed, magnitude)
    amax = weight.abs().amax(1)
    assert torch.equal(quantize_int8(weight[:, 16:32], amax).values, quantize_int8(weight, amax).values[:, 16:32])


@given(SEEDS, MAGNITUDES, st.sampled_from([16, 32, 64]), st.sampled_from([torch.bfloat16, torch.float16]))
def test_int4_is_within_half_a_step_of_each_group(seed: int, magnitude: float, group: int, dtype: torch.dtype) -> None:
    weight = weight_of(seed, magnitude)
    quantized = quantize_int4(weight, group, dtype)
    assert quantized.scales.dtype == dtype
    assert quantized.scales.shape == (6, 64 // group)
    assert int(quantized.values.min()) >= -8
    assert int(quantized.values.max()) <= 7
    scales = quantized.scales.float().repeat_interleave(group, 1)
    assert torch.equal(quantized.dequantize(), quantized.values.float() * scales)
    # bf16 rounds the scale by up to 2^-9, which moves the largest value, 7 steps out, by 0.014 steps.
    error = (quantized.dequantize() - weight.float()).abs()
    subnormal = scales < torch.finfo(dtype).tiny
    assert (error <= scales * 0.52).logical_or(subnormal).all()


@given(SEEDS, MAGNITUDES, st.floats(1.0, 8.0))
def test_fp8_is_within_half_an_ulp_of_the_scaled_weight(seed: int, magnitude: float, headroom: float) -> None:
    weight = weight_of(seed, magnitude)
    amax = float(np.float32(float(weight.abs().max()) * headroom))
    quantized = quantize_fp8(weight, amax)
    assert quantized.values.dtype == torch.float8_e4m3fn
    assert quantized.scales.tolist() == [float(np.float32(amax) / np.float32(448))]
    scaled = weight.float() / quantized.scales
    ulp = torch.exp2(torch.floor(torch.log2(scaled.abs().clamp(min=2.0**-6))) - 3)
    assert ((quantized.values.float() - scaled).abs() <= ulp / 2).all()
    assert torch.equal(quantized.dequantize(), quantized.values.float() * quantized.scales)


def test_fp8_saturates_and_never_overflows_to_nan() -> None:
    quantized = quantize_fp8(torch.tensor([[500.0, -500.0, 1.0]]), 100.0)
    assert quantized.values.float().tolist()[0][:2] == [448.0, -448.0]
    assert quantized.dequantize()[0, 0] == pytest.approx(100.0)


def test_an_all_zero_matrix_has_unit_scales() -> None:
    zero = torch.zeros(4, 32, dtype=torch.bfloat16)
    for quantized in (
        quantize_int8(zero, zero.amax(1)),
        quantize_int4(zero, 16, torch.float16),
        quantize_fp8(zero, 0.0),
    ):
        assert quantized.scales.float().unique().tolist() == [1.0]
        assert quantized.dequantize().count_nonzero() == 0
    assert fp8_scale(0.0) == 1.0


@pytest.mark.parametrize("scales", [torch.tensor([0.5]), torch.full((2,), 0.5), torch.full((2, 2), 0.5)])
def test_dequantize_takes_scales_of_a_tensor_a_row_or_a_group(scales: torch.Tensor) -> None:
    values = torch.arange(-4, 4, dtype=torch.int8).reshape(2, 4)
    assert torch.equal(QuantizedWeight(values, scales).dequantize(), values.float() / 2)


def test_one_row_has_one_scale() -> None:
    """[1] is both a tensor's and a single row's scale."""
    assert QuantizedWeight(torch.tensor([[2, 4]], dtype=torch.int8), torch.tensor([0.25])).dequantize().tolist() == [
        [0.5, 1.0]
    ]


@given(st.integers(1, 4096))
def test_int4_takes_the_largest_group_that_divides(width: int) -> None:
    fitting = [group for group in (128, 64, 32, 16) if width % group == 0]
    if fitting:
        assert int4_group(width, "x") == max(fitting)
    else:
        with pytest.raises(
            Refused, match=rf"input of layers\.7\.mlp\.proj is {width} wide .*--tp.*--moe-ep.*int8"
        ) as refusal:
            int4_group(width, "layers.7.mlp.proj")
        assert refusal.value.exit_code == 3


def test_groups_are_those_that_the_builder_compiles() -> None:
    assert INT4_GROUPS == (128, 64, 32, 16)


@pytest.mark.parametrize(("amax", "expected"), [(448.0, 1.0), (1.0, 1 / 448), (math.pi, math.pi / 448)])
def test_fp8_scale_is_amax_over_448_in_float32(amax: float, expected: Any) -> None:
    assert fp8_scale(amax) == float(np.float32(amax) / np.float32(448))
    assert fp8_scale(amax) == pytest.approx(expected, rel=1e-7)


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_a_checkpoints_own_fp8_scale_comes_back(scale: float) -> None:
    assert fp8_scale(scale * 448) == scale
