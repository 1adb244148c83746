"""config.json becomes a ModelConfig, or one refusal that lists everything in it that we do not implement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import ARCHITECTURES, hf_config, hf_shapes, refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from trtbuild.checkpoints.families import FAMILIES, family_of
from trtbuild.checkpoints.hf_config import read_config
from trtbuild.checkpoints.model_config import ModelConfig, MoeConfig, RopeConfig
from trtbuild.checkpoints.source_tensors import expected_shapes
from trtbuild.errors import Refused

FAMILY_NAMES = list(ARCHITECTURES)
# These take their window from `sliding_window` alone; the other Qwens have no window at all, nor has DeepSeek.
WINDOWED = ("mistral", "mixtral")
WINDOW_FROM_LAYER = ("qwen2", "qwen3")


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_key_map_and_shapes_are_transformers(family: str, changes: dict[str, Any]) -> None:
    if "attention_bias" in changes and family != "llama":
        changes = {"num_key_value_heads": 8} | ({"attention_bias": True} if family.startswith("qwen3") else {})
    hf = hf_config(family, **changes)
    config = read_config(hf)
    table = family_of(config.architecture)
    assert {table.source_name(name): shape for name, shape in expected_shapes(config).items()} == hf_shapes(hf)


def test_every_field_is_read() -> None:
    hf = hf_config(
        "mixtral",
        rope_theta=1e6,
        sliding_window=77,
        num_local_experts=6,
        num_experts_per_tok=3,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )
    assert read_config(hf) == ModelConfig(
        architecture="MixtralForCausalLM",
        family="mixtral",
        dtype="bf16",
        vocab_size=131,
        hidden_size=64,
        num_layers=3,
        num_heads=8,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=128,
        norm_epsilon=1e-6,
        max_position_embeddings=128,
        rope=RopeConfig(theta=1e6),
        moe=MoeConfig(6, 3, 128, norm_topk_prob=True),
        sliding_window=77,
        tie_embeddings=True,
    )


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_model_config_survives_json(family: str) -> None:
    scaling = {"rope_type": "yarn", "factor": 2.0, "mscale": 0.5, "mscale_all_dim": 1.0, "truncate": False}
    config = read_config(hf_config(family, rope_scaling=scaling))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(TypeError, match=r"unknown ModelConfig fields.*'surprise'"):
        ModelConfig.from_dict(config.to_dict() | {"surprise": 1})


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("rope", [None, {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}])
def test_what_transformers_5_saves_reads_the_same(family: str, rope: dict[str, Any] | None, tmp_path: Path) -> None:
    """Our small config, through transformers' own class and back: `rope_parameters`, `dtype`, `layer_types`, …"""
    from transformers import AutoConfig

    changes: dict[str, Any] = {"rope_scaling": rope} if rope else {}
    if family in WINDOW_FROM_LAYER:
        changes |= {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    elif family in WINDOWED:
        changes |= {"sliding_window": 9}
    hf = hf_config(family, **changes)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    AutoConfig.from_pretrained(str(tmp_path)).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "rope_parameters" in saved
    assert read_config(saved) == read_config(hf)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_keys_that_are_left_out_mean_what_transformers_takes_for_them(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    optional = (
        "head_dim",
        "rope_theta",
        "tie_word_embeddings",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "attention_bias",
        "mlp_bias",
        "hidden_act",
    )
    hf = {key: value for key, value in hf_config(family, rope_scaling=None).items() if key not in optional}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    theirs, ours = AutoConfig.from_pretrained(str(tmp_path)), read_config(hf)
    assert ours.rope == RopeConfig(theta=theirs.rope_parameters["rope_theta"])
    # With MLA transformers' head_dim is that of RoPE alone.
    assert ours.head_dim == (16 + 8 if ours.mla else getattr(theirs, "head_dim", None) or 8)
    assert ours.sliding_window == (getattr(theirs, "sliding_window", None) or None)
    has_bias = family.startswith("qwen2")
    assert (ours.tie_embeddings, ours.qkv_bias, ours.mlp_bias) == (theirs.tie_word_embeddings, has_bias, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not implemented"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not implemented"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quant_method .bitsandbytes., which is not read"),
        ({"attention_multiplier": 2.0}, "attention_multiplier = 2.0 is not known"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers = 1 is not known"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, but must be a positive number"),
        ({"vocab_size": "131"}, "vocab_size is '131'"),
        ({"hidden_size": 64.5}, "hidden_size is 64.5, but must be a whole number"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads is '2'"),
        ({"num_key_value_heads": 3}, "8 attention heads are not a multiple of 3 key/value heads"),
        ({"num_key_value_heads": -2}, "num_key_value_heads is -2"),
        ({"head_dim": 2.5}, "head_dim is 2.5"),
        ({"head_dim": 15}, "head_dim is 15, but must be even"),
        ({"sliding_window": "9"}, "sliding_window is '9'"),
        ({"rope_theta": "1e4"}, "'rope_theta' is '1e4'"),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
            "RoPE type 'longrope' is not implemented .default, linear, dynamic",
        ),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "RoPE type 'mrope' is not implemented"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "twist": 1}},
            "RoPE option 'twist' = 1 is not implemented",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "RoPE type 'linear' needs 'factor', found None"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "'factor' is 0, but must be a positive number"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "'factor' is '2'"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": 1}},
            "'truncate' is 1, but must be true or false",
        ),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', but must be true or false"),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention', but must be a list"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' needs 'original_max_position_embeddings'"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ({"rope_scaling": {"rope_type": {"a": 1}, "factor": 2.0}}, "RoPE type {'a': 1} is not implemented"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "RoPE option 'full_attention'"),
        (
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            r"layer_types\[1\] is 'sliding_attention'",
        ),
        (
            {"layer_types": ["full_attention", "linear_attention", "full_attention"]},
            r"layer_types\[1\] is 'linear_attention'",
        ),
    ],
)
def test_an_option_that_is_not_implemented_is_named(changes: dict[str, Any], message: str) -> None:
    import re

    for family in ("mistral", "qwen2"):
        found = refusal(hf_config(family, **changes))
        assert re.search(message, found), found


