"""The builder `tensorrt-llm`: rank checkpoint, trtllm-build for each rank, engines/NAME with a passport."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtbuild.checkpoints.rank_checkpoint import RankCheckpoint, weights_digest
from trtbuild.checkpoints.tensorrt_llm_config import quantization_section
from trtbuild.engines.compile import CompileReport, common_passport, copy_companions
from trtbuild.engines.job import Job, convert_model
from trtbuild.engines.passport import PASSPORT, Passport, file_digests
from trtbuild.engines.tensorrt_llm.engine_config import TrtllmEngine
from trtbuild.engines.tensorrt_llm.flags import Facts, FlagValue, derive, problems
from trtbuild.engines.tensorrt_llm.machine import (
    BuildMachine,
    check_machine,
    gpu_problems,
    target_problems,
    this_machine,
)
from trtbuild.engines.tensorrt_llm.rank_processes import LOGS, RankBuilds, rank_command
from trtbuild.engines.tensorrt_llm.validation import check_engine
from trtbuild.errors import refuse_all
from trtbuild.pools import Pool
from trtbuild.progress import ProgressFactory, no_progress
from trtbuild.workspace import Workspace, read_json, staged, write_json

BUILDER = "tensorrt-llm"


@dataclass(frozen=True)
class TrtllmJob:
    """A recipe for TensorRT-LLM with its flags settled; `flags` are without paths."""

    job: Job
    machine: BuildMachine
    flags: Mapping[str, FlagValue]

    @classmethod
    def resolve(cls, job: Job, machine: BuildMachine | None = None) -> TrtllmJob:
        """Raises Refused for flags that trtllm-build would refuse or change; see `check` for the machine."""
        refuse_all("--builder tensorrt-llm", target_problems(job.recipe.target))
        machine = this_machine() if machine is None else machine
        facts = _facts(job, machine.sm or _sm_of(job.recipe.target))
        refuse_all("[trtllm]", problems(facts, job.recipe.trtllm))
        if facts.sm is not None:
            refuse_all("--builder tensorrt-llm", gpu_problems(facts.sm, job.precision))
        return cls(job, machine, derive(facts, job.recipe.trtllm))

    def check(self) -> None:
        """Raises Refused where this machine cannot build."""
        check_machine(self.machine, self.job.precision, self.job.recipe.target)

    def paths(self, workspace: Workspace, checkpoint: Path) -> dict[str, FlagValue]:
        """Flags that name files: the rank checkpoint, and the timing cache of this GPU and release."""
        name = self.machine.gpus[0].name if self.machine.gpus else "GPU"
        kind = "".join(c if c.isalnum() else "-" for c in name).strip("-").lower()
        cache = workspace.build / ".timing_cache" / f"{self.machine.release}-{kind}.cache"
        return {
            "checkpoint_dir": str(checkpoint), "input_timing_cache": str(cache), "output_timing_cache": str(cache),
            "log_level": "info",
        }  # fmt: skip


def _facts(job: Job, sm: int | None) -> Facts:
    section = quantization_section(job.config, job.layout, job.precision)
    return Facts(
        architecture=job.config.architecture, dtype=job.precision.dtype,
        quant_algo=section["quant_algo"], kv_cache_quant_algo=section["kv_cache_quant_algo"],
        is_moe=job.config.moe is not None, tp=job.layout.tp, pp=job.layout.pp,
        max_batch_size=job.limits.max_batch_size, max_seq_len=job.limits.max_seq_len,
        max_input_len=job.limits.max_input_len or job.limits.max_seq_len - 1, sm=sm,
    )  # fmt: skip


def _sm_of(target: Sequence[str]) -> int | None:
    return int(target[0][2:]) if target else None


def compile_trtllm(
    job: Job,
    workspace: Workspace,
    *,
    workers: int | None = None,
    force: bool = False,
    progress: ProgressFactory = no_progress,
    pool: Pool | None = None,
    machine: BuildMachine | None = None,
) -> CompileReport:
    """HF checkpoint -> build/NAME -> engines/NAME; finished stages and ranks are not run again."""
    started = time.monotonic()
    resolved = TrtllmJob.resolve(job, machine)
    resolved.check()
    checkpoint = convert_model(job, workspace, workers=workers, force=force, progress=progress, pool=pool)
    final = workspace.engines / job.recipe.engine_name
    with staged(final, _request(resolved, checkpoint), force=force) as directory:
        if directory is not None:
            seconds = _build(resolved, checkpoint, directory, workspace, workers, progress)
            check_engine(
                directory, read_json(checkpoint.directory / "config.json"), resolved.flags, resolved.machine.release
            )
            copy_companions(job.source, directory)
            shutil.rmtree(directory / LOGS)
            write_json(directory / PASSPORT, _passport(resolved, checkpoint, directory, seconds))
    passport = Passport.open(final)
    if directory is None:
        passport.check_files()
    return CompileReport(final, passport.data, time.monotonic() - started, directory is not None)


def _request(resolved: TrtllmJob, checkpoint: RankCheckpoint) -> dict[str, Any]:
    machine = resolved.machine
    return {
        **resolved.job.request(),
        "weights": weights_digest(checkpoint),
        "flags": dict(resolved.flags),
        "release": machine.release, "tensorrt": machine.installed.tensorrt, "gpu": machine.gpus[0].target,
    }  # fmt: skip


def _build(
    resolved: TrtllmJob,
    checkpoint: RankCheckpoint,
    directory: Path,
    workspace: Workspace,
    workers: int | None,
    progress: ProgressFactory,
) -> dict[int, float]:
    """Seconds by rank, of those that were built now."""
    paths = resolved.paths(workspace, checkpoint.directory.absolute())
    Path(str(paths["output_timing_cache"])).parent.mkdir(parents=True, exist_ok=True)
    gpus = [gpu.index for gpu in resolved.machine.gpus][:workers]
    builds = RankBuilds(directory, {**paths, **resolved.flags}, gpus, progress)
    return builds.run(checkpoint.layout.world_size)


def _passport(
    resolved: TrtllmJob, checkpoint: RankCheckpoint, directory: Path, seconds: Mapping[int, float]
) -> dict[str, Any]:
    job, machine = resolved.job, resolved.machine
    gpu, ranks = machine.gpus[0], range(job.layout.world_size)
    builder = {
        "name": BUILDER, "version": machine.release, "tensorrt": machine.installed.tensorrt,
        "container": machine.installed.container.image if machine.installed.container else None,
        "driver": gpu.driver, "gpu": gpu.name, "flags": dict(resolved.flags),
        "commands": [["python", *rank_command(rank, resolved.flags)] for rank in ranks],
        "seconds": {str(rank): round(taken, 1) for rank, taken in sorted(seconds.items())},
    }  # fmt: skip
    return {
        **common_passport(job, checkpoint),
        "targets": [gpu.target],
        "kv_cache": [_kv_cache(TrtllmEngine.open(directory))],
        "builder": builder,
        "segments": [],
        "plans": [],
        "digests": file_digests(directory, job.layout, [], weights=False),
    }


def _kv_cache(engine: TrtllmEngine) -> dict[str, Any]:
    """Every rank's: blocks of tokens that requests share, in the model's 16-bit type where `type` is None."""
    form = "paged" if engine.has_paged_kv_cache else "linear"
    return {"form": form, "type": engine.kv_cache_quant_algo, "tokens_per_block": engine.tokens_per_block}
