"""Triton model `tensorrt_llm_bls`: text in, text out, over `preprocessing` and `tensorrt_llm`.

Each request has a thread and a state of its own, so one instance serves any number at once, and a stream's text comes
in whole characters. Stop words are looked for in the text too: they end an answer however they were cut into tokens.
A client that leaves, or a stop word, cancels what the engine computes.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from trtllm_text import (
    Parameters,
    RequestError,
    TextStream,
    decoder_of,
    error_response,
    load_tokenizer,
    text_of,
)

_JOIN_S = 5.0


class TritonPythonModel:
    """See Triton's Python backend for the methods."""

    def initialize(self, args: dict[str, str]) -> None:
        parameters = Parameters(args)
        config = json.loads(args["model_config"])
        self._decode = decoder_of(
            load_tokenizer(parameters.path("tokenizer_dir")), parameters.flag("skip_special_tokens")
        )
        self._accumulate = parameters.flag("accumulate_tokens")
        self._excludes_input = parameters.flag("exclude_input_in_output")
        self._preprocessing = parameters.text("preprocessing_model_name")
        self._engine = parameters.text("tensorrt_llm_model_name")
        self._decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        self._routes = json.loads(parameters.text("tensor_routes"))
        self._threads: set[threading.Thread] = set()

    def execute(self, requests: list[Any]) -> Any:
        """Decoupled: the answers are sent by threads. Else they are returned."""
        if not self._decoupled:
            return [self._only(request) for request in requests]
        for request in requests:
            thread = threading.Thread(target=self._serve, args=(request, request.get_response_sender()), daemon=True)
            self._threads.add(thread)
            thread.start()
        return None

    def finalize(self) -> None:
        for thread in list(self._threads):
            thread.join(timeout=_JOIN_S)

    def _only(self, request: Any) -> Any:
        try:
            found = list(self._answers(request, None))
        except (RequestError, ValueError, pb_utils.TritonModelException) as error:
            return error_response(error)
        return found[-1]

    def _serve(self, request: Any, sender: Any) -> None:
        told = False
        try:
            for response in self._answers(request, sender):
                sender.send(response)
            told = True
        except (RequestError, ValueError, pb_utils.TritonModelException) as error:
            sender.send(error_response(error))
            told = True
        finally:
            if not told:
                # A fault of ours, whose traceback goes to Triton's log.
                sender.send(error_response(RuntimeError("tensorrt_llm_bls failed; Triton's log says why")))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            self._threads.discard(threading.current_thread())

    def _answers(self, request: Any, sender: Any) -> Iterator[Any]:
        """The responses to one request."""
        inputs = {tensor.name(): tensor for tensor in request.inputs()}
        texts = inputs["text_input"].as_numpy().reshape(-1)
        streaming = _flag(inputs, "stream")
        if streaming and not self._decoupled:
            raise RequestError("stream: this repository was packaged without decoupled; it answers in one piece")
        if len(texts) > 1 and not self._decoupled:
            raise RequestError("a batch needs a repository that was packaged as decoupled")
        request_id = str(uuid.uuid4())
        prepared = self._prepare(inputs)
        answer = _Answer(self._decode, inputs, streaming, self._accumulate, self._prompt_lengths(inputs, prepared))
        cancelled = False
        asked = self._ask_engine(request_id, inputs, prepared)
        for part in asked:
            if part.has_error():
                raise _translated(part.error())
            tensors = {tensor.name(): tensor for tensor in part.output_tensors()}
            if "output_ids" not in tensors or cancelled:
                continue
            yield answer.add(tensors)
            if answer.is_over or (sender is not None and sender.is_cancelled()):
                self._cancel(request_id)
                cancelled = True
        yield from answer.rest()

    def _prompt_lengths(self, inputs: dict[str, Any], prepared: list[Any]) -> list[int]:
        """Characters of the prompt that an answer in one piece begins with, for the search for stop words."""
        found = {tensor.name(): tensor.as_numpy() for tensor in prepared if tensor.name().startswith("input_")}
        rows, lengths = found["input_ids"], found["input_lengths"].reshape(-1)
        if _flag(inputs, "exclude_input_in_output", self._excludes_input):
            return [0] * len(rows)
        return [len(self._decode(row[:length])) for row, length in zip(rows, lengths, strict=True)]

    def _prepare(self, inputs: dict[str, Any]) -> list[Any]:
        names = self._routes["to_preprocessing"]
        given = [_renamed(inputs[name], new) for name, new in names.items() if name in inputs]
        request = pb_utils.InferenceRequest(
            model_name=self._preprocessing,
            inputs=given,
            requested_output_names=list(self._routes["from_preprocessing"]),
        )
        response = request.exec()
        if response.has_error():
            raise _translated(response.error())
        names = self._routes["from_preprocessing"]
        return [_renamed(tensor, names[tensor.name()]) for tensor in response.output_tensors()]

    def _ask_engine(self, request_id: str, inputs: dict[str, Any], prepared: list[Any]) -> Iterator[Any]:
        names = self._routes["to_engine"]
        passed = [_renamed(inputs[name], new) for name, new in names.items() if name in inputs]
        request = pb_utils.InferenceRequest(
            request_id=request_id, model_name=self._engine, inputs=[*prepared, *passed],
            requested_output_names=self._routes["outputs"],
        )  # fmt: skip
        if self._decoupled:
            return iter(request.exec(decoupled=True))
        return iter([request.exec()])

    def _cancel(self, request_id: str) -> None:
        """The backend's own way: a second request of the same id with `stop`."""
        inputs = [
            pb_utils.Tensor("input_ids", np.zeros([1, 1], np.int32)),
            pb_utils.Tensor("input_lengths", np.zeros([1, 1], np.int32)),
            pb_utils.Tensor("request_output_len", np.zeros([1, 1], np.int32)),
            pb_utils.Tensor("stop", np.array([[True]])),
        ]
        request = pb_utils.InferenceRequest(
            request_id=request_id, model_name=self._engine, inputs=inputs, requested_output_names=[]
        )
        if self._decoupled:
            list(request.exec(decoupled=True))


