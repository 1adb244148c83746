"""A stand-in for the package `tensorrt_llm`: the documented interface of its LLM API, over no model.

An answer repeats the prompt's words, last one first, 20 ms a word. Like the real one, `generate_async` needs a running
event loop, its result yields itself with the text so far, and unknown arguments are refused.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tensorrt_llm.llmapi import GuidedDecodingParams  # pyright: ignore

STEP_S = 0.02
_KNOWN = {
    "backend", "tensor_parallel_size", "pipeline_parallel_size", "moe_expert_parallel_size", "max_batch_size",
    "max_num_tokens", "max_seq_len", "enable_chunked_prefill", "guided_decoding_backend", "kv_cache_config",
    "trust_remote_code",
}  # fmt: skip


@dataclass(kw_only=True)
class SamplingParams:
    """The fields of 1.3 that a request can set."""

    end_id: int | None = None
    pad_id: int | None = None
    max_tokens: int = 32
    bad: list[str] | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    n: int = 1
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    temperature: float | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logprobs: int | None = None
    guided_decoding: GuidedDecodingParams | None = None
    ignore_eos: bool = False
    add_special_tokens: bool = True

    def __post_init__(self) -> None:
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise ValueError(f"require 0 <= top_p <= 1, got top_p={self.top_p}")


@dataclass
class CompletionOutput:
    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None


class RequestOutput:
    """Yields itself after each token, and is what awaiting it gives."""

    def __init__(self, words: list[str], params: SamplingParams, failure: str | None) -> None:
        asyncio.get_running_loop()
        self.prompt_token_ids = list(range(len(words)))
        self.outputs = [CompletionOutput(index) for index in range(params.n)]
        self.finished = False
        self._words, self._params, self._failure, self._aborted = words[::-1], params, failure, False

    def abort(self) -> None:
        self._aborted = True

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        for position, word in enumerate(self._words[: self._params.max_tokens]):
            await asyncio.sleep(STEP_S)
            if self._failure:
                raise RuntimeError(self._failure)
            if self._aborted:
                _note({"aborted_after": position})
                return
            last = position + 1 == min(len(self._words), self._params.max_tokens)
            for output in self.outputs:
                output.text += (" " if output.text else "") + word
                output.token_ids.append(position + 7)
                if self._params.logprobs is not None:
                    output.logprobs.append({position + 7: Logprob(-0.5 * (position + 1), 1)})
                if last:
                    output.finish_reason = "stop" if position + 1 == len(self._words) else "length"
            self.finished = last
            yield self

    async def _last(self) -> RequestOutput:
        async for _ in self:
            pass
        return self

    def __await__(self) -> Generator[Any, None, RequestOutput]:
        return self._last().__await__()


class _Tokenizer:
    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool, **extra: Any
    ) -> str:
        assert not tokenize and add_generation_prompt
        tools = [f"[tools {len(extra['tools'])}]"] if "tools" in extra else []
        return " ".join([*tools, *(f"<{message['role']}> {message['content']}" for message in conversation)])


class LLM:
    def __init__(self, model: str, **arguments: Any) -> None:
        unknown = sorted(set(arguments) - _KNOWN)
        if unknown:
            raise ValueError(f"1 validation error for TorchLlmArgs: {unknown[0]}: Extra inputs are not permitted")
        if not (Path(model) / "config.json").is_file():
            raise FileNotFoundError(f"{model} is no checkpoint")
        self.tokenizer = _Tokenizer()
        leftover = [name for name in os.environ if name.startswith("OMPI_COMM_WORLD")]
        _note({"model": sorted(file.name for file in Path(model).iterdir()), "arguments": arguments, "mpi": leftover})

    def generate_async(
        self, inputs: str | list[int], sampling_params: SamplingParams | None = None, streaming: bool = False
    ) -> RequestOutput:
        params = sampling_params or SamplingParams()
        _note({"inputs": inputs, "params": asdict(params), "streaming": streaming})
        words = inputs.split() if isinstance(inputs, str) else [str(token) for token in inputs]
        return RequestOutput(words, params, "the GPU is on fire" if "explode" in words else None)

    def shutdown(self) -> None:
        _note({"shutdown": True})


def _note(what: dict[str, Any]) -> None:
    with open(os.environ["FAKE_LLMAPI_LOG"], "a", encoding="utf-8") as log:  # noqa: PTH123
        log.write(json.dumps(what) + "\n")
