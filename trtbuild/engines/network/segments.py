"""Cutting one rank's network into segments: `embed`, groups of decoder layers, `head`."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

from trtbuild.checkpoints.model_config import MoeConfig
from trtbuild.checkpoints.precision import LinearForm
from trtbuild.checkpoints.rank_tensors import Linear, RankPlan, TensorSpec

# TensorRT-RTX's compile time grows faster than a plan's depth: about quadratically in conditional experts.
MAX_SEGMENT_LAYERS = 8
MAX_SEGMENT_EXPERTS = 64


@dataclass(frozen=True)
class Segment:
    """A group of consecutive decoder layers (or `embed`, `head`) that is compiled as one plan.

    `first_layer` counts within the pipeline stage, as the rank checkpoint does.
    """

    kind: Literal["embed", "decoder", "head"]
    index: int
    first_layer: int = 0
    num_layers: int = 0

    def checkpoint_name(self, name: str) -> str:
        """The rank checkpoint's name of the segment's weight or layer `name`."""
        if self.kind != "decoder":
            return name if name in ("lm_head", "lm_head.weight") else f"transformer.{name}"
        _, local, rest = name.split(".", 2)
        return f"transformer.layers.{self.first_layer + int(local)}.{rest}"

    def local_name(self, name: str) -> str | None:
        """Inverse of `checkpoint_name`; None where the segment does not use `name`."""
        short = name.removeprefix("transformer.")
        if self.kind == "embed":
            return short if short == "vocab_embedding.weight" else None
        if self.kind == "head":
            return short if short in ("ln_f.weight", "lm_head.weight") else None
        if not short.startswith("layers."):
            return None
        _, layer, rest = short.split(".", 2)
        local = int(layer) - self.first_layer
        return f"layers.{local}.{rest}" if 0 <= local < self.num_layers else None

    def weights(self, plan: RankPlan) -> dict[str, TensorSpec]:
        """Segment-local name -> spec of every rank tensor that the segment reads."""
        named = ((self.local_name(spec.name), spec) for spec in plan.tensors())
        return {name: spec for name, spec in named if name is not None}

    def linears(self, plan: RankPlan) -> dict[str, Linear]:
        """Segment-local name -> the quantizable linear layers of the segment."""
        named = ((self.local_name(linear.name), linear) for linear in plan.linears)
        return {name: linear for name, linear in named if name is not None}


def moe_of(plan: RankPlan, segment: Segment) -> MoeConfig | None:
    """The mixture of experts in a segment's layers, None where they have none; a segment never mixes both kinds."""
    if segment.kind != "decoder" or not plan.config.is_moe(plan.layers[segment.first_layer]):
        return None
    return plan.config.moe


def has_int4(plan: RankPlan, segment: Segment) -> bool:
    """Whether any of the segment's linear layers is int4, which TensorRT-RTX takes as constants only."""
    return any(linear.precision == "int4" for linear in segment.linears(plan).values())


def default_segment_layers(plan: RankPlan, layer: int) -> int:
    """Decoder layers in a segment of `layer`'s kind (global index).

    At most 8, at most 64 experts of a rank, and at most as many layers as the rank has experts.
    """
    if plan.config.moe is None or not plan.config.is_moe(layer):
        return MAX_SEGMENT_LAYERS
    experts = len(plan.layout.experts(plan.config.moe.num_experts))
    # Past about twice as many layers as conditional experts in each, TensorRT-RTX 1.7 finds no fused attention kernel.
    return max(1, min(MAX_SEGMENT_LAYERS, experts, MAX_SEGMENT_EXPERTS // experts))


def cut_into_segments(
    plan: RankPlan, segment_layers: int | None = None, max_bytes: int | None = None, *, only_int4: bool = False
) -> list[Segment]:
    """The chain of segments of one rank, in the order of execution; a segment's layers are all of one kind.

    Without `segment_layers` a segment (with `only_int4`, one that has int4 weights) also holds no more than `max_bytes`
    of weights, or one layer if that has more.
    """
    segments = [Segment("embed", 0)] if plan.layout.is_first_stage else []
    sizes = _layer_bytes(plan) if max_bytes else {}
    kinds = layer_kinds(plan)
    int4 = {int(linear.name.split(".")[2]) for linear in plan.linears if linear.precision == "int4"}
    first = 0
    while first < len(plan.layers):
        depth = segment_layers or default_segment_layers(plan, plan.layers[first])
        if max_bytes and not segment_layers and (first in int4 or not only_int4):
            depth = max(1, min(depth, max_bytes // sizes[first]))
        last = next((i for i in range(first, len(kinds)) if kinds[i] != kinds[first]), len(kinds))
        num_layers = min(depth, last - first)
        segments.append(Segment("decoder", len(segments), first, num_layers))
        first += num_layers
    if plan.layout.is_last_stage:
        segments.append(Segment("head", len(segments)))
    return segments


def _layer_bytes(plan: RankPlan) -> dict[int, int]:
    """Bytes of each decoder layer's weights, by its number in the stage."""
    sizes: dict[int, int] = {}
    for spec in plan.tensors():
        if spec.name.startswith("transformer.layers."):
            layer = int(spec.name.split(".")[2])
            sizes[layer] = sizes.get(layer, 0) + spec.num_bytes
    return sizes


def layer_kinds(plan: RankPlan) -> list[Hashable]:
    """What tells the layers of a stage apart: experts, the attention window, and the forms of the linear layers."""
    forms: dict[int, list[LinearForm]] = {}
    for linear in plan.linears:
        forms.setdefault(int(linear.name.split(".")[2]), []).append(linear.form)
    config = plan.config
    return [
        (config.is_moe(layer), config.window(layer), tuple(forms.get(i, ()))) for i, layer in enumerate(plan.layers)
    ]
