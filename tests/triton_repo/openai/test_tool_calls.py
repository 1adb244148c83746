"""Tool calls: the parser on every way to cut a text, and whole requests."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
from fake_triton import FakeTriton, Script
from front_end import FrontEndProcess, chat, events_of

from trtbuild.triton_repo.openai.schemas import ChatBody
from trtbuild.triton_repo.openai.tool_calls import CallArguments, CallStart, Event, Text, ToolCallParser
from trtbuild.triton_repo.openai.tool_schemas import forced_guide

NAMES = ("get_weather", "get_time")
ROME, PARIS = '{"city": "Rome, \\"{IT}\\""}', '{"city": "巴黎 🙂", "days": [1, {"a": "}"}]}'

Calls = list[tuple[str, str]]
CASES: dict[str, tuple[str, str, Calls]] = {
    "hermes": (
        f'<tool_call>\n{{"name": "get_weather", "arguments": {ROME}}}\n</tool_call>',
        "", [("get_weather", ROME)],
    ),
    "hermes, text before and two calls": (
        f'Let me see <b>.\n<tool_call>\n{{"name": "get_weather", "arguments": {ROME}}}\n</tool_call>\n'
        f'<tool_call>\n{{"name": "get_time", "arguments": {PARIS}}}\n</tool_call>\n',
        "Let me see <b>.\n", [("get_weather", ROME), ("get_time", PARIS)],
    ),
    "hermes, text after": (
        '<tool_call>{"name": "get_time", "arguments": {}}</tool_call> done', " done", [("get_time", "{}")],
    ),
    "arguments first": (
        f'<tool_call>{{"arguments": {PARIS}, "name": "get_time"}}</tool_call>', "", [("get_time", PARIS)],
    ),
    "arguments as a string": (
        f'<tool_call>{{"name": "get_time", "arguments": {json.dumps(ROME)}}}</tool_call>', "", [("get_time", ROME)],
    ),
    "mistral": (
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {ROME}}}, '
        f'{{"name": "get_time", "arguments": {PARIS}, "id": "a}}b"}}]',
        "", [("get_weather", ROME), ("get_time", PARIS)],
    ),
    "mistral, the marker dropped": (
        f' [{{"name": "get_weather", "arguments": {ROME}}}, {{"name": "get_time", "arguments": {PARIS}}}]',
        "", [("get_weather", ROME), ("get_time", PARIS)],
    ),
    "mistral v11": (
        f"[TOOL_CALLS]get_weather[ARGS]{ROME}[TOOL_CALLS]get_time[ARGS]{PARIS}",
        "", [("get_weather", ROME), ("get_time", PARIS)],
    ),
    "mistral v11, the markers dropped": (
        f"get_weather{ROME}get_time{PARIS}", "", [("get_weather", ROME), ("get_time", PARIS)],
    ),
    "text": ("It is [1, 2] <tool and [TOOL_ in {Rome}.", "It is [1, 2] <tool and [TOOL_ in {Rome}.", []),
    "text that begins like a list": ('[{"nam": 1}]', '[{"nam": 1}]', []),
    "text that begins like a name": ("get_weather is a function", "get_weather is a function", []),
    "a function that was not offered": (
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', [],
    ),
    "not JSON": ('<tool_call>{"name" get_time}</tool_call>!', '<tool_call>{"name" get_time}</tool_call>!', []),
    "half a marker at the end": ("Go <tool_ca", "Go <tool_ca", []),
    "a marker and nothing": ("<tool_call>", "<tool_call>", []),
    "cut off in the arguments": (
        '<tool_call>{"name": "get_time", "arguments": {"city": "Ro', "", [("get_time", '{"city": "Ro')],
    ),
    "empty": ("", "", []),
    "white space": (" \n", " \n", []),
}  # fmt: skip


def gathered(events: list[Event]) -> tuple[str, Calls]:
    """Text and calls; checks that ids are Mistral's and that the indexes grow."""
    text, calls, ids = "", [], set()
    for event in events:
        if isinstance(event, Text):
            assert event.text
            text += event.text
        elif isinstance(event, CallStart):
            assert event.index == len(calls)
            assert len(event.id) == 9 and event.id.isalnum() and event.id not in ids
            ids.add(event.id)
            calls.append((event.name, ""))
        elif isinstance(event, CallArguments):
            assert event.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    return text, calls


