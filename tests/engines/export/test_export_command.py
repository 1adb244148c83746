"""`trtbuild export`: names, models, and what contradicts them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from engine_without_plans import make_engine
from exporting import all_tensors
from helpers import TINY_QWEN2

from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.cli import main


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["export", *arguments])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY_QWEN2, tmp_path / "model"))


def test_a_model_is_converted_and_exported(model: Path, tmp_path: Path) -> None:
    """As JSON; the rank checkpoint stays in build/, and is used the next time."""
    arguments = [
        str(model),
        "--precision",
        "int8",
        "--tp",
        "2",
        "--workspace",
        str(tmp_path),
        "-o",
        str(tmp_path / "x"),
    ]
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["precision"], found["scheme"], found["num_files"]) == ("int8", "compressed-tensors", 1)
    assert (tmp_path / "build" / "model-int8-tp2" / "trtbuild.json").is_file()
    assert (tmp_path / "x" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert CheckpointSource.open(str(tmp_path / "x")).quantization is not None
    again = run("model-int8-tp2", "--workspace", str(tmp_path), "-o", str(tmp_path / "x"))
    assert again.exit_code == 0 and "was there already" in again.output


def test_an_engine_has_all_that_an_export_needs(model: Path, tmp_path: Path) -> None:
    """Its source may be gone."""
    make_engine(tmp_path, "small", model=str(model), precision="fp8-dynamic")
    shutil.rmtree(tmp_path / "build" / "small")
    shutil.rmtree(model)
    done = run("small", "--scheme", "modelopt", "--workspace", str(tmp_path), "-o", str(tmp_path / "x"))
    assert done.exit_code == 0, done.output
    assert "loads in TensorRT-LLM >= 1.3, vLLM; no engine was built" in done.output
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert config["quantization_config"]["quant_algo"] == "FP8_PER_CHANNEL_PER_TOKEN"
    assert "model.layers.0.self_attn.q_proj.weight_scale" in all_tensors(tmp_path / "x")


def test_a_source_that_moved_is_named(model: Path, tmp_path: Path) -> None:
    workspace = ["--workspace", str(tmp_path)]
    run(str(model), "--name", "small", *workspace, "-o", str(tmp_path / "x"))
    moved = model.rename(tmp_path / "elsewhere")
    gone = run("small", *workspace, "-o", str(tmp_path / "y"))
    assert gone.exit_code == 3 and "--source says where" in gone.output
    found = run("small", "--source", str(moved), *workspace, "-o", str(tmp_path / "y"))
    assert found.exit_code == 0, found.output


def test_what_contradicts_itself_is_refused(model: Path, tmp_path: Path) -> None:
    workspace = ["--workspace", str(tmp_path), "-o", str(tmp_path / "x")]
    run(str(model), "--name", "small", "--precision", "int8", *workspace)
    flags = run("small", "--precision", "int4", *workspace)
    assert flags.exit_code == 3 and "--precision: small is converted already" in flags.output
    source = run(str(model), "--source", str(model), *workspace)
    assert source.exit_code == 3 and "is none" in source.output
    other = run("small", "--scheme", "modelopt", *workspace)
    assert other.exit_code == 3 and "--force" in other.output
    assert run("no-such-thing", *workspace).exit_code == 3
    assert run("small", "--workspace", str(tmp_path)).exit_code == 2
