"""A Triton model over TensorRT-LLM's LLM API (release 1.3 and later, PyTorch backend); written by trtbuild package.

It needs what NGC's tritonserver-trtllm container has. No engine was built: the checkpoint beside this file is loaded as
it is. model.yaml holds the arguments of `tensorrt_llm.LLM`, and `triton_config` for this file.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

# Where trtbuild serves without a container, it says where Python's packages are.
sys.path.extend(filter(None, os.environ.get("TRTBUILD_PYTHONPATH", "").split(os.pathsep)))

import numpy as np
import triton_python_backend_utils as pb_utils
import yaml

# Both files stand beside each other in the package.
from llmapi_requests import (  # pyright: ignore[reportMissingImports]
    NAMES,
    OUTPUTS,
    RequestError,
    check_parameters,
    parse_request,
)

_TRITON_KEYS = {"decoupled", "max_batch_size", "cancellation_check_period_ms"}
_NUMPY = {"STRING": np.object_, "INT32": np.int32, "FP32": np.float32}
_OUTPUT_TYPES = {tensor.name: _NUMPY[tensor.dtype] for tensor in OUTPUTS}
# Of a Triton that mpirun started: with them, the LLM's own processes would join its job.
_MPI_PREFIXES = ("OMPI_COMM_WORLD_", "OMPI_MCA_orte_", "ORTE_", "PMI_", "PMIX_RANK", "PMIX_NAMESPACE", "PMIX_SERVER_")


class TritonPythonModel:
    """See Triton's Python backend for the three methods."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model; Triton reports what is raised as the model's load error."""
        config = json.loads(args["model_config"])
        self._decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        directory = Path(args["model_repository"]) / args["model_version"]
        arguments, settings = _read_yaml(directory, self._decoupled)
        self._cancel_check_s = settings.get("cancellation_check_period_ms", 50) / 1000
        for name in [name for name in os.environ if name.startswith(_MPI_PREFIXES)]:
            del os.environ[name]
        # Here, not above: importing it opens the GPUs.
        self._library: Any = importlib.import_module("tensorrt_llm")
        self._llm: Any = self._library.LLM(**arguments)
        # By the answer's task, so that a client that goes away ends its generation.
        self._running: dict[int, _Entry] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llmapi", daemon=True)
        self._thread.start()
        self._watcher = asyncio.run_coroutine_threadsafe(self._watch_clients(), self._loop)

    def execute(self, requests: list[Any]) -> None:
        """Start every request; the answers are sent later, from the event loop's thread."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                check_parameters(json.loads(request.parameters()))
                parsed = parse_request(_arrays(request), self._decoupled)
                prompt, sampling = self._prepare(parsed)
            except (RequestError, ValueError, TypeError) as error:
                # SamplingParams' own checks raise the latter two.
                _fail(sender, f"refused: {error}", "INVALID_ARG")
                continue
            answer = asyncio.run_coroutine_threadsafe(self._answer(parsed, prompt, sampling, sender), self._loop)
            answer.add_done_callback(lambda done, sender=sender: _report_failure(done, sender))

    def finalize(self) -> None:
        """Triton calls it once no request is in flight."""
        self._watcher.cancel()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
        self._llm.shutdown()

    def _prepare(self, parsed: Any) -> tuple[Any, Any]:
        """The prompt as text or token ids, and its SamplingParams."""
        sampling = dict(parsed.sampling)
        prompt = parsed.prompt
        if parsed.is_chat:
            # The template writes the special tokens.
            sampling["add_special_tokens"] = False
            extra = {"tools": parsed.tools} if parsed.tools else {}
            tokenizer = self._llm.tokenizer
            prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **extra)
        if parsed.guide is not None:
            sampling["guided_decoding"] = importlib.import_module("tensorrt_llm.llmapi").GuidedDecodingParams(
                **parsed.guide
            )
        return prompt, self._library.SamplingParams(**sampling)

    async def _answer(self, parsed: Any, prompt: Any, sampling: Any, sender: Any) -> None:
        """Generate, and send a response for each step of a stream, or one for all."""
        result = self._llm.generate_async(prompt, sampling_params=sampling, streaming=parsed.stream)
        entry = self._running[id(result)] = _Entry(sender, result)
        try:
            sent, ended = [""] * parsed.num_sequences, set[int]()
            if parsed.stream:
                async for step in result:
                    if entry.cancelled:
                        break
                    for tensors in _step(parsed, step, sent, ended):
                        sender.send(pb_utils.InferenceResponse(tensors))
            else:
                whole = await result
                if not entry.cancelled:
                    sender.send(pb_utils.InferenceResponse(_whole(parsed, whole)), _FINAL)
                    return
        finally:
            del self._running[id(result)]
        if entry.cancelled:
            _fail(sender, "timeout: the client has gone", "CANCELLED")
        else:
            sender.send(flags=_FINAL)

    async def _watch_clients(self) -> None:
        while True:
            await asyncio.sleep(self._cancel_check_s)
            for entry in list(self._running.values()):
                if not entry.cancelled and entry.sender.is_cancelled():
                    entry.cancelled = True
                    entry.result.abort()


