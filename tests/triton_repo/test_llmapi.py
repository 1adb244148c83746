"""The llmapi package in a real Triton, over a stand-in for `tensorrt_llm` with its documented interface."""

from __future__ import annotations

import json
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from exporting import WIDE, Case, converted
from google.protobuf import text_format
from helpers import TINY_MIXTRAL
from tritonclient.grpc import model_config_pb2

from trtbuild.engines.export.export import Companions, SchemeName, export_checkpoint
from trtbuild.errors import Refused, TrtBuildError
from trtbuild.inventory import inventory
from trtbuild.triton_repo.client import TritonClient
from trtbuild.triton_repo.installation import PATHS_VARIABLE, TritonInstallation
from trtbuild.triton_repo.llmapi import LlmapiOptions, package_llmapi
from trtbuild.triton_repo.llmapi_files.llmapi_requests import INPUTS, RequestError, parse_request
from trtbuild.triton_repo.serve import ServeOptions, models_to_load
from trtbuild.triton_repo.tensors import TEXT_INPUTS, TEXT_OUTPUTS
from trtbuild.triton_repo.triton_process import Ports, TritonProcess
from trtbuild.workspace import Workspace

FAKE = Path(__file__).parent / "fake_llmapi"


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: a hard link changes the file's ctime, by which other tests would see the bundled one as touched."""
    return Path(shutil.copytree(TINY_MIXTRAL, tmp_path_factory.mktemp("hf") / "tiny-mixtral"))


def with_fake(installation: TritonInstallation) -> TritonInstallation:
    """A Triton whose Python finds the stand-in first."""
    paths = os.pathsep.join([str(FAKE), installation.environment[PATHS_VARIABLE]])
    return replace(installation, environment={**installation.environment, PATHS_VARIABLE: paths})


def export(folder: Path, precision: Any, scheme: SchemeName, family: str = "llama") -> Path:
    checkpoint, source = converted(folder, Case(family, precision, changes=WIDE))
    (source / "tokenizer.json").write_text("{}")
    return export_checkpoint(checkpoint, Companions((source,)), folder / "export", scheme).directory


