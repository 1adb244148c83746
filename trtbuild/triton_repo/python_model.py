"""The Python-backend model that Triton loads: a thin forwarder to the engine worker, and its metrics.

Runs in Triton's stub process, where `triton_python_backend_utils` exists. Both kinds of models answer through response
senders, also the one that is not decoupled, so that one process serves any number of requests at once.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, cast

import triton_python_backend_utils as pb_utils

from trtbuild.engines.serving.request_log import configure_logging
from trtbuild.engines.serving.shared import SharedWorker
from trtbuild.errors import DeadlineExceeded, Refused, TrtBuildError, Unavailable
from trtbuild.triton_repo.answers import Answer
from trtbuild.triton_repo.engine_metrics import EngineMetrics, MetricsTurn
from trtbuild.triton_repo.model_config import WorkerSettings
from trtbuild.triton_repo.requests import check_parameters, parse_request
from trtbuild.triton_repo.responses import Response
from trtbuild.triton_repo.stub_processes import log_format, mark_alive, metrics_lock, worker_group
from trtbuild.triton_repo.tensors import ModelKind, inputs_of
from trtbuild.triton_repo.worker_link import WorkerLink

# Each look at a request costs a message to Triton's process, about 0.1 ms.
_CANCEL_POLL_S = 0.02
_METRICS_S = 1.0
_THREAD_END_S = 5.0
_MICROSECONDS = 1e6


class TritonPythonModel:
    """See Triton's Python backend for the three methods."""

    def initialize(self, args: dict[str, str]) -> None:
        """Connect to the engine's worker, or start it; Triton reports what is raised as the model's load error."""
        try:
            self._initialize(args)
        except TrtBuildError as error:
            raise pb_utils.TritonModelException(error.message) from error

    def _initialize(self, args: dict[str, str]) -> None:
        configure_logging(log_format())
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        self._kind: ModelKind = cast(ModelKind, parameters["kind"])
        self._inputs = [tensor.name for tensor in inputs_of(self._kind)]
        settings = WorkerSettings.from_parameters(parameters)
        flags = {**settings.flags(), "log-format": log_format()}
        worker = SharedWorker(_engine_directory(args, parameters["engine"]), flags, worker_group())
        self._link = WorkerLink(worker.connect)
        self._answers: set[Answer] = set()
        self._closing = threading.Event()
        self._marker = mark_alive()
        self._threads = [threading.Thread(target=self._watch_clients, name="cancel", daemon=True)]
        if self._kind == "text":
            name = args["model_name"]
            self._threads.append(threading.Thread(target=self._report, args=(name,), name="metrics", daemon=True))
        for thread in self._threads:
            thread.start()

    def execute(self, requests: list[Any]) -> None:
        """Start every request; the answers are sent later, by the worker client's thread."""
        for request in requests:
            responder = _Responder(request)
            try:
                deadline_s = request.timeout() / _MICROSECONDS
                check_parameters(json.loads(request.parameters()), self._kind)
                parsed = parse_request(self._values(request), self._kind, deadline_s or None)
                answer = Answer(parsed, responder, self._link.client(), self._answers.discard)
            except TrtBuildError as error:
                responder.fail(error)
                continue
            self._answers.add(answer)
            answer.start(request.request_id() or None)

    def finalize(self) -> None:
        """Triton calls it once no request is in flight."""
        self._closing.set()
        # Each may be talking to Triton's process, which answers no more once this returns: the stub would hang.
        for thread in self._threads:
            thread.join(timeout=_THREAD_END_S)
        self._link.close()
        if self._marker is not None:
            self._marker.unlink(missing_ok=True)

    def _values(self, request: Any) -> dict[str, Any]:
        tensors = ((name, pb_utils.get_input_tensor_by_name(request, name)) for name in self._inputs)
        return {name: tensor.as_numpy() for name, tensor in tensors if tensor is not None}

    def _watch_clients(self) -> None:
        while not self._closing.wait(_CANCEL_POLL_S):
            for answer in list(self._answers):
                answer.cancel_if_abandoned()

    def _report(self, model: str) -> None:
        metrics: EngineMetrics | None = None
        with MetricsTurn(metrics_lock(model)) as turn:
            while not self._closing.wait(_METRICS_S):
                if metrics is None and turn.take():
                    metrics = EngineMetrics(pb_utils, model)
                if metrics is not None:
                    self._update(metrics)
            if metrics is not None:
                metrics.delete()

    def _update(self, metrics: EngineMetrics) -> None:
        try:
            metrics.update(self._link.client().stats())
        except TrtBuildError:
            metrics.down()


class _Responder:
    """Responses of one Triton request."""

    def __init__(self, request: Any) -> None:
        self._sender = request.get_response_sender()
        # Triton frees the request with its last response, and dies of a question about a freed one.
        self._lock = threading.Lock()
        self._final = False

    def send(self, response: Response, final: bool) -> None:
        tensors = [pb_utils.Tensor(name, array) for name, array in response.items()]
        self._send(pb_utils.InferenceResponse(tensors), final)

    def fail(self, error: TrtBuildError) -> None:
        code, kind = _KINDS.get(type(error), ("INTERNAL", "failed"))
        # Triton puts TritonError into its module only after this file was imported.
        triton_error = pb_utils.TritonError(f"{kind}: {error.message}", getattr(pb_utils.TritonError, code))
        self._send(pb_utils.InferenceResponse([], error=triton_error), final=True)

    def is_cancelled(self) -> bool:
        with self._lock:
            return not self._final and self._sender.is_cancelled()

    def _send(self, response: Any, final: bool) -> None:
        with self._lock:
            self._final = final
            self._sender.send(response, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)


# Triton's status code, and the word that our clients tell errors by: streams deliver only the message.
_KINDS: dict[type[TrtBuildError], tuple[str, str]] = {
    Refused: ("INVALID_ARG", "refused"),
    Unavailable: ("UNAVAILABLE", "unavailable"),
    DeadlineExceeded: ("CANCELLED", "timeout"),
}


def _engine_directory(args: dict[str, str], name: str) -> Path:
    """The engine beside, or in, this model's directory; every model of an engine shares the text model's copy."""
    directory = Path(args["model_repository"]).parent / name / "1" / "engine"
    if not (directory / "engine.json").is_file():
        raise Refused(f"{directory}: no engine.json; package {name} again: trtbuild package {name}")
    return directory
