"""`trtbuild serve` as a process, for tests."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil

from trtbuild.triton_repo.model_config import WorkerSettings
from trtbuild.triton_repo.triton_process import Ports

START_TIMEOUT_S = 120.0
# Steps of 20 ms, so that "in flight" is a state that a test can meet; its answers are a hash of the prompt.
SLOW_STEPS = WorkerSettings(loader="fake_executor:load_fake", slots=4, threads=1, max_queue=8)


class Service:
    """`trtbuild serve` as a process of its own."""

    def __init__(self, workspace: Path, *arguments: str) -> None:
        self.ports = ports = Ports.free()
        self.log = workspace / f"serve-{ports.http}.log"
        command = [
            sys.executable, "-m", "trtbuild", "serve", "--workspace", str(workspace), "--http-port", str(ports.http),
            "--grpc-port", str(ports.grpc), "--metrics-port", str(ports.metrics), *arguments,
        ]  # fmt: skip
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self.wait_for_log("\nserving ")

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.ports.grpc}"

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.ports.http}"

    def wait_for_log(self, text: str, since: int = 0) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while text not in "\n" + self.log_text()[since:]:
            assert self.process.poll() is None, f"serve ended:\n{self.log_text()[-3000:]}"
            assert time.monotonic() < deadline, f"no {text!r}:\n{self.log_text()[-3000:]}"
            time.sleep(0.05)

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def metrics(self) -> dict[str, float]:
        """Ours, by name without prefix, histograms' buckets left out; refreshed once a second."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports.metrics}/metrics", timeout=10) as answer:
            lines = [line for line in answer.read().decode().splitlines() if line.startswith("trtbuild_")]
        plain = [line for line in lines if "le=" not in line]
        return {line.split("{")[0].removeprefix("trtbuild_"): float(line.split()[-1]) for line in plain}

    def wait_for_metrics(self, **wanted: float) -> dict[str, float]:
        deadline = time.monotonic() + 20
        while True:
            found = self.metrics()
            if all(found.get(name) == value for name, value in wanted.items()):
                return found
            assert time.monotonic() < deadline, f"wanted {wanted}, have {found}"
            time.sleep(0.1)

    def processes(self, part: str) -> list[psutil.Process]:
        """Descendants whose command line has `part` in it."""
        everyone = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in everyone if part in " ".join(_command_line(one))]

    def close(self) -> int:
        """SIGTERM, and its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=60)
        finally:
            self.process.kill()


def is_running(process: psutil.Process) -> bool:
    """A zombie is not: of a killed parent's children nobody may take notice."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []
