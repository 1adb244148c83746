"""Every error has OpenAI's body and the right status, and the server answers the next good request."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from fake_triton import FakeTriton, Script
from front_end import FrontEndProcess, chat, completion, events_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

BAD_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [{"role": "king", "content": "Hi"}]}, "messages[0].role"),
    ({"messages": [USER | {"contents": 1}]}, "messages[0].contents"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages[0]."),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [USER | {"tool_calls": []}]}, "messages[0].tool_calls"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 2**31}, "max_tokens"),
    ({"max_tokens": 10**400}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
    ({"max_tokens": 1, "min_tokens": 2}, "min_tokens"),
    ({"n": 0}, "n"),
    ({"seed": 2**64}, "seed"),
    ({"top_p": 0}, "top_p"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["a"] * 33}, "stop"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"made_up": 1}, "made_up"),
    ({"logit_bias": {"5": 1.0}}, "logit_bias"),
    ({"store": True}, "store"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"tools": [TOOL, TOOL]}, "tools"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"model": ""}, "model"),
]
BAD_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [""]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"echo": True}, "echo"),
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"logprobs": 21}, "logprobs"),
]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [(CHAT, chat(**bad), param) for bad, param in BAD_CHAT]
    + [(COMPLETIONS, completion(**bad), param) for bad, param in BAD_COMPLETIONS],
)
def test_refused(server: FrontEndProcess, triton: FakeTriton, path: str, body: Any, param: str) -> None:
    reply = server.post(path, body)
    assert reply.status == 400, reply.text
    assert reply.error["type"] == "invalid_request_error"
    assert reply.error["param"].startswith(param), reply.error
    assert param.split("[", maxsplit=1)[0] in reply.error["message"]
    assert len(reply.text) < 4000
    assert triton.seen == []


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe{}", b'{"model": "tiny", "prompt": "\xff"}', b"[" * 100_000,
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}', b'{"model": "tiny", "prompt": "a", "top_p": 1e999}',
        b'{"model": "tiny", "prompt": "half a pair \\ud83d"}', b'{"model": "tiny", "prompt": "a", "\\udc00": 1}',
        b'{"model": "\\ud83d", "prompt": "a"}', b'{"model": "tiny", "prompt": "a", "stop": ["\\ud83d"]}',
        b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
def test_broken_bodies(server: FrontEndProcess, body: bytes) -> None:
    reply = server.post(COMPLETIONS, body)
    assert reply.status in {400, 404}, reply.text
    assert reply.error["message"]
    assert server.complete().status == 200


def test_surrogates_deep_in_free_fields(server: FrontEndProcess) -> None:
    schema = {"type": "object", "properties": {"\ud83d": {}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    for options in (
        {"tools": tools},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
        {"messages": [{"role": "user", "content": "\ud83d"}]},
    ):
        assert server.chat(**options).status == 400


def test_unknown_paths_and_methods(server: FrontEndProcess) -> None:
    assert server.get("/v1/nothing").status == 404
    assert server.get("/v1/nothing").error["type"] == "invalid_request_error"
    assert server.get(CHAT).status == 405
    assert server.get(CHAT).error["message"]


def test_only_json_is_taken(server: FrontEndProcess) -> None:
    body = json.dumps(completion()).encode()
    for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        reply = server.ask("POST", COMPLETIONS, body, {"Content-Type": content_type})
        assert reply.status == 415 and "application/json" in reply.error["message"]
    assert server.ask("POST", COMPLETIONS, body, {"Content-Type": "Application/JSON; charset=utf-8"}).status == 200


def test_unknown_model_names_those_there_are(server: FrontEndProcess) -> None:
    with pytest.raises(openai.NotFoundError, match="other, tiny") as caught:
        server.client().completions.create(model="gpt-4", prompt="a")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("message", "status", "code", "retry"),
    [
        ("refused: the prompt has 900 tokens; at most 512", 400, "invalid_value", False),
        ("[request id: abc] refused: no", 400, "invalid_value", False),
        ("unavailable: the queue is full: 8 requests wait, --max-queue 8", 429, "rate_limit_exceeded", True),
        ("unavailable: the engine worker is being started again; retry", 503, "service_unavailable", True),
        ("timeout: not done within 2 s", 408, "timeout", False),
        ("failed: a rank died", 500, None, False),
        ("something else", 500, None, False),
        ("Stub process 'tiny_0_0' is not healthy.", 503, "service_unavailable", True),
    ],
)
def test_errors_out_of_triton_before_the_first_token(
    server: FrontEndProcess, triton: FakeTriton, message: str, status: int, code: str | None, retry: bool, stream: bool
) -> None:
    triton.script = lambda _: Script([], error=message)
    reply = server.chat(stream=stream)
    assert (reply.status, reply.error["code"]) == (status, code)
    assert ("retry-after" in reply.headers) == retry
    # The kind is in the status; the message is the worker's own.
    assert reply.error["message"].endswith(message.rpartition(": ")[2])
    assert "refused: " not in reply.error["message"]


def test_the_client_gets_its_own_exceptions(server: FrontEndProcess, triton: FakeTriton) -> None:
    triton.script = lambda _: Script([], error="unavailable: the queue is full")
    with pytest.raises(openai.RateLimitError):
        server.client().completions.create(model="tiny", prompt="a")
    triton.script = lambda _: Script([], error="refused: no")
    with pytest.raises(openai.BadRequestError):
        server.client().completions.create(model="tiny", prompt="a")


def test_an_error_amid_a_stream_is_an_event(server: FrontEndProcess, triton: FakeTriton) -> None:
    triton.script = lambda _: Script(["a", "b"], error="failed: the engine worker died")
    events = events_of(server.chat(stream=True).text)
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1]) == "ab"
    assert events[-1]["error"]["message"] == "the engine worker died"
    stream = server.client().completions.create(model="tiny", prompt="a", stream=True)
    with pytest.raises(openai.APIError, match="the engine worker died"):
        list(stream)


def test_one_failed_prompt_ends_the_others(server: FrontEndProcess, triton: FakeTriton) -> None:
    def script(values: dict[str, Any]) -> Script:
        return Script([], error="refused: no") if values["text_input"] == "bad" else Script(["a"] * 500, delay_s=0.02)

    triton.script = script
    assert server.complete(prompt=["long", "bad"], max_tokens=500).status == 400
    triton.wait_idle(1.0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stream_that_ends_early_is_an_error(server: FrontEndProcess, triton: FakeTriton, stream: bool) -> None:
    triton.script = lambda _: Script(["a"], ends_early=True)
    reply = server.chat(stream=stream)
    error = events_of(reply.text)[-1]["error"] if stream else reply.error
    assert "before the answer was complete" in error["message"]


def test_an_answer_that_the_engine_cancelled_is_an_error(server: FrontEndProcess, triton: FakeTriton) -> None:
    triton.script = lambda _: Script(["a"], reason="cancelled")
    assert server.chat().status == 503


def test_messages_are_json_whatever_was_sent(server: FrontEndProcess) -> None:
    reply = server.post(COMPLETIONS, completion(**{"a" * 5000: 1, "\x00\n": 2}))
    assert reply.status == 400 and len(reply.text) < 12_000
    assert json.loads(reply.text)["error"]["code"] == "unknown_parameter"
