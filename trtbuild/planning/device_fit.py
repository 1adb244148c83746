"""Whether an engine fits on a GPU: weights, scratch and what is left for the KV cache."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, cast

from trtbuild.checkpoints.rank_tensors import RankPlan
from trtbuild.engines.limits import EngineLimits
from trtbuild.engines.network.segments import Segment, layer_kinds
from trtbuild.engines.tensorrt.plan_tasks import BuildOptions, engine_segments, is_embedded
from trtbuild.planning.gpus import MIB, Gpu
from trtbuild.planning.model_size import RankSize

if TYPE_CHECKING:
    from trtbuild.engines.tensorrt.experts import MoeForm
    from trtbuild.engines.tensorrt.ops import Phase

# The CUDA context, TensorRT-RTX's runtime and its just-in-time compiled kernels; an assumption, not measured.
RUNTIME_BYTES = 800 * MIB
# NCCL's buffers and a second context's share, on each rank of a tensor-parallel group; an assumption too.
COLLECTIVE_BYTES = 400 * MIB
PIPELINE_ONLY = "pipeline stages (--pp) run in the reference executor only, not on a GPU yet"
RTX_ONLY = "TensorRT-RTX has no {target}: needs the builder tensorrt or tensorrt-llm, on such a GPU"


@dataclass(frozen=True)
class DeviceFit:
    """One GPU type for one layout: bytes on its fullest rank, and what of the KV cache fits there.

    tokens: of KV cache; sequences: slots of max_seq_len and a chunk's padding. `limits` say why it does not run,
    `notes` why such an engine cannot run there yet though it would fit.
    """

    gpu: Gpu
    usable_bytes: int
    weight_bytes: int
    scratch_bytes: int
    tokens: int
    sequences: int
    limits: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.limits


def fit_device(
    gpu: Gpu,
    stages: Sequence[RankSize],
    scratch: int,
    limits: EngineLimits,
    formats: Collection[str],
    moe: bool,
    tp: int,
    num_gpus: int | None = None,
    missing: Sequence[str] | None = None,
) -> DeviceFit:
    """One rank of each pipeline stage, every rank on a GPU of its own; the fullest decides.

    `missing`: what the GPU lacks for another builder than tensorrt-rtx.
    """
    usable = gpu.memory - RUNTIME_BYTES - (COLLECTIVE_BYTES if tp > 1 else 0)
    free = [usable - rank.weight_bytes - scratch for rank in stages]
    tokens = max(0, min(room // rank.cache_bytes for room, rank in zip(free, stages, strict=True)))
    sequences = tokens // limits.cache_capacity
    fullest = max(stages, key=lambda rank: rank.weight_bytes)
    found = gpu.missing(formats, moe) if missing is None else list(missing)
    if num_gpus is not None and tp * len(stages) > num_gpus:
        found.append(f"{tp * len(stages)} ranks, each on a GPU of its own, are more than --gpus {num_gpus}")
    if min(free) < 0:
        needed = fullest.weight_bytes + scratch
        found.append(f"takes {gib(needed)}")
    elif sequences < 1:
        needed = fullest.cache_bytes * limits.cache_capacity
        found.append(f"{gib(min(free))} are left for the KV cache, one sequence takes {gib(needed)}")
    notes = () if gpu.has_rtx_engines else (RTX_ONLY.format(target=gpu.target),)
    notes += (PIPELINE_ONLY,) if len(stages) > 1 else ()
    if missing is not None:
        notes = ()
    return DeviceFit(gpu, usable, fullest.weight_bytes, scratch, tokens, sequences, tuple(found), notes)


def scratch_bytes(
    plans: Sequence[RankPlan], limits: EngineLimits, moe_form: str, embed: bool, depth: int | None
) -> int:
    """Scratch that an engine's plans share: the largest of them; and its RoPE tables and step buffers."""
    options = BuildOptions(limits, (), embed, None if moe_form == "auto" else moe_form, depth)
    seen: dict[Hashable, int] = {}
    for plan in plans:
        kinds = layer_kinds(plan)
        for segment in engine_segments(plan, options):
            is_decoder = segment.kind == "decoder"
            key = (segment.kind, segment.num_layers, kinds[segment.first_layer] if is_decoder else None)
            if key not in seen:
                seen[key] = _segment_scratch(plan, segment, options)
    config = plans[0].config
    tables = 2 * 4 * limits.cache_capacity * config.rope_dim
    steps = 4 * limits.max_step_tokens * config.hidden_size * 2 + 4 * limits.max_head_rows * config.vocab_size
    return max(seen.values()) + tables + steps


def _segment_scratch(plan: RankPlan, segment: Segment, options: BuildOptions) -> int:
    from trtbuild.engines.tensorrt.network import plan_moe_form
    from trtbuild.engines.tensorrt.plan_forecast import forecast

    embedded = is_embedded(plan, segment, options)
    phases: list[Phase] = ["any"] if embedded or segment.kind != "decoder" else ["prefill", "decode"]
    found = 0
    for phase in phases:
        form = plan_moe_form(plan, segment, phase, options.limits)
        if form and options.moe_form:
            form = cast("MoeForm", options.moe_form)
        found = max(found, *forecast(plan, segment, phase, options.limits, form, embedded).scratch)
    return found


@lru_cache(maxsize=1)
def can_forecast_scratch() -> bool:
    """Whether the scratch formula can be asked: it stands beside TensorRT-RTX's network, which needs its package."""
    from importlib.util import find_spec

    return find_spec("tensorrt_rtx") is not None


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
