"""What `trtbuild package` writes, and what it refuses to."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from google.protobuf import text_format
from served import SLOW_STEPS
from tritonclient.grpc import model_config_pb2 as generated

from trtbuild.cli import main
from trtbuild.engines.passport import Passport
from trtbuild.errors import CheckFailed, Refused
from trtbuild.triton_repo import check
from trtbuild.triton_repo.installation import TritonInstallation
from trtbuild.triton_repo.model_config import WorkerSettings, config_text
from trtbuild.triton_repo.package import package_engines
from trtbuild.triton_repo.tensors import TEXT_INPUTS, TEXT_OUTPUTS, TOKEN_INPUTS, TOKEN_OUTPUTS
from trtbuild.workspace import Workspace

# Its members are made when it is imported; no type checker sees them.
model_config_pb2: Any = generated


@pytest.fixture
def place(workspace: Path, tmp_path: Path) -> Workspace:
    """A workspace of one's own, with the engine `mixtral`."""
    shutil.copytree(workspace / "engines" / "mixtral", tmp_path / "engines" / "mixtral")
    return Workspace(tmp_path)


def read_config(file: Path) -> Any:
    return text_format.Parse(file.read_text(), model_config_pb2.ModelConfig())


def test_three_models_over_one_copy_of_the_weights(place: Workspace) -> None:
    (packaged,) = package_engines(place, ["mixtral"], SLOW_STEPS, alias="ensemble", installation=None)
    assert packaged.models == ["mixtral", "mixtral-unary", "mixtral-tokens", "ensemble"]
    assert sorted(one.name for one in place.models.iterdir()) == sorted(packaged.models)
    engine = place.models / "mixtral" / "1" / "engine"
    for file in place.engine("mixtral").rglob("*"):
        if file.is_file():
            assert file.samefile(engine / file.relative_to(place.engine("mixtral"))), f"{file} was copied"
    assert not list((place.models.parent / ".staging").iterdir())
    assert packaged.warning is not None and "never checked" in packaged.warning
    for model, decoupled in (("mixtral", True), ("mixtral-unary", False), ("mixtral-tokens", True), ("ensemble", True)):
        config = read_config(place.models / model / "config.pbtxt")
        assert config.name == model
        assert config.model_transaction_policy.decoupled is decoupled
        assert config.max_batch_size == 4
        assert config.parameters["engine"].string_value == "mixtral"
        assert config.parameters["slots"].string_value == "4"
        assert "${" not in str(config)


def test_the_public_tensors() -> None:
    """Names and types as TensorRT-LLM's ensemble and tensorrt_llm have them (reference: its 1.2 templates)."""
    config = text_format.Parse(config_text("m", "text", 8, WorkerSettings()), model_config_pb2.ModelConfig())
    types = {t.name: (model_config_pb2.DataType.Name(t.data_type), list(t.dims), t.optional) for t in config.input}
    assert len(types) == len(config.input) == len(TEXT_INPUTS)
    assert types["text_input"] == ("TYPE_STRING", [1], False)
    for name, kind in {
        "max_tokens": "INT32", "stream": "BOOL", "temperature": "FP32", "top_k": "INT32", "top_p": "FP32",
        "min_p": "FP32", "seed": "UINT64", "repetition_penalty": "FP32", "presence_penalty": "FP32",
        "frequency_penalty": "FP32",
        "min_tokens": "INT32", "end_id": "INT32", "pad_id": "INT32", "return_log_probs": "BOOL", "beam_width": "INT32",
        "exclude_input_in_output": "BOOL", "num_return_sequences": "INT32", "guided_decoding_guide_type": "STRING",
        "guided_decoding_guide": "STRING",
    }.items():  # fmt: skip
        assert types[name] == (f"TYPE_{kind}", [1], True), name
    for name in ("stop_words", "bad_words"):
        assert types[name] == ("TYPE_STRING", [-1], True)
    assert {"text_output", "output_log_probs", "cum_log_probs", "sequence_length"} <= {t.name for t in TEXT_OUTPUTS}
    tokens = {t.name for t in TOKEN_INPUTS}
    assert {"input_ids", "input_lengths", "request_output_len", "streaming", "runtime_top_k", "runtime_top_p"} <= tokens
    assert {"output_ids", "sequence_length", "cum_log_probs", "output_log_probs"} <= {t.name for t in TOKEN_OUTPUTS}


