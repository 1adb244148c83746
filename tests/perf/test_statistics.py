"""Figures of hand-made streams, whose answers are known; and intervals that hold what they promise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from trtbuild.perf.records import Load, PointSpec, RequestRecord
from trtbuild.perf.statistics import figures_of, meets, saturation, steady_window, summary

CLOSED = PointSpec("m", "native", Load("concurrency", 2), 10, 5)


def record(start: float, ttft: float, gaps: list[float], delay: float = 0.0, **values: object) -> RequestRecord:
    times = np.cumsum([start + ttft, *gaps]).tolist()
    return RequestRecord(start, delay, times, 10, len(times), **values)  # type: ignore[arg-type]


def test_every_metric_of_two_streams() -> None:
    records = [record(0.0, 0.2, [0.05, 0.05, 0.10]), record(0.0, 0.4, [0.10, 0.10, 0.10])]
    figures = figures_of(CLOSED, records, (-1.0, 1.0))
    expected = {
        "ttft_s": (0.3, 0.4),
        # Six gaps, pooled.
        "itl_s": (0.5 / 6, 0.1),
        "tpot_s": ((0.2 / 3 + 0.1) / 2, 0.1),
        "e2e_s": ((0.4 + 0.7) / 2, 0.7),
        "user_tokens_per_s": ((15 + 10) / 2, 15.0),
    }
    for metric, (mean, largest) in expected.items():
        assert figures.metrics[metric]["mean"] == pytest.approx(mean), metric
        assert figures.metrics[metric]["max"] == pytest.approx(largest), metric
    assert figures.metrics["ttft_s"]["p50"] == pytest.approx(0.3)
    # Two streams whose requests take 0.55 s each, of 4 tokens after 10.
    assert figures.throughput["requests_per_s"]["mean"] == pytest.approx(2 / 0.55)
    assert figures.throughput["output_tokens_per_s"]["mean"] == pytest.approx(8 / 0.55)
    assert figures.throughput["total_tokens_per_s"]["mean"] == pytest.approx(28 / 0.55)


def test_one_token_has_no_gap() -> None:
    figures = figures_of(replace(CLOSED, osl=1), [record(0.0, 0.2, [])], (-1.0, 1.0))
    assert set(figures.metrics) == {"ttft_s", "e2e_s"}


def test_ramp_and_drain_are_left_out() -> None:
    """Two streams, three requests each, the first and the last ones slow: the window of a tool that says none."""
    records = [record(at, ttft, [0.1]) for at, ttft in ((0.0, 9.0), (0.1, 9.0), (10.0, 1.0), (10.2, 1.0))]
    records += [record(11.3, 0.9, [0.1]), record(11.4, 7.0, [0.1])]
    figures = figures_of(CLOSED, records)
    assert figures.steady["kept_requests"] == 3
    assert figures.metrics["ttft_s"]["max"] == pytest.approx(1.0)
    assert steady_window(CLOSED, [])[0] == 0.0


def test_errors_take_time_and_give_nothing() -> None:
    good = [record(float(at), 0.5, [0.5]) for at in range(4)]
    bad = [
        RequestRecord(float(at), 0.0, [], 10, 0, error=error, end_s=at + 1.0)
        for at, error in enumerate(("refused: too long", "refused: too long", "timeout", "unavailable: queue"))
    ]
    figures = figures_of(CLOSED, good + bad, (-1.0, 9.0), {"ttft_s": 1.0})
    assert figures.errors == {"refused": 2, "timeout": 1, "unavailable": 1}
    assert (figures.num_requests, figures.num_errors) == (8, 4)
    assert figures.throughput["requests_per_s"]["mean"] == pytest.approx(1.0)
    assert figures.goodput_per_s == pytest.approx(1.0)
    assert figures_of(CLOSED, bad, (-1.0, 9.0)).throughput == {}


def test_goodput_counts_what_meets_every_bound() -> None:
    records = [record(0.0, 0.2, [0.05] * 4), record(0.0, 0.6, [0.05] * 4), record(0.0, 0.2, [0.09] * 4)]
    assert [meets(one, {"ttft_s": 0.5, "itl_s": 0.06}) for one in records] == [True, False, False]
    figures = figures_of(CLOSED, records, (-1.0, 1.0), {"ttft_s": 0.5, "itl_s": 0.06})
    assert figures.goodput_per_s == pytest.approx(figures.throughput["requests_per_s"]["mean"] / 3)


def test_open_loop_counts_from_when_a_request_was_due() -> None:
    """Otherwise a stall that keeps the client from sending would be seen by nobody."""
    late = record(1.0, 0.1, [0.1], delay=1.0)
    rate = replace(CLOSED, load=Load("rate", 1.0, "constant"))
    assert figures_of(rate, [late], (-1.0, 2.0)).metrics["ttft_s"]["max"] == pytest.approx(1.1)
    assert figures_of(CLOSED, [late], (-1.0, 2.0)).metrics["ttft_s"]["max"] == pytest.approx(0.1)


def test_open_loop_throughput_is_what_came_in_the_window() -> None:
    rate = replace(CLOSED, load=Load("rate", 10.0, "constant"))
    records = [record(at / 10, 0.2, [0.1, 0.1, 0.1]) for at in range(100)]
    figures = figures_of(rate, records, (1.0, 9.0))
    assert figures.throughput["requests_per_s"]["mean"] == pytest.approx(10, rel=0.02)
    assert figures.throughput["output_tokens_per_s"]["mean"] == pytest.approx(40, rel=0.02)
    assert figures.throughput["total_tokens_per_s"]["mean"] == pytest.approx(140, rel=0.02)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """95 % of 300 measurements, of requests whose gaps hang together: +- 3 standard errors and a small-sample loss."""
    rng = np.random.default_rng(7)
    true_mean, true_median = 0.05, 0.05 * np.exp(-0.5 * 0.3**2)
    held = {"mean": 0, "p50": 0}
    for _ in range(300):
        speeds = 0.05 * rng.lognormal(-0.5 * 0.3**2, 0.3, 40)
        interval = summary([np.array([speed]) for speed in speeds])["ci"]
        held["mean"] += interval["mean"][0] <= true_mean <= interval["mean"][1]
        held["p50"] += interval["p50"][0] <= true_median <= interval["p50"][1]
    for name, number in held.items():
        assert 0.89 <= number / 300 <= 0.99, (name, number)


def test_gaps_of_one_request_are_no_independent_samples() -> None:
    """Ten gaps that are equal say no more than one: the interval must not shrink."""
    speeds = np.random.default_rng(3).lognormal(0.0, 0.5, 30)
    one, ten = (summary([np.full(times, speed) for speed in speeds])["ci"]["mean"] for times in (1, 10))
    assert ten == pytest.approx(one)


@pytest.mark.parametrize(
    ("client", "itl", "said"),
    [
        ({"cpu_share": 0.95, "loop_delay_p99_s": 0.0}, 0.02, "95%"),
        ({"cpu_share": 0.5, "loop_delay_p99_s": 0.012}, 0.02, "12.0 ms"),
        ({"cpu_share": 0.5, "loop_delay_p99_s": 0.012}, 0.1, None),
        ({"cpu_share": None, "loop_delay_p99_s": None, "send_delay_p99_s": 0.5}, 0.1, "500.0 ms"),
        ({"cpu_share": None, "send_delay_p99_s": None}, None, None),
    ],
)
def test_saturation(client: dict[str, float | None], itl: float | None, said: str | None) -> None:
    found = saturation(client, itl)
    assert found is None if said is None else said in (found or "")
