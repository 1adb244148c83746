"""Conversion: a Hugging Face checkpoint becomes one preallocated file per rank, unit by unit, in parallel.

All shapes follow from the config, so each file's header is written first and every tensor is then written into place,
block by block from the memory-mapped source. Anonymous memory is a few blocks per worker, whatever the model.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import trtbuild
from trtbuild.checkpoints.content import ALGORITHM, Digest, changed_tensors, stack_digest
from trtbuild.checkpoints.journal import Journal
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import CALIBRATED, Precision
from trtbuild.checkpoints.prepared_source import PreparedSource
from trtbuild.checkpoints.rank_checkpoint import AUTHORITY, FORMAT_VERSION, RankCheckpoint, plan_stacks
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.rank_tensors import RankPlan
from trtbuild.checkpoints.rank_writer import RankFiles, UnitWriter, constant_values
from trtbuild.checkpoints.remote_units import Conversion, run_on_pool, source_bytes
from trtbuild.checkpoints.shards import fill_unit
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.checkpoints.tensorrt_llm_config import tensorrt_llm_config
from trtbuild.checkpoints.work_units import Unit, UnitRecord, cut_into_units
from trtbuild.errors import CheckFailed, Refused
from trtbuild.pools import Pool
from trtbuild.progress import ProgressFactory, no_progress
from trtbuild.workspace import read_json, staged, write_json

JOURNAL = "journal.jsonl"
CALIBRATION = "calibration.json"
# What the file system said of the source when it was read.
FINGERPRINT = "source.json"
# How often finished work is put on disk and into the journal; a power cut loses no more.
SYNC_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class ActivationRange:
    """What calibration saw at one linear layer's input, and how many tokens each expert really got.

    `amax` is None where no activation scale is asked for.
    """

    amax: float | None
    tokens_per_expert: tuple[int, ...] = ()


def range_from_dict(data: dict[str, Any]) -> ActivationRange:
    """Inverse of `dataclasses.asdict`."""
    return ActivationRange(data["amax"], tuple(data["tokens_per_expert"]))


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How to find the activation ranges, and what identifies the result: text digest, tokens.

    `prepare` gives the checkpoint with the linear layers that the calibration has quantized, if it quantizes any; what
    it found before it finds again. `devices` tells what computed a finished calibration, which identifies nothing.
    """

    identity: dict[str, Any]
    run: Callable[[], dict[str, ActivationRange]]
    prepare: Callable[[], PreparedSource] | None = None
    devices: Callable[[], list[dict[str, Any]]] | None = None


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
    pool: Pool | None = None,
) -> RankCheckpoint:
    """Write `directory` (build/NAME) and open it; an unchanged one is left as it is.

    The work is done by `workers` threads, or, calibration apart, by `pool`'s workers.

    `calibration` is needed for fp8 and the calibrated int4 precisions, and run only if there is work. `provenance` goes
    into trtbuild.json as it is. Raises Refused before work starts where the layout or the disk does not allow it.
    """
    layout.check(source.config)
    plans = [plan_rank(source.config, rank, precision) for rank in layout.ranks()]
    if calibration is None and precision.weights in ("fp8", *CALIBRATED) and not precision.modules:
        raise ValueError(f"{precision.weights} needs a calibration")
    request = {
        "format": FORMAT_VERSION,
        "source": source.digest,
        "layout": dataclasses.asdict(layout),
        "precision": precision.to_dict(),
        "calibration": calibration.identity if calibration else None,
    }
    with staged(directory, request, force=force) as partial:
        if partial is None:
            _check_source(directory, source, progress)
        else:
            fingerprint = source.fingerprint()
            _drop_outdated(partial, source, fingerprint)
            ranges = _activation_ranges(partial, calibration)
            reader = calibration.prepare() if calibration and calibration.prepare else source
            with _torch_threads(1):
                records = _fill(partial, plans, reader, ranges, workers, progress, pool)
            if source.fingerprint() != fingerprint:
                raise CheckFailed(f"{source.directory} was changed while it was read; give the command again")
            computed = {"calibrated_on": calibration.devices()} if calibration and calibration.devices else {}
            _write_configs(partial, source, layout, precision, (provenance or {}) | computed, {
                "tensors": manifest(plans, records, ranges), "digests": rank_digests(plans, records),
                "source": {name: digest for record in records for name, digest in record.sources.items()},
            })  # fmt: skip
            (partial / JOURNAL).unlink()
    return RankCheckpoint.open(directory)


