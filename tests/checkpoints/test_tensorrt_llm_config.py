"""The `quantization` section of config.json, by TensorRT-LLM's names for what the layers hold."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import hf_config

from trtbuild.checkpoints.hf_config import read_config
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import LinearForm, Precision
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.tensorrt_llm_config import tensorrt_llm_config

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 16}


def quantization(precision: Precision, layout: Layout | None = None, **changes: Any) -> dict[str, Any]:
    config = read_config(hf_config("llama", **(WIDE | changes)))
    return tensorrt_llm_config(config, layout or Layout(), precision)["quantization"]


def with_forms(weights: Any, forms: dict[str, LinearForm]) -> Precision:
    config = read_config(hf_config("llama", **WIDE))
    names = [linear.global_name for linear in plan_rank(config, Layout().rank(0), Precision("bf16", "bf16")).linears]
    chosen = {name: next(form for key, form in forms.items() if key in name) for name in names}
    return Precision(weights, "bf16").with_modules(chosen)


@pytest.mark.parametrize(
    ("weights", "algorithm"),
    [
        ("bf16", None),
        ("fp8", "FP8"),
        ("fp8-dynamic", "FP8_PER_CHANNEL_PER_TOKEN"),
        ("int8", "W8A16"),
        ("int4", "W4A16"),
        ("int4-awq", "W4A16_AWQ"),
        ("int4-gptq", "W4A16_AWQ"),
    ],
)
def test_uniform(weights: Any, algorithm: str | None) -> None:
    found = quantization(Precision(weights, "bf16"))
    assert found["quant_algo"] == algorithm
    assert (found["group_size"], found["has_zero_point"], found["pre_quant_scale"]) == (128, False, False)
    assert (found["exclude_modules"] is None) == (weights == "bf16")


def test_the_form_of_a_checkpoint_that_was_quantized_before() -> None:
    found = quantization(with_forms("int4-gptq", {"": LinearForm("int4", 64, zeros=True)}))
    assert (found["quant_algo"], found["group_size"], found["has_zero_point"]) == ("W4A16_AWQ", 64, True)


def test_groups_that_a_ranks_slice_makes_smaller() -> None:
    """o_proj is 64 wide on a rank of four."""
    found = quantization(Precision("int4-awq", "bf16"), Layout.resolve(tp=4))
    assert found["quant_algo"] == "MIXED_PRECISION"
    groups = {name.split(".", 3)[3]: layer["group_size"] for name, layer in found["quantized_layers"].items()}
    assert groups == {"attention.qkv": 128, "attention.dense": 64, "mlp.fc": 128, "mlp.gate": 128, "mlp.proj": 128}


def test_mixed_over_pipeline_stages() -> None:
    forms = {"layers.2.": LinearForm("fp8"), "attention": LinearForm("bf16"), "": LinearForm("int4")}
    found = quantization(with_forms("auto", forms), Layout.resolve(1, 3))
    assert found["quant_algo"] == "MIXED_PRECISION"
    layers = {name.removeprefix("transformer.layers."): part for name, part in found["quantized_layers"].items()}
    assert {name: part["quant_algo"] for name, part in layers.items()} == {
        **{f"{layer}.mlp.{part}": "W4A16_AWQ" for layer in (0, 1) for part in ("fc", "gate", "proj")},
        **{f"2.mlp.{part}": "FP8" for part in ("fc", "gate", "proj")},
        "2.attention.qkv": "FP8",
        "2.attention.dense": "FP8",
    }
