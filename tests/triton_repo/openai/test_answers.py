"""What the official client gets: whole answers and streams, counts, log-probabilities, and what Triton was asked."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_triton import NUM_PROMPT_TOKENS, FakeTriton, Script
from front_end import FrontEndProcess, events_of

MESSAGES: Any = [{"role": "user", "content": "Hi"}]


def test_models_are_the_ready_text_models(server: FrontEndProcess) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["other", "tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    assert server.get("/v1/models/tiny-unary").status == 404


def test_chat_whole(server: FrontEndProcess, triton: FakeTriton) -> None:
    answer = server.client().chat.completions.create(model="tiny", messages=MESSAGES)
    assert answer.choices[0].message.content == "Hello world."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.object == "chat.completion" and answer.model == "tiny"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (7, 3, 10)
    (seen,) = triton.seen
    assert seen.values == {
        "temperature": 1.0, "stream": False, "max_tokens": 2**31 - 1, "text_input": "",
        "messages": '[{"role": "user", "content": "Hi"}]',
    }  # fmt: skip
    assert seen.timeout_us == 600_000_000


def test_chat_stream_has_every_character_once(server: FrontEndProcess, triton: FakeTriton) -> None:
    tokens = ["", "汉", "字 ", "🙂", "", 'quote" \n', "end"]
    triton.script = lambda _: Script(tokens)
    options: Any = {"include_usage": True}
    stream = server.client().chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options=options
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "".join(tokens)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (7, 7)
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_usage_only_where_it_was_asked_for(server: FrontEndProcess) -> None:
    events = events_of(server.chat(stream=True).text)
    assert all("usage" not in event and event["choices"] for event in events)


def test_n_choices_are_told_apart(server: FrontEndProcess, triton: FakeTriton) -> None:
    stream = server.client().chat.completions.create(model="tiny", messages=MESSAGES, n=3, stream=True)
    texts = ["", "", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["Hello world."] * 3
    whole = server.client().chat.completions.create(model="tiny", messages=MESSAGES, n=3)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert whole.usage is not None and whole.usage.completion_tokens == 9 and whole.usage.prompt_tokens == 7
    assert [seen.values["num_return_sequences"] for seen in triton.seen] == [3, 3]


def test_every_parameter_reaches_triton(server: FrontEndProcess, triton: FakeTriton) -> None:
    extra = {"top_k": 5, "min_p": 0.25, "repetition_penalty": 1.5, "min_tokens": 2, "ignore_eos": True}
    extra |= {"stop_token_ids": [3, 4], "bad_words": ["bad"]}
    server.client().chat.completions.create(
        model="tiny", messages=MESSAGES, max_completion_tokens=11, temperature=0.5, top_p=0.75, seed=-1, n=2,
        stop=["a", "b"], presence_penalty=0.5, frequency_penalty=-0.5, logprobs=True, top_logprobs=4, user="me",
        extra_body=extra,
    )  # fmt: skip
    values = triton.seen[0].values
    assert values.pop("messages")
    assert values == {
        "text_input": "", "max_tokens": 11, "stream": False, "temperature": 0.5, "top_p": 0.75, "seed": 2**64 - 1,
        "num_return_sequences": 2, "stop_words": ["a", "b"], "presence_penalty": 0.5, "frequency_penalty": -0.5,
        "num_top_logprobs": 4, "top_k": 5, "min_p": 0.25, "repetition_penalty": 1.5, "min_tokens": 2,
        "ignore_eos": True, "stop_token_ids": [3, 4], "bad_words": ["bad"],
    }  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_completions_of_several_prompts(server: FrontEndProcess, triton: FakeTriton, stream: bool) -> None:
    triton.script = lambda values: Script([f"{values['text_input'] or values['input_ids']}", "!"])
    body: Any = {"model": "tiny", "n": 2, "max_tokens": 5}
    expected = ["one!", "one!", "two!", "two!"]
    if stream:
        texts = [""] * 4
        for chunk in server.client().completions.create(prompt=["one", "two"], stream=True, **body):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == expected
    else:
        answer = server.client().completions.create(prompt=["one", "two"], **body)
        assert [choice.text for choice in answer.choices] == expected
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2 * NUM_PROMPT_TOKENS, 8)


def test_prompts_as_token_ids(server: FrontEndProcess, triton: FakeTriton) -> None:
    triton.script = lambda values: Script([str(values["input_ids"])])
    client = server.client()
    assert client.completions.create(model="tiny", prompt=[1, 2, 3]).choices[0].text == "[1, 2, 3]"
    two = client.completions.create(model="tiny", prompt=[[1], [2, 3]])
    assert [choice.text for choice in two.choices] == ["[1]", "[2, 3]"]
    assert triton.seen[0].values["text_input"] == ""
    assert triton.seen[0].values["max_tokens"] == 16


def test_max_tokens_ends_with_length(server: FrontEndProcess) -> None:
    answer = server.client().completions.create(model="tiny", prompt="Once", max_tokens=2)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("Hello world", "length")


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(server: FrontEndProcess, stream: bool) -> None:
    reply = server.chat(logprobs=True, top_logprobs=2, stream=stream)
    choices = [e["choices"][0] for e in events_of(reply.text)] if stream else reply.json()["choices"]
    tokens = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]]
    assert [token["token"] for token in tokens] == ["Hello", " world", "."]
    assert tokens[1]["logprob"] == -0.5 and tokens[1]["bytes"] == list(b" world")
    assert [top["logprob"] for top in tokens[1]["top_logprobs"]] == [-0.5, -1.0]


def test_chat_logprobs_without_top(server: FrontEndProcess) -> None:
    content = server.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert [token["top_logprobs"] for token in content] == [[], [], []]


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs(server: FrontEndProcess, stream: bool) -> None:
    reply = server.complete(logprobs=2, stream=stream)
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for part in events_of(reply.text) if stream else [reply.json()]:
        for name, values in part["choices"][0]["logprobs"].items():
            found[name] += values
    assert found["tokens"] == ["Hello", " world", "."]
    assert found["token_logprobs"] == [-0.5] * 3
    assert found["text_offset"] == [0, 5, 11]
    assert found["top_logprobs"][0] == {"Hello": -0.5, "Hello1": -1.0}


def test_messages_as_templates_want_them(server: FrontEndProcess, triton: FakeTriton) -> None:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": None},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "content": "2", "tool_call_id": "abcdefghi"},
    ]
    assert server.chat(messages=messages).status == 200
    assert json.loads(triton.seen[0].values["messages"]) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "", "tool_calls": [call | {"function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "tool", "content": "2", "tool_call_id": "abcdefghi"},
    ]


def test_response_format(server: FrontEndProcess, triton: FakeTriton) -> None:
    schema = {"type": "object", "properties": {"schema": {"type": "string"}}}
    named = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    for response_format in ({"type": "json_object"}, named, {"type": "text"}):
        assert server.chat(response_format=response_format).status == 200
    guides = [
        (seen.values.get("guided_decoding_guide_type"), seen.values.get("guided_decoding_guide"))
        for seen in triton.seen
    ]
    assert guides == [("json", None), ("json_schema", json.dumps(schema)), (None, None)]


def test_null_and_defaults_of_unsupported_fields_are_accepted(server: FrontEndProcess) -> None:
    defaults = {"logit_bias": {}, "store": False, "service_tier": "auto", "modalities": ["text"], "functions": None}
    assert server.chat(**defaults, made_up=None).status == 200
    assert server.complete(echo=False, best_of=1, suffix=None).status == 200


def test_request_id_runs_through(server: FrontEndProcess, triton: FakeTriton) -> None:
    reply = server.post("/v1/completions", {"model": "tiny", "prompt": "a"}, {"X-Request-Id": "my-id:7"})
    assert reply.headers["x-request-id"] == "my-id:7"
    assert triton.seen[-1].request_id == "my-id:7"
    server.wait_log('request_id="my-id:7"', "status=200")
    made = server.post("/v1/completions", {"model": "tiny", "prompt": ["a", "b"]}, {"X-Request-Id": "bad id\t"})
    assert len(made.headers["x-request-id"]) == 32
    assert {seen.request_id.rpartition(":")[0] for seen in triton.seen[-2:]} == {made.headers["x-request-id"]}
