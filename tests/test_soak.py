"""Long runs, by hand (`make soak`): what a few moments in the other tests show, at many random ones."""

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

NUM_KILLS = 20
LONGEST_S = 9.0


def compile_command(workspace: Path, precision: str) -> list[str]:
    flags = ["--precision", precision, "--tp", "2", "--target", "sm89", "--max-seq-len", "128", "--workers", "2"]
    return [sys.executable, "-m", "trtbuild", "compile", "tiny-mixtral", *flags, "--workspace", str(workspace)]


def rank_digests(workspace: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(workspace.glob("engines/*/rank*.safetensors"))
    }


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp8", "int4"])
def test_kill_at_random_moments_of_compile(tmp_path: Path, precision: str) -> None:
    """SIGKILL of the whole process group, then the same command again: the same rank files as undisturbed."""
    subprocess.run(compile_command(tmp_path / "whole", precision), check=True, capture_output=True)
    expected = rank_digests(tmp_path / "whole")
    assert len(expected) == 2
    moments = random.Random(7)
    killed = 0
    for attempt in range(NUM_KILLS):
        workspace = tmp_path / str(attempt)
        process = subprocess.Popen(
            compile_command(workspace, precision),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(moments.uniform(1.0, LONGEST_S))
        killed += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
        process.wait()
        again = subprocess.run(compile_command(workspace, precision), capture_output=True, text=True, check=False)
        assert again.returncode == 0, f"attempt {attempt}: {again.stderr}"
        assert rank_digests(workspace) == expected, attempt
        assert not list(workspace.glob("*/.*.partial")), attempt
    assert killed > NUM_KILLS // 2
