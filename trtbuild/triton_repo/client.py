"""A small gRPC client of our Triton models, for `generate --url`, the check after packaging, and tests."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from trtbuild.engines.serving.request import SamplingParams
from trtbuild.errors import DeadlineExceeded, Refused, TrtBuildError, Unavailable
from trtbuild.triton_repo.tensors import TOKENS_SUFFIX, ModelKind, Tensor, inputs_of

_NUMPY: dict[str, Any] = {
    "INT32": np.int32,
    "UINT64": np.uint64,
    "FP32": np.float32,
    "BOOL": np.bool_,
    "STRING": object,
}
_ERRORS: dict[str, type[TrtBuildError]] = {
    "refused": Refused,
    "unavailable": Unavailable,
    "timeout": DeadlineExceeded,
}


@dataclass(frozen=True)
class Part:
    """One response of a stream; `values` are its output tensors, as numpy arrays."""

    text: str
    values: dict[str, np.ndarray]
    received_at: float = field(default_factory=time.perf_counter)


class TritonClient:
    """Talks to the Triton at `url` (HOST:PORT of its gRPC service); a context manager.

    Errors: `Refused`, `Unavailable` and `DeadlineExceeded` as the model says, `TrtBuildError` for everything else.
    """

    def __init__(self, url: str) -> None:
        self._client = grpcclient.InferenceServerClient(url)
        self.url = url

    def stream(
        self, model: str, values: dict[str, Any], *, request_id: str = "", deadline_s: float | None = None
    ) -> Generator[Part, None, None]:
        """The responses of one request of a decoupled text or token model, as they come.

        `values`: by tensor name, without batch dimensions. Left early, the request is cancelled.
        """
        kind: ModelKind = "tokens" if "request_output_len" in values or model.endswith(TOKENS_SUFFIX) else "text"
        answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        with grpcclient.InferenceServerClient(self.url) as client:
            client.start_stream(callback=lambda result, error: answers.put((result, error)))
            finished = False
            try:
                # An error here: the stream has ended already, and says why below.
                with contextlib.suppress(InferenceServerException):
                    client.async_stream_infer(
                        model, _inputs(kind, values), request_id=request_id, enable_empty_final_response=True,
                        timeout=_microseconds(deadline_s),
                    )  # fmt: skip
                while not finished:
                    result, error = answers.get()
                    if error is not None:
                        finished = True
                        raise _exception(error)
                    response = result.get_response()
                    finished = response.parameters["triton_final_response"].bool_param
                    found = _values_of(result)
                    if found:
                        yield Part(_text_of(found), found)
            finally:
                client.stop_stream(cancel_requests=not finished)

    def ask(self, model: str, values: dict[str, Any], *, request_id: str = "", deadline_s: float | None = None) -> Part:
        """The one response of a model that is not decoupled."""
        try:
            result = self._client.infer(
                model, _inputs("unary", values), request_id=request_id, timeout=_microseconds(deadline_s)
            )
        except InferenceServerException as error:
            raise _exception(error) from error
        found = _values_of(result)
        return Part(_text_of(found), found)

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> TritonClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def tensor_values(params: SamplingParams, kind: ModelKind = "text") -> dict[str, Any]:
    """The tensors that say what `params` does; only what differs from the defaults."""
    given = params.to_dict()
    names = {tensor.parameter: tensor.name for tensor in inputs_of(kind) if tensor.parameter is not None}
    unknown = sorted(set(given) - set(names) - {"deadline_s"})
    if unknown:
        raise Refused(f"Triton's {kind} model has no tensor for {', '.join(unknown)}")
    return {names[parameter]: value for parameter, value in given.items() if parameter in names}


def _microseconds(deadline_s: float | None) -> int | None:
    """Triton's request timeout, which our models take as the deadline."""
    return None if deadline_s is None else round(deadline_s * 1e6)


def _inputs(kind: ModelKind, values: dict[str, Any]) -> list[Any]:
    table = {tensor.name: tensor for tensor in inputs_of(kind)}
    full = {"text_input": "", **values} if kind != "tokens" else values
    return [_input(table[name], value) for name, value in full.items()]


def _input(tensor: Tensor, value: Any) -> Any:
    items: Sequence[Any] = value if tensor.is_list else [value]
    if tensor.dtype == "STRING":
        items = [item.encode("utf-8") for item in items]
    array = np.array([items], dtype=_NUMPY[tensor.dtype])
    given = grpcclient.InferInput(tensor.name, list(array.shape), np_to_triton_dtype(array.dtype))
    given.set_data_from_numpy(array)
    return given


def _values_of(result: Any) -> dict[str, np.ndarray]:
    return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}


def _text_of(found: dict[str, np.ndarray]) -> str:
    return found["text_output"].reshape(-1)[0].decode("utf-8") if "text_output" in found else ""


def _exception(error: InferenceServerException) -> TrtBuildError:
    """The model's own error, by the kind that its message begins with; anything else is Triton's."""
    message = str(error.message())
    kind, _, rest = message.partition(": ")
    # Unary calls have Triton's "in ensemble ..." and the like in front of nothing; streams only the message.
    if kind in _ERRORS:
        return _ERRORS[kind](rest)
    if "StatusCode.UNAVAILABLE" in str(error):
        return Unavailable(f"no Triton answers: {message}")
    return TrtBuildError(f"Triton: {message}")
