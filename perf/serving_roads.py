"""The roads to an engine's tokens that perf/serving.py compares: the worker's socket, Triton's gRPC, and HTTP."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient

from trtbuild.engines.serving.client import WorkerClient
from trtbuild.engines.serving.request import SamplingParams

NAME = "mixtral"
# Called with a stream's index and number of tokens; when each token came, time.monotonic.
Road = Callable[[int, int], Awaitable[list[float]]]


def prompt_of(index: int) -> str:
    return f"Once upon a time, in the city of number {index},"


def over_worker(client: WorkerClient) -> Road:
    """The bare worker: its own client, no Triton."""

    async def ask(index: int, num_tokens: int) -> list[float]:
        loop, done, times = asyncio.get_running_loop(), asyncio.Event(), []

        def deliver(message: dict[str, Any]) -> None:
            times.append(time.monotonic())
            if message["type"] != "token":
                raise RuntimeError(message)
            if "finish_reason" in message:
                loop.call_soon_threadsafe(done.set)

        client.submit(prompt_of(index), SamplingParams(max_tokens=num_tokens, ignore_eos=True), deliver)
        await done.wait()
        return times

    return ask


def over_grpc(url: str) -> Road:
    """Triton's gRPC stream; one channel for all, as a client process would have it."""
    channels: list[InferenceServerClient] = []

    async def ask(index: int, num_tokens: int) -> list[float]:
        if not channels:
            channels.append(InferenceServerClient(url))
        arrays = {
            "text_input": ("BYTES", np.array([[prompt_of(index).encode()]], object)),
            "max_tokens": ("INT32", np.array([[num_tokens]], np.int32)),
            "stream": ("BOOL", np.array([[True]])),
            "ignore_eos": ("BOOL", np.array([[True]])),
        }
        inputs = []
        for name, (dtype, array) in arrays.items():
            inputs.append(InferInput(name, [1, 1], dtype))
            inputs[-1].set_data_from_numpy(array)

        async def requests() -> Any:
            yield {"model_name": NAME, "inputs": inputs}

        times = []
        responses: Any = channels[0].stream_infer(requests())
        async for _, error in responses:
            times.append(time.monotonic())
            if error is not None:
                raise error
            if len(times) == num_tokens:
                break
        return times

    return ask


def triton_body(index: int, num_tokens: int) -> dict[str, Any]:
    return {"text_input": prompt_of(index), "max_tokens": num_tokens, "stream": True, "ignore_eos": True}


def openai_body(index: int, num_tokens: int) -> dict[str, Any]:
    return {"model": NAME, "prompt": prompt_of(index), "max_tokens": num_tokens, "stream": True, "ignore_eos": True}


def over_http(port: int, path: str, body_of: Callable[[int, int], dict[str, Any]]) -> Road:
    """Server-sent events, read without an HTTP library: chunks, and one `data:` line with text for each token."""

    async def ask(index: int, num_tokens: int) -> list[float]:
        body = json.dumps(body_of(index, num_tokens)).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = (
            f"POST {path} HTTP/1.1\r\nHost: perf\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        )
        writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        status, times = await reader.readline(), []
        if b" 200 " not in status:
            raise RuntimeError((status + await reader.read(2000)).decode())
        while await reader.readline() != b"\r\n":
            pass
        rest = b""
        while (size := int(await reader.readline(), 16)) > 0:
            *lines, rest = (rest + await reader.readexactly(size)).split(b"\n")
            await reader.readline()
            if any(b'"error"' in line for line in lines):
                raise RuntimeError(f"{path}: {lines}")
            times += [time.monotonic() for line in lines if line.startswith(b"data: {")]
        writer.close()
        if len(times) != num_tokens:
            raise RuntimeError(f"{path} ended after {len(times)} of {num_tokens} tokens")
        return times

    return ask
