"""Conversion spread over a pool: batches of units, each filled by a worker straight into the shared rank files.

A worker finds the units by itself, from config, layout and precision, so that a task is little more than a list of
keys. Its bytes are on disk before its records go back, and the one journal is written where the command runs.
"""

from __future__ import annotations

import math
import socket
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import torch

from trtbuild.checkpoints.content import SourceReader
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import Precision
from trtbuild.checkpoints.prepared_source import PreparedSource
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.rank_tensors import RankPlan
from trtbuild.checkpoints.rank_writer import RankFiles, UnitWriter
from trtbuild.checkpoints.shards import fill_unit
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.checkpoints.work_units import Unit, UnitRecord, cut_into_units
from trtbuild.errors import CheckpointError, Refused
from trtbuild.pools import Pool

# What a task reads: seconds of work beside milliseconds of Ray's, and little to do again when a worker dies.
BATCH_BYTES = 256 * 2**20
# Smaller models are cut finer, so that all workers end at about the same time.
BATCHES_PER_WORKER = 4
# Torch with the package, and the blocks of one worker.
TASK_MEMORY = 512 * 2**20


@dataclass(frozen=True)
class Conversion:
    """One conversion as its workers know it; equal where `token` is."""

    token: str
    directory: Path = field(compare=False)
    source: CheckpointSource | PreparedSource = field(compare=False)
    source_digest: str = field(compare=False)
    layout: Layout = field(compare=False)
    precision: Precision = field(compare=False)
    amax: dict[str, float] = field(compare=False)

    @classmethod
    def of(
        cls,
        directory: Path,
        source: CheckpointSource | PreparedSource,
        plans: Sequence[RankPlan],
        amax: dict[str, float],
    ) -> Conversion:
        layout, precision = plans[0].layout.layout, plans[0].precision
        # A copy: what `source` has mapped and read stays here.
        bare = source.portable()
        return cls(uuid.uuid4().hex, directory.absolute(), bare, source.digest, layout, precision, amax)


def run_on_pool(
    pool: Pool, conversion: Conversion, units: Sequence[Unit], sizes: Sequence[int]
) -> Iterator[UnitRecord]:
    """Fill these units, whose sources have so many bytes; their records, as batches are done.

    Raises what the first failing unit raised.
    """
    batches = cut_into_batches([unit.key for unit in units], sizes, pool.num_workers)
    work = partial(fill_batch, conversion)
    with closing(pool.run(work, batches, memory_bytes=TASK_MEMORY)) as results:
        for records in results:
            yield from records


def source_bytes(units: Sequence[Unit], source: SourceReader) -> list[int]:
    """Bytes of each unit's sources, in 16 bit."""
    return [2 * sum(math.prod(source.shape(name)) for name in unit.sources) for unit in units]


def cut_into_batches(keys: Sequence[str], sizes: Sequence[int], num_workers: int) -> list[tuple[str, ...]]:
    """The units, in order, in batches of at most BATCH_BYTES of source, or of one unit."""
    limit = min(BATCH_BYTES, sum(sizes) / (BATCHES_PER_WORKER * num_workers))
    batches: list[list[str]] = []
    room = 0.0
    for key, size in zip(keys, sizes, strict=True):
        if not batches or size > room:
            batches.append([])
            room = limit
        batches[-1].append(key)
        room -= size
    return [tuple(batch) for batch in batches]


def fill_batch(conversion: Conversion, keys: tuple[str, ...]) -> list[UnitRecord]:
    """On a worker: fill these units and put their bytes on disk."""
    opened = _opened(conversion)
    records = []
    # As in a local conversion: with more threads torch adds up in another order.
    torch.set_num_threads(1)
    with opened.files as files:
        for key in keys:
            writer = UnitWriter(files, opened.units[key])
            record = fill_unit(opened.units[key], opened.source, writer, conversion.amax)
            record.digests = writer.digests()
            records.append(record)
        files.sync()
    return records


@dataclass(frozen=True)
class _Opened:
    source: CheckpointSource | PreparedSource
    files: RankFiles
    units: dict[str, Unit]


@lru_cache(maxsize=1)
def _opened(conversion: Conversion) -> _Opened:
    """Once in a worker's life; Refused where it sees other files than the machine that gave the command."""
    source = conversion.source
    try:
        same = source.digest == conversion.source_digest
        reason = "another content"
    except (OSError, CheckpointError) as error:
        same, reason = False, str(error)
    if not same:
        raise Refused(
            f"{socket.gethostname()} does not see {source.directory} as this machine does ({reason}); put the "
            "checkpoint (and --lora) on a file system that all machines share, or give MODEL as a URL (s3://..., hf://OWNER/NAME)"
        )
    plans = [plan_rank(source.config, rank, conversion.precision) for rank in conversion.layout.ranks()]
    return _Opened(source, RankFiles(conversion.directory, plans), {unit.key: unit for unit in cut_into_units(plans)})
