"""Sizes as people read them."""

from __future__ import annotations

import re


def format_bytes(size: float) -> str:
    """In GiB from half of one up, else in MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"


_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {unit + "b": size for unit, size in _UNITS.items() if unit in ("k", "m", "g", "t")}
_UNITS |= {f"{unit}ib": 2 ** (10 * power) for power, unit in enumerate(("k", "m", "g", "t"), 1)}


def parse_bytes(text: str) -> int:
    """22GiB, 500MB, 1.5g or a plain number of bytes; ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is not a size such as 22GiB, 500MB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_share(text: str) -> float:
    """0.5% or 0.005 as a fraction; ValueError for anything that is not a number from 0 up."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e-?\d+)?)\s*(%?)\s*", text.lower())
    if match is None:
        raise ValueError(f"{text!r} is not a share such as 0.5% or 0.005")
    return float(match[1]) / (100 if match[2] else 1)
