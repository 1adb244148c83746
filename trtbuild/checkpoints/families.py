"""Model families as a table: Hugging Face architecture -> what its config says, and where its weights are.

A family is one row. `hf_config.read_config` checks a config against its row and reads it into a `ModelConfig`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from trtbuild.checkpoints.model_config import MlaConfig, MoeConfig
from trtbuild.errors import Refused

HfConfig = Mapping[str, Any]
# Factors and bases beyond it are damage; whole numbers that large would not even become a float.
LARGEST_REAL = 1e18

_LAYER = "model.layers.{layer}"
_OUTER_KEYS = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
    "layers.{layer}.input_layernorm": f"{_LAYER}.input_layernorm.weight",
    "layers.{layer}.post_layernorm": f"{_LAYER}.post_attention_layernorm.weight",
}
_ATTENTION_KEYS = {f"layers.{{layer}}.{part}": f"{_LAYER}.self_attn.{part}_proj.weight" for part in "qkvo"}
_QK_NORM_KEYS = {f"layers.{{layer}}.{part}_norm": f"{_LAYER}.self_attn.{part}_norm.weight" for part in "qk"}
_MLA_KEYS = {
    "layers.{layer}.q": f"{_LAYER}.self_attn.q_proj.weight",
    "layers.{layer}.q_a": f"{_LAYER}.self_attn.q_a_proj.weight",
    "layers.{layer}.q_a_norm": f"{_LAYER}.self_attn.q_a_layernorm.weight",
    "layers.{layer}.q_b": f"{_LAYER}.self_attn.q_b_proj.weight",
    "layers.{layer}.kv_a": f"{_LAYER}.self_attn.kv_a_proj_with_mqa.weight",
    "layers.{layer}.kv_a_norm": f"{_LAYER}.self_attn.kv_a_layernorm.weight",
    "layers.{layer}.kv_b": f"{_LAYER}.self_attn.kv_b_proj.weight",
    "layers.{layer}.o": f"{_LAYER}.self_attn.o_proj.weight",
}


def _mlp_keys(ours: str, theirs: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> HfConfig:
    parts = zip(("gate", "up", "down"), names, strict=True)
    return {f"layers.{{layer}}.{ours}{part}": f"{_LAYER}.{theirs}.{name}.weight" for part, name in parts}


def _moe_keys(block: str, expert_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> HfConfig:
    experts = _mlp_keys("experts.{expert}.", block + ".experts.{expert}", expert_names)
    return {"layers.{layer}.router": f"{_LAYER}.{block}.gate.weight", **experts}


_DENSE_KEYS = {**_OUTER_KEYS, **_ATTENTION_KEYS, **_mlp_keys("", "mlp")}
_MIXTRAL_KEYS = {**_OUTER_KEYS, **_ATTENTION_KEYS, **_moe_keys("block_sparse_moe", ("w1", "w3", "w2"))}
# As llm-compressor names the parts when it has taken transformers 5's stacked experts apart.
_MIXTRAL_PROJ_KEYS = {**_MIXTRAL_KEYS, **_moe_keys("block_sparse_moe")}
_QWEN2_MOE_KEYS = {
    **_DENSE_KEYS,
    **_moe_keys("mlp"),
    **_mlp_keys("shared.", "mlp.shared_expert"),
    "layers.{layer}.shared_gate": f"{_LAYER}.mlp.shared_expert_gate.weight",
}
_DEEPSEEK_KEYS = {
    **_OUTER_KEYS,
    **_MLA_KEYS,
    **_mlp_keys("", "mlp"),
    **_moe_keys("mlp"),
    **_mlp_keys("shared.", "mlp.shared_experts"),
}


def _no_problems(_: HfConfig) -> Iterator[str]:
    yield from ()


@dataclass(frozen=True)
class Family:
    """One row of the table: key map, config keys, and the `ModelConfig` fields that they set.

    `required` keys must be positive whole numbers; `optional` ones are checked by `problems`, or where they are read.
    `default_theta` and `default_head_dim` are transformers' values for a config without them (None: hidden / heads).
    `other_keys` is the key map of files that spell some names otherwise.
    """

    name: str
    keys: Mapping[str, str]
    fields: Callable[[HfConfig], dict[str, Any]]
    required: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    problems: Callable[[HfConfig], Iterator[str]] = _no_problems
    default_theta: float = 10000.0
    default_head_dim: int | None = None
    other_keys: Mapping[str, str] | None = None

    def as_spelled_in(self, names: Collection[str]) -> Family:
        """The family with the key map that a checkpoint's tensors follow; its own where they follow both or neither."""
        if self.other_keys is None:
            return self
        differing = [key for key in self.keys if self.keys[key] != self.other_keys[key]]

        def follows(keys: Mapping[str, str]) -> bool:
            modules = tuple(keys[key].format(layer=0, expert=0).removesuffix("weight") for key in differing)
            return any(name.startswith(modules) for name in names)

        is_other = follows(self.other_keys) and not follows(self.keys)
        return replace(self, keys=self.other_keys, other_keys=None) if is_other else self

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