def _check_source(directory: Path, source: CheckpointSource, progress: ProgressFactory) -> None:
    """Whether a finished checkpoint's source still has the content that was converted; Refused where not.

    The content is read only if the file system says that a file was touched.
    """
    fingerprint, file = source.fingerprint(), directory / FINGERPRINT
    if file.is_file() and read_json(file) == fingerprint:
        return
    recorded = read_json(directory / AUTHORITY)["source"]["tensors"]
    with progress("reading the source, which was touched", len(recorded), "tensors") as bar:
        changed = []
        for name, digest in recorded.items():
            changed += changed_tensors(source, {name: digest})
            bar.advance()
    if changed:
        more = f" and {len(changed) - 3} more tensors" if len(changed) > 3 else ""
        raise Refused(
            f"{directory} was made from other weights: {', '.join(changed[:3])}{more} of {source.directory} changed; "
            "replace it with --force, or choose another --name"
        )
    write_json(file, fingerprint)


def _drop_outdated(partial: Path, source: CheckpointSource, fingerprint: dict[str, Any]) -> None:
    """Forget what an interrupted run made of source tensors that have changed since."""
    file = partial / FINGERPRINT
    if file.is_file() and read_json(file) != fingerprint:
        if (partial / CALIBRATION).is_file():
            # Every layer's ranges follow from all weights before it.
            (partial / CALIBRATION).unlink()
            (partial / JOURNAL).unlink(missing_ok=True)
        elif (partial / JOURNAL).is_file():
            journal = Journal(partial / JOURNAL)
            journal.keep([k for k, entry in journal.entries.items() if not changed_tensors(source, entry["sources"])])
    write_json(file, fingerprint)


def _activation_ranges(partial: Path, calibration: Calibration | None) -> dict[str, ActivationRange]:
    """Calibrate, or take up what an interrupted run has calibrated."""
    if calibration is None:
        return {}
    file = partial / CALIBRATION
    if not file.is_file():
        ranges = calibration.run()
        write_json(file, {name: dataclasses.asdict(found) for name, found in ranges.items()})
    saved = read_json(file)
    return {name: range_from_dict(found) for name, found in saved.items()}


def _fill(
    partial: Path,
    plans: list[RankPlan],
    source: CheckpointSource | PreparedSource,
    ranges: dict[str, ActivationRange],
    workers: int,
    progress: ProgressFactory,
    pool: Pool | None,
) -> list[UnitRecord]:
    """Write all rank files, going on where the journal ends; the units' records, in order."""
    files = RankFiles(partial, plans)
    missing = files.missing()
    if missing:
        (partial / JOURNAL).unlink(missing_ok=True)
        files.allocate(missing)
    units = cut_into_units(plans)
    amax = {name: found.amax for name, found in ranges.items() if found.amax is not None}
    with files, Journal(partial / JOURNAL, files.sync, SYNC_SECONDS) as journal:

        def work(unit: Unit) -> None:
            writer = UnitWriter(files, unit)
            record = fill_unit(unit, source, writer, amax)
            record.digests = writer.digests()
            journal.add(unit.key, dataclasses.asdict(record))

        with progress("converting", len(units), "tensors") as bar:
            waiting = [unit for unit in units if unit.key not in journal.entries]
            bar.advance(len(units) - len(waiting))
            if pool is None:
                _run_parallel(work, waiting, workers, bar.advance)
            else:
                conversion = Conversion.of(partial, source, plans, amax)
                for record in run_on_pool(pool, conversion, waiting, source_bytes(waiting, source)):
                    journal.add(record.key, dataclasses.asdict(record))
                    bar.advance()
    return [UnitRecord(**journal.entries[unit.key]) for unit in units]


