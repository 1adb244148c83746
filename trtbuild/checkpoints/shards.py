"""Filling rank tensors from the source: the one place where slices, fusion and quantization meet.

The unit of work is everything that shares a scale or a source tensor: one linear layer, or one expert of it, over all
ranks. Each source matrix is read in blocks of rows that fit into a core's cache; a block is checked, hashed, converted
and written to every rank while it is warm. Memory is a few blocks, whatever the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from trtbuild.checkpoints.content import Digest, SourceReader, row_blocks
from trtbuild.checkpoints.precision import LinearForm
from trtbuild.checkpoints.quantization import (
    FP8_MAX,
    QuantizedWeight,
    Scratch,
    StoredWeight,
    fp8_scale,
    pack_int4,
    quantize_fp8,
    quantize_fp8_rows,
    quantize_int4,
    quantize_int8,
)
from trtbuild.checkpoints.rank_tensors import Linear, Piece, RankPlan
from trtbuild.checkpoints.safetensors_file import torch_dtype
from trtbuild.errors import CheckpointError

ReadSource = Callable[[str], torch.Tensor]


class Destination(Protocol):
    """Takes rows of rank tensors."""

    def write(self, rank: int, name: str, expert: int | None, row: int, block: torch.Tensor, /) -> None:
        """Store `block` from `row` on, in the tensor or in one expert of it; the types are the same."""
        ...


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


def fill_unit(unit: Unit, source: SourceReader, destination: Destination, amax: dict[str, float]) -> UnitRecord:
    """Write one unit into its rank tensors.

    `amax` gives, for fp8, the largest absolute activation at each linear layer's input, by global name.
    Raises CheckpointError for NaN or Inf in the source, and for values that overflow the 16-bit type.
    """
    return _Filling(unit, source, destination, amax).run()


class _Filling:
    """One run of `fill_unit`."""

    def __init__(self, unit: Unit, source: SourceReader, destination: Destination, amax: dict[str, float]) -> None:
        self._unit, self._source, self._destination, self._amax = unit, source, destination, amax
        self._scratch = Scratch()
        self._layers: dict[tuple[str, int | None], LayerRecord] = {}
        self._weight_amax: dict[tuple[str, int | None], float] = {}
        # Of the sources that were read, and so checked, before anything is written.
        self._extremes: dict[str, float] = {}

    def run(self) -> UnitRecord:
        record = UnitRecord(self._unit.key)
        self._prepare(record)
        for name in self._unit.sources:
            slices = [part for part in self._unit.slices if part.piece.source == name]
            record.sources[name] = self._fill_source(name, slices)
        self._write_fp8_scales()
        for (name, expert), layer in self._layers.items():
            record.layers[name if expert is None else f"{name}/{expert}"] = vars(layer)
        return record

    def _fill_source(self, name: str, slices: list[Slice]) -> str:
        """Cut one source into its slices; its content digest."""
        stored = self._source.stored(name)
        kept = stored is not None and all(part.linear and keeps(part.linear.form, stored.form) for part in slices)
        if stored is not None:
            for layer in {part.layer: None for part in slices if part.layer is not None}:
                self._layers[layer].add_origin(stored, kept)
        digest = Digest()
        for start, stop in row_blocks(self._source.shape(name)):
            if kept:
                self._keep_block(slices, start, self._source.stored_rows(name, start, stop))
                continue
            block = self._source.rows(name, start, stop)
            if name not in self._extremes:
                _check_finite(name, block)
            digest.update(block)
            self._fill_block(slices, start, block)
        if kept and stored is not None and stored.order is not None:
            for part in slices:
                self._destination.write(part.rank, f"{part.name}.input_order", None, 0, stored.order.int())
        return self._source.digest_of(name) or digest.hex()

    def _prepare(self, record: UnitRecord) -> None:
        """Open the records; find, for fp8, the scales that need all of a layer before any of it is written."""
        for part in self._unit.slices:
            if part.layer is None or part.linear is None:
                record.plain[f"rank{part.rank}/{part.name}"] = str(torch_dtype(part.dtype)).removeprefix("torch.")
            elif part.layer not in self._layers:
                self._layers[part.layer] = LayerRecord(part.linear.precision, part.linear.group_size)
        extremes = self._extremes
        for part in self._unit.slices:
            if part.layer is None or part.linear is None or part.linear.precision != "fp8":
                continue
            name = part.piece.source
            if part.linear.form.row_scales:
                self._weight_amax[part.layer] = math.nan
                continue
            stored = self._source.stored(name)
            if stored is not None and keeps(part.linear.form, stored.form):
                continue
            if name not in extremes:
                extremes[name] = max((_extremes(name, block) for _, block in self._blocks(name)), default=0.0)
            self._weight_amax[part.layer] = max(extremes[name], self._weight_amax.get(part.layer, 0.0))

    def _blocks(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        for start, stop in row_blocks(self._source.shape(name)):
            yield start, self._source.rows(name, start, stop)

    def _fill_block(self, slices: list[Slice], start: int, block: torch.Tensor) -> None:
        """Cut one block of a source, rows start.., into every slice that has a part of it."""
        row_amax: torch.Tensor | None = None
        for part, row, whole in _overlaps(slices, start, len(block)):
            values = block[whole]
            if part.piece.columns is not None:
                values = values[:, part.piece.columns.start : part.piece.columns.stop]
            if part.linear is None or not part.linear.is_quantized:
                self._copy(part, row, values)
                continue
            if part.linear.precision in ("int8", "fp8-dynamic") and row_amax is None:
                row_amax = torch.abs(block, out=self._scratch.take("absolute", block.shape, block.dtype)).amax(dim=1)
            self._quantize(part, part.linear, row, values, None if row_amax is None else row_amax[whole])

    def _copy(self, part: Slice, row: int, values: torch.Tensor) -> None:
        dtype = torch_dtype(part.dtype)
        if values.dtype == dtype and values.is_contiguous():
            stored = values
        else:
            stored = self._scratch.copy("values", values, dtype)
        if dtype == torch.float16 and values.dtype != dtype and not _is_finite(stored):
            largest = float(values.abs().max())
            raise CheckpointError(
                f"{part.piece.source}: {largest:.4g} does not fit fp16 (65504 at most); "
                "use bf16 or a quantized precision"
            )
        name = part.name if part.linear is None else f"{part.name}.weight"
        self._destination.write(part.rank, name, part.piece.expert, row, stored)

    def _quantize(
        self, part: Slice, linear: Linear, row: int, values: torch.Tensor, row_amax: torch.Tensor | None
    ) -> None:
        assert part.layer is not None
        scales_name = None
        if linear.group_size:
            quantized = quantize_int4(values, linear.group_size, torch_dtype(linear.dtype), self._scratch)
            stored, scales_name = pack_int4(quantized.values), "weights_scaling_factor"
        elif row_amax is not None:
            quantize = quantize_int8 if linear.precision == "int8" else quantize_fp8_rows
            quantized = quantize(values, row_amax, self._scratch)
            stored, scales_name = quantized.values, "per_channel_scale"
        else:
            quantized = quantize_fp8(values, self._weight_amax[part.layer], self._scratch)
            stored = quantized.values
        self._destination.write(part.rank, f"{part.name}.weight", part.piece.expert, row, stored)
        if scales_name:
            self._destination.write(part.rank, f"{part.name}.{scales_name}", part.piece.expert, row, quantized.scales)
        self._layers[part.layer].add(values, quantized, self._scratch)

    def _keep_block(self, slices: list[Slice], start: int, block: QuantizedWeight) -> None:
        """Cut rows start.. of a quantized source, as they are, into every slice that has a part of them."""
        for part, row, whole in _overlaps(slices, start, len(block.values)):
            assert part.linear is not None and part.layer is not None
            linear, expert = part.linear, part.piece.expert
            columns = part.piece.columns or range(block.values.shape[1])
            values = block.values[whole, columns.start : columns.stop].contiguous()
            scales = block.scales[whole] if len(block.scales) == len(block.values) else block.scales
            if linear.group_size:
                values = pack_int4(values)
                # A rank may need smaller groups than the source has: they repeat its scales.
                size = block.values.shape[1] // scales.shape[1]
                chosen = torch.arange(columns.start, columns.stop, linear.group_size) // size
                scales = scales[:, chosen]
                if linear.form.zeros:
                    zeros = torch.zeros_like(scales) if block.zeros is None else block.zeros[whole][:, chosen]
                    zero = (scales.float() * zeros.float()).neg_().to(torch_dtype(linear.dtype))
                    self._destination.write(part.rank, f"{part.name}.zero", expert, row, zero)
                stored_scales, name = scales.to(torch_dtype(linear.dtype)), "weights_scaling_factor"
            else:
                name = "weights_scaling_factor" if linear.precision == "fp8" else "per_channel_scale"
                stored_scales = scales.float().expand(len(values))
            self._destination.write(part.rank, f"{part.name}.weight", expert, row, values)
            self._layers[part.layer].add_scales(scales)
            if linear.precision == "fp8" and not linear.form.row_scales:
                self._weight_amax[part.layer] = float(scales[0]) * FP8_MAX
            else:
                self._destination.write(part.rank, f"{part.name}.{name}", expert, row, stored_scales.contiguous())

    def _write_fp8_scales(self) -> None:
        """One weight scale per layer or expert (unless every row has its own), and one activation scale per layer."""
        places = {
            (part.rank, part.name, part.piece.expert): part
            for part in self._unit.slices
            if part.layer in self._weight_amax
        }
        for (rank, name, expert), part in places.items():
            assert part.layer is not None and part.linear is not None
            activation_scale = fp8_scale(self._amax[part.layer[0]])
            self._layers[part.layer].activation_scale = activation_scale
            if not part.linear.form.row_scales:
                weight = torch.tensor([fp8_scale(self._weight_amax[part.layer])])
                self._destination.write(rank, f"{name}.weights_scaling_factor", expert, 0, weight)
            self._destination.write(
                rank, f"{name}.activation_scaling_factor", None, 0, torch.tensor([activation_scale])
            )


def keeps(form: LinearForm, stored: LinearForm) -> bool:
    """Whether a linear layer of `form` can hold a source's quantized values as they are."""
    if form.format != stored.format or form.order != stored.order or (stored.zeros and not form.zeros):
        return False
    return form.row_scales or not stored.row_scales


