"""The front end's process.

    python -m trtbuild.triton_repo.openai.server --triton 127.0.0.1:8001 --host 127.0.0.1 --port 9000 [...]

SIGTERM and SIGINT: new requests get 503 with Retry-After, those in flight finish; what is not finished at
--exit-timeout, or at a second signal, ends with an error; exit 0. Logs go to stderr.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import uvicorn

from trtbuild.engines.serving.request_log import configure_logging
from trtbuild.errors import TrtBuildError
from trtbuild.triton_repo.openai import settings as defaults
from trtbuild.triton_repo.openai.app import FrontEnd
from trtbuild.triton_repo.openai.connection import connection_class
from trtbuild.triton_repo.openai.settings import Settings, read_keys

log = logging.getLogger("trtbuild.openai")

_POLL_S = 0.05
# For the last bytes of streams that were ended.
_CLOSING_S = 1
_KEEP_ALIVE_S = 75
_MICROSECONDS_LIMIT_S = 10**9


@click.command()
@click.option("--triton", default="127.0.0.1:8001", show_default=True, help="HOST:PORT of Triton's gRPC.")
@click.option("--metrics-url", help="Triton's metrics: readiness then includes the engine workers.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=9000, show_default=True, help="0: a free one.")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="One key a line; default: everybody is let in.")
@click.option("--max-request-bytes", type=click.IntRange(min=1), default=defaults.DEFAULT_MAX_REQUEST_BYTES)
@click.option("--body-timeout", type=click.FloatRange(min=0.01), default=30.0, help="Seconds for a request's body.")
@click.option("--header-timeout", type=click.FloatRange(min=0.01), default=15.0, help="Seconds for its headers.")
@click.option(
    "--request-timeout",
    type=click.FloatRange(min=0.001, max=_MICROSECONDS_LIMIT_S),
    default=defaults.DEFAULT_REQUEST_TIMEOUT_S,
    help="Seconds for a whole answer.",
)
@click.option("--exit-timeout", type=click.FloatRange(min=0), default=30.0, help="Seconds for answers in flight.")
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text")
@click.option("--ready-fd", type=int, help="File descriptor that gets one JSON line when the port is open.")
def main(
    triton: str,
    metrics_url: str | None,
    host: str,
    port: int,
    api_key_file: Path | None,
    max_request_bytes: int,
    body_timeout: float,
    header_timeout: float,
    request_timeout: float,
    exit_timeout: float,
    log_format: str,
    ready_fd: int | None,
) -> None:
    """Serve OpenAI's HTTP interface in front of a Triton server."""
    configure_logging(log_format)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    try:
        settings = Settings(
            triton=triton,
            metrics_url=metrics_url,
            max_request_bytes=max_request_bytes,
            body_timeout_s=body_timeout,
            header_timeout_s=header_timeout,
            request_timeout_s=request_timeout,
            exit_timeout_s=exit_timeout,
            key_digests=() if api_key_file is None else read_keys(api_key_file),
        )
        listener = _listen(host, port)
    except TrtBuildError as error:
        _tell(ready_fd, {"type": "error", "message": error.message, "exit_code": error.exit_code})
        raise
    asyncio.run(serve(settings, listener, ready_fd))


async def serve(settings: Settings, listener: socket.socket, ready_fd: int | None = None) -> None:
    """Until a signal, and what is in flight then, is done with."""
    front_end = FrontEnd(settings)
    server = _Server(
        uvicorn.Config(
            front_end.asgi,
            http=connection_class(settings.header_timeout_s),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_CLOSING_S,
        )
    )
    stop = _Stop(front_end, server, settings.exit_timeout_s)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.signalled)
    announced = asyncio.ensure_future(_announce(server, listener, ready_fd))
    await server.serve(sockets=[listener])
    announced.cancel()


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn would close the port at once, and raise the signal again at the end."""
        yield


class _Stop:
    """The way from a signal to the end of the process."""

    def __init__(self, front_end: FrontEnd, server: uvicorn.Server, exit_timeout_s: float) -> None:
        self._front_end = front_end
        self._server = server
        self._exit_timeout_s = exit_timeout_s
        self._at_once = False
        self._task: asyncio.Task[None] | None = None

    def signalled(self) -> None:
        """The first signal drains; the second waits for nothing."""
        self._at_once = self._task is not None
        if self._task is None:
            self._task = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        state = self._front_end.state
        state.stopping = True
        log.info("stopping: %d requests in flight", state.num_active)
        end = time.monotonic() + self._exit_timeout_s
        while state.num_active and time.monotonic() < end and not self._at_once:
            await asyncio.sleep(_POLL_S)
        if state.num_active:
            log.warning("%d requests are ended unfinished", state.num_active)
            self._front_end.abort_all()
            end = time.monotonic() + _CLOSING_S
            while state.num_active and time.monotonic() < end:
                await asyncio.sleep(_POLL_S)
        self._server.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket; a port that is taken is a `TrtBuildError`, before anything else starts."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        raise TrtBuildError(f"--host {host} --port {port}: cannot listen there: {error}") from error
    return listener


async def _announce(server: uvicorn.Server, listener: socket.socket, ready_fd: int | None) -> None:
    while not server.started:
        await asyncio.sleep(_POLL_S)
    host, port = listener.getsockname()[:2]
    log.info("OpenAI interface on http://%s:%d/v1", host, port)
    _tell(ready_fd, {"type": "hello", "host": host, "port": port, "pid": os.getpid()})


def _tell(ready_fd: int | None, message: dict[str, Any]) -> None:
    if ready_fd is not None:
        with os.fdopen(ready_fd, "w", encoding="utf-8") as pipe:
            pipe.write(json.dumps(message) + "\n")


if __name__ == "__main__":
    sys.exit(main())
