"""From what a client sends (text, token ids, chat messages) to token ids; every bad input is a `Refused`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trtbuild.errors import Refused

_ROLES_HINT = 'each message is {"role": "user" | "assistant" | "system" | ..., "content": text}'


# Normalisation may drop characters before they are counted.
_NORMALISED = 4


@dataclass(frozen=True)
class PromptLimit:
    """Text of more characters than this has more than `max_tokens` tokens, whatever it says."""

    max_tokens: int
    max_characters: int

    @classmethod
    def of(cls, tokenizer: Any, max_tokens: int) -> PromptLimit:
        """A token's name has at least as many characters as its text."""
        longest = max(map(len, tokenizer.get_vocab()), default=1)
        return cls(max_tokens, _NORMALISED * max_tokens * longest)

    def check(self, text: str) -> None:
        """Refuse it before seconds are spent on tokens that are not used."""
        if len(text) > self.max_characters:
            raise Refused(
                f"the prompt has {len(text)} characters, which are more tokens than the at most {self.max_tokens} "
                "that are accepted (max_input_len)"
            )


def prompt_token_ids(message: Mapping[str, Any], tokenizer: Any, limit: PromptLimit | None = None) -> list[int]:
    """Token ids of a `generate` or `score` operation, which has exactly one kind of prompt.

    Text gets the tokenizer's special tokens (BOS); chat messages get only what the chat template writes.
    """
    if "token_ids" in message:
        return _checked_ids(message["token_ids"])
    if tokenizer is None:
        raise Refused("this engine has no tokenizer: send token_ids")
    if "messages" in message:
        return _encode(
            tokenizer, render_chat(tokenizer, message["messages"], message.get("tools")), limit, special=False
        )
    return _encode(tokenizer, message["prompt"], limit, special=True)


def render_chat(tokenizer: Any, messages: Any, tools: Any = None) -> str:
    """The chat template's text, up to where the assistant speaks. Raises `Refused`, also for what it rejects.

    `tools`: OpenAI's tool objects; a template that knows no tools ignores them.
    """
    import jinja2

    if not getattr(tokenizer, "chat_template", None):
        raise Refused("the model has no chat template: send a prompt, not messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(f"messages must be a non-empty list; {_ROLES_HINT}")
    for index, entry in enumerate(messages):
        if not isinstance(entry, dict) or not isinstance(entry.get("role"), str) or "content" not in entry:
            raise Refused(f"messages[{index}] is malformed: {_ROLES_HINT}")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise Refused('tools must be a list of objects {"type": "function", "function": {...}}')
    try:
        return tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False, add_generation_prompt=True)
    except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
        raise Refused(f"the model's chat template rejects these messages: {error}") from error


def _encode(tokenizer: Any, text: Any, limit: PromptLimit | None, special: bool) -> list[int]:
    if not isinstance(text, str):
        raise Refused(f"the prompt must be text, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Refused(f"the prompt is not valid Unicode at character {error.start}") from error
    if limit is not None:
        limit.check(text)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Not through transformers: its encode sets truncation on the shared tokenizer, which is not thread-safe.
        return list(backend.encode(text, add_special_tokens=special).ids)
    return list(tokenizer.encode(text, add_special_tokens=special))


def _checked_ids(ids: Any) -> list[int]:
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise Refused("token_ids must be a list of whole numbers")
    return ids
