"""A worker that several clients share, over a real process; the executor behind it takes 20 ms a step."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from trtbuild.engines.serving import shared
from trtbuild.engines.serving.request import SamplingParams
from trtbuild.engines.serving.shared import SharedWorker
from trtbuild.errors import Refused, TrtBuildError

OPTIONS = {"loader": "fake_executor:load_fake", "threads": 1, "slots": None}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sockets of its own; what still runs at the end is ended."""
    monkeypatch.setattr(shared, "LINGER_S", 1.0)
    monkeypatch.setattr(shared, "runtime_directory", lambda: tmp_path)
    yield
    for process in psutil.Process().children(recursive=True):
        if "serving.worker" in " ".join(process.cmdline()):
            process.kill()
            process.wait()


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """The loader reads nothing of it."""
    directory = tmp_path / "fake"
    directory.mkdir()
    (directory / "engine.json").write_text("{}")
    return directory


def test_all_of_a_group_share_one_and_the_last_ends_it(engine: Path, tmp_path: Path) -> None:
    workers = [SharedWorker(engine, OPTIONS, "triton-1") for _ in range(3)]
    clients: list[shared.WorkerClient] = []
    # At once: only one may start it.
    threads = [threading.Thread(target=lambda worker=worker: clients.append(worker.connect())) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (process_id,) = {client.hello["pid"] for client in clients}
    assert clients[0].generate([5, 6], SamplingParams(max_tokens=2)).result().token_ids
    with SharedWorker(engine, OPTIONS, "triton-2").connect() as other:
        assert other.hello["pid"] != process_id
    for client in clients:
        assert psutil.pid_exists(process_id)
        client.close()
    # Within the time it is found again.
    with workers[2].connect() as again:
        assert again.hello["pid"] == process_id
    deadline = time.monotonic() + 20
    while psutil.pid_exists(process_id) and psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the worker stays though nobody is connected"
        time.sleep(0.05)
    assert not list(tmp_path.glob("*.sock"))


def test_a_killed_worker_is_told_and_replaced(engine: Path) -> None:
    lost: list[str] = []
    worker = SharedWorker(engine, OPTIONS, "triton-1")
    client = worker.connect(lost.append)
    stream = client.generate([5, 6], SamplingParams(max_tokens=300, ignore_eos=True))
    next(stream)
    psutil.Process(client.hello["pid"]).kill()
    with pytest.raises(TrtBuildError, match="killed by SIGKILL"):
        list(stream)
    deadline = time.monotonic() + 5
    while not lost:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "killed by SIGKILL" in lost[0]
    with worker.connect() as again:
        assert again.hello["pid"] != client.hello["pid"]


def test_why_it_does_not_start(engine: Path) -> None:
    refused = engine.rename(engine.with_name("refused"))
    with pytest.raises(Refused, match="built for sm120"):
        SharedWorker(refused, OPTIONS, "triton-1").connect()


def test_other_users_may_not_enter_where_sockets_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(shared.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(shared, "_LONGEST_DIRECTORY", 1000)
    directory = tmp_path / f"trtbuild-{os.getuid()}"
    directory.mkdir()
    directory.chmod(0o755)
    with pytest.raises(Refused, match="nobody else can enter"):
        shared.runtime_directory()
    directory.chmod(0o700)
    assert shared.runtime_directory() == directory
