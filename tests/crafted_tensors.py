"""Rank tensors in every form of linear layer, quantized here by code that shares nothing with the package.

Conversion quantizes symmetrically and in the input's own order; zero points, act-order and fp8 rows come from
checkpoints that others quantized. Here each is made from a 16-bit rank tensor, with the weight that it stands for.
"""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

import torch

from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import LinearForm, Precision
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.rank_tensors import Linear, RankPlan
from trtbuild.checkpoints.shards import fill_all
from trtbuild.checkpoints.source import CheckpointSource

Weights = dict[str, torch.Tensor]
# Static fp8 activations saturate here.
ACTIVATION_AMAX = 6.0


@dataclass(frozen=True)
class CraftedRanks:
    """tensors: of each rank, as a rank file has them; exact: the same, each matrix as the float32 it stands for."""

    plans: list[RankPlan]
    tensors: list[Weights]
    exact: list[Weights]


def craft_ranks(source: CheckpointSource, layout: Layout, forms: dict[str, LinearForm]) -> CraftedRanks:
    """A layer has the form of the first key of `forms` that its global name contains, or 16 bit."""
    config = source.config
    plain = [plan_rank(config, rank, Precision("bf16", "bf16")) for rank in layout.ranks()]
    names = [linear.global_name for plan in plain for linear in plan.linears]
    chosen = {name: next((form for key, form in forms.items() if key in name), LinearForm("bf16")) for name in names}
    plans = [plan_rank(config, rank, Precision("auto", "bf16").with_modules(chosen)) for rank in layout.ranks()]
    tensors, exact = fill_all(plain, source.tensor), []
    for plan, rank in zip(plans, tensors, strict=True):
        exact.append(dict(rank))
        for linear in plan.linears:
            stored, meant = _quantized(linear, rank[f"{linear.name}.weight"].float())
            rank |= {f"{linear.name}.{part}": tensor for part, tensor in stored.items()}
            exact[-1][f"{linear.name}.weight"] = meant
        assert {name: list(tensor.shape) for name, tensor in rank.items()} == {
            spec.name: list(spec.shape) for spec in plan.tensors()
        }
    return CraftedRanks(plans, tensors, exact)


def _quantized(linear: Linear, weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
    """The rank tensors of one layer, and the float32 weight that they stand for; weight [..., out, in]."""
    form = linear.form
    if form.format == "bf16":
        return {"weight": weight.bfloat16()}, weight
    if form.format == "int4":
        return _int4(linear, weight)
    if form.format == "int8":
        scale = weight.abs().amax(-1, keepdim=True) / 127
        values = (weight / scale).round()
        return {"weight": values.to(torch.int8), "per_channel_scale": scale.squeeze(-1)}, values * scale
    dims = (-1,) if form.format == "fp8-dynamic" or form.row_scales else (-2, -1)
    scale = weight.abs().amax(dims, keepdim=True) / 448
    values = (weight / scale).to(torch.float8_e4m3fn)
    if form.format == "fp8-dynamic":
        return {"weight": values, "per_channel_scale": scale.squeeze(-1)}, values.float() * scale
    stack = weight.shape[:-2]
    parts = {"weight": values, "weights_scaling_factor": scale.reshape(*stack, -1)}
    return parts | {"activation_scaling_factor": torch.tensor([ACTIVATION_AMAX / 448])}, values.float() * scale


def _int4(linear: Linear, weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
    generator = torch.Generator().manual_seed(crc32(linear.global_name.encode()))
    order = torch.randperm(linear.in_features, generator=generator)
    order = order if linear.form.order else torch.arange(linear.in_features)
    groups = weight[..., order].unflatten(-1, (-1, linear.group_size or 1))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if linear.form.zeros:
        scale = ((high - low) / 15).bfloat16().float()
        zero_point = (-8 - low / scale).round().clamp(-8, 7)
    else:
        scale = (torch.maximum(high, -low) / 7).bfloat16().float()
        zero_point = torch.zeros_like(scale)
    values = (groups / scale + zero_point).round().clamp(-8, 7)
    offset = -(zero_point * scale).bfloat16().float()
    meant = torch.empty_like(weight)
    meant[..., order] = (values * scale + offset).flatten(-2)
    nibbles = values.flatten(-2).int() & 15
    parts = {
        "weight": (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).to(torch.uint8),
        "weights_scaling_factor": scale.squeeze(-1).bfloat16(),
    }
    if linear.form.zeros:
        parts["zero"] = offset.squeeze(-1).bfloat16()
    if linear.form.order:
        parts["input_order"] = order.int()
    return parts, meant
