"""Which plans an engine needs: segments with the same signature share one, across groups of layers and ranks.

Imports no TensorRT, so that `--plan-only` and the tests can ask without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from trtbuild.checkpoints.rank_tensors import RankPlan
from trtbuild.engines.limits import EngineLimits
from trtbuild.engines.network.segments import Segment, cut_into_segments, has_int4, moe_of
from trtbuild.engines.tensorrt.plan_record import ServedSegment

# Weights in one plan. The builder holds about three times as much while it works.
EMBEDDED_BYTES = 512 * 2**20
# Changes when the emitted network changes for the same inputs, so that older plans are built again.
NETWORK_VERSION = 2


@dataclass(frozen=True)
class BuildOptions:
    """moe_form: None for the form that each plan's phase calls for; embed_weights: segments with int4 always are."""

    limits: EngineLimits
    targets: tuple[str, ...]
    embed_weights: bool = False
    moe_form: str | None = None
    segment_layers: int | None = None


@dataclass(frozen=True)
class PlanTask:
    """One plan to build, with the first rank and segment that it serves as its pattern."""

    name: str
    plan: RankPlan
    segment: Segment
    phase: str
    embedded: bool
    options: BuildOptions
    serves: tuple[ServedSegment, ...]
    digest: str


def plan_tasks(plans: Sequence[RankPlan], options: BuildOptions, weights_digest: str | None = None) -> list[PlanTask]:
    """The plans of an engine, in the order of execution. `plans` holds one rank plan for each rank of the world.

    weights_digest identifies the rank weights; needed where some are embedded, otherwise ValueError.
    """
    tasks: dict[str, PlanTask] = {}
    for plan in plans:
        for segment in engine_segments(plan, options):
            for task in _segment_tasks(plan, segment, options, weights_digest):
                known = tasks.get(task.digest)
                tasks[task.digest] = replace(known, serves=known.serves + task.serves) if known else task
    return list(tasks.values())


def engine_segments(plan: RankPlan, options: BuildOptions) -> list[Segment]:
    """The segments of one rank; where weights are embedded, so short that building one takes a bounded memory."""
    return cut_into_segments(plan, options.segment_layers, EMBEDDED_BYTES, only_int4=not options.embed_weights)


def is_embedded(plan: RankPlan, segment: Segment, options: BuildOptions) -> bool:
    """Decoder weights beside any in int4 always stand in the plan, others on request; embed's and head's never do."""
    return segment.kind == "decoder" and (options.embed_weights or has_int4(plan, segment))


def _segment_tasks(
    plan: RankPlan, segment: Segment, options: BuildOptions, weights_digest: str | None
) -> Iterator[PlanTask]:
    embedded = is_embedded(plan, segment, options)
    if embedded and weights_digest is None:
        raise ValueError("plans with embedded weights need the digest of the rank weights")
    rank = plan.layout.rank
    served = (ServedSegment(rank, segment.index),)
    for phase in ("any",) if embedded or segment.kind != "decoder" else ("prefill", "decode"):
        signature = _signature(plan, segment, phase, options)
        if embedded:
            signature["weights"] = {"rank": rank, "first_layer": segment.first_layer, "digest": weights_digest}
        digest = hashlib.sha256(json.dumps(signature, sort_keys=True).encode()).hexdigest()
        where = f"r{rank}-s{segment.index:02}" if embedded else f"s{segment.index:02}-{digest[:8]}"
        name = f"{segment.kind}-{where}" + ("" if phase == "any" else f"-{phase}")
        yield PlanTask(name, plan, segment, phase, embedded, options, served, digest)


def _signature(plan: RankPlan, segment: Segment, phase: str, options: BuildOptions) -> dict[str, Any]:
    """Everything but weight values that the emitted network and the compiled plan follow from."""
    config, layout = plan.config, plan.layout.layout
    limits = options.limits
    layers = plan.layers[segment.first_layer : segment.first_layer + segment.num_layers]
    return {
        "version": NETWORK_VERSION,
        "library": library_version(),
        "kind": segment.kind,
        "phase": phase,
        "tensors": {name: [spec.dtype, list(spec.shape)] for name, spec in segment.weights(plan).items()},
        "windows": [config.window(layer) for layer in layers],
        "heads": [config.num_heads // layout.tp, len(plan.layout.kv_heads(config.num_kv_heads)), config.head_dim],
        "attention": [config.attention_scale, config.qk_norm, asdict(config.mla) if config.mla else None],
        "sizes": [config.hidden_size, config.norm_epsilon, config.vocab_size],
        "biases": [config.qkv_bias, config.dense_bias, config.mlp_bias],
        "moe": _moe_signature(plan, segment),
        "precision": _precision_signature(plan, segment),
        "layout": [layout.tp, layout.moe_tp, layout.moe_ep],
        "limits": [limits.max_batch_size, limits.max_seq_len, limits.chunk_size],
        "targets": list(options.targets),
        "moe_form": options.moe_form,
    }


def _precision_signature(plan: RankPlan, segment: Segment) -> dict[str, Any]:
    """Where layers have forms of their own, those of this segment: what others have is no matter of it."""
    if not plan.precision.modules:
        return {"weights": plan.precision.weights, "dtype": plan.precision.dtype}
    forms = {name: asdict(linear.form) for name, linear in segment.linears(plan).items()}
    return {"forms": forms, "dtype": plan.precision.dtype}


def _moe_signature(plan: RankPlan, segment: Segment) -> dict[str, Any] | None:
    """Which other layers are dense is no matter of this segment."""
    moe = moe_of(plan, segment)
    return asdict(replace(moe, dense_layers=())) if moe else None


def library_version() -> str:
    """The installed TensorRT-RTX, read without loading it; "none" where there is none."""
    from importlib.metadata import PackageNotFoundError, version

    for package in ("tensorrt_rtx", "tensorrt-rtx", "tensorrt-rtx-cu12", "tensorrt_rtx_cu12"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "none"
