"""A worker's listening socket, and one client of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from trtbuild.engines.serving import protocol

log = logging.getLogger("trtbuild.worker")

# A client that reads nothing must not fill the worker's memory; at this backlog it is dropped.
MAX_BACKLOG_BYTES = 16 * 2**20
# Requests of one client that may be tokenized or have their guides compiled at once; beyond, its socket is not read.
MAX_PREPARING = 256


class Connection:
    """One client: where its answers go, and which of its requests are in flight (its id -> the scheduler's)."""

    def __init__(self, number: int, writer: asyncio.StreamWriter) -> None:
        self.number = number
        self.requests: dict[str, str] = {}
        self.preparing: dict[str, asyncio.Task[None]] = {}
        """Not yet with the scheduler."""
        self.cancelled: set[str] = set()
        """Of those, the ones to cancel as soon as they are."""
        self.room = asyncio.Semaphore(MAX_PREPARING)
        self._writer = writer

    def send(self, message: dict[str, Any]) -> None:
        """Queue one message. A client gone is not an error here: its reader notices and cleans up."""
        if self._writer.is_closing():
            return
        self._writer.write(protocol.encode(message))
        if self._writer.transport.get_write_buffer_size() > MAX_BACKLOG_BYTES:
            log.warning("client %d does not read its answers; dropped", self.number)
            self._writer.transport.abort()

    async def close(self) -> None:
        """Send what is queued, then close."""
        self._writer.close()
        await self._writer.wait_closed()


@asynccontextmanager
async def listening(
    socket_path: Path, serve_client: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
) -> AsyncIterator[None]:
    """Accept clients at `socket_path`, of this user only; at the end it is gone."""
    server = await asyncio.start_unix_server(serve_client, socket_path, limit=protocol.MAX_MESSAGE_BYTES)
    socket_path.chmod(0o600)
    own = socket_path.stat()
    try:
        yield
    finally:
        server.close()
        # Another worker may have taken the path since.
        with suppress(FileNotFoundError):
            if socket_path.stat().st_ino == own.st_ino:
                socket_path.unlink()
