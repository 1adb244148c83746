"""`--golden FILE.jsonl`: the user's own questions, with what an answer must be.

A line is {"prompt": text} or {"messages": [...]}, an optional "id" and "max_tokens" (128), and exactly one expectation:
"exact" (the answer without surrounding white space), "regex" (found anywhere), "contains", or "json_schema" (the whole
answer is JSON that the schema accepts). Answers are greedy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtbuild.engines.executor import Executor
from trtbuild.engines.serving.detokenizer import decoder_of
from trtbuild.engines.serving.prompts import prompt_token_ids
from trtbuild.engines.serving.request import Request, SamplingParams
from trtbuild.engines.serving.scheduler import Scheduler
from trtbuild.errors import CheckpointError, Refused, refuse_all

EXPECTATIONS = ("exact", "regex", "contains", "json_schema")
DEFAULT_MAX_TOKENS = 128
_KEYS = ("id", "prompt", "messages", "max_tokens", *EXPECTATIONS)


@dataclass(frozen=True)
class Question:
    """A checked line; `passes` tells whether an answer is as expected."""

    id: str
    asked: dict[str, Any]
    max_tokens: int
    expectation: str
    expected: Any
    passes: Callable[[str], bool] = field(repr=False)
    token_ids: list[int] = field(default_factory=list)


def read_golden(file: Path, tokenizer: Any, max_input_len: int) -> list[Question]:
    """All lines; raises Refused that lists every bad one with its number and what it may be."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"--golden {file}: not a readable UTF-8 file ({error})") from error
    questions, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            questions.append(_parse(line, f"{number}", tokenizer, max_input_len))
        except (Refused, _BadLineError) as error:
            problems.append(f"line {number}: {error}")
    ids = [question.id for question in questions]
    problems += [f"id {name!r} is there {ids.count(name)} times" for name in dict.fromkeys(ids) if ids.count(name) > 1]
    refuse_all(f"--golden {file}", problems)
    if not questions:
        raise Refused(f'--golden {file}: no lines; each is JSON such as {{"prompt": "2+2=", "contains": "4"}}')
    return questions


class _BadLineError(Exception):
    """What is wrong with a line, and the fix."""


def _parse(line: str, number: str, tokenizer: Any, max_input_len: int) -> Question:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _BadLineError(f"not JSON ({error})") from error
    problems = list(_problems(entry))
    if problems:
        raise _BadLineError("; ".join(problems))
    [expectation] = [name for name in EXPECTATIONS if name in entry]
    asked = {key: entry[key] for key in ("prompt", "messages") if key in entry}
    ids = prompt_token_ids(asked, tokenizer)
    if not 1 <= len(ids) <= max_input_len:
        raise _BadLineError(f"the prompt has {len(ids)} tokens; the engine takes 1 to {max_input_len} (max_input_len)")
    expected, most = entry[expectation], entry.get("max_tokens", DEFAULT_MAX_TOKENS)
    passes = _checker(expectation, expected)
    return Question(str(entry.get("id", number)), asked, most, expectation, expected, passes, ids)


def _problems(entry: Any) -> Iterator[str]:
    if not isinstance(entry, dict):
        yield f"must be a JSON object, not {type(entry).__name__}"
        return
    for key in entry.keys() - set(_KEYS):
        yield f"unknown key {key!r}; keys: {', '.join(_KEYS)}"
    if ("prompt" in entry) == ("messages" in entry):
        yield 'give one of "prompt" and "messages"'
    if sum(name in entry for name in EXPECTATIONS) != 1:
        yield f"give exactly one of {', '.join(EXPECTATIONS)}"
    if not isinstance(entry.get("id", ""), (str, int)):
        yield '"id" must be text or a number'
    most = entry.get("max_tokens", 1)
    if type(most) is not int or most < 1:
        yield f'"max_tokens" is {most!r}, must be a whole number of at least 1'
    for name in ("exact", "contains", "regex"):
        if not isinstance(entry.get(name, ""), str):
            yield f'"{name}" must be text'
    if isinstance(entry.get("regex"), str):
        try:
            re.compile(entry["regex"])
        except re.error as error:
            yield f'"regex" {entry["regex"]!r}: {error}'
    if "json_schema" in entry:
        yield from _schema_problems(entry["json_schema"])


def _schema_problems(schema: Any) -> Iterator[str]:
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    if not isinstance(schema, dict):
        yield '"json_schema" must be a JSON schema (an object)'
        return
    try:
        validator_for(schema).check_schema(schema)
    except SchemaError as error:
        yield f'"json_schema" is not a schema: {error.message}'


def _checker(expectation: str, expected: Any) -> Callable[[str], bool]:
    if expectation == "exact":
        return lambda answer: answer.strip() == expected.strip()
    if expectation == "contains":
        return lambda answer: expected in answer
    if expectation == "regex":
        pattern = re.compile(expected)
        return lambda answer: pattern.search(answer) is not None
    return lambda answer: _matches_schema(answer, expected)


def _matches_schema(answer: str, schema: Any) -> bool:
    from jsonschema.validators import validator_for

    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return False
    return validator_for(schema)(schema).is_valid(value)


def answer_all(
    executor: Executor, questions: Sequence[Question], tokenizer: Any, eos_token_ids: Sequence[int]
) -> list[str]:
    """Greedy answers through the scheduler, as the engine worker gives them."""
    scheduler = Scheduler(executor, eos_token_ids=eos_token_ids, decode_text=decoder_of(tokenizer))
    requests = [
        Request(f"golden-{i}", question.token_ids, SamplingParams(max_tokens=question.max_tokens))
        for i, question in enumerate(questions)
    ]
    return [output.text if output.error is None else f"[{output.error}]" for output in scheduler.run(requests)]


def judge(questions: Sequence[Question], engine: Sequence[str], source: Sequence[str] | None) -> list[dict[str, Any]]:
    """Both answers to each question. Only what the engine fails and the source does not is held against the engine.

    Without a source, which may be too large for this machine, everything that the engine fails is.
    """
    lines: list[dict[str, Any]] = []
    for index, question in enumerate(questions):
        passed = question.passes(engine[index])
        source_passed = None if source is None else question.passes(source[index])
        lines.append(
            {
                "id": question.id, **question.asked, "expectation": question.expectation, "expected": question.expected,
                "engine": engine[index], "engine_passed": passed, "source": None if source is None else source[index],
                "source_passed": source_passed, "gates": not passed and source_passed is not False,
            }
        )  # fmt: skip
    return lines


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Counts for headlines."""
    return {
        "questions": len(lines),
        "engine_passed": sum(line["engine_passed"] for line in lines),
        "source_passed": sum(bool(line["source_passed"]) for line in lines),
        "both_failed": sum(not line["engine_passed"] and line["source_passed"] is False for line in lines),
        "gating": sum(line["gates"] for line in lines),
    }
