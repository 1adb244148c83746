"""Answers through a real Triton, equal to the scheduler's own; the executor behind them takes 20 ms a step."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.error
import urllib.request
from typing import Any

import jsonschema
import numpy as np
import pytest
import tritonclient.grpc.aio as aio_client
import tritonclient.http as http_client
from fake_worker import TOKENIZER, alone
from served import Service

from trtbuild.engines.serving.request import SamplingParams
from trtbuild.errors import DeadlineExceeded, Refused, Unavailable
from trtbuild.triton_repo.client import Part, TritonClient, tensor_values

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def ask(client: TritonClient, prompt: str, params: SamplingParams, **values: Any) -> list[Part]:
    given = {"text_input": prompt, "stream": True, **tensor_values(params), **values}
    return list(client.stream("mixtral", given, deadline_s=params.deadline_s))


def joined(parts: list[Part]) -> str:
    return "".join(part.text for part in parts)


def test_streams_are_the_schedulers_alone_and_under_load(client: TritonClient) -> None:
    prompts = [f"To be or not {index}, 你好 🙂" for index in range(10)]
    params = [SamplingParams(max_tokens=12 + i, temperature=0.9 * (i % 2), seed=i, ignore_eos=True) for i in range(10)]
    found: dict[int, list[Part]] = {}

    def run(index: int) -> None:
        found[index] = ask(client, prompts[index], params[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(10):
        expected = alone(prompts[index], params[index])
        assert joined(found[index]) == expected.text
        assert len(found[index]) == len(expected.token_ids) == 12 + index
        last = found[index][-1].values
        assert last["finish_reason"].item() == b"length"
        assert last["num_output_tokens"].item() == 12 + index
        assert last["num_input_tokens"].item() == len(TOKENIZER.encode(prompts[index]))


def test_multi_byte_characters_are_never_split(client: TritonClient) -> None:
    # The executor draws byte tokens at random: most of them make no character, and none may be shown half.
    parts = ask(client, "东海", SamplingParams(max_tokens=200, temperature=1.0, seed=11, ignore_eos=True))
    assert (
        joined(parts) == alone("东海", SamplingParams(max_tokens=200, temperature=1.0, seed=11, ignore_eos=True)).text
    )
    assert any(not part.text for part in parts), "no token was held back: the test shows nothing"


def test_stop_strings_across_tokens_are_not_emitted(client: TritonClient) -> None:
    params = SamplingParams(max_tokens=60, temperature=0.8, seed=5, ignore_eos=True)
    whole = alone("Once", params).text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 6]
    parts = ask(client, "Once", params, stop_words=[stop])
    assert joined(parts) == whole[: whole.index(stop)]
    assert parts[-1].values["finish_reason"].item() == b"stop"


def test_log_probabilities(client: TritonClient) -> None:
    params = SamplingParams(max_tokens=6, logprobs=3, ignore_eos=True)
    expected = alone("Log", params)
    parts = ask(client, "Log", params, return_log_probs=True)
    per_token = [json.loads(part.values["token_logprobs"].item())[0] for part in parts]
    assert [one["token_id"] for one in per_token] == expected.token_ids
    assert [one["logprob"] for one in per_token] == pytest.approx(expected.logprobs)
    assert all(len(one["top"]) == 3 and one["top"][0]["logprob"] >= one["logprob"] - 1e-6 for one in per_token)
    found = [part.values["output_log_probs"].item() for part in parts]
    assert found == pytest.approx(expected.logprobs, rel=1e-5)
    assert parts[-1].values["cum_log_probs"].item() == pytest.approx(sum(found), rel=1e-5)


def test_one_response_without_stream(client: TritonClient) -> None:
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    question = {"text_input": "Say", **tensor_values(params)}
    (streamed,) = client.stream("mixtral", question)
    unary = client.ask("mixtral-unary", question)
    assert streamed.text == unary.text == alone("Say", params).text
    with_input = client.ask("mixtral-unary", {**question, "exclude_input_in_output": False})
    assert with_input.text == "Say" + unary.text


def test_token_level_model(client: TritonClient) -> None:
    params = SamplingParams(max_tokens=7, ignore_eos=True)
    expected = alone([5, 6, 7], params).token_ids
    question = {"input_ids": [5, 6, 7, 99], "input_lengths": 3, **tensor_values(params, "tokens")}
    (whole,) = client.stream("mixtral-tokens", question)
    assert whole.values["output_ids"].tolist() == [[[5, 6, 7, *expected]]]
    streamed = client.stream("mixtral-tokens", {**question, "streaming": True, "exclude_input_in_output": True})
    assert [part.values["output_ids"].item() for part in streamed] == expected


def test_bad_words_of_the_token_level_model_are_not_generated(client: TritonClient) -> None:
    params = SamplingParams(max_tokens=7, ignore_eos=True)
    first = alone([5, 6, 7], params).token_ids[0]
    question = {"input_ids": [5, 6, 7], "bad_words_list": [[first], [1]], **tensor_values(params, "tokens")}
    (whole,) = client.stream("mixtral-tokens", question)
    assert first not in whole.values["output_ids"].reshape(-1).tolist()[3:]


def test_several_sequences_take_seeds_in_order(client: TritonClient) -> None:
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=40, ignore_eos=True)
    question = {"text_input": "Many", "num_return_sequences": 3, **tensor_values(params)}
    expected = [
        alone("Many", SamplingParams(max_tokens=6, temperature=1.0, seed=40 + i, ignore_eos=True)).text
        for i in range(3)
    ]
    answer = client.ask("mixtral-unary", question).values["text_output"]
    assert [text.decode() for text in answer.reshape(-1)] == expected
    streamed: dict[int, str] = {0: "", 1: "", 2: ""}
    for part in client.stream("mixtral", {**question, "stream": True}):
        streamed[part.values["sequence_index"].item()] += part.text
    assert list(streamed.values()) == expected


def texts_of(answer: Any) -> list[str]:
    return [text.decode() for text in answer.as_numpy("text_output").reshape(-1)]


def test_the_public_clients(service: Service) -> None:
    """tritonclient's http, grpc and aio clients, with and without the binary extension, and batches."""
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    prompts = ["One", "Two words"]
    expected = [alone(prompt, params).text for prompt in prompts]
    tensors = {
        "text_input": np.array([[p.encode()] for p in prompts], dtype=object),
        "max_tokens": np.full((2, 1), 5, np.int32),
        "ignore_eos": np.full((2, 1), True),
    }
    for binary in (True, False):
        with http_client.InferenceServerClient(service.http.removeprefix("http://")) as http:
            inputs = [
                http_client.InferInput(
                    name, list(array.shape), {"text_input": "BYTES", "max_tokens": "INT32"}.get(name, "BOOL")
                )
                for name, array in tensors.items()
            ]
            for given, array in zip(inputs, tensors.values(), strict=True):
                given.set_data_from_numpy(array, binary_data=binary)
            answer = http.infer("mixtral-unary", inputs)
            assert texts_of(answer) == expected

    async def aio() -> list[list[str]]:
        async with aio_client.InferenceServerClient(service.url) as client:
            inputs = []
            for name, array in tensors.items():
                kind = {"text_input": "BYTES", "max_tokens": "INT32"}.get(name, "BOOL")
                inputs.append(aio_client.InferInput(name, list(array.shape), kind))
                inputs[-1].set_data_from_numpy(array)
            answers = await asyncio.gather(*(client.infer("mixtral-unary", inputs) for _ in range(3)))
            return [texts_of(answer) for answer in answers]

    assert asyncio.run(aio()) == [expected] * 3


