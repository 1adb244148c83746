"""How large a model is: parameters, and on one rank its bytes by kind, its KV cache and its arithmetic per token.

Bytes are those of the rank plan, tensor by tensor, so they are the rank file's bytes but for its header.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.model_config import ModelConfig
from trtbuild.checkpoints.precision import Precision
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.rank_tensors import Linear, RankPlan
from trtbuild.checkpoints.source_tensors import expected_shapes

KINDS = ("attention", "experts", "shared expert", "dense MLP", "embedding", "lm_head", "norms, router")
# Bytes of one value of the KV cache, which has the model's 16-bit type.
CACHE_ITEM = 2


@dataclass(frozen=True)
class Parameters:
    """Weights of the whole model, and those that one token uses: of the routed experts its `top_k`."""

    total: int
    active: int


@dataclass(frozen=True)
class RankSize:
    """One rank's part of the model.

    kinds: bytes by kind. cache_bytes: of one token, in every layer. quantized_ops, plain_ops: operations (two for each
    multiply-accumulate) that one token takes in the quantizable linear layers, and in 16 bit outside of them; fp8_ops:
    those of the quantizable layers that multiply in fp8;
    attention_ops: those of one query token over one earlier position, in one layer. Of the experts, a token is expected
    to choose as many of this rank's as of any other's.
    """

    layers: range
    kinds: Mapping[str, int]
    cache_bytes: int
    quantized_ops: float
    fp8_ops: float
    plain_ops: float
    attention_ops: float

    @property
    def weight_bytes(self) -> int:
        return sum(self.kinds.values())


def count_parameters(config: ModelConfig) -> Parameters:
    """Counted over the checkpoint's tensors; a tied embedding counts once."""
    sizes = {name: math.prod(shape) for name, shape in expected_shapes(config).items()}
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    total = sum(sizes.values())
    if config.moe is None:
        return Parameters(total, total)
    return Parameters(total, total - routed + routed * config.moe.top_k // config.moe.num_experts)


def attention_form(config: ModelConfig) -> str:
    """What the KV cache holds, in words."""
    if config.mla:
        expanded = config.num_heads * (config.head_dim + config.v_head_dim) * CACHE_ITEM
        latent = config.mla.latent_dim * CACHE_ITEM
        return f"MLA, latent cache: {latent} bytes a layer; expanded heads would take {expanded}"
    if config.num_kv_heads == config.num_heads:
        return f"MHA, {config.num_heads} heads of {config.head_dim}"
    if config.num_kv_heads == 1:
        return f"MQA, {config.num_heads} query heads and 1 key/value head of {config.head_dim}"
    return f"GQA, {config.num_heads} query heads and {config.num_kv_heads} key/value heads of {config.head_dim}"


def measure_rank(plan: RankPlan) -> RankSize:
    """From every tensor of the rank."""
    kinds: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    for tensor in plan.plain:
        kinds[_kind_of_plain(tensor.spec.name)] += tensor.spec.num_bytes
    for linear in plan.linears:
        kinds[_kind_of_linear(linear)] += sum(spec.num_bytes for spec in linear.tensors())
    return _rank_size(plan, kinds)


def _rank_size(plan: RankPlan, kinds: Mapping[str, int]) -> RankSize:
    config, tp = plan.config, plan.layout.layout.tp
    heads = config.num_heads // tp
    if config.mla:
        attention_ops = 2.0 * heads * (config.mla.latent_dim + config.mla.kv_lora_rank)
    else:
        attention_ops = 2.0 * heads * 2 * config.head_dim
    plain = sum(
        2.0 * math.prod(tensor.spec.shape)
        for tensor in plan.plain
        if tensor.spec.name.endswith(("lm_head.weight", "router.weight", "kv_b_proj.weight"))
    )
    item = 1 if plan.precision.fp8_cache else CACHE_ITEM
    per_layer = sum(heads * width for heads, width in plan.cache_shapes().values()) * item
    quantized = sum(_linear_ops(linear, config) for linear in plan.linears)
    fp8 = sum(_linear_ops(linear, config) for linear in plan.linears if linear.precision in ("fp8", "fp8-dynamic"))
    return RankSize(plan.layers, dict(kinds), per_layer * len(plan.layers), quantized, fp8, plain, attention_ops)


def _linear_ops(linear: Linear, config: ModelConfig) -> float:
    ops = 2.0 * linear.in_features * linear.out_features
    if linear.num_experts is None or config.moe is None:
        return ops
    return ops * config.moe.top_k * linear.num_experts / config.moe.num_experts


def _kind_of_plain(name: str) -> str:
    if name.endswith("vocab_embedding.weight"):
        return "embedding"
    if name.endswith("lm_head.weight"):
        return "lm_head"
    return "attention" if name.endswith("kv_b_proj.weight") else "norms, router"


def _kind_of_linear(linear: Linear) -> str:
    if ".attention." in linear.name:
        return "attention"
    if linear.num_experts is not None:
        return "experts"
    return "shared expert" if ".shared_expert." in linear.name else "dense MLP"


@lru_cache(maxsize=4096)
def estimate_rank(config: ModelConfig, layout: Layout, stage: int, precision: Precision) -> RankSize:
    """The same as `measure_rank` for a rank of a pipeline stage, from one layer of each kind: thousands are cheap.

    For a precision that is the same in every layer. Raises `Refused` where int4 finds no group that fits.
    """
    layers = layout.stage_layers(config.num_layers, stage)
    sample = measure_layers(config, replace(layout, pp=1), precision)
    kinds: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    quantized = fp8 = plain = 0.0
    for has_experts, part in sample.layers.items():
        count = sum(config.is_moe(layer) == has_experts for layer in layers)
        kinds.update({kind: size * count for kind, size in part.kinds.items()})
        quantized, plain = quantized + part.quantized_ops * count, plain + part.plain_ops * count
        fp8 += part.fp8_ops * count
    if stage == 0:
        kinds["embedding"] += sample.embedding
    if stage == layout.pp - 1:
        kinds["lm_head"] += sample.lm_head
        kinds["norms, router"] += sample.final_norm
        plain += sample.lm_head  # 2 operations for each of its 16-bit weights.
    one = next(iter(sample.layers.values()))
    return RankSize(layers, dict(kinds), one.cache_bytes * len(layers), quantized, fp8, plain, one.attention_ops)


@dataclass(frozen=True)
class LayerSample:
    """One layer of each kind (keyed by whether it has experts), and the bytes of what stands outside of layers."""

    layers: Mapping[bool, RankSize]
    embedding: int
    lm_head: int
    final_norm: int


@lru_cache(maxsize=4096)
def measure_layers(config: ModelConfig, layout: Layout, precision: Precision) -> LayerSample:
    """For the first rank of a layout without pipeline stages."""
    layers: dict[bool, RankSize] = {}
    outer: dict[str, int] = {}
    for has_experts in {config.is_moe(layer) for layer in range(config.num_layers)}:
        plan = plan_rank(single_layer(config, has_experts), layout.rank(0), precision)
        layers[has_experts] = measure_rank(plan.only_layers())
        outer = {_outer_name(t.spec.name): t.spec.num_bytes for t in plan.plain}
    return LayerSample(layers, outer["vocab_embedding"], outer["lm_head"], outer["ln_f"])


def single_layer(config: ModelConfig, has_experts: bool) -> ModelConfig:
    """The model with one layer only, of the kind asked for."""
    moe = replace(config.moe, dense_layers=() if has_experts else (0,)) if config.moe else None
    return replace(config, num_layers=1, moe=moe)


def _outer_name(name: str) -> str:
    return re.sub(r"^transformer\.|\.weight$", "", name)


def attended_positions(config: ModelConfig, layers: range, context: int) -> int:
    """Sum over the layers of the positions that a query after `context` of them reads: all, or its window."""
    windows = (config.window(layer) for layer in layers)
    return sum(context if window is None else min(window, context) for window in windows)
