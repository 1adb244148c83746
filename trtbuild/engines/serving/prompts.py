"""From what a client sends (text, token ids, chat messages) to token ids; every bad input is a `Refused`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trtbuild.errors import Refused

_ROLES_HINT = 'each message is {"role": "user" | "assistant" | "system" | ..., "content": text}'


def prompt_token_ids(message: Mapping[str, Any], tokenizer: Any) -> list[int]:
    """Token ids of a `generate` or `score` operation, which has exactly one kind of prompt.

    Text gets the tokenizer's special tokens (BOS); chat messages get only what the chat template writes.
    """
    if "token_ids" in message:
        return _checked_ids(message["token_ids"])
    if tokenizer is None:
        raise Refused("this engine has no tokenizer: send token_ids")
    if "messages" in message:
        return _encode(tokenizer, render_chat(tokenizer, message["messages"]), special=False)
    return _encode(tokenizer, message["prompt"], special=True)


def render_chat(tokenizer: Any, messages: Any) -> str:
    """The chat template's text, up to where the assistant speaks. Raises `Refused`, also for what it rejects."""
    import jinja2

    if not getattr(tokenizer, "chat_template", None):
        raise Refused("the model has no chat template: send a prompt, not messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(f"messages must be a non-empty list; {_ROLES_HINT}")
    for index, entry in enumerate(messages):
        if not isinstance(entry, dict) or not isinstance(entry.get("role"), str) or "content" not in entry:
            raise Refused(f"messages[{index}] is malformed: {_ROLES_HINT}")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
        raise Refused(f"the model's chat template rejects these messages: {error}") from error


def _encode(tokenizer: Any, text: Any, special: bool) -> list[int]:
    if not isinstance(text, str):
        raise Refused(f"the prompt must be text, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Refused(f"the prompt is not valid Unicode at character {error.start}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Not through transformers: its encode sets truncation on the shared tokenizer, which is not thread-safe.
        return list(backend.encode(text, add_special_tokens=special).ids)
    return list(tokenizer.encode(text, add_special_tokens=special))


def _checked_ids(ids: Any) -> list[int]:
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise Refused("token_ids must be a list of whole numbers")
    return ids
