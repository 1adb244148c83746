"""The wire between an engine worker and its clients: newline-delimited JSON over a Unix-domain socket.

The worker speaks first, with `hello`; then any number of operations run at once on a connection, told apart by the
client's `id`. A connection that closes cancels what it asked for. Unknown fields are refused, so that a misspelt
option is never ignored; PROTOCOL_VERSION changes when an old peer would misread a message.

client -> worker                                                   worker -> client
{"op": "generate", "id", "prompt" | "token_ids" | "messages",      {"type": "token", "id", ...} per token; the last has
 "params": {...}, "tools": [...], "request_id"}                    "finish_reason" and "usage"
{"op": "score", "id", "prompt" | "token_ids"}                      {"type": "score", "id", "token_ids", "logprobs"}
{"op": "cancel", "id"}                                             the generation's last token message, no other answer
{"op": "stats", "id"}                                              {"type": "stats", "id", "stats": {...}}
{"op": "shutdown", "id", "drain": true}                            {"type": "ok", "id"}
anything refused or failed                                         {"type": "error", "id", "kind", "message"}
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

from trtbuild.engines.serving.request import TokenEvent, Usage
from trtbuild.errors import DeadlineExceeded, Refused, TrtBuildError, Unavailable

PROTOCOL_VERSION = 1
# One line; a longer message is refused and its connection closed.
MAX_MESSAGE_BYTES = 32 * 2**20

MAX_ID_CHARACTERS = 200

# error kinds: "refused": this request can never run; "unavailable": retry later or elsewhere; "timeout": the request's
# own deadline has passed; "failed": the worker's fault.
_EXCEPTION_OF_KIND: dict[str, type[TrtBuildError]] = {
    "refused": Refused,
    "unavailable": Unavailable,
    "timeout": DeadlineExceeded,
}

_PROMPT_FIELDS = ("prompt", "token_ids", "messages")
_FIELDS_OF_OP: dict[str, tuple[str, ...]] = {
    "generate": ("op", "id", "params", "tools", "request_id", *_PROMPT_FIELDS),
    "score": ("op", "id", "prompt", "token_ids"),
    "cancel": ("op", "id"),
    "stats": ("op", "id"),
    "shutdown": ("op", "id", "drain"),
}


def encode(message: dict[str, Any]) -> bytes:
    """One line. ASCII only, so that a lone surrogate cannot break the framing."""
    return json.dumps(message, separators=(",", ":")).encode("ascii") + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """Raises `Refused` where the line is no JSON object."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Refused(f"a message must be one line of JSON: {error}") from error
    if not isinstance(message, dict):
        raise Refused(f"a message must be a JSON object, not {type(message).__name__}")
    return message


def check_operation(message: dict[str, Any]) -> str:
    """The operation's name; raises `Refused` for an unknown one, for unknown fields and for a bad id."""
    op = message.get("op")
    if not isinstance(op, str) or op not in _FIELDS_OF_OP:
        raise Refused(f"op {op!r}: must be one of {', '.join(_FIELDS_OF_OP)}")
    request_id = message.get("id")
    if not isinstance(request_id, str) or not 0 < len(request_id) <= MAX_ID_CHARACTERS:
        raise Refused(f"op {op}: id must be a string of 1 to {MAX_ID_CHARACTERS} characters")
    unknown = sorted(set(message) - set(_FIELDS_OF_OP[op]))
    if unknown:
        raise Refused(f"op {op}: unknown field {', '.join(unknown)}; known: {', '.join(_FIELDS_OF_OP[op])}")
    prompts = [name for name in _PROMPT_FIELDS if name in message]
    if op in ("generate", "score") and len(prompts) != 1:
        raise Refused(
            f"op {op}: exactly one of {', '.join(_PROMPT_FIELDS)} is needed, got {', '.join(prompts) or 'none'}"
        )
    caller_id = message.get("request_id", "")
    if not isinstance(caller_id, str) or len(caller_id) > MAX_ID_CHARACTERS:
        raise Refused(f"op {op}: request_id must be a string of at most {MAX_ID_CHARACTERS} characters")
    if "tools" in message and "messages" not in message:
        raise Refused(f"op {op}: tools are given to the chat template, so they need messages")
    return op


def event_message(event: TokenEvent, client_id: str) -> dict[str, Any]:
    """A token event as the client with that id sees it; absent means default. Errors: see `error_message`."""
    values = {f.name: getattr(event, f.name) for f in fields(event) if getattr(event, f.name) != f.default}
    values |= {"type": "token", "id": client_id}
    values.pop("request_id")
    if event.usage is not None:
        values["usage"] = asdict(event.usage)
    return values


def event_of(message: dict[str, Any]) -> TokenEvent:
    """The client's end of `event_message`."""
    values = {name: value for name, value in message.items() if name not in ("type", "id")}
    if "usage" in values:
        values["usage"] = Usage(**values["usage"])
    if "top_logprobs" in values:
        values["top_logprobs"] = tuple((token, logprob) for token, logprob in values["top_logprobs"])
    if "top_texts" in values:
        values["top_texts"] = tuple(values["top_texts"])
    return TokenEvent(request_id=message["id"], **values)


def error_message(client_id: str | None, kind: str, message: str) -> dict[str, Any]:
    return {"type": "error", "id": client_id, "kind": kind, "message": message}


def kind_of(error: TrtBuildError) -> str:
    """The kind that makes a client raise the same exception."""
    return next((kind for kind, made in _EXCEPTION_OF_KIND.items() if isinstance(error, made)), "failed")


def exception_of(message: dict[str, Any]) -> TrtBuildError:
    """The exception that a client raises for an error message."""
    return _EXCEPTION_OF_KIND.get(message["kind"], TrtBuildError)(message["message"])
