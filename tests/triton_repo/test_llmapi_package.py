"""What `trtbuild package --llmapi` writes, what it takes, and what it refuses by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import text_format
from helpers import TINY_MIXTRAL
from llmapi_server import export
from tritonclient.grpc import model_config_pb2

from trtbuild.errors import Refused
from trtbuild.inventory import inventory
from trtbuild.triton_repo.llmapi import LlmapiOptions, package_llmapi
from trtbuild.triton_repo.llmapi_files.llmapi_requests import INPUTS
from trtbuild.triton_repo.serve import ServeOptions, models_to_load
from trtbuild.triton_repo.tensors import TEXT_INPUTS, TEXT_OUTPUTS
from trtbuild.workspace import Workspace


def test_the_package_is_complete_and_known_to_the_other_commands(tmp_path: Path, mixtral: Path) -> None:
    """Hard links of the weights; config.pbtxt has our text model's tensors; list and serve know it."""
    place = Workspace(tmp_path)
    done = package_llmapi(place, mixtral, "mix", LlmapiOptions(moe_ep=2, tp=2))
    assert done.quantization is None and any("not installed here" in note for note in done.notes)
    model = place.models / "mix"
    config: Any = text_format.Parse((model / "config.pbtxt").read_text(), vars(model_config_pb2)["ModelConfig"]())
    assert config.name == "mix" and config.backend == "python" and config.model_transaction_policy.decoupled
    inputs = {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in config.input}
    ours = {tensor.name: tensor for tensor in TEXT_INPUTS}
    for tensor in INPUTS:
        assert tensor.name in ours and (tensor.dtype, tensor.dims) == (ours[tensor.name].dtype, ours[tensor.name].dims)
        assert tensor.name in inputs
    assert {tensor.name for tensor in config.output} <= {tensor.name for tensor in TEXT_OUTPUTS}
    links = model / "1" / "checkpoint"
    assert (links / "model-00001-of-00002.safetensors").samefile(mixtral / "model-00001-of-00002.safetensors")
    assert yaml.safe_load((model / "1" / "model.yaml").read_text())["moe_expert_parallel_size"] == 2
    assert [item.name for item in inventory(place) if item.stage == "triton_repo"] == ["mix"]
    assert models_to_load(ServeOptions(place.models, ("mix",))) == ["mix"]
    package_llmapi(place, mixtral, "mix")
    assert yaml.safe_load((model / "1" / "model.yaml").read_text())["tensor_parallel_size"] == 1


@pytest.mark.parametrize(
    ("precision", "scheme", "family", "found"),
    [
        ("fp8", "modelopt", "llama", "FP8"),
        ("int4", "modelopt", "llama", "W4A16_AWQ"),
        ("int8", "modelopt", "mixtral", "W8A16"),
        ("fp8-dynamic", "compressed-tensors", "llama", "compressed-tensors"),
        ("bf16", "compressed-tensors", "llama", None),
    ],
)
def test_takes_what_tensorrt_llm_reads(
    precision: Any, scheme: Any, family: str, found: str | None, tmp_path: Path
) -> None:
    directory = export(tmp_path, precision, scheme, family)
    assert package_llmapi(Workspace(tmp_path), directory).quantization == found


@pytest.mark.parametrize("precision", ["fp8", "int8", "int4"])
def test_refuses_what_tensorrt_llm_does_not_read(precision: Any, tmp_path: Path) -> None:
    directory = export(tmp_path, precision, "compressed-tensors")
    with pytest.raises(Refused, match=r"not read by TensorRT-LLM; export it again: .*--scheme modelopt"):
        package_llmapi(Workspace(tmp_path), directory)
    assert not (tmp_path / "triton_repo" / "models" / "tensorrt_llm").exists()


def test_refuses_a_model_that_tensorrt_llm_has_not(tmp_path: Path) -> None:
    directory = export(tmp_path, "bf16", "modelopt", "deepseek_v2")
    with pytest.raises(Refused, match="has no DeepseekV2ForCausalLM"):
        package_llmapi(Workspace(tmp_path), directory)


