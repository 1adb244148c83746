"""A model's connection to its engine worker, made again whenever it is lost."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from trtbuild.engines.serving.client import WorkerClient
from trtbuild.errors import TrtBuildError, Unavailable

log = logging.getLogger("trtbuild.triton")

Connect = Callable[[Callable[[str], None]], WorkerClient]
_FIRST_WAIT_S = 0.2
_LONGEST_WAIT_S = 30.0


class WorkerLink:
    """`connect(on_lost)` makes a connection, starting the worker where there is none; the first one at once."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._closing = threading.Event()
        self._why_down = ""
        self._client: WorkerClient | None = connect(self._on_lost)
        self._mender: threading.Thread | None = None

    @property
    def up(self) -> bool:
        """Whether the worker answers, as far as this side knows."""
        return self._client is not None

    def client(self) -> WorkerClient:
        """Raises `Unavailable` while the worker is being started again."""
        client = self._client
        if client is None:
            raise Unavailable(f"the engine worker is being started again ({self._why_down}); retry")
        return client

    def close(self) -> None:
        """Leave the worker, which ends when nobody is left."""
        self._closing.set()
        if self._mender is not None:
            self._mender.join(timeout=_FIRST_WAIT_S)
        if self._client is not None:
            self._client.close()

    def _on_lost(self, why: str) -> None:
        """In the lost client's reader thread."""
        log.error("%s", why)
        self._client, self._why_down = None, why
        if not self._closing.is_set():
            self._mender = threading.Thread(target=self._mend, name="worker-link", daemon=True)
            self._mender.start()

    def _mend(self) -> None:
        wait = _FIRST_WAIT_S
        while not self._closing.wait(wait):
            try:
                self._client = self._connect(self._on_lost)
            except TrtBuildError as error:
                self._why_down = error.message
                log.error("the engine worker does not start: %s", error.message)
                wait = min(2 * wait, _LONGEST_WAIT_S)
            else:
                log.info("the engine worker is back")
                return
