"""What of a recipe TensorRT-LLM's engines can be, decided before a byte is converted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.model_config import ModelConfig
from trtbuild.checkpoints.precision import CALIBRATED, Precision
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.rank_tensors import Linear
from trtbuild.errors import refuse_all

_CALIBRATED_INT4 = [name for name in CALIBRATED if name != "auto"]
# Groups that its weight-only kernels have.
_GROUPS = (128, 64)
# Rows and columns that the mixed-precision kernels take at once.
_TILE = 64
SUPPORT_MATRIX = "TensorRT-LLM's support matrix"


def for_tensorrt_llm(precision: Precision, config: ModelConfig, layout: Layout, kv_cache: str) -> Precision:
    """The same precision in TensorRT-LLM's dialect; raises Refused with everything that it cannot be.

    int8 and int4 stay in 16 bit until trtllm-build quantizes them. int4 of a calibration or of a checkpoint becomes
    W4A16_AWQ, with one group size for all layers.
    """
    found = replace(precision, dialect="tensorrt-llm", fp8_cache=kv_cache == "fp8")
    if found.weights in _CALIBRATED_INT4 or any(form.format == "int4" for _, form in found.modules):
        found = _with_one_group(found, config, layout)
    refuse_all("--builder tensorrt-llm", [*_model_problems(config, found), *_problems(found, config, layout, kv_cache)])
    return found


def check_names(target: Sequence[str]) -> tuple[str, ...]:
    """The compute capabilities as given; raises Refused for what is none."""
    wrong = [name for name in target if re.fullmatch(r"sm\d{2,3}", name) is None]
    refuse_all("--target", [f"{name}: must be a compute capability, such as sm90" for name in wrong])
    return tuple(target)


def _linears(precision: Precision, config: ModelConfig, layout: Layout) -> list[Linear]:
    return [linear for rank in layout.ranks() for linear in plan_rank(config, rank, precision).linears]


def _with_one_group(precision: Precision, config: ModelConfig, layout: Layout) -> Precision:
    sizes = [linear.group_size for linear in _linears(precision, config, layout) if linear.group_size]
    smallest = min(sizes)
    modules = {
        name: replace(form, group_size=smallest) if form.format == "int4" else form for name, form in precision.modules
    }
    return replace(precision, group_size=smallest).with_modules(modules)


def _model_problems(config: ModelConfig, precision: Precision) -> Iterator[str]:
    if config.mla:
        yield (
            f"{config.architecture}: its latent attention wants an absorbed query projection (fused_q_proj) that was "
            "never compared with upstream's; use --builder tensorrt-rtx, or 1.3's PyTorch backend"
        )
    if config.moe and config.moe.dense_layers and not config.mla:
        layers = ", ".join(map(str, sorted(config.moe.dense_layers)))
        yield f"{config.architecture}: layers {layers} have no experts, and 1.x builds experts into every layer"
    if config.moe and precision.weights == "fp8-dynamic":
        yield f"--precision fp8-dynamic: 1.x has no rowwise fp8 for experts; use fp8 ({SUPPORT_MATRIX})"
    is_awq = precision.group_size is not None
    if config.moe and is_awq:
        yield (
            f"int4 groups (W4A16_AWQ) for experts: {SUPPORT_MATRIX} has them in FP8, W8A16 and W4A16; "
            "use --precision fp8, int8 or int4"
        )


def _problems(precision: Precision, config: ModelConfig, layout: Layout, kv_cache: str) -> Iterator[str]:
    if precision.weights == "auto":
        yield "--precision auto: mixtures are for tensorrt-rtx; name one precision"
    if kv_cache not in ("auto", "fp8", precision.dtype):
        yield f"--kv-cache {kv_cache}: the cache has the model's 16-bit type ({precision.dtype}), or fp8"
    linears = _linears(precision, config, layout)
    formats = {linear.precision for linear in linears if linear.is_quantized}
    if len(formats) > 1:
        yield f"the checkpoint mixes {', '.join(sorted(formats))}; 1.x engines of trtbuild have one, give --precision"
    if any(linear.form.zeros or linear.form.order for linear in linears):
        yield (
            "int4 groups with zero points or act-order, which trtllm-build reads only after a permutation for one GPU; "
            "use --precision int4-awq or int4-gptq for a 16-bit checkpoint, int4, int8 or fp8 to encode others again"
        )
    if any(linear.form.row_scales for linear in linears):
        yield "the checkpoint's fp8 has static activations and a scale for every row; give --precision fp8"
    if "int8" in formats:
        yield "the checkpoint's own int8 values have no portable form for trtllm-build; give --precision int8"
    small = {linear.group_size for linear in linears if linear.group_size and linear.group_size not in _GROUPS}
    if small:
        yield f"int4 groups of {min(small)} on a rank: its kernels have 128 and 64; use a smaller --tp, or int8"
    if precision.is_deferred or "int4" in formats:
        yield from _tile_problems(linears, precision, layout)


def _tile_problems(linears: list[Linear], precision: Precision, layout: Layout) -> Iterator[str]:
    seen: set[str] = set()
    for linear in linears:
        kind = linear.global_name.partition(".layers.")[2].partition(".")[2]
        sizes = (linear.in_features, linear.out_features)
        if kind not in seen and any(size % _TILE for size in sizes):
            seen.add(kind)
            yield (
                f"{precision.weights}: {kind} is {sizes[1]} x {sizes[0]} on a rank of --tp {layout.tp}, and the "
                f"kernels take multiples of {_TILE}; use another --tp, or fp8"
            )
