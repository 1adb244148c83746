"""The five models in a real Triton, over the stand-in for the C++ backend, against the executor itself."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from multibyte import open_tokenizer, write_split_tokenizer
from triton_calls import Asker
from tritonclient.utils import InferenceServerException
from trtllm_engine import TINY_MIXTRAL

from trtbuild.engines.serving.client import WorkerClient
from trtbuild.engines.serving.launch import WorkerProcess
from trtbuild.engines.serving.request import RequestOutput, SamplingParams
from trtbuild.triton_repo.tensorrt_llm.options import TrtllmOptions

PROMPT = "ROMEO"
NUM_TOKENS = 24
TEXT_MODELS = ("ensemble", "tensorrt_llm_bls")
TOKENIZER = open_tokenizer(TINY_MIXTRAL / "tokenizer.json")


def answer_of(executor: WorkerClient, prompt: Any = PROMPT, **params: Any) -> RequestOutput:
    return executor.generate(prompt, SamplingParams(ignore_eos=True, **{"max_tokens": NUM_TOKENS, **params})).result()


def joined(parts: list[dict[str, Any]]) -> str:
    return "".join(one["text_output"] for one in parts)


@pytest.fixture(scope="module")
def served(serve: Callable[..., Any]) -> Any:
    return serve(TrtllmOptions())


@pytest.fixture
def ask(served: Any) -> Asker:
    return Asker(served.url, served.http)


@pytest.mark.parametrize("model", TEXT_MODELS)
def test_the_answer_is_the_executors(model: str, ask: Asker, executor: WorkerClient) -> None:
    expected = answer_of(executor).text
    whole = ask.all(model, text_input=PROMPT, max_tokens=NUM_TOKENS, exclude_input_in_output=True)
    assert [one["text_output"] for one in whole] == [expected]
    with_prompt = ask.all(model, text_input=PROMPT, max_tokens=NUM_TOKENS)
    assert joined(with_prompt) == PROMPT + expected
    parts = ask.all(model, text_input=PROMPT, max_tokens=NUM_TOKENS, stream=True)
    assert joined(parts) == expected
    assert len(parts) >= NUM_TOKENS
    events = ask.generate_stream(model, text_input=PROMPT, max_tokens=NUM_TOKENS, stream=True)
    assert joined(events) == expected
    assert ask.generate(model, text_input=PROMPT, max_tokens=NUM_TOKENS)["text_output"] == PROMPT + expected


def test_a_sampled_answer_is_the_executors(ask: Asker, executor: WorkerClient) -> None:
    sampling: dict[str, Any] = {"temperature": 0.9, "top_k": 20, "seed": 11}
    expected = answer_of(executor, **sampling).text
    assert expected != answer_of(executor).text
    for model in TEXT_MODELS:
        assert joined(ask.all(model, text_input=PROMPT, max_tokens=NUM_TOKENS, stream=True, **sampling)) == expected


@pytest.mark.parametrize("model", TEXT_MODELS)
def test_log_probabilities_and_counts(model: str, ask: Asker, executor: WorkerClient) -> None:
    logprobs = [one for one in answer_of(executor, logprobs=0).logprobs if one is not None]
    assert len(logprobs) == NUM_TOKENS
    asked: dict[str, Any] = {"text_input": PROMPT, "max_tokens": NUM_TOKENS, "return_log_probs": True}
    (whole,) = ask.all(model, **asked, return_num_input_tokens=True)
    assert np.allclose(whole["output_log_probs"], [[logprobs]], atol=1e-5)
    assert np.allclose(whole["cum_log_probs"], [[sum(logprobs)]], atol=1e-4)
    assert whole["num_input_tokens"] == [[len(TOKENIZER.encode(PROMPT).ids)]]
    parts = [one for one in ask.all(model, **asked, stream=True) if "output_log_probs" in one]
    assert np.allclose([one["output_log_probs"][0][0][0] for one in parts], logprobs, atol=1e-5)


@pytest.mark.parametrize("model", TEXT_MODELS)
def test_stop_words_end_the_answer_with_themselves(model: str, ask: Asker, executor: WorkerClient) -> None:
    text = answer_of(executor).text
    word = next(word for word in text.split()[2:] if text.count(word) == 1 and len(word) > 2)
    expected = text[: text.index(word) + len(word)]
    asked: dict[str, Any] = {"text_input": PROMPT, "max_tokens": NUM_TOKENS, "stop_words": ["nothere", word]}
    assert joined(ask.all(model, **asked, stream=True)) == expected
    assert joined(ask.all(model, **asked, exclude_input_in_output=True)) == expected


def test_the_bls_finds_stop_words_that_were_cut_otherwise(ask: Asker, served: Any, executor: WorkerClient) -> None:
    """Across the border of two words, where no token ends: the engine cannot see it, and is cancelled."""
    text = answer_of(executor, max_tokens=100).text
    at = text.index(" ", 20)
    word = text[at - 2 : at + 2]
    expected = text[: text.index(word) + len(word)]
    parts = ask.all("tensorrt_llm_bls", text_input=PROMPT, max_tokens=100, stop_words=[word], stream=True)
    assert joined(parts) == expected
    asked, stopped = served.requests()[-2:]
    assert stopped["values"]["stop"] == [True]
    assert stopped["id"] == asked["id"] != ""
    whole = ask.all("tensorrt_llm_bls", text_input=PROMPT, max_tokens=100, stop_words=[word])
    assert joined(whole) == PROMPT + expected


def test_what_the_engine_is_given(ask: Asker, served: Any, executor: WorkerClient) -> None:
    """Shapes as the backend wants them, and end_id of the tokenizer."""
    prompt_ids = TOKENIZER.encode(PROMPT).ids
    for model in TEXT_MODELS:
        bias = {"embedding_bias_words": ["the", "a"], "embedding_bias_weights": [-1.5, 2.0]}
        ask.all(model, text_input=PROMPT, max_tokens=2, bad_words=["the", "King"], top_k=3, **bias)
        asked = served.requests()[-1]
        values, shapes = asked["values"], asked["shapes"]
        assert values["input_ids"] == [prompt_ids]
        assert shapes["input_lengths"] == [[1], "int32"], "a scalar is reshaped"
        assert (values["input_lengths"], values["request_output_len"]) == ([len(prompt_ids)], [2])
        assert (values["end_id"], values["pad_id"], values["runtime_top_k"]) == ([2], [2], [3])
        ids, ends = values["bad_words_list"][0]
        forms = {
            tuple(TOKENIZER.encode(word, add_special_tokens=False).ids) for word in ("the", " the", "King", " King")
        }
        bounds = [0, *(end for end in ends if end != -1)]
        assert {tuple(ids[a:b]) for a, b in itertools.pairwise(bounds)} == forms
        assert len(ids) == len(ends) == bounds[-1]
        assert values["stop_words_list"] == [[[], []]]
        assert shapes["embedding_bias"] == [[1, 1024], "float32"]
        ask.all(model, text_input=PROMPT, max_tokens=2)
        assert served.requests()[-1]["shapes"]["embedding_bias"] == [[1, 0], "float32"]
    expected = answer_of(executor)
    end = next(i for i in expected.token_ids if expected.token_ids.count(i) == 1)
    parts = ask.all("ensemble", text_input=PROMPT, max_tokens=NUM_TOKENS, end_id=end, stream=True)
    assert len(parts) == expected.token_ids.index(end) + 1


def test_a_bad_word_is_not_said(ask: Asker, executor: WorkerClient) -> None:
    expected = answer_of(executor)
    word = next(word for word in expected.text.split() if TOKENIZER.encode(f" {word}", add_special_tokens=False).ids)
    for model in TEXT_MODELS:
        said = joined(ask.all(model, text_input=PROMPT, max_tokens=NUM_TOKENS, bad_words=[word], stream=True))
        assert said != expected.text
        assert word not in said.split()


@pytest.mark.parametrize("model", TEXT_MODELS)
def test_a_batch_is_told_apart(model: str, ask: Asker, executor: WorkerClient) -> None:
    prompts = [PROMPT, "JULIET speaks"]
    found = ask.all(
        model, text_input=[[one] for one in prompts], max_tokens=[[8], [8]], exclude_input_in_output=[[True], [True]]
    )
    texts = {one["batch_index"][0][0]: one["text_output"] for one in found}
    assert texts == {row: answer_of(executor, prompt, max_tokens=8).text for row, prompt in enumerate(prompts)}


@pytest.mark.parametrize("model", TEXT_MODELS)
def test_errors_say_what_is_wrong(model: str, ask: Asker) -> None:
    with pytest.raises(InferenceServerException, match=r"has 301 tokens; the engine takes 255 \(max_input_len\)"):
        ask.all(model, text_input="!" * 300, max_tokens=2)
    with pytest.raises(InferenceServerException, match="max_tokens\\) is 0, must be at least 1"):
        ask.all(model, text_input=PROMPT, max_tokens=0)
    with pytest.raises(InferenceServerException, match="not UTF-8 at byte 1"):
        ask.all(model, text_input=b"a\xff", max_tokens=2)
    with pytest.raises(InferenceServerException, match="must come together"):
        ask.all(model, text_input=PROMPT, max_tokens=2, embedding_bias_words=["a", "b"], embedding_bias_weights=[1.0])
    assert joined(ask.all(model, text_input=PROMPT, max_tokens=2))


def test_one_instance_of_the_bls_serves_many_at_once(ask: Asker, executor: WorkerClient, served: Any) -> None:
    prompts = [f"{name} says" for name in ("ROMEO", "JULIET", "HAMLET", "MACBETH")]
    expected = [answer_of(executor, prompt, max_tokens=60).text for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(
                lambda prompt: joined(ask.all("tensorrt_llm_bls", text_input=prompt, max_tokens=60, stream=True)),
                prompts,
            )
        )
    assert found == expected


def test_a_client_that_leaves_frees_the_engine(ask: Asker, served: Any) -> None:
    before = len(served.requests())
    ask.leave_after("tensorrt_llm_bls", 3, text_input=PROMPT, max_tokens=200)
    deadline = time.monotonic() + 20
    while not any("stop" in request["values"] for request in served.requests()[before:]):
        assert time.monotonic() < deadline, "the engine was not told"
        time.sleep(0.05)
    asked, stopped, *_ = served.requests()[before:]
    assert asked["id"] == stopped["id"]


@pytest.fixture(scope="module")
def split(serve: Callable[..., Any], worker: WorkerProcess, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(running repository, its tokenizer, the answer's ids, the characters that span tokens)"""
    prompt_ids = TOKENIZER.encode(PROMPT).ids
    with worker.connect() as client:
        answer = answer_of(client, max_tokens=60).token_ids
    file = tmp_path_factory.mktemp("split") / "tokenizer.json"
    characters = write_split_tokenizer(file, prompt_ids, answer)
    assert open_tokenizer(file).encode(PROMPT).ids == prompt_ids
    return serve(TrtllmOptions(), tokenizer=file), open_tokenizer(file), answer, characters


