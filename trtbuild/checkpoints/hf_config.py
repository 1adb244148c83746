"""Reading a Hugging Face config.json into a `ModelConfig`, once; no other module sees an HF key.

A config key that is not known here or in the family's row, and that could change the result, is an error that names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

from trtbuild.checkpoints.families import LARGEST_REAL, Family, HfConfig, family_of
from trtbuild.checkpoints.hub_formats.config import quantization_problems
from trtbuild.checkpoints.model_config import ModelConfig, RopeConfig
from trtbuild.errors import refuse_all

# Read by `read_config` or by a family's row.
_READ = {
    "architectures", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size", "rms_norm_eps", "max_position_embeddings", "rope_theta", "rope_scaling",
    "rope_parameters", "tie_word_embeddings", "torch_dtype", "dtype", "hidden_act", "sliding_window", "layer_types",
    "quantization_config", "compression_config", "partial_rotary_factor",
}  # fmt: skip
# Names, training and generation settings: no effect on the logits of a forward pass.
_HARMLESS = {
    "model_type", "transformers_version", "_name_or_path", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
    "unk_token_id", "initializer_range", "attention_dropout", "hidden_dropout", "pretraining_tp",
    "output_router_logits",
    "router_aux_loss_coef", "router_jitter_noise", "output_attentions", "output_hidden_states", "return_dict",
    "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type", "auto_map",
    "task_specific_params",
    "_attn_implementation", "attn_implementation", "unsloth_version", "unsloth_fixed", "keys_to_ignore_at_inference",
}  # fmt: skip
_ROPE_KEYS = {
    "rope_theta": "theta", "factor": "factor", "original_max_position_embeddings": "original_max_position_embeddings",
    "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor", "beta_fast": "beta_fast",
    "beta_slow": "beta_slow", "attention_factor": "attention_factor", "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim", "truncate": "truncate",
}  # fmt: skip
# Where these options are given they must be positive whole numbers, positive numbers, or true or false.
_WHOLE = ("num_key_value_heads", "head_dim", "sliding_window")
_FLAGS = (
    "tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "norm_topk_prob", "qkv_bias",
)  # fmt: skip
# Several times the largest published models: 126 layers of 128 heads, 61 layers of 384 experts.
LARGEST_WHOLE = 2**31 - 1
MAX_LAYERS = 1024
MAX_PARTS = 2**17
_ROPE_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_config(hf: HfConfig) -> ModelConfig:
    """Normalise a Hugging Face config.json.

    Raises `Refused` that lists every missing key, every option that is not implemented, and every unknown key.
    """
    given = hf.get("architectures")
    architecture = str(given[0] if isinstance(given, list) and given else given)
    family = family_of(architecture)
    hf = _with_usual_names(hf, family)
    refuse_all(f"config.json ({architecture})", _problems(hf, family))
    num_heads = hf["num_attention_heads"]
    fields: dict[str, Any] = {
        "architecture": architecture,
        "family": family.name,
        "dtype": "fp16" if (hf.get("torch_dtype") or hf.get("dtype")) in ("float16", "float32") else "bf16",
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_heads": num_heads,
        "num_kv_heads": hf.get("num_key_value_heads") or num_heads,
        "head_dim": hf.get("head_dim", family.default_head_dim) or hf["hidden_size"] // num_heads,
        "intermediate_size": hf["intermediate_size"],
        "norm_epsilon": hf["rms_norm_eps"],
        "max_position_embeddings": hf["max_position_embeddings"],
        "rope": _read_rope(hf, family),
        "tie_embeddings": bool(hf.get("tie_word_embeddings", False)),
    }
    config = ModelConfig(**{**fields, **family.fields(hf)})
    refuse_all(f"config.json ({architecture})", _contradictions(config))
    return config


def _with_usual_names(hf: HfConfig, family: Family) -> HfConfig:
    """transformers 5 saves Qwen3-MoE's `num_experts` as `num_local_experts`."""
    if "num_experts" in family.required and "num_experts" not in hf and "num_local_experts" in hf:
        return {("num_experts" if key == "num_local_experts" else key): value for key, value in hf.items()}
    return hf


