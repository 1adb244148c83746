"""Conversions of a small Mixtral over two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trtbuild.checkpoints.convert import ActivationRange, Calibration, convert
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import Precision, PrecisionName
from trtbuild.checkpoints.rank_checkpoint import RankCheckpoint
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.source import CheckpointSource

LAYOUT = Layout.resolve(2, 1, 1, 2)


def ranges_of(source: CheckpointSource, amax: float = 3.0) -> dict[str, ActivationRange]:
    plan = plan_rank(source.config, Layout().rank(0), Precision("fp8", "bf16"))
    tokens = {True: (7, 5, 3, 1), False: ()}
    return {linear.global_name: ActivationRange(amax, tokens[".mlp." in linear.global_name]) for linear in plan.linears}


def run(source: CheckpointSource, directory: Path, precision: PrecisionName, **options: Any) -> RankCheckpoint:
    calibration = Calibration({"text": "x"}, lambda: ranges_of(source)) if precision == "fp8" else None
    return convert(source, directory, LAYOUT, Precision(precision, "bf16"), calibration=calibration, **options)


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}