def test_characters_are_not_split(split: Any) -> None:
    served, tokenizer, answer, characters = split
    ask, expected = Asker(served.url, served.http), tokenizer.decode(answer)
    assert len(characters) >= 3 and all(one in expected for one in characters)
    asked: dict[str, Any] = {"text_input": PROMPT, "max_tokens": len(answer), "stream": True}
    for parts in (ask.all("tensorrt_llm_bls", **asked), ask.all("ensemble", request_id="one of a kind", **asked)):
        assert joined(parts) == expected
        assert not any("\ufffd" in part["text_output"] for part in parts)
    assert joined(ask.generate_stream("ensemble", id="another", **asked)) == expected
    # Nothing tells the pieces of an ensemble's streams apart but the id.
    assert "\ufffd" in joined(ask.all("ensemble", **asked))


def test_half_a_character_at_the_end(split: Any) -> None:
    """The BLS knows that no more comes, and says so as an answer in one piece does."""
    served, tokenizer, answer, _ = split
    ask = Asker(served.url, served.http)
    cut = next(n for n in range(1, len(answer)) if tokenizer.decode(answer[:n]).endswith("\ufffd"))
    expected = tokenizer.decode(answer[:cut])
    asked: dict[str, Any] = {"text_input": PROMPT, "max_tokens": cut}
    assert joined(ask.all("tensorrt_llm_bls", **asked, stream=True)) == expected
    assert joined(ask.all("tensorrt_llm_bls", **asked, exclude_input_in_output=True)) == expected


