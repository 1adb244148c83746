"""What `convert` and `compile` take of the machine that runs them: memory, disk and time, forecast as ranges.

The constants are measured (perf/planning.py; figures and machine in perf/results/planning.jsonl). A range spans what
another machine of that class and a busier one showed; it is an estimate, and the printed peak of `compile` its check.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from trtbuild.checkpoints.precision import CALIBRATED
from trtbuild.checkpoints.safetensors_file import layout_header
from trtbuild.checkpoints.source_tensors import expected_shapes
from trtbuild.engines.calibration.text import NUM_SEQUENCES, SEQUENCE_LENGTH
from trtbuild.engines.job import Job
from trtbuild.engines.network.segments import moe_of
from trtbuild.engines.precision_choice import needs_text
from trtbuild.engines.tensorrt.plan_tasks import BuildOptions, PlanTask, plan_tasks
from trtbuild.engines.tensorrt.targets import formats_of
from trtbuild.errors import refuse_all
from trtbuild.planning.model_size import count_parameters
from trtbuild.workspace import Workspace

MIB = 2**20
# Anonymous memory of the interpreter with torch, and of a process that builds plans, before any work.
PROCESS_BYTES = 160 * MIB
BUILD_PROCESS_BYTES = 130 * MIB
# A builder's memory for each decoder layer and each expert of its network, and for a byte of embedded weights.
LAYER_BYTES, EXPERT_BYTES = 10 * MIB, 8 * MIB
EMBEDDED_FACTOR = (1.5, 4.5)
# Conversion works in blocks of rows: anonymous memory of one worker, whatever the matrix.
CONVERT_BLOCKS = (4 * MIB, 64 * MIB)
# How much more than the above processes took elsewhere: allocators keep pages, imports differ.
MEMORY_SPREAD = (0.8, 1.6)
# Source bytes that one worker converts in a second of processor time.
CONVERT_RATE = {
    "bf16": 1300e6, "fp16": 1300e6, "fp8": 330e6, "fp8-dynamic": 300e6, "int8": 420e6, "int4": 360e6,
}  # fmt: skip
# Operations a second of one core in a 16-bit matrix multiply, as calibration does them.
CPU_OPS = 53e9
# Seconds of building one plan: any plan, one decoder layer, one expert; and of one byte of embedded weights.
PLAN_SECONDS, LAYER_SECONDS, EXPERT_SECONDS, EMBED_SECONDS = 0.6, 0.25, 0.27, 30e-9
# Size of a plan without weights: any plan, one decoder layer, one expert.
PLAN_BYTES, LAYER_PLAN_BYTES, EXPERT_PLAN_BYTES = MIB // 2, MIB, MIB
# From processor time to time: a faster machine; waiting for the disk, and cores that share their caches.
TIME_SPREAD = (0.7, 3.0)


@dataclass(frozen=True)
class Range:
    """An estimate between `low` and `high`."""

    low: float
    high: float

    @classmethod
    def around(cls, value: float, spread: tuple[float, float]) -> Range:
        return cls(value * spread[0], value * spread[1])


@dataclass(frozen=True)
class HostForecast:
    """Anonymous bytes and seconds by stage (convert, calibrate, compile), and bytes of disk by what lies there."""

    memory: dict[str, Range]
    seconds: dict[str, Range]
    disk: dict[str, int]
    num_plans: int

    @property
    def peak(self) -> Range:
        """The stages run one after the other."""
        return Range(max(r.low for r in self.memory.values()), max(r.high for r in self.memory.values()))


@dataclass(frozen=True)
class HostForecaster:
    """Forecasts for one job with so many parallel workers."""

    job: Job
    workers: int

    def forecast(self) -> HostForecast:
        memory: dict[str, Range] = {}
        seconds: dict[str, Range] = {}
        disk: dict[str, int] = {}
        # What trtllm-build takes was never seen here.
        is_ours, num_plans = self.job.recipe.builder != "tensorrt-llm", 0
        if is_ours:
            memory["compile"], seconds["compile"] = self._compile_memory(), self._compile_seconds()
            disk["plans"], num_plans = sum(_plan_bytes(task) for task in self._tasks), len(self._tasks)
        if not self.job.recipe.plan_only:
            memory["convert"], seconds["convert"] = self._convert_memory(), self._convert_seconds()
            disk |= {"source checkpoint": self._source_bytes, "rank checkpoint": sum(rank_file_sizes(self.job))}
            if needs_text(self.job.precision):
                memory["calibrate"], seconds["calibrate"] = self._calibrate_memory(), self._calibrate_seconds()
        return HostForecast(memory, seconds, disk, num_plans)

    @cached_property
    def _tasks(self) -> list[PlanTask]:
        recipe = self.job.recipe
        form = None if recipe.moe_form == "auto" else recipe.moe_form
        options = BuildOptions(self.job.limits, self.job.targets, recipe.embed_weights, form, recipe.segment_layers)
        return plan_tasks(self.job.plans, options, "forecast")

    @cached_property
    def _matrices(self) -> list[int]:
        """Bytes of every source tensor, in 16 bit."""
        return [2 * math.prod(shape) for shape in expected_shapes(self.job.config).values()]

    @property
    def _source_bytes(self) -> int:
        return sum(self._matrices)

    def _convert_memory(self) -> Range:
        low, high = (PROCESS_BYTES + self.workers * blocks for blocks in CONVERT_BLOCKS)
        return _spread(low, high)

    def _convert_seconds(self) -> Range:
        slowest = min(CONVERT_RATE[name] for name in formats_of(self.job.precision))
        rate = slowest * min(self.workers, os.cpu_count() or 1)
        return Range.around(self._source_bytes / rate, TIME_SPREAD)

    def _calibrate_memory(self) -> Range:
        """One decoder layer's weights in 16 bit, and the hidden states of all sequences a few times over.

        int4's methods also hold the second moments of the widest input, float32, up to four times, and the widest
        activations of all tokens (an expert's: of its part).
        """
        config = self.job.config
        outer = 2 * config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
        layer = (self._source_bytes - outer) // config.num_layers
        hidden = 2 * NUM_SEQUENCES * SEQUENCE_LENGTH * config.hidden_size
        moments = activations = 0
        if self.job.precision.weights in CALIBRATED:
            width = max(linear.in_features for plan in self.job.plans for linear in plan.linears) * self.job.layout.tp
            moments, activations = 4 * width**2, 2 * NUM_SEQUENCES * SEQUENCE_LENGTH * width
        low = PROCESS_BYTES + layer + 2 * hidden + 2 * moments + activations
        return _spread(low, low + 8 * hidden + 2 * moments + 3 * activations)

    def _calibrate_seconds(self) -> Range:
        """Every expert sees every token."""
        operations = 2 * count_parameters(self.job.config).total * NUM_SEQUENCES * SEQUENCE_LENGTH
        return Range.around(operations / (CPU_OPS * (os.cpu_count() or 1)), TIME_SPREAD)

    def _compile_memory(self) -> Range:
        """Of the parent, and of the largest plans that are built at the same time."""
        children = [
            sorted((_build_memory(task, factor) for task in self._tasks), reverse=True) for factor in EMBEDDED_FACTOR
        ]
        low, high = children[0][0], sum(children[1][: self.workers])
        return _spread(PROCESS_BYTES + low, PROCESS_BYTES + max(low, high))

    def _compile_seconds(self) -> Range:
        parallel = min(self.workers, len(self._tasks), os.cpu_count() or 1)
        each = [_build_seconds(task) for task in self._tasks]
        return Range.around(max(sum(each) / parallel, *each), TIME_SPREAD)


def _spread(low: float, high: float) -> Range:
    return Range(low * MEMORY_SPREAD[0], high * MEMORY_SPREAD[1])


def rank_file_sizes(job: Job) -> list[int]:
    """Bytes of each rank file, header and all, exactly."""
    return [
        len(layout_header(plan.tensors(), {"format": "pt"})[0]) + sum(spec.num_bytes for spec in plan.tensors())
        for plan in job.plans
    ]


def _num_experts(task: PlanTask) -> int:
    """Experts whose networks stand in the plan one by one."""
    moe = moe_of(task.plan, task.segment)
    return task.segment.num_layers * len(task.plan.layout.experts(moe.num_experts)) if moe else 0


def _embedded_bytes(task: PlanTask) -> int:
    return sum(spec.num_bytes for spec in task.segment.weights(task.plan).values()) if task.embedded else 0


def _build_memory(task: PlanTask, embedded_factor: float) -> int:
    network = task.segment.num_layers * LAYER_BYTES + _num_experts(task) * EXPERT_BYTES
    return BUILD_PROCESS_BYTES + network + int(embedded_factor * _embedded_bytes(task))


def _build_seconds(task: PlanTask) -> float:
    network = task.segment.num_layers * LAYER_SECONDS + _num_experts(task) * EXPERT_SECONDS
    return PLAN_SECONDS + network + _embedded_bytes(task) * EMBED_SECONDS


def _plan_bytes(task: PlanTask) -> int:
    code = task.segment.num_layers * LAYER_PLAN_BYTES + _num_experts(task) * EXPERT_PLAN_BYTES
    return PLAN_BYTES + code + _embedded_bytes(task)


def check_host(job: Job, workspace: Workspace, forecast: HostForecast) -> None:
    """Raises `Refused`, before any work, where this machine surely has too little memory or disk.

    What an earlier run has written counts as free, for it is taken up again or replaced.
    """
    refuse_all("this machine (--no-fit-check tries all the same)", _host_problems(job, workspace, forecast))


def _host_problems(job: Job, workspace: Workspace, forecast: HostForecast) -> Iterator[str]:
    memory = machine_memory()
    for stage, needed in forecast.memory.items():
        if needed.low > memory:
            yield f"{stage} takes at least {needed.low / 2**30:.1f} GiB of memory, it has {memory / 2**30:.1f} GiB"
    name = job.recipe.engine_name
    needed = forecast.disk["plans"] + forecast.disk.get("rank checkpoint", 0)
    there = sum(_disk_bytes(_results(stage, name)) for stage in (workspace.build, workspace.engines))
    free = shutil.disk_usage(_existing_parent(workspace.root)).free
    if needed - there > free:
        yield (
            f"rank checkpoint and plans take {needed / 2**30:.2f} GiB of disk, {free / 2**30:.2f} GiB are free in "
            f"{workspace.root}"
        )


def _results(stage: Path, name: str) -> Sequence[Path]:
    return [stage / name, stage / f".{name}.partial"]


def _disk_bytes(directories: Sequence[Path]) -> int:
    files = (file for directory in directories if directory.is_dir() for file in directory.rglob("*"))
    # Hard links to the rank checkpoint's files take nothing more.
    stats = {stat.st_ino: stat for stat in (file.stat() for file in files if file.is_file())}
    return sum(stat.st_blocks * 512 for stat in stats.values())


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def machine_memory() -> int:
    """RAM of this machine, or of this container."""
    import psutil

    total = psutil.virtual_memory().total
    for file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            total = min(total, int(file.read_text()))
        except (OSError, ValueError):
            continue
    return total
