"""The engine worker's socket server: clients' operations in, token events out.

asyncio runs in the main thread; the scheduler in its own (`EngineLoop`), so that a slow step never delays accepting
or cancelling, and a burst of clients never delays a step. They exchange closures, no locks.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trtbuild.engines.serving import protocol
from trtbuild.engines.serving.connection import Connection, listening
from trtbuild.engines.serving.detokenizer import decoder_of
from trtbuild.engines.serving.engine_loop import EngineLoop
from trtbuild.engines.serving.prompts import PromptLimit, prompt_token_ids
from trtbuild.engines.serving.request import Request, SamplingParams, ServerLimits, TokenEvent
from trtbuild.engines.serving.request_log import log_request
from trtbuild.engines.serving.sampling import Constraint
from trtbuild.engines.serving.scheduler import Scheduler
from trtbuild.engines.serving.stats import SchedulerStats
from trtbuild.engines.serving.vocabulary import Vocabulary
from trtbuild.errors import Refused, Unavailable

log = logging.getLogger("trtbuild.worker")

# How long the engine thread may take to finish its step once everything is cancelled.
STOP_GRACE_S = 10.0
# How long clients get to read their last messages.
FLUSH_S = 2.0
STOPPING = "the engine worker is stopping"


class WorkerServer:
    """Serves one loaded engine (`trtbuild.engines.load.LoadedEngine`) until told to stop."""

    def __init__(self, engine: Any, limits: ServerLimits) -> None:
        tokenizer, vocab_size = engine.tokenizer, engine.executor.vocab_size
        vocabulary = None if tokenizer is None else Vocabulary(tokenizer, vocab_size, engine.eos_token_ids)
        if limits.prepare_guides and vocabulary is not None:
            _prepare_guides(vocabulary)
        self._engine = engine
        self._limits = limits
        self._scheduler = Scheduler(
            engine.executor,
            eos_token_ids=engine.eos_token_ids,
            decode_text=None if tokenizer is None else decoder_of(tokenizer),
            vocabulary=vocabulary,
            max_input_len=engine.passport.get("limits", {}).get("max_input_len"),
            max_queue=limits.max_queue,
        )
        self._prompt_limit = None if tokenizer is None else PromptLimit.of(tokenizer, self._scheduler.max_input_len)
        self._loop = asyncio.get_running_loop()
        self._engine_loop = EngineLoop(self._scheduler, lambda events: self._from_engine(self._deliver, events))
        self._routes: dict[str, tuple[Connection, str, Request]] = {}
        self._connections: set[Connection] = set()
        self._numbers = itertools.count(1)
        self._tokenizing = ThreadPoolExecutor(1, "tokenize")
        self._constraining = ThreadPoolExecutor(1, "constrain")
        self._lingering: asyncio.TimerHandle | None = None
        self._stopping = asyncio.Event()
        self._draining = True
        self._idle = asyncio.Event()

    def hello(self) -> dict[str, Any]:
        """The first message on every connection."""
        executor = self._engine.executor
        return {
            "type": "hello",
            "protocol": protocol.PROTOCOL_VERSION,
            "engine": self._engine.name,
            "executor": executor.name,
            "executor_why": getattr(self._engine, "executor_why", ""),
            "device": str(executor.device),
            "limits": {
                "num_slots": executor.num_slots,
                "max_seq_len": executor.max_seq_len,
                "chunk_size": executor.chunk_size,
                "vocab_size": executor.vocab_size,
            },
            "eos_token_ids": list(self._engine.eos_token_ids),
            "has_tokenizer": self._engine.tokenizer is not None,
            "has_chat_template": bool(getattr(self._engine.tokenizer, "chat_template", None)),
            "max_queue": self._limits.max_queue,
            "pid": os.getpid(),
        }

    def stop(self, drain: bool) -> None:
        """Begin to stop: at once, or once the requests in flight are done; called again, at once."""
        self._draining = drain and not self._stopping.is_set()
        self._stopping.set()
        if not self._draining:
            self._idle.set()

    async def serve(self, socket_path: Path, ready: Callable[[dict[str, Any]], None]) -> bool:
        """Accept clients, call `ready(hello)`, and return after `stop`. Raises what the engine thread raised.

        False where the engine thread did not come back from its last step.
        """
        engine_done = self._loop.run_in_executor(ThreadPoolExecutor(1, "engine"), self._engine_loop.run)
        try:
            async with listening(socket_path, self._serve_client):
                ready(self.hello())
                self._linger()
                stopping = asyncio.ensure_future(self._stopping.wait())
                await asyncio.wait({engine_done, stopping}, return_when=asyncio.FIRST_COMPLETED)
                stopping.cancel()
            await self._finish(engine_done)
        finally:
            # The process cannot end before this thread does.
            self._engine_loop.stop()
        if engine_done.done():
            engine_done.result()
        return engine_done.done()

    async def _finish(self, engine_done: asyncio.Future[None]) -> None:
        """What is in flight, if that is wished; then the engine thread, and the clients."""
        preparing = [task for connection in self._connections for task in connection.preparing.values()]
        if preparing:
            await asyncio.wait(preparing, timeout=self._limits.drain_s if self._draining else FLUSH_S)
        if not engine_done.done():
            await self._drain(engine_done)
            self._engine_loop.stop()
            await asyncio.wait({engine_done}, timeout=STOP_GRACE_S)
        self._scheduler.close()
        await self._close_clients(engine_done)

    async def _drain(self, engine_done: asyncio.Future[None]) -> None:
        """Let requests in flight finish for `drain_s`, then cancel the rest and report that to their clients."""
        if self._draining and self._routes:
            log.info("draining %d requests", len(self._routes))
            idle = asyncio.ensure_future(self._idle.wait())
            await asyncio.wait({idle, engine_done}, timeout=self._limits.drain_s, return_when=asyncio.FIRST_COMPLETED)
            idle.cancel()
        for request_id in list(self._routes):
            self._engine_loop.post(lambda scheduler, request_id=request_id: scheduler.cancel(request_id))
        # One more turn of the loop, so that the cancellations are stepped and their events are on their way.
        stepped = self._loop.create_future()
        self._engine_loop.post(lambda scheduler: self._deliver_rest(scheduler, stepped))
        await asyncio.wait({stepped, engine_done}, timeout=STOP_GRACE_S, return_when=asyncio.FIRST_COMPLETED)

    def _deliver_rest(self, scheduler: Scheduler, stepped: asyncio.Future[None]) -> None:
        """In the engine thread: everything was cancelled, so this step computes nothing."""
        self._from_engine(self._deliver, scheduler.step())
        self._from_engine(stepped.set_result, None)

    async def _close_clients(self, engine_done: asyncio.Future[None]) -> None:
        failure = engine_done.exception() if engine_done.done() else None
        why = "the engine worker stopped" if failure is None else f"the engine worker failed: {failure}"
        for connection, client_id, request in self._routes.values():
            log_request(request, "error", None, why)
            connection.send(protocol.error_message(client_id, "failed", why))
        self._routes.clear()
        closing = asyncio.gather(*(c.close() for c in self._connections), return_exceptions=True)
        await asyncio.wait({closing}, timeout=FLUSH_S)

    def _from_engine(self, callback: Callable[..., Any], *args: Any) -> None:
        self._loop.call_soon_threadsafe(callback, *args)

    async def _serve_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(next(self._numbers), writer)
        self._connections.add(connection)
        self._linger()
        connection.send(self.hello())
        try:
            while line := await reader.readline():
                await self._serve_line(connection, line)
        except (ConnectionError, ValueError) as error:
            # ValueError: readline's, for a line over the limit; what follows in the stream has no framing.
            connection.send(protocol.error_message(None, "refused", f"connection closed: {error}"))
        finally:
            self._connections.discard(connection)
            self._linger()
            for task in connection.preparing.values():
                task.cancel()
            for request_id in list(connection.requests.values()):
                self._engine_loop.post(lambda scheduler, request_id=request_id: scheduler.cancel(request_id))
            writer.close()

    def _linger(self) -> None:
        """Stop once there has been no connection for the time given; called whenever their number changes."""
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        if self._limits.linger_s is not None and not self._connections:
            self._lingering = self._loop.call_later(self._limits.linger_s, self._leave)

    def _leave(self) -> None:
        log.info("no client for %g s: stopping", self._limits.linger_s)
        self.stop(drain=True)

    async def _serve_line(self, connection: Connection, line: bytes) -> None:
        client_id = None
        try:
            message = protocol.decode(line)
            client_id = message.get("id") if isinstance(message.get("id"), str) else None
            op = protocol.check_operation(message)
            if op in ("generate", "score"):
                if message["id"] in connection.requests or message["id"] in connection.preparing:
                    raise Refused(f"id {client_id!r} is in flight on this connection")
                if self._stopping.is_set():
                    raise Unavailable(STOPPING)
                await connection.room.acquire()
                connection.preparing[message["id"]] = asyncio.ensure_future(self._start(connection, op, message))
            elif op == "cancel" and message["id"] in connection.preparing:
                connection.cancelled.add(message["id"])
            elif op == "cancel" and message["id"] in connection.requests:
                request_id = connection.requests[message["id"]]
                self._engine_loop.post(lambda scheduler: scheduler.cancel(request_id))
            elif op == "stats":
                self._engine_loop.post(
                    lambda scheduler: self._from_engine(self._send_stats, connection, message["id"], scheduler.stats())
                )
            elif op == "shutdown":
                connection.send({"type": "ok", "id": message["id"]})
                self.stop(drain=message.get("drain", True) is not False)
        except (Refused, Unavailable) as error:
            connection.send(protocol.error_message(client_id, protocol.kind_of(error), error.message))

    async def _start(self, connection: Connection, op: str, message: dict[str, Any]) -> None:
        """Tokenize, compile the guide, hand over to the scheduler: a task, so that a slow one holds up no other."""
        client_id = message["id"]
        try:
            request, constraints = await self._prepare(connection, op, message)
            if self._stopping.is_set() and not self._draining:
                raise Unavailable(STOPPING)
            connection.requests[client_id] = request.request_id
            self._routes[request.request_id] = (connection, client_id, request)
            self._idle.clear()
            cancelled = client_id in connection.cancelled
            self._engine_loop.post(lambda scheduler: self._submit(scheduler, request, constraints, cancelled))
        except (Refused, Unavailable) as error:
            connection.send(protocol.error_message(client_id, protocol.kind_of(error), error.message))
        finally:
            del connection.preparing[client_id]
            connection.cancelled.discard(client_id)
            connection.room.release()

    async def _prepare(
        self, connection: Connection, op: str, message: dict[str, Any]
    ) -> tuple[Request, list[Constraint]]:
        received = time.monotonic()
        params = message.get("params", {})
        if not isinstance(params, dict):
            raise Refused(f"params must be an object, not {type(params).__name__}")
        sampling = SamplingParams.from_dict(params)
        token_ids = await self._loop.run_in_executor(
            self._tokenizing, prompt_token_ids, message, self._engine.tokenizer, self._prompt_limit
        )
        request = Request(
            f"{connection.number}:{message['id']}",
            token_ids,
            sampling,
            score_only=op == "score",
            caller_id=message.get("request_id"),
            submitted_at=received,
        )
        if not sampling.constrained:
            return request, []
        return request, await self._loop.run_in_executor(self._constraining, self._scheduler.constraints_of, request)

    def _submit(self, scheduler: Scheduler, request: Request, constraints: list[Constraint], cancelled: bool) -> None:
        """In the engine thread."""
        try:
            scheduler.submit(request, constraints)
        except (Refused, Unavailable) as error:
            self._from_engine(self._refuse, request.request_id, error)
        if cancelled:
            scheduler.cancel(request.request_id)

    def _refuse(self, request_id: str, error: Refused | Unavailable) -> None:
        connection, client_id, request = self._forget(request_id)
        kind = protocol.kind_of(error)
        log_request(request, kind, None, error.message)
        connection.send(protocol.error_message(client_id, kind, error.message))

    def _send_stats(self, connection: Connection, client_id: str, stats: SchedulerStats) -> None:
        values = asdict(stats) | {"connections": len(self._connections)}
        connection.send({"type": "stats", "id": client_id, "stats": values})

    def _deliver(self, events: list[TokenEvent]) -> None:
        for event in events:
            if event.request_id not in self._routes:
                continue
            connection, client_id, request = self._routes[event.request_id]
            if event.finish_reason is not None:
                self._forget(event.request_id)
                log_request(request, event.finish_reason, event.usage, event.error)
            if event.prompt_logprobs is not None:
                connection.send(
                    {
                        "type": "score",
                        "id": client_id,
                        "token_ids": request.token_ids,
                        "logprobs": event.prompt_logprobs,
                    }
                )
            elif event.finish_reason in ("error", "timeout"):
                kind = "timeout" if event.finish_reason == "timeout" else "failed"
                connection.send(protocol.error_message(client_id, kind, event.error or "the request failed"))
            else:
                connection.send(protocol.event_message(event, client_id))

    def _forget(self, request_id: str) -> tuple[Connection, str, Request]:
        route = self._routes.pop(request_id)
        route[0].requests.pop(route[1], None)
        if not self._routes:
            self._idle.set()
        return route


def _prepare_guides(vocabulary: Vocabulary) -> None:
    """llguidance holds the interpreter while it reads a vocabulary: a second of CPU for 150,000 tokens."""
    start = time.monotonic()
    try:
        vocabulary.prepare()
    except Refused as error:
        log.info("no guided decoding: %s", error.message)
    else:
        log.info("read the vocabulary for guides in %.1f s", time.monotonic() - start)
