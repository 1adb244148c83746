"""Values to Triton's input tensors, and its responses to pieces of text.

Responses are decoded by hand from their raw bytes: they come once per token, and numpy arrays of one element cost more
than the rest of the way.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tritonclient.grpc import InferInput

from trtbuild.triton_repo.openai.errors import ApiError, refused
from trtbuild.triton_repo.tensors import TEXT_INPUTS

_NUMPY: dict[str, Any] = {"INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": np.bool_}
_TENSORS = {tensor.name: tensor for tensor in TEXT_INPUTS}


@dataclass(frozen=True)
class Piece:
    """News of one sequence; the last one has its finish reason and the counts."""

    prompt_index: int
    sequence_index: int
    text: str
    logprobs: list[dict[str, Any]] | None = None
    """Per token: {"token", "token_id", "logprob", "top": [...]}; None where they were not asked for."""
    finish_reason: str | None = None
    num_prompt_tokens: int = 0
    num_tokens: int = 0


def infer_inputs(values: Mapping[str, Any]) -> list[InferInput]:
    """Tensors of shape [1, n] of one request. Raises `ApiError` for text that is not Unicode."""
    return [_infer_input(name, value) for name, value in values.items()]


def check_text(values: Mapping[str, Any]) -> None:
    """Raises `ApiError` for text that UTF-8 cannot write: half a surrogate pair, which JSON's \\u escapes can."""
    for name, value in values.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                try:
                    text.encode("utf-8")
                except UnicodeEncodeError as error:
                    raise refused(f"{name}: not valid Unicode at character {error.start}") from error


def _infer_input(name: str, value: Any) -> InferInput:
    items = value if isinstance(value, list) else [value]
    dtype = _TENSORS[name].dtype
    if dtype == "STRING":
        array = np.array([text.encode("utf-8") for text in items], dtype=object).reshape(1, -1)
    else:
        array = np.array(items, dtype=_NUMPY[dtype]).reshape(1, -1)
    tensor = InferInput(name, list(array.shape), "BYTES" if dtype == "STRING" else dtype)
    tensor.set_data_from_numpy(array)
    return tensor


def pieces_of(response: Any, several: bool) -> list[Piece]:
    """Of one ModelInferResponse: a piece per sequence in it; [] for an empty final response.

    `several`: of several prompts in one stream; the request's id ends with the prompt's index.
    """
    raw = {tensor.name: content for tensor, content in zip(response.outputs, response.raw_output_contents, strict=True)}
    if "text_output" not in raw:
        return []
    prompt_index = int(response.id.rpartition(":")[2]) if several else 0
    texts = _strings(raw["text_output"])
    count = len(texts)
    reasons = _strings(raw["finish_reason"]) if "finish_reason" in raw else [""] * count
    logprobs = _strings(raw["token_logprobs"]) if "token_logprobs" in raw else None
    sequences = _ints(raw["sequence_index"]) if "sequence_index" in raw else range(count)
    prompts = _ints(raw["num_input_tokens"]) if "num_input_tokens" in raw else [0] * count
    tokens = _ints(raw["num_output_tokens"]) if "num_output_tokens" in raw else [0] * count
    return [
        Piece(
            prompt_index,
            sequences[i],
            texts[i],
            None if logprobs is None else json.loads(logprobs[i] or "[]"),
            _finish_reason(reasons[i]),
            prompts[i],
            tokens[i],
        )
        for i in range(count)
    ]


def _finish_reason(reason: str) -> str | None:
    if reason in {"stop", "length", ""}:
        return reason or None
    raise ApiError(503, f"the engine ended the answer: {reason}")


def _strings(raw: bytes) -> list[str]:
    """Triton's BYTES: a little-endian length of four bytes before each element."""
    found, at = [], 0
    while at < len(raw):
        (length,) = struct.unpack_from("<I", raw, at)
        found.append(raw[at + 4 : at + 4 + length].decode("utf-8"))
        at += 4 + length
    return found


def _ints(raw: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(raw) // 4}i", raw)
