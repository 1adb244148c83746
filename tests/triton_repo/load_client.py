"""Streams in numbers, for load tests: over one event loop, so that the client is not what is measured."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from served import Service
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient

_DTYPES = {bytes: "BYTES", int: "INT32", bool: "BOOL", float: "FP32"}
# A client process that asks over HTTP and reads nothing but the first bytes; it is killed.
_HTTP_CLIENT = """
import socket, sys
asked = []
for _ in range(int(sys.argv[2])):
    asked.append(socket.create_connection(("127.0.0.1", int(sys.argv[1]))))
    asked[-1].sendall(sys.argv[3].encode())
for one in asked:
    one.recv(1)
print("asked", flush=True)
sys.stdin.read()
"""
_GRPC_CLIENT = """
import json, sys
from trtbuild.triton_repo.client import TritonClient
asked = []
for _ in range(int(sys.argv[2])):
    asked.append(TritonClient(f"127.0.0.1:{sys.argv[1]}").stream("mixtral", json.loads(sys.argv[3])))
    next(asked[-1])
print("asked", flush=True)
sys.stdin.read()
"""


def infer_inputs(values: dict[str, Any]) -> list[InferInput]:
    """Tensors of shape [1, 1]; seeds are UINT64."""
    found = []
    for name, value in values.items():
        plain = value.encode() if isinstance(value, str) else value
        dtype = "UINT64" if name == "seed" else _DTYPES[type(plain)]
        kind: Any = {"BYTES": object, "INT32": np.int32, "BOOL": bool, "FP32": np.float32, "UINT64": np.uint64}[dtype]
        found.append(InferInput(name, [1, 1], dtype))
        found[-1].set_data_from_numpy(np.array([[plain]], dtype=kind))
    return found


class Clients:
    """Several gRPC channels, taken in turn; to be made inside the event loop that uses it."""

    def __init__(self, url: str, count: int = 8) -> None:
        self._all = [InferenceServerClient(url) for _ in range(count)]
        self._turn = itertools.cycle(self._all)

    def open(self, values: dict[str, Any]) -> Any:
        """The responses of one stream, which has a `cancel`."""

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": "mixtral", "inputs": infer_inputs(values)}

        return next(self._turn).stream_infer(requests())

    async def answer(self, values: dict[str, Any]) -> list[str]:
        """The text of each response to the end; raises what went wrong."""
        texts: list[str] = []
        async for result, error in self.open(values):
            if error is not None:
                raise error
            texts.append(result.as_numpy("text_output").item().decode())
            reason = result.as_numpy("finish_reason")
            # Read on after the last response: whatever came then would be one too many.
            if reason is not None:
                count = result.as_numpy("num_output_tokens").item()
                assert (reason.item(), count) == (b"length", len(texts)), f"{reason}, {count}, {len(texts)} responses"
        return texts

    async def close(self) -> None:
        for client in self._all:
            await client.close()


def http_request(values: dict[str, Any], port: int) -> bytes:
    body = json.dumps(values).encode()
    head = f"POST /v2/models/mixtral/generate_stream HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def http_and_leave(port: int, values: dict[str, Any], after_s: float) -> None:
    """Ask over HTTP and disconnect."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(http_request(values, port))

    async def read() -> None:
        while await reader.read(4096):
            pass

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(read(), after_s)
    writer.transport.abort()


async def grpc_and_leave(clients: Clients, values: dict[str, Any], after_s: float) -> None:
    """Ask over gRPC and cancel."""
    stream = clients.open(values)

    async def read() -> None:
        async for _, error in stream:
            if error is not None:
                raise error

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(read(), after_s)
    stream.cancel()


async def killed_client(service: Service, values: dict[str, Any], count: int, after_s: float, *, grpc: bool) -> None:
    """A process that has `count` streams open and gets SIGKILL."""
    port = service.ports.grpc if grpc else service.ports.http
    given = json.dumps(values) if grpc else http_request(values, port).decode()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _GRPC_CLIENT if grpc else _HTTP_CLIENT, str(port), str(count), given,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    line = await process.stdout.readline()
    assert line == b"asked\n", line
    await asyncio.sleep(after_s)
    process.kill()
    await process.wait()


class MemoryWatch:
    """Resident bytes of a service's processes over time.

    Judged by a straight line through what comes after the warm-up: its rise over that time must be within noise, which
    is three standard deviations of the samples around it, or, where that is more, one percent of the mean or 1 MiB: the
    allocator's arenas of Triton's many threads fill slowly.
    """

    def __init__(self, service: Service) -> None:
        parts = {"tritonserver": "bin/tritonserver", "stub": "models/mixtral/1/model.py", "worker": "serving.worker"}
        self._processes = {name: service.processes(part)[0] for name, part in parts.items()}
        self.samples: dict[str, list[tuple[float, int]]] = {name: [] for name in parts}

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes.values()]

    async def run(self, every_s: float = 1.0) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            for name, process in self._processes.items():
                self.samples[name].append((loop.time(), process.memory_info().rss))
            await asyncio.sleep(every_s)

    def judge(self, warm_up: float) -> tuple[list[str], list[str]]:
        """(a line for each process, those that grow); `warm_up` is a share of the time."""
        lines, growing = [], []
        for name, samples in self.samples.items():
            begun, ended = samples[0][0], samples[-1][0]
            later = [sample for sample in samples if sample[0] >= begun + warm_up * (ended - begun)]
            times, sizes = [at for at, _ in later], [size / 2**20 for _, size in later]
            slope, intercept = statistics.linear_regression(times, sizes)
            rest = [size - slope * at - intercept for at, size in zip(times, sizes, strict=True)]
            rise = slope * (times[-1] - times[0])
            noise = max(3 * statistics.pstdev(rest), 0.01 * statistics.fmean(sizes), 1.0)
            lines.append(
                f"{name}: {sizes[0]:.1f} to {sizes[-1]:.1f} MiB over {times[-1] - times[0]:.0f} s after warm-up, "
                f"slope {60 * slope:+.3f} MiB/min, rise {rise:+.2f} MiB, noise {noise:.2f} MiB"
            )
            if rise > noise:
                growing.append(lines[-1])
        return lines, growing
