"""Where a JSON object ends, in text that arrives in pieces."""

from __future__ import annotations

import re

_INTERESTING = re.compile(r'["\\{}\[\]]')


class JsonScanner:
    """Follows strings and brackets only; what is inside may still be invalid. `depth`: brackets open already."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False
        # Of a backslash at the very end of a piece.
        self._skip_next = False

    def feed(self, text: str) -> int | None:
        """The index after the bracket that closes the outermost one; None where it is not in this piece."""
        at = 1 if self._skip_next and text else 0
        self._skip_next = self._skip_next and not text
        while found := _INTERESTING.search(text, at):
            at = found.end()
            char = found[0]
            if char == "\\":
                # Outside of strings a backslash is invalid, and of no matter here.
                if self._in_string:
                    self._skip_next = at >= len(text)
                    at += 1
            elif char == '"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._depth += 1 if char in "{[" else -1
                if self._depth <= 0:
                    return at
        return None
