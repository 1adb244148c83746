"""What `trtbuild package` writes for an engine of TensorRT-LLM, what it refuses, and what its check sees."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from trtllm_engine import TINY_MIXTRAL, make_trtllm_engine

from trtbuild.checkpoints.layout import Layout
from trtbuild.cli import main
from trtbuild.engines.passport import Passport
from trtbuild.engines.tensorrt_llm.engine_config import TrtllmEngine
from trtbuild.errors import CheckFailed, Refused
from trtbuild.progress import no_progress
from trtbuild.triton_repo.tensorrt_llm.check import check_repository, read_config
from trtbuild.triton_repo.tensorrt_llm.names import ModelNames
from trtbuild.triton_repo.tensorrt_llm.options import TrtllmOptions
from trtbuild.triton_repo.tensorrt_llm.repository import write_repository
from trtbuild.triton_repo.tensorrt_llm.served_models import read_trtllm_models
from trtbuild.triton_repo.tensorrt_llm.tokenizer_facts import TokenizerFacts
from trtbuild.workspace import Workspace

MODELS = ("tensorrt_llm", "preprocessing", "postprocessing", "tensorrt_llm_bls", "ensemble")


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    """With the engine `tiny-trtllm` of two ranks."""
    make_trtllm_engine(tmp_path / "engines" / "tiny-trtllm", layout=Layout(tp=2))
    return Workspace(tmp_path)


def package(place: Workspace, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["package", *arguments, "--workspace", str(place.root)])


def test_five_models_over_one_copy_of_the_engine(place: Workspace) -> None:
    result = package(place, "tiny-trtllm", "--no-check", "--json")
    assert result.exit_code == 0, result.output
    (record,) = json.loads(result.stdout)
    assert tuple(record["models"]) == MODELS
    assert "was parsed and compared, not run" in record["check"]["not_checked"]
    assert record["check"]["triton"] is None
    assert {one.name for one in place.models.iterdir()} == set(MODELS)
    own = place.models / "tensorrt_llm" / "1" / "engine"
    for file in place.engine("tiny-trtllm").rglob("*"):
        if file.is_file():
            assert file.samefile(own / file.relative_to(place.engine("tiny-trtllm"))), f"{file} was copied"
    for model in ("preprocessing", "postprocessing", "tensorrt_llm_bls"):
        version = place.models / model / "1"
        assert "TritonPythonModel" in (version / "model.py").read_text()
        assert (version / "tokenizer" / "tokenizer.json").samefile(own / "tokenizer" / "tokenizer.json")
        for source in version.glob("*.py"):
            assert "import trtbuild" not in source.read_text() and "from trtbuild" not in source.read_text()
    # Triton wants a version, even of an ensemble.
    assert (place.models / "ensemble" / "1").is_dir()
    (served,) = read_trtllm_models(place.models, MODELS)
    assert (served.name, served.world_size) == ("tensorrt_llm", 2)
    found = read_config(place.models / "tensorrt_llm" / "config.pbtxt").parameters["gpt_model_path"].string_value
    assert Path(found) == own.absolute()


def test_a_real_triton_loads_what_it_can(place: Workspace, triton: object) -> None:
    result = package(place, "tiny-trtllm", "--trtllm", "chat_template=user")
    assert result.exit_code == 0, result.output
    assert "loaded preprocessing and postprocessing" in result.stdout
    assert "NOT CHECKED: the engine was not loaded" in result.stdout
    assert not list(place.models.rglob("__pycache__"))
    # Again, in place of the first.
    assert package(place, "tiny-trtllm", "--no-check", "--trtllm", "max_queue_size=5").exit_code == 0
    config = read_config(place.models / "tensorrt_llm" / "config.pbtxt")
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 5


def test_several_engines_in_one_repository(place: Workspace) -> None:
    make_trtllm_engine(place.engines / "other-trtllm")
    result = package(place, "tiny-trtllm", "other-trtllm", "--no-check")
    assert result.exit_code == 0, result.output
    expected = {f"{engine}_{model}" for engine in ("tiny-trtllm", "other-trtllm") for model in MODELS}
    assert {one.name for one in place.models.iterdir()} == expected
    refused = package(place, "tiny-trtllm", "other-trtllm", "--no-check", "--prefix", "a")
    assert (refused.exit_code, "is for one engine" in refused.output) == (3, True)
    assert package(place, "tiny-trtllm", "--no-check").exit_code == 0
    taken = package(place, "other-trtllm", "--no-check")
    assert taken.exit_code == 3
    assert "of the engine tiny-trtllm; give this engine's models names: --prefix other-trtllm" in taken.output
    assert package(place, "other-trtllm", "--no-check", "--prefix", "b").exit_code == 0
    steps = read_config(place.models / "b_ensemble" / "config.pbtxt").ensemble_scheduling.step
    assert [step.model_name for step in steps] == ["b_preprocessing", "b_tensorrt_llm", "b_postprocessing"]


def test_several_engines_are_not_in_one_place_nor_of_several_releases_unsaid(place: Workspace) -> None:
    make_trtllm_engine(place.engines / "old-trtllm", version="1.1.0")
    refused = package(place, "tiny-trtllm", "old-trtllm", "--no-check", "--engine-path", "/x")
    assert (refused.exit_code, "--engine-path /x is where one engine is" in refused.output) == (3, True)
    assert not place.models.exists()
    # Nothing was packaged that could have gone unchecked.
    assert "--no-check" not in refused.output
    result = package(place, "tiny-trtllm", "old-trtllm", "--no-check")
    assert result.exit_code == 0, result.output
    assert "several TensorRT-LLM releases, tiny-trtllm (1.2.1), old-trtllm (1.1.0)" in result.stderr
    assert "WARNING: --no-check" in result.stderr


def test_the_result_has_the_models_names_and_the_next_step(place: Workspace) -> None:
    result = package(place, "tiny-trtllm", "--no-check", "--prefix", "a")
    assert "next: trtbuild serve a_tensorrt_llm, in a container" in result.stdout
    assert "container. a_tensorrt_llm, and what goes through it (a_ensemble, a_tensorrt_llm_bls)" in result.stdout


def test_a_directory_without_llmapi_is_told_of_it(place: Workspace) -> None:
    result = package(place, str(TINY_MIXTRAL), "--no-check")
    assert result.exit_code == 3
    assert f"trtbuild package {TINY_MIXTRAL} --llmapi" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--slots", "2"), "are for our own engine worker"),
        (("--alias", "ensemble"), "named by --prefix"),
        (("--trtllm", "max_batch_size=99"), "the engine was built for 4"),
        (("--engine-path", "engines/x"), "needs an absolute one"),
        (("--prefix", "a/b"), "use letters, digits"),
        (("--k8s", "manifests"), "not for TensorRT-LLM"),
    ],
)
def test_refusals_come_before_anything_is_written(arguments: tuple[str, ...], message: str, place: Workspace) -> None:
    result = package(place, "tiny-trtllm", "--no-check", *arguments)
    assert result.exit_code == 3, result.output
    assert message in result.output
    assert not place.models.exists()


def test_an_engine_that_changed_is_not_packaged(place: Workspace) -> None:
    file = place.engine("tiny-trtllm") / "rank1.engine"
    file.write_bytes(b"another")
    result = package(place, "tiny-trtllm", "--no-check")
    assert result.exit_code == 1
    assert "rank1.engine differs from what was built" in result.output
    assert not list(place.models.glob("*"))


def test_the_engines_place_in_a_container(make: Callable[..., Any], tmp_path: Path) -> None:
    passport, engine = make()
    options = TrtllmOptions(guided_decoding_backend="xgrammar")
    with pytest.raises(Refused, match="needs the engine's path"):
        write_repository(tmp_path / "models", passport, engine, options, link_engine=False)
    write_repository(
        tmp_path / "models", passport, engine, options, link_engine=False, engine_path="/engines/tiny/engine"
    )
    found = read_config(tmp_path / "models" / "tensorrt_llm" / "config.pbtxt").parameters
    assert found["gpt_model_path"].string_value == "/engines/tiny/engine"
    assert not (tmp_path / "models" / "tensorrt_llm" / "1" / "engine").exists()


def test_xgrammar_gets_the_vocabulary(make: Callable[..., Any], tmp_path: Path) -> None:
    passport, engine = make()
    write_repository(tmp_path / "models", passport, engine, TrtllmOptions(guided_decoding_backend="xgrammar"))
    file = tmp_path / "models" / "tensorrt_llm" / "1" / "xgrammar_tokenizer_info.json"
    found = read_config(tmp_path / "models" / "tensorrt_llm" / "config.pbtxt").parameters
    assert found["xgrammar_tokenizer_info_path"].string_value == str(file)
    info = json.loads(file.read_text())
    assert len(info["encoded_vocab"]) == 1024
    assert info["encoded_vocab"][:3] == ["<unk>", "<s>", "</s>"]
    assert info["stop_token_ids"] == [2]
    assert json.loads(info["tokenizer_str"])["model"]["type"] == "BPE"


def test_several_end_tokens(make: Callable[..., Any], tmp_path: Path) -> None:
    """As Llama 3's: the backend takes one; the others end an answer as stop words."""
    passport, engine = make()
    (passport.tokenizer_directory / "generation_config.json").write_text('{"eos_token_id": [7, 2, 9]}')
    assert TokenizerFacts.read(passport.tokenizer_directory) == TokenizerFacts((2, 7, 9), 2)
    write_repository(tmp_path / "models", passport, engine, TrtllmOptions())
    found = read_config(tmp_path / "models" / "preprocessing" / "config.pbtxt").parameters
    assert (found["end_id"].string_value, found["more_end_ids"].string_value) == ("2", "7,9")


