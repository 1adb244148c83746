"""config.json of a rank checkpoint, as TensorRT-LLM 1.x's `PretrainedConfig` and its subclasses read it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.model_config import ModelConfig, MoeConfig
from trtbuild.checkpoints.precision import DEFERRED, Precision
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.rank_tensors import Linear

_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
# TensorRT-LLM has no fp8-dynamic experts, and no other name for them either: it refuses such a model by this one.
_QUANT_ALGOS = {
    "bf16": None, "fp16": None, "fp8": "FP8", "fp8-dynamic": "FP8_PER_CHANNEL_PER_TOKEN", "int8": "W8A16",
    "int4": "W4A16",
}  # fmt: skip
# What its rowwise fp8 clips activations to (models/convert_utils.py's fbgemm recipe).
_ROWWISE_CLAMP = (-1200.0, 1200.0)
# TensorRT-LLM's own default list of modules that stay unquantized (QuantConfig.exclude_modules = None).
_EXCLUDED = [
    "*lm_head",
    "*router",
    "*vocab_embedding",
    "*position_embedding",
    "*block_embedding",
    "*shared_expert_gate",
]


def tensorrt_llm_config(config: ModelConfig, layout: Layout, precision: Precision) -> dict[str, Any]:
    """config.json as TensorRT-LLM 1.x's `PretrainedConfig` reads it."""
    rope = {
        key: value
        for key, value in asdict(config.rope).items()
        if value is not None and key not in ("theta", "truncate")
    }
    result: dict[str, Any] = {
        "architecture": config.architecture,
        "dtype": _DTYPES[precision.dtype],
        "logits_dtype": "float32",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_size": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "swiglu" if config.moe else "silu",
        "norm_epsilon": config.norm_epsilon,
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": config.max_position_embeddings,
        "rotary_base": config.rope.theta,
        "rotary_scaling": None if config.rope.type == "default" else rope,
        "qk_layernorm": config.qk_norm,
        "attn_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "tie_word_embeddings": config.tie_embeddings,
        "mapping": {
            "world_size": layout.world_size, "gpus_per_node": 8, "cp_size": 1,
            "tp_size": layout.tp, "pp_size": layout.pp,
            "moe_tp_size": layout.moe_tp, "moe_ep_size": layout.moe_ep,
        },
        "quantization": quantization_section(config, layout, precision),
    }  # fmt: skip
    if config.family.startswith("qwen"):
        sizes = (config.moe.intermediate_size, config.moe.shared_intermediate_size) if config.moe else (0, 0)
        result["qwen_type"] = config.family
        result["moe_intermediate_size"], result["moe_shared_expert_intermediate_size"] = sizes
    if config.moe:
        result["moe"] = _moe_section(config.moe)
    if config.moe and config.family != "mixtral":
        # For our own use: 1.x builds experts in every layer, and reads no other key for it.
        result["mlp_only_layers"] = list(config.moe.dense_layers)
    if config.mla:
        result |= {
            "q_lora_rank": config.mla.q_lora_rank or 0,
            "kv_lora_rank": config.mla.kv_lora_rank,
            "qk_nope_head_dim": config.mla.nope_head_dim,
            "qk_rope_head_dim": config.mla.rope_head_dim,
            "v_head_dim": config.mla.v_head_dim,
        }
    return result


def quantization_section(config: ModelConfig, layout: Layout, precision: Precision) -> dict[str, Any]:
    """`quantization` as QuantConfig reads it, or as LayerQuantConfig where layers differ.

    Our own builders read trtbuild.json. What TensorRT-LLM has no field for (act-order, a static fp8 scale for each row)
    shows in the tensors' names only.
    """
    if precision.dialect == "tensorrt-llm":
        return _dialect_section(config, layout, precision)
    if not precision.modules and precision.weights in _QUANT_ALGOS:
        return _algorithm(_QUANT_ALGOS[precision.weights])
    # The first rank of each pipeline stage has the stage's layers.
    ranks = [layout.rank(rank) for rank in range(0, layout.world_size, layout.tp)]
    linears = [linear for rank in ranks for linear in plan_rank(config, rank, precision).linears]
    layers = {linear.global_name: _layer_algorithm(linear) for linear in linears}
    first = layers[linears[0].global_name]
    if all(section == first for section in layers.values()):
        return first
    quantized = {name: section for name, section in layers.items() if section["quant_algo"]}
    return {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None, "quantized_layers": quantized}


def _dialect_section(config: ModelConfig, layout: Layout, precision: Precision) -> dict[str, Any]:
    """`quantization` of a checkpoint for trtllm-build, whose layers have one algorithm or none."""
    ranks = [layout.rank(rank) for rank in range(0, layout.world_size, layout.tp)]
    linears = [linear for rank in ranks for linear in plan_rank(config, rank, precision).linears]
    found = {linear.precision: linear for linear in linears if linear.is_quantized}
    if precision.is_deferred:
        section = _algorithm(DEFERRED[precision.weights])
        # 1.x compares these with names of tensors here, where `*shared_expert_gate` matches none.
        section["exclude_modules"] = [*_EXCLUDED[:-1], "*shared_expert_gate*"]
    elif found:
        [linear] = found.values()
        section = _layer_algorithm(linear)
        plain = [f"*{linear.global_name}" for linear in linears if not linear.is_quantized]
        section["exclude_modules"] = [*_EXCLUDED, *plain]
        if linear.packs_rows:
            section["pre_quant_scale"] = True
        if linear.precision == "fp8-dynamic":
            section["clamp_val"] = list(_ROWWISE_CLAMP)
    else:
        section = _algorithm(None)
    return section | {"kv_cache_quant_algo": "FP8" if precision.fp8_cache else None}


def _algorithm(quant_algo: str | None, group_size: int = 128, has_zero_point: bool = False) -> dict[str, Any]:
    return {
        "quant_algo": quant_algo, "kv_cache_quant_algo": None, "group_size": group_size,
        "has_zero_point": has_zero_point, "pre_quant_scale": False,
        "exclude_modules": _EXCLUDED if quant_algo else None,
    }  # fmt: skip


def _layer_algorithm(linear: Linear) -> dict[str, Any]:
    """Of one layer; int4 that was calibrated, or that a checkpoint brought along, is W4A16_AWQ."""
    if linear.precision == "int4":
        return _algorithm("W4A16_AWQ", linear.group_size or 128, linear.form.zeros)
    return _algorithm(_QUANT_ALGOS[linear.precision])


def _moe_section(moe: MoeConfig) -> dict[str, Any]:
    """`moe` as TensorRT-LLM's MoeConfig reads it."""
    section: dict[str, Any] = {
        "num_experts": moe.num_experts,
        "top_k": moe.top_k,
        "normalization_mode": _normalization_mode(moe),
    }
    if moe.shared_intermediate_size:
        section["shared_expert_intermediate_size"] = moe.shared_intermediate_size
    if moe.num_groups > 1:
        section["device_limited_n_group"] = moe.num_groups
        section["device_limited_topk_group"] = moe.top_groups
        section["device_limited_routed_scaling_factor"] = moe.routed_scaling_factor
    return section


def _normalization_mode(moe: MoeConfig) -> int:
    """0 NONE, 1 RENORMALIZE, 3 DEVICE_LIMITED (tensorrt_llm/layers/moe.py)."""
    if moe.num_groups > 1:
        return 3
    return 1 if moe.norm_topk_prob else 0
