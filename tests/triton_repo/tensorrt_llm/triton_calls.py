"""Requests to a running Triton, by gRPC streams and by HTTP's generate endpoints."""

from __future__ import annotations

import json
import queue
import urllib.request
from typing import Any

import numpy as np
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

_TYPES: dict[str, tuple[str, Any]] = {
    "text_input": ("BYTES", np.object_), "stop_words": ("BYTES", np.object_), "bad_words": ("BYTES", np.object_),
    "embedding_bias_words": ("BYTES", np.object_), "embedding_bias_weights": ("FP32", np.float32),
    "stream": ("BOOL", np.bool_), "exclude_input_in_output": ("BOOL", np.bool_),
    "return_log_probs": ("BOOL", np.bool_), "return_num_input_tokens": ("BOOL", np.bool_),
    "temperature": ("FP32", np.float32), "top_p": ("FP32", np.float32), "seed": ("UINT64", np.uint64),
}  # fmt: skip
_TIMEOUT_S = 60


class Asker:
    """Values by tensor name; the batch is 1 where a value is no nested list."""

    def __init__(self, url: str, http: str) -> None:
        self._url, self._http = url, http

    def all(self, model: str, request_id: str = "", **values: Any) -> list[dict[str, Any]]:
        """All responses of one gRPC stream; raises InferenceServerException for the first that is an error."""
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with grpc.InferenceServerClient(self._url) as client:
            client.start_stream(lambda result, error: answers.put(error or result))
            client.async_stream_infer(model, _inputs(values), request_id=request_id, enable_empty_final_response=True)
            found: list[dict[str, Any]] = []
            while True:
                answer = answers.get(timeout=_TIMEOUT_S)
                if isinstance(answer, InferenceServerException):
                    raise answer
                response = answer.get_response()
                if response.outputs:
                    found.append({output.name: _value(answer, output.name) for output in response.outputs})
                if response.parameters["triton_final_response"].bool_param:
                    return found

    def leave_after(self, model: str, count: int, **values: Any) -> None:
        """Cancel a gRPC stream after `count` responses."""
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with grpc.InferenceServerClient(self._url) as client:
            client.start_stream(lambda result, error: answers.put(error or result))
            client.async_stream_infer(model, _inputs(values | {"stream": True}))
            for _ in range(count):
                answers.get(timeout=_TIMEOUT_S)
            client.stop_stream(cancel_requests=True)

    def infer(self, model: str, **values: Any) -> dict[str, Any]:
        """One request with one response, by gRPC."""
        with grpc.InferenceServerClient(self._url) as client:
            answer: Any = client.infer(model, _inputs(values))
            return {output.name: _value(answer, output.name) for output in answer.get_response().outputs}

    def generate_stream(self, model: str, **values: Any) -> list[dict[str, Any]]:
        """The server-sent events of /generate_stream."""
        lines = self._post(model, "generate_stream", values).splitlines()
        return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]

    def generate(self, model: str, **values: Any) -> dict[str, Any]:
        """The answer of /generate."""
        return json.loads(self._post(model, "generate", values))

    def _post(self, model: str, endpoint: str, values: dict[str, Any]) -> str:
        request = urllib.request.Request(
            f"{self._http}/v2/models/{model}/{endpoint}", data=json.dumps(values).encode(), method="POST"
        )
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            return answer.read().decode()


def _inputs(values: dict[str, Any]) -> list[Any]:
    found = []
    for name, value in values.items():
        wire, dtype = _TYPES.get(name, ("INT32", np.int32))
        rows = value if isinstance(value, list) and isinstance(value[0], list) else [np.atleast_1d(value).tolist()]
        if wire == "BYTES":
            rows = [[item.encode() if isinstance(item, str) else item for item in row] for row in rows]
        array = np.array(rows, dtype=dtype)
        tensor = grpc.InferInput(name, array.shape, wire)
        tensor.set_data_from_numpy(array)
        found.append(tensor)
    return found


def _value(answer: Any, name: str) -> Any:
    """Text as text, numbers as nested lists."""
    array = answer.as_numpy(name)
    if array.dtype == object:
        texts = [item.decode() for item in array.reshape(-1)]
        return texts[0] if len(texts) == 1 else texts
    return array.tolist()
