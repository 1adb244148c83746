"""A recipe with everything resolved and checked against its checkpoint, and its first half: the rank checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from trtbuild.checkpoints.convert import Calibration, convert, default_workers
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.lora import LoraAdapter
from trtbuild.checkpoints.model_config import ModelConfig
from trtbuild.checkpoints.precision import CALIBRATED, Precision
from trtbuild.checkpoints.rank_checkpoint import RankCheckpoint
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.rank_tensors import RankPlan
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.engines.calibration.devices import compute_device
from trtbuild.engines.calibration.text import CalibrationText
from trtbuild.engines.limits import MAX_CHUNK_SIZE, EngineLimits
from trtbuild.engines.precision_choice import calibration_of, choose_mixture, needs_text, resolve_precision
from trtbuild.engines.recipe import Recipe
from trtbuild.engines.tensorrt.targets import MIN_SM, resolve_targets
from trtbuild.engines.tensorrt_llm.fit import check_names, for_tensorrt_llm
from trtbuild.errors import Refused, refuse_all
from trtbuild.pools import Pool
from trtbuild.progress import ProgressFactory, no_progress
from trtbuild.workspace import Workspace

# Without --max-seq-len: the model's own limit, but not a KV cache that few machines hold.
DEFAULT_MAX_SEQ_LEN = 4096


@dataclass(frozen=True)
class Job:
    """A recipe with everything resolved against the checkpoint's config, and checked."""

    recipe: Recipe
    source: CheckpointSource
    layout: Layout
    precision: Precision
    limits: EngineLimits
    targets: tuple[str, ...]
    mixture: dict[str, Any] | None = None
    device: torch.device | None = None

    @classmethod
    def resolve(
        cls,
        recipe: Recipe,
        *,
        weights: bool | None = None,
        sources: Path | None = None,
        device: str | None = None,
        progress: ProgressFactory = no_progress,
    ) -> Job:
        """Raises Refused with what cannot be done, before any expensive byte.

        `weights` says whether the checkpoint's weights must be there; by default unless the recipe is `plan_only`.
        `sources` is where a checkpoint in an object store is fetched to; without it only its config can be read.
        `device` is `--device`, where calibrations compute: auto (None), cpu, cuda or cuda:N.
        """
        computes = compute_device(device) if device else None
        layout = recipe.layout
        needed = not recipe.plan_only if weights is None else weights
        source = CheckpointSource.open(
            recipe.model, recipe.revision, weights=needed, sources=sources, progress=progress
        )
        source = source.with_lora([LoraAdapter.parse(text) for text in recipe.lora])
        config = source.config
        layout.check(config)
        precision = resolve_precision(recipe.precision, source, weights=needed)
        recipe = recipe.model_copy(update={"precision": precision.weights})
        refuse_all("recipe", _problems(recipe, config, precision))
        if recipe.builder == "tensorrt-llm":
            precision = for_tensorrt_llm(precision, config, layout, recipe.kv_cache)
            targets = check_names(recipe.target)
        else:
            targets = resolve_targets(recipe.target, precision, moe=config.moe is not None)
        job = cls(recipe, source, layout, precision, _limits(recipe, config), targets, device=computes)
        if recipe.plan_only and any(linear.precision == "int4" for plan in job.plans for linear in plan.linears):
            raise Refused(
                "--plan-only compiles without weights, but int4 puts them into the plan: TensorRT unpacks int4 inputs "
                "to fp16; use another --precision, or compile with the weights"
            )
        return job

    @property
    def config(self) -> ModelConfig:
        return self.source.config

    @cached_property
    def plans(self) -> list[RankPlan]:
        return [plan_rank(self.config, rank, self.precision) for rank in self.layout.ranks()]

    def request(self) -> dict[str, Any]:
        """What identifies the engine: the same request is the same engine."""
        return {
            "source": self.source.digest,
            "tokenizer": self.source.companions_digest,
            "layout": asdict(self.layout),
            "precision": self.precision.to_dict(),
            "limits": asdict(self.limits),
            "targets": list(self.targets),
            "builder": self.recipe.builder,
            "segment_layers": self.recipe.segment_layers,
            "moe_form": self.recipe.moe_form,
            "embed_weights": self.recipe.embed_weights,
            "plan_only": self.recipe.plan_only,
            "calibration": self._calibration_text().digest if needs_text(self.precision) else None,
        }

    def settle(self, workspace: Workspace, progress: ProgressFactory = no_progress) -> Job:
        """With `--precision auto`, the job in which every linear layer has a format; otherwise the job as it is."""
        if self.precision.weights != "auto" or self.precision.modules:
            return self
        mixture = choose_mixture(
            self.source, self.layout, self.precision, self._calibration_text(), workspace.calibrations,
            budget=self.recipe.budget, max_loss=self.recipe.max_loss, fp8=self._may_use_fp8, device=self.device,
            progress=progress,
        )  # fmt: skip
        return replace(self, precision=mixture.precision, mixture=mixture.record)

    @property
    def _may_use_fp8(self) -> bool:
        """Only where the user named targets and all of them have it: a mixture should not cost targets."""
        return bool(self.recipe.target) and all(int(target[2:]) >= MIN_SM["fp8"] for target in self.targets)

    def calibration(self, workspace: Workspace, progress: ProgressFactory) -> Calibration | None:
        """What conversion must know of activations; what was found before for the same weights and text is used."""
        return calibration_of(
            self.source, self.plans, self.precision, self._calibration_text, workspace, progress, self.device
        )

    def _calibration_text(self) -> CalibrationText:
        return CalibrationText.open(self.recipe.calib_data)


