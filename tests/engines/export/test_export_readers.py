"""Exports: read by the tools that others use, and read back by our own reader to the bit."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting import CASES, WIDE, Case, all_tensors, converted, keep
from helpers import executor_of, prefill, sha256, some_tokens
from hub_packing import tool_made, unpack_words
from reassembly import Weights, read_ranks, reassemble

from trtbuild.checkpoints.convert import Calibration, convert
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import LinearForm, Precision
from trtbuild.checkpoints.rank_checkpoint import RankCheckpoint
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.engines.calibration import layer_quantizer, layers
from trtbuild.engines.calibration.prepare import prepare_once
from trtbuild.engines.calibration.smoothing import share_between_heads
from trtbuild.engines.calibration.text import CalibrationText
from trtbuild.engines.export.export import Companions, export_checkpoint
from trtbuild.errors import Refused

READINGS: dict[str, Any] = json.loads((Path(__file__).parent / "tool_readings.json").read_text())
TOKENS = [5, 17, 3, 99, 42, 64, 8, 23, 77, 101]


@cache
def _made(name: str, folder: Path) -> tuple[RankCheckpoint, Path]:
    checkpoint, source = converted(folder / name, CASES[name])
    export_checkpoint(checkpoint, Companions((source,)), folder / name / "export", CASES[name].scheme)
    return checkpoint, folder / name / "export"


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture
def made(name: str, folder: Path) -> tuple[RankCheckpoint, Path]:
    return _made(name, folder)


def test_the_tools_have_read_these_very_files(name: str, made: tuple[RankCheckpoint, Path]) -> None:
    """The readings in tool_readings.json are of the bytes that are written now."""
    file = (made[1] / "model.safetensors").read_bytes()
    assert hashlib.sha256(file).hexdigest() == READINGS[name]["file"]


@pytest.mark.parametrize("name", [name for name in CASES if "unpacked" in READINGS[name]])
def test_our_reader_sees_what_the_tool_unpacks(name: str, folder: Path) -> None:
    """Every matrix that compressed-tensors unpacked, dequantized by `hub_formats`: the same 16-bit numbers."""
    expected, source = READINGS[name]["unpacked"], CheckpointSource.open(str(_made(name, folder)[1]))
    found = {
        name.removesuffix(".weight"): sha256(source.tensor(canonical))[:16]
        for canonical, name in source._names.items()
        if source.stored(canonical) is not None
    }
    assert found == expected


@pytest.mark.parametrize("name", [name for name in CASES if "logits" in READINGS[name]])
def test_transformers_computes_what_our_executor_does(name: str, folder: Path) -> None:
    """Logits of AutoModelForCausalLM with the compressed-tensors package, in bfloat16, against our own in bfloat16."""
    checkpoint, directory = _made(name, folder)
    theirs = torch.tensor(READINGS[name]["logits"])
    source = CheckpointSource.open(str(directory.parent / "source"))
    executor = executor_of(
        source, checkpoint.layout, checkpoint.precision.weights, dtype=torch.bfloat16, read=checkpoint.tensor
    )
    ours = prefill(executor, TOKENS).float().flatten()[: len(theirs)]
    error = float((ours - theirs).norm() / theirs.norm())
    assert error < 0.06, error
    assert float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1]) > 0.998


def test_codes_and_scales_are_the_ranks_own(name: str, made: tuple[RankCheckpoint, Path]) -> None:
    """By the tests' own reassembly of the ranks and unpacking of the words, without the package."""
    checkpoint, directory = made
    hf = json.loads((directory / "config.json").read_text())
    ranks, tensors = read_ranks(checkpoint.directory, checkpoint.layout), all_tensors(directory)
    expected = reassemble([_signed(rank) for rank in ranks], hf, checkpoint.layout)
    expected.pop("lm_head.weight", None) if hf["tie_word_embeddings"] else None
    stems = {name.removesuffix(".weight") for name in expected}
    for weight, wanted in expected.items():
        found = _codes(tensors, weight.removesuffix(".weight"), hf)
        in_files = wanted.to(torch.bfloat16) if wanted.dtype == torch.float32 else wanted
        assert torch.equal(found.view(in_files.dtype), in_files), weight
    assert {name for name in tensors if name.endswith(".weight_packed")} <= {f"{stem}.weight_packed" for stem in stems}


def _signed(rank: Weights) -> Weights:
    """The rank's tensors with int4 as int8 [out, in], scales left out."""
    found: Weights = {}
    for name, tensor in rank.items():
        if name.endswith(("_factor", "per_channel_scale")):
            continue
        if tensor.dtype == torch.uint8:
            raw = tensor.numpy().astype(np.int32)
            values = np.stack([raw & 15, raw >> 4], -1).reshape(*raw.shape[:-1], -1)
            tensor = torch.from_numpy(np.where(values > 7, values - 16, values).astype(np.int8))  # noqa: PLW2901
        found[name] = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
    return found


