"""Small rank checkpoints of every form, and their exports, made of numbers that are the same on every machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import hf_config, hf_shapes, save_checkpoint
from safetensors.torch import load_file

from trtbuild.checkpoints.convert import ActivationRange, Calibration, convert
from trtbuild.checkpoints.kept_precision import activation_ranges, kept_precision
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import Precision, PrecisionName
from trtbuild.checkpoints.rank_checkpoint import RankCheckpoint
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.engines.export.export import Companions, SchemeName, export_checkpoint


@dataclass(frozen=True)
class Case:
    """One export: of a small random model, converted to a precision for a layout."""

    family: str
    precision: PrecisionName
    scheme: SchemeName = "compressed-tensors"
    layout: Layout = field(default_factory=Layout)
    changes: dict[str, Any] = field(default_factory=dict)


TWO_BY_TWO = Layout.resolve(2, 2)
# Every input is a whole number of groups of 128.
WIDE = {"hidden_size": 128}
CASES: dict[str, Case] = {
    "llama-bf16": Case("llama", "bf16", layout=TWO_BY_TWO, changes={"tie_word_embeddings": True}),
    "llama-fp8": Case("llama", "fp8", layout=Layout.resolve(2)),
    "qwen2-fp8-dynamic": Case("qwen2", "fp8-dynamic", layout=TWO_BY_TWO),
    "llama-int8": Case("llama", "int8", changes={"attention_bias": True, "mlp_bias": True}),
    "llama-int4": Case("llama", "int4", changes=WIDE),
    # Four ranks, two heads of keys: o_proj's groups are smaller than the others'.
    "qwen3-int4-groups": Case("qwen3", "int4", layout=Layout.resolve(4)),
    "mixtral-int4": Case("mixtral", "int4", layout=Layout.resolve(4, 1, 2, 2), changes=WIDE),
    "mixtral-fp8": Case("mixtral", "fp8", layout=Layout.resolve(2, 1, 1, 2)),
    "qwen2-moe-fp8": Case("qwen2_moe", "fp8", layout=TWO_BY_TWO),
    "llama-modelopt-fp8": Case("llama", "fp8", "modelopt"),
    "llama-modelopt-fp8-dynamic": Case("llama", "fp8-dynamic", "modelopt", Layout.resolve(2)),
    "mixtral-modelopt-fp8": Case("mixtral", "fp8", "modelopt", Layout.resolve(2, 1, 1, 2)),
    "llama-modelopt-int8": Case("llama", "int8", "modelopt"),
    "llama-modelopt-int4": Case("llama", "int4", "modelopt", changes=WIDE),
    "deepseek-int8": Case("deepseek_v2", "int8", layout=Layout.resolve(2)),
}


def plain_weights(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """bfloat16 weights from whole numbers: no transcendental function rounds otherwise on another CPU."""
    generator = np.random.default_rng(seed)
    weights: dict[str, torch.Tensor] = {}
    for name, shape in hf_shapes(config).items():
        values = torch.from_numpy(generator.integers(-512, 513, shape) / 512).float()
        if name.endswith("norm.weight"):
            values = 1 + values / 4
        elif len(shape) == 2 and "embed" not in name:
            values *= 2.0 ** -math.floor(math.log2(shape[1]) / 2)
        weights[name] = values.to(torch.bfloat16)
    return weights


def fixed_ranges(source: CheckpointSource, layout: Layout, precision: Precision) -> Calibration:
    """Every linear layer's largest activation, made up: another one for each."""
    plans = [plan_rank(source.config, rank, precision) for rank in layout.ranks()]
    names = list(dict.fromkeys(linear.global_name for plan in plans for linear in plan.linears))
    return Calibration({"made": "up"}, lambda: {name: ActivationRange(8.0 + i) for i, name in enumerate(names)})


def converted(
    folder: Path, case: Case, weights: Callable[[dict[str, Any]], dict[str, torch.Tensor]] = plain_weights
) -> tuple[RankCheckpoint, Path]:
    """The rank checkpoint of a case, and its source's directory."""
    config = hf_config(case.family, **case.changes)
    source = CheckpointSource.open(str(save_checkpoint(folder / "source", config, weights(config))))
    precision = Precision.resolve(case.precision, source.config.dtype)
    calibration = fixed_ranges(source, case.layout, precision) if case.precision == "fp8" else None
    checkpoint = convert(source, folder / "build" / "small", case.layout, precision, calibration=calibration)
    return checkpoint, source.directory


def exported(folder: Path, case: Case, scheme: SchemeName | None = None) -> Path:
    checkpoint, source = converted(folder, case)
    directory = folder / "export"
    export_checkpoint(checkpoint, Companions((source,)), directory, scheme or case.scheme)
    return directory


def keep(directory: Path, target: Path, layout: Layout) -> RankCheckpoint:
    """Convert an export as one converts any quantized checkpoint."""
    source = CheckpointSource.open(str(directory))
    precision = kept_precision(source, source.config.dtype)
    plans = [plan_rank(source.config, rank, precision) for rank in layout.ranks()]
    return convert(
        source, target, layout, precision, calibration=Calibration({}, lambda: activation_ranges(source, plans))
    )


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory's safetensors files, through the safetensors library."""
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