def convert_model(
    job: Job,
    workspace: Workspace,
    *,
    workers: int | None = None,
    force: bool = False,
    progress: ProgressFactory = no_progress,
    pool: Pool | None = None,
) -> RankCheckpoint:
    """HF checkpoint -> build/NAME, or what is there already for the same request."""
    job = job.settle(workspace, progress)
    calibration = job.calibration(workspace, progress)
    provenance = {
        "calibration": calibration.identity if calibration else None,
        "mixture": job.mixture,
        "notes": list(job.source.quantization.notes) if job.source.quantization else [],
        "lora": [adapter.provenance() for adapter in job.source.adapters],
        "command": job.recipe.command(),
    }
    return convert(
        job.source, workspace.build / job.recipe.engine_name, job.layout, job.precision,
        calibration=calibration, provenance=provenance,
        workers=workers or default_workers(), force=force, progress=progress, pool=pool,
    )  # fmt: skip


def _problems(recipe: Recipe, config: ModelConfig, resolved: Precision) -> Iterator[str]:
    yield from _builder_problems(recipe, resolved)
    precision = resolved.weights
    if recipe.plan_only and recipe.embed_weights:
        yield "--plan-only compiles without weights, but --embed-weights puts them into the plan; leave one of them out"
    if recipe.calib_data and not needs_text(resolved):
        names = ", ".join(("fp8", *CALIBRATED))
        why = (
            "the checkpoint brings its own scales" if resolved.modules else f"--precision {precision} is not calibrated"
        )
        yield f"--calib-data is for {names}; {why}"
    if precision == "auto" and recipe.budget is None and recipe.max_loss is None:
        yield "--precision auto needs --budget SIZE (bytes of weights on each GPU) or --max-loss SHARE (of perplexity)"
    if precision != "auto" and (recipe.budget is not None or recipe.max_loss is not None):
        yield f"--budget and --max-loss are for --precision auto, not {recipe.precision}"
    longest = _longest_sequence(config)
    if recipe.max_seq_len and recipe.max_seq_len > longest:
        yield f"--max-seq-len {recipe.max_seq_len}: the model's positions end at {longest}"
    if recipe.max_input_len and recipe.max_seq_len and recipe.max_input_len >= recipe.max_seq_len:
        limit = recipe.max_seq_len
        yield f"--max-input-len {recipe.max_input_len} leaves no room for an answer in --max-seq-len {limit}"
    if recipe.moe_form != "auto" and config.moe is None:
        yield f"--moe-form {recipe.moe_form}: {config.architecture} has no experts"


def _builder_problems(recipe: Recipe, resolved: Precision) -> Iterator[str]:
    """What one builder has and the other has not."""
    if recipe.builder == "tensorrt-llm":
        ours = ("segment_layers", "chunk_size", "embed_weights", "plan_only")
        given = [name for name in ours if getattr(recipe, name)] + ["moe_form"] * (recipe.moe_form != "auto")
        for name in given:
            yield f"--{name.replace('_', '-')} is for --builder tensorrt-rtx; trtllm-build has its own ([trtllm])"
        return
    if recipe.trtllm:
        yield f"[trtllm] ({', '.join(recipe.trtllm)}) is for --builder tensorrt-llm"
    if recipe.kv_cache == "fp8":
        yield (
            "--kv-cache fp8: TensorRT-RTX's KV cache update takes float, half and bfloat16 caches only, and a cache "
            "that is dequantized around it saves no memory; use --kv-cache auto, or --builder tensorrt-llm"
        )
    elif recipe.kv_cache not in ("auto", resolved.dtype):
        yield (
            f"--kv-cache {recipe.kv_cache}: the cache has the model's 16-bit type; "
            f"use auto, or --precision {recipe.kv_cache}"
        )


def _longest_sequence(config: ModelConfig) -> int:
    """Scaled RoPE reaches `factor` times further where the checkpoint's limit is the unscaled one."""
    if config.rope.type in ("linear", "dynamic", "yarn"):
        base = config.rope.original_max_position_embeddings or config.max_position_embeddings
        return max(config.max_position_embeddings, int(base * config.rope.factor))
    return config.max_position_embeddings


def _limits(recipe: Recipe, config: ModelConfig) -> EngineLimits:
    max_seq_len = recipe.max_seq_len or min(config.max_position_embeddings, DEFAULT_MAX_SEQ_LEN)
    return EngineLimits(
        max_batch_size=recipe.max_batch_size,
        max_seq_len=max_seq_len,
        max_input_len=recipe.max_input_len or max_seq_len - 1,
        chunk_size=recipe.chunk_size or min(MAX_CHUNK_SIZE, max_seq_len),
    )
