"""An append-only record of finished units, so that a killed command goes on where it was.

Each line is a JSON value and the crc32 of its text. A line that a kill cut short fails its checksum; it and whatever
follows are dropped.
"""

from __future__ import annotations

import json
import threading
import zlib
from pathlib import Path
from typing import Any


class Journal:
    """Entries by key; safe to append to from several threads."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self.entries: dict[str, Any] = {}
        valid = self._read()
        with file.open("r+b" if file.exists() else "wb") as stream:
            stream.truncate(valid)

    def add(self, key: str, value: Any) -> None:
        """Record `key` as done; the unit's bytes must have been written before."""
        text = json.dumps([key, value])
        line = f"{zlib.crc32(text.encode()):08x} {text}\n"
        with self._lock, self._file.open("a", encoding="utf-8") as stream:
            stream.write(line)
            self.entries[key] = value

    def _read(self) -> int:
        """Load entries; the number of bytes that are good."""
        good = 0
        if not self._file.exists():
            return good
        for line in self._file.read_bytes().splitlines(keepends=True):
            checksum, _, text = line.partition(b" ")
            if not line.endswith(b"\n") or f"{zlib.crc32(text.rstrip()):08x}".encode() != checksum:
                break
            key, value = json.loads(text)
            self.entries[key] = value
            good += len(line)
        return good