class _Answer:
    """Texts of one request's sequences, a stream of which each beam of each sequence of each prompt has."""

    def __init__(
        self, decode: Any, inputs: dict[str, Any], streaming: bool, accumulate: bool, prompt_lengths: list[int]
    ) -> None:
        self._decode, self._streaming, self._accumulate = decode, streaming, accumulate
        self._prompt_lengths = prompt_lengths
        words = inputs["stop_words"].as_numpy() if "stop_words" in inputs else np.zeros([len(prompt_lengths), 0])
        rows = words.reshape(len(prompt_lengths), -1)
        self._stop = [[text_of(word, "stop_words") for word in row if word] for row in rows]
        sequences = int(inputs["num_return_sequences"].as_numpy().flat[0]) if "num_return_sequences" in inputs else 1
        beams = int(inputs["beam_width"].as_numpy().flat[0]) if "beam_width" in inputs else 1
        # Beams come together in one response, and streams of several are not pieces but all tokens each time.
        self._whole = not streaming or beams > 1
        self._num_expected = len(prompt_lengths) * sequences * beams
        self._sequences: dict[tuple[int, int, int], _Sequence] = {}
        self._last: dict[tuple[int, int], list[Any]] = {}

    @property
    def is_over(self) -> bool:
        """Every sequence met a stop word."""
        return len(self._sequences) == self._num_expected and all(one.stopped for one in self._sequences.values())

    def add(self, tensors: dict[str, Any]) -> Any:
        """The response for one of the engine's."""
        row, sequence = (_index(tensors, name) for name in ("batch_index", "sequence_index"))
        ids, lengths = tensors.pop("output_ids").as_numpy(), tensors.pop("sequence_length").as_numpy()
        texts = []
        for beam in range(ids.shape[1]):
            state = self._sequences.setdefault((row, sequence, beam), _Sequence(self._decode, self._stop[row]))
            tokens = ids[0, beam, : lengths[0, beam]]
            if self._whole:
                texts.append(state.whole(tokens, 0 if self._streaming else self._prompt_lengths[row]))
            else:
                texts.append(state.piece(tokens, self._accumulate))
        others = list(tensors.values())
        self._last[row, sequence] = [t for t in others if t.name() in ("batch_index", "sequence_index")]
        return _response(texts, others)

    def rest(self) -> Iterator[Any]:
        """What the streams held back: half characters, now that no more comes."""
        if self._whole:
            return
        for (row, sequence, _), state in self._sequences.items():
            text = state.rest(self._accumulate)
            if text:
                yield _response([text], self._last[row, sequence])


class _Sequence:
    """One sequence of tokens."""

    def __init__(self, decode: Any, stop: list[str]) -> None:
        self._decode, self._stop = decode, stop
        self._stream = TextStream(decode)
        self._text = ""
        self.stopped = False

    def whole(self, tokens: Any, start: int) -> str:
        """All tokens at once; stop words count behind `start` characters. The text ends with the stop word."""
        text = self._decode(tokens)
        end = _first_end(text, self._stop, start)
        self.stopped = end is not None
        return text if end is None else text[:end]

    def piece(self, tokens: Any, accumulate: bool) -> str:
        return self._extend(self._stream.push(tokens), accumulate)

    def rest(self, accumulate: bool) -> str:
        left = "" if self.stopped else self._stream.finish()
        return self._extend(left, accumulate) if left else ""

    def _extend(self, new: str, accumulate: bool) -> str:
        if self.stopped:
            new = ""
        # A stop word may have begun in text that is out.
        longest = max(map(len, self._stop), default=1)
        before = len(self._text)
        self._text += new
        end = _first_end(self._text, self._stop, max(0, before - longest + 1)) if new else None
        if end is not None:
            self.stopped = True
            self._text = self._text[:end]
        return self._text if accumulate else self._text[before:]


def _first_end(text: str, words: list[str], start: int) -> int | None:
    """Where the first complete stop word ends."""
    ends = [at + len(word) for word in words if (at := text.find(word, start)) >= 0]
    return min(ends, default=None)


def _response(texts: list[str], tensors: list[Any]) -> Any:
    output = np.array([text.encode("utf-8") for text in texts], dtype=np.object_).reshape(1, -1)
    return pb_utils.InferenceResponse([pb_utils.Tensor("text_output", output), *tensors])


def _renamed(tensor: Any, name: str) -> Any:
    """As it is where the name stays: numpy has no bfloat16."""
    return tensor if tensor.name() == name else pb_utils.Tensor(name, tensor.as_numpy())


def _flag(inputs: dict[str, Any], name: str, default: bool = False) -> bool:
    return bool(inputs[name].as_numpy().flat[0]) if name in inputs else default


def _index(tensors: dict[str, Any], name: str) -> int:
    """Absent where there is one only."""
    return int(tensors[name].as_numpy().flat[0]) if name in tensors else 0


def _translated(error: Any) -> Exception:
    """An error of another model; what a client can mend stays so."""
    message = error.message()
    bad = getattr(pb_utils.TritonError, "INVALID_ARG", None)
    return RequestError(message) if bad is not None and error.code() == bad else pb_utils.TritonModelException(message)
