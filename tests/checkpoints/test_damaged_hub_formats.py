"""Quantized checkpoints with tensors or numbers that do not fit: one error that names them."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_packing import TOOL_MADE, TOOLS, gptq_checkpoint, tool_made
from safetensors.torch import load_file, save_file

from trtbuild.checkpoints.kept_precision import kept_precision
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.errors import CheckpointError, TrtBuildError


def damaged(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> CheckpointSource:
    """A GPTQ checkpoint whose tensors were changed."""
    gptq_checkpoint(directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return CheckpointSource.open(str(directory))


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.qzeros"), "tensor 'model.layers.0.self_attn.q_proj.qzeros' is missing"),
        (lambda t: t.pop(f"{Q}.qweight"), "q_proj.weight' is missing"),
        (lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"][:2]}), r"scales' has shape \[2, 128\], .* \[4, 128\]"),
        (lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"][:, :64]}), r"shape \[8, 64\], .* implies \[8, 128\]"),
        (lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].float()}), "qweight' is F32; I32 is read"),
        (lambda t: t.update({f"{Q}.weight": torch.zeros(128, 64)}), "q_proj.weight' has no place"),
        (lambda t: t.update({f"{Q}.extra": torch.zeros(3)}), "q_proj.extra' has no place"),
        (lambda t: t.update({f"{Q}.bias": torch.ones(128)}), "q_proj.bias' has no place"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        damaged(tmp_path, change)


def test_a_bias_of_zeros_is_nothing(tmp_path: Path) -> None:
    source = damaged(tmp_path, lambda t: t.update({f"{Q}.bias": torch.zeros(128)}))
    assert source.stored("layers.0.q") is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[f"{Q}.scales"][1].fill_(float("nan")), "q_proj: its scales hold NaN; scales are positive"),
        (lambda t: t[f"{Q}.scales"][1, 0].fill_(float("inf")), "its scales hold values from .* to inf"),
        (lambda t: t[f"{Q}.scales"][0, 5].fill_(0), "its scales hold values from 0 to"),
        (lambda t: t[f"{Q}.g_idx"][3].fill_(1), r"q_proj.g_idx does not put 16 of the 64 inputs into each of 4 groups"),
        (lambda t: t[f"{Q}.g_idx"][3].fill_(400), "q_proj.g_idx does not put 16"),
        (lambda t: t[f"{Q}.g_idx"][3].fill_(-1), "q_proj.g_idx does not put 16"),
        (lambda t: t[f"{Q}.qzeros"][3].fill_(-1), "q_proj.qzeros: zero points below 0, which GPTQ's first format"),
    ],
)  # fmt: skip
def test_numbers_that_no_tool_writes_are_one_clear_error(
    change: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    source = damaged(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        source.stored_rows("layers.0.q", 0, 128)
    with pytest.raises(CheckpointError, match=message):
        source.tensor("layers.0.q")


@pytest.mark.parametrize(
    ("name", "tensor", "value", "message"),
    [
        ("fp8-dynamic-llama", "weight", 0x7F, "q_proj.weight holds NaN"),
        ("fp8-dynamic-llama", "weight_scale", 0.0, "its scales hold values from 0 to"),
        ("fp8-mixtral", "weight_scale", -1.0, "its weight_scale hold values from -1 to -1"),
        ("fp8-mixtral", "input_scale", float("nan"), "its input_scale hold NaN"),
        ("w4a16-llama", "weight_shape", 5, r"q_proj.weight_shape is \[5, 5\], config.json implies \[64, 32\]"),
    ],
)
def test_damaged_fp8_and_packed_tensors_are_one_clear_error(
    name: str, tensor: str, value: float, message: str, tmp_path: Path
) -> None:
    directory, _, tensors, _ = tool_made(name)
    found = tensors[f"{Q}.{tensor}"]
    if found.dtype == torch.float8_e4m3fn:
        found.view(torch.uint8)[2, 3] = int(value)
    else:
        found.fill_(value)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    source = CheckpointSource.open(str(tmp_path))
    with pytest.raises(CheckpointError, match=message):
        source.tensor("layers.0.q")


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a JSON value has parts."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in parts for place in _places(part, (*path, key)))]


ODD = [None, True, 0, -1, 3, 16, 1e9, float("inf"), "gptq", "", [], {}, ["re:("], [None], {"a": 1}, -(2**70)]


@pytest.mark.parametrize("seed", range(60))
def test_whatever_is_changed_in_a_checkpoint_is_read_or_one_error(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    directory = TOOL_MADE / chance.choice(TOOLS)
    config = json.loads((directory / "config.json").read_text())
    raw = bytearray((directory / "model.safetensors").read_bytes())
    if seed % 3:
        place = chance.choice(_places(config["quantization_config"])[1:])
        part = config["quantization_config"]
        for key in place[:-1]:
            part = part[key]
        part[place[-1]] = chance.choice(ODD)
    else:
        for _ in range(20):
            raw[chance.randrange(8, len(raw))] = chance.randrange(256)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(raw)
    with contextlib.suppress(TrtBuildError):
        source = CheckpointSource.open(str(tmp_path))
        kept_precision(source, source.config.dtype)
        for name in source._names:
            assert tuple(source.tensor(name).shape) == source.shape(name)
