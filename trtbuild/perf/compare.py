"""`trtbuild perf compare A B`: two runs point by point, with intervals, and what cannot be compared and why.

The change of a figure is B / A - 1. Its interval follows from both points' own 95 % intervals, taken as normal in the
logarithm: the standard errors of log A and log B add in squares. It holds what varies between requests, not what varies
between two runs of the same thing on another day.
A figure is worse or better where that interval leaves 0 out after Bonferroni's correction for all figures compared, so
that a large sweep against itself does not fail by chance; a regression is worse by more than the limit, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

from trtbuild.errors import CheckFailed
from trtbuild.perf.records import Point

Verdict = Literal["worse", "better", "same", "unknown"]

# Where a figure is in a point, and whether more of it is better.
FIGURES: dict[str, tuple[str, str, bool]] = {
    "requests/s": ("requests_per_s", "mean", True), "output tokens/s": ("output_tokens_per_s", "mean", True),
    "TTFT p50": ("ttft_s", "p50", False), "TTFT p99": ("ttft_s", "p99", False), "ITL p50": ("itl_s", "p50", False),
    "ITL p99": ("itl_s", "p99", False), "end-to-end mean": ("e2e_s", "mean", False),
}  # fmt: skip
_CONFIDENCE = 0.95
# Other values of these make two points two different measurements; of the others, only a note.
_HARDWARE = ("cpu", "cores", "memory_bytes", "gpus")
_VERSIONS = ("python", "trtbuild", "triton", "torch", "tensorrt_rtx")
_BUSY = 0.5


@dataclass(frozen=True)
class Change:
    """Of one figure: values in base units, and B / A - 1 with its 95 % interval (None without both intervals)."""

    figure: str
    before: float
    after: float
    change: float
    interval: tuple[float, float] | None
    verdict: Verdict
    regression: bool


@dataclass(frozen=True)
class PointComparison:
    """One load of one engine; `why_not` says why its changes are not given, `notes` what differs all the same."""

    label: str
    why_not: list[str]
    notes: list[str]
    changes: list[Change]


@dataclass(frozen=True)
class Comparison:
    """`only_before` and `only_after` hold labels of points that the other run lacks, with what is nearest there."""

    points: list[PointComparison]
    only_before: list[str]
    only_after: list[str]

    @property
    def regressions(self) -> list[tuple[str, Change]]:
        return [(point.label, change) for point in self.points for change in point.changes if change.regression]

    @property
    def compared(self) -> int:
        return sum(not point.why_not for point in self.points)

    def check(self, limit: float) -> None:
        """Raise `CheckFailed` for regressions, for points that became invalid, and where nothing could be compared."""
        problems = [
            f"{label}: {change.figure} {_signed(change.change)} (from {change.before:.4g} to {change.after:.4g})"
            for label, change in self.regressions
        ]
        problems += [
            f"{one.label}: {why}" for one in self.points for why in one.why_not if why.startswith("B is invalid")
        ]
        if not self.compared:
            reasons = sorted({why for point in self.points for why in point.why_not})
            problems.append("nothing could be compared: " + ("; ".join(reasons) or "the runs share no point"))
        if problems:
            raise CheckFailed(f"worse by more than {100 * limit:g} %:" + "".join(f"\n  - {one}" for one in problems))

    def to_dict(self) -> dict[str, Any]:
        points = [
            {
                "point": one.label, "why_not": one.why_not, "notes": one.notes,
                "changes": [vars(change) for change in one.changes],
            }
            for one in self.points
        ]  # fmt: skip
        return {"points": points, "only_before": self.only_before, "only_after": self.only_after}


def compare_runs(
    before: Sequence[Point], after: Sequence[Point], *, limit: float = 0.05, other_hardware: bool = False
) -> Comparison:
    """Points with the same engine, driver, load and lengths are compared.

    Where each run has a single engine and not the same, the two engines are compared. `limit` is the relative change
    that makes a regression. `other_hardware`: compare all the same, with a note.
    """
    engines = [{point.spec.engine for point in run} for run in (before, after)]
    across = all(len(names) == 1 for names in engines) and engines[0] != engines[1]
    old = {_key(point, across): point for point in before}
    new = {_key(point, across): point for point in after}
    shared = [key for key in old if key in new]
    count = max(1, len(shared) * len(FIGURES))
    strictness = NormalDist().inv_cdf(1 - (1 - _CONFIDENCE) / count)
    points = [_compare(old[key], new[key], limit, strictness, other_hardware) for key in shared]
    return Comparison(
        points,
        [_lonely(old[key], after) for key in old if key not in new],
        [_lonely(new[key], before) for key in new if key not in old],
    )


def _key(point: Point, across: bool) -> tuple[Any, ...]:
    spec, load = point.spec, point.spec.load
    trace = load.trace_digest or load.trace
    what = (spec.driver, load.kind, load.value, load.arrival, trace, spec.isl, spec.osl, spec.shared_prefix)
    return what if across else (spec.engine, *what)


def _compare(a: Point, b: Point, limit: float, strictness: float, other_hardware: bool) -> PointComparison:
    why_not = [f"{name} is invalid: {point.why_invalid}" for name, point in (("A", a), ("B", b)) if not point.valid]
    hardware = _hardware(a, b)
    notes = _notes(a, b)
    (notes if other_hardware else why_not).extend(hardware)
    changes = [] if why_not else _changes(a, b, limit, strictness)
    label = a.spec.label() if a.spec.engine == b.spec.engine else f"{a.spec.label()} -> {b.spec.engine}"
    return PointComparison(label, why_not, notes, changes)


def _hardware(a: Point, b: Point) -> list[str]:
    """What of the machine, the GPU's driver or the executor differs."""
    pairs = [("executor", a.executor, b.executor), ("device", a.device, b.device)]
    pairs += [(name, a.environment.get(name), b.environment.get(name)) for name in _HARDWARE]
    return [f"{name} differs: {_said(x)} in A, {_said(y)} in B" for name, x, y in pairs if x != y]


