"""A tritonserver child process: started, watched until it is ready, stopped in order."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from trtbuild.ends_with_parent import tied
from trtbuild.errors import TrtBuildError
from trtbuild.triton_repo.installation import TritonInstallation
from trtbuild.triton_repo.stub_processes import GROUP_VARIABLE, LOG_FORMAT_VARIABLE, STUBS_VARIABLE, find_dead

_POLL_S = 0.1
_TAIL_LINES = 400
# What Triton's log says of a model that does not load (a Python traceback follows, in one line), of a repository that
# it cannot read, and of a port that it cannot have.
_FAILED_MODEL = re.compile(
    r"failed to load '([^']+)' version \d+: (?:Internal: )?(?:TritonModelException: )?(.*?)(?:\\n\\nAt:|\"?$)"
)
_FAILURE = re.compile(r"^E\d{4} .*|.*(?:failed to start|already in use|Poll failed|error: creating server).*")
_LOADED = re.compile(r"successfully loaded '([^']+)'")


@dataclass(frozen=True)
class Ports:
    """Where Triton listens, on one address."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002
    host: str = "127.0.0.1"

    @classmethod
    def free(cls) -> Ports:
        """Three ports that nobody uses now."""
        sockets = [socket.socket() for _ in range(3)]
        try:
            for one in sockets:
                one.bind(("127.0.0.1", 0))
            return cls(*(one.getsockname()[1] for one in sockets))
        finally:
            for one in sockets:
                one.close()

    def arguments(self) -> list[str]:
        found: list[str] = []
        for service in ("http", "grpc", "metrics"):
            found += [f"--{service}-address", self.host, f"--{service}-port", str(getattr(self, service))]
        return found


class TritonProcess:
    """A running server; a context manager that ends it. It also ends when the thread that started it does.

    `echo` gets each line of its log. Its stubs leave a mark each while they live, see `dead_stub`.
    """

    def __init__(
        self,
        installation: TritonInstallation,
        repository: Path,
        ports: Ports,
        arguments: Sequence[str] = (),
        *,
        exit_timeout_s: int = 30,
        log_format: str = "text",
        echo: Callable[[str], None] | None = None,
    ) -> None:
        self.ports = ports
        self._installation = installation
        self._directory = tempfile.TemporaryDirectory(prefix="trtbuild-triton-")
        self._stubs = Path(self._directory.name) / "stubs"
        self._stubs.mkdir()
        self._log: deque[str] = deque(maxlen=_TAIL_LINES)
        self.loaded: list[str] = []
        command = self._command(repository, arguments, exit_timeout_s)
        marks = {STUBS_VARIABLE: str(self._stubs), GROUP_VARIABLE: f"serve-{os.getpid()}"}
        environment = {**os.environ, **self._added_environment(), **marks, LOG_FORMAT_VARIABLE: log_format}
        # Its own session: a Ctrl-C reaches us, and we stop it in order.
        self.process = subprocess.Popen(
            tied(command), env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, args=(echo,), name="triton-log", daemon=True)
        self._reader.start()

    def _command(self, repository: Path, arguments: Sequence[str], exit_timeout_s: int) -> list[str]:
        """What is run."""
        return [
            str(self._installation.binary),
            *("--model-repository", str(repository)),
            *self._installation.prepare(Path(self._directory.name)),
            *self.ports.arguments(),
            *("--exit-timeout-secs", str(exit_timeout_s)),
            *arguments,
        ]

    def _added_environment(self) -> dict[str, str]:
        return self._installation.environment

    def wait_ready(self, timeout_s: float, on_loaded: Callable[[str], None] = lambda name: None) -> None:
        """Until the server and its models are ready; `on_loaded` gets each model's name.

        Raises `TrtBuildError` with what Triton says where it ends, or is not ready in time.
        """
        deadline, told = time.monotonic() + timeout_s, 0
        while True:
            for name in self.loaded[told:]:
                told += 1
                on_loaded(name)
            if self.process.poll() is not None:
                self._reader.join(timeout=1.0)
                raise TrtBuildError(f"Triton ended with status {self.process.returncode}{self._failures()}")
            if self.is_ready():
                return
            if time.monotonic() > deadline:
                raise TrtBuildError(f"Triton was not ready after {timeout_s:g} s{self._failures()}")
            time.sleep(_POLL_S)

    def is_ready(self) -> bool:
        """What Triton answers to /v2/health/ready; False where it does not."""
        connection = http.client.HTTPConnection(self._client_host, self.ports.http, timeout=2.0)
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    @property
    def _client_host(self) -> str:
        return "127.0.0.1" if self.ports.host in ("0.0.0.0", "::", "") else self.ports.host

    def dead_stub(self) -> int | None:
        """The process id of a model's stub that ended without saying so; requests in flight in it hang in Triton."""
        return find_dead(self._stubs)

    def stop(self) -> None:
        """Ask it to end: no new requests, those in flight have until its exit timeout."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def close(self, timeout_s: float = 0.0) -> int:
        """End it, by SIGKILL after `timeout_s`; its exit status."""
        if self.dead_stub() is not None:
            # Triton would wait for it until its exit timeout.
            self.kill()
        stubs = self._running_stubs()
        self.stop()
        try:
            status = self.process.wait(timeout=timeout_s or 10.0)
        except subprocess.TimeoutExpired:
            self.kill()
            status = self.process.wait()
        _kill([*stubs, *self._running_stubs()])
        self._reader.join(timeout=1.0)
        self._directory.cleanup()
        return status

    def kill(self) -> None:
        """At once, with its stubs, which would not end by themselves; not with the engine workers that they share."""
        if self.process.poll() is not None:
            return
        stubs = self._running_stubs()
        self.process.kill()
        _kill(stubs)

    def _running_stubs(self) -> list[psutil.Process]:
        """Triton's children, and those that it left behind, by their marks.

        A stub that talks to Triton when that goes away waits for it for ever, and holds its engine worker.
        """
        found: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            found += psutil.Process(self.process.pid).children() if self.process.poll() is None else []
        for mark in self._stubs.glob("*"):
            with contextlib.suppress(psutil.NoSuchProcess):
                stub = psutil.Process(int(mark.name))
                if any("triton_python_backend_stub" in part for part in stub.cmdline()[:1]):
                    found.append(stub)
        return found

    def __enter__(self) -> TritonProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, echo: Callable[[str], None] | None) -> None:
        if self.process.stdout is None:
            raise AssertionError("Triton's output is a pipe")
        for raw in self.process.stdout:
            line = raw.decode("utf-8", errors="replace").rstrip("\n")
            self._log.append(line)
            if found := _LOADED.search(line):
                self.loaded.append(found[1])
            if echo is not None:
                echo(line)

    def _failures(self) -> str:
        """What the log says of why, each thing once, else its end; indented."""
        lines = list(self._log)
        models = [f"{found[1]}: {found[2]}" for line in lines if (found := _FAILED_MODEL.search(line))]
        told = list(dict.fromkeys(models)) or [line for line in lines if _FAILURE.match(line)] or lines[-15:]
        return "".join(f"\n    {line}" for line in told[-12:])


def _kill(processes: Sequence[psutil.Process]) -> None:
    for one in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


def print_to_stderr(line: str) -> None:
    """An `echo` that passes the log on."""
    sys.stderr.write(line + "\n")
