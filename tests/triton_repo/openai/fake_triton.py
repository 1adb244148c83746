"""A Triton for tests: its gRPC interface, and text models whose answers are scripted."""

from __future__ import annotations

import asyncio
import json
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import grpc
from tritonclient.grpc import service_pb2
from tritonclient.grpc import service_pb2_grpc as pb_grpc

from trtbuild.triton_repo.tensors import TEXT_INPUTS

# Made at run time by protobuf: no type checker sees its classes.
pb: Any = service_pb2

MODELS = {"tiny": True, "other": True, "tiny-unary": False, "tiny-tokens": True, "plain-python": True}
NUM_PROMPT_TOKENS = 7
_FORMATS = {"INT32": "i", "UINT64": "Q", "FP32": "f", "BOOL": "?"}


@dataclass
class Script:
    """What a model answers: the text of each token, then the end, an error or silence."""

    tokens: list[str]
    reason: str = "stop"
    error: str | None = None
    hangs: bool = False
    ends_early: bool = False
    delay_s: float = 0.0


@dataclass
class Seen:
    """One request as it arrived."""

    model: str
    request_id: str
    timeout_us: int | None
    values: dict[str, Any]


@dataclass
class FakeTriton(pb_grpc.GRPCInferenceServiceServicer):
    """`script(values)` gives the answer; everything else is recorded."""

    script: Callable[[dict[str, Any]], Script] = lambda _: Script(["Hello", " world", "."])
    ready_models: set[str] = field(default_factory=lambda: set(MODELS))
    server_ready: bool = True
    seen: list[Seen] = field(default_factory=list)
    num_active: int = 0
    num_cancelled: int = 0
    port: int = 0

    def start(self) -> None:
        """Serve in a thread of its own."""
        started: Future[int] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), daemon=True)
        self._thread.start()
        self.port = started.result(10)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(10)

    def wait_idle(self, timeout_s: float = 5.0) -> None:
        """Until no request is in flight; fails after the timeout."""
        end = time.monotonic() + timeout_s
        while self.num_active:
            assert time.monotonic() < end, f"{self.num_active} requests are still in flight"
            time.sleep(0.01)

    def wait_active(self, count: int, timeout_s: float = 5.0) -> None:
        end = time.monotonic() + timeout_s
        while self.num_active != count:
            assert time.monotonic() < end, f"{self.num_active} requests in flight, {count} expected"
            time.sleep(0.01)

    async def _serve(self, started: Future[int]) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
        pb_grpc.add_GRPCInferenceServiceServicer_to_server(self, server)
        port = server.add_insecure_port(f"127.0.0.1:{self.port}")
        await server.start()
        started.set_result(port)
        await self._stopping.wait()
        await server.stop(0)

    # The interface ----------------------------------------------------------------------------------------------------

    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return pb.ServerReadyResponse(ready=self.server_ready)

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return pb.ModelReadyResponse(ready=request.name in self.ready_models)

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:  # noqa: N802
        index = pb.RepositoryIndexResponse()
        for name in MODELS:
            ready = name in self.ready_models
            index.models.add(
                name=name, version="1", state="READY" if ready else "UNAVAILABLE", reason="" if ready else "failed"
            )
        return index

    async def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        answer = pb.ModelConfigResponse()
        answer.config.name = request.name
        answer.config.model_transaction_policy.decoupled = MODELS[request.name]
        answer.config.input.add(name="text_input" if request.name != "plain-python" else "IN")
        return answer

    async def ModelStreamInfer(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        responses: asyncio.Queue[Any] = asyncio.Queue()
        tasks = []
        try:
            async for request in request_iterator:
                tasks.append(asyncio.create_task(self._answer(request, responses)))
            for _ in tasks:
                while (response := await responses.get()) is not None:
                    yield response
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            for task in tasks:
                task.cancel()

    async def _answer(self, request: Any, responses: asyncio.Queue[Any]) -> None:
        values = decode_inputs(request)
        timeout = request.parameters["timeout"].int64_param if "timeout" in request.parameters else None
        self.seen.append(Seen(request.model_name, request.id, timeout, values))
        script = self.script(values)
        self.num_active += 1
        try:
            async for response in _responses(request, values, script):
                await responses.put(response)
        finally:
            self.num_active -= 1
        await responses.put(None)


async def _responses(request: Any, values: dict[str, Any], script: Script) -> AsyncIterator[Any]:
    tokens = script.tokens[: values["max_tokens"]]
    reason = script.reason if len(tokens) == len(script.tokens) else "length"
    num_sequences = values.get("num_return_sequences", 1)
    logprobs = values.get("num_top_logprobs")
    if values["stream"]:
        for index, token in enumerate(tokens):
            if script.delay_s:
                await asyncio.sleep(script.delay_s)
            for sequence in range(num_sequences):
                outputs = {"text_output": [token], "sequence_index": [sequence]}
                if logprobs is not None:
                    outputs["token_logprobs"] = [json.dumps([_logprob(token, logprobs)])]
                if index == len(tokens) - 1 and not (script.error or script.hangs or script.ends_early):
                    outputs |= _end(reason, len(tokens), 1)
                yield _response(request, outputs)
    elif script.delay_s:
        await asyncio.sleep(script.delay_s * len(tokens))
    if script.hangs:
        await asyncio.Event().wait()
    if script.error is not None:
        yield pb.ModelStreamInferResponse(
            error_message=script.error, infer_response=pb.ModelInferResponse(id=request.id)
        )
    elif not values["stream"] and not script.ends_early:
        outputs = {"text_output": ["".join(tokens)] * num_sequences} | _end(reason, len(tokens), num_sequences)
        if logprobs is not None:
            outputs["token_logprobs"] = [json.dumps([_logprob(token, logprobs) for token in tokens])] * num_sequences
        yield _response(request, outputs)


def _end(reason: str, num_tokens: int, count: int) -> dict[str, Any]:
    return {
        "finish_reason": [reason] * count,
        "num_input_tokens": [NUM_PROMPT_TOKENS] * count,
        "num_output_tokens": [num_tokens] * count,
    }


def _logprob(token: str, num_top: int) -> dict[str, Any]:
    """The chosen token at -0.5, then others at -1, -2, ..."""
    others = [{"token": f"{token}{i}", "token_id": 90 + i, "logprob": -float(i)} for i in range(1, num_top)]
    chosen = {"token": token, "token_id": 5, "logprob": -0.5}
    return chosen | {"top": [chosen, *others][:num_top]}


def _response(request: Any, outputs: dict[str, list[Any]]) -> Any:
    response = pb.ModelInferResponse(model_name=request.model_name, id=request.id)
    for name, items in outputs.items():
        is_text = isinstance(items[0], str)
        response.outputs.add(name=name, datatype="BYTES" if is_text else "INT32", shape=[1, len(items)])
        if is_text:
            encoded = [item.encode() for item in items]
            response.raw_output_contents.append(b"".join(struct.pack("<I", len(one)) + one for one in encoded))
        else:
            response.raw_output_contents.append(struct.pack(f"<{len(items)}i", *items))
    return pb.ModelStreamInferResponse(infer_response=response)


def decode_inputs(request: Any) -> dict[str, Any]:
    """Values by tensor name; checks each tensor's type and shape against the models' table."""
    table = {tensor.name: tensor for tensor in TEXT_INPUTS}
    values = {}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        expected = table[tensor.name]
        assert tensor.datatype == ("BYTES" if expected.dtype == "STRING" else expected.dtype), tensor
        if expected.dtype == "STRING":
            items, at = [], 0
            while at < len(raw):
                (length,) = struct.unpack_from("<I", raw, at)
                items.append(raw[at + 4 : at + 4 + length].decode("utf-8"))
                at += 4 + length
        else:
            form = _FORMATS[expected.dtype]
            items = list(struct.unpack(f"<{len(raw) // struct.calcsize(form)}{form}", raw))
        assert list(tensor.shape) == [1, len(items)], tensor
        assert expected.is_list or len(items) == 1, tensor
        values[tensor.name] = items if expected.is_list else items[0]
    return values
