"""Lines of a golden file: what each expectation accepts, which lines are bad, and who is at fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import TINY_QWEN2, executor_of

from trtbuild.accuracy.golden import answer_all, judge, read_golden, summary
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.checkpoints.tokenizer import load_tokenizer
from trtbuild.errors import CheckpointError, Refused


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TINY_QWEN2)


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


@pytest.mark.parametrize(
    ("expectation", "expected", "good", "bad"),
    [
        ("exact", "four", " four\n", "four."),
        ("contains", "four", "it is four.", "Four"),
        ("regex", r"^\d{2}$", "42", "420"),
        ("json_schema", {"type": "object", "required": ["a"]}, ' {"a": 1}', '{"b": 1}'),
        ("json_schema", {"type": "integer", "minimum": 3}, "3", "3 apples"),
    ],
)
def test_expectations(tmp_path: Path, tokenizer: Any, expectation: str, expected: Any, good: str, bad: str) -> None:
    [question] = read_golden(write(tmp_path / "g", {"prompt": "2+2", expectation: expected}), tokenizer, 100)
    assert question.passes(good)
    assert not question.passes(bad)


def test_all_bad_lines_are_listed_at_once(tmp_path: Path, tokenizer: Any) -> None:
    file = write(
        tmp_path / "g",
        {"prompt": "fine", "exact": "fine"},
        "[1, 2]",
        {"prompt": "a", "messages": [], "exact": "b"},
        {"prompt": "a", "exact": "b", "contains": "c"},
        {"prompt": "a", "regex": "*"},
        {"prompt": "a", "json_schema": {"type": "nothing"}},
        {"prompt": "a", "exact": "b", "max_tokens": 0},
        {"prompt": "a", "exact": "b", "temperature": 1},
        {"prompt": "word " * 400, "exact": "b"},
        {"id": "x", "prompt": "a", "exact": "b"},
        {"id": "x", "prompt": "a", "exact": "b"},
    )
    with pytest.raises(Refused) as caught:
        read_golden(file, tokenizer, 100)
    message = caught.value.message
    for part in (
        "line 2: must be a JSON object, not list", 'line 3: give one of "prompt" and "messages"',
        "line 4: give exactly one of exact, regex, contains, json_schema", "line 5: \"regex\" '*': nothing to repeat",
        "line 6: \"json_schema\" is not a schema", "line 7: \"max_tokens\" is 0", "line 8: unknown key 'temperature'",
        "line 9: the prompt has", "(max_input_len)", "id 'x' is there 2 times",
    ):  # fmt: skip
        assert part in message
    assert "line 1:" not in message
    with pytest.raises(Refused, match="no lines"):
        read_golden(write(tmp_path / "empty", "", ""), tokenizer, 100)
    with pytest.raises(CheckpointError, match="not a readable UTF-8 file"):
        read_golden(tmp_path / "missing", tokenizer, 100)


def test_only_what_the_source_can_do_is_held_against_the_engine(tmp_path: Path, tokenizer: Any) -> None:
    questions = read_golden(write(tmp_path / "g", *({"prompt": "a", "exact": "yes"} for _ in range(4))), tokenizer, 100)
    lines = judge(questions, ["yes", "no", "yes", "no"], ["yes", "yes", "no", "no"])
    assert [line["gates"] for line in lines] == [False, True, False, False]
    assert summary(lines) == {
        "questions": 4, "engine_passed": 2, "source_passed": 2, "both_failed": 1, "gating": 1
    }  # fmt: skip
    alone = judge(questions, ["yes", "no", "yes", "no"], None)
    assert [line["gates"] for line in alone] == [False, True, False, True]
    assert [line["source_passed"] for line in alone] == [None] * 4


def test_answers_are_greedy_and_end_where_they_should(tmp_path: Path, tokenizer: Any) -> None:
    """The batch of the scheduler answers as one prompt after the other does, at their own lengths."""
    source = CheckpointSource.open(str(TINY_QWEN2))
    asked = [{"prompt": text, "max_tokens": n, "contains": ""} for text, n in (("ROMEO", 3), ("JULIET", 9), ("The", 5))]
    questions = read_golden(write(tmp_path / "g", *asked), tokenizer, 100)
    together = answer_all(executor_of(source, max_batch_size=2), questions, tokenizer, ())
    alone = [answer_all(executor_of(source), [question], tokenizer, ())[0] for question in questions]
    assert together == alone
    encoded = [len(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in together]
    assert encoded[0] <= 3 < encoded[1] <= 9
