"""A tolerant reader of Triton's config.pbtxt: it gives what can be read, with line numbers, and never fails.

Protobuf's own parser stops at the first placeholder outside of quotes, which is what a hand-filled repository is full
of. This one keeps every field with its line, and notes what is not text format.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r"""(?P<space>[^\S\n]+|\#[^\n]*)
      | (?P<newline>\n)
      | (?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
      | (?P<open_string>["'][^\n]*)
      | (?P<mark>[{}\[\]:,;<>])
      | (?P<word>(?:\$\{[^}\n]*\}|[^\s{}\[\]:,;<>"'\#])+)""",
    re.VERBOSE,
)
_PLACEHOLDER = re.compile(r"\$\{([^}\n]*)\}?")
_CLOSING = {"{": "}", "<": ">"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "'": "'"}
# ModelConfig nests six deep.
_MAX_DEPTH = 40


def placeholders(text: str) -> list[str]:
    """Names of the `${...}` in a text."""
    return _PLACEHOLDER.findall(text)


@dataclass(frozen=True)
class Token:
    kind: str
    text: str
    line: int


@dataclass(frozen=True)
class Value:
    """A scalar as it stands in the file, without its quotes."""

    text: str
    line: int
    is_quoted: bool = False

    @property
    def is_placeholder(self) -> bool:
        return "${" in self.text

    @property
    def number(self) -> int | None:
        """None where it is no whole number of a sensible size."""
        return int(self.text) if re.fullmatch(r"[+-]?[0-9]{1,18}", self.text, re.ASCII) else None


@dataclass
class Message:
    """A block: fields in the file's order, a list's elements as a field each."""

    line: int
    fields: list[tuple[str, Value | Message]] = field(default_factory=list)

    def values(self, name: str) -> list[Value]:
        return [item for key, item in self.fields if key == name and isinstance(item, Value)]

    def value(self, name: str) -> Value | None:
        """The last one counts, as in protobuf."""
        return next(reversed(self.values(name)), None)

    def messages(self, name: str) -> list[Message]:
        return [item for key, item in self.fields if key == name and isinstance(item, Message)]

    def message(self, name: str) -> Message | None:
        return next(reversed(self.messages(name)), None)

    def scalars(self, prefix: str = "") -> Iterator[tuple[str, Value]]:
        """Every scalar below, with a key that a person finds it by: `parameters.decoding_mode`, `output.x.dims`."""
        for name, item in self.fields:
            if isinstance(item, Value):
                yield f"{prefix}{name}", item
            else:
                label = item.value("key") or item.value("name") or item.value("model_name")
                yield from item.scalars(f"{prefix}{name}." + (f"{label.text}." if label else ""))


@dataclass(frozen=True)
class Document:
    """What was read; `problems` are (line, what) of everything that is not text format."""

    root: Message
    problems: list[tuple[int, str]]


def read_pbtxt(text: str) -> Document:
    """Read a text as far as it can be read."""
    return _Reader(list(_tokens(text))).read()


def _tokens(text: str) -> Iterator[Token]:
    line = 1
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup or ""
        if kind == "newline":
            line += 1
        elif kind != "space":
            yield Token(kind, match.group(), line)


def _unquote(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: _ESCAPES.get(match.group(1), match.group(1)), text[1:-1])


class _Reader:
    def __init__(self, tokens: list[Token]) -> None:
        self._tokens = tokens
        self._at = 0
        self._problems: list[tuple[int, str]] = []

    def read(self) -> Document:
        root = Message(1)
        self._fields(root, closing=None, depth=0)
        return Document(root, self._problems)

    def _peek(self) -> Token | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def _take_mark(self, *marks: str) -> str | None:
        token = self._peek()
        if token is None or token.kind != "mark" or token.text not in marks:
            return None
        self._at += 1
        return token.text

    def _problem(self, line: int, what: str) -> None:
        self._problems.append((line, what))

    def _fields(self, into: Message, closing: str | None, depth: int) -> None:
        """Until `closing`, or the end of the text."""
        while (token := self._peek()) is not None:
            self._at += 1
            if token.text == closing and token.kind == "mark":
                return
            if token.kind == "word":
                self._field(into, token, depth)
                self._take_mark(",", ";")
            else:
                self._problem(token.line, f"a field's name is expected, found {token.text[:40]!r}")
        if closing is not None:
            self._problem(into.line, f"the block that is opened here has no {closing!r}")

    def _field(self, into: Message, name: Token, depth: int) -> None:
        has_colon = self._take_mark(":") is not None
        if self._take_mark("["):
            self._list(into, name, depth)
            return
        item = self._item(name, depth)
        if item is None:
            return
        if isinstance(item, Value) and not has_colon:
            self._problem(name.line, f"{name.text[:40]!r} has no ':' before its value")
        into.fields.append((name.text, item))

    def _list(self, into: Message, name: Token, depth: int) -> None:
        while (token := self._peek()) is not None:
            if self._take_mark("]"):
                return
            if self._take_mark(","):
                continue
            item = self._item(name, depth)
            if item is None:
                self._problem(token.line, f"the list {name.text[:40]!r} has no ']'")
                return
            into.fields.append((name.text, item))
        self._problem(name.line, f"the list {name.text[:40]!r} has no ']'")

    def _item(self, name: Token, depth: int) -> Value | Message | None:
        """A block or a scalar; None where the next token is neither, which is left for the caller."""
        token = self._peek()
        if token is None or (token.kind == "mark" and token.text not in _CLOSING):
            self._problem(name.line, f"{name.text[:40]!r} has no value")
            return None
        self._at += 1
        if token.kind == "mark":
            message = Message(token.line)
            if depth >= _MAX_DEPTH:
                self._problem(token.line, f"blocks inside blocks, more than {_MAX_DEPTH} deep")
                self._at = len(self._tokens)
            else:
                self._fields(message, _CLOSING[token.text], depth + 1)
            return message
        if token.kind == "open_string":
            self._problem(token.line, "a string has no closing quote")
            return Value(token.text[1:], token.line, is_quoted=True)
        if token.kind == "string":
            return self._string(token)
        return Value(token.text, token.line)

    def _string(self, first: Token) -> Value:
        """Neighbouring strings are one, as in C."""
        parts = [_unquote(first.text)]
        while (token := self._peek()) is not None and token.kind == "string":
            self._at += 1
            parts.append(_unquote(token.text))
        return Value("".join(parts), first.line, is_quoted=True)
