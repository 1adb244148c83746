"""Telemetry files as the page's curves: fewer points, base units that people read, grouped by unit."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trtbuild.perf.gpu_reader import is_slowed
from trtbuild.perf.records import Point

# Ending of a column, its plot, and what its values are divided by.
_GROUPS = (
    ("_percent", "%", 1.0), ("_power_w", "W", 1.0), ("_bytes", "GiB", 2.0**30), ("_mhz", "MHz", 1.0),
    ("_temperature_c", "°C", 1.0),
)  # fmt: skip
# Values in one page: some 1.5 MB of text.
_MAX_VALUES, _MAX_ROWS, _MIN_ROWS = 250_000, 120, 20


def read_telemetry(folder: Path, points: Sequence[Point]) -> dict[str, Any]:
    """{point_id: {"label", "time_s", "columns": {name: {"group", "values"}}}} of the files that are there.

    Rows are averaged into as many as a page can hold; a value that was not read is None.
    """
    tables = {point.point_id: _read(folder / f"{point.point_id}.csv") for point in points}
    tables = {key: table for key, table in tables.items() if table}
    num_columns = sum(len(table[0]) for table in tables.values())
    num_rows = max(_MIN_ROWS, min(_MAX_ROWS, _MAX_VALUES // max(1, num_columns)))
    labels = {point.point_id: point.spec.label() for point in points}
    return {key: _curves(labels[key], table, num_rows) for key, table in tables.items()}


def _read(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _curves(label: str, table: Sequence[Mapping[str, str]], num_rows: int) -> dict[str, Any]:
    size = math.ceil(len(table) / num_rows)
    buckets = [table[start : start + size] for start in range(0, len(table), size)]
    columns: dict[str, Any] = {}
    for name in table[0]:
        values: list[float | None]
        if name.endswith("_throttle_reasons"):
            values = [_mean([float(is_slowed(row[name])) for row in bucket if row[name]]) or 0.0 for bucket in buckets]
            if any(values):
                columns[name.replace("throttle_reasons", "slowed")] = {"group": "slowed", "values": values}
            continue
        for ending, group, divisor in _GROUPS:
            if name.endswith(ending):
                values = [_mean([float(row[name]) / divisor for row in bucket if row[name]]) for bucket in buckets]
                columns[name.removesuffix(ending)] = {"group": group, "values": values}
    return {"label": label, "time_s": [_mean([float(row["time_s"]) for row in b]) for b in buckets], "columns": columns}


def _mean(values: Sequence[float]) -> float | None:
    return float(f"{sum(values) / len(values):.4g}") if values else None
