"""Measured points as flat rows: what the report's table, its CSV, and its plots are made of.

Times are in milliseconds in rows, as people read them; points keep seconds.
"""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trtbuild.perf.records import METRICS, THROUGHPUTS, Point

Row = dict[str, Any]
STATISTICS = ("mean", "p50", "p90", "p95", "p99", "max")
WITH_INTERVAL = ("mean", "p50", "p99")


def make_rows(runs: Mapping[str, Sequence[Point]]) -> list[Row]:
    """One row for each point of {run's name: its points}; `series` is what a line of a plot is, `pareto` its front."""
    rows = [_row(run, point) for run, points in runs.items() for point in points]
    _name_series(rows)
    _mark_fronts(rows)
    return rows


def _row(run: str, point: Point) -> Row:
    spec, load = point.spec, point.spec.load
    row: Row = {
        "run": run, "point_id": point.point_id, "engine": spec.engine, "precision": point.engine.get("precision"),
        "driver": spec.driver, "executor": point.executor, "device": point.device, "load": load.label(),
        "load_kind": load.kind, "load_value": load.value, "isl": spec.isl, "osl": spec.osl,
        "shared_prefix": spec.shared_prefix, "valid": point.valid, "why_invalid": point.why_invalid,
        "num_requests": point.num_requests, "num_errors": point.num_errors, "seconds": _rounded(point.seconds),
    }  # fmt: skip
    for name in THROUGHPUTS:
        _put(row, name, _value(point.throughput.get(name)), _interval(point.throughput.get(name)))
    for name in METRICS:
        _put_metric(row, name, point.metrics.get(name) or {})
    row |= {
        "goodput_per_s": _rounded(point.goodput_per_s),
        "queue_ms": _milliseconds(point.server, "queue_s"), "compute_ms": _milliseconds(point.server, "compute_s"),
        "client_cpu_share": _rounded(point.client.get("cpu_share")),
        "energy_per_token_j": _rounded(point.energy_per_token_j),
        "started_at": point.started_at,
    }  # fmt: skip
    return row | _telemetry(point.telemetry) | accuracy_figures(point.engine.get("accuracy"))


def _put_metric(row: Row, name: str, found: Mapping[str, Any]) -> None:
    is_time = name.endswith("_s") and not name.endswith("_per_s")
    factor, base = (1000.0, f"{name.removesuffix('_s')}") if is_time else (1.0, name)
    unit = "_ms" if is_time else ""
    for statistic in STATISTICS:
        value = found.get(statistic)
        interval = (found.get("ci") or {}).get(statistic) if statistic in WITH_INTERVAL else None
        scaled = None if value is None else value * factor
        _put(row, f"{base}_{statistic}{unit}", scaled, None if interval is None else [x * factor for x in interval])


def _put(row: Row, name: str, value: float | None, interval: Sequence[float] | None) -> None:
    row[name] = _rounded(value)
    if interval is not None:
        row[f"{name}_low"], row[f"{name}_high"] = (_rounded(bound) for bound in interval)


def _value(found: Mapping[str, Any] | None) -> float | None:
    """A throughput is {"value", "ci"}; older runs wrote the mean under its own name."""
    return None if not found else found.get("value", found.get("mean"))


def _interval(found: Mapping[str, Any] | None) -> Sequence[float] | None:
    return None if not found else found.get("ci")


def _milliseconds(values: Mapping[str, float] | None, name: str) -> float | None:
    return None if not values or values.get(name) is None else _rounded(values[name] * 1000)


def _rounded(value: float | None) -> float | None:
    """Six digits; what JSON has no number for is left out."""
    if value is None or isinstance(value, bool) or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _telemetry(summary: Mapping[str, Mapping[str, float]]) -> Row:
    """Sums over GPUs of what adds up, the highest of what does not; a column only where it was measured."""
    found: Row = {}
    columns = (
        ("gpu_utilization_percent", "_utilization_percent", "mean", max), ("gpu_power_w", "_power_w", "mean", sum),
        ("gpu_memory_used_bytes", "_memory_used_bytes", "max", sum),
        ("gpu_temperature_c", "_temperature_c", "max", max),
        ("gpu_slowed_share", "_slowed_share", "mean", max),
    )  # fmt: skip
    for name, ending, statistic, merge in columns:
        values = [held[statistic] for column, held in summary.items() if _is_gpu(column, ending)]
        if values:
            found[name] = _rounded(merge(values))
    if "host_cpu_percent" in summary:
        found["host_cpu_percent"] = _rounded(summary["host_cpu_percent"]["mean"])
    resident = [held["max"] for column, held in summary.items() if column.endswith("_rss_bytes")]
    return found | ({"server_rss_bytes": _rounded(sum(resident))} if resident else {})


def _is_gpu(column: str, ending: str) -> bool:
    head = column.removesuffix(ending)
    return column.endswith(ending) and head.startswith("gpu") and head[3:].isdigit()


def accuracy_figures(record: Mapping[str, Any] | None) -> Row:
    """Of the passport's record: the worst of its texts, and whether it passed; empty without one."""
    texts = (record or {}).get("texts") or []
    if not record or not texts:
        return {}
    return {
        "accuracy_passed": record.get("passed"),
        "ppl_increase_percent": _rounded(100 * max(float(text["ppl_increase"]) for text in texts)),
        "mean_kl": _rounded(max(float(text["mean_kl"]) for text in texts)),
        "top1_percent": _rounded(100 * min(float(text["top1"]) for text in texts)),
    }


def _name_series(rows: Sequence[Row]) -> None:
    """The engine, and whatever else differs between rows: executor, driver, shared prefix, run."""
    differing = [
        key for key in ("executor", "driver", "shared_prefix", "device", "run") if len({row[key] for row in rows}) > 1
    ]
    for row in rows:
        parts = [f"prefix {row[key]}" if key == "shared_prefix" else str(row[key]) for key in differing]
        row["series"] = " · ".join([row["engine"], *parts])


def _mark_fronts(rows: Sequence[Row]) -> None:
    """`pareto`: no other valid point of the same series and lengths has more of one speed and no less of the other."""
    groups: defaultdict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        row["pareto"] = False
        if row["valid"] and row["output_tokens_per_s"] is not None and row["user_tokens_per_s_mean"] is not None:
            groups[row["series"], row["isl"], row["osl"]].append(row)
    for group in groups.values():
        for row in pareto_front(group, "user_tokens_per_s_mean", "output_tokens_per_s"):
            row["pareto"] = True


def pareto_front(rows: Iterable[Row], x: str, y: str) -> list[Row]:
    """Rows that no other dominates, with the largest x first; of equal ones the first."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (-row[x], -row[y])):
        if not front or row[y] > front[-1][y]:
            front.append(row)
    return front


def to_csv(rows: Sequence[Row]) -> str:
    """All columns of all rows, in their order."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    output = io.StringIO()
    writer = csv.DictWriter(output, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return output.getvalue()
