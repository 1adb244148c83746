"""Triton behind the front end: which models it serves, whether they are ready, and answers as streams of pieces.

One gRPC stream per HTTP request. Leaving it cancels it, and a cancelled stream frees its slot in the engine.
"""

from __future__ import annotations

import asyncio
import re
import time
import urllib.request
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from trtbuild.triton_repo.openai.errors import ApiError, from_triton, model_not_found
from trtbuild.triton_repo.openai.wire import Piece, infer_inputs, pieces_of
from trtbuild.triton_repo.tensors import TOKENS_SUFFIX, UNARY_SUFFIX

_MODELS_TTL_S = 2.0
_PROBE_TIMEOUT_S = 5.0
# How much longer than the engine's deadline we wait for Triton to say that it has passed.
_DEADLINE_GRACE_S = 2.0
_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A Triton that was started again is found within a second, not within gRPC's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


@dataclass(frozen=True)
class TritonRequest:
    """One prompt: the values of the text model's tensors by name, and how many sequences come back."""

    model: str
    values: dict[str, Any]
    num_sequences: int
    timeout_s: float | None = None


class TritonStream:
    """The answers to the prompts of one HTTP request; an async iterator of pieces, used once."""

    def __init__(
        self,
        client: InferenceServerClient,
        requests: Sequence[TritonRequest],
        request_id: str,
        active: set[TritonStream],
    ) -> None:
        self._client = client
        self._requests = requests
        self._request_id = request_id
        self._active = active
        self._call: Any = None
        self._reason: ApiError | None = None

    def abort(self, reason: ApiError) -> None:
        """End the stream now; whoever reads it gets `reason`."""
        self._reason = reason
        self.close()

    def close(self) -> None:
        """Cancel what is still running in Triton."""
        if self._call is not None:
            self._call.cancel()

    async def pieces(self) -> AsyncIterator[Piece]:
        """Until every sequence has its finish reason. Raises `ApiError`."""
        num_open = sum(request.num_sequences for request in self._requests)
        self._active.add(self)
        timer = self._deadline()
        try:
            if self._reason is not None:
                raise self._reason
            self._call = self._client.stream_infer(self._inputs())
            async for result, error in self._call:
                if error is not None:
                    raise from_triton(error.message())
                for piece in pieces_of(result.get_response(), several=len(self._requests) > 1):
                    num_open -= piece.finish_reason is not None
                    yield piece
                if num_open <= 0:
                    return
            raise ApiError(500, "Triton ended the stream before the answer was complete")
        except grpc.aio.AioRpcError as error:
            raise _from_rpc(error) from error
        except asyncio.CancelledError:
            # gRPC raises it for its own cancellation too.
            if self._reason is not None:
                raise self._reason from None
            raise
        finally:
            if timer is not None:
                timer.cancel()
            self._active.discard(self)
            self.close()

    async def _inputs(self) -> AsyncIterator[dict[str, Any]]:
        for index, request in enumerate(self._requests):
            suffix = f":{index}" if len(self._requests) > 1 else ""
            timeout_us = None if request.timeout_s is None else round(request.timeout_s * 1e6)
            yield {
                "model_name": request.model,
                "inputs": infer_inputs(request.values),
                "request_id": self._request_id + suffix,
                "timeout": timeout_us,
            }

    def _deadline(self) -> asyncio.TimerHandle | None:
        timeout_s = self._requests[0].timeout_s
        if timeout_s is None:
            return None
        reason = ApiError(408, f"the answer was not complete within {timeout_s:g} s (--request-timeout)")
        return asyncio.get_running_loop().call_later(timeout_s + _DEADLINE_GRACE_S, self.abort, reason)


