"""Engines that the reference executor can run, made in a second: everything but the plans, which nothing reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from trtbuild.checkpoints.rank_tensors import RankPlan
from trtbuild.engines.compile import compile_engine
from trtbuild.engines.job import Job
from trtbuild.engines.recipe import Recipe
from trtbuild.engines.tensorrt.bindings import Binding
from trtbuild.engines.tensorrt.plan_record import PlanRecord, ServedSegment
from trtbuild.engines.tensorrt.plan_tasks import BuildOptions
from trtbuild.workspace import Workspace

SMALL: dict[str, Any] = {"target": ("sm89",), "max_batch_size": 4, "max_seq_len": 256, "chunk_size": 64}


def no_plans(plans: Sequence[RankPlan], options: BuildOptions, *_: Any, **__: Any) -> list[PlanRecord]:
    """What an engine's passport says of its KV caches, and no plan."""
    caches = [
        Binding(f"{name}.{layer}", "cache", "bfloat16", ("B", heads, options.limits.cache_capacity, width))
        for layer in plans[0].layers
        for name, (heads, width) in plans[0].cache_shapes().items()
    ]
    serves = tuple(ServedSegment(rank, 1) for rank in range(len(plans)))
    nothing: dict[str, Any] = {"moe_form": None, "embedded": False, "targets": (), "size": 0, "scratch_bytes": 0}
    nothing |= {"weight_bytes": 0, "build_seconds": 0.0, "digest": "", "verification": {}}
    return [PlanRecord("none", "none.plan", "decoder", "decode", serves, bindings=tuple(caches), **nothing)]


def make_engine(workspace: Path, name: str, **recipe: Any) -> Path:
    """Directory of the engine `name` of a bundled checkpoint; `recipe`: fields of `Recipe`, model among them."""
    job = Job.resolve(Recipe.create(name=name, **(SMALL | recipe)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trtbuild.engines.compile.build_plans", no_plans)
        return compile_engine(job, Workspace(workspace), workers=1).directory