def parsed(pieces: list[str], forced: bool = False) -> tuple[str, Calls]:
    parser = ToolCallParser(NAMES, forced)
    return gathered([event for piece in pieces for event in parser.push(piece)] + parser.finish())


@pytest.mark.parametrize("case", CASES)
def test_the_pieces_do_not_matter(case: str) -> None:
    source, text, calls = CASES[case]
    assert parsed([source]) == (text, calls)
    assert parsed(list(source)) == (text, calls)
    generator = random.Random(case)
    for _ in range(200):
        cuts = sorted(generator.randrange(len(source) + 1) for _ in range(generator.randrange(8)))
        pieces = [source[a:b] for a, b in zip([0, *cuts], [*cuts, len(source)], strict=True)]
        assert parsed(pieces) == (text, calls), pieces


def test_no_part_of_a_marker_is_shown_early() -> None:
    for case in ("hermes, text before and two calls", "mistral", "mistral, the marker dropped", "mistral v11"):
        source, text, _ = CASES[case]
        parser, shown = ToolCallParser(NAMES), ""
        for char in source:
            shown += "".join(event.text for event in parser.push(char) if isinstance(event, Text))
            assert text.startswith(shown), (case, shown)


def test_arguments_stream_as_they_come() -> None:
    parser = ToolCallParser(NAMES)
    parser.push('<tool_call>{"name": "get_time", "arguments": {"a": ')
    assert [e.text for e in parser.push("12") if isinstance(e, CallArguments)] == ["12"]


def test_random_texts_lose_nothing() -> None:
    """Whatever is no call comes out as it went in."""
    generator = random.Random(5)
    parts = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "get_time", "{", "}", "[", "]", '"', "\\", " "]
    parts += ['{"name": "', '", "arguments": ', "a", ",", "\n", "<", "[T"]
    for _ in range(4000):
        source = "".join(generator.choice(parts) for _ in range(generator.randrange(12)))
        whole = parsed([source])
        assert parsed(list(source)) == whole, source
        if not whole[1]:
            assert whole[0] == source


def test_forced_calls_without_markers() -> None:
    one = f'{{"name": "get_time", "arguments": {PARIS}}}'
    assert parsed(list(one), forced=True) == ("", [("get_time", PARIS)])
    assert parsed(list(f"[{one},\n {one}]"), forced=True) == ("", [("get_time", PARIS)] * 2)
    # A model that is free has only said something like it.
    assert parsed(list(one)) == (one, [])