def post(service: Service, path: str, body: dict[str, Any] | bytes) -> tuple[int, str]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(f"{service.http}/v2/models/{path}", data=data, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_generate_and_generate_stream(service: Service) -> None:
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    body = {"text_input": "Curl", "max_tokens": 6, "ignore_eos": True}
    expected = alone("Curl", params).text
    for model in ("mixtral", "mixtral-unary"):
        status, text = post(service, f"{model}/generate", body)
        assert (status, json.loads(text)["text_output"]) == (200, expected)
    status, text = post(service, "mixtral/generate_stream", {**body, "stream": True})
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]
    assert (status, "".join(event["text_output"] for event in events), len(events)) == (200, expected, 6)


def test_json_schema(client: TritonClient) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    params = SamplingParams(max_tokens=200, temperature=1.0, seed=1, guide_type="json_schema", guide=json.dumps(schema))
    parts = ask(client, "JSON", params)
    assert parts[-1].values["finish_reason"].item() == b"stop"
    jsonschema.validate(json.loads(joined(parts)), schema)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"text_input": ""}, "text_input: the prompt is empty"),
        ({"max_tokens": -3}, "max_tokens -3"),
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"beam_width": 2}, "beam_width 2"),
        ({"num_return_sequences": 0}, "num_return_sequences 0"),
        ({"messages": "[]"}, "messages: must be a JSON list of at least one object"),
        ({"text_input": "", "messages": "[{"}, "messages: not JSON"),
        ({"input_ids": [1, 2]}, "one prompt is needed"),
        ({"text_input": "", "input_ids": [5000]}, "token id 5000"),
        ({"text_input": "", "input_ids": [7] * 401}, "401 tokens, at most 399"),
        ({"tools": '[{"type": "function"}]'}, "tools: needs messages"),
        ({"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": "{"}, "guide"),
        ({"stop_words": [""]}, "stop ('',)"),
    ],
)
def test_bad_requests_are_refused_by_name(client: TritonClient, values: dict[str, Any], names: str) -> None:
    with pytest.raises(Refused) as refused:
        list(client.stream("mixtral", {"text_input": "ok", "max_tokens": 2, "stream": True, **values}))
    assert names in refused.value.message


