"""Scales of a quantized source in the engine's 16-bit type: kept within a rounding of bfloat16, or refused by name."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub_packing import Codes, pack_compressed, quantize_checkpoint, random_codes

from trtbuild.checkpoints.kept_precision import kept_precision
from trtbuild.checkpoints.kept_rows import keep_rows
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import LinearForm, Precision
from trtbuild.checkpoints.quantization import QuantizedWeight, unpack_int4
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.rank_tensors import Linear
from trtbuild.checkpoints.shards import fill_from
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.errors import Refused

INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "all": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": True}}
    },
}


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Linear:
    """A layer of 64 inputs with zero points, in groups of 16, whose scales are float16."""
    directory = tmp_path_factory.mktemp("c")
    quantize_checkpoint(directory, INT4, pack_compressed, lambda shape, name: random_codes(shape, 16, 0, zeros=False))
    source = CheckpointSource.open(str(directory))
    precision = Precision("int4", "fp16").with_modules(
        {name: replace(form, zeros=True) for name, form in kept_precision(source, "fp16").modules}
    )
    [found] = [x for x in plan_rank(source.config, Layout().rank(0), precision).linears if "layers.0.mlp.fc" in x.name]
    assert (found.group_size, found.form) == (16, LinearForm("int4", 16, zeros=True))
    return found


def kept(linear: Linear, scale: float, *, value: int = 3, zero: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """The first group's stored scale and zero of two rows, of which the second has four ordinary groups."""
    scales = torch.full((2, 4), 0.5, dtype=torch.float32)
    scales[0, 0] = scale
    values = torch.full((2, 64), value, dtype=torch.int8)
    block = QuantizedWeight(values, scales, torch.full((2, 4), zero, dtype=torch.int8))
    rows = keep_rows(block, slice(0, 2), None, linear, "layers.0.gate")
    assert torch.equal(unpack_int4(rows.tensors["weight"]), values)
    assert rows.tensors["weights_scaling_factor"][1].tolist() == [0.5] * 4
    assert rows.tensors["zero"][1].tolist() == [-0.5 * zero] * 4
    return rows.tensors["weights_scaling_factor"][0, 0], rows.tensors["zero"][0, 0]


@pytest.mark.parametrize("scale", [1.0, 0.0123, 6.2e-5, 2.0**-20, 65504.0])
def test_scales_that_the_type_holds_are_kept(linear: Linear, scale: float) -> None:
    stored, zero = kept(linear, scale)
    assert stored.dtype == torch.float16
    assert float(stored) == pytest.approx(scale, rel=2**-11)
    assert float(zero) == pytest.approx(-scale, rel=2**-11)


@pytest.mark.parametrize("scale", [65520.0, 3e38, 2.9e-8, 1e-30, 3.3 * 2.0**-24])
def test_what_overflows_underflows_or_loses_its_digits_is_refused(linear: Linear, scale: float) -> None:
    with pytest.raises(Refused, match=re.escape(f"layers.0.gate: a scale of its int4 groups is {scale:.4g}")):
        kept(linear, scale)


def test_a_zero_point_may_overflow_where_the_scale_does_not(linear: Linear) -> None:
    assert float(kept(linear, 20000.0, zero=2)[1]) == -40000
    with pytest.raises(Refused, match=r"layers\.0\.gate: a scale"):
        kept(linear, 20000.0, zero=7)


def test_a_group_of_zeros_may_have_any_scale_but_an_infinite_one(linear: Linear) -> None:
    """Tools store the smallest number that they know for it."""
    assert float(kept(linear, 1e-30, value=1, zero=1)[0]) == 0
    with pytest.raises(Refused, match="a scale"):
        kept(linear, 3e38, value=1, zero=1)


def test_a_checkpoint_with_bf16_scales_in_fp16(tmp_path: Path) -> None:
    """As far as the files: the same scales pass in the checkpoint's own type."""

    def tiny_scale(shape: tuple[int, int], name: str) -> Codes:
        codes = random_codes(shape, 16, len(name), zeros=False, dtype=torch.bfloat16)
        if "v_proj" in name:
            codes.scales[5, 1] = 1e-9
        return codes

    made = quantize_checkpoint(tmp_path / "c", INT4, pack_compressed, tiny_scale)
    source = CheckpointSource.open(str(tmp_path / "c"))
    plans = [[plan_rank(source.config, Layout().rank(0), kept_precision(source, dtype))] for dtype in ("fp16", "bf16")]
    with pytest.raises(Refused, match=r"layers\.0\.v: a scale of its int4 groups is 9\.968e-10, and float16 holds"):
        fill_from(plans[0], source)
    [tensors] = fill_from(plans[1], source)
    own = torch.cat([made[f"model.layers.0.self_attn.{part}_proj"].scales for part in "qkv"])
    assert torch.equal(tensors["transformer.layers.0.attention.qkv.weights_scaling_factor"], own)
