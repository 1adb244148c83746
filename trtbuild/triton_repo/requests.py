"""From a Triton request's tensors to generations: one per row of the batch and returned sequence.

Free of Triton: the values come as numpy arrays. Every bad value is a `Refused` that names its tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

import numpy as np

from trtbuild.engines.serving.request import SamplingParams
from trtbuild.errors import Refused
from trtbuild.triton_repo.tensors import DEFAULT_MAX_TOKENS, ModelKind, Tensor, inputs_of

Prompt = str | list[int] | list[dict[str, Any]]
MAX_RETURN_SEQUENCES = 128
# Triton's own request parameters, which are not for the model.
_TRITON_PARAMETERS = frozenset({
    "binary_data_output", "priority", "timeout", "sequence_id", "sequence_start", "sequence_end",
})  # fmt: skip


@dataclass(frozen=True)
class Generation:
    """One answer to make; `echo` is what the answer begins with, where the request wants its input in the output."""

    prompt: Prompt
    params: SamplingParams
    tools: list[dict[str, Any]] | None
    batch_index: int
    sequence_index: int
    echo: str | list[int]


@dataclass(frozen=True)
class ParsedRequest:
    """A whole request: what to generate and how to answer."""

    generations: list[Generation]
    num_rows: int
    num_sequences: int
    stream: bool
    log_probs: bool
    top_log_probs: bool


def parse_request(values: Mapping[str, np.ndarray], kind: ModelKind, deadline_s: float | None = None) -> ParsedRequest:
    """`values`: arrays of shape [batch, *dims] by tensor name. Raises `Refused`, for all rows together."""
    table = {tensor.name: tensor for tensor in inputs_of(kind)}
    sizes = {name: len(array) for name, array in values.items()}
    if len(set(sizes.values())) != 1:
        raise Refused(f"the tensors have different batch sizes: {sizes}")
    num_rows = next(iter(sizes.values()))
    rows = [
        _Row({name: _row_value(table[name], array[index]) for name, array in values.items()}, kind, deadline_s)
        for index in range(num_rows)
    ]
    first = rows[0]
    for name in ("stream", "num_sequences", "log_probs"):
        if len({getattr(row, name) for row in rows}) > 1:
            raise Refused(f"{name} must be the same in every row of a batch")
    generations = [generation for index, row in enumerate(rows) for generation in row.generations(index)]
    return ParsedRequest(
        generations, num_rows, first.num_sequences, first.stream, first.log_probs, first.params.logprobs is not None
        and "num_top_logprobs" in values,
    )  # fmt: skip


def check_parameters(parameters: Mapping[str, Any], kind: ModelKind) -> None:
    """Refuse what is no tensor: Triton's generate endpoint hands on unknown fields as parameters, and goes on."""
    unknown = sorted(name for name in parameters if name not in _TRITON_PARAMETERS and not name.startswith("triton_"))
    if not unknown:
        return
    known = [tensor.name for tensor in inputs_of(kind)]
    hints = [
        f"{name} (did you mean {near[0]}?)" if (near := get_close_matches(name, known)) else name for name in unknown
    ]
    raise Refused(f"unknown field {', '.join(hints)}; known: {', '.join(sorted(known))}")