class TritonBackend:
    """A Triton server; to be made inside the event loop that uses it."""

    def __init__(self, address: str, metrics_url: str | None = None) -> None:
        self._client = InferenceServerClient(address, channel_args=_CHANNEL)
        self._metrics_url = metrics_url
        self._models: list[str] = []
        self._looked_at = float("-inf")
        self._lock = asyncio.Lock()
        self.active: set[TritonStream] = set()

    async def close(self) -> None:
        await self._client.close()

    def open(self, requests: Sequence[TritonRequest], request_id: str) -> TritonStream:
        """The stream that will answer these prompts; nothing is sent before it is read."""
        return TritonStream(self._client, requests, request_id, self.active)

    async def models(self) -> list[str]:
        """Names of the ready text models, sorted; at most two seconds old. Raises `ApiError` where Triton is away."""
        async with self._lock:
            if time.monotonic() - self._looked_at > _MODELS_TTL_S:
                try:
                    self._models = await self._read_models()
                except InferenceServerException as error:
                    raise _unreachable(error) from error
                self._looked_at = time.monotonic()
        return self._models

    async def check_model(self, name: str) -> None:
        """404 for a model that is not served."""
        models = await self.models()
        if name not in models:
            raise model_not_found(name, models)

    async def readiness(self) -> dict[str, str | None]:
        """By model: None where Triton and the engine worker behind it answer, else what is wrong.

        Raises `ApiError` where Triton itself is not ready, or serves nothing.
        """
        try:
            if not await self._client.is_server_ready(client_timeout=_PROBE_TIMEOUT_S):
                raise ApiError(503, "Triton is not ready")
            names = await self._known_models()
            ready = [await self._client.is_model_ready(name, client_timeout=_PROBE_TIMEOUT_S) for name in names]
        except InferenceServerException as error:
            raise _unreachable(error) from error
        if not names:
            raise ApiError(503, "Triton serves no text model")
        problems = {name: None if ok else "Triton has not loaded it" for name, ok in zip(names, ready, strict=True)}
        return problems if self._metrics_url is None else await self._with_engines(problems)

    async def _with_engines(self, problems: dict[str, str | None]) -> dict[str, str | None]:
        try:
            text = await asyncio.to_thread(_get, self._metrics_url or "")
        except OSError as error:
            raise ApiError(503, f"Triton's metrics do not answer: {error}") from error
        up = engines_up(text)
        return {
            name: problem or (None if up.get(name) else "its engine worker does not answer")
            for name, problem in problems.items()
        }

    async def _known_models(self) -> list[str]:
        """Ready or not: those that are asked to be served, going by their names where no configuration can be read."""
        index = await self._index()
        asked = {m.name for m in index.models if m.state not in {"READY", ""} and m.reason != "unloaded"}
        ready = {m.name for m in index.models if m.state == "READY"}
        return sorted({name for name in asked - ready if _is_text_name(name)}.union(await self._read_models(index)))

    async def _read_models(self, index: Any = None) -> list[str]:
        if index is None:
            index = await self._index()
        names = {model.name for model in index.models if model.state == "READY" and _is_text_name(model.name)}
        return sorted([name for name in names if await self._is_text_model(name)])

    async def _index(self) -> Any:
        return await self._client.get_model_repository_index(client_timeout=_PROBE_TIMEOUT_S)

    async def _is_text_model(self, name: str) -> bool:
        answer: Any = await self._client.get_model_config(name, client_timeout=_PROBE_TIMEOUT_S)
        decoupled = answer.config.model_transaction_policy.decoupled
        return decoupled and any(tensor.name == "text_input" for tensor in answer.config.input)


def engines_up(metrics: str) -> dict[str, bool]:
    """The gauge trtbuild_engine_up of a page of Prometheus metrics, by model."""
    found = re.findall(r'^trtbuild_engine_up\{[^}]*\bmodel="([^"]*)"[^}]*\}\s+(\S+)', metrics, re.MULTILINE)
    return {name: float(value) == 1.0 for name, value in found}


def _is_text_name(name: str) -> bool:
    return not name.endswith((UNARY_SUFFIX, TOKENS_SUFFIX))


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=_PROBE_TIMEOUT_S) as response:
        return response.read().decode("utf-8", "replace")


def _from_rpc(error: grpc.aio.AioRpcError) -> ApiError:
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return _unreachable(error.details())
    return from_triton(error.details() or str(error.code()))


def _unreachable(error: object) -> ApiError:
    return ApiError(503, f"Triton does not answer: {error}")
