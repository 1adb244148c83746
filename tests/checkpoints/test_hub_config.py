"""`quantization_config`: what is refused, by its name; and which modules it says are quantized."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers import hf_config
from hub_packing import TOOL_MADE

from trtbuild.checkpoints.hf_config import read_config
from trtbuild.checkpoints.hub_formats.config import quantization_problems, read_quantization
from trtbuild.errors import Refused

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
TOKENS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}


def compressed(weights: Any, inputs: Any = None, layout: str = "pack-quantized", **changes: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, **changes.pop("group", {})}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}, **changes}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes', which is not read; read are awq"),
        ({"quant_method": ["gptq"]}, r"quant_method \['gptq'\], which is not read"),
        ({"bits": 4}, "quant_method None, which is not read"),
        ("gptq", "quantization_config is 'gptq', but must be an object"),
        ({**AWQ, "version": "gemv"}, "version 'gemv' packs the weights otherwise; gemm is read"),
        ({**AWQ, "bits": 8}, "bits is 8; 4 is read"),
        ({**AWQ, "group_size": 8}, "group_size 8 is not a multiple of 16, the smallest group"),
        ({**AWQ, "group_size": 0}, "group_size is 0, but must be a positive whole number, or -1"),
        ({**AWQ, "group_size": "128"}, "group_size is '128', but must be"),
        ({**AWQ, "twist": 1}, "twist = 1 is not known and might change the result"),
        ({**AWQ, "modules_to_not_convert": "gate"}, "modules_to_not_convert is 'gate', but must be a list"),
        ({**GPTQ, "bits": 3}, "bits is 3; 4 is read, and 8 in whole rows"),
        ({**GPTQ, "bits": 4.0}, "bits is 4.0; 4 is read"),
        ({**GPTQ, "bits": 8}, "8 bits in groups of 128 cannot be represented; with group_size -1"),
        ({**GPTQ, "bits": 8, "group_size": -1, "sym": False}, "8 bits with zero points .sym false. cannot"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin' packs the weights otherwise"),
        ({**GPTQ, "is_marlin_format": True}, "packs the weights otherwise"),
        ({**GPTQ, "pack_dtype": "int16"}, "pack_dtype is 'int16'; int32 is read"),
        ({**GPTQ, "sym": "yes"}, "sym is 'yes', but must be true or false"),
        ({**GPTQ, "dynamic": {"+:.*down": {"bits": 2}}}, "dynamic '.:..down': bits is 2; 4 is read"),
        ({**GPTQ, "dynamic": {"+:(": {}}}, "dynamic: '.:.' is not a pattern"),
        ({**GPTQ, "dynamic": ["a"]}, "dynamic is .'a'., but must map patterns to options"),
        ({**FP8, "activation_scheme": "none"}, "activation_scheme is 'none'; static and dynamic are read"),
        ({**FP8, "weight_block_size": [128, 128]}, "weight_block_size .128, 128.: blocks of scales cannot be"),
        ({**FP8, "ignored_layers": ["re:("]}, "ignored_layers: 're:.' is not a pattern"),
        ({**FP8, "kv_cache_scheme": "static"}, "kv_cache_scheme = 'static' is not known"),
        ({**FBGEMM, "activation_scale_ub": -1}, "activation_scale_ub is -1, but must be a positive number"),
        (compressed({**INT4, "num_bits": 3}), "group_0: weights of 3 bits .int.; int 4, int 8 and float 8 are read"),
        (compressed({**FLOAT8, "num_bits": 4}, layout="nvfp4-pack-quantized"), "weights of 4 bits .float."),
        (compressed(INT4, {"num_bits": 8, "type": "int"}), "activations of 8 bits with integer weights cannot"),
        (compressed({**INT4, "group_size": 24}), "group_size 24 is not a multiple of 16"),
        (compressed({**INT4, "num_bits": 8}), "8 bits with strategy 'group', symmetric True; 8 bits are read with"),
        (compressed(INT4, layout="marlin-24"), "format 'marlin-24'; integer weights are read in pack-quantized"),
        (compressed({**INT4, "strategy": "tensor"}), "strategy 'tensor'; group and channel are read"),
        (compressed(FLOAT8, layout="float-quantized"), "fp8 weights with 16-bit activations cannot be represented"),
        (compressed({**FLOAT8, "strategy": "block"}, TOKENS, "float-quantized"), "fp8 weights with strategy 'block'"),
        (compressed(FLOAT8, {**TOKENS, "strategy": "group"}, "float-quantized"), "strategy 'group', dynamic True;"),
        (compressed(INT4, kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme: scales for a quantized KV cache"),
        (compressed(INT4, sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config .*: sparse weights"),
        (compressed(INT4, transform_config={"r1": {}}), "transform_config: rotated weights"),
        (compressed(INT4, quantization_status="calibration"), "quantization_status is 'calibration': the weights"),
        (compressed(INT4, layout="fakequant", quantization_status="frozen"), "format 'fakequant'; integer weights are"),
        (compressed(INT4, group={"output_activations": TOKENS}), "output_activations: quantized outputs"),
        (compressed(INT4, config_groups=None), "config_groups is None, but must name at least one group"),
        (compressed(INT4, config_groups={"W4A16": ["Linear"]}), r"W4A16 is \['Linear'\], but must be an object"),
        (compressed({**INT4, "twist": 2}), "group_0: twist = 2 is not known"),
    ],
)  # fmt: skip
def test_what_cannot_be_represented_is_refused_by_name(options: Any, message: str) -> None:
    with pytest.raises(Refused, match=message):
        read_config(hf_config("llama", quantization_config=options))


@pytest.mark.parametrize(
    "options",
    [
        AWQ, GPTQ, FP8, FBGEMM, {**AWQ, "group_size": -1}, {**GPTQ, "bits": 8, "group_size": -1},
        {**GPTQ, "checkpoint_format": "gptq_v2", "sym": False}, {**FP8, "activation_scheme": "dynamic"},
        compressed(INT4), compressed({**INT4, "symmetric": False}), compressed(FLOAT8, TOKENS, "float-quantized"),
        compressed({**FLOAT8, "strategy": "tensor"}, {**TOKENS, "strategy": "tensor"}, "float-quantized"),
        compressed({**INT4, "group_size": None, "strategy": "channel"}, quantization_status="frozen"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_what_can_be_represented_is_read(options: dict[str, Any], key: str) -> None:
    hf = hf_config("llama", **{key: options})
    read_config(hf)
    found = read_quantization(hf)
    assert found is not None
    assert found.scheme_of("model.layers.0.mlp.up_proj").packing in ("awq", "gptq", "fp8", "packed")


def test_two_quantizations_are_one_too_many() -> None:
    with pytest.raises(Refused, match="quantization_config and compression_config are both given"):
        read_config(hf_config("llama", quantization_config=GPTQ, compression_config=compressed(INT4)))


@pytest.mark.parametrize("directory", sorted(d for d in TOOL_MADE.iterdir() if d.is_dir()), ids=lambda d: d.name)
def test_the_tools_own_configs_have_no_problem_and_name_their_modules(directory: Any) -> None:
    hf = json.loads((directory / "config.json").read_text())
    assert list(quantization_problems(hf)) == []
    quantization = read_quantization(hf)
    assert quantization is not None
    quantized = {name.removesuffix(".weight") for name in json.loads((directory / "expected.json").read_text())}
    layers = range(hf["num_hidden_layers"])
    for module in quantized:
        assert quantization.expects(module), module
    assert not quantization.expects("lm_head")
    others = [f"model.layers.{layer}.block_sparse_moe.gate" for layer in layers if "mixtral" in directory.name]
    others += ["model.layers.1.mlp.up_proj"] if directory.name == "w4a16-llama" else []
    for module in others:
        assert not quantization.expects(module), module


def test_gptqmodels_overrides_apply_to_the_modules_that_they_name() -> None:
    overrides = {"-:.*layers\\.0\\.": {}, "+:.*\\.down_proj": {"bits": 8, "group_size": -1}, ".*up": {"group_size": 32}}
    found = read_quantization(hf_config("llama", quantization_config={**GPTQ, "dynamic": overrides}))
    assert found is not None
    assert not found.expects("model.layers.0.mlp.down_proj")
    assert found.expects("model.layers.1.mlp.down_proj")
    down, up, gate = (found.scheme_of(f"model.layers.1.mlp.{part}_proj") for part in ("down", "up", "gate"))
    assert [(s.bits, s.group_size) for s in (down, up, gate)] == [(8, None), (4, 32), (4, 128)]


def test_names_come_before_patterns_and_those_before_classes() -> None:
    groups = {
        "all": {"targets": ["Linear"], "weights": INT4},
        "down": {"targets": ["re:.*down_proj"], "weights": {**INT4, "group_size": 32}},
        "one": {"targets": ["model.layers.3.mlp.down_proj"], "weights": {**INT4, "group_size": 64}},
    }
    found = read_quantization(hf_config("llama", quantization_config=compressed(INT4, config_groups=groups)))
    assert found is not None
    modules = ["model.layers.3.mlp.down_proj", "model.layers.2.mlp.down_proj", "model.layers.3.mlp.up_proj"]
    assert [found.scheme_of(module).group_size for module in modules] == [64, 32, 128]


def test_what_is_computed_otherwise_is_noted() -> None:
    found = read_quantization(hf_config("llama", quantization_config=FBGEMM))
    assert found is not None
    assert "activation_scale_ub 1200 is not applied" in found.notes[0]
    assert "activation_scale_ub 1200 not applied" in found.scheme_of("x").origin
    for activations, count in (("static", 0), ("dynamic", 1)):
        fp8 = read_quantization(hf_config("llama", quantization_config={**FP8, "activation_scheme": activations}))
        assert fp8 is not None
        assert len(fp8.notes) == count
