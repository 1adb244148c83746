"""From tensors to generations and back, without Triton."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from trtbuild.engines.serving.request import RequestOutput, TokenEvent, Usage
from trtbuild.errors import Refused
from trtbuild.triton_repo.requests import check_parameters, parse_request
from trtbuild.triton_repo.responses import stream_response, whole_response
from trtbuild.triton_repo.tensors import inputs_of

_NUMPY: dict[str, Any] = {"INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": np.bool_}


def tensors(kind: Any = "text", **rows: list[Any]) -> dict[str, np.ndarray]:
    """Each value: one item per row of the batch."""
    table = {tensor.name: tensor for tensor in inputs_of(kind)}
    found = {}
    for name, values in rows.items():
        full = [value if table[name].is_list else [value] for value in values]
        if table[name].dtype == "STRING":
            encoded = [[text if isinstance(text, bytes) else text.encode() for text in row] for row in full]
            found[name] = np.array(encoded, dtype=object)
        else:
            found[name] = np.array(full, dtype=_NUMPY[table[name].dtype])
    return found


def test_every_row_is_a_generation_with_its_own_parameters() -> None:
    parsed = parse_request(
        tensors(text_input=["a", "b"], max_tokens=[3, 4], temperature=[0.5, 0.0], stop_words=[["x", "y"], ["z", "w"]]),
        "text",
    )
    assert (parsed.num_rows, parsed.num_sequences, parsed.stream) == (2, 1, False)
    first, second = parsed.generations
    assert (first.prompt, first.params.max_tokens, first.params.temperature) == ("a", 3, 0.5)
    assert (second.prompt, second.params.stop, second.batch_index) == ("b", ("z", "w"), 1)


def test_defaults_and_the_seed_of_each_sequence() -> None:
    (only,) = parse_request(tensors(text_input=["a"]), "text", deadline_s=1.5).generations
    assert (only.params.max_tokens, only.params.temperature, only.params.deadline_s) == (128, 0.0, 1.5)
    parsed = parse_request(tensors(text_input=["a"], seed=[2**64 - 1], num_return_sequences=[2]), "text")
    assert [generation.params.seed for generation in parsed.generations] == [2**64 - 1, 0]


def test_token_level_words() -> None:
    values = tensors("tokens", input_ids=[[1, 2, 3]], bad_words_list=[[[5, 6, 7, 0], [2, 3, -1, -1]]], end_id=[9])
    (only,) = parse_request(values, "tokens").generations
    assert only.prompt == [1, 2, 3]
    assert only.params.bad_token_ids == ((5, 6), (7,))
    assert only.params.stop_token_ids == (9,)
    assert only.echo == [1, 2, 3]


@pytest.mark.parametrize(
    ("kind", "rows", "names"),
    [
        ("unary", {"text_input": ["a"], "stream": [True]}, "stream: this model answers once"),
        ("text", {"text_input": [b"a\xff"]}, "text_input: not valid UTF-8 at byte 1"),
        ("text", {"text_input": ["a", "b"], "stream": [True, False]}, "stream must be the same in every row"),
        ("tokens", {"input_ids": [[1]], "input_lengths": [2]}, "input_lengths 2"),
        ("tokens", {"input_ids": [[1]], "stop_words_list": [[[4, 5], [2, -1]]]}, "only single tokens stop"),
        ("tokens", {"input_ids": [[1]], "bad_words_list": [[[4, 5], [2, 1]]]}, "ends [2, 1] must grow"),
        ("text", {"text_input": [""], "input_ids": [[1]], "exclude_input_in_output": [False]}, "only a text_input"),
    ],
)
def test_refused(kind: Any, rows: dict[str, Any], names: str) -> None:
    with pytest.raises(Refused) as refused:
        parse_request(tensors(kind, **rows), kind)
    assert names in refused.value.message


def test_parameters_that_are_no_tensors() -> None:
    check_parameters({"triton_final_response": True, "priority": 1, "timeout": 5}, "text")
    with pytest.raises(Refused, match=r"temprature .did you mean temperature"):
        check_parameters({"temprature": 1}, "text")


def finished(text: str, ids: list[int]) -> RequestOutput:
    output = RequestOutput("x")
    for index, token in enumerate(ids):
        last = index == len(ids) - 1
        usage = Usage(4, len(ids), 0, 0.0, 0.0, 0.0) if last else None
        event = TokenEvent(
            "x", token, text if last else "", logprob=-0.5, top_logprobs=((token, -0.5),), token_text="t",
            top_texts=("t",), finish_reason="stop" if last else None, usage=usage,
        )  # fmt: skip
        output.add(event)
    return output


def test_a_whole_answer_has_rows_and_sequences() -> None:
    values = tensors(
        text_input=["a", "b"], num_return_sequences=[2, 2], return_log_probs=[True, True], num_top_logprobs=[1, 1],
        exclude_input_in_output=[False, False],
    )  # fmt: skip
    parsed = parse_request(values, "text")
    outputs = [finished(f"-{index}", [7] * (index + 1)) for index in range(4)]
    found = whole_response(parsed, outputs)
    assert found["text_output"].tolist() == [[b"a-0", b"a-1"], [b"b-2", b"b-3"]]
    assert found["sequence_length"].tolist() == [[1, 2], [3, 4]]
    assert found["output_log_probs"].shape == (2, 2, 4)
    assert found["cum_log_probs"].tolist() == [[-0.5, -1.0], [-1.5, -2.0]]
    assert [len(json.loads(text)) for text in found["token_logprobs"].reshape(-1)] == [1, 2, 3, 4]
    assert found["num_input_tokens"].tolist() == [[4, 4], [4, 4]]


def test_a_streamed_answer_repeats_its_input_once() -> None:
    parsed = parse_request(tensors(text_input=["in"], stream=[True], exclude_input_in_output=[False]), "text")
    output, texts = RequestOutput("x"), []
    for text in ("a", "b"):
        event = TokenEvent("x", 5, text)
        output.add(event)
        texts.append(stream_response(parsed, parsed.generations[0], event, output)["text_output"].item())
    assert texts == [b"ina", b"b"]