def _qwen_window(config: HfConfig) -> dict[str, Any]:
    """Layers from `max_window_layers` on have the window, if `use_sliding_window` says so."""
    windowed = config.get("use_sliding_window", False) and config.get("sliding_window")
    return {
        "sliding_window": config["sliding_window"] if windowed else None,
        "first_window_layer": config.get("max_window_layers", 28) if windowed else 0,
    }


def _qwen2(config: HfConfig) -> dict[str, Any]:
    """q, k and v have biases."""
    return {"qkv_bias": True, **_qwen_window(config)}


def _qwen3(config: HfConfig) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return {"qk_norm": True, "qkv_bias": bias, "dense_bias": bias, **_qwen_window(config)}


def _qwen_moe(config: HfConfig, **shared: Any) -> MoeConfig:
    """Layer i has experts if `decoder_sparse_step` divides i + 1 and `mlp_only_layers` does not list it."""
    step, listed = config.get("decoder_sparse_step", 1), frozenset(config.get("mlp_only_layers") or ())
    layers = range(config["num_hidden_layers"])
    return MoeConfig(
        config["num_experts"],
        config["num_experts_per_tok"],
        config["moe_intermediate_size"],
        norm_topk_prob=bool(config.get("norm_topk_prob", False)),
        dense_layers=tuple(layer for layer in layers if layer in listed or (layer + 1) % step),
        **shared,
    )


def _qwen2_moe(config: HfConfig) -> dict[str, Any]:
    shared = config["shared_expert_intermediate_size"]
    moe = _qwen_moe(config, shared_intermediate_size=shared, shared_gate=True)
    return {"qkv_bias": config.get("qkv_bias") is not False, "moe": moe}


def _qwen3_moe(config: HfConfig) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return {"qk_norm": True, "qkv_bias": bias, "dense_bias": bias, "moe": _qwen_moe(config)}


def _qwen_moe_problems(config: HfConfig) -> Iterator[str]:
    if config.get("use_sliding_window"):
        yield "use_sliding_window is not implemented for Qwen's mixtures of experts"
    step, listed = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if not isinstance(step, int) or isinstance(step, bool) or step < 1:
        yield f"decoder_sparse_step is {step!r}, but must be a positive whole number"
    if not isinstance(listed, list) or not all(isinstance(layer, int) for layer in listed):
        yield f"mlp_only_layers is {listed!r}, but must be a list of layers"


def _deepseek_v2(config: HfConfig) -> dict[str, Any]:
    grouped = config.get("topk_method", "greedy") == "group_limited_greedy"
    moe = MoeConfig(
        config["n_routed_experts"],
        config["num_experts_per_tok"],
        config["moe_intermediate_size"],
        norm_topk_prob=False,
        shared_intermediate_size=config["moe_intermediate_size"] * (config.get("n_shared_experts") or 0),
        dense_layers=tuple(range(config.get("first_k_dense_replace") or 0)),
        num_groups=config["n_group"] if grouped else 1,
        top_groups=config["topk_group"] if grouped else 1,
        routed_scaling_factor=float(config.get("routed_scaling_factor", 1.0)),
    )
    mla = MlaConfig(
        config["kv_lora_rank"],
        config.get("q_lora_rank"),
        config["qk_nope_head_dim"],
        config["qk_rope_head_dim"],
        config["v_head_dim"],
    )
    return {
        "moe": moe,
        "mla": mla,
        "head_dim": mla.nope_head_dim + mla.rope_head_dim,
        "num_kv_heads": config["num_attention_heads"],
    }


