"""Converting quantized checkpoints: kept bit for bit where the form can be, and said to be encoded again elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_checkpoint
from hub_packing import (
    GPTQ,
    TOOL_MADE,
    Codes,
    pack_compressed,
    pack_gptq,
    quantize_checkpoint,
    random_codes,
    read_codes,
    tool_made,
)
from reassembly import Weights, read_ranks, reassemble
from safetensors.torch import save_file

from trtbuild.checkpoints.convert import Calibration, convert
from trtbuild.checkpoints.kept_precision import activation_ranges, kept_precision
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import LinearForm, Precision
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.errors import Refused

INT_TOOLS = ["awq-mixtral", "gptqmodel-v1-llama", "gptqmodel-v2-llama", "w4a16-asym-qwen2", "w4a16-llama"]
NO_GROUPS = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "all": {"weights": {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": False}},
    },
}


def kept(
    source: CheckpointSource, directory: Path, layout: Layout, precision: Precision | None = None
) -> tuple[list[Weights], dict[str, Any]]:
    """Rank tensors and the manifest's entries of a conversion that keeps what it can."""
    precision = precision or kept_precision(source, source.config.dtype)
    plans = [plan_rank(source.config, rank, precision) for rank in layout.ranks()]
    calibration = Calibration({"from": "checkpoint"}, lambda: activation_ranges(source, plans))
    convert(source, directory, layout, precision, calibration=calibration)
    return read_ranks(directory, layout), json.loads((directory / "trtbuild.json").read_text())["tensors"]


def unpacked(weight: torch.Tensor) -> torch.Tensor:
    """Signed nibbles, by the test's own arithmetic."""
    raw = weight.numpy().astype(np.int32)
    values = np.stack([raw & 15, raw >> 4], -1).reshape(*raw.shape[:-1], -1)
    return torch.from_numpy(np.where(values > 7, values - 16, values))


def joined(ranks: list[Weights], hf: dict[str, Any], layout: Layout, role: str) -> Weights:
    """The parts in one role (values, scales, zeros) of every linear layer, put together as a checkpoint's weights."""
    views = []
    for rank in ranks:
        view = {name: tensor for name, tensor in rank.items() if not name.endswith((".weight", ".zero", "_factor"))}
        for name in rank:
            stem = name.removesuffix(".weight")
            if name.endswith(".weight"):
                other = rank.get(name if role == "weight" else f"{stem}.{role}", rank[name])
                view[name] = unpacked(other) if other.dtype == torch.uint8 else other
        views.append(view)
    return reassemble(views, hf, layout)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", INT_TOOLS)
def test_four_bits_are_kept_to_the_bit(name: str, tp: int, tmp_path: Path) -> None:
    directory, options, tensors, expected = tool_made(name)
    hf = json.loads((directory / "config.json").read_text())
    source, layout = CheckpointSource.open(str(directory)), Layout.resolve(tp)
    ranks, manifest = kept(source, tmp_path / "build", layout)
    values = joined(ranks, hf, layout, "weight")
    scales = joined(ranks, hf, layout, "weights_scaling_factor")
    shifts = joined(ranks, hf, layout, "zero") if any(".zero" in key for key in ranks[0]) else {}
    for weight in expected:
        module = weight.removesuffix(".weight")
        codes, zeros = read_codes(tensors, module, options)
        own = tensors.get(f"{module}.weight_scale")
        own = tensors[f"{module}.scales"].t() if own is None else own
        assert np.array_equal(values[weight].numpy(), codes), weight
        assert torch.equal(scales[weight], own), weight
        if shifts:
            exact = -own.float() * torch.from_numpy(zeros).float()
            assert torch.equal(shifts[weight], exact.to(own.dtype)), weight
    origins = {key: entry.get("origin") for key, entry in manifest.items()}
    assert {bool(origin) for key, origin in origins.items() if "attention" in key and "rank" not in key} == {True}
    assert all(origin is None or origin.startswith("kept from ") for origin in origins.values())
    assert all("relative_error" not in entry for entry in manifest.values() if entry.get("origin"))