def _problems(hf: HfConfig, family: Family) -> Iterator[str]:
    positive = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
    )
    required = (*positive, "rms_norm_eps", *sorted(family.required))
    for key in required:
        value = hf.get(key)
        if not _is_positive(value) and not _is_whole(value):
            yield f"{key} is {value!r}, but must be a positive number"
        elif key != "rms_norm_eps" and not isinstance(value, int):
            yield f"{key} is {value!r}, but must be a whole number"
    yield from _optional_problems(hf)
    yield from _size_problems(hf)
    if hf.get("hidden_act", "silu") != "silu":
        yield f"hidden_act {hf['hidden_act']!r} is not implemented (silu is)"
    if hf.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"partial_rotary_factor {hf['partial_rotary_factor']} is not implemented"
    yield from quantization_problems(hf)
    yield from _window_problems(hf)
    yield from _rope_problems(hf)
    yield from family.problems(hf)
    known = _READ | _HARMLESS | family.required | family.optional
    for key in sorted(set(hf) - known):
        if hf[key] not in (None, False, [], {}):
            shown = key if key.isidentifier() else repr(key)
            yield (
                f"{shown} = {hf[key]!r} is not known for this architecture and might change the result; "
                "if it does not, remove it from config.json"
            )


def _optional_problems(hf: HfConfig) -> Iterator[str]:
    """Types of the optional keys, and numbers that contradict each other."""
    for key in _WHOLE:
        # transformers 5 saves a window that is switched off as 0.
        is_off = key == "sliding_window" and hf.get(key) == 0 and hf.get("use_sliding_window") is False
        if hf.get(key) is not None and not _is_whole(hf[key]) and not is_off:
            yield f"{key} is {hf[key]!r}, but must be a positive whole number or null"
    for key in _FLAGS:
        if not isinstance(hf.get(key), (bool, type(None))):
            yield f"{key} is {hf[key]!r}, but must be true or false"
    if "max_window_layers" in hf and not (hf["max_window_layers"] == 0 or _is_whole(hf["max_window_layers"])):
        yield f"max_window_layers is {hf['max_window_layers']!r}, but must be a whole number"
    heads, kv_heads = hf.get("num_attention_heads"), hf.get("num_key_value_heads")
    if _is_whole(heads) and _is_whole(kv_heads) and heads % kv_heads:
        yield f"{heads} attention heads are not a multiple of {kv_heads} key/value heads"


def _size_problems(hf: HfConfig) -> Iterator[str]:
    """Numbers far beyond any model: listing the tensors of such a config would take all time and memory."""
    for key in sorted(key for key, value in hf.items() if isinstance(value, int) and value > LARGEST_WHOLE):
        if key not in _HARMLESS:
            yield f"{key} is larger than {LARGEST_WHOLE}, which no model needs"
    layers = hf.get("num_hidden_layers")
    for key in ("num_hidden_layers", "first_k_dense_replace"):
        if _is_whole(hf.get(key)) and hf[key] > MAX_LAYERS:
            yield f"{key} is {hf[key]}; at most {MAX_LAYERS} layers are read"
    for key in ("num_attention_heads", "num_experts", "num_local_experts", "n_routed_experts"):
        if _is_whole(layers) and _is_whole(hf.get(key)) and layers * hf[key] > MAX_PARTS:
            yield f"{key} {hf[key]} x num_hidden_layers {layers} is more than {MAX_PARTS}, which no model needs"


