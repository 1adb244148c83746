"""Sharding, backwards: rows of a checkpoint's weights out of the rank files that hold parts of them.

Nothing is computed: codes, scales and 16-bit values are copied as they are stored, through memory maps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from trtbuild.checkpoints.precision import LinearForm
from trtbuild.checkpoints.rank_checkpoint import RankCheckpoint
from trtbuild.checkpoints.rank_tensors import Linear
from trtbuild.checkpoints.source_tensors import expected_shapes
from trtbuild.checkpoints.work_units import Slice, cut_into_units
from trtbuild.errors import CheckpointError


@dataclass(frozen=True)
class Weight:
    """One weight of the source checkpoint: its canonical name, its shape there, and where the ranks hold it.

    `slices` cover it; copies that several ranks have of the same part are left out.
    """

    canonical: str
    shape: tuple[int, ...]
    slices: tuple[Slice, ...]

    @property
    def linear(self) -> Linear | None:
        """The linear layer that it is a part of; None for what is never quantized."""
        return self.slices[0].linear

    @property
    def form(self) -> LinearForm | None:
        """How it is quantized, None for a weight in 16 bit."""
        return self.linear.form if self.linear is not None and self.linear.is_quantized else None


class RankParts:
    """The weights of a rank checkpoint of any layout, under canonical names, as one model has them."""

    def __init__(self, checkpoint: RankCheckpoint) -> None:
        self._checkpoint = checkpoint

    @cached_property
    def weights(self) -> list[Weight]:
        """All of them, in the order of the network; ValueError where the ranks do not cover one."""
        slices: dict[str, list[Slice]] = {}
        for unit in cut_into_units(self._checkpoint.plans):
            for part in unit.slices:
                slices.setdefault(part.piece.source, []).append(part)
        shapes = expected_shapes(self._checkpoint.config)
        return [Weight(name, shape, _cover(name, shape, slices.get(name, []))) for name, shape in shapes.items()]

    def rows(self, weight: Weight, role: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of a tensor that has one for each of the weight's: [rows], or [rows, stored columns].

        `role` is `weight`, or that of its scales (`weights_scaling_factor`, `per_channel_scale`).
        """
        first = self._tensor(weight.slices[0], role)
        # A rank's columns are a share of the whole's, packed or grouped alike.
        width = None
        if first.dim() > 1:
            part = weight.slices[0].piece.columns
            width = first.shape[1] if part is None else first.shape[1] * weight.shape[1] // len(part)
        result = torch.empty((stop - start,) if width is None else (stop - start, width), dtype=first.dtype)
        for part in weight.slices:
            piece = part.piece
            low, high = max(piece.rows.start, start), min(piece.rows.stop, stop)
            if low >= high:
                continue
            place = piece.offset - piece.rows.start
            rows = self._tensor(part, role)[low + place : high + place]
            if width is None or piece.columns is None:
                result[low - start : high - start] = rows
            else:
                left = piece.columns.start * width // weight.shape[1]
                result[low - start : high - start, left : left + rows.shape[1]] = rows
        return result

    def scalar(self, weight: Weight, role: str) -> torch.Tensor:
        """The one float32 number, [1], that all parts of a weight share; CheckpointError where they differ."""
        found = [self._tensor(part, role).flatten() for part in weight.slices]
        if any(not torch.equal(other, found[0]) for other in found[1:]) or found[0].numel() != 1:
            raise CheckpointError(
                f"{self._checkpoint.directory}: the ranks hold different {role} of {weight.canonical}; convert the "
                "model again with --force"
            )
        return found[0].clone()

    def _tensor(self, part: Slice, role: str) -> torch.Tensor:
        """A rank's tensor, or one expert of it."""
        name = part.name if part.linear is None else f"{part.name}.{role}"
        tensor = self._checkpoint.tensor(part.rank, name)
        is_shared = role == "activation_scaling_factor"
        return tensor if part.piece.expert is None or is_shared else tensor[part.piece.expert]


def _cover(name: str, shape: tuple[int, ...], slices: Sequence[Slice]) -> tuple[Slice, ...]:
    """Of slices that hold the same rectangle, the first; together they must be the whole."""
    for part in slices:
        # Of a tied embedding the last stage's ranks hold parts besides.
        if len(part.piece.rows) == shape[0] and (part.piece.columns is None or len(part.piece.columns) == shape[1]):
            return (part,)
    found: dict[tuple[range, range | None], Slice] = {}
    for part in slices:
        columns = part.piece.columns
        if columns is not None and len(columns) == shape[1]:
            columns = None
        if part.piece.rows:
            found.setdefault((part.piece.rows, columns), part)
    area = sum(len(rows) * (math.prod(shape[1:]) if columns is None else len(columns)) for rows, columns in found)
    if area != math.prod(shape):
        raise ValueError(f"the ranks hold {area} of the {math.prod(shape)} values of {name}")
    return tuple(found.values())
