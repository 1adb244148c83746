"""A checkpoint's chat template, rendered as transformers renders it, with nothing but jinja2.

`trtbuild package` copies this file beside the model.py of preprocessing. The environment is that of transformers'
`apply_chat_template`: sandboxed, `raise_exception`, `strftime_now`, plain `tojson`, `generation` blocks.
"""

from __future__ import annotations

import datetime
import json
import os
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from trtllm_text import RequestError

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """Of a tokenizer's directory; ValueError where it has none, or one that is no template."""

    def __init__(self, directory: str) -> None:
        config = _read(directory, "tokenizer_config.json")
        text = _template_of(directory, config)
        if not text:
            raise ValueError(f"the tokenizer in {directory} has no chat template; package with chat_template=off")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
        try:
            self._template = environment.from_string(text)
        except TemplateError as error:
            raise ValueError(f"the chat template in {directory} cannot be read: {error}") from error
        tokens = _read(directory, "special_tokens_map.json") | config
        found = {name: tokens.get(name) for name in _SPECIAL}
        self._tokens = {
            name: token["content"] if isinstance(token, dict) else token
            for name, token in found.items()
            if token is not None
        }

    def render(self, messages: list[dict[str, Any]]) -> str:
        """Up to where the assistant speaks. Raises `RequestError` for what the template rejects."""
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._tokens
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise RequestError(f"the model's chat template rejects these messages: {error}") from error


class _Generation(Extension):
    """{% generation %} marks what an assistant said, for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own type

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _template_of(directory: str, config: dict[str, Any]) -> str | None:
    file = os.path.join(directory, "chat_template.jinja")  # noqa: PTH118
    if os.path.isfile(file):  # noqa: PTH113
        with open(file, encoding="utf-8") as stream:  # noqa: PTH123
            return stream.read()
    found = _read(directory, "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(found, list):
        # Several by name.
        return next((one["template"] for one in found if one.get("name") == "default"), None)
    return found


def _read(directory: str, name: str) -> dict[str, Any]:
    file = os.path.join(directory, name)  # noqa: PTH118
    if not os.path.isfile(file):  # noqa: PTH113
        return {}
    with open(file, encoding="utf-8") as stream:  # noqa: PTH123
        return json.load(stream)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """jinja2's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
