"""A synchronous client of an engine worker; safe for several streams, from several threads, on one connection.

Free of torch: `generate`, benchmarks and Triton's model import it. One thread per client reads the socket and hands
each message to its stream, so a lost worker is known at once to every stream that waits.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from trtbuild.engines.serving import protocol
from trtbuild.engines.serving.request import RequestOutput, SamplingParams, TokenEvent
from trtbuild.errors import TrtBuildError

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]
Deliver = Callable[[dict[str, Any]], None]


class TokenStream(Iterator[TokenEvent]):
    """The events of one generation, as they come. Closing it, or dropping it, before its end cancels the request."""

    def __init__(self, client: WorkerClient, request_id: str, messages: queue.SimpleQueue[dict[str, Any]]) -> None:
        self.request_id = request_id
        self._client = client
        self._messages = messages
        self._done = False

    def __next__(self) -> TokenEvent:
        """Raises `Refused` for a bad request; `Unavailable` where the queue is full, or the worker stops or was gone
        before the request came; `DeadlineExceeded` after `deadline_s`; `TrtBuildError` where the worker failed.
        """
        if self._done:
            raise StopIteration
        message = self._messages.get()
        if message["type"] == "error":
            self._done = True
            raise protocol.exception_of(message)
        event = protocol.event_of(message)
        self._done = event.finish_reason is not None
        return event

    def result(self) -> RequestOutput:
        """Read to the end and gather the events that were not yet read."""
        output = RequestOutput(self.request_id)
        for event in self:
            output.add(event)
        return output

    def close(self) -> None:
        """Cancel unless finished; nothing more can be read."""
        if not self._done:
            self._done = True
            self._client.cancel(self.request_id)

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class WorkerClient:
    """Connects to the worker at `socket_path`; a context manager.

    `describe_end`, where given, tells how the worker's process ended, for the error messages; `on_lost` is called, in
    the reader's thread, once the connection has ended other than by `close`. Raises `TrtBuildError` where nothing
    listens there, nothing answers within `timeout_s` seconds, or the protocol is another one.
    """

    def __init__(
        self,
        socket_path: Path,
        *,
        describe_end: Callable[[], str] | None = None,
        on_lost: Callable[[str], None] | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        self._describe_end = describe_end
        self._on_lost = on_lost
        self._path = socket_path
        self._pending: dict[str, Deliver] = {}
        self._unread: set[str] = set()
        self._last_sent: str | None = None
        self._lost: dict[str, Any] | None = None
        # Reentrant: a dropped stream may be collected, and cancelled, while this thread holds it.
        self._lock = threading.RLock()
        self._closing = False
        self._ids = itertools.count(1)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(str(socket_path))
            self._lines = self._socket.makefile("rb")
            self.hello = self._read_hello()
        except OSError as error:
            self._socket.close()
            raise TrtBuildError(f"no engine worker answers at {socket_path}: {error}") from error
        self._socket.settimeout(None)
        self._reader = threading.Thread(target=self._read, name="worker-client", daemon=True)
        self._reader.start()

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        request_id: str | None = None,
    ) -> TokenStream:
        """Submit a prompt now (text, token ids, or chat messages with role and content) and stream its tokens.

        `tools`: OpenAI's tool objects, for the chat template; only with messages. `request_id`: for the worker's log.
        """
        messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        sent = self.submit(prompt, params or SamplingParams(), messages.put, tools=tools, request_id=request_id)
        return TokenStream(self, sent, messages)

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        deliver: Deliver,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        request_id: str | None = None,
    ) -> str:
        """Like `generate`, but each message of the wire goes to `deliver`, in the reader's thread; the request's id.

        The last one is a token message with a `finish_reason`, or an error message.
        """
        message = {"op": "generate", "params": params.to_dict(), **_prompt_field(prompt)}
        message |= {} if tools is None else {"tools": list(tools)}
        message |= {} if request_id is None else {"request_id": request_id}
        return self._send(message, deliver)

    def score(self, prompt: str | Sequence[int]) -> tuple[list[int], list[float | None]]:
        """(token ids, natural-log probability of each given those before it; None for the first)."""
        answer = self._ask({"op": "score", **_prompt_field(prompt)})
        if answer["type"] != "score":
            raise TrtBuildError("the engine worker stopped before the prompt was scored")
        return answer["token_ids"], answer["logprobs"]

    def cancel(self, request_id: str) -> None:
        """End a request; its stream ends with finish_reason "cancelled". Unknown or finished ids are ignored."""
        if self._lost is None and request_id in self._pending:
            self._write({"op": "cancel", "id": request_id})

    def stats(self) -> dict[str, Any]:
        """The scheduler's gauges and counters (`SchedulerStats`), and the number of connections."""
        return self._ask({"op": "stats"})["stats"]

    def shutdown(self, drain: bool = True) -> None:
        """Ask the worker to stop, by default after the requests in flight."""
        self._ask({"op": "shutdown", "drain": drain})

    def close(self) -> None:
        """Close the connection; the worker cancels what is still in flight on it."""
        self._closing = True
        # An error here: already disconnected.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> WorkerClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._send(message, messages.put)
        answer = messages.get()
        if answer["type"] == "error":
            raise protocol.exception_of(answer)
        return answer

    def _send(self, message: dict[str, Any], deliver: Deliver) -> str:
        request_id = str(next(self._ids))
        with self._lock:
            if self._lost is not None:
                raise protocol.exception_of(self._lost)
            self._pending[request_id] = deliver
            if not self._write({**message, "id": request_id}):
                self._unread.add(request_id)
            self._last_sent = request_id
        return request_id

    def _write(self, message: dict[str, Any]) -> bool:
        """Whether the other end was there; where not, the reader sees the same and tells every stream why."""
        line = protocol.encode(message)
        with self._lock:
            self._last_sent = None
            try:
                self._socket.sendall(line)
            except OSError:
                return False
        return True

    def _read_hello(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise TrtBuildError(f"the engine worker at {self._path} closed the connection at once: it is stopping")
        hello = protocol.decode(line)
        if hello.get("protocol") != protocol.PROTOCOL_VERSION:
            raise TrtBuildError(
                f"the engine worker at {self._path} speaks protocol {hello.get('protocol')}, this client "
                f"{protocol.PROTOCOL_VERSION}: restart the worker with this version of trtbuild"
            )
        return hello

    def _read(self) -> None:
        """In the reader thread, until the connection ends."""
        why = None
        try:
            for line in self._lines:
                message = protocol.decode(line)
                if message.get("id") is None:
                    why = message.get("message")
                    continue
                last = message["type"] != "token" or "finish_reason" in message
                deliver = self._pending.get(message["id"])
                if last:
                    self._pending.pop(message["id"], None)
                if deliver is not None:
                    deliver(message)
        except ConnectionResetError:
            # Linux says so where the other end was closed with something unread: at least what was sent last.
            if self._last_sent is not None:
                self._unread.add(self._last_sent)
        except OSError as error:
            why = str(error)
        self._lose(why)

    def _lose(self, why: str | None) -> None:
        with self._lock:
            waiting, self._pending = self._pending, {}
            if why is None and not self._closing and self._describe_end is not None:
                why = self._describe_end()
            message = f"the connection to the engine worker is lost: {why or 'it closed the connection'}"
            self._lost = protocol.error_message(None, "unavailable", message)
        for request_id, deliver in waiting.items():
            # A request that the worker may have read is not one to send again unasked: it may be what ended it.
            deliver(self._lost if request_id in self._unread else {**self._lost, "kind": "failed"})
        if self._on_lost is not None and not self._closing:
            self._on_lost(message)


def _prompt_field(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if prompt and isinstance(prompt[0], dict):
        return {"messages": list(prompt)}
    return {"token_ids": list(prompt)}