def test_act_order_is_kept_on_one_rank_and_refused_on_two(tmp_path: Path) -> None:
    directory, options, tensors, _ = tool_made("gptq-actorder-llama")
    source = CheckpointSource.open(str(directory))
    (rank,), _ = kept(source, tmp_path / "build", Layout())
    for name, modules in (("attention.dense", ["self_attn.o_proj"]), ("mlp.proj", ["mlp.down_proj"]),
                          ("attention.qkv", [f"self_attn.{part}_proj" for part in "qkv"])):  # fmt: skip
        order = rank[f"transformer.layers.0.{name}.input_order"].long()
        own = torch.cat([torch.from_numpy(read_codes(tensors, f"model.layers.0.{m}", options)[0]) for m in modules])
        assert torch.equal(unpacked(rank[f"transformer.layers.0.{name}.weight"]), own[:, order].int())
        groups = tensors[f"model.layers.0.{modules[0]}.g_idx"][order]
        assert groups.tolist() == sorted(groups.tolist())
    with pytest.raises(Refused, match=r"act-order.*--tp 1"):
        kept(source, tmp_path / "two", Layout.resolve(2))


@pytest.mark.parametrize("name", ["w8a16-llama", "gptq-8bit-llama"])
@pytest.mark.parametrize("tp", [1, 2])
def test_eight_bits_are_kept(name: str, tp: int, tmp_path: Path) -> None:
    directory, options, tensors, expected = tool_made(name)
    hf = json.loads((directory / "config.json").read_text())
    source, layout = CheckpointSource.open(str(directory)), Layout.resolve(tp)
    ranks, manifest = kept(source, tmp_path / "build", layout)
    values = joined(ranks, hf, layout, "weight")
    for weight in expected:
        codes, _ = read_codes(tensors, weight.removesuffix(".weight"), options)
        assert np.array_equal(values[weight].numpy(), codes)
    entry = manifest["transformer.layers.0.attention.dense"]
    scales = source.stored_rows("layers.0.o", 0, 32).scales.float()
    assert torch.equal(ranks[tp - 1]["transformer.layers.0.attention.dense.per_channel_scale"], scales)
    assert entry["precision"] == "int8"
    assert entry["origin"].startswith("kept from ")


