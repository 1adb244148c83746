"""Answers that end when their client does: waiting for a result, and server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from trtbuild.triton_repo.openai.errors import ApiError, ClientGone
from trtbuild.triton_repo.openai.wire import Piece

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
_EVENT_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n\n"


class ChunkStream(Protocol):
    """One answer of an interface: what of it each piece shows, and the usage at the end where that is wanted."""

    include_usage: bool

    def chunks(self, piece: Piece) -> list[dict[str, Any]]: ...

    def last(self) -> dict[str, Any]: ...


async def chunk_events(stream: ChunkStream, first: Piece, pieces: AsyncIterator[Piece]) -> AsyncIterator[bytes]:
    """A server-sent event for each chunk; `first` is the piece that was waited for."""
    for chunk in stream.chunks(first):
        yield event(chunk)
    async for piece in pieces:
        for chunk in stream.chunks(piece):
            yield event(chunk)
    if stream.include_usage:
        yield event(stream.last())


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`; cancels it and raises `ClientGone` where the client closes the connection before."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events as they come. An `ApiError` becomes an error event; `close` frees what `events` holds.

    `limit_s`: after this the connection is given up; later than the deadline of the answer itself.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None], limit_s: float) -> None:
        super().__init__(headers=_EVENT_HEADERS)
        # Starlette says 0, since it knows of no body.
        del self.headers["content-length"]
        self._events = events
        self._close = close
        self._limit_s = limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await asyncio.wait_for(while_connected(receive, self._send_all(scope, send)), self._limit_s)
        except asyncio.TimeoutError:
            # A client that takes nothing off its connection cannot be told either.
            raise ClientGone from None
        finally:
            self._close()

    async def _send_all(self, scope: Scope, send: Send) -> None:
        try:
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except ApiError as error:
            scope["state"]["notes"]["error"] = f"{error.status}: {error.message}"
            await send({"type": "http.response.body", "body": event(error.body()), "more_body": True})
        await send({"type": "http.response.body", "body": DONE, "more_body": False})
