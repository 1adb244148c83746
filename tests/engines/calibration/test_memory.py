"""Freed memory goes back to the system."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from trtbuild.engines.calibration.memory import trim_heap


def anonymous_mib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) // 1024


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="no malloc_trim in this C library")
def test_pages_between_blocks_in_use_are_returned() -> None:
    """Blocks that are too small for a mapping of their own, 128 MiB in all, one of 32 still in use."""
    blocks = [bytearray(b"x") * (1 << 16) for _ in range(2048)]
    full = anonymous_mib()
    kept = blocks[::32]
    del blocks
    trim_heap()
    assert anonymous_mib() < full - 60
    assert all(len(block) == 1 << 16 for block in kept)
