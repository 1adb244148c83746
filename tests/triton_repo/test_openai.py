"""The official OpenAI client against `trtbuild serve`: front end, Triton and engine worker, all real."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from fake_worker import TOKENIZER, alone
from served import Service

from trtbuild.engines.serving.request import SamplingParams
from trtbuild.triton_repo.triton_process import Ports

MESSAGES: list[Any] = [{"role": "user", "content": "Who is there? 你好"}]


@pytest.fixture(scope="module")
def api(serve: Callable[..., Service], tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("sesame\n")
    port = Ports.free().http
    serve("--openai-port", str(port), "--api-key-file", str(keys))
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="sesame", max_retries=0) as client:
        yield client


def test_models_and_keys(api: openai.OpenAI) -> None:
    assert [model.id for model in api.models.list()] == ["mixtral"]
    with pytest.raises(openai.AuthenticationError):
        api.with_options(api_key="wrong").models.list()


def test_a_chat_is_the_engines_answer(api: openai.OpenAI) -> None:
    ids = TOKENIZER.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=False)
    params = SamplingParams(max_tokens=20, temperature=0.8, seed=3, ignore_eos=True)
    expected = alone(list(ids), params)
    asked: dict[str, Any] = {"model": "mixtral", "messages": MESSAGES, "max_tokens": 20, "temperature": 0.8, "seed": 3}
    whole = api.chat.completions.create(**asked, extra_body={"ignore_eos": True})
    assert whole.choices[0].message.content == expected.text
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), 20)
    options: Any = {"include_usage": True}
    chunks = list(
        api.chat.completions.create(**asked, stream=True, stream_options=options, extra_body={"ignore_eos": True})
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected.text
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 20


def test_a_completion_with_log_probabilities(api: openai.OpenAI) -> None:
    expected = alone("Log", SamplingParams(max_tokens=5, logprobs=2, ignore_eos=True))
    answer = api.completions.create(
        model="mixtral", prompt="Log", max_tokens=5, temperature=0, logprobs=2, extra_body={"ignore_eos": True}
    )
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.token_logprobs == pytest.approx(expected.logprobs)
    assert answer.choices[0].text == expected.text


def test_a_json_schema_and_errors(api: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    answer = api.chat.completions.create(
        model="mixtral", messages=MESSAGES, max_tokens=200, temperature=1, seed=1,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
    )  # fmt: skip
    assert list(json.loads(answer.choices[0].message.content or "")) == ["n"]
    with pytest.raises(openai.BadRequestError, match="at most 399"):
        api.completions.create(model="mixtral", prompt="word " * 1000)
    with pytest.raises(openai.NotFoundError):
        api.completions.create(model="mixtral-unary", prompt="x")
