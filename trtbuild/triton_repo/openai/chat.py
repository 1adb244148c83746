"""Answers of /v1/chat/completions: whole, or as chunks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from trtbuild.triton_repo.openai.answers import Usage, envelope, gather, number
from trtbuild.triton_repo.openai.schemas import ChatBody, NamedToolChoice
from trtbuild.triton_repo.openai.streaming import chunk_events
from trtbuild.triton_repo.openai.tool_calls import CallArguments, CallStart, Event, Text, ToolCallParser
from trtbuild.triton_repo.openai.wire import Piece


async def whole_chat(body: ChatBody, pieces: AsyncIterator[Piece]) -> dict[str, Any]:
    """A chat.completion object."""
    wholes, usage = await gather(pieces)
    choices = []
    for (_, index), whole in wholes.items():
        message, num_calls = _message(body, whole.text)
        logprobs = None if whole.logprobs is None else {"content": _logprobs(whole.logprobs), "refusal": None}
        reason = _finish_reason(body, whole.finish_reason, num_calls)
        choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason})
    return envelope("chatcmpl", "chat.completion", body.model) | {"choices": choices, "usage": usage.to_dict()}


def chat_events(body: ChatBody, first: Piece, pieces: AsyncIterator[Piece]) -> AsyncIterator[bytes]:
    """Server-sent chat.completion.chunk objects; `first` is the piece that was waited for."""
    return chunk_events(_ChatStream(body), first, pieces)


class _Choice:
    def __init__(self, body: ChatBody) -> None:
        self.parser = _parser(body)
        self.begun = False
        # Of tokens whose text is still held back.
        self.logprobs: list[dict[str, Any]] = []


class _ChatStream:
    """From pieces to chunks."""

    def __init__(self, body: ChatBody) -> None:
        self._body = body
        self._head = envelope("chatcmpl", "chat.completion.chunk", body.model)
        self._choices: dict[int, _Choice] = {}
        self._usage = Usage()
        self.include_usage = body.stream_options is not None and body.stream_options.include_usage

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """Text and calls that became certain; at the end of a choice its finish reason."""
        if piece.sequence_index not in self._choices:
            self._choices[piece.sequence_index] = _Choice(self._body)
        choice = self._choices[piece.sequence_index]
        self._usage.add(piece)
        choice.logprobs += piece.logprobs or []
        found = []
        if not choice.begun:
            choice.begun = True
            found.append(self._chunk(piece, {"role": "assistant", "content": ""}))
        for delta in _deltas(choice.parser, piece):
            found.append(self._chunk(piece, delta, choice))
        if piece.finish_reason is not None:
            num_calls = choice.parser.num_calls if choice.parser is not None else 0
            reason = _finish_reason(self._body, piece.finish_reason, num_calls)
            found.append(self._chunk(piece, {}, choice, reason))
        return found

    def last(self) -> dict[str, Any]:
        """The chunk that has the usage, and no choice."""
        return self._head | {"choices": [], "usage": self._usage.to_dict()}

    def _chunk(
        self, piece: Piece, delta: dict[str, Any], choice: _Choice | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        logprobs = None
        if choice is not None and choice.logprobs:
            logprobs = {"content": _logprobs(choice.logprobs), "refusal": None}
            choice.logprobs = []
        chunk = {"index": piece.sequence_index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": None} if self.include_usage else {}
        return self._head | {"choices": [chunk]} | usage


def _deltas(parser: ToolCallParser | None, piece: Piece) -> list[dict[str, Any]]:
    if parser is None:
        return [{"content": piece.text}] if piece.text else []
    events = parser.push(piece.text)
    if piece.finish_reason is not None:
        events += parser.finish()
    return [_delta(one) for one in events]


def _delta(one: Event) -> dict[str, Any]:
    if isinstance(one, Text):
        return {"content": one.text}
    if isinstance(one, CallStart):
        function = {"name": one.name, "arguments": ""}
        return {"tool_calls": [{"index": one.index, "id": one.id, "type": "function", "function": function}]}
    return {"tool_calls": [{"index": one.index, "function": {"arguments": one.text}}]}


def _message(body: ChatBody, text: str) -> tuple[dict[str, Any], int]:
    """The message, by the parser that streams use, and its number of tool calls."""
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    parser = _parser(body)
    if parser is None:
        return message, 0
    events = [*parser.push(text), *parser.finish()]
    content = "".join(one.text for one in events if isinstance(one, Text))
    calls: list[dict[str, Any]] = []
    for one in events:
        if isinstance(one, CallStart):
            calls.append({"id": one.id, "type": "function", "function": {"name": one.name, "arguments": ""}})
        elif isinstance(one, CallArguments):
            calls[one.index]["function"]["arguments"] += one.text
    if calls:
        message |= {"content": content or None, "tool_calls": calls}
    return message, len(calls)


def _parser(body: ChatBody) -> ToolCallParser | None:
    """None where no tool can be called."""
    if not body.tools or body.tool_choice == "none":
        return None
    names = [tool.function.name for tool in body.tools]
    return ToolCallParser(names, forced=_is_forced(body), most=None if body.parallel_tool_calls else 1)


def _finish_reason(body: ChatBody, reason: str | None, num_calls: int) -> str | None:
    """As OpenAI has it, a call of the one function that was named ends with "stop"."""
    called = num_calls > 0 and not isinstance(body.tool_choice, NamedToolChoice)
    return "tool_calls" if called and reason == "stop" else reason


def _logprobs(tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [_token(token) | {"top_logprobs": [_token(top) for top in token["top"]]} for token in tokens]


def _token(token: dict[str, Any]) -> dict[str, Any]:
    text = token["token"] or ""
    return {"token": text, "logprob": number(token["logprob"]), "bytes": list(text.encode("utf-8"))}


def _is_forced(body: ChatBody) -> bool:
    return body.tool_choice == "required" or isinstance(body.tool_choice, NamedToolChoice)
