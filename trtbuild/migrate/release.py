"""Versions of TensorRT-LLM, compared by what changes names and templates."""

from __future__ import annotations

import re
from dataclasses import dataclass

_VERSION = re.compile(r"v?(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?(?!\d)", re.ASCII)


@dataclass(frozen=True)
class Release:
    """A version such as 0.17.0, 1.2.0rc8 or 0.11.0.dev2024062500."""

    text: str
    numbers: tuple[int, int, int]

    @classmethod
    def parse(cls, text: object) -> Release | None:
        """None where it is no version."""
        match = (
            re.match(r"v?(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?(?![\d])", text.strip()) if isinstance(text, str) else None
        )
        if match is None:
            return None
        major, minor, patch = (int(part or 0) for part in match.groups())
        return cls(str(text).strip().removeprefix("v"), (major, minor, patch))

    @property
    def minor(self) -> tuple[int, int]:
        """Templates and names change between minor releases only."""
        return self.numbers[:2]

    def __str__(self) -> str:
        return self.text
