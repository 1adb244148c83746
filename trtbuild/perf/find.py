"""`trtbuild perf find`: the highest concurrency or request rate that meets an SLO, and the cheapest engine there.

The load is doubled until it misses the SLO, then bisected. A load whose figures are near a bound is measured again and
the majority counts; the answer itself is confirmed by `repeats` measurements of which the majority must meet the SLO,
and is lowered where they do not. Nothing here knows what measures: `measure` takes a `PointSpec` and gives a `Point`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from trtbuild.errors import Refused
from trtbuild.perf.records import Load, Point, PointSpec

Measure = Callable[[PointSpec], Point]
Statistic = Literal["mean", "p50", "p90", "p95", "p99"]
# A figure within this part of its bound may be on either side by chance.
_NEAR = 0.15
# A rate is looked for down to this part of the first that was tried.
_LOWEST = 1 / 1024


@dataclass(frozen=True)
class Limit:
    """What an engine can take. `value` is None where not even the lowest load meets the SLO.

    point: of the confirmations the one with the median output throughput. ended_by: "slo"; "most" where the highest
    load that was allowed still meets it; or why the next load could not be measured.
    """

    engine: str
    value: float | None
    point: Point | None
    ended_by: str
    num_measured: int
    misses: list[str]
    """What the next higher load missed, in words."""

    @property
    def output_tokens_per_s(self) -> float:
        return 0.0 if self.point is None else float(self.point.throughput["output_tokens_per_s"]["mean"])

    @property
    def num_gpus(self) -> int:
        """Ranks of the engine's layout."""
        layout = {} if self.point is None else self.point.engine.get("layout") or {}
        return int(layout.get("tp", 1)) * int(layout.get("pp", 1))

    def price_per_million(self, gpu_price: float) -> float | None:
        """Of output tokens; `gpu_price` is for one GPU and hour."""
        speed = self.output_tokens_per_s
        return None if speed <= 0 else gpu_price * self.num_gpus / (speed * 3600) * 1e6


def misses(point: Point, slo: Mapping[str, float], statistic: Statistic) -> list[str]:
    """What of the SLO a point misses, in words; requests that failed miss it whatever they took."""
    found = [f"{point.num_errors} of {point.num_requests} requests failed"] if point.num_errors else []
    for name, bound in slo.items():
        value = (point.metrics.get(name) or {}).get(statistic)
        if value is None:
            found.append(f"{name} was not measured")
        elif value > bound:
            found.append(f"{name} {statistic} {1e3 * value:.4g} ms over {1e3 * bound:.4g} ms")
    return found