def _codes(tensors: Weights, module: str, hf: dict[str, Any]) -> torch.Tensor:
    """A module's signed codes out of the exported files, or its 16-bit values."""
    if f"{module}.weight_packed" in tensors:
        words, (_, columns) = tensors[f"{module}.weight_packed"], tensors[f"{module}.weight_shape"].tolist()
        bits = 32 * words.shape[1] // columns
        return torch.from_numpy((unpack_words(words, bits) - (1 << (bits - 1))).astype(np.int8))
    tensor = tensors.get(f"{module}.weight", tensors.get(module))
    assert tensor is not None
    if tensor.dtype == torch.uint8:
        raw = tensor.numpy().astype(np.int32)
        values = np.stack([raw & 15, raw >> 4], 1).reshape(-1, raw.shape[1])
        return torch.from_numpy(np.where(values > 7, values - 16, values).astype(np.int8))
    return tensor


def test_an_export_converts_back_to_the_ranks_it_came_from(
    name: str, made: tuple[RankCheckpoint, Path], tmp_path: Path
) -> None:
    """Codes, scales, activation scales, norms and biases: every rank file is the same, byte for byte."""
    checkpoint, directory = made
    again = keep(directory, tmp_path / "again", checkpoint.layout)
    assert_same_ranks(checkpoint, again)


def assert_same_ranks(first: RankCheckpoint, second: RankCheckpoint) -> None:
    """The same files, but that the second's int4 groups may be smaller, with their scales repeated."""
    sizes = [{linear.group_size for linear in one.plans[0].linears} for one in (first, second)]
    if sizes[0] == sizes[1]:
        names = [f"rank{rank}.safetensors" for rank in range(first.layout.world_size)]
        assert all((first.directory / name).read_bytes() == (second.directory / name).read_bytes() for name in names)
        return
    ranks = zip(*(read_ranks(one.directory, one.layout) for one in (first, second)), strict=True)
    for ours, theirs in ranks:
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            repeats = theirs[name].shape[-1] // tensor.shape[-1]
            assert repeats == 1 or name.endswith(("weights_scaling_factor", ".zero"))
            assert torch.equal(tensor.repeat_interleave(repeats, -1), theirs[name]), name


def some_scales(_: Any, magnitude: torch.Tensor, *rest: Any) -> torch.Tensor:
    """A scale of its own for each channel, but for those of grouped heads."""
    scale, fold = torch.linspace(0.6, 1.7, len(magnitude)), rest[2] if len(rest) > 2 else None
    return share_between_heads(scale, fold) if fold else scale