def test_what_triton_itself_refuses_or_lets_through(service: Service, client: TritonClient) -> None:
    # What does not parse, Triton (2.51) calls its own failure.
    for body, code, names in (
        (b"{", 500, "json"),
        ({"max_tokens": 3}, 400, "text_input"),
        ({"text_input": "x", "max_tokens": "three"}, 500, "integer"),
        ({"text_input": "x", "max_token": 3}, 400, "did you mean max_tokens?"),
        ({"text_input": 5}, 500, "string"),
        (b'{"text_input": "\xff\xfe"}', 400, "utf-8"),
    ):
        status, text = post(service, "mixtral/generate", body)
        assert status == code, text
        assert names in text.lower()
    # Over gRPC: Triton's HTTP server of this release dies of it (CVE-2025-23310), and `serve` starts it again.
    with pytest.raises(Refused, match="at most 399"):
        ask(client, "word " * 2_000_000, SamplingParams(max_tokens=2))
    assert (
        joined(ask(client, "Still", SamplingParams(max_tokens=3))) == alone("Still", SamplingParams(max_tokens=3)).text
    )


def test_a_closed_stream_frees_its_slot(service: Service, client: TritonClient) -> None:
    long = {"text_input": "Long", "max_tokens": 390, "stream": True, "ignore_eos": True}
    cancelled = service.wait_for_metrics(requests_active=0)["requests_cancelled_total"]
    for _ in range(6):
        stream = client.stream("mixtral", long)
        next(stream)
        stream.close()
    found = service.wait_for_metrics(requests_active=0, slots_used=0, requests_cancelled_total=cancelled + 6)
    assert found["engine_up"] == 1


def test_a_full_queue_is_unavailable_at_once(service: Service, client: TritonClient) -> None:
    """4 slots and 8 places to wait: the 13th is told to come again, by the status 503 of HTTP's infer."""
    long = {"text_input": "Long", "max_tokens": 390, "stream": True, "ignore_eos": True}
    held = [client.stream("mixtral", long) for _ in range(12)]
    threads = [threading.Thread(target=next, args=(stream,), daemon=True) for stream in held]
    for thread in threads:
        thread.start()
    service.wait_for_metrics(requests_active=4, requests_waiting=8)
    started = time.monotonic()
    with pytest.raises(Unavailable, match="8"):
        list(client.stream("mixtral", long))
    assert time.monotonic() - started < 1
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "data": ["x"]}
    status, text = post(service, "mixtral-unary/infer", {"inputs": [tensor]})
    assert (status, "unavailable: " in text) == (503, True)
    # The generate endpoint (2.51) calls every error a bad request.
    status, text = post(service, "mixtral/generate", {"text_input": "x", "max_tokens": 2})
    assert (status, "unavailable: " in text) == (400, True)
    for thread, stream in zip(threads, held, strict=True):
        if not thread.is_alive():
            stream.close()
    # The next ones get their slots, and are closed in turn.
    while any(thread.is_alive() for thread in threads):
        for thread, stream in zip(threads, held, strict=True):
            if not thread.is_alive():
                stream.close()
        time.sleep(0.05)
    for stream in held:
        stream.close()
    service.wait_for_metrics(requests_active=0, requests_waiting=0)


def test_a_deadline_ends_a_request(service: Service, client: TritonClient) -> None:
    params = SamplingParams(max_tokens=300, ignore_eos=True, deadline_s=0.5)
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        ask(client, "Late", params)
    assert 0.4 < time.monotonic() - started < 3
    service.wait_for_metrics(requests_active=0)
