"""`trtbuild serve`: Triton, and the OpenAI front end beside it, as one service that starts, mends and ends as one."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click

from trtbuild.ends_with_parent import tied
from trtbuild.errors import Refused, TrtBuildError, refuse_all
from trtbuild.progress import ProgressFactory, no_progress
from trtbuild.triton_repo.installation import TritonInstallation
from trtbuild.triton_repo.packaged_models import check_llmapi, resolve_names
from trtbuild.triton_repo.triton_process import Ports, TritonProcess, print_to_stderr

WATCH_S = 0.2
# A server that dies this often within the window is broken, not unlucky.
_MAX_RESTARTS, _RESTART_WINDOW_S = 5, 60.0
_FRONT_END_START_S = 60.0
# Beyond Triton's own exit timeout, for ending what does not end.
_EXIT_GRACE_S = 5.0


@dataclass(frozen=True)
class ServeOptions:
    """What to serve and how; `names` empty: every model of the repository."""

    repository: Path
    names: tuple[str, ...] = ()
    ports: Ports = field(default_factory=Ports)
    openai_port: int | None = None
    openai_arguments: tuple[str, ...] = ()
    control_mode: str = "none"
    exit_timeout_s: int = 30
    load_timeout_s: float = 1800.0
    triton_arguments: tuple[str, ...] = ()
    log_format: str = "text"


def serve(options: ServeOptions, installation: TritonInstallation, *, progress: ProgressFactory = no_progress) -> None:
    """Serve until SIGINT or SIGTERM, then drain: no new requests, streams in flight finish or are told.

    A killed model stub or server is started again, since what hung on it must be told at once. Raises `Refused` for a
    repository that is not one, `TrtBuildError` where Triton does not start or keeps ending.
    """
    models = models_to_load(options)
    _check_tls(options)
    check_llmapi(options.repository, models, installation)
    with stop_signals() as stopped, ExitStack() as running:
        triton = running.enter_context(_Triton(lambda: _start_triton(options, installation, models, progress)))
        front_end = start_front_end(options, running)
        say_where(options, models)
        while not stopped():
            if front_end is not None and front_end.poll() is not None:
                raise TrtBuildError(f"the OpenAI front end ended with status {front_end.returncode}")
            triton.mend()
            time.sleep(WATCH_S)
        drain(triton.server, front_end, options.exit_timeout_s)


class _Triton:
    """The server that runs now, started again where it, or a stub of it, was killed; a context manager."""

    def __init__(self, start: Callable[[], TritonProcess]) -> None:
        self._start = start
        self._restarts: list[float] = []
        self.server = start()

    def mend(self) -> None:
        """Raises `TrtBuildError` where it ends again and again."""
        why = _what_died(self.server)
        if why is None:
            return
        self.server.kill()
        self.server.close()
        now = time.monotonic()
        self._restarts = [*(at for at in self._restarts if now - at < _RESTART_WINDOW_S), now]
        if len(self._restarts) > _MAX_RESTARTS:
            raise TrtBuildError(f"{why}, for the {len(self._restarts)}th time in {_RESTART_WINDOW_S:g} s; giving up")
        click.echo(f"{why}: starting Triton again", err=True)
        self.server = self._start()

    def __enter__(self) -> _Triton:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.close()


def models_to_load(options: ServeOptions) -> list[str]:
    """The names of the models to serve. Raises `Refused` where there is nothing, or not all."""
    found = sorted(file.parent.name for file in options.repository.glob("*/config.pbtxt"))
    if not found:
        raise Refused(f"{options.repository}: no model in it; trtbuild package NAME makes one")
    if not options.names:
        return found
    return resolve_names(options.repository, options.names)


def check_ports(options: ServeOptions) -> None:
    """Raises `Refused` where two services would listen on the same port."""
    ports = options.ports
    given = {"http": ports.http, "grpc": ports.grpc, "metrics": ports.metrics, "openai": options.openai_port}
    problems = [
        f"--{first}-port and --{second}-port are both {given[first]}; give each a port of its own"
        for first, second in itertools.combinations(given, 2)
        if given[first] == given[second]
    ]
    refuse_all("serve", problems)


def _check_tls(options: ServeOptions) -> None:
    if options.openai_port is not None and any("grpc-use-ssl" in argument for argument in options.triton_arguments):
        raise Refused(
            "--openai-port reaches Triton over plain gRPC on this machine: leave out --grpc-use-ssl, and put TLS in "
            "front of what others reach"
        )


def _start_triton(
    options: ServeOptions, installation: TritonInstallation, models: Sequence[str], progress: ProgressFactory
) -> TritonProcess:
    arguments = ["--model-control-mode", "explicit" if options.names else options.control_mode]
    arguments += [f"--load-model={model}" for model in models if options.names]
    if options.control_mode == "poll":
        arguments += ["--repository-poll-secs", "2"]
    server = TritonProcess(
        installation, options.repository, options.ports, [*arguments, *options.triton_arguments],
        exit_timeout_s=options.exit_timeout_s, log_format=options.log_format, echo=print_to_stderr,
    )  # fmt: skip
    waits_for = [] if options.control_mode == "explicit" and not options.names else models
    try:
        with progress(f"Triton ({installation.source})", max(1, len(waits_for)), "models") as bar:
            server.wait_ready(options.load_timeout_s, lambda name: bar.advance(1, name))
    except BaseException:
        server.kill()
        server.close()
        raise
    return server


def start_front_end(options: ServeOptions, running: ExitStack) -> subprocess.Popen[bytes] | None:
    """The OpenAI front end, listening; None where it is not asked for."""
    if options.openai_port is None:
        return None
    ports = options.ports
    host = "127.0.0.1" if ports.host in ("0.0.0.0", "::") else ports.host
    read_fd, write_fd = os.pipe()
    command = [
        sys.executable, "-m", "trtbuild.triton_repo.openai.server",
        "--triton", f"{host}:{ports.grpc}", "--metrics-url", f"http://{host}:{ports.metrics}/metrics",
        "--host", ports.host, "--port", str(options.openai_port),
        "--exit-timeout", str(options.exit_timeout_s), "--ready-fd", str(write_fd), *options.openai_arguments,
    ]  # fmt: skip
    process = subprocess.Popen(tied(command), stdin=subprocess.DEVNULL, pass_fds=(write_fd,), start_new_session=True)
    os.close(write_fd)
    running.callback(lambda: _end(process))
    with os.fdopen(read_fd, encoding="utf-8") as pipe:
        line = pipe.readline() if select.select([pipe], [], [], _FRONT_END_START_S)[0] else ""
    if not line:
        status = process.poll()
        why = "did not start in time" if status is None else f"ended with status {status}"
        raise TrtBuildError(f"the OpenAI front end {why}; its message is above")
    message = json.loads(line)
    if message.get("type") == "error":
        raise TrtBuildError(f"the OpenAI front end does not start: {message['message']}")
    return process


def say_where(options: ServeOptions, models: Sequence[str]) -> None:
    ports = options.ports
    lines = [
        f"serving {', '.join(models)}",
        f"  HTTP     http://{ports.host}:{ports.http}/v2/models/NAME/generate_stream",
        f"  gRPC     {ports.host}:{ports.grpc}",
        f"  metrics  http://{ports.host}:{ports.metrics}/metrics",
    ]
    if options.openai_port is not None:
        lines.append(f"  OpenAI   http://{ports.host}:{options.openai_port}/v1")
    click.echo("\n".join(lines), err=True)


def _what_died(server: TritonProcess) -> str | None:
    """Why Triton has to be started again; None where it has not."""
    if server.process.poll() is not None:
        return f"Triton ended with status {server.process.returncode}"
    stub = server.dead_stub()
    return None if stub is None else f"a model's process ({stub}) was killed, and Triton leaves its requests hanging"


def drain(server: TritonProcess, front_end: subprocess.Popen[bytes] | None, exit_timeout_s: int) -> None:
    """The front end first: it stands before Triton, and its streams need it to finish."""
    started = time.monotonic()
    click.echo("stopping: requests in flight finish", err=True)
    if front_end is not None:
        front_end.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            front_end.wait(timeout=exit_timeout_s + _EXIT_GRACE_S)
    left = max(0.0, exit_timeout_s - (time.monotonic() - started))
    server.close(timeout_s=left + _EXIT_GRACE_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM as a question that `serve` asks; a second one interrupts what it is doing."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
