"""From request records to a point's figures: percentiles with bootstrap intervals, throughput, goodput.

Definitions. TTFT: from when a request was sent to its first token; in an open loop from when it was due, so that a
client or server that stalls cannot hide requests (coordinated omission). ITL: the gaps between the tokens of a stream,
all of them pooled. TPOT: (last - first) / (n - 1) of a request. E2E: to the last token. User tokens/s: 1 / mean ITL of
a request. Intervals: 95 %, percentile bootstrap over requests (a request's gaps are drawn together), seeded.
Throughput of a closed loop of N streams: N / the mean cycle of a request, from the end of the one before to its own
end, which has no edges to cut; of an open loop: what came within the steady window, with intervals from 20 slices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trtbuild.perf.records import METRICS, PointSpec, RequestRecord

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}
_INTERVALS_OF = ("mean", "p50", "p99")
_NUM_RESAMPLES, _CONFIDENCE, _SEED = 1000, 0.95, 20240
_NUM_SLICES = 20
# Above so many pooled gaps a resample draws from a thinned pool: the intervals' error is then far below their width.
_MOST_GAPS = 20_000
# Why a point is invalid: CPU of a client process, and its timers' lateness beside the ITL that it measures.
MOST_CPU_SHARE, MOST_DELAY_SHARE, MOST_DELAY_S = 0.8, 0.25, 0.01


@dataclass(frozen=True)
class Steady:
    """The requests that count: sent after the ramp and before the drain."""

    records: list[RequestRecord]
    begin_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.begin_s

    @property
    def answered(self) -> list[RequestRecord]:
        return [one for one in self.records if one.error is None and one.token_times_s]


@dataclass(frozen=True)
class Figures:
    """Those fields of a `Point` that follow from its records."""

    num_requests: int
    num_errors: int
    errors: dict[str, int]
    metrics: dict[str, dict[str, Any]]
    throughput: dict[str, dict[str, Any]]
    goodput_per_s: float | None
    steady: dict[str, float]


def figures_of(
    spec: PointSpec,
    records: Sequence[RequestRecord],
    window: tuple[float, float] | None = None,
    slo: Mapping[str, float] | None = None,
) -> Figures:
    """Everything of a point; `window` as in `Measured`."""
    steady = steady_part(records, *(window or steady_window(spec, records)))
    answered, open_loop = steady.answered, not spec.load.is_closed
    errors = Counter(one.error_kind for one in steady.records if one.error_kind is not None)
    each = {metric: per_request(metric, answered, open_loop) for metric in METRICS}
    throughput = throughput_of(spec, steady, records) if answered else {}
    goodput = None
    if slo is not None:
        share = np.mean([meets(one, slo, open_loop) for one in steady.records]) if steady.records else 0.0
        goodput = float(share * _attempts_per_s(spec, steady))
    first, last = min((r.start_s for r in records), default=0.0), max((r.finished_s for r in records), default=0.0)
    return Figures(
        num_requests=len(steady.records),
        num_errors=sum(errors.values()),
        errors=dict(errors),
        metrics={metric: summary(groups) for metric, groups in each.items() if any(map(len, groups))},
        throughput=throughput,
        goodput_per_s=goodput,
        steady={
            "ramp_s": round(max(0.0, steady.begin_s - first), 6),
            "drain_s": round(max(0.0, last - steady.end_s), 6),
            "seconds": round(steady.seconds, 6),
            "kept_requests": len(steady.records),
        },
    )


def steady_window(spec: PointSpec, records: Sequence[RequestRecord]) -> tuple[float, float]:
    """Of a tool that sends a fixed number of requests and says no window itself.

    It begins when the load is reached (the last stream has sent its first request; an open loop has its first answer)
    and ends with the first answer after which nothing was sent; see `steady_part` for what is kept.
    """
    if not records:
        return 0.0, 0.0
    starts = sorted(one.start_s for one in records)
    if spec.load.kind == "trace":
        return starts[0] - 1.0, max(one.finished_s for one in records)
    if not spec.load.is_closed:
        return min(one.finished_s for one in records), starts[-1]
    begin = starts[min(len(starts), int(spec.load.value)) - 1]
    after = [one.finished_s for one in records if one.finished_s >= starts[-1]]
    # Sent before the load fell, and over before it did.
    end = min(after, default=starts[-1])
    kept = [one.start_s for one in records if one.start_s > begin and one.finished_s <= end]
    return begin, max(kept, default=begin)


def steady_part(records: Sequence[RequestRecord], begin_s: float, end_s: float) -> Steady:
    """Requests sent after `begin_s`, and until `end_s`."""
    return Steady([one for one in records if begin_s < one.start_s <= end_s], begin_s, end_s)


def per_request(metric: str, records: Sequence[RequestRecord], open_loop: bool = False) -> list[np.ndarray]:
    """One array per request: its gaps for itl_s, one value or none for the others."""
    return [_VALUES[metric](one, _begin(one, open_loop), np.asarray(one.token_times_s)) for one in records]


def summary(groups: Sequence[np.ndarray]) -> dict[str, Any]:
    """mean, percentiles, max, and ci of some of them; `groups`: the values of each request."""
    values = np.concatenate(groups)
    found = {"mean": values.mean(), **_percentiles(values), "max": values.max()}
    intervals = _intervals([one for one in groups if len(one)])
    return {name: float(value) for name, value in found.items()} | {"ci": intervals}


def throughput_of(spec: PointSpec, steady: Steady, records: Sequence[RequestRecord]) -> dict[str, dict[str, Any]]:
    """Of answered requests; tokens of an answer and of its prompt."""
    if spec.load.is_closed:
        return _closed_throughput(int(spec.load.value), steady)
    edges = np.linspace(steady.begin_s, steady.end_s, _NUM_SLICES + 1)
    ended = [one for one in records if one.error is None and one.token_times_s]
    at, totals = [one.finished_s for one in ended], [one.prompt_tokens + one.output_tokens for one in ended]
    tokens = np.concatenate([np.asarray(one.token_times_s) for one in records if one.token_times_s] or [np.empty(0)])
    width = (edges[-1] - edges[0]) / _NUM_SLICES
    if width <= 0:
        return {}
    slices = {
        "requests_per_s": np.histogram(at, edges)[0],
        "output_tokens_per_s": np.histogram(tokens, edges)[0],
        "total_tokens_per_s": np.histogram(at, edges, weights=totals)[0],
    }
    return {name: _rate_of_slices(counts / width) for name, counts in slices.items()}


def meets(record: RequestRecord, slo: Mapping[str, float], open_loop: bool = False) -> bool:
    """Whether a request was answered within every bound; of its ITL the mean counts."""
    if record.error is not None or not record.token_times_s:
        return False
    found = {metric: per_request(metric, [record], open_loop)[0] for metric in slo}
    return all(not len(values) or values.mean() <= slo[metric] for metric, values in found.items())


def saturation(client: Mapping[str, Any], itl_s: float | None) -> str | None:
    """Why the client itself may have been what was measured; None where it was not."""
    share = client.get("cpu_share")
    if share is not None and share > MOST_CPU_SHARE:
        return f"the client was saturated: a process of it took {share:.0%} of a core (at most {MOST_CPU_SHARE:.0%})"
    most = max(MOST_DELAY_S, MOST_DELAY_SHARE * (itl_s or 0.0))
    delay = client.get("loop_delay_p99_s")
    delay = client.get("send_delay_p99_s") if delay is None else delay
    if delay is not None and delay > most:
        return f"the client was late: p99 of its scheduling delay is {1e3 * delay:.1f} ms (at most {1e3 * most:.1f} ms)"
    return None


def _begin(record: RequestRecord, open_loop: bool) -> float:
    return record.due_s if open_loop else record.start_s


_VALUES: dict[str, Callable[[RequestRecord, float, np.ndarray], np.ndarray]] = {
    "ttft_s": lambda record, begin, times: times[:1] - begin,
    "itl_s": lambda record, begin, times: np.diff(times),
    "tpot_s": lambda record, begin, times: (
        (times[-1:] - times[:1]) / max(1, len(times) - 1) if len(times) > 1 else _NONE
    ),
    "e2e_s": lambda record, begin, times: times[-1:] - begin,
    "user_tokens_per_s": lambda record, begin, times: (
        (len(times) - 1) / (times[-1:] - times[:1]) if len(times) > 1 and times[-1] > times[0] else _NONE
    ),
}
_NONE = np.empty(0)


def _percentiles(values: np.ndarray) -> dict[str, float]:
    return dict(zip(PERCENTILES, np.percentile(values, list(PERCENTILES.values())).tolist(), strict=True))


def _intervals(groups: Sequence[np.ndarray]) -> dict[str, list[float]]:
    """95 % intervals by resampling whole requests."""
    rng, count = np.random.default_rng(_SEED), len(groups)
    step = max(1, sum(map(len, groups)) // _MOST_GAPS)
    sums, sizes = np.array([one.sum() for one in groups]), np.array([len(one) for one in groups])
    drawn = rng.integers(0, count, (_NUM_RESAMPLES, count))
    found = {"mean": sums[drawn].sum(1) / sizes[drawn].sum(1)}
    # Percentiles of a resample are weighted percentiles of the sorted pool: a request drawn k times counts k times.
    thinned = [one[::step] for one in groups]
    values = np.concatenate(thinned)
    owner = np.repeat(np.arange(count), [len(one) for one in thinned])
    order = np.argsort(values, kind="stable")
    values, owner = values[order], owner[order]
    quantiles = np.array([PERCENTILES[name] / 100 for name in _INTERVALS_OF[1:]])
    picked = np.empty((_NUM_RESAMPLES, len(quantiles)))
    for index, row in enumerate(drawn):
        weights = np.cumsum(np.bincount(row, minlength=count)[owner])
        picked[index] = values[np.searchsorted(weights, quantiles * weights[-1], side="left").clip(0, len(values) - 1)]
    found |= {name: picked[:, column] for column, name in enumerate(_INTERVALS_OF[1:])}
    return {name: _interval(samples) for name, samples in found.items()}


def _interval(samples: np.ndarray) -> list[float]:
    tail = 50 * (1 - _CONFIDENCE)
    return np.percentile(samples, [tail, 100 - tail]).tolist()


def _closed_throughput(num_streams: int, steady: Steady) -> dict[str, dict[str, Any]]:
    """Streams / mean cycle; a cycle that ended in an error takes time and gives nothing."""
    cycles = np.array([one.finished_s - one.due_s for one in steady.records])
    good = np.array([one.error is None for one in steady.records])
    output = np.array([one.output_tokens for one in steady.records]) * good
    total = output + np.array([one.prompt_tokens for one in steady.records]) * good
    drawn = np.random.default_rng(_SEED).integers(0, len(cycles), (_NUM_RESAMPLES, len(cycles)))
    seconds = cycles[drawn].sum(1)
    found = {}
    for name, gains in (("requests_per_s", good), ("output_tokens_per_s", output), ("total_tokens_per_s", total)):
        samples = num_streams * gains[drawn].sum(1) / seconds
        found[name] = {"mean": float(num_streams * gains.sum() / cycles.sum()), "ci": _interval(samples)}
    return found


def _rate_of_slices(rates: np.ndarray) -> dict[str, Any]:
    drawn = np.random.default_rng(_SEED).integers(0, len(rates), (_NUM_RESAMPLES, len(rates)))
    return {"mean": float(rates.mean()), "ci": _interval(rates[drawn].mean(1))}


def _attempts_per_s(spec: PointSpec, steady: Steady) -> float:
    """Requests per second, answered or not."""
    if spec.load.is_closed:
        return int(spec.load.value) / float(np.mean([one.finished_s - one.due_s for one in steady.records] or [np.inf]))
    return len(steady.records) / steady.seconds if steady.seconds > 0 else 0.0
