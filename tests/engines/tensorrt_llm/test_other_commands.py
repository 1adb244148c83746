"""What the commands around compile and package make of an engine of TensorRT-LLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from helpers import TINY_QWEN2
from trtllm_engine import TINY_MIXTRAL, make_trtllm_engine

from trtbuild.cli import main
from trtbuild.engines.passport import Passport


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A workspace with the engine `tiny-trtllm` and nothing else, as after `prune --rank-checkpoints`."""
    make_trtllm_engine(tmp_path / "engines" / "tiny-trtllm", precision="int4")
    return tmp_path


def run(place: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--workspace", str(place)])


def test_a_stand_in_engine_is_listed_as_a_built_one(place: Path) -> None:
    """Tests that use the stand-in see what a user sees."""
    listed = json.loads(run(place, "list", "--json").output)
    assert [(item["name"], item["state"]) for item in listed] == [("tiny-trtllm", "complete")]


def test_nobody_is_sent_to_a_verify_that_refuses(place: Path) -> None:
    warning = Passport.open(place / "engines" / "tiny-trtllm").check_accuracy()
    assert warning is not None
    assert "trtbuild verify tiny-trtllm" not in warning
    assert "--builder tensorrt-rtx, or compare answers after trtbuild serve" in warning


def test_export_names_the_model(place: Path) -> None:
    done = run(place, "export", "tiny-trtllm", "-o", str(place / "x"))
    assert done.exit_code == 3
    assert "plan-only" not in done.output
    assert "is an engine of TensorRT-LLM" in done.output
    assert "export its model: trtbuild export tiny-mixtral --precision int4" in done.output


def test_generate_refuses_before_a_worker_starts(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Path] = []
    monkeypatch.setattr("trtbuild.engines.generate.start_worker", lambda directory, **_: started.append(directory))
    done = run(place, "generate", "tiny-trtllm", "Hello")
    assert done.exit_code == 3 and not started
    assert "trtbuild package tiny-trtllm, then trtbuild serve in its container" in done.output
    assert "loading" not in done.output


@pytest.mark.parametrize(
    ("model", "precision", "told", "later"),
    [
        (TINY_QWEN2, "int4", "linear layers  15 bf16; trtllm-build quantizes them (W4A16)\n", "W4A16"),
        (TINY_MIXTRAL, "int8", "linear layers  12 bf16; trtllm-build quantizes them (W8A16)\n", "W8A16"),
        (TINY_QWEN2, "bf16", "linear layers  15 bf16\n", None),
    ],
)
def test_convert_says_what_trtllm_build_will_quantize(
    tmp_path: Path, model: Path, precision: str, told: str, later: str | None
) -> None:
    command = ["convert", str(model), "--builder", "tensorrt-llm", "--precision", precision, "--workers", "1"]
    done = run(tmp_path, *command)
    assert done.exit_code == 0, done.output
    assert told in done.output
    facts = json.loads(run(tmp_path, *command, "--json").stdout)
    assert facts["quantized_by_trtllm_build"] == later


def test_the_readme_names_every_file(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[3] / "engines" / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## Engines of TensorRT-LLM")[2].partition("\n## ")[0]
    made = make_trtllm_engine(tmp_path / "tiny-trtllm")
    names = {file.name.replace("rank0", "rank{r}") for file in made.iterdir()}
    assert {name for name in names if name not in section} == set()
    assert "request.json" in names