def _deepseek_problems(config: HfConfig) -> Iterator[str]:
    """Options in which DeepSeek's own code and transformers differ, or that no published model uses."""
    fixed = {"moe_layer_freq": 1, "scoring_func": "softmax"}
    for key, only in {**fixed, **dict.fromkeys(("attention_bias", "mlp_bias", "norm_topk_prob"), False)}.items():
        if config.get(key, only) != only:
            yield f"{key} = {config[key]!r} is not implemented ({only!r} is)"
    method = config.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        yield f"topk_method {method!r} is not implemented (greedy and group_limited_greedy are)"
    whole = ("n_group", "topk_group") if method == "group_limited_greedy" else ()
    for key in (*whole, *(key for key in ("q_lora_rank",) if config.get(key) is not None)):
        if not isinstance(config.get(key), int) or isinstance(config.get(key), bool) or config[key] < 1:
            yield f"{key} is {config.get(key)!r}, but must be a positive whole number"
    for key in ("first_k_dense_replace", "n_shared_experts"):
        value = 0 if config.get(key) is None else config[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            yield f"{key} is {value!r}, but must be a whole number"
    factor = config.get("routed_scaling_factor", 1.0)
    if not isinstance(factor, (int, float)) or isinstance(factor, bool) or not 0 < factor < LARGEST_REAL:
        yield f"routed_scaling_factor is {factor!r}, but must be a positive number"
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if kv_heads is not None and kv_heads != heads:
        yield f"num_key_value_heads {kv_heads} differs from num_attention_heads {heads}: not implemented with MLA"


_WINDOW = frozenset({"use_sliding_window", "max_window_layers"})
_MOE_REQUIRED = frozenset({"num_experts", "num_experts_per_tok", "moe_intermediate_size"})
_QWEN_MOE_OPTIONAL = _WINDOW | {"decoder_sparse_step", "mlp_only_layers", "norm_topk_prob"}

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", _DENSE_KEYS, _llama, optional=frozenset({"attention_bias", "mlp_bias"})),
    "MistralForCausalLM": Family("mistral", _DENSE_KEYS, _mistral),
    "MixtralForCausalLM": Family(
        "mixtral",
        _MIXTRAL_KEYS,
        _mixtral,
        required=frozenset({"num_local_experts", "num_experts_per_tok"}),
        default_theta=1e6,
        other_keys=_MIXTRAL_PROJ_KEYS,
    ),
    "Qwen2ForCausalLM": Family("qwen2", _DENSE_KEYS, _qwen2, optional=_WINDOW),
    "Qwen2MoeForCausalLM": Family(
        "qwen2_moe",
        _QWEN2_MOE_KEYS,
        _qwen2_moe,
        required=_MOE_REQUIRED | {"shared_expert_intermediate_size"},
        optional=_QWEN_MOE_OPTIONAL | {"qkv_bias"},
        problems=_qwen_moe_problems,
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        {**_DENSE_KEYS, **_QK_NORM_KEYS},
        _qwen3,
        optional=_WINDOW | {"attention_bias"},
        default_head_dim=128,
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        {**_DENSE_KEYS, **_QK_NORM_KEYS, **_moe_keys("mlp")},
        _qwen3_moe,
        required=_MOE_REQUIRED,
        optional=_QWEN_MOE_OPTIONAL | {"attention_bias"},
        problems=_qwen_moe_problems,
    ),
    "DeepseekV2ForCausalLM": Family(
        "deepseek_v2",
        _DEEPSEEK_KEYS,
        _deepseek_v2,
        required=frozenset(
            {"n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "kv_lora_rank"}
            | {"qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"}
        ),
        optional=frozenset(
            {"q_lora_rank", "n_shared_experts", "first_k_dense_replace", "moe_layer_freq", "topk_method", "n_group"}
            | {"topk_group", "norm_topk_prob", "routed_scaling_factor", "scoring_func", "attention_bias"}
            # Training only (aux_loss_alpha, seq_aux, ep_size), or derived by transformers.
            | {"aux_loss_alpha", "seq_aux", "ep_size", "qk_head_dim", "mlp_bias"}
        ),
        problems=_deepseek_problems,
    ),
}


def family_of(architecture: str) -> Family:
    """Raises `Refused`, listing what is known, for an architecture that is not in the table."""
    if architecture not in FAMILIES:
        raise Refused(f"architecture {architecture!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[architecture]
