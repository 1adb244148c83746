"""Filling rank tensors from the source: the one place where slices, fusion and quantization meet.

Each source matrix is read in blocks of rows that fit into a core's cache; a block is checked, hashed, converted and
written to every rank while it is warm. Memory is a few blocks, whatever the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from trtbuild.checkpoints.content import Digest, SourceReader, row_blocks
from trtbuild.checkpoints.kept_rows import keep_rows, keeps
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
from trtbuild.checkpoints.rank_tensors import Linear, RankPlan
from trtbuild.checkpoints.safetensors_file import torch_dtype
from trtbuild.checkpoints.work_units import LayerRecord, Slice, Unit, UnitRecord, cut_into_units
from trtbuild.errors import CheckpointError

ReadSource = Callable[[str], torch.Tensor]


class Destination(Protocol):
    """Takes rows of rank tensors."""

    def write(self, rank: int, name: str, expert: int | None, row: int, block: torch.Tensor, /) -> None:
        """Store `block` from `row` on, in the tensor or in one expert of it; the types are the same."""
        ...


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
            rows = keep_rows(block, whole, part.piece.columns, part.linear, part.piece.source)
            for role, tensor in rows.tensors.items():
                # Where two rows are packed into one, so are the rows before them.
                first = row * len(tensor) // (whole.stop - whole.start)
                self._destination.write(part.rank, f"{part.name}.{role}", part.piece.expert, first, tensor)
            self._layers[part.layer].add_scales(rows.scales)
            if rows.one_scale is not None:
                self._weight_amax[part.layer] = rows.one_scale * FP8_MAX

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
    for tensors, plan in zip(ranks, plans, strict=True):
        for constant in plan.constants:
            tensors[constant.spec.name].fill_(constant.value)
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
