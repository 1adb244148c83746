"""Engines of the device executor over fake TensorRT: plans are the emitted networks, never compiled."""

from __future__ import annotations

import threading
from typing import Any

import torch
from crafted_tensors import CraftedRanks
from fake_tensorrt import FakeDevice, FakeTensorRT, LockstepGroup
from helpers import rank_tensors

from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import Precision
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.rank_tensors import RankPlan
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.engines.device.executor import TensorRTExecutor
from trtbuild.engines.device.library import PlanLibrary
from trtbuild.engines.device.rank_runner import RankRunner
from trtbuild.engines.device.steps import Step
from trtbuild.engines.device.watchdog import Watchdog
from trtbuild.engines.limits import EngineLimits
from trtbuild.engines.network.segments import cut_into_segments
from trtbuild.engines.reference.executor import ReferenceExecutor
from trtbuild.engines.tensorrt.network import BuiltNetwork, build_network
from trtbuild.engines.tensorrt.plan_record import PlanRecord
from trtbuild.engines.tensorrt.plan_tasks import BuildOptions, PlanTask, plan_tasks

LIMITS = EngineLimits(max_batch_size=4, max_seq_len=112, chunk_size=80)


def emit(
    plans: list[RankPlan], tensors: list[dict[str, torch.Tensor]], limits: EngineLimits, **options: Any
) -> tuple[list[PlanRecord], dict[bytes, BuiltNetwork]]:
    """Every plan's record and, by the contents of its file, its network."""
    records, networks = [], {}
    for task in plan_tasks(plans, BuildOptions(limits, ("sm89",), **options), "digest"):
        read = tensors[task.plan.layout.rank].__getitem__ if task.embedded else None
        built = build_network(task.plan, task.segment, task.phase, limits, None, read)  # type: ignore[arg-type]
        records.append(_record(task, built))
        networks[task.name.encode()] = built
    return records, networks


def _record(task: PlanTask, built: BuiltNetwork) -> PlanRecord:
    tp = task.plan.layout.layout.tp
    collectives = 0 if tp == 1 or task.segment.kind == "embed" else 1
    return PlanRecord(
        name=task.name, file=f"{task.name}.plan", kind=task.segment.kind, phase=task.phase, serves=task.serves,
        moe_form=built.moe_form, embedded=task.embedded, targets=("sm89",), bindings=tuple(built.bindings),
        size=0, scratch_bytes=0, weight_bytes=0, build_seconds=0.0, digest=task.digest,
        verification={"num_collectives": collectives, "stream_capturable": built.moe_form is None},
    )  # fmt: skip


class Ranks:
    """Every rank of an engine in this process; those other than 0 follow in threads."""

    def __init__(
        self,
        source: CheckpointSource,
        precision: Any = None,
        layout: Layout | None = None,
        *,
        limits: EngineLimits = LIMITS,
        segment_layers: int | None = 1,
        cache: Any = None,
        wide: bool = True,
        crafted: CraftedRanks | None = None,
    ) -> None:
        self.layout, self.limits = layout or Layout(), limits
        if crafted is None:
            wanted = Precision.resolve(precision or source.config.dtype, source.config.dtype)
            self.plans = [plan_rank(source.config, rank, wanted) for rank in self.layout.ranks()]
            amax = {linear.global_name: 6.0 for linear in self.plans[0].linears}
            self.tensors = rank_tensors(source, self.layout, precision, amax)
        else:
            self.plans, self.tensors = crafted.plans, crafted.tensors
        self.records, networks = emit(self.plans, self.tensors, limits, segment_layers=segment_layers)
        self.devices = [FakeDevice(wide=wide) for _ in self.plans]
        self.trts = [FakeTensorRT(networks, device) for device in self.devices]
        self._segment_layers, self._cache = segment_layers, cache
        self.runners = [self.runner(rank) for rank in range(len(self.plans))]

    def runner(self, rank: int) -> RankRunner:
        device = self.devices[rank]
        library = PlanLibrary(self.trts[rank], device.stream_handle, self._cache)
        return RankRunner(
            self.plans[rank], cut_into_segments(self.plans[rank], self._segment_layers), self.records,
            lambda record: record.name.encode(), self.tensors[rank].__getitem__, self.limits, library, device,
        )  # fmt: skip

    def executor(self, num_slots: int = 3) -> TensorRTExecutor:
        group = LockstepGroup(len(self.runners)) if len(self.runners) > 1 else None
        for rank, runner in enumerate(self.runners):
            runner.open(num_slots, (group, rank) if group else None)
        others: Any = Followers(self.runners[1:]) if group else None
        return TensorRTExecutor(self.runners[0], others, Watchdog(0))

    def reference(self) -> ReferenceExecutor:
        read = lambda rank, name: self.tensors[rank][name]  # noqa: E731
        return ReferenceExecutor(self.plans, read, self.limits, dtype=torch.float32)


class Followers:
    """`rank_processes.RankProcesses` in threads."""

    def __init__(self, runners: list[RankRunner]) -> None:
        self._runners = runners
        self._threads: list[threading.Thread] = []
        self.logits: dict[int, Any] = {}

    def step(self, step: Step) -> None:
        self.join()
        self._threads = [threading.Thread(target=self._run, args=(r, step), daemon=True) for r in self._runners]
        for thread in self._threads:
            thread.start()

    def _run(self, runner: RankRunner, step: Step) -> None:
        self.logits[runner.rank] = runner.run(step)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)

    def save_cache(self) -> None:
        pass

    def close(self) -> None:
        self.join()