class Server:
    """Triton over one llmapi package; `log` is what the stand-in was asked."""

    def __init__(self, process: TritonProcess, ports: Ports, log: Path) -> None:
        self.process, self.ports, self._log = process, ports, log

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    def generate(self, **fields: Any) -> dict[str, Any]:
        """Triton's own generate endpoint."""
        url = f"http://127.0.0.1:{self.ports.http}/v2/models/tensorrt_llm/generate"
        request = urllib.request.Request(url, json.dumps(fields).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.loads(answer.read())


def start(folder: Path, installation: TritonInstallation, options: LlmapiOptions, patch: pytest.MonkeyPatch) -> Server:
    place = Workspace(folder)
    package_llmapi(place, export(folder / "model", "fp8", "modelopt"), options=options)
    patch.setenv("FAKE_LLMAPI_LOG", str(folder / "log.jsonl"))
    patch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    ports = Ports.free()
    process = TritonProcess(with_fake(installation), place.models, ports, ["--disable-auto-complete-config"])
    process.wait_ready(60)
    return Server(process, ports, folder / "log.jsonl")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, triton: TritonInstallation) -> Iterator[Server]:
    options = LlmapiOptions(
        tp=2, max_num_tokens=4096, kv_cache_fraction=0.8, guided_decoding_backend="xgrammar",
        arguments={"trust_remote_code": False},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        started = start(tmp_path_factory.mktemp("llmapi"), triton, options, patch)
        yield started
        started.process.stop()
        assert started.process.process.wait(timeout=30) == 0
        assert started.log[-1] == {"shutdown": True}
        started.process.close()


@pytest.fixture
def client(server: Server) -> Iterator[TritonClient]:
    with TritonClient(f"127.0.0.1:{server.ports.grpc}") as connected:
        yield connected


def ask(client: TritonClient, **values: Any) -> list[Any]:
    return list(client.stream("tensorrt_llm", values))


def test_the_llm_gets_what_model_yaml_says(server: Server) -> None:
    loaded = server.log[0]
    assert loaded["arguments"] == {
        "backend": "pytorch", "tensor_parallel_size": 2, "pipeline_parallel_size": 1, "max_num_tokens": 4096,
        "guided_decoding_backend": "xgrammar", "kv_cache_config": {"free_gpu_memory_fraction": 0.8},
        "trust_remote_code": False,
    }  # fmt: skip
    assert {"config.json", "hf_quant_config.json", "model.safetensors", "tokenizer.json"} <= set(loaded["model"])
    assert loaded["mpi"] == []


def test_answers_whole(client: TritonClient) -> None:
    [part] = ask(client, text_input="one two three", max_tokens=2)
    assert part.text == "three two"
    values = {name: value.tolist() for name, value in part.values.items()}
    assert values["finish_reason"] == [[b"length"]]
    assert (values["num_input_tokens"], values["num_output_tokens"], values["sequence_length"]) == ([[3]], [[2]], [[2]])


def test_streams_word_by_word(client: TritonClient) -> None:
    """New text only, as it comes, characters of several bytes whole."""
    parts = ask(client, text_input="a Grüße 日本 z", stream=True)
    assert [part.text for part in parts] == ["z", " 日本", " Grüße", " a"]
    times = [part.received_at for part in parts]
    assert all(0.005 < later - earlier < 0.5 for earlier, later in pairwise(times))
    assert "finish_reason" not in parts[0].values
    assert parts[-1].values["finish_reason"].tolist() == [[b"stop"]]
    assert parts[-1].values["num_output_tokens"].tolist() == [[4]]


def test_several_sequences_streamed_and_whole(client: TritonClient) -> None:
    [whole] = ask(client, text_input="a b", num_return_sequences=2)
    assert whole.values["text_output"].tolist() == [[b"b a", b"b a"]]
    parts = ask(client, text_input="a b", num_return_sequences=2, stream=True)
    texts = {0: "", 1: ""}
    for part in parts:
        texts[int(part.values["sequence_index"][0, 0])] += part.text
    assert texts == {0: "b a", 1: "b a"}
    assert sum("finish_reason" in part.values for part in parts) == 2


def test_every_parameter_arrives(server: Server, client: TritonClient) -> None:
    ask(
        client, text_input="x", max_tokens=9, temperature=0.5, top_k=3, top_p=0.75, min_p=0.25, seed=2**63 + 1,
        repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=-0.5, min_tokens=2, ignore_eos=True, end_id=4,
        stop_words=["a", "b"], bad_words=["c"], stop_token_ids=[5, 6], guided_decoding_guide_type="regex",
        guided_decoding_guide="[0-9]",
    )  # fmt: skip
    given = {name: value for name, value in server.log[-1]["params"].items() if value is not None}
    guide = given.pop("guided_decoding")
    assert guide["regex"] == "[0-9]" and guide["json"] is None
    assert given == {
        "max_tokens": 9, "temperature": 0.5, "top_k": 3, "top_p": 0.75, "min_p": 0.25, "seed": 2**63 + 1,
        "repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": -0.5, "min_tokens": 2,
        "ignore_eos": True, "end_id": 4, "stop": ["a", "b"], "bad": ["c"], "stop_token_ids": [5, 6], "n": 1,
        "add_special_tokens": True,
    }  # fmt: skip


def test_temperature_zero_is_greedy(server: Server, client: TritonClient) -> None:
    ask(client, text_input="x", temperature=0.0, top_p=0.5)
    params = server.log[-1]["params"]
    assert (params["temperature"], params["top_k"], params["top_p"]) == (None, 1, None)


def test_messages_go_through_the_chat_template(server: Server, client: TritonClient) -> None:
    messages = [{"role": "user", "content": "hello there"}]
    [part] = ask(client, text_input="", messages=json.dumps(messages), tools=json.dumps([{"type": "function"}]))
    assert part.text == "there hello <user> 1] [tools"
    assert server.log[-1]["params"]["add_special_tokens"] is False


def test_token_ids_and_log_probabilities(server: Server, client: TritonClient) -> None:
    [part] = ask(client, input_ids=[11, 12, 13], return_log_probs=True)
    assert server.log[-1]["inputs"] == [11, 12, 13]
    assert part.values["output_log_probs"].tolist() == [[[-0.5, -1.0, -1.5]]]
    assert part.values["cum_log_probs"].tolist() == [[-3.0]]


def test_the_input_is_repeated_where_it_is_wanted(client: TritonClient) -> None:
    parts = ask(client, text_input="a b ", exclude_input_in_output=False, stream=True)
    assert [part.text for part in parts] == ["a b b", " a"]


def test_tensorrt_llms_own_names_are_taken(server: Server) -> None:
    """As its llmapi model has them, by the generate endpoint; in one request both names contradict each other."""
    answer = server.generate(text_input="one two three", sampling_param_max_tokens=1, streaming=False)
    assert answer["text_output"] == "three"
    with pytest.raises(urllib.error.HTTPError) as raised:
        server.generate(text_input="x", max_tokens=1, sampling_param_max_tokens=1)
    assert "max_tokens and sampling_param_max_tokens are the same" in raised.value.read().decode()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_input": ""}, "text_input: the prompt is empty"),
        ({"text_input": "x", "max_tokens": 0}, "max_tokens 0: must be at least 1"),
        ({"text_input": "x", "temperature": -1.0}, "temperature -1: must not be negative"),
        ({"text_input": "x", "top_p": 2.0}, "require 0 <= top_p <= 1"),
        ({"text_input": "x", "messages": "[{}]"}, "text_input must be empty where messages"),
        ({"text_input": "", "messages": "{"}, "messages: not JSON"),
        ({"text_input": "x", "num_return_sequences": 200}, "num_return_sequences 200"),
        ({"text_input": "x", "guided_decoding_guide_type": "poem"}, "guided_decoding_guide_type 'poem'"),
        ({"text_input": "x", "guided_decoding_guide_type": "regex"}, "guided_decoding_guide: is empty"),
        ({"text_input": "x", "tools": '[{"a": 1}]'}, "tools: needs messages"),
    ],
)
def test_bad_values_are_refused_by_name(client: TritonClient, values: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message.replace("[", r"\[")):
        ask(client, **values)


