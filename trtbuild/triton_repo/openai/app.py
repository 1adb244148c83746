"""The routes, as an ASGI application: `FrontEnd(settings).asgi`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from trtbuild.triton_repo.openai.chat import chat_events, whole_chat
from trtbuild.triton_repo.openai.completions import completion_events, whole_completion
from trtbuild.triton_repo.openai.counters import ServerState
from trtbuild.triton_repo.openai.errors import ApiError, from_validation
from trtbuild.triton_repo.openai.gate import Gate
from trtbuild.triton_repo.openai.params import chat_requests, completion_requests
from trtbuild.triton_repo.openai.schemas import ChatBody, CompletionBody
from trtbuild.triton_repo.openai.settings import Settings
from trtbuild.triton_repo.openai.streaming import EventStream, while_connected
from trtbuild.triton_repo.openai.triton_client import TritonBackend, TritonRequest
from trtbuild.triton_repo.openai.wire import Piece, check_text

# Beyond the deadline of an answer, for telling a slow client about it.
_STALLED_CLIENT_S = 10.0

Events = Callable[[Any, Piece, AsyncIterator[Piece]], AsyncIterator[bytes]]
Whole = Callable[[Any, AsyncIterator[Piece]], Awaitable[dict[str, Any]]]


class FrontEnd:
    """The application, and what the process that runs it must reach: its state and Triton."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.state = ServerState()
        self._backend: TritonBackend | None = None
        self._started = int(time.time())
        self.api = api = FastAPI(title="trtbuild", lifespan=self._lifespan, docs_url=None, redoc_url=None)
        _handle_errors(api)
        self._add_routes(api)
        self.asgi = Gate(api, settings, self.state)

    @property
    def backend(self) -> TritonBackend:
        if self._backend is None:
            raise ApiError(503, "the server is starting")
        return self._backend

    def abort_all(self) -> None:
        """End every answer in flight with an error."""
        for stream in list(self.backend.active):
            stream.abort(ApiError(503, "the server is stopping", retry_after_s=5))

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        self._backend = TritonBackend(self.settings.triton, self.settings.metrics_url)
        yield
        await self._backend.close()

    def _add_routes(self, api: FastAPI) -> None:
        api.get("/v1/models")(self._list_models)
        # A model's name may have slashes.
        api.get("/v1/models/{name:path}")(self._show_model)
        api.post("/v1/chat/completions")(self._chat)
        api.post("/v1/completions")(self._complete)
        api.get("/health/live")(self._live)
        api.get("/health/ready")(self._ready)
        api.get("/metrics")(self._metrics)

    async def _list_models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model(name) for name in await self.backend.models()]}

    async def _show_model(self, name: str) -> dict[str, Any]:
        await self.backend.check_model(name)
        return self._model(name)

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._started, "owned_by": "trtbuild"}

    async def _live(self) -> dict[str, str]:
        return {"status": "live"}

    async def _ready(self) -> Response:
        if self.state.stopping:
            raise ApiError(503, "the server is stopping", retry_after_s=5)
        problems = await self.backend.readiness()
        models = {name: problem or "ready" for name, problem in problems.items()}
        ready = all(problem is None for problem in problems.values())
        return JSONResponse({"status": "ready" if ready else "not ready", "models": models}, 200 if ready else 503)

    async def _metrics(self) -> Response:
        return PlainTextResponse(self.state.to_prometheus(), media_type="text/plain; version=0.0.4")

    async def _chat(self, body: ChatBody, request: Request) -> Response:
        requests = chat_requests(body, self.settings.request_timeout_s)
        return await self._answer(body, request, requests, chat_events, whole_chat)

    async def _complete(self, body: CompletionBody, request: Request) -> Response:
        requests = completion_requests(body, self.settings.request_timeout_s)
        return await self._answer(body, request, requests, completion_events, whole_completion)

    async def _answer(
        self,
        body: ChatBody | CompletionBody,
        request: Request,
        requests: Sequence[TritonRequest],
        events: Events,
        whole: Whole,
    ) -> Response:
        """Wait for the whole answer, or for its beginning: an error before the first token has its own status."""
        request.state.notes["model"] = body.model[:100]
        for one in requests:
            check_text(one.values)
        await self.backend.check_model(body.model)
        stream = self.backend.open(requests, request.state.request_id)
        pieces = stream.pieces()
        try:
            if not body.stream:
                return JSONResponse(await while_connected(request.receive, whole(body, pieces)))
            first = await while_connected(request.receive, anext(pieces))
        except BaseException:
            stream.close()
            raise
        limit_s = self.settings.request_timeout_s + _STALLED_CLIENT_S
        return EventStream(events(body, first, pieces), stream.close, limit_s)


def _handle_errors(api: FastAPI) -> None:
    """Every error has OpenAI's body."""

    async def refuse(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return JSONResponse(error.body(), error.status, error.headers())

    async def refuse_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return await refuse(request, from_validation(error.errors()))

    async def refuse_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        found = ApiError(error.status_code, str(error.detail))
        response = await refuse(request, found)
        response.headers.update(error.headers or {})
        return response

    async def fail(request: Request, error: Exception) -> Response:
        return await refuse(request, ApiError(500, f"the server failed: {type(error).__name__}"))

    api.add_exception_handler(ApiError, refuse)
    api.add_exception_handler(RequestValidationError, refuse_invalid)
    api.add_exception_handler(HTTPException, refuse_http)
    api.add_exception_handler(Exception, fail)
