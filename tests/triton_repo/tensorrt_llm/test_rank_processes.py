"""`trtbuild serve` over TensorRT-LLM engines: real processes, of fake servers under a fake launcher."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_ranks import make_programs, make_repository

from trtbuild.checkpoints.layout import Layout
from trtbuild.triton_repo.triton_process import Ports

TP2 = {"tensorrt_llm": {"layout": Layout(tp=2, moe_tp=2)}}
TIMEOUT_S = 30.0


def free_ports(num_ranks: int = 8) -> Ports:
    """Three for each rank, which takes those after the rank's before; below the ones that the kernel hands out."""
    for first in random.sample(range(10_000, 32_000, 3 * num_ranks), 100):
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in range(first, first + 3 * num_ranks):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return Ports(first, first + 1, first + 2)
    raise AssertionError("no ports in a row are free")


class Ranks:
    """`trtbuild serve` as a process, and what the fake servers under it wrote down."""

    def __init__(
        self,
        folder: Path,
        models: dict[str, dict[str, Any]] | None,
        *arguments: str,
        died: int | None = None,
        mpirun: str | None = None,
    ) -> None:
        self.folder = folder / "ranks"
        self.folder.mkdir()
        if died is not None:
            (self.folder / f"die{died}").touch()
        repository, server = make_repository(folder, models), make_programs(folder / "bin")
        if mpirun is not None:
            (folder / "bin" / "mpirun").unlink()
            # Not a link: Open MPI finds its own files beside its program.
            (folder / "bin" / "mpirun").write_text(f'#!/bin/sh\nexec {mpirun} "$@"\n')
            (folder / "bin" / "mpirun").chmod(0o755)
        self.ports = ports = free_ports()
        self.log = folder / "serve.log"
        command = [
            sys.executable, "-m", "trtbuild", "serve", "--repository", str(repository), "--tritonserver", str(server),
            "--http-port", str(ports.http), "--grpc-port", str(ports.grpc), "--metrics-port", str(ports.metrics),
            "--exit-timeout", "5", *arguments,
        ]  # fmt: skip
        environment = {
            **os.environ,
            "SLURM_NODEID": "0",
            "FAKE_RANKS": str(self.folder),
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def wait_served(self, num_ranks: int = 1) -> None:
        """Until rank 0 answers, and the others run."""
        deadline = time.monotonic() + TIMEOUT_S
        while "\nserving " not in "\n" + self.text() or len(list(self.folder.glob("rank*.json"))) < num_ranks:
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.02)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def rank(self, number: int) -> dict[str, Any]:
        return json.loads((self.folder / f"rank{number}.json").read_text())

    def all_pids(self) -> list[int]:
        """Of the launcher, of all ranks."""
        return [one.pid for one in psutil.Process(self.process.pid).children(recursive=True)]

    def wait_ended(self) -> int:
        return self.process.wait(timeout=TIMEOUT_S)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    started: list[Ranks] = []

    def serve(models: dict[str, dict[str, Any]] | None = None, *arguments: str, **given: Any) -> Ranks:
        started.append(Ranks(tmp_path, models, *arguments, **given))
        return started[-1]

    yield serve
    for one in started:
        children = [psutil.Process(pid) for pid in one.all_pids()] if one.process.poll() is None else []
        one.process.kill()
        one.process.wait()
        for child in children:
            child.kill()


def gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


def test_ranks_start_and_drain(start: Callable[..., Ranks]) -> None:
    """SIGTERM reaches rank 0, which finishes what it has; mpirun, given it, would have killed it."""
    service = start(TP2)
    service.wait_served(2)
    pids = service.all_pids()
    assert len(pids) == 3
    first, second = service.rank(0), service.rank(1)
    assert f"--http-port={service.ports.http}" in first["arguments"]
    assert "--load-model=tensorrt_llm" in second["arguments"] and "--load-model=tensorrt_llm" not in first["arguments"]
    assert "TRTLLM_ORCHESTRATOR" not in first["environment"]
    # Models find their packages in the container's Python, not in trtbuild's environment.
    assert first["environment"]["PATH"].startswith(str(service.log.parent / "bin"))
    service.process.send_signal(signal.SIGTERM)
    assert service.wait_ended() == 0
    assert (service.folder / "drained").exists()
    assert gone(pids)


def test_ranks_that_do_not_follow_the_leader(start: Callable[..., Ranks]) -> None:
    """They end soon after it, not only when the exit timeout is over."""
    service = start(TP2, "--exit-timeout", "60")
    service.wait_served(2)
    pids = service.all_pids()
    (service.folder / "stay1").touch()
    service.process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert service.wait_ended() == 0
    assert time.monotonic() - started < 15
    assert (service.folder / "drained").exists()
    assert gone(pids)


