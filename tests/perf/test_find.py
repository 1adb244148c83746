"""The search for the highest load under an SLO, against simulated servers with known answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from perf_points import make_point

from trtbuild.errors import Refused
from trtbuild.perf.find import LimitSearch, cheapest, find_limits, first_load, misses, print_limits
from trtbuild.perf.records import Load, Point, PointSpec


class Server:
    """ITL of `step` + `growth` a stream, times noise of relative standard deviation `noise`; nothing else."""

    def __init__(self, step: float = 0.010, growth: float = 0.001, noise: float = 0.0, seed: int = 0) -> None:
        self.step, self.growth, self.noise = step, growth, noise
        self.asked: list[PointSpec] = []
        self._rng = np.random.default_rng(seed)

    def measure(self, spec: PointSpec) -> Point:
        self.asked.append(spec)
        itl = (self.step + self.growth * spec.load.value) * float(np.exp(self._rng.normal(0, self.noise)))
        point = make_point(spec.engine, spec.load, spec.isl, spec.osl)
        speed = spec.load.value / itl
        throughput = {"output_tokens_per_s": {"mean": speed, "ci": [speed, speed]}}
        return replace(point, spec=spec, metrics={"itl_s": {"p99": itl, "p50": itl / 2}}, throughput=throughput)


def spec_of(load: Load | None = None) -> PointSpec:
    return PointSpec("tiny", "native", load or first_load("concurrency", None), 128, 64)


def search(
    measure: Callable[[PointSpec], Point], bound: float, load: Load | None = None, **options: float
) -> LimitSearch:
    return LimitSearch(measure, spec_of(load), {"itl_s": bound}, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("answer", [1, 2, 3, 7, 8, 23, 64, 100, 255])
def test_concurrency_is_found_exactly(answer: int) -> None:
    server = Server()
    found = search(server.measure, 0.010 + 0.001 * (answer + 0.5)).find()
    assert found.value == answer
    assert found.ended_by == "slo"
    assert found.point is not None
    assert found.point.spec.load.value == answer
    # Doubling, halving, and the repeats of what is near: not every load.
    assert len(server.asked) < 40


@pytest.mark.parametrize("answer", [0.2, 0.9, 3.7, 41.0])
def test_a_rate_is_found_within_the_tolerance(answer: float) -> None:
    server = Server()
    found = search(server.measure, 0.010 + 0.001 * answer, Load("rate", 1.0, "poisson"), tolerance=0.05).find()
    assert found.value is not None
    assert answer / 1.05 <= found.value <= answer * (1 + 1e-9)


def test_nothing_meets_it() -> None:
    found = search(Server().measure, 0.005).find()
    assert (found.value, found.point) == (None, None)
    assert found.misses == ["itl_s p99 11 ms over 5 ms"]


def test_all_that_is_allowed_meets_it() -> None:
    server = Server()
    found = search(server.measure, 1.0, most=48).find()
    assert (found.value, found.ended_by) == (48, "most")
    assert max(spec.load.value for spec in server.asked) == 48


def test_a_noisy_server_is_confirmed_by_the_majority() -> None:
    answers = [search(Server(noise=0.02, seed=seed).measure, 0.0405).find().value for seed in range(30)]
    # 30.5 streams; 2 % of 40 ms are 0.8 streams.
    assert all(value is not None and 26 <= value <= 34 for value in answers)
    assert abs(float(np.mean([value or 0 for value in answers])) - 30.5) < 1.5


def test_an_answer_that_does_not_hold_is_lowered() -> None:
    server = Server()

    def flaky(spec: PointSpec) -> Point:
        """At 16 streams and above every measurement but the first is much slower."""
        again = sum(one.load.value == spec.load.value for one in server.asked) > 0
        point = server.measure(spec)
        slow = {"itl_s": {"p99": 9.0, "p50": 9.0}}
        return replace(point, metrics=slow) if again and spec.load.value >= 16 else point

    assert search(flaky, 0.1).find().value == 15


def test_repeats_are_other_measurements() -> None:
    server = Server()
    search(server.measure, 0.0205, repeats=4).find()
    at_the_limit = [spec.seed for spec in server.asked if spec.load.value == 10]
    assert at_the_limit == [0, 1, 2, 3]


def test_a_load_that_the_client_cannot_make_ends_the_search() -> None:
    server = Server()

    def measure(spec: PointSpec) -> Point:
        point = server.measure(spec)
        if spec.load.value <= 20:
            return point
        return replace(point, valid=False, why_invalid="the client was saturated")

    found = search(measure, 1.0).find()
    assert found.value == 20
    assert found.ended_by == "invalid: the client was saturated"


def test_an_invalid_measurement_is_made_again() -> None:
    """Every third cannot be used, whatever the load; what it says is not the server's fault."""
    server = Server()

    def measure(spec: PointSpec) -> Point:
        point = server.measure(spec)
        if len(server.asked) % 3 == 1:
            return replace(point, valid=False, why_invalid="late", metrics={"itl_s": {"p99": 9.0}})
        return point

    found = search(measure, 0.0335).find()
    assert (found.value, found.ended_by) == (23, "slo")


def test_failed_requests_miss_every_slo() -> None:
    assert misses(replace(make_point(), num_errors=2), {"itl_s": 10.0}, "p99") == ["2 of 48 requests failed"]
    assert misses(replace(make_point(), metrics={}), {"itl_s": 10.0}, "p99") == ["itl_s was not measured"]
    assert misses(make_point(), {"itl_s": 10.0, "ttft_s": 10.0}, "p99") == []


def test_the_cheapest_engine_that_meets_it(capsys: pytest.CaptureFixture[str]) -> None:
    servers = {
        "slow": Server(step=0.03),
        "fast": Server(step=0.005),
        "wide": Server(step=0.002),
        "never": Server(step=1),
    }

    def measure(spec: PointSpec) -> Point:
        point = servers[spec.engine].measure(spec)
        return replace(point, engine={**point.engine, "layout": {"tp": 4 if spec.engine == "wide" else 1, "pp": 1}})

    limits = find_limits(measure, list(servers), spec_of(), {"itl_s": 0.0405})
    assert [limit.engine for limit in limits] == ["wide", "fast", "slow", "never"]
    best = cheapest(limits, 2.0)
    assert best is not None
    assert best.engine == "fast"
    assert best.value == 35
    # 35 streams of 40 ms: 875 tokens/s for 2 an hour.
    assert best.price_per_million(2.0) == pytest.approx(2.0 / (875 * 3600) * 1e6)
    print_limits(limits, "concurrency", 2.0)
    printed = capsys.readouterr().out
    assert "cheapest that meets the SLO: fast" in printed
    assert "never: no concurrency meets the SLO" in printed


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(Refused, match="not for a batch"):
        search(Server().measure, 1.0, Load("batch", 4))
    with pytest.raises(Refused, match="needs an SLO"):
        LimitSearch(Server().measure, spec_of(), {})
    with pytest.raises(Refused, match="below the first"):
        search(Server().measure, 1.0, Load("concurrency", 8), most=4)
