"""From the engine worker's token events to the output tensors of a Triton response.

Free of Triton: a response is a dict of numpy arrays by tensor name, each of shape [1, ...] for one sequence, or
[rows, sequences, ...] for a whole unary answer.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from trtbuild.engines.serving.request import RequestOutput, TokenEvent
from trtbuild.triton_repo.requests import Generation, ParsedRequest

Response = dict[str, np.ndarray]


def stream_response(
    request: ParsedRequest, generation: Generation, event: TokenEvent, output: RequestOutput
) -> Response:
    """One event of a stream; `output` is what was gathered up to it, it included."""
    part = RequestOutput(event.request_id)
    part.add(event)
    first = len(output.token_ids) == len(part.token_ids)
    return _response(request, [(generation, part, output)], tokens=isinstance(generation.echo, list), echo=first)


def whole_response(request: ParsedRequest, outputs: list[RequestOutput]) -> Response:
    """Everything at once: `outputs` in the order of the request's generations."""
    rows = [(generation, output, output) for generation, output in zip(request.generations, outputs, strict=True)]
    tokens = isinstance(request.generations[0].echo, list)
    return _response(request, rows, tokens=tokens, echo=True, whole=True)


def _response(
    request: ParsedRequest,
    rows: list[tuple[Generation, RequestOutput, RequestOutput]],
    *,
    tokens: bool,
    echo: bool,
    whole: bool = False,
) -> Response:
    """`rows`: (what was asked, what this response reports, what was made so far); `echo`: with what it begins with."""
    shape = (request.num_rows, request.num_sequences) if whole else (1, 1)
    parts = [part for _, part, _ in rows]
    found: Response = {}
    if tokens:
        ids = [[*(generation.echo if echo else []), *part.token_ids] for generation, part, _ in rows]
        found["output_ids"] = _padded(ids, shape, np.int32, fill=-1)
    else:
        texts = [(str(generation.echo) if echo else "") + part.text for generation, part, _ in rows]
        found["text_output"] = _strings(texts, shape)
    if not whole:
        found["batch_index"] = np.array([[rows[0][0].batch_index]], np.int32)
        found["sequence_index"] = np.array([[rows[0][0].sequence_index]], np.int32)
    if request.log_probs:
        found["output_log_probs"] = _padded([_numbers(part.logprobs) for part in parts], shape, np.float32, fill=0)
        # With every response: perf_analyzer 2.51 writes stray memory for a float that is not there.
        sums = [sum(_numbers(made.logprobs)) for _, _, made in rows]
        found["cum_log_probs"] = np.array(sums, np.float32).reshape(shape)
    if request.top_log_probs and not tokens:
        found["token_logprobs"] = _strings([json.dumps(_token_logprobs(part)) for part in parts], shape)
    if parts[0].finish_reason is not None:
        found |= _last_tensors([made for _, _, made in rows], shape)
    return found


def _last_tensors(outputs: list[RequestOutput], shape: tuple[int, int]) -> Response:
    """What only the end of a sequence knows."""
    lengths = [len(output.token_ids) for output in outputs]
    prompts = [output.usage.prompt_tokens if output.usage else 0 for output in outputs]
    return {
        "finish_reason": _strings([output.finish_reason or "" for output in outputs], shape),
        "sequence_length": np.array(lengths, np.int32).reshape(shape),
        "num_input_tokens": np.array(prompts, np.int32).reshape(shape),
        "num_output_tokens": np.array(lengths, np.int32).reshape(shape),
    }


def _token_logprobs(output: RequestOutput) -> list[dict[str, Any]]:
    found = []
    for index, token_id in enumerate(output.token_ids):
        top = zip(output.top_logprobs[index], output.top_texts[index], strict=True)
        found.append(
            {
                "token": output.token_texts[index],
                "token_id": token_id,
                "logprob": output.logprobs[index],
                "top": [{"token": text, "token_id": i, "logprob": value} for (i, value), text in top],
            }
        )
    return found


def _numbers(values: list[float | None]) -> list[float]:
    return [0.0 if value is None else value for value in values]


def _strings(texts: list[str], shape: tuple[int, int]) -> np.ndarray:
    return np.array([text.encode("utf-8") for text in texts], dtype=object).reshape(shape)


def _padded(rows: list[list[Any]], shape: tuple[int, int], dtype: Any, fill: int) -> np.ndarray:
    """[*shape, longest row]"""
    width = max(map(len, rows))
    full = np.full((len(rows), width), fill, dtype)
    for index, row in enumerate(rows):
        full[index, : len(row)] = row
    return full.reshape(*shape, width)
