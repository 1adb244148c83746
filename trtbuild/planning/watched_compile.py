"""`compile`, with the machine checked before and the memory watched meanwhile."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from trtbuild.checkpoints.convert import default_workers
from trtbuild.engines.compile import CompileReport, compile_engine
from trtbuild.engines.job import Job
from trtbuild.engines.tensorrt_llm.builder import compile_trtllm
from trtbuild.planning.host import HostForecaster, Range, check_host
from trtbuild.planning.peak_memory import PeakMemory
from trtbuild.pools import Pool
from trtbuild.progress import ProgressFactory, no_progress
from trtbuild.workspace import Workspace


@dataclass(frozen=True)
class MemoryReport:
    """Peak of anonymous memory, of all processes together, in bytes: measured, and forecast before.

    With a pool it is that of this machine alone, for which there is no forecast.
    """

    measured: int
    forecast: Range | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compile_watched(
    job: Job,
    workspace: Workspace,
    *,
    workers: int | None = None,
    force: bool = False,
    fit_check: bool = True,
    progress: ProgressFactory = no_progress,
    pool: Pool | None = None,
) -> tuple[CompileReport, MemoryReport]:
    """Raises `Refused` before work where memory or disk surely do not suffice, unless `fit_check` is off."""
    workers = workers or default_workers()
    forecast = HostForecaster(job, workers).forecast()
    if pool is not None:
        here = {stage: needed for stage, needed in forecast.memory.items() if stage == "calibrate"}
        forecast = replace(forecast, memory=here)
    if fit_check:
        check_host(job, workspace, forecast)
    build = compile_trtllm if job.recipe.builder == "tensorrt-llm" else compile_engine
    with PeakMemory() as peak:
        report = build(job, workspace, workers=workers, force=force, progress=progress, pool=pool)
    return report, MemoryReport(peak.num_bytes, forecast.peak if pool is None else None)