def test_srun_passes_the_signal_on(start: Callable[..., Ranks]) -> None:
    service = start(TP2, "--launcher", "srun")
    service.wait_served(2)
    pids = service.all_pids()
    service.process.send_signal(signal.SIGTERM)
    assert service.wait_ended() == 0
    assert (service.folder / "drained").exists()
    assert gone(pids)


def test_one_rank_without_a_launcher(start: Callable[..., Ranks]) -> None:
    service = start()
    service.wait_served()
    (pid,) = service.all_pids()
    assert service.rank(0)["pid"] == pid
    service.process.send_signal(signal.SIGINT)
    assert service.wait_ended() == 0
    assert (service.folder / "drained").exists()


def test_an_orchestrator_gets_its_environment_and_drains(start: Callable[..., Ranks]) -> None:
    service = start(TP2, "--multi-model")
    service.wait_served()
    found = service.rank(0)["environment"]
    assert (found["TRTLLM_ORCHESTRATOR"], found["TRTLLM_ORCHESTRATOR_SPAWN_PROCESSES"]) == ("1", "1")
    assert not (service.folder / "rank1.json").exists()
    service.process.send_signal(signal.SIGTERM)
    assert service.wait_ended() == 0
    assert (service.folder / "drained").exists()


@pytest.mark.parametrize("launcher", ["mpirun", "srun"])
def test_a_rank_that_dies_ends_all(launcher: str, start: Callable[..., Ranks]) -> None:
    service = start(TP2, "--launcher", launcher)
    service.wait_served(2)
    pids = service.all_pids()
    (service.folder / "die1").touch()
    assert service.wait_ended() == 1
    message = service.text().partition("\nerror: ")[2]
    assert message.startswith("a rank ended, and with it all 2 (status 9)")
    assert ("Process name: [[1,1],1]" if launcher == "mpirun" else "node1: task 1: Exited with exit code 9") in message
    assert "rank 1: CUDA error: an illegal memory access" in message
    assert gone(pids)


def test_a_rank_that_dies_while_it_loads(start: Callable[..., Ranks]) -> None:
    service = start(TP2, died=0)
    assert service.wait_ended() == 1
    message = service.text().partition("\nerror: ")[2]
    assert "Triton ended with status 9" in message and "rank 0: CUDA error" in message
    assert gone([service.rank(0)["pid"]])
    assert "\nserving" not in service.text()


def test_a_killed_launcher_leaves_no_ranks(start: Callable[..., Ranks]) -> None:
    service = start(TP2)
    service.wait_served(2)
    pids = service.all_pids()
    (launcher,) = psutil.Process(service.process.pid).children()
    # One that no request to end reaches.
    psutil.Process(service.rank(1)["pid"]).suspend()
    launcher.kill()
    assert service.wait_ended() == 1
    assert "mpirun was killed by signal 9, and all 2 ranks were ended" in service.text()
    assert gone(pids)


def test_a_leader_that_does_not_drain_is_killed(start: Callable[..., Ranks]) -> None:
    """After the exit timeout and its grace; rank 1 waits for the leader for ever."""
    service = start(TP2, "--exit-timeout", "0")
    service.wait_served(2)
    pids = service.all_pids()
    psutil.Process(service.rank(0)["pid"]).suspend()
    service.process.send_signal(signal.SIGTERM)
    assert service.wait_ended() == 0
    assert not (service.folder / "drained").exists()
    assert gone(pids)


REAL_MPIRUN = shutil.which("mpirun")


@pytest.mark.skipif(REAL_MPIRUN is None, reason="no Open MPI here")
@pytest.mark.parametrize("how", ["drain", "die", "hostfile"])
def test_with_open_mpi(how: str, start: Callable[..., Ranks], tmp_path: Path) -> None:
    """The same with a real mpirun, which knows nothing of TensorRT-LLM: command line, rank numbers, ends."""
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    arguments = ["--hostfile", str(tmp_path / "hosts")] if how == "hostfile" else []
    service = start(TP2, *arguments, mpirun=REAL_MPIRUN)
    service.wait_served(2)
    pids = service.all_pids()
    assert [service.rank(number)["environment"]["OMPI_COMM_WORLD_RANK"] for number in (0, 1)] == ["0", "1"]
    if how == "die":
        (service.folder / "die1").touch()
        assert service.wait_ended() == 1
        assert "Exit code:    9" in service.text().partition("\nerror: ")[2]
    else:
        service.process.send_signal(signal.SIGTERM)
        assert service.wait_ended() == 0
        assert (service.folder / "drained").exists()
    assert gone(pids)
