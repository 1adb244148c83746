"""Sweeps: what is skipped, what is measured again, and what is left after kills; against a scripted server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from trtbuild.errors import CheckFailed, Refused, TrtBuildError
from trtbuild.perf.live_table import NoView
from trtbuild.perf.records import Point
from trtbuild.perf.run_directory import RunDirectory
from trtbuild.perf.runner import RunOptions, check_valid, run_sweep
from trtbuild.perf.sweep import Sweep
from trtbuild.perf.targets import ServeRequest
from trtbuild.workspace import Workspace

Start = Callable[..., Any]
QUICK: dict[str, Any] = {"engines": "mixtral", "isl": 12, "osl": 3, "requests": 3, "warmup": 1}


class Seen(NoView):
    """Which points were measured, and which were skipped."""

    def __init__(self) -> None:
        self.measured: list[Point] = []
        self.skipped: list[Point] = []

    def finish(self, point: Point, *, skipped: bool = False) -> None:
        (self.skipped if skipped else self.measured).append(point)


@pytest.fixture
def place(engine_workspace: Path, tmp_path: Path) -> Workspace:
    """A workspace of its own, with the engine of all."""
    (tmp_path / "engines").symlink_to(engine_workspace / "engines")
    return Workspace(tmp_path)


def sweep_of(place: Workspace, server: Any, **fields: Any) -> tuple[RunDirectory, Seen]:
    seen = Seen()
    options = RunOptions(ServeRequest(url=server.url))
    return run_sweep(Sweep.create(**{**QUICK, "name": "run", **fields}), place, options, seen), seen


def test_a_point_says_what_it_was(place: Workspace, scripted: Start) -> None:
    run, _ = sweep_of(place, scripted(ttft_s=0.02, itl_s=0.01), concurrency=2, slo="ttft=1s", requests=6)
    (point,) = run.points()
    assert point.valid
    assert point.why_invalid is None
    assert point.engine["name"] == "mixtral"
    assert point.engine["precision"] == "fp8"
    assert point.executor == "unknown (--url)"
    assert point.environment["cores"] >= 1
    assert point.goodput_per_s == pytest.approx(point.throughput["requests_per_s"]["mean"])
    # As the script's statistics say.
    assert point.server == pytest.approx({"queue_s": 0.001, "compute_s": 0.002})
    assert point.client["saturated"] is False
    assert point.telemetry["host_memory_used_bytes"]["mean"] > 0
    assert run.telemetry(point.point_id).is_file()
    assert len(run.read_raw(point.point_id)[0]) >= point.num_requests
    assert json.loads(json.dumps(point.to_dict())) == json.loads((run.path / "points.jsonl").read_text())


def test_measured_points_are_skipped(place: Workspace, scripted: Start) -> None:
    server = scripted(ttft_s=0.01)
    first, seen = sweep_of(place, server, concurrency="1,2")
    assert len(seen.measured) == 2
    before = first.points()
    again, seen = sweep_of(place, server, concurrency="1,2,3")
    assert [point.spec.load.value for point in seen.skipped] == [1, 2]
    assert [point.spec.load.value for point in seen.measured] == [3]
    assert again.points()[:2] == before


def test_another_slo_needs_no_new_measurement(place: Workspace, scripted: Start) -> None:
    server = scripted(ttft_s=0.03, itl_s=0.01)
    sweep_of(place, server, concurrency="1", slo="ttft=1s")
    run, seen = sweep_of(place, server, concurrency="1", slo="ttft=1ms")
    assert (len(seen.measured), len(seen.skipped)) == (0, 1)
    assert run.points()[0].goodput_per_s == 0.0
    assert run.points()[0].slo == {"ttft_s": 0.001}


def test_what_does_not_fit_is_refused_before_anything_runs(place: Workspace, scripted: Start) -> None:
    server = scripted()
    with pytest.raises(Refused, match="isl 250 \\+ osl 20 is above the engine's max_seq_len 256"):
        sweep_of(place, server, concurrency="1", isl="12,250", osl=20)
    with pytest.raises(Refused, match="no engine 'nobody'"):
        sweep_of(place, server, concurrency="1", engines="nobody")
    with pytest.raises(Refused, match="engine runs an engine itself"):
        sweep_of(place, server, concurrency="1", driver="engine")
    assert server.requests() == []
    assert not (place.root / "perf").exists()


def test_a_server_that_dies_is_told_and_measured_again(place: Workspace, scripted: Start) -> None:
    dying = scripted(ttft_s=0.02, die_after=8)
    with pytest.raises(TrtBuildError, match="no Triton answers"):
        sweep_of(place, dying, concurrency="1,2", requests=10)
    run = RunDirectory.open(place.root / "perf" / "runs" / "run")
    (point,) = run.points()
    assert not point.valid
    assert "no Triton answers" in (point.why_invalid or "")
    with pytest.raises(CheckFailed, match="1 of 1 points are invalid"):
        check_valid([point])
    _, seen = sweep_of(place, scripted(ttft_s=0.02), concurrency="1,2", requests=10)
    assert len(seen.measured) == 2


def test_a_point_without_an_answer_is_invalid_and_replaced(place: Workspace, scripted: Start) -> None:
    server = scripted(refuse_every=1)
    run, _ = sweep_of(place, server, concurrency="1")
    (point,) = run.points()
    assert "no request was answered: refused: as the script says" in (point.why_invalid or "")
    assert point.metrics == {}
    _, seen = sweep_of(place, server, concurrency="1")
    assert len(seen.measured) == 1
    assert len(run.points()) == 1


def test_killed_again_and_again_it_ends_with_every_point_once(place: Workspace, scripted: Start) -> None:
    server = scripted(ttft_s=0.05, itl_s=0.01)
    command = [sys.executable, "-m", "trtbuild", "perf", "sweep", "--engines", "mixtral", "--url", server.url]
    command += ["--concurrency", "1,2", "--isl", "8,16", "--osl", "2,4", "--requests", "4", "--warmup", "1"]
    command += ["--name", "killed", "--workspace", str(place.root), "--json"]
    run = RunDirectory(place.root / "perf" / "runs" / "killed")
    kills = 0
    for wanted in (1, 3, 5):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(run.points()) < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        clients = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        # Client processes see that their parent is gone.
        assert not psutil.wait_procs(clients, timeout=5)[1]
    assert kills == 3
    with (run.path / "points.jsonl").open("ab") as file:
        file.write(b'{"point_id": "torn')
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode in (0, 4), found.stderr
    points = [Point.from_dict(one) for one in json.loads(found.stdout)]
    specs = [replace(point.spec) for point in points]
    expected = Sweep.create(engines="mixtral", concurrency="1,2", isl="8,16", osl="2,4", requests=4, warmup=1).points()
    assert sorted(map(repr, specs)) == sorted(map(repr, expected))
    assert len((run.path / "points.jsonl").read_bytes().splitlines()) == len(expected) == 8
    assert "measured before" in found.stderr