@pytest.mark.parametrize("tp", [1, 2])
def test_static_fp8_is_kept_with_each_parts_own_scale(tp: int, tmp_path: Path) -> None:
    directory, _, tensors, _ = tool_made("fp8-mixtral")
    hf = json.loads((directory / "config.json").read_text())
    source, layout = CheckpointSource.open(str(directory)), Layout.resolve(tp)
    ranks, manifest = kept(source, tmp_path / "build", layout)
    raw = [{name: t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for name, t in r.items()} for r in ranks]
    values = reassemble(raw, hf, layout)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            assert torch.equal(values[name], tensor.view(torch.uint8)), name
    attention, experts = "model.layers.0.self_attn.", "model.layers.0.block_sparse_moe.experts."
    for rank in ranks:
        # q, k and v have scales of their own, o has one.
        found = rank["transformer.layers.0.attention.qkv.weights_scaling_factor"]
        own = [float(tensors[f"{attention}{part}_proj.weight_scale"]) for part in "qkv"]
        assert found.tolist() == [own[0]] * (64 // tp) + [own[1]] * (32 // tp) + [own[2]] * (32 // tp)
        found = rank["transformer.layers.0.attention.dense.weights_scaling_factor"]
        assert found.tolist() == [float(tensors[f"{attention}o_proj.weight_scale"])]
        largest = max(float(tensors[f"{attention}{part}_proj.input_scale"]) for part in "qkv")
        assert rank["transformer.layers.0.attention.qkv.activation_scaling_factor"].tolist() == [largest]
        found = rank["transformer.layers.0.mlp.proj.weights_scaling_factor"]
        assert found.flatten().tolist() == [float(tensors[f"{experts}{e}.w2.weight_scale"]) for e in range(2)]
        largest = max(float(tensors[f"{experts}{e}.w2.input_scale"]) for e in range(2))
        assert rank["transformer.layers.0.mlp.proj.activation_scaling_factor"].tolist() == [largest]
    assert manifest["transformer.layers.0.mlp.fc"]["origin"] == "kept from compressed-tensors float-quantized"


def test_dynamic_fp8_is_kept(tmp_path: Path) -> None:
    directory, _, tensors, _ = tool_made("fp8-dynamic-llama")
    source = CheckpointSource.open(str(directory))
    (rank,), manifest = kept(source, tmp_path / "build", Layout())
    down = rank["transformer.layers.0.mlp.proj.weight"].view(torch.uint8)
    assert torch.equal(down, tensors["model.layers.0.mlp.down_proj.weight"].view(torch.uint8))
    scales = tensors["model.layers.0.mlp.down_proj.weight_scale"].flatten().float()
    assert torch.equal(rank["transformer.layers.0.mlp.proj.per_channel_scale"], scales)
    assert manifest["transformer.layers.0.mlp.proj"]["origin"].startswith("kept from ")


def renamed(directory: Path, name: str, options: dict[str, Any], change: Callable[[Weights], None]) -> CheckpointSource:
    """A tool's fp8 checkpoint under another tool's config: the tensors have the same names and meaning."""
    made, _, tensors, _ = tool_made(name)
    config = json.loads((made / "config.json").read_text())
    change(tensors)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": options}))
    save_file(tensors, directory / "model.safetensors")
    return CheckpointSource.open(str(directory))


def test_fbgemm_is_kept_and_says_what_is_not_applied(tmp_path: Path) -> None:
    def with_bounds(tensors: Weights) -> None:
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            tensors[name] = tensors[name].float()
            tensors[name.replace("weight_scale", "input_scale_ub")] = torch.tensor([1200.0])

    options = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    source = renamed(tmp_path / "c", "fp8-dynamic-llama", options, with_bounds)
    theirs = CheckpointSource.open(str(TOOL_MADE / "fp8-dynamic-llama"))
    (rank,), manifest = kept(source, tmp_path / "build", Layout())
    (same,), _ = kept(theirs, tmp_path / "theirs", Layout())
    for name, tensor in same.items():
        assert torch.equal(rank[name].view(torch.uint8), tensor.view(torch.uint8)), name
    origin = manifest["transformer.layers.0.mlp.proj"]["origin"]
    assert origin == "kept from fbgemm_fp8 (activation_scale_ub 1200 not applied)"


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_autofp8_is_kept_with_one_scale_a_tensor(activations: str, tmp_path: Path) -> None:
    def without_inputs(tensors: Weights) -> None:
        for name in [name for name in tensors if name.endswith("input_scale") and activations == "dynamic"]:
            del tensors[name]

    options = {"quant_method": "fp8", "activation_scheme": activations, "ignored_layers": ["lm_head", "re:.*gate$"]}
    source = renamed(tmp_path / "c", "fp8-mixtral", options, without_inputs)
    (rank,), manifest = kept(source, tmp_path / "build", Layout())
    own = float(tool_made("fp8-mixtral")[2]["model.layers.0.self_attn.o_proj.weight_scale"])
    static = activations == "static"
    scales = rank[f"transformer.layers.0.attention.dense.{'weights_scaling_factor' if static else 'per_channel_scale'}"]
    assert scales.tolist() == [own] * (1 if static else 32)
    assert manifest["transformer.layers.0.attention.dense"]["precision"] == ("fp8" if static else "fp8-dynamic")
    assert manifest["transformer.layers.0.attention.dense"]["origin"] == "kept from AutoFP8"


@pytest.mark.parametrize("name", ["awq-mixtral", "gptq-actorder-llama", "fp8-dynamic-llama"])
@pytest.mark.parametrize("precision", ["int8", "int4", "own"])
def test_another_precision_encodes_again_and_says_so(name: str, precision: Any, tmp_path: Path) -> None:
    source = CheckpointSource.open(str(TOOL_MADE / name))
    wanted = Precision.resolve(source.config.dtype if precision == "own" else precision, source.config.dtype)
    (rank,), manifest = kept(source, tmp_path / "build", Layout(), wanted)
    stored = source.stored("layers.0.o")
    assert stored is not None
    entry = manifest["transformer.layers.0.attention.dense"]
    exact = source.tensor("layers.0.o").float()
    weight = rank["transformer.layers.0.attention.dense.weight"]
    if precision == "own":
        assert torch.equal(weight.float(), exact)
    elif precision == "int8":
        found = weight.float() * rank["transformer.layers.0.attention.dense.per_channel_scale"][:, None]
        assert 0 < float((found - exact).norm() / exact.norm()) < 0.01
    if stored.form != LinearForm("int4"):
        # AutoAWQ's zero points and GPTQ's order are what plain int4 does not have.
        assert entry["origin"] == f"encoded again from {stored.form.format} of {stored.origin}"


def test_layers_that_the_tool_left_alone_stay_in_16_bit(tmp_path: Path) -> None:
    directory, _, tensors, _ = tool_made("w4a16-llama")
    source = CheckpointSource.open(str(directory))
    precision = kept_precision(source, "bf16")
    assert precision.form_of("transformer.layers.0.mlp.fc") == LinearForm("int4", 16)
    assert precision.form_of("transformer.layers.1.mlp.fc") == LinearForm("bf16")
    (rank,), manifest = kept(source, tmp_path / "build", Layout())
    own = tensors["model.layers.1.mlp.gate_proj.weight"]
    assert torch.equal(rank["transformer.layers.1.mlp.fc.weight"], own)
    assert "origin" not in manifest["transformer.layers.1.mlp.fc"]


def test_a_layer_that_is_quantized_in_part_is_held_in_16_bit(tmp_path: Path) -> None:
    made = quantize_checkpoint(
        tmp_path / "c", {**GPTQ, "desc_act": False}, pack_gptq, lambda shape, name: random_codes(shape, 16, len(name)),
        keep=lambda name: "k_proj" in name,
    )  # fmt: skip
    source = CheckpointSource.open(str(tmp_path / "c"))
    precision = kept_precision(source, "fp16")
    assert precision.form_of("transformer.layers.0.attention.qkv") == LinearForm("fp16")
    assert precision.form_of("transformer.layers.0.attention.dense") == LinearForm("int4", 16, zeros=True)
    (rank,), manifest = kept(source, tmp_path / "build", Layout())
    q = made["model.layers.0.self_attn.q_proj"].dequantized().half()
    assert torch.equal(rank["transformer.layers.0.attention.qkv.weight"][:128], q)
    assert manifest["transformer.layers.0.attention.qkv"]["origin"] == "encoded again from int4 of GPTQ"


@pytest.mark.parametrize("tp", [1, 2])
def test_whole_rows_become_groups_with_one_scale(tp: int, tmp_path: Path) -> None:
    def whole_row(shape: tuple[int, int], name: str) -> Codes:
        return random_codes(shape, shape[1], len(name), dtype=torch.bfloat16)

    made = quantize_checkpoint(tmp_path / "c", NO_GROUPS, pack_compressed, whole_row)
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    (tmp_path / "c" / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    ranks, _ = kept(CheckpointSource.open(str(tmp_path / "c")), tmp_path / "build", Layout.resolve(tp))
    own = made["model.layers.0.mlp.down_proj"]
    for index, rank in enumerate(ranks):
        width = 128 // tp
        values = unpacked(rank["transformer.layers.0.mlp.proj.weight"])
        assert np.array_equal(values.numpy() + 8, own.codes[:, index * width : (index + 1) * width])
        scales = rank["transformer.layers.0.mlp.proj.weights_scaling_factor"]
        assert scales.shape == (64, width // min(128, width))
        assert torch.equal(scales, own.scales.expand_as(scales))


def test_orders_that_one_layer_cannot_hold_are_refused(tmp_path: Path) -> None:
    def own_order(shape: tuple[int, int], name: str) -> Codes:
        return random_codes(shape, 16, len(name) + ord(name[-6]), order="q_proj" not in name)

    quantize_checkpoint(tmp_path / "llama", GPTQ, pack_gptq, own_order)
    with pytest.raises(Refused, match=r"layers\.0\.attention\.qkv: its parts' groups lie in orders of their own"):
        kept_precision(CheckpointSource.open(str(tmp_path / "llama")), "fp16")
    same = lambda shape, name: random_codes(shape, 16, shape[1], order="experts" in name)  # noqa: E731
    quantize_checkpoint(tmp_path / "mixtral", GPTQ, pack_gptq, same, "mixtral")
    with pytest.raises(Refused, match=r"layers\.0\.mlp\.fc: the experts' groups lie in orders .*--precision"):
        kept_precision(CheckpointSource.open(str(tmp_path / "mixtral")), "fp16")


@pytest.mark.parametrize("name", sorted(d.name for d in TOOL_MADE.iterdir() if d.is_dir()))
def test_the_config_alone_plans_what_the_weights_keep(name: str, tmp_path: Path) -> None:
    with_weights = CheckpointSource.open(str(TOOL_MADE / name))
    (tmp_path / "config.json").write_bytes((TOOL_MADE / name / "config.json").read_bytes())
    alone = CheckpointSource.open(str(tmp_path), weights=False)
    precision = kept_precision(with_weights, with_weights.config.dtype)
    assert precision.is_quantized
    assert kept_precision(alone, alone.config.dtype, weights=False) == precision
    assert Precision.from_dict(precision.to_dict()) == precision


def test_the_commonest_format_names_the_precision(tmp_path: Path) -> None:
    names = {name: kept_precision(CheckpointSource.open(str(TOOL_MADE / name)), "bf16").weights
             for name in ("awq-mixtral", "w8a16-llama", "fp8-mixtral", "fp8-dynamic-llama")}  # fmt: skip
    assert list(names.values()) == ["int4", "int8", "fp8", "fp8-dynamic"]
    plain = CheckpointSource.open(str(make_checkpoint(tmp_path, "llama")))
    assert kept_precision(plain, "bf16").weights == "bf16"
    assert not kept_precision(plain, "bf16").is_quantized
