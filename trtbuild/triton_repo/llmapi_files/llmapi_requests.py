"""From a Triton request's tensors to what TensorRT-LLM's LLM API takes. Free of Triton, TensorRT-LLM and trtbuild.

The tensors are those of trtbuild's text models, as far as the LLM API has them; the names that TensorRT-LLM's own
llmapi model has for the same things are taken too. Shapes are [1, ...]: one prompt in a request.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DEFAULT_MAX_TOKENS = 128
MAX_RETURN_SEQUENCES = 128


class RequestError(ValueError):
    """What is wrong with a request; the message names the tensor."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of the model; `parameter` is the field of SamplingParams that it sets, None where it is something else.

    `alias` is TensorRT-LLM's own name for it.
    """

    name: str
    dtype: str
    dims: tuple[int, ...] = (1,)
    parameter: str | None = None
    alias: str | None = None


def _plain(name: str, dtype: str, alias: bool = False) -> Tensor:
    return Tensor(name, dtype, parameter=name, alias=f"sampling_param_{name}" if alias else None)


INPUTS = (
    Tensor("text_input", "STRING"),
    Tensor("messages", "STRING"),
    Tensor("tools", "STRING"),
    Tensor("input_ids", "INT32", (-1,)),
    Tensor("stream", "BOOL", alias="streaming"),
    _plain("max_tokens", "INT32", alias=True),
    _plain("temperature", "FP32", alias=True),
    _plain("top_k", "INT32", alias=True),
    _plain("top_p", "FP32", alias=True),
    _plain("min_p", "FP32"),
    _plain("seed", "UINT64", alias=True),
    _plain("repetition_penalty", "FP32"),
    _plain("presence_penalty", "FP32", alias=True),
    _plain("frequency_penalty", "FP32", alias=True),
    _plain("min_tokens", "INT32"),
    _plain("ignore_eos", "BOOL"),
    _plain("end_id", "INT32"),
    _plain("pad_id", "INT32"),
    Tensor("num_return_sequences", "INT32", parameter="n"),
    Tensor("stop_words", "STRING", (-1,), "stop", "sampling_param_stop"),
    Tensor("bad_words", "STRING", (-1,), "bad"),
    Tensor("stop_token_ids", "INT32", (-1,), "stop_token_ids"),
    Tensor("guided_decoding_guide_type", "STRING"),
    Tensor("guided_decoding_guide", "STRING"),
    Tensor("return_log_probs", "BOOL"),
    Tensor("exclude_input_in_output", "BOOL", alias="sampling_param_exclude_input_from_output"),
)
OUTPUTS = (
    Tensor("text_output", "STRING", (-1,)),
    Tensor("sequence_length", "INT32", (-1,)),
    Tensor("cum_log_probs", "FP32", (-1,)),
    Tensor("output_log_probs", "FP32", (-1, -1)),
    Tensor("num_input_tokens", "INT32", (-1,)),
    Tensor("num_output_tokens", "INT32", (-1,)),
    Tensor("batch_index", "INT32", (-1,)),
    Tensor("sequence_index", "INT32", (-1,)),
    Tensor("finish_reason", "STRING", (-1,)),
)
NAMES = {name: tensor for tensor in INPUTS for name in (tensor.name, tensor.alias) if name is not None}
# Field of GuidedDecodingParams for each type of guide.
_GUIDES = {"json_schema": "json", "regex": "regex", "ebnf_grammar": "grammar", "structural_tag": "structural_tag"}
# Triton's own request parameters, which are not for the model.
_TRITON_PARAMETERS = frozenset(
    ("binary_data_output", "priority", "timeout", "sequence_id", "sequence_start", "sequence_end")
)


@dataclass(frozen=True)
class ParsedRequest:
    """One request: `prompt` is text, token ids, or messages; `sampling` and `guide` are keyword arguments."""

    prompt: str | list[Any]
    tools: list[Any] | None
    stream: bool
    sampling: dict[str, Any]
    guide: dict[str, Any] | None
    log_probs: bool
    echo: bool
    num_sequences: int

    @property
    def is_chat(self) -> bool:
        return isinstance(self.prompt, list) and bool(self.prompt) and isinstance(self.prompt[0], dict)


def check_parameters(parameters: Mapping[str, Any]) -> None:
    """Refuse what is no tensor: Triton's generate endpoint hands on unknown fields as parameters, and goes on."""
    unknown = sorted(name for name in parameters if name not in _TRITON_PARAMETERS and not name.startswith("triton_"))
    if unknown:
        hints = []
        for name in unknown:
            near = difflib.get_close_matches(name, NAMES)
            hints.append(f"{name} (did you mean {near[0]}?)" if near else name)
        known = ", ".join(sorted(tensor.name for tensor in INPUTS))
        raise RequestError(f"unknown field {', '.join(hints)}; known: {known}")


