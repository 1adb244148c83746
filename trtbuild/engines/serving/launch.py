"""Starting an engine worker as a child process, and never leaving it behind.

Free of torch. The worker exits on its own when this process dies: it watches the other end of its stdin.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from trtbuild.engines.serving.client import WorkerClient
from trtbuild.errors import CheckFailed, Refused, TrtBuildError

# sockaddr_un holds 108 bytes; a deep TMPDIR does not fit.
MAX_SOCKET_PATH = 100
_ERROR_OF_EXIT_CODE: dict[int, type[TrtBuildError]] = {3: Refused, 4: CheckFailed}
_LOG_TAIL_LINES = 15


class WorkerProcess:
    """A running, ready worker. A context manager; `close` also runs when the block fails."""

    def __init__(self, process: subprocess.Popen[bytes], directory: Path, hello: dict[str, Any]) -> None:
        self.process = process
        self.socket_path = directory / "socket"
        self.log_path = directory / "log"
        self.hello = hello
        """What the worker says of itself: engine, executor, limits (see `trtbuild.engines.serving.protocol`)."""
        self._directory = directory

    def connect(self) -> WorkerClient:
        """A new connection to this worker."""
        return WorkerClient(self.socket_path, describe_end=self._describe_end)

    def close(self, drain: bool = False, timeout_s: float = 15.0) -> int:
        """Stop the worker (`drain`: after the requests in flight) and return its exit status; killed at the timeout."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM if drain else signal.SIGINT)
        return _reap(self.process, self._directory, timeout_s)

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _describe_end(self) -> str:
        """How the process ended, for the error of a client that lost it."""
        try:
            status = self.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "it closed the connection but still runs"
        return f"{describe_status(status)}{_log_tail(self.log_path)}"


def start_worker(
    engine_dir: Path,
    *,
    slots: int | None = None,
    threads: int | None = None,
    dtype: str | None = None,
    executor: str | None = None,
    loader: str | None = None,
    drain_seconds: float | None = None,
    max_queue: int | None = None,
    log_format: str | None = None,
    timeout_s: float = 600.0,
) -> WorkerProcess:
    """Start a worker for an engine directory and wait until it serves.

    `executor`: "auto" (the default), "reference" or "tensorrt", see `engines.load.load_engine`.
    Raises `TrtBuildError` (`Refused`, `CheckFailed` where the worker's own error was one) with the worker's message
    and exit status where it does not get that far within `timeout_s` seconds.
    """
    directory = _private_directory()
    read_fd, write_fd = os.pipe()
    options = {
        "slots": slots,
        "threads": threads,
        "dtype": dtype,
        "executor": executor,
        "loader": loader,
        "drain-seconds": drain_seconds,
        "max-queue": max_queue,
        "log-format": log_format,
    }
    command = [*worker_command(engine_dir, directory / "socket", write_fd, options), "--with-parent"]
    process = None
    hello = None
    try:
        with (directory / "log").open("wb") as log:
            # Its own session, so that Ctrl-C reaches this process only, which then stops the worker in order.
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=(write_fd,), start_new_session=True
            )
        os.close(write_fd)
        write_fd = -1
        with os.fdopen(read_fd, "r", encoding="utf-8") as pipe:
            hello = await_ready(pipe, process, engine_dir, directory / "log", timeout_s)
        return WorkerProcess(process, directory, hello)
    finally:
        if write_fd >= 0:
            os.close(write_fd)
        if hello is None:
            if process is not None:
                process.kill()
            _reap(process, directory, timeout_s=5.0)


def worker_command(
    engine_dir: Path, socket_path: Path, ready_fd: int, options: Mapping[str, object], python: str = sys.executable
) -> list[str]:
    """The command line of a worker; `options`: its flags without dashes, of which None is left out."""
    command = [python, "-m", "trtbuild.engines.serving.worker", str(engine_dir)]
    command += ["--socket", str(socket_path), "--ready-fd", str(ready_fd)]
    for flag, value in options.items():
        command += [] if value is None else [f"--{flag}", str(value)]
    return command


def await_ready(
    pipe: IO[str], process: subprocess.Popen[bytes], engine_dir: Path, log: Path | None, timeout_s: float
) -> dict[str, Any]:
    """The worker's hello, read from its ready pipe; raises the error that says why there is none."""
    if not select.select([pipe], [], [], timeout_s)[0]:
        raise TrtBuildError(f"the engine worker for {engine_dir} was not ready after {timeout_s:g} s{_log_tail(log)}")
    line = pipe.readline()
    if not line:
        status = process.wait()
        raise TrtBuildError(
            f"the engine worker for {engine_dir} died while loading: {describe_status(status)}{_log_tail(log)}"
        )
    message = json.loads(line)
    if message["type"] == "error":
        code = message["exit_code"]
        raise _ERROR_OF_EXIT_CODE.get(code, TrtBuildError)(
            f"{message['message']} (the engine worker exited with status {code})"
        )
    return message


def _reap(process: subprocess.Popen[bytes] | None, directory: Path, timeout_s: float) -> int:
    status = 0
    if process is not None:
        try:
            status = process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        if process.stdin is not None:
            process.stdin.close()
    shutil.rmtree(directory, ignore_errors=True)
    return status


def _private_directory() -> Path:
    """A new directory that only this user can enter, with room for a socket's name."""
    directory = Path(tempfile.mkdtemp(prefix="trtbuild-"))
    if len(os.fsencode(directory / "socket")) <= MAX_SOCKET_PATH:
        return directory
    directory.rmdir()
    return Path(tempfile.mkdtemp(prefix="trtbuild-", dir="/tmp"))


def describe_status(status: int) -> str:
    if status < 0:
        hint = ", often the system out of memory" if -status == signal.SIGKILL else ""
        return f"killed by {signal.Signals(-status).name}{hint}"
    return f"exit status {status}"


def _log_tail(path: Path | None) -> str:
    """The last lines of the worker's log, indented, for an error message; None: it logs elsewhere."""
    if path is None:
        return ""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_TAIL_LINES:]
    except OSError:
        return ""
    return "".join(f"\n    {line}" for line in lines)
