"""How workers start and end, and what their clients are told, over real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fake_executor import FakeEngine, FakeExecutor
from fake_worker import LOADER, LONG, start

from trtbuild.engines.serving.client import WorkerClient
from trtbuild.engines.serving.launch import await_ready, start_worker, worker_command
from trtbuild.engines.serving.request import SamplingParams, ServerLimits
from trtbuild.engines.serving.server import WorkerServer
from trtbuild.errors import Refused, TrtBuildError, Unavailable


def test_killed_worker_is_an_error_within_two_seconds() -> None:
    with start() as worker, worker.connect() as client:
        streams = [client.generate([5 + i], LONG) for i in range(6)]
        next(streams[0])
        worker.process.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        for stream in streams:
            with pytest.raises(TrtBuildError, match="killed by SIGKILL"):
                list(stream)
        with pytest.raises(Unavailable, match="killed by SIGKILL"):
            client.generate([3])
        assert time.monotonic() - killed < 2
        with pytest.raises(TrtBuildError, match="no engine worker answers"):
            worker.connect()


def test_request_that_the_worker_never_read_is_unavailable() -> None:
    """Nothing can have been done, and it cannot be what ended the worker: it may be sent again."""
    with start() as worker, worker.connect() as client:
        running = client.generate([5], LONG)
        next(running)
        worker.process.send_signal(signal.SIGSTOP)
        unread = client.generate([6], LONG)
        worker.process.kill()
        with pytest.raises(Unavailable, match="killed by SIGKILL"):
            list(unread)
        with pytest.raises(TrtBuildError, match="killed by SIGKILL") as raised:
            list(running)
        assert type(raised.value) is TrtBuildError


def test_request_after_the_end_is_unavailable_though_this_side_has_not_read_of_it() -> None:
    kinds: list[str | None] = []
    may_read = threading.Event()

    def hold_up(message: dict[str, Any]) -> None:
        kinds.append(message.get("kind"))
        may_read.wait()

    with start() as worker, worker.connect() as client:
        client.submit([5], LONG, hold_up)
        while not kinds:
            time.sleep(0.01)
        worker.process.kill()
        worker.process.wait()
        late = client.generate([6], LONG)
        may_read.set()
        with pytest.raises(Unavailable, match="killed by SIGKILL"):
            list(late)
        assert kinds[-1] == "failed"


def test_executor_failure_is_told_to_every_request_and_ends_the_worker() -> None:
    with start("device-lost") as worker, worker.connect() as client:
        with pytest.raises(TrtBuildError, match="engine worker failed: device lost"):
            list(client.generate([3, 4]))
        assert worker.process.wait(timeout=10) == 1


def test_sigterm_drains() -> None:
    with start() as worker, worker.connect() as client:
        stream = client.generate([3, 4], SamplingParams(max_tokens=30, ignore_eos=True))
        next(stream)
        worker.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 5
        while True:
            assert time.monotonic() < deadline
            late = client.generate([5], SamplingParams(max_tokens=1))
            try:
                late.result()
            except TrtBuildError as error:
                assert "the engine worker is stopping" in str(error)
                break
        rest = stream.result()
        assert (len(rest.token_ids), rest.finish_reason) == (29, "length")
        assert worker.process.wait(timeout=10) == 0
        assert not worker.socket_path.exists()


def test_drain_has_a_limit_and_shutdown_can_be_immediate() -> None:
    with start(drain_seconds=0.3) as worker, worker.connect() as client:
        stream = client.generate([3, 4], LONG)
        client.shutdown()
        assert stream.result().finish_reason == "cancelled"
        assert worker.close() == 0
    with start() as worker, worker.connect() as client:
        stream = client.generate([3, 4], LONG)
        next(stream)
        begun = time.monotonic()
        client.shutdown(drain=False)
        assert stream.result().finish_reason == "cancelled"
        assert worker.process.wait(timeout=10) == 0
        assert time.monotonic() - begun < 3


@pytest.mark.parametrize(
    ("name", "kind", "why"),
    [
        ("refused", Refused, r"built for sm120, this GPU is sm90 \(the engine worker exited with status 3\)"),
        ("crash", TrtBuildError, r"died while loading: exit status 1(.|\n)*segment 3 is corrupt"),
    ],
)
def test_startup_error_is_relayed(name: str, kind: type[TrtBuildError], why: str) -> None:
    with pytest.raises(TrtBuildError, match=why) as raised:
        start(name)
    assert type(raised.value) is kind


def test_slow_start_is_given_up_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(TrtBuildError, match=r"was not ready after 0\.1 s"):
        start_worker(Path("fake"), loader=LOADER, timeout_s=0.1)
    assert list(tmp_path.iterdir()) == []
    assert _processes_of(tmp_path) == []


def test_deep_temporary_directory_still_gets_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with start(slots=2) as worker, worker.connect() as client:
        assert client.hello["limits"]["num_slots"] == 2
    assert not worker.socket_path.parent.exists()


def test_worker_dies_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from trtbuild.engines.serving.launch import start_worker;"
        f"w = start_worker(Path('fake'), loader={LOADER!r}, timeout_s=60);"
        "print(w.process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert _processes_of(tmp_path) == [pid]
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while _processes_of(tmp_path):
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.05)


def start_lingering(path: Path, linger_s: float) -> subprocess.Popen[bytes]:
    read_fd, write_fd = os.pipe()
    options = {"loader": LOADER, "threads": 1, "linger-seconds": linger_s, "prepare-guides": True}
    process = subprocess.Popen(worker_command(Path("fake"), path, write_fd, options), pass_fds=(write_fd,))
    os.close(write_fd)
    with os.fdopen(read_fd) as pipe:
        await_ready(pipe, process, Path("fake"), None, 60)
    return process


def test_lingering_worker_ends_after_its_last_client_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "s"
    process = start_lingering(path, 1.0)
    try:
        with WorkerClient(path) as client:
            time.sleep(1.3)
            assert process.poll() is None, "a client that is idle keeps it"
            assert client.stats()["connections"] == 1
        time.sleep(0.5)
        with WorkerClient(path) as again:
            time.sleep(0.8)
            assert again.generate([3], SamplingParams(max_tokens=1)).result().token_ids
        left = time.monotonic()
        assert process.wait(timeout=10) == 0
        assert time.monotonic() - left > 0.9 and not path.exists()
    finally:
        process.kill()
        process.wait()


def test_lingering_worker_without_any_client_ends(tmp_path: Path) -> None:
    process = start_lingering(tmp_path / "s", 0.2)
    assert process.wait(timeout=10) == 0


def test_worker_ends_while_it_loads_when_its_starter_does(tmp_path: Path) -> None:
    """As a killed stub of Triton leaves one, which would hold its memory for nobody."""
    read_fd, write_fd = os.pipe()
    options = {"loader": LOADER, "linger-seconds": 10}
    process = subprocess.Popen(worker_command(Path("slow"), tmp_path / "s", write_fd, options), pass_fds=(write_fd,))
    os.close(write_fd)
    os.close(read_fd)
    assert process.wait(timeout=20) == 1


def test_engine_thread_ends_where_nobody_can_be_told_that_it_is_ready(tmp_path: Path) -> None:
    """It would keep the process, and the engine's memory, for good."""
    before = set(threading.enumerate())

    def gone(hello: dict[str, Any]) -> None:
        raise BrokenPipeError

    async def serve() -> None:
        await WorkerServer(FakeEngine(FakeExecutor()), ServerLimits(drain_s=5.0)).serve(tmp_path / "s", gone)

    with pytest.raises(BrokenPipeError):
        asyncio.run(serve())
    deadline = time.monotonic() + 5
    while left := set(threading.enumerate()) - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_ends_leaves_the_socket_of_its_successor(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = start_lingering(path, 30)
    path.unlink()
    second = start_lingering(path, 30)
    try:
        first.terminate()
        assert first.wait(timeout=10) == 0
        with WorkerClient(path) as client:
            assert client.hello["pid"] == second.pid
    finally:
        second.kill()
        second.wait()


def _processes_of(directory: Path) -> list[int]:
    """Pids of live processes whose command line names `directory`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(directory).encode() in command and b"trtbuild.engines.serving.worker" in command:
                found.append(int(entry.name))
    return found
