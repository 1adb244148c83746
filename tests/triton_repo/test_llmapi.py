"""The llmapi package in a real Triton, over a stand-in for `tensorrt_llm` with its documented interface."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from llmapi_server import Server, start, with_fake

from trtbuild.errors import Refused, TrtBuildError
from trtbuild.triton_repo.client import TritonClient
from trtbuild.triton_repo.installation import TritonInstallation
from trtbuild.triton_repo.llmapi import LlmapiOptions, package_llmapi
from trtbuild.triton_repo.llmapi_files.llmapi_requests import RequestError, parse_request
from trtbuild.triton_repo.triton_process import Ports, TritonProcess
from trtbuild.workspace import Workspace


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


def test_text_that_is_no_utf8_is_refused() -> None:
    import numpy as np

    with pytest.raises(RequestError, match="text_input: not valid UTF-8 at byte 1"):
        parse_request({"text_input": np.array([[b"a\xff"]], dtype=object)}, True)