def _overlaps(slices: list[Slice], start: int, count: int) -> Iterator[tuple[Slice, int, slice]]:
    """Each slice that has a part of the source rows start..: the rank tensor's row, and the part in the block."""
    for part in slices:
        rows = range(max(part.piece.rows.start, start), min(part.piece.rows.stop, start + count))
        if rows:
            row = part.piece.offset + rows.start - part.piece.rows.start
            yield part, row, slice(rows.start - start, rows.stop - start)


def fill_all(
    plans: list[RankPlan], read: ReadSource, amax: dict[str, float] | None = None
) -> list[dict[str, torch.Tensor]]:
    """`fill_from` for sources that are read whole."""
    return fill_from(plans, _WholeReader(read), amax)


def fill_from(
    plans: list[RankPlan], source: SourceReader, amax: dict[str, float] | None = None
) -> list[dict[str, torch.Tensor]]:
    """Every rank's tensors in memory, by name: for calibration, one layer at a time, and for tests."""
    ranks = [{s.name: torch.zeros(s.shape, dtype=torch_dtype(s.dtype)) for s in plan.tensors()} for plan in plans]
    for unit in cut_into_units(plans):
        fill_unit(unit, source, _InMemory(ranks), amax or {})
    return ranks


class _WholeReader:
    """Rows of tensors that are read whole; it keeps the last one, which the next rows are cut from."""

    def __init__(self, read: ReadSource) -> None:
        self._read = read
        self._last: tuple[str, torch.Tensor] | None = None

    def tensor(self, canonical: str) -> torch.Tensor:
        if self._last is None or self._last[0] != canonical:
            self._last = (canonical, self._read(canonical))
        return self._last[1]

    def rows(self, canonical: str, start: int, stop: int) -> torch.Tensor:
        return self.tensor(canonical)[start:stop].contiguous()

    def shape(self, canonical: str) -> tuple[int, ...]:
        return tuple(self.tensor(canonical).shape)

    def stored(self, canonical: str) -> StoredWeight | None:
        return None

    def stored_rows(self, canonical: str, start: int, stop: int) -> QuantizedWeight:
        raise ValueError(f"{canonical} is not quantized")

    def digest_of(self, canonical: str) -> str | None:
        return None


