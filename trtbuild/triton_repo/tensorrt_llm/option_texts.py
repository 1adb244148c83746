"""Options of a TensorRT-LLM repository as NAME=VALUE, as the command line has them."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from trtbuild.errors import Refused, refuse_all
from trtbuild.triton_repo.tensorrt_llm.options import TrtllmOptions

_NONE = type(None)


def read_options(texts: Iterable[str]) -> TrtllmOptions:
    """Of `NAME=VALUE` each: numbers, true or false, lists with commas, groups with semicolons ("0,1;2,3").

    Raises `Refused` with everything that cannot be read, or that cannot be.
    """
    hints = typing.get_type_hints(TrtllmOptions)
    known = {field.name: hints[field.name] for field in fields(TrtllmOptions)}
    values: dict[str, Any] = {}
    problems: list[str] = []
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in known:
            problems.append(f"{text!r}: NAME=VALUE with one of {', '.join(known)}")
        elif name in values:
            problems.append(f"{name} is given twice")
        else:
            try:
                values[name] = _value(value.strip(), known[name])
            except ValueError as error:
                problems.append(f"{name}={value}: {error}")
    refuse_all("--trtllm", problems)
    return TrtllmOptions(**values)


def _value(text: str, hint: Any) -> Any:
    """Raises ValueError that says what is wanted."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = [one for one in typing.get_args(hint) if one is not _NONE]
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("true or false")
        return text.lower() == "true"
    if hint is int:
        return _number(text, int, "a whole number")
    if hint is float:
        return _number(text, float, "a number")
    if typing.get_origin(hint) is tuple:
        return _tuple(text, hint)
    # The names among which a choice is are checked with the other values.
    return text


def _tuple(text: str, hint: Any) -> Any:
    item = typing.get_args(hint)[0]
    if typing.get_origin(item) is tuple:
        return tuple(_tuple(group, item) for group in text.split(";"))
    return tuple(_number(part, int, "whole numbers with commas") for part in text.split(","))


def _number(text: str, kind: Any, wanted: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(wanted) from None


def check_single_prefix(prefix: str | None, num_engines: int) -> None:
    """Several engines are told apart by their own names."""
    if prefix is not None and num_engines > 1:
        raise Refused(
            f"--prefix {prefix} is for one engine; {num_engines} engines get their own names as prefixes: leave it out"
        )
