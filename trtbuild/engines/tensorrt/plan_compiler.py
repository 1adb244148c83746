"""One plan: emit the network, compile it, read the result back and verify it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from trtbuild.checkpoints.rank_checkpoint import WeightReader
from trtbuild.engines.tensorrt.log import build_log
from trtbuild.engines.tensorrt.network import BuiltNetwork, build_network, builder_config
from trtbuild.engines.tensorrt.plan_reader import read_plan
from trtbuild.engines.tensorrt.plan_record import PlanRecord
from trtbuild.engines.tensorrt.plan_tasks import PlanTask
from trtbuild.engines.tensorrt.plan_verifier import expect, verify_plan
from trtbuild.errors import EngineBuildError

if TYPE_CHECKING:
    from trtbuild.engines.tensorrt.experts import MoeForm
    from trtbuild.engines.tensorrt.ops import Phase


def compile_task(task: PlanTask, open_reader: Callable[[int], WeightReader] | None) -> tuple[PlanRecord, bytes, str]:
    """The plan's record, its bytes and the builder's log.

    Raises `EngineBuildError` where TensorRT fails or logs an error, `CheckFailed` where the plan is not what was asked.
    """
    started = time.monotonic()
    options, phase = task.options, cast("Phase", task.phase)
    read = open_reader(task.plan.layout.rank) if task.embedded and open_reader else None
    form = cast("MoeForm | None", options.moe_form)
    built = build_network(task.plan, task.segment, phase, options.limits, form, read)
    plan = compile_network(built, options.targets, task.name)
    log = build_log()
    outputs = tuple(b.name for b in built.bindings if b.role == "output" or b.alias is not None)
    expected = expect(
        task.plan, task.segment, phase, options.limits, options.targets, built.moe_form, outputs, task.embedded
    )
    verification = verify_plan(task.name, read_plan(plan, log.lines), expected)
    record = PlanRecord(
        name=task.name,
        file=f"{task.name}.plan",
        kind=task.segment.kind,
        phase=task.phase,
        serves=task.serves,
        moe_form=built.moe_form,
        embedded=task.embedded,
        targets=options.targets,
        bindings=tuple(built.bindings),
        size=len(plan),
        scratch_bytes=max(verification["scratch_bytes"]),
        weight_bytes=verification["weight_bytes"],
        build_seconds=round(time.monotonic() - started, 3),
        digest=task.digest,
        verification=verification,
    )
    return record, plan, "\n".join(log.lines) + "\n"


def compile_network(built: BuiltNetwork, targets: tuple[str, ...], name: str) -> bytes:
    """The serialized plan; raises `EngineBuildError` with what TensorRT logged."""
    log = build_log()
    plan = built.builder.build_serialized_network(built.network, builder_config(built, targets))
    log.check(f"plan {name} for {' '.join(targets)}")
    if plan is None:
        raise EngineBuildError(f"plan {name} for {' '.join(targets)}: TensorRT returned no plan and logged no error")
    return bytes(plan)
