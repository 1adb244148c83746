"""The engine worker: one process that holds one engine and serves it over a Unix-domain socket.

    python -m trtbuild.engines.serving.worker ENGINE_DIR --socket PATH [--slots N] [--threads N] [--executor NAME]
        [--max-queue N] [--linger-seconds S] [--prepare-guides true] [--log-format json]

`generate`, Triton's model and the benchmarks are clients of it (`serving.client`), so that a model's weights are in
memory once and a crash of either side is seen, not shared. SIGTERM drains: no new requests, those in flight
finish (up to --drain-seconds), exit 0; SIGINT or a second SIGTERM cancels them. Logs go to stderr.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from trtbuild.engines.serving.request import ServerLimits
from trtbuild.engines.serving.request_log import configure_logging
from trtbuild.errors import Refused, TrtBuildError

log = logging.getLogger("trtbuild.worker")

DEFAULT_LOADER = "trtbuild.engines.load:load_engine"
# After its parent died a worker has no one to drain for.
ORPHAN_GRACE_S = 2.0
STARTER_POLL_MS = 500
STARTER_GONE = "whoever started this worker was gone before it was ready; it ends"
# On a CPU oneDNN, and ideep above it, each keep 1024 compiled products by default, one for each shape met, of 0.26 MiB:
# with batch sizes that vary this fills for minutes. What oneDNN has ideep need not; compiling one again takes 0.3 ms.
SHAPE_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": 256, "LRU_CACHE_CAPACITY": 16}


class Starter:
    """Whoever started this worker and waits at the pipe's other end; nobody, without a file descriptor.

    Until it is told how loading went, its end ends this process: the engine would be held for nobody, and the next who
    wants it starts a worker of its own.
    """

    def __init__(self, ready_fd: int | None) -> None:
        self._ready_fd = ready_fd
        self._told = threading.Event()
        if ready_fd is not None:
            threading.Thread(target=self._watch, args=(os.dup(ready_fd),), name="starter", daemon=True).start()

    def tell(self, message: dict[str, Any]) -> None:
        """One JSON line. Raises `TrtBuildError` where nobody is left to read it."""
        self._told.set()
        if self._ready_fd is None:
            return
        try:
            with os.fdopen(self._ready_fd, "w", encoding="utf-8") as pipe:
                pipe.write(json.dumps(message) + "\n")
        except BrokenPipeError as error:
            raise TrtBuildError(STARTER_GONE) from error

    def _watch(self, descriptor: int) -> None:
        poller = select.poll()
        # An error, which is always reported: the end that reads is closed.
        poller.register(descriptor, 0)
        while not self._told.is_set():
            if poller.poll(STARTER_POLL_MS) and not self._told.is_set():
                log.error(STARTER_GONE)
                os._exit(1)
        os.close(descriptor)


@click.command()
@click.argument("engine_dir", type=click.Path(path_type=Path))
@click.option("--socket", "socket_path", type=click.Path(path_type=Path), required=True, help="Where to listen.")
@click.option("--slots", type=click.IntRange(min=1), help="Concurrent requests; default: what memory allows.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of torch.")
@click.option("--dtype", help="Compute type of the reference executor.")
@click.option("--executor", help="auto, reference or tensorrt.")
@click.option("--drain-seconds", type=click.FloatRange(min=0), default=30.0, show_default=True)
@click.option("--max-queue", type=click.IntRange(min=0), help="Requests that may wait; 0: none; default: no limit.")
@click.option(
    "--linger-seconds", type=click.FloatRange(min=0), help="Exit after this long without a client; default: never."
)
@click.option(
    "--prepare-guides",
    type=bool,
    default=False,
    help="true: read the vocabulary for guides and bad words before serving (seconds), not at the first such request.",
)
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--loader", default=DEFAULT_LOADER, help="MODULE:FUNCTION that loads the engine; for tests and perf.")
@click.option("--ready-fd", type=int, help="File descriptor that gets one JSON line: hello, or why loading failed.")
@click.option("--with-parent", is_flag=True, help="Exit when stdin closes, that is, when the parent dies.")
def main(
    engine_dir: Path,
    socket_path: Path,
    slots: int | None,
    threads: int | None,
    dtype: str | None,
    executor: str | None,
    drain_seconds: float,
    max_queue: int | None,
    linger_seconds: float | None,
    prepare_guides: bool,
    log_format: str,
    loader: str,
    ready_fd: int | None,
    with_parent: bool,
) -> None:
    """Serve ENGINE_DIR on a Unix-domain socket."""
    configure_logging(log_format)
    _bound_shape_caches()
    if with_parent:
        threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    starter = Starter(ready_fd)
    try:
        engine = _load(loader, engine_dir, slots, threads, dtype, executor)
    except TrtBuildError as error:
        starter.tell({"type": "error", "message": error.message, "exit_code": error.exit_code})
        raise
    limits = ServerLimits(drain_seconds, max_queue, linger_seconds, prepare_guides)
    clean = asyncio.run(_serve(engine, socket_path, limits, starter))
    if not clean:
        log.error("the engine is stuck in a step; exiting without it")
        os._exit(1)
    engine.executor.close()


def _bound_shape_caches() -> None:
    """Only before torch's first product: both caches read their variable once. What the environment says stays."""
    for name, capacity in SHAPE_CACHES.items():
        os.environ.setdefault(name, str(capacity))


def _load(
    loader: str, engine_dir: Path, slots: int | None, threads: int | None, dtype: str | None, executor: str | None
) -> Any:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    module, _, function = loader.partition(":")
    if not function:
        raise Refused(f"--loader {loader}: must be MODULE:FUNCTION")
    load: Callable[..., Any] = getattr(importlib.import_module(module), function)
    start = time.monotonic()
    # Loaders of tests and benchmarks bring an executor of their own.
    chosen = {} if executor is None else {"executor": executor}
    engine = load(engine_dir, num_slots=slots, dtype=dtype, **chosen)
    log.info(
        "loaded %s in %.1f s: %s executor, %d slots of %d tokens",
        engine.name,
        time.monotonic() - start,
        engine.executor.name,
        engine.executor.num_slots,
        engine.executor.max_seq_len,
    )
    return engine


async def _serve(engine: Any, socket_path: Path, limits: ServerLimits, starter: Starter) -> bool:
    """False where the engine thread did not come back from its last step."""
    from trtbuild.engines.serving.server import WorkerServer

    server = WorkerServer(engine, limits)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, server.stop, True)
    loop.add_signal_handler(signal.SIGINT, server.stop, False)
    finished = await server.serve(socket_path, starter.tell)
    # It ends now; a signal on the way out must not turn that into a failure.
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)
    return finished


def _end_with_parent() -> None:
    """Block until the parent's end of stdin closes; os.read, since a buffered read cannot be left at exit."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_GRACE_S)
    os._exit(1)


if __name__ == "__main__":
    main()
