"""Options of a TensorRT-LLM repository as NAME=VALUE, as the command line has them."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from trtbuild.errors import Refused, refuse_all
from trtbuild.triton_repo.tensorrt_llm.options import TrtllmOptions, problems_of

_NONE = type(None)


def read_options(texts: Iterable[str]) -> TrtllmOptions:
    """Of `NAME=VALUE` each: numbers, true or false, lists with commas, groups with semicolons ("0,1;2,3").

    Raises `Refused` with everything that cannot be read, and everything that cannot be.
    """
    hints = typing.get_type_hints(TrtllmOptions)
    known = {field.name: hints[field.name] for field in fields(TrtllmOptions)}
    values: dict[str, Any] = {}
    problems: list[str] = []
    unread: set[str] = set()
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in known:
            near = difflib.get_close_matches(name, known, 1, cutoff=0.75)
            unread |= set(near)
            hint = f"did you mean {near[0]}?" if near else f"NAME=VALUE with one of {', '.join(known)}"
            problems.append(f"{text!r}: {hint if equals or not near else 'NAME=VALUE, with a value'}")
        elif name in values:
            problems.append(f"{name} is given twice")
        else:
            try:
                values[name] = _value(value.strip(), known[name])
            except ValueError as error:
                unread.add(name)
                problems.append(f"{name}={value}: {error}")
    # What only follows from a value that could not be read is no news.
    problems += [one for one in problems_of(values) if not unread & set(re.findall(r"\w+", one))]
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


def check_single_engine(prefix: str | None, engine_path: str | None, num_engines: int) -> None:
    """Several engines are told apart by their own names, and none is where another is."""
    if engine_path is not None and num_engines > 1:
        raise Refused(
            f"--engine-path {engine_path} is where one engine is; {num_engines} engines are packaged: package them one "
            "by one, each with its --engine-path and a --prefix"
        )
    if prefix is not None and num_engines > 1:
        raise Refused(
            f"--prefix {prefix} is for one engine; {num_engines} engines get their own names as prefixes: leave it out"
        )
