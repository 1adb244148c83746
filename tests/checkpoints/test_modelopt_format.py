"""Reading ModelOpt's hub form: what its config says, and what cannot be represented."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import WIDE, Case, exported
from safetensors.torch import load_file, save_file

from trtbuild.checkpoints.hub_formats.config import quantization_problems, read_quantization
from trtbuild.checkpoints.kept_precision import kept_precision
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.errors import CheckpointError, Refused

FP8: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_algo": "NVFP4"}, ["'NVFP4'", "W4A16_AWQ"]),
        ({"quant_algo": None}, ["None", "FP8"]),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, ["kv_cache_scheme"]),
        ({"quant_algo": "W4A16_AWQ", "group_size": 24}, ["group_size 24", "16"]),
        ({"quant_algo": "W4A16_AWQ", "has_zero_point": True}, ["has_zero_point"]),
        ({"ignore": "lm_head"}, ["ignore", "list"]),
        ({"quantized_layers": {"x": {}}}, ["quantized_layers"]),
    ],
)
def test_what_cannot_be_represented_is_named(change: dict[str, Any], words: list[str]) -> None:
    [problem] = quantization_problems({"quantization_config": FP8 | change})
    assert all(word in problem for word in words), problem


def test_modules_are_ignored_by_shell_patterns() -> None:
    """As ModelOpt writes them, and by plain names."""
    options = FP8 | {"ignore": ["lm_head", "model.layers.1.*", "*shared_expert_gate"]}
    assert not list(quantization_problems({"quantization_config": options}))
    found = read_quantization({"quantization_config": options})
    assert found is not None
    assert found.expects("model.layers.10.self_attn.q_proj")
    for module in ("model.layers.1.self_attn.q_proj", "model.layers.3.mlp.shared_expert_gate", "lm_head"):
        assert not found.expects(module)


@pytest.mark.parametrize(
    ("precision", "algorithm", "form"),
    [("fp8", "FP8", "fp8"), ("fp8-dynamic", "FP8_PER_CHANNEL_PER_TOKEN", "fp8-dynamic"), ("int8", "W8A16", "int8")],
)
def test_is_kept_in_its_own_form(precision: Any, algorithm: str, form: str, tmp_path: Path) -> None:
    source = CheckpointSource.open(str(exported(tmp_path, Case("llama", precision, "modelopt"))))
    stored = source.stored("layers.0.down")
    assert stored is not None and stored.origin == f"ModelOpt {algorithm}"
    assert kept_precision(source, "bf16").weights == form
    # From config.json alone, the same.
    assert kept_precision(source, "bf16", weights=False).weights == form


@pytest.fixture
def int4(tmp_path: Path) -> Path:
    return exported(tmp_path, Case("llama", "int4", "modelopt", changes=WIDE))


def _changed(directory: Path, name: str, tensor: torch.Tensor) -> CheckpointSource:
    file = directory / "model.safetensors"
    save_file(load_file(file) | {name: tensor}, file)
    return CheckpointSource.open(str(directory))


def test_odd_and_unaligned_rows_are_those_of_the_whole(int4: Path) -> None:
    """Two rows share an octet."""
    source = CheckpointSource.open(str(int4))
    whole = source.tensor("layers.1.up")
    for start, stop in ((0, 1), (1, 2), (3, 8), (61, 128), (5, 6)):
        assert torch.equal(source.rows("layers.1.up", start, stop), whole[start:stop])


def test_scaled_inputs_and_damage_are_refused(int4: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.o_proj"
    scale = torch.ones(128, dtype=torch.bfloat16)
    scale[3] = 2
    copies = [Path(shutil.copytree(int4, tmp_path / str(i))) for i in range(3)]
    with pytest.raises(CheckpointError, match=r"o_proj\.pre_quant_scale is not 1 everywhere"):
        _changed(copies[0], f"{name}.pre_quant_scale", scale).stored("layers.0.o")
    with pytest.raises(
        CheckpointError, match=r"o_proj\.weight' has shape \[32, 128\], config\.json implies \[64, 128\]"
    ):
        _changed(copies[1], f"{name}.weight", torch.zeros(32, 128, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match="scales hold NaN"):
        _changed(copies[2], f"{name}.weight_scale", torch.full((128, 1), torch.nan)).tensor("layers.0.o")


def test_a_quantized_kv_cache_is_refused_when_opened(int4: Path) -> None:
    config = json.loads((int4 / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "dynamic": False}
    (int4 / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refused, match="kv_cache_scheme"):
        CheckpointSource.open(str(int4))