def test_parameters_are_read_back() -> None:
    settings = WorkerSettings(executor="reference", slots=3, threads=2, dtype="float32", max_queue=0)
    assert WorkerSettings.from_parameters({**settings.to_parameters(), "engine": "m", "kind": "text"}) == settings
    assert settings.flags()["max-queue"] == 0
    with pytest.raises(Refused, match="parameter slots 'many'"):
        WorkerSettings.from_parameters({"slots": "many"})


def test_a_real_triton_answers_before_the_package_is_put_in_place(place: Workspace, triton: object) -> None:
    """The engine's own executor, through the command."""
    arguments = ["package", "mixtral", "--workspace", str(place.root), "--threads", "1", "--slots", "2", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    (record,) = json.loads(result.stdout)
    checked = record["check"]
    assert (checked["executor"], checked["device"], checked["num_tokens"]) == ("reference", "cpu", 24)
    assert checked["text"]
    assert checked["triton_ms_per_token"] > 0
    assert (place.models / "mixtral" / "config.pbtxt").is_file()


def test_what_fails_the_check_is_not_put_in_place(
    place: Workspace, triton: TritonInstallation, monkeypatch: pytest.MonkeyPatch
) -> None:
    package_engines(place, ["mixtral"], SLOW_STEPS, installation=None)
    before = (place.models / "mixtral" / "trtbuild.json").stat().st_ino
    # As a model would that lost a sampling parameter on the way: a penalty that the engine is not told of.
    values = check.tensor_values
    monkeypatch.setattr(check, "tensor_values", lambda *given: values(*given) | {"repetition_penalty": 50.0})
    with pytest.raises(CheckFailed, match="mixtral does not answer as the engine does"):
        package_engines(place, ["mixtral"], SLOW_STEPS, installation=triton)
    assert (place.models / "mixtral" / "trtbuild.json").stat().st_ino == before


def test_refusals(place: Workspace) -> None:
    with pytest.raises(Refused, match="no engine 'nothing'"):
        package_engines(place, ["nothing"], SLOW_STEPS, installation=None)
    with pytest.raises(Refused, match="--alias is one name for one engine"):
        shutil.copytree(place.engine("mixtral"), place.engines / "second")
        package_engines(place, ["mixtral", "second"], SLOW_STEPS, alias="ensemble", installation=None)
    package_engines(place, ["mixtral"], SLOW_STEPS, alias="ensemble", installation=None)
    with pytest.raises(Refused, match="--alias mixtral"):
        shutil.rmtree(place.engines / "second")
        shutil.copytree(place.engine("mixtral"), place.engines / "second")
        record = place.engines / "second" / "engine.json"
        data = json.loads(record.read_text()) | {"name": "second"}
        record.unlink()
        record.write_text(json.dumps(data))
        package_engines(place, ["second"], SLOW_STEPS, alias="mixtral", installation=None)


def test_an_engine_that_failed_verify_is_refused(place: Workspace) -> None:
    passport = Passport.open(place.engine("mixtral"))
    from trtbuild.engines.passport import verified_digest

    failed = {"passed": False, "date": "2026-11-22", "failures": ["perplexity +40 %"]}
    data = passport.data | {"accuracy": failed | {"engine_digest": verified_digest(passport.data)}}
    file = place.engine("mixtral") / "engine.json"
    file.unlink()
    file.write_text(json.dumps(data))
    with pytest.raises(Refused, match=r"failed verify on 2026-11-22.*perplexity"):
        package_engines(place, ["mixtral"], SLOW_STEPS, installation=None)
    assert not (place.models / "mixtral").exists()


def test_a_replaced_package_is_swapped_in_one_step(place: Workspace) -> None:
    package_engines(place, ["mixtral"], SLOW_STEPS, installation=None)
    directory = os.open(place.models / "mixtral", os.O_RDONLY)
    try:
        before = os.fstat(directory).st_ino
        package_engines(place, ["mixtral"], WorkerSettings(slots=2), installation=None)
        assert (place.models / "mixtral").stat().st_ino != before
    finally:
        os.close(directory)
    config = read_config(place.models / "mixtral" / "config.pbtxt")
    assert config.parameters["slots"].string_value == "2"
