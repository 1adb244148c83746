"""From a validated body to what Triton is asked: one `TritonRequest` per prompt; contradictions are refused here."""

from __future__ import annotations

import json
from typing import Any

from trtbuild.triton_repo.openai.errors import refused, unsupported
from trtbuild.triton_repo.openai.messages import template_messages
from trtbuild.triton_repo.openai.schemas import INT32, ChatBody, CompletionBody, SamplingBody
from trtbuild.triton_repo.openai.tool_schemas import forced_guide
from trtbuild.triton_repo.openai.triton_client import TritonRequest

MAX_PROMPTS = 128
# OpenAI's default for plain completions; a chat answer goes on until the slot is full.
COMPLETION_MAX_TOKENS = 16

# Fields that are accepted only where they ask for what happens anyway: (accepted values, why not).
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "logit_bias": (({},), "tokens cannot be biased"),
    "store": ((False,), "nothing is kept"),
    "service_tier": (("auto", "default"), "there is one tier"),
    "modalities": ((["text"],), "answers are text"),
    "audio": ((), "answers are text"),
    "prediction": ((), "there is no predicted output"),
    "reasoning_effort": ((), "the model's own template decides"),
    "verbosity": (("medium",), "the model decides"),
    "web_search_options": ((), "there is no web search"),
    "functions": (([],), "deprecated; use tools"),
    "function_call": (("none",), "deprecated; use tool_choice"),
    "echo": ((False,), "the prompt is not repeated"),
    "suffix": (("",), "text is not inserted"),
    "best_of": ((1,), "use n"),
}


def chat_requests(body: ChatBody, timeout_s: float | None) -> list[TritonRequest]:
    """The one request of a chat completion."""
    _check(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise refused("top_logprobs needs logprobs: true", "top_logprobs")
    if None not in {body.max_tokens, body.max_completion_tokens} and body.max_tokens != body.max_completion_tokens:
        raise refused("max_tokens and max_completion_tokens differ: give one", "max_tokens")
    values = _sampling(body)
    values["max_tokens"] = body.max_completion_tokens or body.max_tokens or INT32
    _check_min_tokens(body, values["max_tokens"])
    if body.logprobs:
        values["num_top_logprobs"] = body.top_logprobs or 0
    values |= _tools(body) or _response_format(body)
    values |= {"text_input": "", "messages": _json(template_messages(body.messages), "messages")}
    return [TritonRequest(body.model, values, body.n, timeout_s)]


def completion_requests(body: CompletionBody, timeout_s: float | None) -> list[TritonRequest]:
    """One request per prompt, in the order given."""
    _check(body)
    values = _sampling(body)
    values["max_tokens"] = body.max_tokens or COMPLETION_MAX_TOKENS
    _check_min_tokens(body, values["max_tokens"])
    if body.logprobs is not None:
        values["num_top_logprobs"] = body.logprobs
    return [TritonRequest(body.model, values | prompt, body.n, timeout_s) for prompt in _prompts(body)]


def _check(body: SamplingBody) -> None:
    for name, (accepted, why) in UNSUPPORTED.items():
        value = getattr(body, name, None)
        if value is not None and value not in accepted:
            raise unsupported(name, why)
    if body.stream_options is not None and not body.stream:
        raise refused("stream_options needs stream: true", "stream_options")


def _check_min_tokens(body: SamplingBody, max_tokens: int) -> None:
    if body.min_tokens > max_tokens:
        raise refused(f"min_tokens {body.min_tokens} exceeds max_tokens {max_tokens}", "min_tokens")


def _sampling(body: SamplingBody) -> dict[str, Any]:
    """Values of the optional tensors; those at the engine's defaults are left out."""
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    optional = {
        "top_p": (body.top_p, 1.0),
        "min_p": (body.min_p, 0.0),
        "top_k": (max(body.top_k, 0), 0),
        "repetition_penalty": (body.repetition_penalty, 1.0),
        "presence_penalty": (body.presence_penalty, 0.0),
        "frequency_penalty": (body.frequency_penalty, 0.0),
        "min_tokens": (body.min_tokens, 0),
        "ignore_eos": (body.ignore_eos, False),
        "stop_words": (stop, []),
        "stop_token_ids": (body.stop_token_ids, []),
        "bad_words": (body.bad_words, []),
        # The tensor is unsigned: the same 64 bits.
        "seed": (None if body.seed is None else body.seed % 2**64, None),
        "num_return_sequences": (body.n, 1),
    }
    values = {name: value for name, (value, default) in optional.items() if value != default}
    return values | {"temperature": body.temperature, "stream": body.stream}


def _tools(body: ChatBody) -> dict[str, Any]:
    """Tensors for tools; {} where no tool can be called."""
    if body.tools is None:
        if body.tool_choice not in {None, "none"} or not isinstance(body.tool_choice, (str, type(None))):
            raise refused("tool_choice needs tools", "tool_choice")
        return {}
    names = [tool.function.name for tool in body.tools]
    if len(set(names)) != len(names):
        raise refused("two tools have the same name", "tools")
    choice = body.tool_choice or "auto"
    if choice == "none" or not names:
        return {}
    if body.response_format is not None and body.response_format.type != "text":
        raise refused("response_format and tools exclude each other; set tool_choice to none", "response_format")
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools]
    values: dict[str, Any] = {"tools": _json(tools, "tools")}
    guide = forced_guide(body.tools, choice, body.parallel_tool_calls)
    return values | ({} if guide is None else _guide(guide, "tools"))


def _response_format(body: ChatBody) -> dict[str, Any]:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return {}
    if wanted.type == "json_schema" and wanted.json_schema is None:
        raise refused("response_format.json_schema is missing", "response_format.json_schema")
    if wanted.json_schema is None or wanted.json_schema.json_schema is None:
        # Any object.
        return {"guided_decoding_guide_type": "json"}
    return _guide(wanted.json_schema.json_schema, "response_format.json_schema.schema")


def _guide(schema: dict[str, Any], param: str) -> dict[str, Any]:
    return {"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": _json(schema, param)}


def _prompts(body: CompletionBody) -> list[dict[str, Any]]:
    """Tensors of each prompt: {"text_input"}, or {"text_input": "", "input_ids"}."""
    prompt: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if prompt and isinstance(prompt[0], int):
        prompt = [prompt]
    if not prompt or any(len(one) == 0 for one in prompt):
        raise refused("the prompt is empty", "prompt")
    if len(prompt) > MAX_PROMPTS:
        raise refused(f"{len(prompt)} prompts in one request: at most {MAX_PROMPTS}", "prompt")
    return [{"text_input": one} if isinstance(one, str) else {"text_input": "", "input_ids": one} for one in prompt]


def _json(value: Any, param: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise refused(f"{param} cannot be written as JSON: {error}", param) from error
    return text