def test_all_problems_are_listed_at_once() -> None:
    found = refusal(
        hf_config("llama", hidden_act="relu", vocab_size=-1, rope_scaling={"type": "su"}, strange=3, mlp_bias=True)
    )
    assert found.startswith("config.json (LlamaForCausalLM):")
    for part in ("hidden_act 'relu'", "vocab_size is -1", "RoPE type 'su'", "strange = 3"):
        assert part in found
    assert found.count("\n  - ") == 4


def test_experts_must_be_enough_for_top_k() -> None:
    assert "num_experts_per_tok 5 is more than the number of experts, 4" in refusal(
        hf_config("mixtral", num_experts_per_tok=5)
    )
    assert "num_local_experts is None" in refusal(
        {k: v for k, v in hf_config("mixtral").items() if k != "num_local_experts"}
    )


@pytest.mark.parametrize(
    "architectures", [["GPT2LMHeadModel"], [], None, 7, [["LlamaForCausalLM"]], ["DeepseekV3ForCausalLM"]]
)
def test_an_unknown_architecture_lists_the_known(architectures: Any) -> None:
    found = refusal(hf_config("llama") | {"architectures": architectures})
    assert "is not supported; supported: " + ", ".join(FAMILIES) in found


def test_another_familys_option_is_not_ignored() -> None:
    assert "mlp_bias = True is not known" in refusal(hf_config("mistral", mlp_bias=True))
    assert "num_local_experts = 4 is not known" in refusal(hf_config("llama", num_local_experts=4))
    # Switched off, an option that nobody knows changes nothing.
    assert read_config(hf_config("mistral", mlp_bias=False, strange=None, other={})) == read_config(
        hf_config("mistral")
    )