def _contradictions(config: ModelConfig) -> Iterator[str]:
    """Numbers that are right one by one and do not fit together."""
    moe, mla = config.moe, config.mla
    if config.head_dim == 0:
        yield f"hidden_size {config.hidden_size} is less than {config.num_heads} attention heads"
    if config.rope_dim % 2:
        yield f"{'qk_rope_head_dim' if mla else 'head_dim'} is {config.rope_dim}, but must be even"
    if not moe:
        return
    if moe.top_k > moe.num_experts:
        yield f"num_experts_per_tok {moe.top_k} is more than the number of experts, {moe.num_experts}"
        return
    outside = [layer for layer in moe.dense_layers if not 0 <= layer < config.num_layers]
    if outside:
        yield f"layers {outside} are said to be dense, but the model has {config.num_layers}"
    if moe.num_experts % moe.num_groups or moe.top_groups > moe.num_groups:
        yield f"{moe.num_experts} experts in {moe.num_groups} groups, of which {moe.top_groups} are taken"
    elif moe.top_k > moe.top_groups * (moe.num_experts // moe.num_groups):
        yield f"num_experts_per_tok {moe.top_k} is more than {moe.top_groups} groups of experts hold"


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < LARGEST_REAL


def _window_problems(hf: HfConfig) -> Iterator[str]:
    """`layer_types`, where given, must say what the older keys say."""
    types = hf.get("layer_types")
    if not types:
        return
    if not isinstance(types, list):
        yield f"layer_types is {types!r}, but must be a list"
        return
    first = hf.get("max_window_layers", 0) if "use_sliding_window" in hf else 0
    if not isinstance(first, int):
        return
    windowed = bool(hf.get("sliding_window")) and hf.get("use_sliding_window", True)
    for layer, kind in enumerate(types):
        expected = "sliding_attention" if windowed and layer >= first else "full_attention"
        if kind != expected:
            contradiction = f"layer_types[{layer}] is {kind!r}, where the other keys say {expected!r}"
            yield f"{contradiction}; mixed patterns are not implemented"
            return


def _rope_settings(hf: HfConfig) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters`; before, `rope_theta` and `rope_scaling` (type or rope_type)."""
    given = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    settings = dict(given) if isinstance(given, dict) else {}
    settings["rope_type"] = settings.pop("type", None) or settings.get("rope_type") or "default"
    if "rope_theta" not in settings and hf.get("rope_theta") is not None:
        settings["rope_theta"] = hf["rope_theta"]
    return settings


def _rope_problems(hf: HfConfig) -> Iterator[str]:
    for key in ("rope_parameters", "rope_scaling"):
        if hf.get(key) and not isinstance(hf[key], dict):
            yield f"{key} is {hf[key]!r}, but must be an object"
            return
    settings = _rope_settings(hf)
    kind = settings.pop("rope_type")
    if kind != "default" and (not isinstance(kind, str) or kind not in _ROPE_REQUIRED):
        yield f"RoPE type {kind!r} is not implemented (default, {', '.join(_ROPE_REQUIRED)} are)"
        return
    for key in _ROPE_REQUIRED.get(kind, ()):
        if settings.get(key) is None:
            yield f"RoPE type {kind!r} needs {key!r}, found {settings.get(key)!r}"
    for key in sorted(set(settings) & set(_ROPE_KEYS)):
        value, is_flag = settings[key], key == "truncate"
        is_right = isinstance(value, bool) if is_flag else _is_positive(value)
        if value is not None and not is_right and not (key.startswith("mscale") and value == 0):
            yield f"RoPE option {key!r} is {value!r}, but must be {'true or false' if is_flag else 'a positive number'}"
    for key in sorted(set(settings) - set(_ROPE_KEYS)):
        yield f"RoPE option {key!r} = {settings[key]!r} is not implemented"


def _read_rope(hf: HfConfig, family: Family) -> RopeConfig:
    settings: dict[str, Any] = {"rope_theta": family.default_theta, **_rope_settings(hf)}
    fields = {_ROPE_KEYS[key]: value for key, value in settings.items() if key in _ROPE_KEYS and value is not None}
    return RopeConfig(type=settings["rope_type"], **fields)
