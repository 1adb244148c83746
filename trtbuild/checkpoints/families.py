"""Model families as a table: Hugging Face architecture -> how to read its config, and where its weights are.

A family is one row. The HF config is read here, once, into a `ModelConfig`; no other module sees an HF key. A config
key that this table does not know, and that could change the result, is an error that names it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from trtbuild.checkpoints.model_config import ModelConfig, MoeConfig, RopeConfig
from trtbuild.errors import Refused, refuse_all

HfConfig = Mapping[str, Any]

_DENSE_KEYS = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
    "layers.{layer}.input_layernorm": "model.layers.{layer}.input_layernorm.weight",
    "layers.{layer}.post_layernorm": "model.layers.{layer}.post_attention_layernorm.weight",
    "layers.{layer}.q": "model.layers.{layer}.self_attn.q_proj.weight",
    "layers.{layer}.k": "model.layers.{layer}.self_attn.k_proj.weight",
    "layers.{layer}.v": "model.layers.{layer}.self_attn.v_proj.weight",
    "layers.{layer}.o": "model.layers.{layer}.self_attn.o_proj.weight",
    "layers.{layer}.gate": "model.layers.{layer}.mlp.gate_proj.weight",
    "layers.{layer}.up": "model.layers.{layer}.mlp.up_proj.weight",
    "layers.{layer}.down": "model.layers.{layer}.mlp.down_proj.weight",
}
_MIXTRAL_KEYS = {key: value for key, value in _DENSE_KEYS.items() if ".mlp." not in value} | {
    "layers.{layer}.router": "model.layers.{layer}.block_sparse_moe.gate.weight",
    "layers.{layer}.experts.{expert}.gate": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
    "layers.{layer}.experts.{expert}.up": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
    "layers.{layer}.experts.{expert}.down": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
}

# Read by `read_config` or by a family's row.
_READ = {
    "architectures", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size", "rms_norm_eps", "max_position_embeddings", "rope_theta", "rope_scaling",
    "rope_parameters", "tie_word_embeddings", "torch_dtype", "dtype", "hidden_act", "sliding_window", "layer_types",
    "quantization_config", "partial_rotary_factor",
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
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
_ROPE_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class Family:
    """One row of the table: its name, key map, extra config keys, and the `ModelConfig` fields that they set.

    `default_theta` is transformers' rope_theta for a config without one.
    """

    name: str
    keys: Mapping[str, str]
    extra_keys: frozenset[str]
    fields: Callable[[HfConfig], dict[str, Any]]
    default_theta: float = 10000.0

    def source_name(self, canonical: str) -> str:
        """The checkpoint's tensor for a canonical name such as `layers.3.experts.5.up` or `layers.0.q.bias`."""
        stem = canonical.removesuffix(".bias")
        numbers = re.findall(r"\.(\d+)", stem)
        template = re.sub(r"^layers\.\d+", "layers.{layer}", stem)
        template = re.sub(r"\.experts\.\d+", ".experts.{expert}", template)
        values = dict(zip(("layer", "expert"), numbers, strict=False))
        name = self.keys[template].format(**values)
        return name.removesuffix(".weight") + ".bias" if canonical != stem else name


def _mistral(config: HfConfig) -> dict[str, Any]:
    """Every layer has the window, unless it is null; transformers takes 4096 where the key is left out."""
    return {"sliding_window": config.get("sliding_window", 4096)}


def _llama(config: HfConfig) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return {"qkv_bias": bias, "dense_bias": bias, "mlp_bias": bool(config.get("mlp_bias", False))}


def _mixtral(config: HfConfig) -> dict[str, Any]:
    moe = MoeConfig(config["num_local_experts"], config["num_experts_per_tok"], config["intermediate_size"])
    return {"sliding_window": config.get("sliding_window"), "moe": moe}


def _qwen2(config: HfConfig) -> dict[str, Any]:
    """q, k and v have biases; layers from `max_window_layers` on have the window, if `use_sliding_window` says so."""
    windowed = config.get("use_sliding_window", False) and config.get("sliding_window")
    return {
        "qkv_bias": True,
        "sliding_window": config["sliding_window"] if windowed else None,
        "first_window_layer": config.get("max_window_layers", 28) if windowed else 0,
    }


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", _DENSE_KEYS, frozenset({"attention_bias", "mlp_bias"}), _llama),
    "MistralForCausalLM": Family("mistral", _DENSE_KEYS, frozenset(), _mistral),
    "MixtralForCausalLM": Family(
        "mixtral", _MIXTRAL_KEYS, frozenset({"num_local_experts", "num_experts_per_tok"}), _mixtral, default_theta=1e6
    ),
    "Qwen2ForCausalLM": Family("qwen2", _DENSE_KEYS, frozenset({"use_sliding_window", "max_window_layers"}), _qwen2),
}


