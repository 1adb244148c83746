"""`trtbuild plan`: everything that can be said of an engine before a weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.rank_tensors import RankPlan
from trtbuild.containers import Installed
from trtbuild.engines.job import Job
from trtbuild.engines.tensorrt.targets import formats_of
from trtbuild.engines.tensorrt_llm.builder import TrtllmJob
from trtbuild.engines.tensorrt_llm.machine import BuildMachine, gpu_problems
from trtbuild.errors import Refused
from trtbuild.planning.device_fit import DeviceFit, can_forecast_scratch, fit_device, scratch_bytes
from trtbuild.planning.gpus import GPUS, Gpu, gpu_named
from trtbuild.planning.host import HostForecast, HostForecaster, rank_file_sizes
from trtbuild.planning.model_size import Parameters, RankSize, attention_form, count_parameters, measure_rank
from trtbuild.planning.recommend import Option, options, recommended
from trtbuild.planning.roofline import BATCHES, Roofline, Step

# Machines that many people have, for a recommendation where none is named.
TYPICAL_MACHINES = (
    ("rtx4090", 1), ("rtx4090", 2), ("rtx-pro-6000", 1), ("l40s", 4), ("a100-80", 8), ("h100-80", 8),
)  # fmt: skip


@dataclass(frozen=True)
class DeviceReport:
    """One GPU type: does the asked layout fit, and its roofline; `decode` is keyed by batch size, as far as it fits."""

    fit: DeviceFit
    prefill: Step | None
    decode: dict[int, Step]


@dataclass(frozen=True)
class Recommendation:
    """The best layout of each precision on a machine, and which of them is recommended."""

    gpu: Gpu
    num_gpus: int
    options: Sequence[Option]
    choice: Option | None


@dataclass(frozen=True)
class EnginePlan:
    """What `plan` tells; `context` is the number of positions behind each sequence in the decode figures."""

    job: Job
    parameters: Parameters
    attention: str
    ranks: Sequence[RankSize]
    rank_files: Sequence[int]
    scratch: int | None
    context: int
    devices: Sequence[DeviceReport]
    recommendations: Sequence[Recommendation]
    host: HostForecast

    @property
    def is_trtllm(self) -> bool:
        """Whether TensorRT-LLM would build it, whose activations nobody here can forecast."""
        return self.job.recipe.builder == "tensorrt-llm"

    def check(self, gpu_name: str | None) -> None:
        """Raises `Refused` where a GPU was named and the asked layout does not run on it; names what does."""
        fit = self.devices[0].fit
        if gpu_name is None or (fit.fits and not fit.notes):
            return
        choice = self.recommendations[0].choice if self.recommendations else None
        if self.is_trtllm:
            fix = "; another --tp, --precision or --gpu may do"
        elif fit.gpu.has_rtx_engines:
            fix = f"; {choice.flags} does on {choice.num_gpus}" if choice else f"; {self._smallest_machine(fit.gpu)}"
        else:
            fix = ""
        reasons = "; ".join((*fit.limits, *fit.notes))
        raise Refused(f"{self.job.recipe.engine_name} does not run on {fit.gpu.title}: {reasons}{fix}")

    def _smallest_machine(self, gpu: Gpu) -> str:
        for num_gpus in (2, 4, 8, 16):
            choice = recommended(options(self.job.config, gpu, num_gpus, self.job.limits), self.job.limits)
            if choice:
                return f"{choice.flags} does on {num_gpus}"
        return "nothing up to 16 of them does: use a GPU with more memory, or a smaller model"

    def to_dict(self) -> dict[str, Any]:
        """For `--json`: bytes, seconds and tokens as numbers."""
        return {
            "name": self.job.recipe.engine_name,
            "model": self.job.source.model,
            "config": "built-in facts" if self.job.source.has_built_in_config else "config.json",
            "layout": asdict(self.job.layout),
            "precision": self.job.precision.to_dict(),
            "limits": asdict(self.job.limits),
            "parameters": asdict(self.parameters),
            "attention": self.attention,
            "ranks": [
                {
                    "bytes": rank.weight_bytes,
                    "file_bytes": size,
                    "kinds": rank.kinds,
                    "kv_bytes_per_token": rank.cache_bytes,
                }
                for rank, size in zip(self.ranks, self.rank_files, strict=True)
            ],
            "scratch_bytes": self.scratch,
            "context": self.context,
            "gpus": [_device_dict(device) for device in self.devices],
            "recommendations": [_recommendation_dict(r) for r in self.recommendations],
            "host": asdict(self.host) | {"peak": asdict(self.host.peak)},
        }  # fmt: skip


def make_plan(job: Job, *, gpu_name: str | None = None, num_gpus: int | None = None, workers: int = 1) -> EnginePlan:
    """Plan a job for one GPU type or for all of the table.

    Raises `Refused` for a GPU that is not in it, and for a mixture that is not chosen yet.
    """
    if job.precision.weights == "auto" and not job.precision.modules:
        raise Refused(
            "--precision auto is chosen by measuring the weights, which compile does; plan int4 and int8, between "
            "which it lies"
        )
    gpus = [gpu_named(gpu_name)] if gpu_name is not None else list(GPUS.values())
    is_trtllm = job.recipe.builder == "tensorrt-llm"
    if is_trtllm:
        TrtllmJob.resolve(job, BuildMachine(Installed(None), []))
    ranks = [measure_rank(plan) for plan in _engine_plans(job)]
    stages = ranks[:: job.layout.tp]
    recipe, limits = job.recipe, job.limits
    scratch = None
    if can_forecast_scratch() and not is_trtllm:
        scratch = scratch_bytes(job.plans, limits, recipe.moe_form, recipe.embed_weights, recipe.segment_layers)
    context = limits.max_seq_len // 2
    devices = [_report_device(job, gpu, stages, scratch or 0, context, num_gpus) for gpu in gpus]
    machines = [(gpus[0].name, num_gpus or job.layout.world_size)] if gpu_name is not None else TYPICAL_MACHINES
    return EnginePlan(
        job=job,
        parameters=count_parameters(job.config),
        attention=attention_form(job.config),
        ranks=ranks,
        rank_files=rank_file_sizes(job),
        scratch=scratch,
        context=context,
        devices=devices,
        recommendations=[] if is_trtllm else [_recommend(job, GPUS[name], count) for name, count in machines],
        host=HostForecaster(job, workers).forecast(),
    )


def _engine_plans(job: Job) -> list[RankPlan]:
    """What the engine holds: of weights that trtllm-build quantizes, the quantized ones and not the checkpoint's."""
    if not job.precision.is_deferred:
        return job.plans
    held = replace(job.precision, dialect="tensorrt-rtx")
    return [plan_rank(job.config, rank, held) for rank in job.layout.ranks()]


