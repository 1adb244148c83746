"""What every request passes first: its id, the key, limits of size and time, and the way out while stopping.

Plain ASGI around the application. The body is read here, whole, so that the routes see only requests that arrived.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trtbuild.triton_repo.openai.counters import ServerState
from trtbuild.triton_repo.openai.errors import ApiError, ClientGone
from trtbuild.triton_repo.openai.settings import Settings

log = logging.getLogger("trtbuild.openai")

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:/+=-]{1,128}")
# Other paths are the client's own words: they share one counter.
_COUNTED_PATHS = {"/v1/models", "/v1/chat/completions", "/v1/completions", "/health/live", "/health/ready", "/metrics"}


class Gate:
    """An ASGI application in front of another."""

    def __init__(self, app: ASGIApp, settings: Settings, state: ServerState) -> None:
        self._app = app
        self._settings = settings
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        notes: dict[str, Any] = {}
        scope["state"] = {**scope.get("state", {}), "request_id": request_id, "notes": notes}
        sender = _Sender(send, request_id)
        guarded = scope["path"].startswith("/v1/")
        start = time.monotonic()
        self._state.num_active += guarded
        try:
            self._admit(guarded, headers)
            body = await self._body(headers, receive)
            if guarded and body:
                _check_type(headers.get("content-type", ""))
            await self._app(scope, _replay(body, receive), sender)
        except ApiError as error:
            notes["error"] = error.message
            await sender.refuse(error, close=error.status in {408, 413})
        except ClientGone:
            notes["client_gone"] = True
        finally:
            self._state.num_active -= guarded
            self._finish(scope, sender.status, time.monotonic() - start, request_id, notes)

    def _admit(self, guarded: bool, headers: dict[str, str]) -> None:
        if not guarded:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if not self._settings.allows(key.strip().encode("latin-1") if scheme.lower() == "bearer" else None):
            raise ApiError(401, "the API key is missing or wrong: Authorization: Bearer KEY", code="invalid_api_key")
        if self._state.stopping:
            raise ApiError(503, "the server is stopping", retry_after_s=5)

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes:
        """The whole body, in time and within the limit."""
        most = self._settings.max_request_bytes
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and len(declared) < 20 and int(declared) > most:
            raise _too_large(declared, most)
        try:
            return await asyncio.wait_for(_read(receive, most), self._settings.body_timeout_s)
        except asyncio.TimeoutError:
            message = f"the request's body did not arrive within {self._settings.body_timeout_s:g} s"
            raise ApiError(408, message) from None

    def _finish(self, scope: Scope, status: int | None, seconds: float, request_id: str, notes: dict[str, Any]) -> None:
        path = scope["path"] if scope["path"] in _COUNTED_PATHS else "other"
        self._state.finish(path, status, seconds)
        client = (scope.get("client") or ("",))[0]
        fields = {"request_id": request_id, "client": client, "method": scope["method"], "path": scope["path"][:200]}
        fields |= {"status": status, "seconds": round(seconds, 4), **notes}
        level = logging.DEBUG if path in {"/health/live", "/health/ready", "/metrics"} else logging.INFO
        log.log(level, "request", extra={"fields": fields})


class _Sender:
    """Adds the request's id to the response, and remembers its status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            id_header = (b"x-request-id", self._request_id.encode("latin-1"))
            message = {**message, "headers": [*message.get("headers", []), id_header]}
        await self._send(message)

    async def refuse(self, error: ApiError, close: bool) -> None:
        """The error's body; `close` where the rest of the request will not be read."""
        body = json.dumps(error.body()).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers()}
        headers |= {"connection": "close"} if close else {}
        encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self({"type": "http.response.start", "status": error.status, "headers": encoded})
        await self({"type": "http.response.body", "body": body})


def _check_type(content_type: str) -> None:
    """JSON only: a web page may send forms and plain text to this machine without asking, but not JSON."""
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, f"the Content-Type is {content_type[:100]!r}: must be application/json")


async def _read(receive: Receive, most: int) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise _too_large(f"more than {most}", most)
        if not message.get("more_body", False):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once, then whatever the server says."""
    first = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return first.pop() if first else await receive()

    return replayed


def _too_large(size: object, most: int) -> ApiError:
    return ApiError(413, f"the request has {size} bytes: at most {most} (--max-request-bytes)")