def test_unknown_fields_are_refused(server: Server) -> None:
    with pytest.raises(urllib.error.HTTPError) as raised:
        server.generate(text_input="x", max_token=3)
    assert "unknown field max_token (did you mean max_tokens?)" in raised.value.read().decode()


def test_a_failing_generation_is_an_error_and_the_next_answers(client: TritonClient) -> None:
    for stream in (True, False):
        with pytest.raises(TrtBuildError, match="the GPU is on fire"):
            ask(client, text_input="please explode", stream=stream)
    assert ask(client, text_input="a b")[0].text == "b a"


def test_requests_run_beside_each_other(client: TritonClient) -> None:
    prompt = " ".join("abcdefghij")
    alone = time.perf_counter()
    ask(client, text_input=prompt)
    alone = time.perf_counter() - alone
    many = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(client, text_input=prompt, stream=True), range(8)))
    assert time.perf_counter() - many < 4 * alone
    assert {"".join(part.text for part in parts) for parts in answers} == {"j i h g f e d c b a"}


def test_a_client_that_goes_away_aborts_its_generation(server: Server, client: TritonClient) -> None:
    stream = client.stream("tensorrt_llm", {"text_input": "w " * 200, "max_tokens": 200, "stream": True})
    next(stream)
    stream.close()
    deadline = time.monotonic() + 5
    while "aborted_after" not in server.log[-1]:
        assert time.monotonic() < deadline, server.log[-2:]
        time.sleep(0.05)
    assert server.log[-1]["aborted_after"] < 100


def test_without_streaming_a_plain_infer_answers(
    tmp_path: Path, triton: TritonInstallation, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(tmp_path, triton, LlmapiOptions(decoupled=False), monkeypatch)
    try:
        with TritonClient(f"127.0.0.1:{server.ports.grpc}") as client:
            assert client.ask("tensorrt_llm", {"text_input": "a b c"}).text == "c b a"
            with pytest.raises(Refused, match="packaged without streaming"):
                client.ask("tensorrt_llm", {"text_input": "a b c", "stream": True})
    finally:
        server.process.close()


def test_a_model_yaml_that_is_wrong_fails_the_load_and_says_why(
    tmp_path: Path, triton: TritonInstallation, monkeypatch: pytest.MonkeyPatch, mixtral: Path
) -> None:
    place = Workspace(tmp_path)
    wrong: dict[str, tuple[dict[str, Any], str]] = {
        "unknown": ({"max_batchsize": 3}, "max_batchsize: Extra inputs are not permitted"),
        "other": ({"triton_config": {"decoupled": False}}, "triton_config.decoupled is False"),
        "misspelt": ({"triton_config": {"decoupeld": True}}, "triton_config has no 'decoupeld'"),
    }
    for name, (change, _) in wrong.items():
        package_llmapi(place, mixtral, name)
        file = place.models / name / "1" / "model.yaml"
        file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | change))
    monkeypatch.setenv("FAKE_LLMAPI_LOG", str(tmp_path / "log.jsonl"))
    with (
        TritonProcess(with_fake(triton), place.models, Ports.free()) as process,
        pytest.raises(TrtBuildError) as raised,
    ):
        process.wait_ready(60)
    for name, (_, message) in wrong.items():
        assert f"{name}: " in raised.value.message and message in raised.value.message


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


def test_text_that_is_no_utf8_is_refused() -> None:
    import numpy as np

    with pytest.raises(RequestError, match="text_input: not valid UTF-8 at byte 1"):
        parse_request({"text_input": np.array([[b"a\xff"]], dtype=object)}, True)


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