@dataclass(frozen=True)
class _InMemory:
    ranks: list[dict[str, torch.Tensor]]

    def write(self, rank: int, name: str, expert: int | None, row: int, block: torch.Tensor) -> None:
        target = self.ranks[rank][name]
        target = target if expert is None else target[expert]
        target[row : row + len(block)].copy_(block)


def _check_finite(name: str, block: torch.Tensor) -> None:
    """NaN and Inf spread to the sum, which is found four times as fast as the extremes; an overflow looks the same."""
    if not math.isfinite(float(block.sum())):
        _extremes(name, block)


def _extremes(name: str, block: torch.Tensor) -> float:
    """Largest absolute value of a block; CheckpointError where it holds NaN or Inf."""
    if not block.numel():
        return 0.0
    low, high = (float(extreme) for extreme in block.aminmax())
    largest = max(-low, high)
    # NaN spreads to both extremes, and compares as false.
    if not largest < float("inf"):
        raise CheckpointError(f"{name} holds NaN or Inf; the checkpoint is damaged")
    return largest


def _is_finite(tensor: torch.Tensor) -> bool:
    """Through the extremes, which NaN spreads to: `torch.isfinite` takes 2.5 times the tensor's memory."""
    return not tensor.numel() or all(bool(torch.isfinite(extreme)) for extreme in tensor.aminmax())
