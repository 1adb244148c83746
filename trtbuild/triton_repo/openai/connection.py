"""uvicorn's HTTP connection, with a limit of time for the headers, which uvicorn does not have (slow-loris)."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol


def connection_class(header_timeout_s: float) -> type[asyncio.Protocol]:
    """A protocol class for uvicorn whose connections close where a request's headers take longer than that.

    The clock starts when the connection opens, and with the first byte of every request after the first.
    """

    class TimedConnection(AutoHTTPProtocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait_for_headers(transport)

        def data_received(self, data: bytes) -> None:
            connection: Any = self
            if self._timer is None and not _in_request(connection):
                self._wait_for_headers(connection.transport)
            super().data_received(data)
            if self._timer is not None and _in_request(connection):
                self._stop()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _wait_for_headers(self, transport: Any) -> None:
            self._timer = asyncio.get_running_loop().call_later(header_timeout_s, transport.abort)

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return TimedConnection


def _in_request(connection: Any) -> bool:
    """Headers are complete, and the response is not."""
    return connection.cycle is not None and not connection.cycle.response_complete