def family_of(architecture: str) -> Family:
    """Raises `Refused`, listing what is known, for an architecture that is not in the table."""
    if architecture not in FAMILIES:
        raise Refused(f"architecture {architecture!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[architecture]


def read_config(hf: HfConfig) -> ModelConfig:
    """Normalise a Hugging Face config.json.

    Raises `Refused` that lists every missing key, every option that is not implemented, and every unknown key.
    """
    given = hf.get("architectures")
    architecture = str(given[0] if isinstance(given, list) and given else given)
    family = family_of(architecture)
    refuse_all(f"config.json ({architecture})", _problems(hf, family))
    num_heads = hf["num_attention_heads"]
    return ModelConfig(
        architecture=architecture,
        family=family.name,
        dtype="fp16" if (hf.get("torch_dtype") or hf.get("dtype")) in ("float16", "float32") else "bf16",
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=hf.get("num_key_value_heads") or num_heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // num_heads,
        intermediate_size=hf["intermediate_size"],
        norm_epsilon=hf["rms_norm_eps"],
        max_position_embeddings=hf["max_position_embeddings"],
        rope=_read_rope(hf, family),
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        **family.fields(hf),
    )


def _problems(hf: HfConfig, family: Family) -> Iterator[str]:
    positive = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
    )
    required = (*positive, "rms_norm_eps", *sorted(family.extra_keys & {"num_local_experts", "num_experts_per_tok"}))
    for key in required:
        value = hf.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            yield f"{key} is {value!r}, but must be a positive number"
        elif key != "rms_norm_eps" and not isinstance(value, int):
            yield f"{key} is {value!r}, but must be a whole number"
    yield from _optional_problems(hf)
    if hf.get("hidden_act", "silu") != "silu":
        yield f"hidden_act {hf['hidden_act']!r} is not implemented (silu is)"
    if hf.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"partial_rotary_factor {hf['partial_rotary_factor']} is not implemented"
    if hf.get("quantization_config"):
        yield "the checkpoint is already quantized (quantization_config); start from the 16-bit one"
    yield from _window_problems(hf)
    yield from _rope_problems(hf)
    known = _READ | _HARMLESS | family.extra_keys
    for key in sorted(set(hf) - known):
        if hf[key] not in (None, False, [], {}):
            yield (
                f"{key} = {hf[key]!r} is not known for this architecture and might change the result; "
                "if it does not, remove it from config.json"
            )


def _optional_problems(hf: HfConfig) -> Iterator[str]:
    """Types of the optional keys, and numbers that contradict each other."""
    for key in _WHOLE:
        if hf.get(key) is not None and not _is_whole(hf[key]):
            yield f"{key} is {hf[key]!r}, but must be a positive whole number or null"
    for key in _FLAGS:
        if not isinstance(hf.get(key), (bool, type(None))):
            yield f"{key} is {hf[key]!r}, but must be true or false"
    if "max_window_layers" in hf and not (hf["max_window_layers"] == 0 or _is_whole(hf["max_window_layers"])):
        yield f"max_window_layers is {hf['max_window_layers']!r}, but must be a whole number"
    heads, kv_heads = hf.get("num_attention_heads"), hf.get("num_key_value_heads")
    if _is_whole(heads) and _is_whole(kv_heads) and heads % kv_heads:
        yield f"{heads} attention heads are not a multiple of {kv_heads} key/value heads"
    head_dim = hf.get("head_dim")
    if head_dim is None and _is_whole(heads) and _is_whole(hf.get("hidden_size")):
        head_dim = hf["hidden_size"] // heads
        if head_dim == 0:
            yield f"hidden_size {hf['hidden_size']} is less than {heads} attention heads"
    if _is_whole(head_dim) and head_dim % 2:
        yield f"head_dim is {head_dim}, but must be even"
    experts, top_k = hf.get("num_local_experts"), hf.get("num_experts_per_tok")
    if _is_whole(experts) and _is_whole(top_k) and top_k > experts:
        yield f"num_experts_per_tok {top_k} is more than num_local_experts {experts}"


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


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
