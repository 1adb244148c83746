"""What conversion does at a time, and the record of it.

A unit of work is everything that shares a scale or a source tensor: one linear layer, or one expert of it, over all
ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from trtbuild.checkpoints.quantization import QuantizedWeight, Scratch, StoredWeight
from trtbuild.checkpoints.rank_tensors import Linear, Piece, RankPlan


@dataclass(frozen=True)
class Slice:
    """One piece of one rank tensor: of a plain one of type `dtype`, or of a linear layer's weight."""

    rank: int
    name: str
    dtype: str
    piece: Piece
    linear: Linear | None = None

    @property
    def layer(self) -> tuple[str, int | None] | None:
        """A linear layer's global name and its expert's global index: what shares an fp8 scale."""
        if self.linear is None:
            return None
        expert = None if self.piece.expert is None else self.linear.first_expert + self.piece.expert
        return self.linear.global_name, expert


@dataclass(frozen=True)
class Unit:
    """Slices that are made together; no other unit reads their sources or writes their part of a rank tensor."""

    slices: tuple[Slice, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(piece.piece.source for piece in self.slices))

    @property
    def key(self) -> str:
        return self.slices[0].piece.source


def cut_into_units(plans: list[RankPlan]) -> list[Unit]:
    """All work of a conversion."""
    groups: dict[Any, list[Slice]] = {}
    for rank, plan in enumerate(plans):
        for tensor in plan.plain:
            name, dtype = tensor.spec.name, tensor.spec.dtype
            groups.setdefault((rank, name), []).extend(Slice(rank, name, dtype, piece) for piece in tensor.pieces)
        for linear in plan.linears:
            bias = f"{linear.name}.bias"
            groups[rank, bias] = [Slice(rank, bias, linear.dtype, piece) for piece in linear.bias_pieces]
            for piece in linear.pieces:
                part = Slice(rank, linear.name, linear.dtype, piece, linear)
                groups.setdefault(part.layer, []).append(part)
    return [Unit(tuple(slices)) for slices in _join(list(groups.values()))]


def _join(groups: list[list[Slice]]) -> list[list[Slice]]:
    """Unite the groups that read a common source (a tied embedding and lm_head, one norm on every rank)."""
    owner: dict[str, int] = {}
    joined: dict[int, list[Slice]] = {}
    for index, group in enumerate(groups):
        sources = {part.piece.source for part in group}
        others = {owner[source] for source in sources if source in owner}
        first = min(others, default=index)
        joined.setdefault(first, []).extend(group)
        for other in sorted(others - {first}):
            joined[first] += joined.pop(other)
        owner |= dict.fromkeys((part.piece.source for part in joined[first]), first)
    return [slices for slices in joined.values() if slices]


@dataclass
class LayerRecord:
    """Scales and squared errors of one linear layer, or one expert of it."""

    precision: str
    group_size: int | None = None
    scale_min: float | None = None
    scale_max: float | None = None
    error_squares: float = 0.0
    weight_squares: float = 0.0
    activation_scale: float | None = None
    origin: str | None = None

    def add(self, source: torch.Tensor, quantized: QuantizedWeight, scratch: Scratch) -> None:
        """Count one block's scales and its squared error."""
        self.add_scales(quantized.scales)
        exact = scratch.copy("float", source, torch.float32)
        error = quantized.dequantize(scratch).sub_(exact).flatten()
        exact = exact.flatten()
        self.weight_squares += float(torch.dot(exact, exact))
        self.error_squares += float(torch.dot(error, error))

    def add_scales(self, scales: torch.Tensor) -> None:
        low, high = float(scales.min()), float(scales.max())
        self.scale_min = low if self.scale_min is None else min(low, self.scale_min)
        self.scale_max = high if self.scale_max is None else max(high, self.scale_max)

    def add_origin(self, stored: StoredWeight, kept: bool) -> None:
        """Note that a source held the weight quantized, and the error that it was quantized with, if that is known."""
        if not kept:
            self.origin = f"encoded again from {stored.form.format} of {stored.origin}"
        else:
            self.origin = stored.origin if stored.weight_squares is not None else f"kept from {stored.origin}"
        if kept and stored.error_squares is not None and stored.weight_squares is not None:
            self.error_squares += stored.error_squares
            self.weight_squares += stored.weight_squares


@dataclass
class UnitRecord:
    """What a unit became: enough for the precision manifest, and small enough for the journal.

    `plain` gives the type of each unquantized tensor by rank{r}/NAME, `layers` each linear layer's (or expert's)
    record, `sources` the content digest of each source tensor, `digests` that of each written part of a rank tensor.
    """

    key: str
    plain: dict[str, str] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
