"""The small parts of serving: the mended connection, the metrics, the marks of stubs, where Triton is."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trtbuild.errors import Refused, TrtBuildError, Unavailable
from trtbuild.triton_repo import installation, worker_link
from trtbuild.triton_repo.answers import Answer
from trtbuild.triton_repo.engine_metrics import EngineMetrics, MetricsTurn
from trtbuild.triton_repo.requests import Generation, ParsedRequest
from trtbuild.triton_repo.stub_processes import find_dead, mark_alive, worker_group
from trtbuild.triton_repo.worker_link import WorkerLink


class Connections:
    """Stands for `SharedWorker.connect`; `fails` is how often it has to be called in vain."""

    def __init__(self) -> None:
        self.made: list[Any] = []
        self.lost: list[Callable[[str], None]] = []
        self.fails = 0

    def __call__(self, on_lost: Callable[[str], None]) -> Any:
        if self.fails:
            self.fails -= 1
            raise TrtBuildError("no memory")
        self.lost.append(on_lost)
        self.made.append(object())
        return self.made[-1]


def test_a_lost_worker_is_connected_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_link, "_FIRST_WAIT_S", 0.05)
    connections = Connections()
    link = WorkerLink(connections)
    assert link.client() is connections.made[0]
    connections.fails = 2
    connections.lost[0]("killed by SIGKILL")
    with pytest.raises(Unavailable, match="killed by SIGKILL"):
        link.client()
    deadline, seen = time.monotonic() + 5, set()
    while not link.up:
        try:
            link.client()
        except Unavailable as error:
            seen.add(error.message)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert any("no memory" in message for message in seen)
    assert link.client() is connections.made[1]


class FakeMetrics:
    """`triton_python_backend_utils` as far as metrics go: (name, le) -> value."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], float] = {}
        outer = self

        class Family:
            GAUGE, COUNTER = "gauge", "counter"

            def __init__(self, name: str, description: str, kind: str) -> None:
                self.name, self.kind = name, kind

            def Metric(self, labels: dict[str, str]) -> Any:  # noqa: N802
                assert labels["model"] == "m"
                key = self.name, labels.get("le", "")
                outer.values.setdefault(key, 0.0)

                class One:
                    def set(self, value: float) -> None:
                        outer.values[key] = value

                    def increment(self, value: float) -> None:
                        assert value > 0
                        outer.values[key] += value

                return One()

        self.MetricFamily = Family


def stats(**values: float) -> dict[str, Any]:
    from trtbuild.triton_repo.engine_metrics import COUNTERS, GAUGES, HISTOGRAMS

    histogram = {"buckets": [0.1, 1.0], "counts": [2, 0, 1], "sum": 3.5, "count": 3}
    return dict.fromkeys([*GAUGES, *COUNTERS], 0) | {"histograms": dict.fromkeys(HISTOGRAMS, histogram)} | values


def test_counters_go_on_over_a_restarted_worker() -> None:
    triton = FakeMetrics()
    metrics = EngineMetrics(triton, "m")
    metrics.update(stats(finished=5, active=2))
    metrics.update(stats(finished=7, active=1))
    metrics.down()
    assert triton.values["trtbuild_engine_up", ""] == 0
    metrics.update(stats(finished=3, active=0))
    assert triton.values["trtbuild_engine_up", ""] == 1
    assert triton.values["trtbuild_requests_finished_total", ""] == 10
    assert triton.values["trtbuild_requests_active", ""] == 0
    buckets = [triton.values["trtbuild_queue_seconds_bucket", le] for le in ("0.1", "1.0", "+Inf")]
    assert buckets == [2, 2, 3]
    assert (triton.values["trtbuild_queue_seconds_sum", ""], triton.values["trtbuild_queue_seconds_count", ""]) == (
        3.5,
        3,
    )


def test_metrics_belong_to_one_process_at_a_time(tmp_path: Path) -> None:
    """The same metrics twice in Triton's process corrupt its memory once one of them is deleted."""
    with MetricsTurn(tmp_path / "m") as new:
        with MetricsTurn(tmp_path / "m") as old:
            assert old.take() and old.take()
            assert not new.take()
        assert new.take()


def test_a_dead_stub_is_told_from_an_unloaded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mark_alive() is None
    monkeypatch.setenv("TRTBUILD_STUBS", str(tmp_path))
    mark = mark_alive()
    assert mark is not None and find_dead(tmp_path) is None
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (tmp_path / str(child.pid)).touch()
    assert find_dead(tmp_path) is None
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert find_dead(tmp_path) == child.pid, "a zombie is dead"
    child.wait()
    assert find_dead(tmp_path) == child.pid
    (tmp_path / str(child.pid)).unlink()
    assert find_dead(tmp_path) is None
    assert worker_group() == f"triton-{os.getppid()}"
    monkeypatch.setenv("TRTBUILD_GROUP", "serve-1")
    assert worker_group() == "serve-1"


