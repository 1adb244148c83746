"""Chat messages as chat templates want them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from trtbuild.triton_repo.openai.errors import refused
from trtbuild.triton_repo.openai.schemas import Message, MessageToolCall


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Content as one string, arguments of earlier calls as objects, "developer" as the "system" that templates know."""
    return [_template_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _template_message(message: Message, where: str) -> dict[str, Any]:
    if message.tool_calls is not None and message.role != "assistant":
        raise refused(f"{where}.tool_calls: only the assistant calls tools", f"{where}.tool_calls")
    if message.role == "tool" and message.tool_call_id is None:
        raise refused(f"{where}.tool_call_id is missing: which call does this answer?", f"{where}.tool_call_id")
    if message.content is None and not message.tool_calls:
        raise refused(f"{where}.content is missing", f"{where}.content")
    content = message.content or ""
    result: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": content if isinstance(content, str) else "".join(part.text for part in content),
    }
    if message.tool_calls:
        result["tool_calls"] = [
            _template_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(message.tool_calls)
        ]
    for name in ("name", "tool_call_id"):
        if getattr(message, name) is not None:
            result[name] = getattr(message, name)
    return result


def _template_call(call: MessageToolCall, where: str) -> dict[str, Any]:
    # Templates write the arguments as JSON themselves: a string would be quoted a second time.
    param = f"{where}.function.arguments"
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise refused(f"{param} is not valid JSON: {error}", param) from error
    if not isinstance(arguments, dict):
        raise refused(f"{param} must be a JSON object", param)
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
