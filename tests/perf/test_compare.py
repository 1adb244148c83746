"""Runs against each other: noise is not a regression, a real one is, and what cannot be compared is said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from perf_points import ENVIRONMENT, make_point, make_sweep

from trtbuild.errors import CheckFailed
from trtbuild.perf.compare import Comparison, compare_runs, print_comparison
from trtbuild.perf.records import Load, Point


def verdicts(comparison: Comparison) -> dict[str, str]:
    return {change.figure: change.verdict for change in comparison.points[0].changes}


def noisy(seed: int, error: float = 0.01, scale: float = 1.0) -> list[Point]:
    """A sweep each of whose figures was drawn with a standard error, and whose intervals say so."""
    rng = np.random.default_rng(seed)
    points = []
    for point in make_sweep(scale=scale, engines=["tiny-bf16", "tiny-fp8"]):
        drawn: dict[str, dict[str, Any]] = {"metrics": {}, "throughput": {}}
        for part, found in drawn.items():
            for name, held in getattr(point, part).items():
                new: dict[str, Any] = {"ci": {}}
                for statistic in ("mean", "p50", "p99"):
                    if statistic in held:
                        new[statistic] = held[statistic] * float(np.exp(rng.normal(0, error)))
                        new["ci"][statistic] = [new[statistic] * float(np.exp(z * 1.96 * error)) for z in (-1, 1)]
                found[name] = new if part == "metrics" else {"mean": new["mean"], "ci": new["ci"]["mean"]}
        points.append(replace(point, **drawn))
    return points


def test_a_run_against_itself_is_the_same() -> None:
    comparison = compare_runs(make_sweep(), make_sweep())
    assert comparison.compared == 72
    assert {change.verdict for point in comparison.points for change in point.changes} == {"same"}
    comparison.check(0.05)


def test_a_slowdown_beyond_the_limit_fails_with_its_size() -> None:
    comparison = compare_runs([make_point()], [make_point(scale=1.2)])
    assert set(verdicts(comparison).values()) <= {"worse", "same"}
    change = next(one for one in comparison.points[0].changes if one.figure == "output tokens/s")
    assert change.change == pytest.approx(1 / 1.2 - 1)
    assert change.verdict == "worse"
    # Two points of +-2 %: a relative error of 0.0204 / 1.96 each, so +-2.9 % together.
    assert change.interval is not None
    assert change.interval == pytest.approx((-0.190, -0.142), abs=2e-3)
    with pytest.raises(CheckFailed, match=r"output tokens/s -16.7 %") as error:
        comparison.check(0.05)
    assert error.value.exit_code == 4


def test_a_limit_holds_against_what_is_significant() -> None:
    before, after = [make_point(width=0.001)], [make_point(width=0.001, scale=1.03)]
    assert verdicts(compare_runs(before, after))["ITL p50"] == "worse"
    compare_runs(before, after, limit=0.05).check(0.05)
    with pytest.raises(CheckFailed):
        compare_runs(before, after, limit=0.02).check(0.02)


def test_getting_faster_is_no_regression() -> None:
    comparison = compare_runs([make_point()], [make_point(scale=0.5)])
    assert "worse" not in verdicts(comparison).values()
    assert verdicts(comparison)["TTFT p50"] == "better"
    comparison.check(0.01)


def test_noise_of_a_large_sweep_is_no_regression_and_six_per_cent_are() -> None:
    false = sum(bool(compare_runs(noisy(2 * i), noisy(2 * i + 1), limit=0.0).regressions) for i in range(20))
    # 5 % of comparisons may have one by chance.
    assert false <= 4
    real = compare_runs(noisy(1), noisy(2, scale=1.08), limit=0.05)
    assert len({label for label, _ in real.regressions}) > 24


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"environment": ENVIRONMENT | {"cpu": "AMD EPYC"}}, "cpu differs: Intel"),
        ({"environment": ENVIRONMENT | {"gpus": [{"name": "L4", "driver": "580.1"}]}}, "L4 (driver 580.1) in B"),
        ({"executor": "tensorrt"}, "executor differs: reference in A, tensorrt in B"),
        ({"valid": False, "why_invalid": "the client was saturated"}, "B is invalid: the client was saturated"),
    ],
)
def test_what_is_not_comparable_says_why_and_does_not_pass(changes: dict[str, Any], reason: str) -> None:
    comparison = compare_runs([make_point()], [make_point(**changes)])
    assert any(reason in why for why in comparison.points[0].why_not)
    assert not comparison.points[0].changes
    with pytest.raises(CheckFailed, match="nothing could be compared"):
        comparison.check(0.05)


def test_other_gpu_driver_is_compared_where_asked() -> None:
    gpus = [[{"name": "L4", "driver": driver}] for driver in ("570.1", "580.1")]
    before, after = ([make_point(environment=ENVIRONMENT | {"gpus": one})] for one in gpus)
    assert not compare_runs(before, after).compared
    comparison = compare_runs(before, after, other_hardware=True)
    assert comparison.compared == 1
    assert "driver 570.1" in comparison.points[0].notes[0]


def test_versions_and_rebuilt_engines_are_notes() -> None:
    engine = make_point().engine | {"digest": "other", "serving": {"slots": "4"}}
    after = make_point(environment=ENVIRONMENT | {"trtbuild": "0.2.0", "load_before": 1.9}, engine=engine)
    notes = compare_runs([make_point()], [after]).points[0].notes
    assert notes == [
        "trtbuild 0.1.0 -> 0.2.0", "the engine was built again", "served with slots None in A, 4 in B",
        "the machine was busy before B: load 1.9 on 2 cores",
    ]  # fmt: skip


def test_points_that_only_one_has_name_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    before = [make_point(load=4), make_point(load=16)]
    other = replace(before[1], spec=replace(before[1].spec, driver="aiperf"))
    comparison = compare_runs(before, [before[0], other, make_point(load=Load("rate", 4.0, "poisson"))])
    assert comparison.only_before == ["tiny-bf16 native c16 128->64; nearest there: driver aiperf"]
    assert len(comparison.only_after) == 2
    print_comparison(comparison)
    assert "1 of 1 shared points compared: 0 worse, 0 better, 7 same" in capsys.readouterr().out


def test_two_single_engines_are_compared_with_each_other() -> None:
    comparison = compare_runs([make_point("tiny-bf16")], [make_point("tiny-fp8")])
    assert verdicts(comparison)["output tokens/s"] == "better"
    assert comparison.points[0].label.endswith("-> tiny-fp8")


def test_without_intervals_nothing_is_called_noise() -> None:
    def bare(point: Point) -> Point:
        return replace(point, throughput={"output_tokens_per_s": {"mean": 100.0}}, metrics={})

    slower = replace(bare(make_point()), throughput={"output_tokens_per_s": {"mean": 90.0}})
    comparison = compare_runs([bare(make_point())], [slower])
    assert verdicts(comparison) == {"output tokens/s": "unknown"}
    with pytest.raises(CheckFailed):
        comparison.check(0.05)