def test_where_triton_is(tmp_path: Path, triton: object, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "tritonserver"
    binary.touch()
    with pytest.raises(Refused, match="not a program that can be run"):
        installation.find_triton(binary)
    binary.chmod(stat.S_IRWXU)
    assert installation.find_triton(binary).binary == binary
    monkeypatch.setenv("PATH", str(tmp_path))
    assert installation.find_triton().source == "PATH"
    monkeypatch.setenv("PATH", "")
    found = installation.find_triton()
    assert found.source.startswith("nvidia-pytriton")
    arguments = found.prepare(tmp_path / "server")
    backend = Path(arguments[1]) / "python"
    assert {"triton_python_backend_stub", "libtriton_python.so", "triton_python_backend_utils.py"} <= {
        file.name for file in backend.iterdir()
    }
    monkeypatch.setattr(installation, "STUB_ENVIRONMENT", tmp_path / "nowhere")
    with pytest.raises(Refused, match="needs numpy 1 in"):
        installation.find_triton()
    monkeypatch.setattr(installation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Refused, match="pip install --no-deps nvidia-pytriton"):
        installation.find_triton()


class Recorder:
    """A `Responder` that keeps what it is given."""

    def __init__(self) -> None:
        self.sent: list[tuple[dict[str, Any], bool]] = []
        self.errors: list[TrtBuildError] = []
        self.gone = False

    def send(self, response: Any, final: bool) -> None:
        self.sent.append((response, final))

    def fail(self, error: TrtBuildError) -> None:
        self.errors.append(error)

    def is_cancelled(self) -> bool:
        return self.gone


class Worker:
    """A `WorkerClient` whose messages the test delivers."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.deliver: list[Callable[[dict[str, Any]], None]] = []
        self.cancelled: list[str] = []
        self._fail_at = fail_at

    def submit(self, prompt: Any, params: Any, deliver: Any, *, tools: Any, request_id: Any) -> str:
        if len(self.deliver) == self._fail_at:
            raise TrtBuildError("lost")
        self.deliver.append(deliver)
        return str(len(self.deliver))

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)


def answer(worker: Worker, responder: Recorder, *, stream: bool) -> tuple[Answer, list[Answer]]:
    from trtbuild.engines.serving.request import SamplingParams

    generations = [Generation("p", SamplingParams(), None, 0, index, "") for index in range(2)]
    ended: list[Answer] = []
    parsed = ParsedRequest(generations, 1, 2, stream, False, False)
    found = Answer(parsed, responder, worker, ended.append)  # type: ignore[arg-type]
    found.start("id")
    return found, ended


def token(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "token", "id": "1", "token_id": 7, "text": text, **more}


def test_an_answer_ends_once_with_the_last_of_its_sequences() -> None:
    worker, responder = Worker(), Recorder()
    _, ended = answer(worker, responder, stream=True)
    worker.deliver[0](token("a", finish_reason="stop"))
    worker.deliver[1](token("b"))
    worker.deliver[1](token("c", finish_reason="length"))
    assert [(r["text_output"].item(), final) for r, final in responder.sent] == [
        (b"a", False),
        (b"b", False),
        (b"c", True),
    ]
    assert len(ended) == 1
    whole = Recorder()
    answer(worker, whole, stream=False)
    for deliver in worker.deliver[2:]:
        deliver(token("x", finish_reason="stop"))
    assert [(r["text_output"].tolist(), final) for r, final in whole.sent] == [([[b"x", b"x"]], True)]


def test_one_failed_sequence_ends_the_answer_and_cancels_the_rest() -> None:
    worker, responder = Worker(), Recorder()
    _, ended = answer(worker, responder, stream=True)
    worker.deliver[0]({"type": "error", "id": "1", "kind": "unavailable", "message": "full"})
    worker.deliver[1](token("late", finish_reason="stop"))
    assert [type(error) for error in responder.errors] == [Unavailable]
    assert responder.sent == []
    assert worker.cancelled == ["1", "2"]
    assert len(ended) == 1

    lost, told = Worker(fail_at=1), Recorder()
    _, ended = answer(lost, told, stream=True)
    assert [error.message for error in told.errors] == ["lost"]
    assert (lost.cancelled, len(ended)) == (["1"], 1)


def test_an_abandoned_answer_is_cancelled() -> None:
    worker, responder = Worker(), Recorder()
    found, _ = answer(worker, responder, stream=True)
    found.cancel_if_abandoned()
    assert worker.cancelled == []
    responder.gone = True
    found.cancel_if_abandoned()
    assert worker.cancelled == ["1", "2"]
