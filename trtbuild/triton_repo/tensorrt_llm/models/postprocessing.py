"""Triton model `postprocessing`: token ids to text.

Triton calls it once for each response of a stream, with nothing but the tokens: it cannot see which stream they are of,
nor that it ended. What it has is the request's id, where the client gave one: then the text comes in whole characters,
with the spaces that belong there. Ids must differ among requests in flight. Without one a character that spans tokens
comes out as U+FFFD; `tensorrt_llm_bls` needs no id. For the order of the pieces there is one instance only.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from trtllm_text import MAX_PENDING, Parameters, TextStream, decoder_of, error_response, input_of, load_tokenizer

# Nothing tells that a stream has ended.
_FORGET_AFTER_S = 60.0
_MAX_STREAMS = 8192


class TritonPythonModel:
    """See Triton's Python backend for the methods."""

    def initialize(self, args: dict[str, str]) -> None:
        parameters = Parameters(args)
        tokenizer = load_tokenizer(parameters.path("tokenizer_dir"))
        self._decode = decoder_of(tokenizer, parameters.flag("skip_special_tokens"))
        self._end_ids = set(parameters.integers("end_ids"))
        self._streams: OrderedDict[tuple[str, int, int], tuple[TextStream, float]] = OrderedDict()

    def execute(self, requests: list[Any]) -> list[Any]:
        self._forget()
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            tokens, lengths = input_of(request, "TOKENS_BATCH"), input_of(request, "SEQUENCE_LENGTH")
            texts = [
                self._text(request.request_id(), row, beam, tokens[row, beam, : lengths[row, beam]])
                for row in range(tokens.shape[0])
                for beam in range(tokens.shape[1])
            ]
        except (ValueError, IndexError) as error:
            return error_response(error)
        shaped = np.array([text.encode("utf-8") for text in texts], dtype=np.object_).reshape(tokens.shape[:2])
        return pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", shaped)])

    def _text(self, request_id: str, row: int, beam: int, tokens: Any) -> str:
        key = (request_id, row, beam)
        if len(tokens) > MAX_PENDING:
            # No piece of a stream is that long: a whole answer.
            self._streams.pop(key, None)
            return self._decode(tokens)
        if not request_id:
            return self._piece(tokens)
        stream, _ = self._streams.pop(key, (TextStream(self._decode), 0.0))
        text = stream.push(tokens)
        if any(int(token) in self._end_ids for token in tokens):
            return text + stream.finish()
        self._streams[key] = (stream, time.monotonic())
        return text

    def _piece(self, tokens: Any) -> str:
        """Of an unknown stream. Twice, since a sentencepiece decoder hides the space at the beginning."""
        once = self._decode(tokens)
        if len(tokens) != 1:
            return once
        twice = self._decode([*tokens, *tokens])
        return twice[len(once) :] if twice.startswith(once) else once

    def _forget(self) -> None:
        """Streams that nothing came of for long, the oldest first."""
        now = time.monotonic()
        while self._streams:
            key, (_, used) = next(iter(self._streams.items()))
            if now - used < _FORGET_AFTER_S and len(self._streams) <= _MAX_STREAMS:
                return
            del self._streams[key]
