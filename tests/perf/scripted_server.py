"""A gRPC server that speaks Triton's protocol and answers with programmed delays, and says when it really sent.

    python scripted_server.py '{"ttft_s": 0.2, "itl_s": 0.05, "log": FILE, ...}'     prints its port

Answers are those of our text model: one response per token, the counts in the last. Delays count from the arrival of
the request, so that sending late does not add up.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

# Its members are made when it is imported; no type checker sees them.
pb: Any = service_pb2


@dataclass
class Script:
    """What the server does; times in seconds, `stall_*` since its first request."""

    ttft_s: float = 0.0
    itl_s: float = 0.0
    log: str | None = None
    """Gets a JSON line per request: arrived, sent (list), prompt_tokens, prompt_head, prompt_distinct."""
    stall_at_s: float | None = None
    stall_s: float = 0.0
    refuse_every: int = 0
    """Every so manieth request is answered with an error."""
    die_after: int = 0
    """The server ends itself at that request."""
    pause_s: float = 0.0
    """Added to the first tokens of the first `pauses` requests: a server that has to warm up."""
    pauses: int = 0


class Scripted(service_pb2_grpc.GRPCInferenceServiceServicer):
    """See the module."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.num_requests = 0
        self.first_at: float | None = None

    async def ModelStreamInfer(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        async for request in request_iterator:
            async for response in self.answer(request):
                yield response

    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return pb.ServerReadyResponse(ready=True)

    async def ModelStatistics(self, request: Any, context: Any) -> Any:  # noqa: N802
        answer = pb.ModelStatisticsResponse()
        model = answer.model_stats.add(name=request.name, version="1")
        for part, each_s in ((model.inference_stats.queue, 0.001), (model.inference_stats.compute_infer, 0.002)):
            part.count, part.ns = self.num_requests, int(1e9 * each_s * self.num_requests)
        return answer

    async def answer(self, request: Any) -> AsyncIterator[Any]:
        arrived, script = time.monotonic(), self.script
        self.first_at = self.first_at or arrived
        self.num_requests += 1
        if self.num_requests == script.die_after:
            sys.exit(1)
        number, inputs = self.num_requests, read_inputs(request)
        if script.refuse_every and number % script.refuse_every == 0:
            yield pb.ModelStreamInferResponse(error_message="refused: as the script says")
            return
        num_tokens, sent = int(inputs["max_tokens"][0]), []
        extra = script.pause_s if number <= script.pauses else 0.0
        for index in range(num_tokens):
            await self.wait_until(arrived + script.ttft_s + extra + index * script.itl_s)
            sent.append(time.monotonic())
            yield token_response(request, len(inputs["input_ids"]), num_tokens, last=index == num_tokens - 1)
        if script.log is not None:
            ids = inputs["input_ids"].tolist()
            entry = {"arrived": arrived, "sent": sent, "prompt_tokens": len(ids), "head": ids[:64]}
            with Path(script.log).open("a", encoding="utf-8") as log:
                log.write(json.dumps(entry) + "\n")

    async def wait_until(self, due: float) -> None:
        script = self.script
        if script.stall_at_s is not None and self.first_at is not None:
            begin = self.first_at + script.stall_at_s
            due = max(due, begin + script.stall_s) if max(due, time.monotonic()) >= begin else due
        if due > time.monotonic():
            await asyncio.sleep(due - time.monotonic())


def read_inputs(request: Any) -> dict[str, np.ndarray]:
    types = {"INT32": np.int32, "BOOL": np.bool_}
    pairs = zip(request.inputs, request.raw_input_contents, strict=True)
    return {one.name: np.frombuffer(raw, types[one.datatype]) for one, raw in pairs if one.datatype in types}


def token_response(request: Any, num_input: int, num_output: int, last: bool) -> Any:
    outputs = [("text_output", "BYTES", [1, 1], b"\x04\0\0\0 tok")]
    if last:
        outputs += [
            (name, "INT32", [1, 1], np.int32(value).tobytes())
            for name, value in (("num_input_tokens", num_input), ("num_output_tokens", num_output))
        ]
        outputs.append(("finish_reason", "BYTES", [1, 1], b"\x06\0\0\0length"))
    answer = pb.ModelStreamInferResponse()
    answer.infer_response.model_name, answer.infer_response.id = request.model_name, request.id
    for name, datatype, shape, raw in outputs:
        answer.infer_response.outputs.add(name=name, datatype=datatype, shape=shape)
        answer.infer_response.raw_output_contents.append(raw)
    return answer


async def serve(script: Script) -> None:
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Scripted(script), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(Script(**json.loads(sys.argv[1] if len(sys.argv) > 1 else "{}"))))