def tool(name: str = "get_weather", **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"} | parameters}}


TOOLS = [tool(properties={"city": {"type": "string"}}, required=["city"]), tool("get_time")]


def test_whole_and_streamed_calls(server: FrontEndProcess, triton: FakeTriton) -> None:
    source = CASES["hermes, text before and two calls"][0]
    triton.script = lambda _: Script([source[i : i + 3] for i in range(0, len(source), 3)])
    client: Any = server.client().chat.completions
    messages: Any = [{"role": "user", "content": "Hi"}]
    whole = client.create(model="tiny", messages=messages, tools=TOOLS)
    assert whole.choices[0].finish_reason == "tool_calls"
    assert whole.choices[0].message.content == "Let me see <b>.\n"
    expected = [("get_weather", ROME), ("get_time", PARIS)]
    assert [(c.function.name, c.function.arguments) for c in whole.choices[0].message.tool_calls] == expected
    with client.stream(model="tiny", messages=messages, tools=TOOLS) as stream:
        final = stream.get_final_completion()
    assert [(c.function.name, c.function.arguments) for c in final.choices[0].message.tool_calls] == expected
    assert final.choices[0].message.content == "Let me see <b>.\n"
    assert final.choices[0].finish_reason == "tool_calls"
    assert json.loads(triton.seen[0].values["tools"]) == TOOLS


def test_one_call_where_parallel_ones_are_not_wanted(server: FrontEndProcess, triton: FakeTriton) -> None:
    triton.script = lambda _: Script([CASES["mistral"][0]])
    message = server.chat(tools=TOOLS, parallel_tool_calls=False).json()["choices"][0]["message"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["get_weather"]


def test_calls_are_not_looked_for_without_tools(server: FrontEndProcess, triton: FakeTriton) -> None:
    source = CASES["hermes"][0]
    triton.script = lambda _: Script([source])
    for options in ({}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}):
        message = server.chat(**options).json()["choices"][0]["message"]
        assert message["content"] == source and "tool_calls" not in message
        assert "tools" not in triton.seen[-1].values


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_beside_calls(server: FrontEndProcess, triton: FakeTriton, stream: bool) -> None:
    source = "Hm. " + CASES["hermes"][0]
    tokens = [source[i : i + 4] for i in range(0, len(source), 4)]
    triton.script = lambda _: Script(tokens)
    reply = server.chat(tools=TOOLS, logprobs=True, stream=stream)
    choices = [e["choices"][0] for e in events_of(reply.text)] if stream else reply.json()["choices"]
    found = [token["token"] for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]]
    assert found == tokens


def test_required_and_named_choices_are_constrained(server: FrontEndProcess, triton: FakeTriton) -> None:
    call = {"name": "get_weather", "arguments": {"city": "Rome"}}
    triton.script = lambda _: Script([json.dumps([call])])
    reply = server.chat(tools=TOOLS, tool_choice="required").json()["choices"][0]
    assert reply["finish_reason"] == "tool_calls"
    assert reply["message"]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    assert reply["message"]["content"] is None
    triton.script = lambda _: Script([json.dumps(call)])
    named = {"type": "function", "function": {"name": "get_weather"}}
    reply = server.chat(tools=TOOLS, tool_choice=named).json()["choices"][0]
    assert reply["finish_reason"] == "stop" and len(reply["message"]["tool_calls"]) == 1
    several, one = (json.loads(seen.values["guided_decoding_guide"]) for seen in triton.seen)
    assert {seen.values["guided_decoding_guide_type"] for seen in triton.seen} == {"json_schema"}
    jsonschema.validate([call, {"name": "get_time", "arguments": {}}], several)
    jsonschema.validate(call, one)
    for bad in ({"name": "get_time", "arguments": {}}, {"name": "get_weather", "arguments": {}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, one)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate([], several)


def test_references_follow_their_definitions() -> None:
    definitions = {"city": {"type": "string"}, "pair": {"type": "array", "items": {"$ref": "#/$defs/city"}}}
    properties = {"to": {"$ref": "#/$defs/pair"}, "default": {"$ref": "#/$defs/city"}}
    other = tool(
        "get_time",
        properties={"to": {"$ref": "#/definitions/city"}},
        definitions={"city": {"type": "integer"}},
    )
    first = tool(**{"properties": properties, "$defs": definitions})
    body = ChatBody.model_validate(chat(tools=[first, other]))
    guide = forced_guide(body.tools or [], "required", parallel=False)
    assert guide is not None
    jsonschema.validate({"name": "get_weather", "arguments": {"to": ["a"], "default": "b"}}, guide)
    jsonschema.validate({"name": "get_time", "arguments": {"to": 3}}, guide)
    for arguments in ({"to": [1]}, {"default": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"name": "get_weather", "arguments": arguments}, guide)