def test_refuses_other_methods_layouts_and_places(tmp_path: Path, mixtral: Path) -> None:
    awq = TINY_MIXTRAL.parent / "tiny-quantized" / "awq-mixtral"
    place = Workspace(tmp_path)
    with pytest.raises(Refused) as raised:
        package_llmapi(place, awq, options=LlmapiOptions(tp=3, arguments={"model": "x"}))
    assert all(part in raised.value.message for part in ("no tokenizer", "'awq'", "--tp 3", "model is not for further"))
    with pytest.raises(Refused, match="no such directory"):
        package_llmapi(place, tmp_path / "none")
    (place.models / "taken").mkdir(parents=True)
    with pytest.raises(Refused, match="is another model"):
        package_llmapi(place, mixtral, "taken")


def test_command_line(tmp_path: Path, mixtral: Path) -> None:
    """`package DIR --llmapi`: fields of ours and any further argument of the LLM API."""
    from click.testing import CliRunner

    from trtbuild.cli import main

    words = ["package", str(mixtral), "--llmapi", "--alias", "chat", "--workspace", str(tmp_path)]
    flags = ["--trtllm", "tp=2", "--trtllm", "max_num_tokens=512", "--trtllm", 'load_format="auto"']
    result = CliRunner().invoke(main, [*words, *flags])
    assert result.exit_code == 0, result.output
    assert "no engine was built" in result.output
    content = (tmp_path / "triton_repo" / "models" / "chat" / "1" / "model.yaml").read_text(encoding="utf-8")
    for line in ("tensor_parallel_size: 2", "max_num_tokens: 512", "load_format: auto"):
        assert line in content
    for wrong, message in (("tp=two", "tp: Input should be a valid integer"), ("tp", "must be NAME=VALUE")):
        refused = CliRunner().invoke(main, [*words, "--trtllm", wrong])
        assert refused.exit_code == 3
        assert message in refused.output


def test_flags_that_llmapi_does_not_read_are_refused_by_name(tmp_path: Path, mixtral: Path) -> None:
    from click.testing import CliRunner

    from trtbuild.cli import main

    words = ["package", str(mixtral), "--llmapi", "--workspace", str(tmp_path)]
    others = ["--prefix", "a", "--engine-path", "/x", "--k8s", "k8s", "--max-queue", "256", "--no-check"]
    refused = CliRunner().invoke(main, [*words, *others])
    assert refused.exit_code == 3
    assert "--max-queue, --no-check, --prefix, --engine-path, --k8s: not for --llmapi" in refused.output
    assert not (tmp_path / "triton_repo").exists()


def test_parameters_of_the_five_models_are_not_arguments_of_the_llm_api() -> None:
    with pytest.raises(Refused) as raised:
        LlmapiOptions.from_texts(["kv_cache_free_gpu_mem_fraction=0.5", "gpu_device_ids=0,1", "tp"])
    for part in ("with --llmapi it is kv_cache_fraction", "gpu_device_ids is of the five-model", "tp: must be NAME=V"):
        assert part in raised.value.message
    options = LlmapiOptions.from_texts(["max_batch_size=4", "decoupled=false", "max_beam_width=2"])
    assert (options.max_batch_size, options.decoupled, options.arguments) == (4, False, {"max_beam_width": 2})


def test_a_replaced_model_is_named(tmp_path: Path, mixtral: Path) -> None:
    place, other = Workspace(tmp_path), export(tmp_path / "model", "fp8", "modelopt")
    first = package_llmapi(place, mixtral)
    again = package_llmapi(place, mixtral)
    assert not any("replaced" in note for note in (*first.notes, *again.notes))
    assert any(f"replaced the model of that name over {mixtral}" in n for n in package_llmapi(place, other).notes)


@pytest.mark.parametrize(
    ("file", "message"), [("trtbuild.json", "trtbuild export mine --scheme modelopt"), ("engine.json", "is an engine")]
)
def test_our_own_directories_are_not_taken_for_hugging_faces(file: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in (file, "config.json"):
        (tmp_path / "mine" / name).write_text("{}")
    with pytest.raises(Refused, match=message):
        package_llmapi(Workspace(tmp_path), tmp_path / "mine")