class _Entry:
    """A request in flight."""

    def __init__(self, sender: Any, result: Any) -> None:
        self.sender, self.result, self.cancelled = sender, result, False


_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


def _read_yaml(directory: Path, decoupled: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of LLM, and triton_config; the checkpoint in the package has its path there."""
    content = yaml.safe_load((directory / "model.yaml").read_text(encoding="utf-8"))
    if not isinstance(content, dict) or "model" not in content:
        raise pb_utils.TritonModelException(f"{directory}/model.yaml: no key 'model'")
    settings = content.pop("triton_config", None) or {}
    unknown = sorted(set(settings) - _TRITON_KEYS)
    if unknown:
        raise pb_utils.TritonModelException(
            f"{directory}/model.yaml: triton_config has no {unknown[0]!r}; known: {', '.join(sorted(_TRITON_KEYS))}"
        )
    if bool(settings.get("decoupled", decoupled)) != decoupled:
        raise pb_utils.TritonModelException(
            f"{directory}/model.yaml: triton_config.decoupled is {settings['decoupled']}, config.pbtxt says "
            f"{decoupled}; package the model again"
        )
    beside = directory / str(content["model"])
    return {**content, "model": str(beside) if beside.is_dir() else content["model"]}, settings


def _arrays(request: Any) -> dict[str, Any]:
    tensors = ((name, pb_utils.get_input_tensor_by_name(request, name)) for name in NAMES)
    return {name: tensor.as_numpy() for name, tensor in tensors if tensor is not None}


def _step(parsed: Any, step: Any, sent: list[str], ended: set[int]) -> Iterator[list[Any]]:
    """Responses of one step of a stream: the new text of each sequence that has any, or that ends."""
    for output in step.outputs:
        index = output.index
        is_last = output.finish_reason is not None
        if index in ended or (output.text == sent[index] and not is_last):
            continue
        first = "" if sent[index] or not parsed.echo else parsed.prompt
        # Where a stop word is cut off, the text gets shorter.
        new = output.text[len(sent[index]) :]
        sent[index] = output.text
        if is_last:
            ended.add(index)
        yield _tensors(parsed, step, [output], [first + new], [[0], [index]], is_last)


def _whole(parsed: Any, result: Any) -> list[Any]:
    first = parsed.prompt if parsed.echo else ""
    return _tensors(parsed, result, result.outputs, [first + output.text for output in result.outputs], None, True)


def _tensors(
    parsed: Any, result: Any, outputs: list[Any], texts: list[str], place: list[list[int]] | None, is_last: bool
) -> list[Any]:
    """Output tensors [1, sequences, ...]; `place` is batch and sequence index of a streamed part."""
    found: dict[str, Any] = {"text_output": [text.encode("utf-8") for text in texts]}
    if place is not None:
        found["batch_index"], found["sequence_index"] = place
    if is_last:
        lengths = [len(output.token_ids) for output in outputs]
        found["finish_reason"] = [(output.finish_reason or "").encode("utf-8") for output in outputs]
        found["sequence_length"] = found["num_output_tokens"] = lengths
        found["num_input_tokens"] = [len(result.prompt_token_ids)] * len(outputs)
        if parsed.log_probs:
            numbers = [_log_probs(output) for output in outputs]
            width = max(map(len, numbers))
            found["output_log_probs"] = [row + [0.0] * (width - len(row)) for row in numbers]
            found["cum_log_probs"] = [sum(row) for row in numbers]
    return [pb_utils.Tensor(name, np.array([value], dtype=_OUTPUT_TYPES[name])) for name, value in found.items()]


def _log_probs(output: Any) -> list[float]:
    """One number for each token: the LLM API gives it plain, or by token id."""
    numbers = []
    for token, entry in zip(output.token_ids, output.logprobs):  # noqa: B905
        value = entry[token] if isinstance(entry, dict) else entry
        numbers.append(float(getattr(value, "logprob", value)))
    return numbers


def _fail(sender: Any, message: str, code: str) -> None:
    error = pb_utils.TritonError(message, getattr(pb_utils.TritonError, code))
    sender.send(pb_utils.InferenceResponse([], error=error), _FINAL)


def _report_failure(done: Future[None], sender: Any) -> None:
    """A request whose generation raised must not hang."""
    if not done.cancelled() and done.exception() is not None:
        _fail(sender, f"failed: {done.exception()}", "INTERNAL")