def _notes(a: Point, b: Point) -> list[str]:
    notes = [
        f"{name} {a.environment.get(name)} -> {b.environment.get(name)}"
        for name in _VERSIONS
        if a.environment.get(name) != b.environment.get(name)
    ]
    if a.environment.get("hostname_digest") != b.environment.get("hostname_digest"):
        notes.append("another machine of the same kind")
    if a.spec.engine == b.spec.engine and a.engine.get("digest") != b.engine.get("digest"):
        notes.append("the engine was built again")
    for name in sorted({*(a.engine.get("serving") or {}), *(b.engine.get("serving") or {})}):
        x, y = ((point.engine.get("serving") or {}).get(name) for point in (a, b))
        notes += [] if x == y else [f"served with {name} {x} in A, {y} in B"]
    if a.spec.num_requests != b.spec.num_requests:
        notes.append(f"{a.spec.num_requests} requests in A, {b.spec.num_requests} in B")
    for name, point in (("A", a), ("B", b)):
        load, cores = point.environment.get("load_before"), point.environment.get("cores") or 1
        if load is not None and load > _BUSY * cores:
            notes.append(f"the machine was busy before {name}: load {load:.1f} on {cores} cores")
    return notes


def _changes(a: Point, b: Point, limit: float, strictness: float) -> list[Change]:
    found = []
    for figure, (name, statistic, more_is_better) in FIGURES.items():
        before, after = _figure(a, name, statistic), _figure(b, name, statistic)
        if before is None or after is None or before[0] <= 0 or after[0] <= 0:
            continue
        found.append(_change(figure, before, after, limit, strictness, more_is_better))
    return found