def parse_request(arrays: Mapping[str, Any], decoupled: bool) -> ParsedRequest:
    """`arrays`: numpy arrays of shape [1, *dims] by tensor name. Raises RequestError."""
    values = _named(arrays)
    if values.get("stream") and not decoupled:
        raise RequestError("stream: this model was packaged without streaming; package it again with it")
    log_probs = bool(values.get("return_log_probs", False))
    num_sequences = int(values.get("num_return_sequences", 1))
    if not 1 <= num_sequences <= MAX_RETURN_SEQUENCES:
        raise RequestError(f"num_return_sequences {num_sequences}: must be from 1 to {MAX_RETURN_SEQUENCES}")
    prompt = _prompt(values)
    tools = _json_list(values, "tools")
    is_text = isinstance(prompt, str)
    if tools is not None and values.get("messages") is None:
        raise RequestError("tools: needs messages")
    echo = not values.get("exclude_input_in_output", True)
    if echo and not is_text:
        raise RequestError("exclude_input_in_output false: only a text_input can be repeated in the output")
    return ParsedRequest(
        prompt, tools, bool(values.get("stream", False)), _sampling(values, log_probs), _guide(values), log_probs, echo,
        num_sequences,
    )  # fmt: skip


def _named(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Python values under our names; both names of one thing contradict each other."""
    values: dict[str, Any] = {}
    for name, array in arrays.items():
        tensor = NAMES[name]
        if tensor.name in values:
            raise RequestError(f"{tensor.name} and {tensor.alias} are the same; send one of them")
        values[tensor.name] = _value(tensor, array)
    return values


def _value(tensor: Tensor, array: Any) -> Any:
    items = array.reshape(-1).tolist()
    if tensor.dtype == "STRING":
        items = [_text(tensor.name, item) for item in items]
    if tensor.dims != (1,):
        return items
    if len(items) != 1:
        raise RequestError(f"{tensor.name}: {len(items)} values, one is needed")
    return items[0]


def _text(name: str, item: bytes | str) -> str:
    if isinstance(item, str):
        return item
    try:
        return item.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{name}: not valid UTF-8 at byte {error.start}") from error


def _prompt(values: Mapping[str, Any]) -> str | list[Any]:
    """Of text_input, messages and input_ids the one that was given."""
    messages, ids = _json_list(values, "messages"), values.get("input_ids")
    given = [name for name, value in (("messages", messages), ("input_ids", ids)) if value is not None]
    text = values.get("text_input", "")
    if len(given) + bool(text) > 1:
        raise RequestError(f"one prompt is needed: text_input must be empty where {' or '.join(given)} is given")
    if messages is not None:
        return messages
    if ids is not None:
        return ids
    if not text:
        raise RequestError("text_input: the prompt is empty")
    return text


def _json_list(values: Mapping[str, Any], name: str) -> list[Any] | None:
    text = values.get(name)
    if not text:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name}: not JSON: {error}") from error
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise RequestError(f"{name}: must be a JSON list of at least one object")
    return value


def _sampling(values: Mapping[str, Any], log_probs: bool) -> dict[str, Any]:
    """Keyword arguments of tensorrt_llm.SamplingParams."""
    sampling: dict[str, Any] = {"max_tokens": DEFAULT_MAX_TOKENS}
    for tensor in INPUTS:
        if tensor.parameter is not None and tensor.name in values:
            sampling[tensor.parameter] = values[tensor.name]
    if sampling["max_tokens"] < 1:
        raise RequestError(f"max_tokens {sampling['max_tokens']}: must be at least 1")
    if sampling.get("temperature", 1) < 0:
        raise RequestError(f"temperature {sampling['temperature']:g}: must not be negative")
    if sampling.get("temperature") == 0:
        # Greedy by every release's rule.
        del sampling["temperature"]
        sampling = {**sampling, "top_k": 1}
        sampling.pop("top_p", None)
    if log_probs:
        sampling["logprobs"] = 1
    return sampling


def _guide(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Keyword arguments of tensorrt_llm.llmapi.GuidedDecodingParams."""
    kind, text = values.get("guided_decoding_guide_type"), values.get("guided_decoding_guide")
    if not kind:
        if text:
            raise RequestError("guided_decoding_guide: needs guided_decoding_guide_type")
        return None
    if kind == "json":
        return {"json_object": True}
    if kind not in _GUIDES:
        raise RequestError(f"guided_decoding_guide_type {kind!r}: json, {', '.join(_GUIDES)} are known")
    if not text:
        raise RequestError(f"guided_decoding_guide: is empty, and {kind} needs one")
    return {_GUIDES[kind]: text}