class LimitSearch:
    """Of one engine under one kind of load; `find` runs it."""

    def __init__(
        self,
        measure: Measure,
        spec: PointSpec,
        slo: Mapping[str, float],
        *,
        statistic: Statistic = "p99",
        most: float = 256,
        repeats: int = 3,
        tolerance: float = 0.05,
        report: Callable[[Point, list[str]], None] | None = None,
    ) -> None:
        """`spec.load.value` is tried first. `tolerance`: of a rate; a concurrency is exact."""
        if spec.load.kind not in ("concurrency", "rate"):
            raise Refused(f"find looks for a concurrency or a rate, not for a {spec.load.kind}")
        if not slo:
            raise Refused("find needs an SLO, such as --slo ttft=500ms,itl=50ms")
        if most < spec.load.value:
            raise Refused(f"the highest load {most:g} is below the first to be tried, {spec.load.value:g}")
        self._measure, self._spec, self._slo = measure, spec, dict(slo)
        self._statistic: Statistic = statistic
        self._most, self._repeats, self._tolerance = most, max(1, repeats), tolerance
        self._report = report
        self._tried: dict[float, list[Point]] = {}

    def find(self) -> Limit:
        low, high = self._bracket()
        while True:
            while low and high is not None and (between := self._between(low, high)) is not None:
                low, high = (between, high) if self._meets(between) else (low, between)
            if not low or self._confirmed(low):
                return self._limit(low, high)
            # The answer did not hold: it is a load that is missed from now on.
            high = low
            low = max((value for value in self._tried if value < high and self._passed(value)), default=0.0)
            if not low:
                low = self._below(high)

    def _bracket(self) -> tuple[float, float | None]:
        """The highest load known to meet the SLO (0: none), and the lowest known to miss it (None: none)."""
        value = self._spec.load.value
        if not self._meets(value):
            return self._below(value), value
        while value < self._most:
            bigger = min(2 * value, self._most)
            if not self._meets(bigger):
                return value, bigger
            value = bigger
        return value, None

    def _below(self, value: float) -> float:
        """A load below one that is missed that meets the SLO; 0 where none does."""
        lowest = 1 if self._is_whole else self._spec.load.value * _LOWEST
        while value > lowest:
            value = max(lowest, float(int(value / 2)) if self._is_whole else value / 2)
            if self._meets(value):
                return value
        return 0.0

    def _between(self, low: float, high: float) -> float | None:
        """Half-way, or None where they are as near as they have to be."""
        if self._is_whole:
            return float(int(low + high) // 2) if high - low > 1 else None
        return (low * high) ** 0.5 if high / low > 1 + self._tolerance else None

    @property
    def _is_whole(self) -> bool:
        return self._spec.load.kind == "concurrency"

    def _meets(self, value: float) -> bool:
        """By one valid measurement, or by the majority of `repeats` where it is near a bound."""
        point = self._once(value)
        if not point.valid or self._is_near(point):
            self._repeat(value, self._repeats if point.valid else 1)
        return self._passed(value)

    def _confirmed(self, value: float) -> bool:
        self._repeat(value, self._repeats)
        return self._passed(value)

    def _repeat(self, value: float, wanted: int) -> None:
        """Until so many are valid; an invalid one says nothing of the server, but not every one can be made valid."""
        tried = self._tried[value]
        while sum(point.valid for point in tried) < wanted:
            if sum(not point.valid for point in tried) >= self._repeats:
                return
            self._once(value)

    def _once(self, value: float) -> Point:
        """Another seed for each: the same one would be the same measurement."""
        before = self._tried.setdefault(value, [])
        load = replace(self._spec.load, value=int(value) if self._is_whole else value)
        streams = load.num_streams or 0
        spec = replace(
            self._spec, load=load, seed=self._spec.seed + len(before),
            num_requests=max(self._spec.num_requests, 3 * streams),
        )  # fmt: skip
        before.append(self._measure(spec))
        if self._report is not None:
            self._report(before[-1], self._missed(before[-1]))
        return before[-1]

    def _missed(self, point: Point) -> list[str]:
        return misses(point, self._slo, self._statistic) if point.valid else [f"invalid: {point.why_invalid}"]

    def _passed(self, value: float) -> bool:
        """Of the valid ones; a tie is a miss, as is a load that nobody could measure."""
        points = [point for point in self._tried[value] if point.valid]
        return 2 * sum(not self._missed(point) for point in points) > len(points)

    def _why_missed(self, value: float) -> list[str]:
        """By the first valid measurement that did; where none is valid, why."""
        points = sorted(self._tried[value], key=lambda point: not point.valid)
        return next((missed for point in points if (missed := self._missed(point))), [])

    def _is_near(self, point: Point) -> bool:
        values = [((point.metrics.get(name) or {}).get(self._statistic), bound) for name, bound in self._slo.items()]
        return any(value is not None and abs(value / bound - 1) < _NEAR for value, bound in values)

    def _limit(self, low: float, high: float | None) -> Limit:
        measured = sum(map(len, self._tried.values()))
        missed = [] if high is None else self._why_missed(high)
        ended_by = "most" if high is None else next((line for line in missed if line.startswith("invalid")), "slo")
        if not low:
            return Limit(self._spec.engine, None, None, ended_by, measured, missed)
        held = [point for point in self._tried[low] if not self._missed(point)]
        held.sort(key=lambda point: point.throughput["output_tokens_per_s"]["mean"])
        return Limit(self._spec.engine, low, held[(len(held) - 1) // 2], ended_by, measured, missed)


def find_limits(
    measure: Measure,
    engines: Sequence[str],
    spec: PointSpec,
    slo: Mapping[str, float],
    **options: Any,
) -> list[Limit]:
    """`LimitSearch` of every engine, one after the other; the fastest at its limit stands first."""
    limits = [LimitSearch(measure, replace(spec, engine=engine), slo, **options).find() for engine in engines]
    return sorted(limits, key=lambda limit: -limit.output_tokens_per_s)


def cheapest(limits: Sequence[Limit], gpu_price: float) -> Limit | None:
    """Per output token, of those that meet the SLO at all."""
    prices = [(price, limit) for limit in limits if (price := limit.price_per_million(gpu_price)) is not None]
    return min(prices, key=lambda pair: pair[0])[1] if prices else None


def print_limits(limits: Sequence[Limit], kind: str, gpu_price: float | None) -> None:
    """A line for each engine, and the cheapest."""
    import click

    unit = " requests/s" if kind == "rate" else ""
    for limit in limits:
        if limit.value is None:
            said = "not even the lowest could be measured" if limit.ended_by != "slo" else f"no {kind} meets the SLO"
            click.echo(f"{limit.engine}: {said}: {'; '.join(limit.misses)}")
            continue
        ended = {"slo": "; ".join(limit.misses), "most": "the highest that was allowed"}.get(
            limit.ended_by, limit.ended_by
        )
        price = None if gpu_price is None else limit.price_per_million(gpu_price)
        cost = "" if price is None else f", {price:.4g} per million output tokens on {limit.num_gpus} GPU(s)"
        click.echo(
            f"{limit.engine}: {kind} {limit.value:.4g}{unit}, {limit.output_tokens_per_s:.4g} output tokens/s{cost} "
            f"({limit.num_measured} measurements; next: {ended})"
        )
    best = None if gpu_price is None else cheapest(limits, gpu_price)
    if best is not None:
        click.echo(f"cheapest that meets the SLO: {best.engine}")


def first_load(kind: Literal["concurrency", "rate"], first: float | None) -> Load:
    """Where the search begins: one stream, or one request per second, arriving by chance."""
    return Load(kind, first or 1.0, "closed" if kind == "concurrency" else "poisson")