def _run_parallel(work: Callable[[Unit], None], units: Iterable[Unit], workers: int, done: Callable[[], None]) -> None:
    """Inline with one worker; otherwise in threads (torch releases the lock), stopping at the first error or Ctrl-C."""
    if workers <= 1:
        for unit in units:
            work(unit)
            done()
        return
    with ThreadPoolExecutor(workers) as pool:
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
    """The workers are the threads: torch's own wait for each other in the small blocks, and add in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def manifest(plans: list[RankPlan], records: list[UnitRecord], ranges: dict[str, ActivationRange]) -> dict[str, Any]:
    """The precision that every tensor got; raises CheckFailed where it is not the one that was asked for."""
    asked = {linear.global_name: linear.precision for plan in plans for linear in plan.linears}
    tensors: dict[str, dict[str, Any]] = {}
    for record in records:
        tensors |= {name: {"precision": dtype} for name, dtype in record.plain.items()}
        for key, found in record.layers.items():
            name = key.partition("/")[0]
            if found["precision"] != asked[name]:
                raise CheckFailed(f"{name}: {asked[name]} was asked for, {found['precision']} was written")
            _merge(tensors.setdefault(name, {"precision": found["precision"]}), found, ranges.get(name))
    return tensors


def _merge(entry: dict[str, Any], found: dict[str, Any], activations: ActivationRange | None) -> None:
    """Fold one layer, or one expert of a stack, into its layer's entry."""
    if found["origin"] is not None:
        entry["origin"] = found["origin"]
    if found["scale_min"] is None:
        return
    entry["scale_min"] = min(found["scale_min"], entry.get("scale_min", found["scale_min"]))
    entry["scale_max"] = max(found["scale_max"], entry.get("scale_max", found["scale_max"]))
    # Of weights that came quantized there is nothing to compare with.
    if found["weight_squares"] or found["origin"] is None:
        # The worst expert counts: an average would hide one that is broken.
        error = (found["error_squares"] / found["weight_squares"]) ** 0.5 if found["weight_squares"] else 0.0
        entry["relative_error"] = max(error, entry.get("relative_error", 0.0))
    entry |= {key: found[key] for key in ("group_size", "activation_scale") if found[key] is not None}
    if activations and activations.tokens_per_expert:
        entry["calibration_tokens_per_expert"] = list(activations.tokens_per_expert)


def rank_digests(plans: list[RankPlan], records: list[UnitRecord]) -> list[dict[str, str]]:
    """For each rank, the content digest of each of its tensors."""
    parts = {key: digest for record in records for key, digest in record.digests.items()}
    ranks: list[dict[str, str]] = []
    for rank, plan in enumerate(plans):
        stacks = plan_stacks(plan)
        ranks.append({c.spec.name: Digest.of(constant_values(c)) for c in plan.constants})
        for spec in plan.tensors():
            if spec.name in ranks[rank]:
                continue
            key, count = f"rank{rank}/{spec.name}", stacks.get(spec.name)
            ranks[rank][spec.name] = (
                parts[key] if count is None else stack_digest(parts[f"{key}/{expert}"] for expert in range(count))
            )
    return ranks


def _write_configs(
    partial: Path,
    source: CheckpointSource,
    layout: Layout,
    precision: Precision,
    provenance: dict[str, Any],
    found: dict[str, Any],
) -> None:
    write_json(partial / "config.json", tensorrt_llm_config(source.config, layout, precision))
    authority = {
        "format": FORMAT_VERSION,
        "trtbuild": trtbuild.__version__,
        "dialect": precision.dialect,
        "source": {
            "model": source.model, "revision": source.revision, "digest": source.digest, "tensors": found["source"],
        },
        "model": source.config.to_dict(),
        "layout": dataclasses.asdict(layout),
        "precision": precision.to_dict(),
        **provenance,
        "tensors": found["tensors"],
        "digest_algorithm": ALGORITHM,
        "digests": found["digests"],
    }  # fmt: skip
    write_json(partial / AUTHORITY, authority)


def default_workers() -> int:
    return min(8, os.cpu_count() or 1)
