"""A sweep over a real Triton and over a bare worker, both with an executor of 20 ms steps."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from engine_without_plans import make_engine

from trtbuild.engines.passport import Passport
from trtbuild.errors import Refused
from trtbuild.perf.live_table import NoView
from trtbuild.perf.records import Point, PointSpec
from trtbuild.perf.run_directory import RunDirectory
from trtbuild.perf.runner import RunOptions, run_sweep
from trtbuild.perf.sweep import Sweep
from trtbuild.perf.targets import ServeRequest, package_where_needed, prompt_limits
from trtbuild.triton_repo.installation import find_triton
from trtbuild.triton_repo.model_config import WorkerSettings
from trtbuild.workspace import Workspace

SLOW_STEPS = WorkerSettings(loader="fake_executor:load_fake", slots=4, threads=1)
STEP_S = 0.02


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    try:
        find_triton()
    except Refused as error:
        pytest.skip(error.message)
    loader = str(Path(__file__).parents[1] / "engines" / "serving")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [loader, os.environ.get("PYTHONPATH", "")])))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    make_engine(tmp_path, "mixtral", model="tiny-mixtral", precision="fp8")
    yield Workspace(tmp_path)
    # Nothing of a sweep is left running.
    assert not [child for child in psutil.Process().children(recursive=True) if "triton" in child.name()]


def test_limits_are_the_passports(place: Workspace) -> None:
    limits = prompt_limits(Passport.open(place.engine("mixtral")))
    assert (limits.max_seq_len, limits.max_input_len, limits.max_batch_size) == (256, 255, 4)
    assert limits.vocab_size == 1024
    assert limits.special_tokens[:3] == (0, 1, 2)


def test_packaged_once(place: Workspace) -> None:
    passport = Passport.open(place.engine("mixtral"))
    assert package_where_needed(place, passport, SLOW_STEPS)
    assert not package_where_needed(place, passport, SLOW_STEPS)
    assert package_where_needed(place, passport, WorkerSettings(slots=2))


@pytest.mark.slow
def test_the_same_load_through_triton_and_without(place: Workspace) -> None:
    """One stream: a prefill step and six decode steps of 20 ms, whatever the road."""
    sweep = Sweep.create(
        engines="mixtral", driver="native,engine", concurrency=1, isl=10, osl=7, requests=8, name="both"
    )
    run = run_sweep(sweep, place, RunOptions(ServeRequest(SLOW_STEPS)))
    through, bare = sorted(run.points(), key=lambda point: point.spec.driver, reverse=True)
    for point in (through, bare):
        assert (point.executor, point.device, point.errors) == ("reference", "cpu", {})
        assert STEP_S <= point.metrics["itl_s"]["p50"] < 2 * STEP_S
        assert point.metrics["ttft_s"]["p50"] >= STEP_S
        assert point.num_requests >= 8
    assert bare.server is None
    assert through.server is not None
    assert through.server["compute_s"] > 0
    assert through.telemetry["server_rss_bytes"]["max"] > 50 * 2**20
    assert (through.environment["triton"], bare.environment["triton"]) != (None, None)


class Killer(NoView):
    """Kills the engine worker while the first point runs."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self._thread: threading.Thread | None = None

    def start(self, spec: PointSpec) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._kill)
            self._thread.start()

    def finish(self, point: Point, *, skipped: bool = False) -> None:
        self.points.append(point)

    def _kill(self) -> None:
        time.sleep(2.5)
        for child in psutil.Process().children(recursive=True):
            if "trtbuild.engines.serving.worker" in child.cmdline():
                child.kill()


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_its_point_alone(place: Workspace) -> None:
    sweep = Sweep.create(engines="mixtral", concurrency="1,2", isl=10, osl=30, requests=8, warmup=1, name="killed")
    killer = Killer()
    run = run_sweep(sweep, place, RunOptions(ServeRequest(SLOW_STEPS)), killer)
    first, second = killer.points
    assert not first.valid
    assert "engine worker ended" in (first.why_invalid or "")
    assert second.why_invalid is None or "late" in second.why_invalid
    assert second.num_requests >= 8
    assert len(RunDirectory.open(run.path).points()) == 2
