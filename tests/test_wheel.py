"""The wheel, unpacked elsewhere, is the whole tool: nothing is left behind in the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import TESTS, TINY_QWEN2

ROOT = TESTS.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    [wheel] = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory / "site")
    return directory / "site"


def run_outside(site: Path, cwd: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = (
        [sys.executable, "-P", "-m", "trtbuild"] if sys.version_info >= (3, 11) else [sys.executable, "-m", "trtbuild"]
    )
    done = subprocess.run([*command, *arguments], cwd=cwd, env=environment, check=True, capture_output=True, text=True)
    return done.stdout


def test_holds_the_package_and_nothing_else(site: Path) -> None:
    packaged = {str(file.relative_to(site)) for file in site.rglob("*") if file.is_file()}
    package = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "trtbuild").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert package <= packaged
    assert all(".dist-info" in name for name in packaged - package)


def test_runs_outside_the_checkout(site: Path, tmp_path: Path) -> None:
    script = "import trtbuild; print(trtbuild.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(found.stdout.strip()).is_relative_to(site)
    assert "tiny-mixtral" in run_outside(site, tmp_path, "models")
    # fp8 reads the bundled calibration text.
    run_outside(site, tmp_path, "convert", str(TINY_QWEN2), "--precision", "fp8")
    assert (tmp_path / "build" / "tiny-qwen2-fp8-tp1" / "rank0.safetensors").is_file()