class _Row:
    """One row's values."""

    def __init__(self, values: Mapping[str, Any], kind: ModelKind, deadline_s: float | None) -> None:
        self._values = values
        self.stream = bool(values.get("streaming" if kind == "tokens" else "stream", False))
        self.log_probs = bool(values.get("return_log_probs", False))
        self.num_sequences = int(values.get("num_return_sequences", 1))
        self._check_counts(kind)
        self.params = self._sampling_params(kind, deadline_s)
        self.prompt = _token_prompt(values) if kind == "tokens" else _text_prompt(values)
        self.tools = _json_list(values, "tools")
        if self.tools is not None and not _is_chat(self.prompt):
            raise Refused("tools: needs messages")
        exclude = bool(values.get("exclude_input_in_output", kind != "tokens"))
        if not exclude and kind != "tokens" and not isinstance(self.prompt, str):
            raise Refused("exclude_input_in_output false: only a text_input can be repeated in the output")
        empty: str | list[int] = [] if kind == "tokens" else ""
        self._echo: Any = empty if exclude else self.prompt

    def generations(self, batch_index: int) -> list[Generation]:
        """With a seed, the sequences of a row take seed, seed + 1, ...; otherwise each its own random one."""
        found = []
        for index in range(self.num_sequences):
            params = self.params
            if params.seed is not None:
                params = replace(params, seed=(params.seed + index) % 2**64)
            found.append(Generation(self.prompt, params, self.tools, batch_index, index, self._echo))
        return found

    def _check_counts(self, kind: ModelKind) -> None:
        beams = self._values.get("beam_width", 1)
        if beams != 1:
            raise Refused(f"beam_width {beams}: this executor has no beam search; leave it out, or send 1")
        if not 1 <= self.num_sequences <= MAX_RETURN_SEQUENCES:
            raise Refused(f"num_return_sequences {self.num_sequences}: must be from 1 to {MAX_RETURN_SEQUENCES}")
        if kind == "unary" and self.stream:
            raise Refused("stream: this model answers once; the model of the engine's own name streams")

    def _sampling_params(self, kind: ModelKind, deadline_s: float | None) -> SamplingParams:
        known = {field.name for field in fields(SamplingParams)}
        given: dict[str, Any] = {"max_tokens": DEFAULT_MAX_TOKENS}
        for tensor in inputs_of(kind):
            if tensor.parameter is not None and tensor.name in self._values:
                given[tensor.parameter] = self._values[tensor.name]
        stop_ids = list(given.get("stop_token_ids", ()))
        if "end_id" in self._values and self._values["end_id"] >= 0:
            stop_ids.append(self._values["end_id"])
        for word in _word_ids(self._values, "stop_words_list"):
            if len(word) != 1:
                raise Refused(
                    f"stop_words_list: {word} has {len(word)} tokens; only single tokens stop a token-level "
                    "request, the text models stop at stop_words of any length"
                )
            stop_ids += word
        bad_ids = _word_ids(self._values, "bad_words_list")
        given |= {"stop_token_ids": stop_ids} if stop_ids else {}
        given |= {"bad_token_ids": tuple(map(tuple, bad_ids))} if bad_ids else {}
        given |= {"deadline_s": deadline_s} if deadline_s else {}
        if self.log_probs:
            given.setdefault("logprobs", 0)
        return SamplingParams.from_dict({name: value for name, value in given.items() if name in known})


def _row_value(tensor: Tensor, row: np.ndarray) -> Any:
    """A Python value: a scalar for dims [1], else a list."""
    if tensor.dtype == "STRING":
        texts = [_text(tensor.name, item) for item in row.reshape(-1)]
        return texts if tensor.is_list else texts[0] if texts else ""
    if tensor.dims == (2, -1):
        return row.reshape(2, -1).tolist()
    values = row.reshape(-1).tolist()
    return values if tensor.is_list else values[0]


def _text(name: str, item: bytes | str) -> str:
    if isinstance(item, str):
        return item
    try:
        return item.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused(f"{name}: not valid UTF-8 at byte {error.start}") from error


def _text_prompt(values: Mapping[str, Any]) -> Prompt:
    """Of text_input, messages and input_ids the one that was given."""
    messages, ids = _json_list(values, "messages"), values.get("input_ids")
    given = [name for name, value in (("messages", messages), ("input_ids", ids)) if value is not None]
    text = values.get("text_input", "")
    if len(given) + bool(text) > 1:
        raise Refused(f"one prompt is needed: text_input must be empty where {' or '.join(given)} is given")
    if messages is not None:
        return messages
    if ids is not None:
        return ids
    if not text:
        raise Refused("text_input: the prompt is empty")
    return text


def _token_prompt(values: Mapping[str, Any]) -> list[int]:
    ids = values.get("input_ids", [])
    length = values.get("input_lengths", len(ids))
    if not 1 <= length <= len(ids):
        raise Refused(f"input_lengths {length}: input_ids has {len(ids)} tokens; must be from 1 to that")
    return ids[:length]


def _is_chat(prompt: Prompt) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)


def _json_list(values: Mapping[str, Any], name: str) -> list[dict[str, Any]] | None:
    """A tensor that holds a JSON list of objects; None where it is absent or empty."""
    text = values.get(name)
    if not text:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{name}: not JSON: {error}") from error
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise Refused(f"{name}: must be a JSON list of at least one object")
    return value


def _word_ids(values: Mapping[str, Any], name: str) -> list[list[int]]:
    """TensorRT-LLM's [2, n] form: the tokens of all words, and the end of each word, padded with -1."""
    if name not in values:
        return []
    tokens, ends = values[name]
    words: list[list[int]] = []
    start = 0
    for end in _before_padding(ends):
        if not start < end <= len(tokens):
            raise Refused(f"{name}: ends {ends} must grow and stay within the {len(tokens)} tokens")
        words.append(tokens[start:end])
        start = end
    return words


def _before_padding(ends: Sequence[int]) -> list[int]:
    found: list[int] = []
    for end in ends:
        if end < 0:
            break
        found.append(end)
    return found
