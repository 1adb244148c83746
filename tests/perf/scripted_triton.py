"""The scripted server with what perf_analyzer asks of a Triton besides: metadata, configuration, and a final response.

    python scripted_triton.py '{"ttft_s": 0.2, ...}'     fields of `scripted_server.Script`; prints its port

Requests of one stream are answered side by side, as Triton does.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf import text_format
from scripted_server import Script, Scripted, pb
from tritonclient.grpc import model_config_pb2, service_pb2_grpc

from trtbuild.triton_repo.model_config import WorkerSettings, config_text

_END = object()


class ScriptedTriton(Scripted):
    """See the module."""

    def __init__(self, script: Script) -> None:
        super().__init__(script)
        model: Any = vars(model_config_pb2)["ModelConfig"]
        self.config = text_format.Parse(config_text("m", "text", 8, WorkerSettings()), model())
        # What the script sends, and no float: perf_analyzer 2.51 writes stray memory for one that is not there.
        kept = [
            one for one in self.config.output if one.name in ("text_output", "num_input_tokens", "num_output_tokens")
        ]
        kept += [one for one in self.config.output if one.name == "finish_reason"]
        del self.config.output[:]
        self.config.output.extend(kept)

    async def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802
        return pb.ServerLiveResponse(live=True)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        return pb.ServerMetadataResponse(name="triton", version="scripted", extensions=["statistics"])

    async def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        return pb.ModelConfigResponse(config=self.config)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        answer = pb.ModelMetadataResponse(name="m", versions=["1"], platform="python")
        for tensors, target in ((self.config.input, answer.inputs), (self.config.output, answer.outputs)):
            for one in tensors:
                name = vars(model_config_pb2)["DataType"].Name(one.data_type).removeprefix("TYPE_")
                name = {"STRING": "BYTES"}.get(name, name)
                target.add(name=one.name, datatype=name, shape=[-1, *one.dims])
        return answer

    async def ModelStreamInfer(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        responses: asyncio.Queue[Any] = asyncio.Queue()
        tasks: list[asyncio.Task[None]] = []

        async def respond(request: Any) -> None:
            async for response in self.answer(request):
                names = [one.name for one in response.infer_response.outputs]
                response.infer_response.id = request.id
                response.infer_response.parameters["triton_final_response"].bool_param = "finish_reason" in names
                responses.put_nowait(response)

        async def receive() -> None:
            async for request in request_iterator:
                tasks.append(asyncio.create_task(respond(request)))
            await asyncio.gather(*tasks)
            responses.put_nowait(_END)

        receiver = asyncio.create_task(receive())
        while (response := await responses.get()) is not _END:
            yield response
        await receiver


async def main() -> None:
    server = grpc.aio.server()
    script = Script(**json.loads(sys.argv[1]))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(ScriptedTriton(script), server)
    sys.stdout.write(f"{server.add_insecure_port('127.0.0.1:0')}\n")
    sys.stdout.flush()
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