@pytest.mark.parametrize(
    ("hf", "windows"),
    [
        (hf_config("llama"), [None, None, None]),
        (hf_config("mistral", sliding_window=9), [9, 9, 9]),
        (hf_config("mistral", sliding_window=None), [None, None, None]),
        (hf_config("qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=2), [None, None, 9]),
        (hf_config("qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=28), [None, None, None]),
        (hf_config("qwen2", use_sliding_window=False, sliding_window=9, max_window_layers=0), [None, None, None]),
        (
            hf_config(
                "qwen2",
                use_sliding_window=True,
                sliding_window=9,
                max_window_layers=1,
                layer_types=["full_attention", "sliding_attention", "sliding_attention"],
            ),
            [None, 9, 9],
        ),
    ],
)
def test_which_layers_have_the_window(hf: dict[str, Any], windows: list[int | None]) -> None:
    config = read_config(hf)
    assert [config.window(layer) for layer in range(3)] == windows


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("torch_dtype", "bfloat16", "bf16"),
        ("torch_dtype", "float16", "fp16"),
        ("torch_dtype", "float32", "fp16"),
        ("torch_dtype", None, "bf16"),
        ("dtype", "float16", "fp16"),
    ],
)
def test_the_16_bit_type(key: str, value: str | None, expected: str) -> None:
    hf = {k: v for k, v in hf_config("llama").items() if k != "torch_dtype"}
    assert read_config(hf | {key: value}).dtype == expected


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 300), st.floats(allow_nan=False), st.text(max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2),
        st.dictionaries(st.sampled_from(["rope_type", "type", "factor"]), inner, max_size=2),
    ),
    max_leaves=4,
)


@settings(max_examples=500)
@given(st.sampled_from(FAMILY_NAMES), st.data())
def test_any_value_of_any_key_is_read_or_refused(family: str, data: st.DataObject) -> None:
    hf = hf_config(family) | {"rope_scaling": None, "rope_parameters": None, "layer_types": None}
    key = data.draw(st.sampled_from(sorted(hf)))
    try:
        config = read_config(hf | {key: data.draw(JSON)})
    except Refused:
        return
    shapes = expected_shapes(config)
    assert all(isinstance(n, int) and n > 0 for shape in shapes.values() for n in shape)


HUGE: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; at most 1024 layers are read"),
    ("llama", {"hidden_size": 10**30}, "hidden_size is larger than 2147483647"),
    ("llama", {"rms_norm_eps": float("inf")}, "rms_norm_eps is inf, but must be a positive number"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ("llama", {"rope_theta": 10**400}, "'rope_theta' is 1000.*, but must be a positive number"),
    ("mixtral", {"num_local_experts": 10**12}, "num_local_experts is larger than 2147483647"),
    ("mixtral", {"num_local_experts": 10**6}, "num_local_experts 1000000 x num_hidden_layers 3 is more than 131072"),
    ("qwen3_moe", {"num_experts": 10**6}, "num_experts 1000000 x num_hidden_layers 3"),
    ("qwen3_moe", {"num_attention_heads": 10**8, "num_key_value_heads": 10**8}, "num_attention_heads 100000000 x"),
    ("deepseek_v2", {"n_routed_experts": 10**9}, "n_routed_experts 1000000000 x"),
    ("deepseek_v2", {"first_k_dense_replace": 10**9}, "first_k_dense_replace is 1000000000; at most 1024"),
    ("deepseek_v2", {"n_shared_experts": 10**12}, "n_shared_experts is larger than"),
    ("deepseek_v2", {"routed_scaling_factor": 10**400}, "routed_scaling_factor is 1000"),
]


@pytest.mark.parametrize(("family", "changes", "message"), HUGE)
def test_numbers_beyond_any_model_are_refused_at_once(family: str, changes: dict[str, Any], message: str) -> None:
    import re
    import time

    started = time.process_time()
    found = refusal(hf_config(family, **changes))
    assert re.search(message, found), found
    assert time.process_time() - started < 0.5