def test_a_prefix_a_chat_template_and_whole_texts(serve: Callable[..., Any], executor: WorkerClient) -> None:
    served = serve(TrtllmOptions(chat_template="messages", accumulate_tokens=True), prefix="tiny")
    ask = Asker(served.url, served.http)
    messages = [{"role": "user", "content": "What news from the king"}]
    expected = answer_of(executor, messages).text
    asked: dict[str, Any] = {"text_input": json.dumps(messages), "max_tokens": NUM_TOKENS, "stream": True}
    assert joined(ask.all("tiny_ensemble", **asked)) == expected
    parts = [one["text_output"] for one in ask.all("tiny_tensorrt_llm_bls", **asked)]
    assert parts[-1] == expected
    assert all(after.startswith(before) for before, after in itertools.pairwise(parts))
    # A stop word that the template writes before the answer does not end it.
    asked["stream"] = False
    whole = ask.all("tiny_tensorrt_llm_bls", **asked, stop_words=["HORATIO"])
    assert joined(whole).endswith(expected)
    assert joined(whole).count("HORATIO") == 1
    with pytest.raises(InferenceServerException, match="must be messages"):
        ask.all("tiny_ensemble", text_input="What news", max_tokens=2)


def test_without_decoupled_nothing_streams(serve: Callable[..., Any], executor: WorkerClient, tmp_path: Path) -> None:
    served = serve(TrtllmOptions(decoupled=False, exclude_input_in_output=True))
    ask = Asker(served.url, served.http)
    expected = answer_of(executor).text
    for model in TEXT_MODELS:
        assert ask.infer(model, text_input=PROMPT, max_tokens=NUM_TOKENS)["text_output"] == expected
    at = expected.index(" ", 5)
    word = expected[at - 2 : at + 2]
    cut = ask.infer("tensorrt_llm_bls", text_input=PROMPT, max_tokens=NUM_TOKENS, stop_words=[word])
    assert cut["text_output"] == expected[: expected.index(word) + len(word)]
    with pytest.raises(InferenceServerException, match="packaged without decoupled"):
        ask.infer("tensorrt_llm_bls", text_input=PROMPT, max_tokens=2, stream=True)
