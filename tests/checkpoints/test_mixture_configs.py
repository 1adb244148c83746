"""The configs of mixtures of experts: every field read, the hub's own accepted, what is not implemented refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
from helpers import DEEPSEEK_LITE, hf_config, refusal

from trtbuild.checkpoints.hf_config import read_config
from trtbuild.checkpoints.model_config import MlaConfig, MoeConfig
from trtbuild.checkpoints.source_tensors import expected_shapes


def test_every_field_of_qwens_mixtures_is_read() -> None:
    hf = hf_config("qwen2_moe", num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3], norm_topk_prob=True)
    config = read_config(hf)
    # decoder_sparse_step 2: experts in layers 1, 3, 5; of these the list takes 3 out.
    assert config.moe == MoeConfig(
        4, 2, 64, norm_topk_prob=True, shared_intermediate_size=96, shared_gate=True, dense_layers=(0, 2, 3, 4)
    )
    assert (config.qkv_bias, config.dense_bias, config.qk_norm, config.mla) == (True, False, False, None)
    assert [config.is_moe(layer) for layer in range(6)] == [False, True, False, False, False, True]
    assert not read_config(hf | {"qkv_bias": False}).qkv_bias
    qwen3 = read_config(hf_config("qwen3_moe", attention_bias=True))
    assert qwen3.moe == MoeConfig(8, 3, 64, norm_topk_prob=True)
    assert (qwen3.qkv_bias, qwen3.dense_bias, qwen3.qk_norm) == (True, True, True)
    left_out = {"norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"}
    plain = read_config({key: value for key, value in hf_config("qwen3_moe").items() if key not in left_out})
    assert plain.moe == MoeConfig(8, 3, 64, norm_topk_prob=False)


def test_every_field_of_deepseek_is_read() -> None:
    config = read_config(hf_config("deepseek_v2", first_k_dense_replace=2))
    assert config.mla == MlaConfig(32, 48, 16, 8, 24)
    assert (config.head_dim, config.num_kv_heads, config.v_head_dim, config.rope_dim) == (24, 8, 24, 8)
    assert config.moe == MoeConfig(
        8, 3, 64, norm_topk_prob=False, shared_intermediate_size=128, dense_layers=(0, 1), num_groups=4, top_groups=2,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    assert (config.rope.type, config.rope.factor, config.rope.mscale, config.rope.mscale_all_dim) == (
        "yarn", 4, 0.707, 1.0,
    )  # fmt: skip
    # arXiv 2309.00071 and DeepSeek's own code: 1 / sqrt(24) * (0.1 * mscale_all_dim * ln(4) + 1)^2
    assert config.attention_scale == pytest.approx(0.204124 * 1.138629**2, rel=1e-5)
    lite = read_config(hf_config("deepseek_v2", **DEEPSEEK_LITE, n_shared_experts=None, first_k_dense_replace=0))
    assert lite.mla == MlaConfig(32, None, 16, 8, 24)
    assert lite.moe == MoeConfig(8, 3, 64, norm_topk_prob=False)
    # Groups are there and do not count: `greedy` takes the best of all experts.
    assert read_config(hf_config("deepseek_v2", topk_method="greedy")).moe.num_groups == 1  # type: ignore[union-attr]


# As the hub has them; key set and values as copied by TensorRT-LLM's test_modeling_qwen_moe.py and by
# llm-engine's test_llm_use_cases.py.
_DEEPSEEK_V2 = {
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001, "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "bos_token_id": 100000, "eos_token_id": 100001, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "model_type": "deepseek_v2", "moe_intermediate_size": 1408,
    "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False,
    "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
    "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1", "use_cache": True, "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip

_QWEN_MOE = {
    "attention_dropout": 0.0, "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151643,
    "hidden_act": "silu", "initializer_range": 0.02, "num_experts_per_tok": 8, "num_key_value_heads": 4,
    "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip

HUB: dict[str, tuple[dict[str, Any], float]] = {
    "Qwen/Qwen3-30B-A3B": (_QWEN_MOE | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False,
        "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
        "num_attention_heads": 32, "num_experts": 128, "num_hidden_layers": 48, "rope_scaling": None,
        "sliding_window": None,
    }, 30.5e9),
    "Qwen/Qwen2-57B-A14B": (_QWEN_MOE | {
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "hidden_size": 3584,
        "intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28,
        "moe_intermediate_size": 2560, "norm_topk_prob": False, "num_attention_heads": 28, "num_experts": 64,
        "num_hidden_layers": 28, "shared_expert_intermediate_size": 20480, "sliding_window": 131072,
    }, 57.4e9),
    "deepseek-ai/DeepSeek-V2-Lite": (_DEEPSEEK_V2, 15.7e9),
    "deepseek-ai/DeepSeek-Coder-V2-Instruct": (_DEEPSEEK_V2 | {
        "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_group": 8,
        "n_routed_experts": 160, "num_attention_heads": 128, "num_hidden_layers": 60, "num_key_value_heads": 128,
        "q_lora_rank": 1536, "routed_scaling_factor": 16.0, "topk_group": 3, "topk_method": "group_limited_greedy",
    }, 235.7e9),
}  # fmt: skip


@pytest.mark.parametrize("hub_id", HUB)
def test_the_hubs_own_configs_are_accepted(hub_id: str) -> None:
    """And imply the number of parameters that the model cards state."""
    hf, parameters = HUB[hub_id]
    config = read_config(hf)
    found = 0
    for shape in expected_shapes(config).values():
        found += shape[0] * (shape[1] if len(shape) > 1 else 1)
    assert found == pytest.approx(parameters, rel=0.003)
    if config.moe and hub_id != "Qwen/Qwen2-57B-A14B":
        assert config.moe.shared_intermediate_size in (0, 2 * config.moe.intermediate_size)


QWEN_MOE_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"use_sliding_window": True}, "use_sliding_window is not implemented for Qwen's mixtures"),
    ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0, but must be a positive whole number"),
    ({"decoder_sparse_step": True}, "decoder_sparse_step is True"),
    ({"decoder_sparse_step": "1"}, "decoder_sparse_step is '1'"),
    ({"decoder_sparse_step": None}, "decoder_sparse_step is None"),
    ({"mlp_only_layers": 1}, "mlp_only_layers is 1, but must be a list of layers"),
    ({"mlp_only_layers": ["1"]}, r"mlp_only_layers is \['1'\]"),
    ({"mlp_only_layers": {"1": 1}}, "mlp_only_layers is {'1': 1}"),
    ({"num_experts": None}, "num_experts is None, but must be a positive number"),
    ({"num_experts": 2.5}, "num_experts is 2.5, but must be a whole number"),
    ({"moe_intermediate_size": "64"}, "moe_intermediate_size is '64'"),
    ({"num_experts_per_tok": True}, "num_experts_per_tok is True"),
    ({"num_experts_per_tok": 99}, "num_experts_per_tok 99 is more than the number of experts"),
    ({"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes', but must be true or false"),
    ({"n_group": 4}, "n_group = 4 is not known"),
]

DEEPSEEK_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"moe_layer_freq": 2}, r"moe_layer_freq = 2 is not implemented \(1 is\)"),
    ({"scoring_func": "sigmoid"}, r"scoring_func = 'sigmoid' is not implemented \('softmax' is\)"),
    ({"attention_bias": True}, "attention_bias = True is not implemented"),
    ({"mlp_bias": True}, "mlp_bias = True is not implemented"),
    ({"norm_topk_prob": True}, "norm_topk_prob = True is not implemented"),
    ({"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not implemented"),
    ({"n_group": None}, "n_group is None, but must be a positive whole number"),
    ({"n_group": "4"}, "n_group is '4'"),
    ({"topk_group": 0}, "topk_group is 0"),
    ({"q_lora_rank": 0}, "q_lora_rank is 0, but must be a positive whole number"),
    ({"q_lora_rank": 1.5}, "q_lora_rank is 1.5"),
    ({"first_k_dense_replace": -1}, "first_k_dense_replace is -1, but must be a whole number"),
    ({"first_k_dense_replace": "1"}, "first_k_dense_replace is '1'"),
    ({"n_shared_experts": 1.5}, "n_shared_experts is 1.5"),
    ({"routed_scaling_factor": 0}, "routed_scaling_factor is 0, but must be a positive number"),
    ({"routed_scaling_factor": "16"}, "routed_scaling_factor is '16'"),
    ({"routed_scaling_factor": True}, "routed_scaling_factor is True"),
    ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor is nan"),
    ({"routed_scaling_factor": float("inf")}, "routed_scaling_factor is inf"),
    ({"num_key_value_heads": 2}, "num_key_value_heads 2 differs from num_attention_heads 8"),
    ({"kv_lora_rank": None}, "kv_lora_rank is None, but must be a positive number"),
    ({"qk_nope_head_dim": 1.5}, "qk_nope_head_dim is 1.5, but must be a whole number"),
    ({"v_head_dim": []}, r"v_head_dim is \[\]"),
    ({"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7, but must be even"),
    ({"first_k_dense_replace": 4}, r"layers \[3\] are said to be dense, but the model has 3"),
    ({"n_group": 3}, "8 experts in 3 groups, of which 2 are taken"),
    ({"topk_group": 5}, "8 experts in 4 groups, of which 5 are taken"),
    ({"topk_group": 1}, "num_experts_per_tok 3 is more than 1 groups of experts hold"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is more than the number of experts, 8"),
]


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [(family, *case) for family in ("qwen2_moe", "qwen3_moe") for case in QWEN_MOE_REFUSALS]
    + [("deepseek_v2", *case) for case in DEEPSEEK_REFUSALS]
    + [("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size is 0")]
    + [("qwen2_moe", {"qkv_bias": "no"}, "qkv_bias is 'no', but must be true or false")]
    + [("qwen3_moe", {"attention_bias": 1}, "attention_bias is 1, but must be true or false")],
)
def test_refusals_of_the_mixtures(family: str, changes: dict[str, Any], message: str) -> None:
    found = refusal(hf_config(family, **changes))
    assert re.search(message, found), found


def test_what_transformers_5_calls_num_local_experts() -> None:
    hf = hf_config("qwen3_moe")
    renamed = {("num_local_experts" if key == "num_experts" else key): value for key, value in hf.items()}
    assert read_config(renamed) == read_config(hf)
    assert "num_local_experts = 8 is not known" in refusal(hf | {"num_local_experts": 8})
    assert "sliding_window is 0" in refusal(hf_config("mistral", sliding_window=0))
