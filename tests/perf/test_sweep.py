"""What a sweep is made from, and the points that it has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from trtbuild.errors import Refused
from trtbuild.perf.records import Load, PointSpec
from trtbuild.perf.sweep import Sweep, parse_slo


def test_points_go_engine_by_engine() -> None:
    sweep = Sweep.create(engines="a,b", concurrency="1,4", rate="2.5", isl="16,32", osl=8, requests=5)
    points = sweep.points()
    assert len(points) == len(set(points)) == 12
    assert [point.engine for point in points] == ["a"] * 6 + ["b"] * 6
    assert points[2].load == Load("concurrency", 4)
    # Three rounds per stream at least.
    assert [point.num_requests for point in points[:6]] == [5, 5, 12, 12, 5, 5]
    assert points[4].load == Load("rate", 2.5, "poisson")


def test_file_with_flags_on_top(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    (tmp_path / "t.jsonl").write_text('{"timestamp": 0, "input_length": 3, "output_length": 2}')
    file.write_text(
        'engines = ["a"]\nconcurrency = [1, 2]\ntrace = "./t.jsonl"\nosl = 4\n[slo]\nttft = "500ms"\nitl = 0.05\n'
    )
    sweep = Sweep.read(file, concurrency="8")
    assert (sweep.name, sweep.concurrency, sweep.osl) == ("mine", (8,), (4,))
    assert sweep.slo == {"ttft_s": 0.5, "itl_s": 0.05}
    assert sweep.points()[-1].load.trace == str(tmp_path / "t.jsonl")
    assert Sweep.create(**sweep.to_dict()) == sweep


def test_digest_is_of_what_is_measured() -> None:
    base = {"engines": "a", "concurrency": "1"}
    digest = Sweep.create(**base).digest
    assert Sweep.create(**base, name="x", slo="ttft=1s").digest == digest
    assert Sweep.create(**base, seed=1).digest != digest


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "no load"),
        ({"concurrency": "0"}, "above 0"),
        ({"concurrency": "1,1"}, "twice"),
        ({"concurrency": "x"}, "found 'x'"),
        ({"concurrency": 1, "driver": "ab"}, "native"),
        ({"concurrency": 1, "slo": "ttft=fast"}, "no duration"),
        ({"concurrency": 1, "slo": "speed=1s"}, "no bound of an SLO"),
        ({"concurrency": 1, "shared_prefix": 20, "isl": 10}, "longer than the shortest isl"),
        ({"concurrency": 1, "bogus": 1}, "bogus"),
        ({"trace": "/nowhere"}, "/nowhere"),
    ],
)
def test_refused(fields: dict[str, object], said: str) -> None:
    with pytest.raises(Refused, match=said):
        Sweep.create(engines="a", **fields).points()


def test_slo_units() -> None:
    assert parse_slo("ttft=500ms, itl=50us,e2e=2s") == pytest.approx({"ttft_s": 0.5, "itl_s": 5e-5, "e2e_s": 2.0})


def test_point_id_is_of_everything_that_matters() -> None:
    spec = PointSpec("a", "native", Load("concurrency", 1), 16, 8)
    first = spec.point_id("engine", "reference", "machine", {"slots": "4"})
    assert len(first) == 16
    assert spec.point_id("engine", "reference", "machine", {"slots": "4"}) == first
    others = {
        spec.point_id("other", "reference", "machine", {"slots": "4"}),
        spec.point_id("engine", "tensorrt", "machine", {"slots": "4"}),
        spec.point_id("engine", "reference", "other", {"slots": "4"}),
        spec.point_id("engine", "reference", "machine", {"slots": "8"}),
        replace(spec, osl=9).point_id("engine", "reference", "machine", {"slots": "4"}),
        replace(spec, load=Load("concurrency", 2)).point_id("engine", "reference", "machine", {"slots": "4"}),
    }
    assert len(others | {first}) == 7
