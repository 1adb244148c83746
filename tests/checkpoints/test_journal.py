"""The journal keeps whole entries, whatever byte a kill cut it at."""

from __future__ import annotations

import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trtbuild.checkpoints.journal import Journal

ENTRIES = {"a": 1, "b/0": {"x": [1.5, None], "name": 'quo"te\nline'}, "c": "ü \r\u2028"}


def write(file: Path) -> list[int]:
    """File sizes after each entry."""
    journal, sizes = Journal(file), [0]
    for key, value in ENTRIES.items():
        journal.add(key, value)
        sizes.append(file.stat().st_size)
    return sizes


def test_entries_are_read_back(tmp_path: Path) -> None:
    write(tmp_path / "j")
    assert Journal(tmp_path / "j").entries == ENTRIES
    lines = (tmp_path / "j").read_bytes().split(b"\n")[:-1]
    assert [json.loads(line[9:]) for line in lines] == [list(pair) for pair in ENTRIES.items()]
    assert all(int(line[:8], 16) == zlib.crc32(line[9:]) for line in lines)


def test_cut_at_any_byte(tmp_path: Path) -> None:
    """What was whole stays, the torn line goes, and the next entry follows what stayed."""
    file = tmp_path / "j"
    sizes = write(file)
    whole = file.read_bytes()
    for length in range(len(whole) + 1):
        file.write_bytes(whole[:length])
        journal = Journal(file)
        kept = sum(size <= length for size in sizes[1:])
        assert list(journal.entries) == list(ENTRIES)[:kept], length
        assert file.stat().st_size == sizes[kept]
        journal.add("next", kept)
        assert Journal(file).entries == dict(list(ENTRIES.items())[:kept]) | {"next": kept}


@pytest.mark.parametrize("line", [0, 1, 2])
def test_a_damaged_line_and_what_follows_are_dropped(tmp_path: Path, line: int) -> None:
    file = tmp_path / "j"
    sizes = write(file)
    raw = bytearray(file.read_bytes())
    raw[sizes[line] + 12] ^= 1
    file.write_bytes(raw)
    assert list(Journal(file).entries) == list(ENTRIES)[:line]


def test_threads_never_mix_their_lines(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: journal.add(f"unit{i}", "x" * (i % 90)), range(400)))
    assert Journal(tmp_path / "j").entries == {f"unit{i}": "x" * (i % 90) for i in range(400)}