@pytest.mark.parametrize(
    ("model", "old", "new", "message"),
    [
        ("tensorrt_llm", 'string_value: "no"', 'string_value: "${batching}"', "a placeholder is left"),
        ("tensorrt_llm", 'backend: "tensorrtllm"', 'backend: "python"', "not tensorrtllm"),
        ("tensorrt_llm", "max_batch_size: 4", "max_batch_size: ${n}", "Triton's protobuf cannot read it"),
        ("ensemble", 'value: "top_k"', 'value: "topk"', "runtime_top_k and topk do not fit"),
        ("ensemble", 'model_name: "postprocessing"', 'model_name: "postprocess"', "no model postprocess"),
        ("preprocessing", 'name: "OUT_END_ID"', 'name: "END"', "has no output OUT_END_ID"),
    ],
)
def test_the_check_sees_what_does_not_fit(
    model: str, old: str, new: str, message: str, make: Callable[..., Any], tmp_path: Path
) -> None:
    repository = tmp_path / "models"
    passport, engine = make()
    write_repository(repository, passport, engine, TrtllmOptions())
    assert check_repository(repository, ModelNames(), None, no_progress).triton is None
    file = repository / model / "config.pbtxt"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(CheckFailed, match=message.replace("$", r"\$")):
        check_repository(repository, ModelNames(), None, no_progress)


def test_engines_of_both_kinds_at_once(place: Workspace, workspace: Path) -> None:
    """Each gets its own models."""
    (place.engines / "mixtral").symlink_to(workspace / "engines" / "mixtral")
    result = package(place, "mixtral", "tiny-trtllm", "--no-check")
    assert result.exit_code == 0, result.output
    assert {one.name for one in place.models.iterdir()} == {*MODELS, "mixtral", "mixtral-unary", "mixtral-tokens"}
    only_ours = package(place, "mixtral", "--no-check", "--prefix", "a")
    assert (only_ours.exit_code, "that TensorRT-LLM built" in only_ours.output) == (3, True)
    assert Passport.open(place.models / "tensorrt_llm" / "1" / "engine").name == "tiny-trtllm"
    assert TrtllmEngine.open(place.models / "tensorrt_llm" / "1" / "engine").world_size == 2
