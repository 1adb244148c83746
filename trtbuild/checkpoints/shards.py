"""Filling rank tensors from the source: the one place where slices, fusion and quantization meet.

The unit of work is everything that shares a scale: one linear layer, or one expert of it, over all ranks. It reads
each source matrix once and writes every rank's slice of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from trtbuild.checkpoints.quantization import (
    QuantizedWeight,
    fp8_scale,
    pack_int4,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
)
from trtbuild.checkpoints.rank_tensors import Linear, Piece, RankPlan
from trtbuild.errors import CheckpointError

ReadSource = Callable[[str], torch.Tensor]
# (rank, tensor name) -> the whole rank tensor, to be written in place.
Destination = Callable[[int, str], torch.Tensor]


@dataclass(frozen=True)
class PlainUnit:
    """One unquantized tensor (or a linear's bias) of one rank."""

    rank: int
    name: str
    pieces: tuple[Piece, ...]

    @property
    def key(self) -> str:
        return f"rank{self.rank}/{self.name}"


@dataclass(frozen=True)
class LinearUnit:
    """One linear layer, or one expert of a stack, on every rank that holds a slice of it."""

    name: str
    expert: int | None
    slices: tuple[tuple[int, Linear, Piece], ...]

    @property
    def key(self) -> str:
        return self.name if self.expert is None else f"{self.name}/{self.expert}"


Unit = PlainUnit | LinearUnit


def cut_into_units(plans: list[RankPlan]) -> list[Unit]:
    """All work of a conversion, in file order."""
    units: list[Unit] = []
    linears: dict[tuple[str, int | None], list[tuple[int, Linear, Piece]]] = {}
    for rank, plan in enumerate(plans):
        units += [PlainUnit(rank, tensor.spec.name, tensor.pieces) for tensor in plan.plain]
        for linear in plan.linears:
            if linear.has_bias:
                units.append(PlainUnit(rank, f"{linear.name}.bias", linear.bias_pieces))
            for piece in linear.pieces:
                expert = None if piece.expert is None else linear.first_expert + piece.expert
                linears.setdefault((linear.global_name, expert), []).append((rank, linear, piece))
    return units + [LinearUnit(name, expert, tuple(slices)) for (name, expert), slices in linears.items()]


@dataclass
class UnitRecord:
    """What a unit became: enough for the precision manifest, and small enough for the journal."""

    key: str
    precision: str
    group_size: int | None = None
    scale_min: float | None = None
    scale_max: float | None = None
    error_squares: float = 0.0
    weight_squares: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

    def add(self, source: torch.Tensor, quantized: QuantizedWeight) -> None:
        """Count one slice's scales and its squared error."""
        low, high = float(quantized.scales.min()), float(quantized.scales.max())
        self.scale_min = low if self.scale_min is None else min(low, self.scale_min)
        self.scale_max = high if self.scale_max is None else max(high, self.scale_max)
        values = source.float()
        self.weight_squares += float(values.square().sum())
        self.error_squares += float(quantized.dequantize().sub_(values).square_().sum())


def fill_unit(unit: Unit, read: ReadSource, destination: Destination, amax: dict[str, float]) -> UnitRecord:
    """Write one unit into its rank tensors.

    `amax` gives, for fp8, the largest absolute activation at each linear layer's input, by global name.
    Raises CheckpointError for NaN or Inf in the source, and for values that overflow the 16-bit type.
    """
    if isinstance(unit, PlainUnit):
        target = destination(unit.rank, unit.name)
        for piece in unit.pieces:
            _copy(piece, read, target)
        return UnitRecord(unit.key, str(target.dtype).removeprefix("torch."))
    precision = unit.slices[0][1].precision
    record = UnitRecord(unit.key, precision, unit.slices[0][1].group_size)
    if precision == "fp8":
        _fill_fp8(unit, read, destination, amax[unit.name], record)
        return record
    for rank, linear, piece in unit.slices:
        weight = destination(rank, f"{linear.name}.weight")
        if not linear.is_quantized:
            _copy(piece, read, weight)
            continue
        source = _rectangle(piece, read)
        quantized = _quantize(linear, piece, source, read)
        name = "per_channel_scale" if precision == "int8" else "weights_scaling_factor"
        packed = pack_int4(quantized.values) if precision == "int4" else quantized.values
        _rows(weight, piece).copy_(packed)
        _rows(destination(rank, f"{linear.name}.{name}"), piece).copy_(quantized.scales)
        record.add(source, quantized)
    return record


def fill_all(
    plans: list[RankPlan], read: ReadSource, amax: dict[str, float] | None = None
) -> list[dict[str, torch.Tensor]]:
    """Every rank's tensors in memory, by name: for calibration, one layer at a time, and for tests."""
    from trtbuild.checkpoints.safetensors_file import torch_dtype

    ranks = [{s.name: torch.zeros(s.shape, dtype=torch_dtype(s.dtype)) for s in plan.tensors()} for plan in plans]
    for unit in cut_into_units(plans):
        fill_unit(unit, read, lambda rank, name: ranks[rank][name], amax or {})
    return ranks


def _fill_fp8(unit: LinearUnit, read: ReadSource, destination: Destination, amax: float, record: UnitRecord) -> None:
    sources = sorted({piece.source for _, _, piece in unit.slices})
    weight_amax = max(float(_checked(source, read).abs().max()) for source in sources)
    activation_scale = fp8_scale(amax)
    record.extra["activation_scale"] = activation_scale
    for rank, linear, piece in unit.slices:
        source = _rectangle(piece, read)
        quantized = quantize_fp8(source, weight_amax)
        _rows(destination(rank, f"{linear.name}.weight"), piece).copy_(quantized.values)
        scales = destination(rank, f"{linear.name}.weights_scaling_factor")
        (scales if piece.expert is None else scales[piece.expert]).copy_(quantized.scales)
        destination(rank, f"{linear.name}.activation_scaling_factor").fill_(activation_scale)
        record.add(source, quantized)


def _quantize(linear: Linear, piece: Piece, source: torch.Tensor, read: ReadSource) -> QuantizedWeight:
    if linear.group_size:
        from trtbuild.checkpoints.safetensors_file import torch_dtype

        return quantize_int4(source, linear.group_size, torch_dtype(linear.dtype))
    whole_rows = read(piece.source)[piece.rows.start : piece.rows.stop]
    return quantize_int8(source, whole_rows.abs().amax(dim=1))


def _copy(piece: Piece, read: ReadSource, target: torch.Tensor) -> None:
    source = _rectangle(piece, read)
    rows = _rows(target, piece)
    rows.copy_(source)
    if target.dtype == torch.float16 and source.dtype != torch.float16 and not _is_finite(rows):
        largest = float(source.abs().max())
        raise CheckpointError(
            f"{piece.source}: {largest:.4g} does not fit fp16 (65504 at most); use bf16 or a quantized precision"
        )


def _rows(target: torch.Tensor, piece: Piece) -> torch.Tensor:
    stack = target if piece.expert is None else target[piece.expert]
    return stack[piece.offset : piece.offset + len(piece.rows)]


def _rectangle(piece: Piece, read: ReadSource) -> torch.Tensor:
    rows = _checked(piece.source, read, piece.rows)
    return rows if piece.columns is None else rows[:, piece.columns.start : piece.columns.stop]


def _checked(name: str, read: ReadSource, rows: range | None = None) -> torch.Tensor:
    tensor = read(name) if rows is None else read(name)[rows.start : rows.stop]
    if not _is_finite(tensor):
        raise CheckpointError(f"{name} holds NaN or Inf; the checkpoint is damaged")
    return tensor


def _is_finite(tensor: torch.Tensor) -> bool:
    """Through the extremes, which NaN spreads to: `torch.isfinite` takes 2.5 times the tensor's memory."""
    return not tensor.numel() or all(bool(torch.isfinite(extreme)) for extreme in tensor.aminmax())