def _report_device(
    job: Job, gpu: Gpu, stages: Sequence[RankSize], scratch: int, context: int, num_gpus: int | None
) -> DeviceReport:
    needed = formats_of(job.precision)
    missing = list(gpu_problems(gpu.sm, job.precision)) if job.recipe.builder == "tensorrt-llm" else None
    fit = fit_device(
        gpu, stages, scratch, job.limits, needed, job.config.moe is not None, job.layout.tp, num_gpus, missing
    )
    if not fit.fits:
        return DeviceReport(fit, None, {})
    roofline = Roofline(job.config, job.layout, stages, gpu)
    batches = [batch for batch in BATCHES if batch <= fit.sequences]
    prefill = roofline.prefill(job.limits.chunk_size, context)
    return DeviceReport(fit, prefill, {batch: roofline.decode(batch, context) for batch in batches})


def _recommend(job: Job, gpu: Gpu, num_gpus: int) -> Recommendation:
    found = options(job.config, gpu, num_gpus, job.limits)
    return Recommendation(gpu, num_gpus, found, recommended(found, job.limits))


def _device_dict(device: DeviceReport) -> dict[str, Any]:
    fit = device.fit
    return {
        "gpu": fit.gpu.name,
        "fits": fit.fits,
        "usable_bytes": fit.usable_bytes,
        "kv_tokens": fit.tokens,
        "sequences": fit.sequences,
        "limits": list(fit.limits),
        "notes": list(fit.notes),
        "roofline": {
            "prefill": _step_dict(device.prefill) if device.prefill else None,
            "decode": {str(batch): _step_dict(step) for batch, step in device.decode.items()},
        },
        "source": fit.gpu.source,
    }


def _step_dict(step: Step) -> dict[str, Any]:
    return asdict(step) | {"tokens_per_second": step.tokens_per_second, "bound": step.bound}


def _recommendation_dict(recommendation: Recommendation) -> dict[str, Any]:
    return {
        "gpu": recommendation.gpu.name,
        "num_gpus": recommendation.num_gpus,
        "choice": recommendation.choice.flags if recommendation.choice else None,
        "options": [
            {
                "flags": option.flags,
                "fits": option.fits,
                "sequences": option.fit.sequences if option.fit else 0,
                "decode_tokens_per_second": option.decode.tokens_per_second if option.decode else None,
                "limits": list(option.limits),
            }
            for option in recommendation.options
        ],
    }
