"""SIGKILL of `trtbuild compile` while it calibrates, then the same command again: the bytes of an undisturbed run."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from trtbuild.cli import main

# About what calibrating a layer takes here.
LAYER_S = 0.2
NUM_SLOW_KILLS = 6


def arguments(command: str, model: str, precision: str, workspace: Path) -> list[str]:
    budget = ["--budget", "2.2MB"] if precision == "auto" else []
    flags = ["--precision", precision, *budget, "--tp", "2", "--workers", "1", "--workspace", str(workspace)]
    plans = ["--target", "sm89", "--max-seq-len", "128", "--chunk-size", "64"] if command == "compile" else []
    return [command, model, "--name", "x", *flags, *plans]


def rank_digests(directory: Path) -> dict[str, str]:
    """Of the rank shards, which hold the scales too."""
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(directory.glob("rank*.safetensors"))}


def converted(workspace: Path, model: str, precision: str) -> dict[str, str]:
    result = CliRunner().invoke(main, arguments("convert", model, precision, workspace))
    assert result.exit_code == 0, result.output
    found = rank_digests(workspace / "build" / "x")
    assert len(found) == 2
    return found


def kill_compile(workspace: Path, model: str, precision: str, num_layers: int, delay_s: float) -> set[str]:
    """Kill the command's process group `delay_s` after so many layers were kept; the layers that it leaves unfinished.

    They are empty where the calibration, or the command, was faster.
    """
    calibrations = workspace / "build" / ".calibration"
    process = subprocess.Popen(
        [sys.executable, "-m", "trtbuild", *arguments("compile", model, precision, workspace)],
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    def kept() -> set[str]:
        return {f"{f.parent.name}/{f.name}" for f in calibrations.glob(".*.partial/layer-*.safetensors")}

    while len(kept()) < num_layers or not list(calibrations.glob("*.partial")):
        if process.poll() is not None:
            return set()
        time.sleep(0.002)
    time.sleep(delay_s)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return kept()


def killed_twice(workspace: Path, model: str, precision: str) -> bool:
    """In the first layer and after it; layers that were kept are not made again. False where a kill came too late."""
    moments, before = random.Random(), {}
    for num_layers in (0, 1):
        left = kill_compile(workspace, model, precision, num_layers, moments.uniform(0, LAYER_S / 2))
        files = {name: (workspace / "build" / ".calibration" / name).stat().st_mtime_ns for name in left}
        if len(left) < max(num_layers, len(before)):
            return False
        assert before.items() <= files.items()
        before = files
    return not (workspace / "build" / "x").exists()


@pytest.mark.slow
def test_killed_twice_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    model, precision = "tiny-mixtral", "int4-awq"
    expected = converted(tmp_path / "whole", model, precision)
    workspaces = (tmp_path / f"killed-{attempt}" for attempt in range(4))
    workspace = next(workspace for workspace in workspaces if killed_twice(workspace, model, precision))
    assert converted(workspace, model, precision) == expected
    assert not list(workspace.glob("**/.*.partial")) and not list(workspace.glob("**/.*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int4-awq", "int4-gptq", "auto"])
def test_killed_at_random_moments_of_calibration(tmp_path: Path, precision: str) -> None:
    """Once to three times, in either pass of `auto` and in what it measures between them; the whole road at the end."""
    expected, moments = converted(tmp_path / "whole", "tiny-mixtral", precision), random.Random(11)
    killed = 0
    for attempt in range(NUM_SLOW_KILLS):
        workspace = tmp_path / str(attempt)
        for _ in range(moments.randint(1, 3)):
            kill_compile(workspace, "tiny-mixtral", precision, 0, moments.uniform(0, 20 * LAYER_S))
            killed += not (workspace / "build" / "x").exists()
        result = CliRunner().invoke(main, arguments("compile", "tiny-mixtral", precision, workspace))
        assert result.exit_code == 0, result.output
        assert rank_digests(workspace / "engines" / "x") == expected, attempt
        assert not list(workspace.glob("**/.*.partial")) and not list(workspace.glob("**/.*.tmp"))
    assert killed > NUM_SLOW_KILLS
