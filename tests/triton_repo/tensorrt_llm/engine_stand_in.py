"""Stands for TensorRT-LLM's C++ backend in tests: a Python model with the tensors of `tensorrt_llm`.

Tokens in, tokens out, from an engine worker of ours whose socket is the parameter `worker`. As in the backend
(`src/model_instance_state.cc`, `src/utils.cc`): one response per prompt of a batch, or per token when streaming;
the prompt comes first in an answer in one piece unless it is excluded, never in a stream; `stop` cancels by request id.
What came in is written to the file of the parameter `record`, a JSON line per request.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

sys.path.extend(filter(None, os.environ.get("TRTBUILD_PYTHONPATH", "").split(os.pathsep)))

from trtbuild.engines.serving.client import WorkerClient
from trtbuild.engines.serving.request import SamplingParams
from trtbuild.errors import TrtBuildError


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        self._client = WorkerClient(Path(parameters["worker"]))
        self._record = Path(parameters["record"])
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._excludes_input = parameters["exclude_input_in_output"] == "true"
        self._decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        self._cancelled: set[str] = set()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            given = ((name, pb_utils.get_input_tensor_by_name(request, name)) for name in self._inputs)
            values = {name: tensor.as_numpy() for name, tensor in given if tensor is not None}
            shapes = {name: [list(value.shape), str(value.dtype)] for name, value in values.items()}
            small = {
                name: value.tolist() for name, value in values.items() if value.dtype != object and value.size < 99
            }
            with self._record.open("a") as file:
                file.write(json.dumps({"id": request.request_id(), "shapes": shapes, "values": small}) + "\n")
            sender = request.get_response_sender()
            if "stop" in values and values["stop"].any():
                self._cancelled.add(request.request_id())
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                continue
            threading.Thread(target=self._serve, args=(request.request_id(), values, sender), daemon=True).start()

    def finalize(self) -> None:
        self._client.close()

    def _serve(self, request_id: str, values: dict[str, Any], sender: Any) -> None:
        try:
            if not self._decoupled:
                # One response, and no more.
                self._generate(request_id, values, 0, _Last(sender))
                return
            for row in range(len(values["input_ids"])):
                self._generate(request_id, values, row, sender)
        except (TrtBuildError, ValueError) as error:
            sender.send(pb_utils.InferenceResponse([], error=pb_utils.TritonError(f"Executor failed: {error}")))
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _generate(self, request_id: str, values: dict[str, Any], row: int, sender: Any) -> None:
        def one(name: str, default: Any) -> Any:
            return values[name].reshape(-1)[row].item() if name in values else default

        prompt = values["input_ids"][row, : one("input_lengths", 0)].tolist()
        stop, bad = (_words(values, name, row) for name in ("stop_words_list", "bad_words_list"))
        params = SamplingParams(
            max_tokens=one("request_output_len", None), temperature=one("temperature", 0.0),
            top_k=one("runtime_top_k", 0), top_p=one("runtime_top_p", 1.0), seed=one("seed", None),
            repetition_penalty=one("repetition_penalty", 1.0), bad_token_ids=tuple(map(tuple, bad)), ignore_eos=True,
            logprobs=0,
        )  # fmt: skip
        streaming, end_id = one("streaming", False), one("end_id", None)
        ids: list[int] = []
        logprobs: list[float] = []
        with self._client.generate(prompt, params) as events:
            for event in events:
                if event.token_id is None:
                    continue
                ids.append(event.token_id)
                logprobs.append(event.logprob or 0.0)
                if streaming:
                    sender.send(self._response(values, row, ids[-1:], logprobs, len(prompt)))
                met = any(ids[-len(word) :] == word for word in stop)
                if met or event.token_id == end_id or request_id in self._cancelled:
                    break
        if not streaming:
            excludes = one("exclude_input_in_output", self._excludes_input)
            sender.send(self._response(values, row, ids if excludes else prompt + ids, logprobs, len(prompt)))

    def _response(
        self, values: dict[str, Any], row: int, ids: list[int], logprobs: list[float], num_input_tokens: int
    ) -> Any:
        outputs: dict[str, Any] = {
            "output_ids": np.array([[ids]], np.int32),
            "sequence_length": np.array([[len(ids)]], np.int32),
        }
        if "return_log_probs" in values and values["return_log_probs"].any():
            new = logprobs[-1:] if "streaming" in values and values["streaming"].any() else logprobs
            outputs["output_log_probs"] = np.array([[new]], np.float32)
            outputs["cum_log_probs"] = np.array([[sum(logprobs)]], np.float32)
        if "return_num_input_tokens" in values and values["return_num_input_tokens"].any():
            outputs["num_input_tokens"] = np.array([[num_input_tokens]], np.int32)
        if len(values["input_ids"]) > 1:
            outputs["batch_index"] = np.array([[row]], np.int32)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in outputs.items()])


class _Last:
    """A sender whose only response is the last."""

    def __init__(self, sender: Any) -> None:
        self._sender = sender

    def send(self, response: Any) -> None:
        self._sender.send(response, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _words(values: dict[str, Any], name: str, row: int) -> list[list[int]]:
    """The words of [2, n]; raises ValueError where the backend does."""
    if name not in values:
        return []
    ids, ends = values[name][row].tolist()
    words, start = [], 0
    for index, end in enumerate(ends):
        if end == -1:
            if any(other != -1 for other in ends[index:]):
                raise ValueError(f"{name}: offsets behind -1")
            break
        if not start < end <= len(ids):
            raise ValueError(f"{name}: offsets {ends} of {len(ids)} ids")
        words.append(ids[start:end])
        start = end
    return words
