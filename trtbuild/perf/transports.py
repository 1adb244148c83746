"""How one request of a load generator travels: to Triton over gRPC, or to an engine worker over its socket."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trtbuild.engines.serving import protocol
from trtbuild.engines.serving.client import WorkerClient
from trtbuild.engines.serving.request import SamplingParams
from trtbuild.errors import TrtBuildError

_ERROR_KINDS = ("refused", "unavailable", "timeout")


@dataclass
class Answer:
    """What came back, filled while it comes."""

    token_times_s: list[float] = field(default_factory=list)
    num_input_tokens: int | None = None
    num_output_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None


class Transport(Protocol):
    """One for each client process."""

    def prepare(self, input_ids: np.ndarray, num_tokens: int) -> Any:
        """The request for a prompt ([tokens] int32) and an answer of exactly `num_tokens`."""
        ...

    async def ask(self, request: Any, timeout_s: float, answer: Answer) -> None:
        """Send what `prepare` made, and fill `answer` until it is whole; errors are its own."""
        ...

    async def close(self) -> None: ...


class TritonTransport:
    """Streams of our text model, on one HTTP/2 connection; a stream that ended well is used again for the next request.

    Opening one costs three times what a request on an open one does, and users who start together would queue for it.
    """

    def __init__(self, address: str, model: str) -> None:
        import grpc
        from tritonclient.grpc import service_pb2

        self._grpc: Any = grpc
        self._pb: Any = service_pb2
        # Own channels: processes that share a connection would wait for each other.
        options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.aio.insecure_channel(address, options=options)
        self._stream: Any = self._channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            request_serializer=self._pb.ModelInferRequest.SerializeToString,
            response_deserializer=self._pb.ModelStreamInferResponse.FromString,
        )
        self._model = model
        self._idle: list[Any] = []

    def prepare(self, input_ids: np.ndarray, num_tokens: int) -> Any:
        return self._request(input_ids, num_tokens)

    async def ask(self, request: Any, timeout_s: float, answer: Answer) -> None:
        call = self._idle.pop() if self._idle else self._stream()
        timed_out: list[bool] = []

        def give_up() -> None:
            timed_out.append(True)
            call.cancel()

        timer = asyncio.get_running_loop().call_later(timeout_s, give_up)
        try:
            await call.write(request)
            await self._read(call, answer)
        except asyncio.CancelledError:
            # Ours, or that of whoever waits for the answer.
            if not timed_out:
                raise
            answer.error = "timeout"
        except (self._grpc.aio.AioRpcError, asyncio.InvalidStateError):
            answer.error = await self._status(call)
        finally:
            timer.cancel()
            if answer.error is None and answer.finish_reason is not None:
                self._idle.append(call)
            else:
                call.cancel()

    async def close(self) -> None:
        for call in self._idle:
            call.cancel()
        await self._channel.close()

    async def _read(self, call: Any, answer: Answer) -> None:
        """Until the last response."""
        times, now, end = answer.token_times_s, time.monotonic, self._grpc.aio.EOF
        while True:
            message: Any = await call.read()
            at = now()
            if message is end:
                answer.error = await self._status(call)
                return
            if message.error_message:
                answer.error = error_of(message.error_message)
                return
            outputs = message.infer_response.outputs
            if not outputs:
                continue
            times.append(at)
            # Only the last response has more than the token's text.
            if len(outputs) > 1:
                self._finish(message.infer_response, answer)
                if answer.finish_reason is not None:
                    return

    def _request(self, input_ids: np.ndarray, num_tokens: int) -> Any:
        request = self._pb.ModelInferRequest(model_name=self._model)
        for name, datatype, length, raw in (
            ("text_input", "BYTES", 1, b"\0\0\0\0"),
            ("input_ids", "INT32", len(input_ids), input_ids.astype("<i4").tobytes()),
            ("max_tokens", "INT32", 1, num_tokens.to_bytes(4, "little")),
            ("stream", "BOOL", 1, b"\1"),
            ("ignore_eos", "BOOL", 1, b"\1"),
        ):
            request.inputs.add(name=name, datatype=datatype, shape=[1, length])
            request.raw_input_contents.append(raw)
        return request

    def _finish(self, response: Any, answer: Answer) -> None:
        raw = {one.name: data for one, data in zip(response.outputs, response.raw_output_contents, strict=True)}
        if "finish_reason" not in raw:
            return
        # A STRING tensor is its length in four bytes, and its bytes.
        answer.finish_reason = raw["finish_reason"][4:].decode()
        answer.num_input_tokens = int.from_bytes(raw["num_input_tokens"][:4], "little")
        answer.num_output_tokens = int.from_bytes(raw["num_output_tokens"][:4], "little")

    async def _status(self, call: Any) -> str:
        """Why a stream ended before its answer did."""
        code = await call.code()
        if code == self._grpc.StatusCode.OK:
            return "failed: the stream ended before the answer did"
        kind = "unavailable" if code == self._grpc.StatusCode.UNAVAILABLE else "failed"
        return f"{kind}: {await call.details()}"


class WorkerTransport:
    """The engine worker itself, without a server: what the server adds is the difference."""

    def __init__(self, socket: Path) -> None:
        self._client = WorkerClient(socket)

    def prepare(self, input_ids: np.ndarray, num_tokens: int) -> Any:
        return input_ids.tolist(), SamplingParams(max_tokens=num_tokens, ignore_eos=True)

    async def ask(self, request: Any, timeout_s: float, answer: Answer) -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[dict[str, Any]] = loop.create_future()
        times, now = answer.token_times_s, time.monotonic

        def deliver(message: dict[str, Any]) -> None:
            """In the client's reader thread: the time is taken there, and the loop is woken once."""
            if message["type"] == "token":
                times.append(now())
                if "finish_reason" not in message:
                    return
            loop.call_soon_threadsafe(_settle, done, message)

        request_id = None
        try:
            input_ids, params = request
            request_id = self._client.submit(input_ids, params, deliver)
            message = await asyncio.wait_for(done, timeout_s)
        except asyncio.TimeoutError:
            answer.error = "timeout"
        except TrtBuildError as error:
            answer.error = f"{protocol.kind_of(error)}: {error.message}"
        else:
            _finish_worker(message, answer)
        finally:
            if request_id is not None and answer.finish_reason is None:
                self._client.cancel(request_id)

    async def close(self) -> None:
        self._client.close()


def error_of(message: str) -> str:
    """Of our models' messages, which begin with their kind."""
    kind = message.partition(":")[0]
    return message if kind in (*_ERROR_KINDS, "failed") else f"failed: {message}"


def _settle(done: asyncio.Future[dict[str, Any]], message: dict[str, Any]) -> None:
    if not done.done():
        done.set_result(message)


def _finish_worker(message: dict[str, Any], answer: Answer) -> None:
    if message["type"] == "error":
        answer.error = f"{message['kind']}: {message['message']}"
        return
    usage = message.get("usage") or {}
    answer.finish_reason = message["finish_reason"]
    answer.num_input_tokens = usage.get("prompt_tokens")
    answer.num_output_tokens = usage.get("completion_tokens")
