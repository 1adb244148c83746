"""Conversion: a Hugging Face checkpoint becomes one preallocated file per rank, unit by unit, in parallel.

All shapes follow from the config, so each file's header is written first and every tensor is then written into place
from memory-mapped slices of the source. Anonymous memory is a few of the largest single matrices, whatever the model.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import trtbuild
from trtbuild.checkpoints.journal import Journal
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import Precision
from trtbuild.checkpoints.rank_checkpoint import (
    AUTHORITY,
    FORMAT_VERSION,
    RankCheckpoint,
    rank_file,
    tensorrt_llm_config,
)
from trtbuild.checkpoints.rank_tensors import RankPlan, plan_rank
from trtbuild.checkpoints.safetensors_file import MappedTensors, layout_header, read_header
from trtbuild.checkpoints.shards import LinearUnit, Unit, UnitRecord, cut_into_units, fill_unit
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.errors import CheckFailed, Refused
from trtbuild.progress import ProgressFactory, no_progress
from trtbuild.workspace import read_json, staged, write_json

JOURNAL = "journal.jsonl"
CALIBRATION = "calibration.json"


@dataclasses.dataclass(frozen=True)
class ActivationRange:
    """What calibration saw at one linear layer's input, and how many tokens each expert really got."""

    amax: float
    tokens_per_expert: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How to find the activation ranges, and what identifies the result: text digest, tokens."""

    identity: dict[str, Any]
    run: Callable[[], dict[str, ActivationRange]]


def convert(
    source: CheckpointSource,
    directory: Path,
    layout: Layout,
    precision: Precision,
    *,
    calibration: Calibration | None = None,
    provenance: dict[str, Any] | None = None,
    workers: int = 1,
    force: bool = False,
    progress: ProgressFactory = no_progress,
) -> RankCheckpoint:
    """Write `directory` (build/NAME) and open it; an unchanged one is left as it is.

    `calibration` is needed for fp8, and run only if there is work. `provenance` goes into trtbuild.json as it is.
    Raises Refused before work starts where the layout or the disk does not allow it.
    """
    layout.check(source.config)
    plans = [plan_rank(source.config, rank, precision) for rank in layout.ranks()]
    if precision.weights == "fp8" and calibration is None:
        raise ValueError("fp8 needs a calibration")
    request = {
        "format": FORMAT_VERSION,
        "source": source.digest,
        "layout": dataclasses.asdict(layout),
        "precision": dataclasses.asdict(precision),
        "calibration": calibration.identity if calibration else None,
    }
    with staged(directory, request, force=force) as partial:
        if partial is not None:
            _allocate(partial, plans)
            ranges = _activation_ranges(partial, calibration)
            records = _fill(partial, plans, source, ranges, workers, progress)
            _write_configs(partial, source, layout, precision, manifest(plans, records, ranges), provenance or {})
            (partial / JOURNAL).unlink()
    return RankCheckpoint.open(directory)


def _activation_ranges(partial: Path, calibration: Calibration | None) -> dict[str, ActivationRange]:
    """Calibrate, or take up what an interrupted run has calibrated."""
    if calibration is None:
        return {}
    file = partial / CALIBRATION
    if not file.is_file():
        ranges = calibration.run()
        write_json(file, {name: dataclasses.asdict(found) for name, found in ranges.items()})
    saved = read_json(file)
    return {name: ActivationRange(found["amax"], tuple(found["tokens_per_expert"])) for name, found in saved.items()}


def _allocate(partial: Path, plans: list[RankPlan]) -> None:
    """Create the rank files at full length, unless an earlier run did; refuse what does not fit on the disk."""
    headers = [layout_header(plan.tensors(), {"format": "pt"}) for plan in plans]
    sizes = [
        len(head) + sum(t.num_bytes for t in plan.tensors()) for (head, _), plan in zip(headers, plans, strict=True)
    ]
    missing = [rank for rank, size in enumerate(sizes) if not _has_size(partial / rank_file(rank), size)]
    needed, free = sum(sizes[rank] for rank in missing), shutil.disk_usage(partial).free
    if needed > free:
        raise Refused(
            f"{partial.parent}: the rank checkpoint takes {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free"
        )
    if missing:
        (partial / JOURNAL).unlink(missing_ok=True)
    for rank in missing:
        with (partial / rank_file(rank)).open("wb") as stream:
            stream.write(headers[rank][0])
            stream.truncate(sizes[rank])


def _has_size(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def _fill(
    partial: Path,
    plans: list[RankPlan],
    source: CheckpointSource,
    ranges: dict[str, ActivationRange],
    workers: int,
    progress: ProgressFactory,
) -> list[UnitRecord]:
    journal = Journal(partial / JOURNAL)
    files = [MappedTensors(read_header(partial / rank_file(rank)), writable=True) for rank in range(len(plans))]
    units = cut_into_units(plans)
    amax = {name: found.amax for name, found in ranges.items()}

    def work(unit: Unit) -> None:
        record = fill_unit(unit, source.tensor, lambda rank, name: files[rank].tensor(name), amax)
        journal.add(unit.key, dataclasses.asdict(record))

    with progress("converting", len(units), "tensors") as bar:
        bar.advance(sum(unit.key in journal.entries for unit in units))
        _run_parallel(work, (unit for unit in units if unit.key not in journal.entries), workers, bar.advance)
    return [UnitRecord(**journal.entries[unit.key]) for unit in units]


def _run_parallel(work: Callable[[Unit], None], units: Iterable[Unit], workers: int, done: Callable[[], None]) -> None:
    """Inline with one worker; otherwise in threads (torch releases the lock), stopping at the first error or Ctrl-C."""
    if workers <= 1:
        for unit in units:
            work(unit)
            done()
        return
    with _torch_threads(max(1, (os.cpu_count() or 1) // workers)), ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, unit) for unit in units]
        for future in futures:
            future.add_done_callback(lambda _: done())
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """Workers and torch's own threads together should not be more than the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def manifest(plans: list[RankPlan], records: list[UnitRecord], ranges: dict[str, ActivationRange]) -> dict[str, Any]:
    """The precision that every tensor got; raises CheckFailed where it is not the one that was asked for."""
    asked = {linear.global_name: linear for plan in plans for linear in plan.linears}
    tensors: dict[str, dict[str, Any]] = {}
    units = {unit.key: unit for unit in cut_into_units(plans)}
    for record in records:
        unit = units[record.key]
        if not isinstance(unit, LinearUnit):
            tensors[record.key] = {"precision": record.precision}
            continue
        if record.precision != asked[unit.name].precision:
            raise CheckFailed(
                f"{unit.name}: {asked[unit.name].precision} was asked for, {record.precision} was written"
            )
        _merge(tensors.setdefault(unit.name, {"precision": record.precision}), record, ranges.get(unit.name))
    return tensors