def _change(
    figure: str,
    before: tuple[float, Sequence[float] | None],
    after: tuple[float, Sequence[float] | None],
    limit: float,
    strictness: float,
    more_is_better: bool,
) -> Change:
    (x, x_interval), (y, y_interval) = before, after
    change = y / x - 1
    loss = -change if more_is_better else change
    errors = [_log_error(interval) for interval in (x_interval, y_interval)]
    if any(error is None for error in errors):
        # Without intervals nobody knows whether it is noise; a gate had better stop.
        return Change(figure, x, y, change, None, "unknown", loss > limit)
    error = math.hypot(*(error for error in errors if error is not None))
    width = NormalDist().inv_cdf(0.5 + _CONFIDENCE / 2) * error
    interval = (math.exp(math.log(y / x) - width) - 1, math.exp(math.log(y / x) + width) - 1)
    significant = abs(math.log(y / x)) > strictness * error
    verdict: Verdict = "same" if not significant else "worse" if loss > 0 else "better"
    return Change(figure, x, y, change, interval, verdict, verdict == "worse" and loss > limit)


def _figure(point: Point, name: str, statistic: str) -> tuple[float, Sequence[float] | None] | None:
    """Value and interval; None where the point has none."""
    held: Mapping[str, Any] | None = point.metrics.get(name) or point.throughput.get(name)
    if not held or held.get(statistic) is None:
        return None
    interval = held.get("ci")
    return held[statistic], interval.get(statistic) if isinstance(interval, Mapping) else interval


def _log_error(interval: Sequence[float] | None) -> float | None:
    if interval is None or not 0 < interval[0] <= interval[1]:
        return None
    return (math.log(interval[1]) - math.log(interval[0])) / (2 * NormalDist().inv_cdf(0.5 + _CONFIDENCE / 2))


def _lonely(point: Point, others: Sequence[Point]) -> str:
    """Its label, and how the point of the other run that is most like it differs."""
    if not others:
        return point.spec.label()
    # Of equally many differences, that of the driver alone is the smallest: it is the same load.
    nearest = min(others, key=lambda other: (len(_differences(point, other)), other.spec.driver == point.spec.driver))
    return f"{point.spec.label()}; nearest there: " + ", ".join(_differences(point, nearest))


def _differences(a: Point, b: Point) -> list[str]:
    pairs = [
        ("engine", a.spec.engine, b.spec.engine), ("driver", a.spec.driver, b.spec.driver),
        ("load", a.spec.load.label(), b.spec.load.label()), ("ISL", a.spec.isl, b.spec.isl),
        ("OSL", a.spec.osl, b.spec.osl), ("shared prefix", a.spec.shared_prefix, b.spec.shared_prefix),
    ]  # fmt: skip
    return [f"{name} {y}" for name, x, y in pairs if x != y]


def _said(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"{gpu.get('name')} (driver {gpu.get('driver')})" for gpu in value) or "none"
    return str(value)


def _signed(part: float) -> str:
    return f"{100 * part:+.1f} %"


def print_comparison(comparison: Comparison) -> None:
    """A line for each figure that is not the same, a count of those that are, and every reason."""
    import click

    colours = {"worse": "red", "better": "green", "unknown": "yellow"}
    for point in comparison.points:
        click.echo(f"{point.label}" + (": not comparable" if point.why_not else ""))
        for line in point.why_not:
            click.echo(f"  {line}")
        for change in point.changes:
            interval = change.interval
            span = "no interval" if interval is None else f"{_signed(interval[0])} to {_signed(interval[1])}"
            verdict = click.style(change.verdict, fg=colours.get(change.verdict))
            click.echo(
                f"  {change.figure:<16} {change.before:>10.4g} -> {change.after:<10.4g} {_signed(change.change):>9}"
                f"  ({span})  {verdict}{', regression' if change.regression else ''}"
            )
        for note in point.notes:
            click.echo(f"  note: {note}")
    for name, labels in (("A", comparison.only_before), ("B", comparison.only_after)):
        for label in labels:
            click.echo(f"only in {name}: {label}")
    verdicts = [change.verdict for point in comparison.points for change in point.changes]
    counts = ", ".join(f"{verdicts.count(name)} {name}" for name in ("worse", "better", "same", "unknown"))
    click.echo(
        f"{comparison.compared} of {len(comparison.points)} shared points compared: {counts}; "
        "intervals are of requests, not of runs"
    )
