"""Tool calls in a model's text while it streams: text out as it comes, arguments as they grow, never half a marker.

Understood are, whatever the model:
- Qwen and Hermes: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them, after any text;
- Mistral up to v7: `[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`;
- Mistral from v11: `[TOOL_CALLS]name[ARGS]{...}`, repeated;
- what constrained decoding makes: the bare object, or a list of them.

Mistral's markers are special tokens, which the detokenizer drops: so a list of calls, or a tool's name before an
object, is also a call without its marker where the answer begins with it. A call of a function that was not offered,
and what turns out to be no call, is text.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from trtbuild.triton_repo.openai.json_scanner import JsonScanner

_HERMES, _HERMES_END, _MISTRAL, _ARGS = "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]"
# A call whose arguments can be streamed: its name comes first.
_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_LIST_HEADS = ('[{"name"', '[{"arguments"', '[{"id"')
# Mistral's chat templates take ids of nine letters and digits, and no others.
_ID_CHARS, _ID_LENGTH = string.ascii_letters + string.digits, 9


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class CallStart:
    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    index: int
    text: str


Event = Text | CallStart | CallArguments
_State = Literal["start", "text", "block", "list", "object", "arguments", "rest", "between", "named", "named_object"]


class ToolCallParser:
    """Parser of one answer. `names`: the tools offered; `forced`: constrained decoding makes the answer a call.

    `most`: calls beyond this number are left out.
    """

    def __init__(self, names: Collection[str], forced: bool = False, most: int | None = None) -> None:
        self._names = frozenset(names)
        self._name_heads = tuple(name + end for name in names for end in ("{", _ARGS))
        self._forced = forced
        self._most = most
        self._buffer = ""
        self._state: _State = "start"
        # What was read of a block that is not certain to be a call; it is shown where it is none.
        self._unsure = ""
        self._enclosing: Literal["hermes", "list", "none"] = "none"
        self._scanner = JsonScanner()
        self._scanned = 0
        self._events: list[Event] = []
        self.num_calls = 0

    def push(self, text: str) -> list[Event]:
        """What is certain now, given more text."""
        self._buffer += text
        while self._buffer and getattr(self, f"_in_{self._state}")():
            pass
        return self._take()

    def finish(self) -> list[Event]:
        """The rest, at the end of the answer; an unfinished call stays what it is."""
        if self._state in {"start", "text", "block", "list", "object", "named", "named_object"}:
            rest = self._unsure + self._buffer
            if rest.strip() or not self.num_calls:
                self._show(rest)
        self._buffer = ""
        return self._take()

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        most = self._most
        return events if most is None else [e for e in events if isinstance(e, Text) or e.index < most]

    def _show(self, text: str) -> None:
        if text:
            self._events.append(Text(text))

    def _consume(self, count: int, unsure: bool = True) -> None:
        self._unsure = self._unsure + self._buffer[:count] if unsure else ""
        self._buffer = self._buffer[count:]

    def _give_up(self) -> bool:
        """It was no call: show it, and look for the next marker after it."""
        self._show(self._unsure)
        self._unsure, self._state = "", "text"
        if self._buffer:
            # At least one character on, so that the same marker is not tried for ever.
            self._show(self._buffer[0])
            self._buffer = self._buffer[1:]
        return True

    # States: each looks at the buffer, and is True where it got on and the next one can look. ------------------------

    def _in_start(self) -> bool:
        """At the beginning, or after a call: white space, then a marker, a call without one, or text."""
        seen = self._buffer.lstrip()
        if not seen:
            return False
        compact = re.sub(r"\s+", "", seen[:200])
        if any(marker.startswith(seen) for marker in (_HERMES, _MISTRAL)):
            return False
        if seen.startswith((_HERMES, _MISTRAL)):
            self._consume(len(self._buffer) - len(seen))
            self._state = "text"
        elif (self._forced and seen[0] in "{[") or compact.startswith(_LIST_HEADS):
            self._consume(len(self._buffer) - len(seen))
            self._enclosing, self._state = ("list", "list") if seen[0] == "[" else ("none", "object")
            self._start_scan()
        elif any(head.startswith(compact) for head in _LIST_HEADS):
            return False
        elif seen.startswith(self._name_heads):
            self._state = "named"
        elif any(head.startswith(seen) for head in self._name_heads):
            return False
        else:
            self._state = "text"
        return True

    def _in_text(self) -> bool:
        """Show text up to a marker, or to what may become one."""
        found = [(at, marker) for marker in (_HERMES, _MISTRAL) if (at := self._buffer.find(marker)) >= 0]
        if not found:
            keep = max(_overlap(self._buffer, marker) for marker in (_HERMES, _MISTRAL))
            shown = self._buffer[: len(self._buffer) - keep]
            self._buffer = self._buffer[len(shown) :]
            self._show(shown)
            return False
        at, marker = min(found)
        self._show(self._buffer[:at])
        self._buffer = self._buffer[at:]
        self._consume(len(marker))
        self._enclosing = "hermes" if marker == _HERMES else "list"
        self._state = "block"
        return True

    def _in_block(self) -> bool:
        """After a marker: white space, then an object, a list or a name."""
        seen = self._buffer.lstrip()
        if not seen:
            return False
        self._consume(len(self._buffer) - len(seen))
        if self._enclosing == "hermes":
            self._state = "object"
        else:
            self._state = "list" if seen[0] == "[" else "named"
        self._start_scan()
        return True

    def _in_list(self) -> bool:
        """At the bracket that opens a list of calls, or behind it."""
        seen = self._buffer.lstrip(" \t\r\n[")
        if not seen:
            return False
        self._consume(len(self._buffer) - len(seen))
        self._state = "object"
        return True

    def _in_object(self) -> bool:
        """At the brace of {"name", "arguments"}: wait for the name, or for the whole object."""
        seen = self._buffer.lstrip()
        if not seen.startswith("{"):
            return self._give_up() if seen else False
        if head := _HEAD.match(self._buffer):
            name = _decoded(head[1])
            if name not in self._names:
                return self._give_up()
            self._start_call(name, head.end())
            self._state = "arguments"
            return True
        end = self._scanner.feed(self._buffer[self._scanned :])
        if end is None:
            self._scanned = len(self._buffer)
            return False
        end += self._scanned
        call = _whole_call(self._buffer[:end])
        if call is None or call[0] not in self._names:
            return self._give_up()
        self._start_call(call[0], end)
        self._events.append(CallArguments(self.num_calls - 1, call[1]))
        self._state = "between"
        return True

    def _in_arguments(self) -> bool:
        """Inside the arguments of {"name", "arguments"}."""
        if self._pass_arguments():
            self._scanner = JsonScanner(depth=1)
            self._state = "rest"
            return True
        return False

    def _in_rest(self) -> bool:
        """After the arguments, up to the brace that closes the call: other fields are of no use."""
        end = self._scanner.feed(self._buffer)
        self._buffer = "" if end is None else self._buffer[end:]
        if end is not None:
            self._state = "between"
        return end is not None

    def _in_between(self) -> bool:
        """After a call: the closing marker, a comma and the next call of a list, or the end of the list."""
        seen = self._buffer.lstrip()
        if not seen or (self._enclosing == "hermes" and _HERMES_END.startswith(seen) and seen != _HERMES_END):
            return False
        self._buffer = seen
        if self._enclosing == "hermes":
            self._consume(len(_HERMES_END) if seen.startswith(_HERMES_END) else 0, unsure=False)
            self._state = "start"
        elif self._enclosing == "list" and seen[0] in ",]":
            self._consume(1, unsure=False)
            self._state = "list" if seen[0] == "," else "start"
            self._start_scan()
        else:
            self._state = "start"
        return True

    def _in_named(self) -> bool:
        """Mistral's later form, at the function's name."""
        name, brace, _ = self._buffer.partition("{")
        if not brace:
            # A name that none of ours begins with will not become one.
            bare = name.partition("[")[0].strip()
            return False if any(own.startswith(bare) for own in self._names) else self._give_up()
        bare = re.sub(r"\[(CALL_ID\][^\[]*|ARGS\])", "", name).strip()
        if bare not in self._names:
            return self._give_up()
        self._start_call(bare, len(name))
        self._enclosing = "none"
        self._state = "named_object"
        return True

    def _in_named_object(self) -> bool:
        if self._pass_arguments():
            self._state = "start"
            return True
        return False

    # ------------------------------------------------------------------------------------------------------------------

    def _start_scan(self) -> None:
        self._scanner, self._scanned = JsonScanner(), 0

    def _start_call(self, name: str, length: int) -> None:
        """A call is certain; its head of `length` characters is done with."""
        call_id = "".join(secrets.choice(_ID_CHARS) for _ in range(_ID_LENGTH))
        self._events.append(CallStart(self.num_calls, call_id, name))
        self.num_calls += 1
        self._consume(length, unsure=False)
        self._start_scan()

    def _pass_arguments(self) -> bool:
        """Hand the arguments on as they are; True where they are complete."""
        end = self._scanner.feed(self._buffer)
        text = self._buffer if end is None else self._buffer[:end]
        self._buffer = self._buffer[len(text) :]
        if text:
            self._events.append(CallArguments(self.num_calls - 1, text))
        return end is not None


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `marker`."""
    longest = min(len(text), len(marker) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(marker[:size])), 0)


def _decoded(quoted: str) -> str | None:
    try:
        return json.loads(quoted)
    except ValueError:
        return None


def _whole_call(text: str) -> tuple[str, str] | None:
    """(name, arguments as JSON) of a call whose fields come in another order, or whose arguments are a string."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        return call["name"], arguments
    return (call["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None
