"""The road from a job to an engine directory: convert, build plans, publish with a passport."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trtbuild
from trtbuild.checkpoints.convert import default_workers
from trtbuild.checkpoints.rank_checkpoint import AUTHORITY, RankCheckpoint, open_rank, rank_file, weights_digest
from trtbuild.checkpoints.rank_tensors import RankPlan
from trtbuild.checkpoints.source import COMPANION_FILES, LEGAL_FILES, CheckpointSource
from trtbuild.engines.job import Job, convert_model
from trtbuild.engines.passport import (
    FORMAT_VERSION,
    MODEL_CARD_DIRECTORY,
    PASSPORT,
    PLAN_DIRECTORY,
    TOKENIZER_DIRECTORY,
    Passport,
    file_digests,
)
from trtbuild.engines.tensorrt.builder import build_plans
from trtbuild.engines.tensorrt.plan_tasks import BuildOptions, engine_segments, library_version, plan_tasks
from trtbuild.errors import TrtBuildError
from trtbuild.pools import Pool
from trtbuild.progress import ProgressFactory, no_progress
from trtbuild.workspace import Workspace, staged, write_json


@dataclass(frozen=True)
class CompileReport:
    """What `trtbuild compile` tells at its end; `built` is False where the engine was there already.

    `kernels` says how this machine's GPUs took the plans, None where none of them is one that the engine is for.
    """

    directory: Path
    passport: dict[str, Any]
    seconds: float
    built: bool
    kernels: str | None = None


def compile_engine(
    job: Job,
    workspace: Workspace,
    *,
    workers: int | None = None,
    force: bool = False,
    progress: ProgressFactory = no_progress,
    pool: Pool | None = None,
) -> CompileReport:
    """HF checkpoint -> build/NAME -> engines/NAME; finished stages are not run again."""
    started = time.monotonic()
    job = job.settle(workspace, progress)
    final = workspace.engines / job.recipe.engine_name
    checkpoint = None
    if not job.recipe.plan_only:
        checkpoint = convert_model(job, workspace, workers=workers, force=force, progress=progress, pool=pool)
    request = job.request() | {"weights": weights_digest(checkpoint) if checkpoint else None}
    with staged(final, request, force=force) as directory:
        if directory is not None:
            if checkpoint:
                _link_weights(checkpoint, directory)
            copy_companions(job.source, directory)
            built = _build_plans(job, checkpoint, directory / PLAN_DIRECTORY, workers, progress, pool)
            write_json(directory / PASSPORT, _passport(job, checkpoint, directory, built))
    passport = Passport.open(final)
    if directory is None:
        passport.check_files()
    kernels = _warm(passport) if directory is not None and passport.has_rank_checkpoint else None
    return CompileReport(final, passport.data, time.monotonic() - started, directory is not None, kernels)


def _warm(passport: Passport) -> str | None:
    """Fill the runtime cache where this machine can run the engine; a GPU that fails does not undo the engine."""
    from trtbuild.engines.device.choice import choose_executor, examine_machine
    from trtbuild.engines.device.engine_ranks import warm

    if choose_executor(passport, "auto", None, examine_machine(passport)).name != "tensorrt":
        return None
    try:
        report = warm(passport.directory)
    except TrtBuildError as error:
        return f"not compiled for this machine's GPU: {error.message}"
    return f"compiled for this machine's GPU in {report.seconds:.1f} s, {report.cache_bytes / 2**20:.1f} MiB"


def _link_weights(checkpoint: RankCheckpoint, target: Path) -> None:
    """Hard links cost no disk; across file systems the files are copied."""
    names = [rank_file(rank) for rank in range(checkpoint.layout.world_size)] + [AUTHORITY, "config.json"]
    for name in names:
        (target / name).unlink(missing_ok=True)
        try:
            os.link(checkpoint.directory / name, target / name)
        except OSError:
            shutil.copyfile(checkpoint.directory / name, target / name)


def copy_companions(source: CheckpointSource, directory: Path) -> None:
    """Tokenizer, generation config, and config.json, by which transformers picks the tokenizer; licence, model card."""
    folders = {TOKENIZER_DIRECTORY: ("config.json", *COMPANION_FILES), MODEL_CARD_DIRECTORY: LEGAL_FILES}
    for folder, names in folders.items():
        (directory / folder).mkdir(exist_ok=True)
        for name in names:
            if (source.directory / name).is_file():
                shutil.copyfile(source.directory / name, directory / folder / name)


def _build_plans(
    job: Job,
    checkpoint: RankCheckpoint | None,
    directory: Path,
    workers: int | None,
    progress: ProgressFactory,
    pool: Pool | None,
) -> dict[str, Any]:
    """Compile and verify every plan: the passport's `builder`, `segments` and `plans`."""
    recipe = job.recipe
    options = BuildOptions(
        job.limits, job.targets, recipe.embed_weights, None if recipe.moe_form == "auto" else recipe.moe_form,
        recipe.segment_layers,
    )  # fmt: skip
    plans = job.plans
    reader = partial(open_rank, checkpoint.directory.absolute()) if checkpoint else None
    digest = weights_digest(checkpoint) if checkpoint else None
    with progress("compiling", len(plan_tasks(plans, options, digest or "none")), "plans") as bar:
        records = build_plans(
            plans, options, directory, open_reader=reader, weights_digest=digest,
            workers=workers or default_workers(), pool=pool, on_plan=lambda record, _, __: bar.advance(1, record.name),
        )  # fmt: skip
    segments = [[asdict(segment) for segment in engine_segments(plan, options)] for plan in plans]
    return {
        "builder": {"name": recipe.builder, "version": library_version()},
        "segments": segments,
        "plans": [record.to_dict() for record in records],
    }


def _kv_cache(plan: RankPlan) -> dict[str, Any]:
    """One rank's caches: latent vectors (MLA) or heads, (heads, width) of each in a layer, 16-bit values."""
    shapes = plan.cache_shapes()
    per_layer = sum(2 * heads * width for heads, width in shapes.values())
    return {
        "form": "latent" if plan.config.mla else "heads",
        "caches": shapes,
        "bytes_per_token": per_layer * len(plan.layers),
    }


def common_passport(job: Job, checkpoint: RankCheckpoint | None) -> dict[str, Any]:
    """What a passport says of every builder's engines."""
    return {
        "format": FORMAT_VERSION,
        "name": job.recipe.engine_name,
        "trtbuild": trtbuild.__version__,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "rebuild": job.recipe.command(),
        "recipe": job.recipe.model_dump(mode="json"),
        "source": {
            "model": job.source.model, "revision": job.source.revision, "digest": job.source.digest,
            "license": job.source.license, "built_in_config": job.source.has_built_in_config,
        },
        "model": job.config.to_dict(),
        "layout": asdict(job.layout),
        "precision": job.precision.to_dict(),
        "limits": asdict(job.limits),
        "tensors": checkpoint.authority["tensors"] if checkpoint else None,
        "mixture": job.mixture,
        "notes": checkpoint.authority["notes"] if checkpoint else [],
        "accuracy": None,
    }  # fmt: skip


def _passport(job: Job, checkpoint: RankCheckpoint | None, directory: Path, built: dict[str, Any]) -> dict[str, Any]:
    return {
        **common_passport(job, checkpoint),
        "targets": list(job.targets),
        "kv_cache": [_kv_cache(plan) for plan in job.plans],
        **built,
        "digests": file_digests(directory, job.layout, built["plans"], weights=checkpoint is not None),
    }