def _merge(entry: dict[str, Any], record: UnitRecord, found: ActivationRange | None) -> None:
    """Fold one unit (one expert of a stack) into its layer's entry."""
    if record.scale_min is None or record.scale_max is None:
        return
    entry["scale_min"] = min(record.scale_min, entry.get("scale_min", record.scale_min))
    entry["scale_max"] = max(record.scale_max, entry.get("scale_max", record.scale_max))
    # The worst expert counts: an average would hide one that is broken.
    error = (record.error_squares / record.weight_squares) ** 0.5 if record.weight_squares else 0.0
    entry["relative_error"] = max(error, entry.get("relative_error", 0.0))
    if record.group_size:
        entry["group_size"] = record.group_size
    entry |= record.extra
    if found and found.tokens_per_expert:
        entry["calibration_tokens_per_expert"] = list(found.tokens_per_expert)


def _write_configs(
    partial: Path,
    source: CheckpointSource,
    layout: Layout,
    precision: Precision,
    tensors: dict[str, Any],
    provenance: dict[str, Any],
) -> None:
    write_json(partial / "config.json", tensorrt_llm_config(source.config, layout, precision))
    authority = {
        "format": FORMAT_VERSION,
        "trtbuild": trtbuild.__version__,
        "dialect": "tensorrt-rtx",
        "source": {"model": source.model, "revision": source.revision, "digest": source.digest},
        "model": source.config.to_dict(),
        "layout": dataclasses.asdict(layout),
        "precision": dataclasses.asdict(precision),
        **provenance,
        "tensors": tensors,
    }
    write_json(partial / AUTHORITY, authority)


def default_workers() -> int:
    return min(8, os.cpu_count() or 1)
