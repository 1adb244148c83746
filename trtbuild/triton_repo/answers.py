"""One Triton request in flight: the worker's messages in, responses out. Free of Triton.

Messages arrive in the worker client's reader thread, one at a time; `cancel` comes from another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

from trtbuild.engines.serving import protocol
from trtbuild.engines.serving.client import WorkerClient
from trtbuild.engines.serving.request import RequestOutput
from trtbuild.errors import TrtBuildError
from trtbuild.triton_repo.requests import ParsedRequest
from trtbuild.triton_repo.responses import Response, stream_response, whole_response


class Responder(Protocol):
    """Where the responses of one request go; after `final` nothing more may come."""

    def send(self, response: Response, final: bool) -> None: ...

    def fail(self, error: TrtBuildError) -> None:
        """The request's last response: an error."""
        ...

    def is_cancelled(self) -> bool: ...


class Answer:
    """Runs a parsed request's generations on a worker and answers through `responder`."""

    def __init__(
        self, parsed: ParsedRequest, responder: Responder, client: WorkerClient, on_end: Callable[[Answer], None]
    ) -> None:
        self._parsed = parsed
        self._responder = responder
        self._client = client
        self._on_end = on_end
        self._outputs = [RequestOutput(str(index)) for index in range(len(parsed.generations))]
        self._ids: dict[int, str] = {}
        self._num_open = len(parsed.generations)
        # Guards the end, which a failed submission and a message may race for.
        self._lock = threading.Lock()
        self._ended = False

    def start(self, request_id: str | None) -> None:
        """Submit every generation; a lost worker fails the request."""
        for index, generation in enumerate(self._parsed.generations):
            try:
                self._ids[index] = self._client.submit(
                    generation.prompt,
                    generation.params,
                    lambda message, index=index: self._on_message(index, message),
                    tools=generation.tools,
                    request_id=request_id,
                )
            except TrtBuildError as error:
                self._fail(error)
                return

    def cancel(self) -> None:
        """Have the worker end what is still running; the request ends with its "cancelled" messages."""
        for request_id in list(self._ids.values()):
            self._client.cancel(request_id)

    def cancel_if_abandoned(self) -> None:
        """Where the client of the request has gone."""
        if not self._ended and self._responder.is_cancelled():
            self.cancel()

    def _on_message(self, index: int, message: dict[str, Any]) -> None:
        if self._ended:
            return
        if message["type"] == "error":
            self._fail(protocol.exception_of(message))
            return
        event, output = protocol.event_of(message), self._outputs[index]
        output.add(event)
        finished = event.finish_reason is not None
        self._num_open -= finished
        last = self._num_open == 0
        if self._parsed.stream:
            response = stream_response(self._parsed, self._parsed.generations[index], event, output)
            self._responder.send(response, final=last)
        elif last:
            self._responder.send(whole_response(self._parsed, self._outputs), final=True)
        if last:
            self._end()

    def _fail(self, error: TrtBuildError) -> None:
        if self._end():
            self._responder.fail(error)
            self.cancel()

    def _end(self) -> bool:
        """True for the caller that ended it."""
        with self._lock:
            if self._ended:
                return False
            self._ended = True
        self._on_end(self)
        return True
