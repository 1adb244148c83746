"""Generated requests, most of them bad: never a failure of ours, never a hang, and the next good one is answered."""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from front_end import FrontEndProcess, Reply, chat, completion
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode

from trtbuild.triton_repo.openai.app import FrontEnd
from trtbuild.triton_repo.openai.settings import Settings

PATHS = {"/v1/chat/completions": chat, "/v1/completions": completion}
NASTY: list[Any] = [
    None, True, 0, -1, 1, 2**31, 2**63, 10**30, 1.5, -0.0, 1e308, "", "a", "\x00", "\ud800", "x" * 3000, [], {}, [[]],
    {"type": "function"}, ["a", 1], {"a": {"b": {"c": []}}}, "tiny", "tiny-unary", "../etc", [0] * 1000, "null",
]  # fmt: skip
FULL: dict[str, Any] = {
    "temperature": 0.5, "top_p": 0.5, "n": 1, "stream": True, "stream_options": {"include_usage": True}, "stop": ["a"],
    "max_tokens": 4, "seed": 3, "presence_penalty": 0.5, "frequency_penalty": 0.5, "user": "me", "top_k": 3,
    "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 1, "ignore_eos": True, "stop_token_ids": [2],
    "bad_words": ["b"], "logit_bias": None,
}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "$defs": {"a": {}}}}}
FULL_CHAT = FULL | {"logprobs": True, "top_logprobs": 2, "tools": [TOOL], "tool_choice": "required"}


def check(send: Callable[[], Reply]) -> None:
    """One request: its answer is in time, not a failure of ours, and has OpenAI's form where it is an error."""
    start = time.monotonic()
    reply = send()
    assert time.monotonic() - start < 5
    assert reply.status < 500, reply.text[:2000]
    if reply.status >= 400:
        assert reply.error["message"]


def check_alive(server: FrontEndProcess) -> None:
    assert server.complete().json()["choices"][0]["text"] == "Hello world."
    assert server.get("/metrics").text.find("requests_active 0\n") > 0


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a value can be changed: paths into nested objects and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in inner for place in places(one, (*path, key)))]


def changed(body: Any, generator: random.Random) -> Any:
    """With one thing replaced, removed or added."""
    place = generator.choice(places(body))
    if not place:
        return copy.deepcopy(generator.choice(NASTY))
    at = body
    for key in place[:-1]:
        at = at[key]
    action = generator.randrange(3)
    if action == 0:
        del at[place[-1]]
    elif action == 1 and isinstance(at, dict):
        at[generator.choice(["x", "", "é", "__proto__", "type", "a" * 500])] = copy.deepcopy(generator.choice(NASTY))
    else:
        at[place[-1]] = copy.deepcopy(generator.choice(NASTY))
    return body


def broken(data: bytes, generator: random.Random) -> bytes:
    """Bytes that are cut off, doubled or overwritten."""
    at = generator.randrange(len(data))
    action = generator.randrange(3)
    if action == 0:
        return data[:at]
    if action == 1:
        return data[:at] + data[max(0, at - 20) :]
    return data[:at] + bytes(generator.randrange(256) for _ in range(3)) + data[at + 3 :]


def send_changed(server: FrontEndProcess, count: int) -> None:
    generator = random.Random(11)
    for number in range(count):
        path = generator.choice(list(PATHS))
        full = FULL_CHAT if PATHS[path] is chat else FULL
        names = generator.sample(list(full), generator.randrange(len(full)))
        body: Any = json.loads(json.dumps(PATHS[path](**{name: full[name] for name in names})))
        for _ in range(generator.randrange(1, 4)):
            if isinstance(body, dict):
                body = changed(body, generator)
        data = json.dumps(body).encode()
        if number % 4 == 0:
            data = broken(data, generator)
        check(lambda path=path, data=data: server.post(path, data))
        if number % 50 == 49:
            check_alive(server)
    check_alive(server)


def send_generated(server: FrontEndProcess, count: int) -> None:
    """By schemathesis, from our own OpenAPI description; half of them break it on purpose."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", FrontEnd(Settings()).api)
    sent = 0
    for path in PATHS:
        for mode in (GenerationMode.NEGATIVE, GenerationMode.POSITIVE):
            operation: Any = schema[path]["POST"]

            @settings(
                max_examples=count // 4, deadline=None, database=None, derandomize=True,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
            )  # fmt: skip
            @given(case=operation.as_strategy(generation_mode=mode))
            def send(case: Any) -> None:
                nonlocal sent
                sent += 1
                body = case.body
                try:
                    data = body if isinstance(body, bytes) else json.dumps(body).encode()
                except TypeError:
                    data = repr(body).encode()
                method = case.method.upper()
                headers = {"Content-Type": case.media_type or "application/json"}
                check(lambda: server.ask(method, case.path, data, headers))

            send()
            check_alive(server)
    assert sent >= 0.9 * count, sent


def send_random_bytes(server: FrontEndProcess, count: int) -> None:
    @settings(max_examples=count, deadline=None, database=None, derandomize=True)
    @given(path=st.sampled_from(list(PATHS)), data=st.binary(max_size=200))
    def send(path: str, data: bytes) -> None:
        check(lambda: server.post(path, data))

    send()
    check_alive(server)


def test_changed_requests(server: FrontEndProcess) -> None:
    send_changed(server, 200)


def test_random_bytes(server: FrontEndProcess) -> None:
    send_random_bytes(server, 50)


def test_generated_requests(server: FrontEndProcess) -> None:
    send_generated(server, 80)


@pytest.mark.slow
def test_many_bad_requests(server: FrontEndProcess) -> None:
    send_changed(server, 3000)
    send_generated(server, 1200)
    send_random_bytes(server, 500)
