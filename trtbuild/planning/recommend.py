"""Which layouts and precisions of a model run on a number of GPUs, and what stops the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.model_config import ModelConfig
from trtbuild.checkpoints.precision import Precision, PrecisionName
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.engines.limits import EngineLimits
from trtbuild.engines.network.segments import MAX_SEGMENT_LAYERS
from trtbuild.engines.tensorrt.targets import formats_of
from trtbuild.errors import Refused
from trtbuild.planning.device_fit import DeviceFit, can_forecast_scratch, fit_device, scratch_bytes
from trtbuild.planning.gpus import Gpu
from trtbuild.planning.model_size import estimate_rank
from trtbuild.planning.roofline import Roofline, Step

# A typical load to compare layouts by, where the memory allows it.
COMPARED_BATCH = 32


@dataclass(frozen=True)
class Option:
    """One precision and layout on `num_gpus` of a GPU; `fit` and `decode` are None where the model cannot be cut so."""

    gpu: Gpu
    num_gpus: int
    precision: PrecisionName
    layout: Layout
    fit: DeviceFit | None
    decode: Step | None
    limits: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.limits

    @property
    def flags(self) -> str:
        """The options of `trtbuild compile` that ask for it."""
        layout = self.layout
        parts = [f"--precision {self.precision}", f"--tp {layout.tp}" if layout.tp > 1 else ""]
        parts += [
            f"--moe-ep {layout.moe_ep}" if layout.moe_ep > 1 else "",
            f"--pp {layout.pp}" if layout.pp > 1 else "",
        ]
        return " ".join(part for part in parts if part)


def options(config: ModelConfig, gpu: Gpu, num_gpus: int, limits: EngineLimits) -> list[Option]:
    """For each precision the best layout over all GPUs: what fits and decodes fastest, or comes nearest to it."""
    names: tuple[PrecisionName, ...] = (config.dtype, "fp8", "int8", "int4")
    found = []
    for name in names if gpu.sm >= 80 else ("fp16",):
        precision = Precision.resolve(name, config.dtype)
        missing = gpu.missing(formats_of(precision), config.moe is not None)
        if missing:
            found.append(Option(gpu, num_gpus, name, Layout(), None, None, tuple(missing)))
            continue
        tried = [_try(config, gpu, layout, precision, limits) for layout in layouts(config, num_gpus)]
        found.append(max(tried, key=_preference))
    return found


def recommended(found: Sequence[Option], limits: EngineLimits) -> Option | None:
    """The highest precision that holds a whole batch of sequences, or else what holds most; None if none fits."""
    fitting = [option for option in found if option.fits and option.fit]
    whole = (option for option in fitting if option.fit and option.fit.sequences >= limits.max_batch_size)
    return next(whole, max(fitting, key=lambda option: option.fit.sequences if option.fit else 0, default=None))


def layouts(config: ModelConfig, num_gpus: int) -> Iterator[Layout]:
    """Tensor parallelism over all GPUs, with experts cut or shared out; no GPU runs pipeline stages yet."""
    yield Layout.resolve(num_gpus)
    if config.moe and num_gpus > 1:
        yield Layout.resolve(num_gpus, moe_ep=num_gpus)


def _preference(option: Option) -> tuple[object, ...]:
    if option.fit is None:
        return (0, 0, 0.0)
    speed = option.decode.tokens_per_second if option.decode else 0.0
    return (2 if option.fits else 1, -option.fit.weight_bytes if not option.fits else 0, speed)


def _try(config: ModelConfig, gpu: Gpu, layout: Layout, precision: Precision, limits: EngineLimits) -> Option:
    num_gpus = layout.world_size
    try:
        layout.check(config)
        stages = [estimate_rank(config, layout, stage, precision) for stage in range(layout.pp)]
    except Refused as error:
        return Option(gpu, num_gpus, precision.weights, layout, None, None, (_problem(error),))
    scratch = _scratch(config, replace(layout, pp=1), precision, limits) if can_forecast_scratch() else 0
    fit = fit_device(gpu, stages, scratch, limits, formats_of(precision), config.moe is not None, layout.tp)
    if not fit.fits:
        return Option(gpu, num_gpus, precision.weights, layout, fit, None, fit.limits)
    roofline = Roofline(config, layout, stages, gpu)
    decode = roofline.decode(min(fit.sequences, COMPARED_BATCH), limits.max_seq_len // 2)
    return Option(gpu, num_gpus, precision.weights, layout, fit, decode, ())


def _problem(error: Refused) -> str:
    """What does not divide, without the layout that the row names."""
    lines = error.message.splitlines()
    return lines[1].strip(" -") if len(lines) > 1 else lines[0].partition(": ")[2] or lines[0]


@lru_cache(maxsize=1024)
def _scratch(config: ModelConfig, layout: Layout, precision: Precision, limits: EngineLimits) -> int:
    """Of a model of as many layers as the longest segment has: deeper ones share the same plans."""
    dense = [layer for layer in range(config.num_layers) if not config.is_moe(layer)] if config.moe else []
    num_layers = min(config.num_layers, (dense[0] + 1 if dense else 0) + MAX_SEGMENT_LAYERS)
    moe = config.moe
    if moe:
        moe = replace(moe, dense_layers=tuple(layer for layer in moe.dense_layers if layer < num_layers))
    plan = plan_rank(replace(config, num_layers=num_layers, moe=moe), layout.rank(0), precision)
    return scratch_bytes([plan], limits, "auto", False, None)
