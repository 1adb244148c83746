"""Which precision an engine gets: the one that was asked for, the checkpoint's own, or a measured mixture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trtbuild.checkpoints.content import SourceReader
from trtbuild.checkpoints.convert import ActivationRange, Calibration
from trtbuild.checkpoints.kept_precision import activation_ranges, kept_precision
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import ASYMMETRIC, CALIBRATED, FormatName, LinearForm, Precision, PrecisionName
from trtbuild.checkpoints.prepared_source import PreparedSource
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.rank_tensors import Linear, RankPlan
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.engines.calibration.devices import devices_of
from trtbuild.engines.calibration.mixture import choose
from trtbuild.engines.calibration.prepare import prepare_once
from trtbuild.engines.calibration.ranges import calibrate_once, kept_ranges
from trtbuild.engines.calibration.sensitivity import Sensitivity, measure_once, total
from trtbuild.engines.calibration.text import NUM_SEQUENCES, SEQUENCE_LENGTH, CalibrationText
from trtbuild.errors import Refused
from trtbuild.progress import ProgressFactory, no_progress
from trtbuild.workspace import Workspace

# How a mixture's int4 values are found: with zero points, which lose less for their bytes than larger formats do, where
# the budget has room for them.
MIXTURE_INT4: tuple[PrecisionName, PrecisionName] = ("int4-gptq-asym", "int4-gptq")


def resolve_precision(name: PrecisionName | None, source: CheckpointSource, *, weights: bool = True) -> Precision:
    """A quantized checkpoint is kept as it is where no other precision is asked for; a 16-bit one is bf16 by default.

    Raises Refused for `auto` on a quantized checkpoint: what was lost before cannot be measured.
    """
    dtype = source.config.dtype
    if source.quantization is None:
        return Precision.resolve(name or "bf16", dtype)
    if name == "auto":
        raise Refused(f"--precision auto: {source.model} is quantized already; start from the 16-bit checkpoint")
    kept = kept_precision(source, dtype, weights=weights)
    return kept if name in (None, kept.weights) else Precision.resolve(name, dtype)


def needs_text(precision: Precision) -> bool:
    """Whether a calibration text takes part; a kept checkpoint brings its activation scales along."""
    if precision.weights == "auto":
        return True
    return not precision.modules and precision.weights in ("fp8", *CALIBRATED)


def calibration_of(
    source: CheckpointSource,
    plans: Sequence[RankPlan],
    precision: Precision,
    text: Callable[[], CalibrationText],
    workspace: Workspace,
    progress: ProgressFactory,
    device: torch.device | None = None,
) -> Calibration | None:
    """What conversion needs beside the checkpoint's weights; None where that is nothing.

    `device` computes what was not found before; by default a GPU where torch has one.
    """
    if not needs_text(precision):
        if not any(linear.precision == "fp8" for plan in plans for linear in plan.linears):
            return None
        return Calibration({"kept": source.digest}, lambda: activation_ranges(source, plans))
    read = text()
    identity = {"text_sha256": read.digest, "max_sequences": NUM_SEQUENCES, "sequence_length": SEQUENCE_LENGTH}
    folder = workspace.calibrations
    if precision.weights == "fp8":
        return Calibration(
            identity, lambda: calibrate_once(source, read, folder, device=device, progress=progress),
            devices=lambda: devices_of(kept_ranges(source, read, folder)),
        )  # fmt: skip
    method, mixture = precision.weights, None
    if precision.weights == "auto":
        mixture = dict(precision.modules)
        # One without int4 had room for zero points.
        without = any(form.format == "int4" and not form.zeros for form in mixture.values())
        method = MIXTURE_INT4[1 if without else 0]
        identity["calibrated_in"] = "its mixture"

    def prepare() -> PreparedSource:
        return prepared_for(source, read, method, mixture, folder, device, progress)

    return Calibration(
        {**identity, "method": method}, lambda: _routed_tokens(prepare(), plans), prepare,
        lambda: devices_of(prepare().folder),
    )  # fmt: skip


def prepared_for(
    source: CheckpointSource,
    text: CalibrationText,
    method: str,
    mixture: Mapping[str, LinearForm] | None,
    folder: Path,
    device: torch.device | None = None,
    progress: ProgressFactory = no_progress,
) -> PreparedSource:
    """The int4 layers of a mixture (None: all layers) as `method` quantizes them among the others.

    Where all or none are int4, what was found when costs were measured is what a calibration would find again.
    """
    formats = {form.format for form in (mixture or {}).values()}
    mixed = mixture if "int4" in formats and len(formats) > 1 else None
    prepared = prepare_once(source, text, method, folder, mixture=mixed, device=device, progress=progress)
    return replace(prepared, only=frozenset()) if formats and "int4" not in formats else prepared


def _routed_tokens(prepared: PreparedSource, plans: Sequence[RankPlan]) -> dict[str, ActivationRange]:
    """How many tokens each expert really got, by linear layer; there is no range to tell."""
    experts = {linear.global_name for plan in plans for linear in plan.linears if linear.num_experts is not None}
    layers = {name: int(name.split(".")[2]) for name in sorted(experts)}
    return {name: ActivationRange(None, prepared.tokens_per_expert(layer)) for name, layer in layers.items()}


@dataclass(frozen=True)
class Mixture:
    """A chosen mixture; `record` is what the manifest says of it."""

    precision: Precision
    record: dict[str, Any]


def choose_mixture(
    source: CheckpointSource,
    layout: Layout,
    asked: Precision,
    text: CalibrationText,
    folder: Path,
    *,
    budget: int | None,
    max_loss: float | None,
    fp8: bool,
    device: torch.device | None = None,
    progress: ProgressFactory = no_progress,
) -> Mixture:
    """A format for every linear layer: the least loss in `budget` bytes on a rank, or the fewest bytes for `max_loss`.

    `max_loss` is a share of perplexity. Raises Refused where they cannot be met.
    """
    int4 = _int4_method(source, layout, asked, budget)
    prepared = prepare_once(source, text, int4, folder, device=device, progress=progress)
    readers: dict[FormatName, SourceReader] = {"int4": prepared, "int8": source}
    if fp8:
        readers["fp8-dynamic"] = source
    sensitivity = measure_once(source, readers, text, folder, device=device, progress=progress)
    formats: dict[FormatName, PrecisionName] = {"int4": int4, "int8": "int8"}
    formats |= {"fp8-dynamic": "fp8-dynamic"} if fp8 else {}
    formats[asked.dtype] = asked.dtype
    max_cost = None if max_loss is None else math.log1p(max_loss)
    chosen: dict[str, FormatName] = {}
    fixed, stages = _stage_sizes(source, layout, asked, formats)
    if budget is None:
        chosen = choose(
            {name: size for stage in stages for name, size in stage.items()}, sensitivity, max_cost=max_cost
        )
    else:
        for other, sizes in zip(fixed, stages, strict=True):
            alone = max_cost if len(stages) == 1 else None
            chosen |= choose(sizes, sensitivity, room=budget - other, max_cost=alone)
    modules = {name: LinearForm(form, zeros=form == "int4" and int4 in ASYMMETRIC) for name, form in chosen.items()}
    return Mixture(asked.with_modules(modules), _record(sensitivity, chosen, budget, max_loss, int4))


def _int4_method(source: CheckpointSource, layout: Layout, asked: Precision, budget: int | None) -> PrecisionName:
    """With zero points, if a rank with nothing but such int4 fits into the budget."""
    larger, smaller = MIXTURE_INT4
    sizes = zip(*_stage_sizes(source, layout, asked, {"int4": larger}), strict=True)
    least = max(other + sum(size["int4"] for size in linears.values()) for other, linears in sizes)
    return larger if budget is None or least <= budget else smaller


def _stage_sizes(
    source: CheckpointSource, layout: Layout, asked: Precision, formats: Mapping[FormatName, PrecisionName]
) -> tuple[list[int], list[dict[str, dict[FormatName, int]]]]:
    """For each pipeline stage: bytes of a rank besides its linear layers, and of each of these by format.

    `formats` says which precision each format is measured as.
    """
    fixed: list[int] = []
    stages: list[dict[str, dict[FormatName, int]]] = []
    for stage in range(layout.pp):
        ranks = [layout.rank(rank) for rank in layout.stage_ranks(stage)]
        sizes: dict[str, dict[FormatName, int]] = {}
        others: list[int] = []
        for form, precision in formats.items():
            for rank in ranks:
                plan = plan_rank(source.config, rank, Precision(precision, asked.dtype))
                others.append(sum(tensor.spec.num_bytes for tensor in plan.plain))
                for linear in plan.linears:
                    size = sizes.setdefault(linear.global_name, {})
                    size[form] = max(size.get(form, 0), _num_bytes(linear))
        fixed.append(max(others))
        stages.append(sizes)
    return fixed, stages


def _num_bytes(linear: Linear) -> int:
    return sum(spec.num_bytes for spec in linear.tensors())


def _record(
    sensitivity: Sensitivity,
    chosen: Mapping[str, FormatName],
    budget: int | None,
    max_loss: float | None,
    int4: PrecisionName,
) -> dict[str, Any]:
    predicted = total(sensitivity, chosen)
    return {
        "budget_bytes": budget, "max_loss": max_loss,
        "predicted_loss_nats": predicted, "predicted_perplexity_increase": math.expm1(predicted),
        "formats": dict(chosen), "loss_nats": sensitivity, "int4": int4,
    }  # fmt: skip