@pytest.mark.parametrize("method", ["int4-awq", "int4-awq-asym"])
def test_awq_is_exported_with_its_folded_scales(method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, router and biases took up scales: the export has the ranks' ones, and so computes what they do."""
    monkeypatch.setattr(layers, "calibration_tokens", lambda *_: [some_tokens(64, seed=seed) for seed in range(4)])
    # Random weights may need no scales at all.
    monkeypatch.setattr(layer_quantizer, "search", some_scales)
    plain, directory = converted(tmp_path, Case("mixtral", "bf16", changes=WIDE))
    source = CheckpointSource.open(str(directory))
    prepared = prepare_once(source, CalibrationText("none", ""), method, tmp_path / "calibration")
    precision = Precision.resolve(method, "bf16")
    calibration = Calibration({}, dict, lambda: prepared)
    checkpoint = convert(source, tmp_path / "awq", Layout(), precision, calibration=calibration)
    done = export_checkpoint(checkpoint, Companions((directory,)), tmp_path / "export")
    assert any("of 3 routers are rounded from float32 to bf16" in note for note in done.notes), done.notes
    tensors, rank = all_tensors(tmp_path / "export"), read_ranks(checkpoint.directory, Layout())[0]
    norm = "model.layers.1.post_attention_layernorm.weight"
    assert torch.equal(tensors[norm], rank["transformer.layers.1.post_layernorm.weight"])
    assert not torch.equal(
        tensors[norm], read_ranks(plain.directory, Layout())[0]["transformer.layers.1.post_layernorm.weight"]
    )
    again = keep(tmp_path / "export", tmp_path / "again", Layout())
    routers = 0
    for name, tensor in read_ranks(again.directory, Layout())[0].items():
        if name.endswith("router.weight"):
            routers += 1
            assert torch.equal(tensor, rank[name].to(torch.bfloat16).float())
        else:
            assert torch.equal(tensor, rank[name]), name
    assert routers == 3


@pytest.mark.parametrize(
    "name",
    ["w4a16-mixtral", "w4a16-llama", "w4a16-asym-qwen2", "w8a16-llama", "fp8-dynamic-llama", "fp8-mixtral"],
)
def test_what_llm_compressor_made_comes_out_as_it_was(name: str, tmp_path: Path) -> None:
    """Through a rank checkpoint of two ranks: its codes and words to the bit, its scales as float32 or as they were."""
    directory, _, theirs, _ = tool_made(name)
    checkpoint = keep(directory, tmp_path / "build", Layout.resolve(2))
    done = export_checkpoint(checkpoint, Companions((directory,)), tmp_path / "export")
    assert done.scheme == "compressed-tensors"
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"} if "mixtral" in name else {}
    found, compared = all_tensors(tmp_path / "export"), 0
    for tensor_name, tensor in theirs.items():
        own = tensor_name
        for tool, hub in names.items():
            own = own.replace(tool, hub) if ".experts." in own else own
        if own.endswith((".weight", ".weight_packed", ".weight_shape")):
            assert torch.equal(found[own].view(torch.uint8), tensor.view(torch.uint8)), own
        elif "fp8-mixtral" not in name or own.endswith(".weight_scale"):
            assert _same_groups(found[own], tensor), own
        compared += 1
    assert compared == len(found)
    assert_same_ranks(checkpoint, keep(tmp_path / "export", tmp_path / "again", Layout.resolve(2)))


def _same_groups(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """int4's groups may be smaller than the tool's, and repeat its scales (and words of zero points)."""
    repeats = ours.shape[1] // theirs.shape[1] if ours.dim() == theirs.dim() > 1 else 1
    wide = theirs.repeat_interleave(repeats, 1) if repeats > 1 else theirs
    return torch.equal(
        ours.double().flatten(), wide.double().flatten().expand(ours.numel() // wide.numel(), -1).flatten()
    )


def test_smaller_groups_repeat_the_scales_of_larger_ones(folder: Path) -> None:
    """Four ranks have groups of 32 in o_proj, 64 elsewhere; engines want one size."""
    checkpoint, directory = _made("qwen3-int4-groups", folder)
    assert {linear.group_size for linear in checkpoint.plans[0].linears} == {32, 64}
    groups = json.loads((directory / "config.json").read_text())["quantization_config"]["config_groups"]
    assert [group["weights"]["group_size"] for group in groups.values()] == [32]
    scales = all_tensors(directory)["model.layers.0.mlp.gate_proj.weight_scale"]
    assert torch.equal(scales[:, 0::2], scales[:, 1::2])


def test_a_mixture_names_the_modules_of_each_form(tmp_path: Path) -> None:
    """int4 experts, int8 attention: read back in the same forms, layer by layer."""
    case = Case("mixtral", "int4", changes=WIDE)
    _, source_directory = converted(tmp_path, case)
    source = CheckpointSource.open(str(source_directory))
    forms = {
        f"transformer.layers.{layer}.attention.{part}": form
        for layer, form in ((0, LinearForm("int8")), (1, LinearForm("bf16")))
        for part in ("qkv", "dense")
    }
    precision = Precision("int4", "bf16").with_modules(forms)
    checkpoint = convert(source, tmp_path / "mixed", Layout.resolve(2), precision)
    done = export_checkpoint(checkpoint, Companions((source.directory,)), tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    assert [group["weights"]["num_bits"] for group in config["config_groups"].values()] == [8, 4]
    assert "model.layers.1.self_attn.q_proj" in config["ignore"]
    again = keep(done.directory, tmp_path / "again", Layout.resolve(2))
    assert_same_ranks(checkpoint, again)
    with pytest.raises(Refused, match=r"different precisions, int8 .*compressed-tensors"):
        export_checkpoint(checkpoint, Companions((source.directory,)), tmp_path / "other", "modelopt")


@pytest.mark.parametrize(
    ("scheme", "precision", "loads_in"),
    [
        ("compressed-tensors", "fp8", "vLLM SGLang transformers"),
        ("compressed-tensors", "fp8-dynamic", "TensorRT-LLM >= 1.3 vLLM SGLang transformers"),
        ("modelopt", "fp8", "TensorRT-LLM >= 1.3 vLLM SGLang"),
        ("modelopt", "int4", "TensorRT-LLM >= 1.3"),
    ],
)
def test_says_who_loads_it(scheme: Any, precision: Any, loads_in: str, tmp_path: Path) -> None:
    checkpoint, source = converted(tmp_path, Case("llama", precision, changes=WIDE))
    done = export_checkpoint(checkpoint, Companions((source,)), tmp_path / "export", scheme)
    assert " ".join(done.loads_in) == loads_in


def test_tensorrt_llm_has_no_deepseek_v2(folder: Path) -> None:
    checkpoint, directory = _made("deepseek-int8", folder)
    again = export_checkpoint(
        checkpoint, Companions((directory.parent / "source",)), directory.parent / "o", "modelopt"
    )
    assert again.loads_in == ()


def test_modelopt_exports_read_as_their_own_tensors_say(folder: Path) -> None:
    """A pre_quant_scale of ones where TensorRT-LLM's reader demands one, and nowhere else."""
    _, directory = _made("llama-modelopt-int4", folder)
    tensors = all_tensors(directory)
    scaled = {name for name in tensors if name.endswith(".pre_quant_scale")}
    layers = range(3)
    assert scaled == {
        f"model.layers.{layer}.{part}.pre_quant_scale"
        for layer in layers
        for part in ("self_attn.o_proj", "mlp.down_proj")
    }
    assert all(bool((tensors[name] == 1).all()) for name in scaled)
    assert tensors["model.layers.0.mlp.up_proj.weight"].shape == (64, 128)
