"""Guides over an executor of random logits: whatever the model wants, the answer is in the grammar."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
import torch
from fake_executor import TINY_MIXTRAL, FakeExecutor
from json_schemas import random_schema
from transformers import AutoTokenizer

from trtbuild.engines.serving.detokenizer import decoder_of
from trtbuild.engines.serving.request import Request, RequestOutput, SamplingParams
from trtbuild.engines.serving.scheduler import Scheduler
from trtbuild.engines.serving.vocabulary import Vocabulary
from trtbuild.errors import Refused

EOS = 2
MIXTRAL = AutoTokenizer.from_pretrained(TINY_MIXTRAL)
# Wider than the tokenizer's 1024, as padded heads are.
WIDTH = 1056
VOCABULARY = Vocabulary(MIXTRAL, WIDTH, [EOS])
DECODE = decoder_of(MIXTRAL)
OBJECT = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"type": "boolean"}}},
    "required": ["a", "b"],
}


def scheduler(num_slots: int = 8, length: int = 600, **options: Any) -> Scheduler:
    executor = FakeExecutor(num_slots, max_seq_len=length, chunk_size=16, vocab_size=WIDTH)
    return Scheduler(executor, eos_token_ids=[EOS], decode_text=DECODE, vocabulary=VOCABULARY, **options)


def guided(name: str, kind: str, guide: str | None = None, **params: Any) -> Request:
    seed = sum(map(ord, name))
    params = {"temperature": 1.0, "seed": seed, **params}
    return Request(name, [5, 6, 7 + seed % 900], SamplingParams(guide_type=kind, guide=guide, **params))


def check_random_schemas(seeds: Sequence[int]) -> None:
    schemas = {str(seed): random_schema(seed) for seed in seeds}
    requests = [guided(name, "json_schema", json.dumps(schema)) for name, schema in schemas.items()]
    outputs = scheduler().run(requests)
    for output in outputs:
        assert output.finish_reason in ("stop", "length"), output.error
        if output.finish_reason == "stop":
            jsonschema.validate(json.loads(output.text), schemas[output.request_id])
    assert sum(output.finish_reason == "stop" for output in outputs) > 0.9 * len(seeds), "the rest filled the slot"


def test_json_of_random_schemas_parses_and_validates() -> None:
    check_random_schemas(range(30))


@pytest.mark.slow
def test_json_of_200_random_schemas_parses_and_validates() -> None:
    check_random_schemas(range(1000, 1200))


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("pattern", ["(ab|cd)*-[0-9]{3}", "[A-Z][a-z]{2,8}( [a-z]{1,9}){1,2}\\.", "日本|中国", "x{3}"])
def test_regex_is_matched_whole(pattern: str, temperature: float) -> None:
    outputs = scheduler().run([guided(f"{i}", "regex", pattern, temperature=temperature) for i in range(4)])
    ended = [output for output in outputs if output.finish_reason == "stop"]
    assert all(re.fullmatch(pattern, output.text) for output in ended)
    assert len(ended) == 4 or pattern[0] == "(", "a star may fill the slot"


def test_grammar_and_plain_json() -> None:
    grammar = 'start: item ("," item){0,3}\nitem: "left" | "right" | /[0-9]{1,2}/'
    outputs = scheduler().run([guided("g", "ebnf_grammar", grammar), guided("j", "json", max_tokens=500)])
    assert re.fullmatch(r"(left|right|\d{1,2})(,(left|right|\d{1,2})){0,3}", outputs[0].text)
    assert outputs[1].finish_reason == "length" or isinstance(json.loads(outputs[1].text), dict)


def test_end_tokens_only_where_the_grammar_may_end_and_none_where_it_must() -> None:
    constraint = scheduler().constraints_of(guided("a", "regex", "ab?"))[0]

    def allowed() -> list[int]:
        scores = torch.zeros(WIDTH)
        constraint.forbid(scores)
        return torch.isfinite(scores).nonzero()[:, 0].tolist()

    a, b = (MIXTRAL.convert_tokens_to_ids(letter) for letter in "ab")
    assert a in allowed() and EOS not in allowed()
    assert {MIXTRAL.decode([i]) for i in allowed()} <= {"a", "ab"}
    constraint.accept(a)
    assert allowed() == sorted([b, EOS]) and not constraint.complete
    constraint.accept(b)
    assert constraint.complete
    output = scheduler().run([guided("a", "regex", "ab", temperature=0.0)])[0]
    assert (output.text, output.finish_reason) == ("ab", "stop") and EOS not in output.token_ids


def test_padding_of_the_head_is_never_drawn() -> None:
    outputs = scheduler().run([guided(str(i), "regex", "(?s:.){20,30}", temperature=50.0) for i in range(20)])
    assert sum(len(output.token_ids) for output in outputs) > 100
    assert max(token for output in outputs for token in output.token_ids) < len(MIXTRAL)


def test_cut_by_max_tokens_is_length_and_stop_strings_still_stop() -> None:
    schema = json.dumps(OBJECT)
    cut, stopped = scheduler().run(
        [
            guided("cut", "json_schema", schema, max_tokens=3),
            guided("stopped", "json_schema", schema, stop=['"b"']),
        ]
    )
    assert (cut.finish_reason, len(cut.token_ids)) == ("length", 3) and cut.text.lstrip().startswith("{")
    assert stopped.finish_reason == "stop" and '"a"' in stopped.text and '"b"' not in stopped.text


class SpaceLover(FakeExecutor):
    """Wants nothing but white space."""

    def _logits(self, slot: int, position: int) -> torch.Tensor:
        logits = super()._logits(slot, position)
        for token in range(len(MIXTRAL)):
            if VOCABULARY.bytes_of(token).isspace():
                logits[token] += 1000
        return logits


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_pads_for_ever_still_ends(temperature: float) -> None:
    executor = SpaceLover(4, max_seq_len=600, chunk_size=16, vocab_size=WIDTH)
    made = Scheduler(executor, eos_token_ids=[EOS], decode_text=DECODE, vocabulary=VOCABULARY)
    schema = json.dumps({**OBJECT, "x-guidance": {"whitespace_pattern": "[ \\n]+", "lenient": True}})
    output = made.run([guided("a", "json_schema", schema, temperature=temperature, max_tokens=200)])[0]
    assert output.finish_reason == "stop" and set(json.loads(output.text)) == {"a", "b"}
    assert "  " not in output.text and "\n" not in output.text and " " in output.text


def test_the_mask_depends_on_the_request_alone() -> None:
    requests = [
        guided("json", "json_schema", json.dumps(OBJECT), logprobs=2),
        guided("regex", "regex", "[a-z ]{5,40}", repetition_penalty=1.4),
        Request("free", [9, 9], SamplingParams(temperature=1.0, seed=3, max_tokens=30)),
        guided("bad", "json_schema", json.dumps(OBJECT), bad=["true"], top_p=0.8),
    ]

    def plain(output: RequestOutput) -> RequestOutput:
        return replace(output, usage=None)

    together = [plain(output) for output in scheduler(num_slots=3).run(requests)]
    assert together == [plain(scheduler(num_slots=1).run([request])[0]) for request in requests]
    assert "true" not in together[3].text and together[3].text != together[0].text


@pytest.mark.parametrize(
    ("kind", "guide", "why"),
    [
        ("json_schema", "{no json", "key must be a string"),
        ("json_schema", '{"type": "objec"}', "Invalid type: objec"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "Unimplemented keys.*uniqueItems"),
        ("json_schema", '{"x-guidance": {"lenient": true}, "type": "array", "uniqueItems": true}', "Unimplemented"),
        ("json_schema", '{"type": "integer", "minimum": 3, "maximum": 1}', "minimum .3. is greater"),
        ("json_schema", "[1]", "object schema"),
        ("regex", "(ab", "unclosed group"),
        ("regex", "\\bword", "lookarounds not supported"),
        ("ebnf_grammar", "start: foo", 'unknown name: "foo"'),
    ],
)
def test_what_does_not_compile_is_refused_with_llguidances_message(kind: str, guide: str, why: str) -> None:
    made = scheduler()
    with pytest.raises(Refused, match=why):
        made.submit(guided("a", kind, guide))
    assert (made.stats().refused, made.has_work) == (1, False)


def test_contradictions_are_refused() -> None:
    contradictions: list[tuple[dict[str, Any], str]] = [
        ({"guide_type": "json", "ignore_eos": True}, "ignore_eos with guide_type json"),
        ({"guide_type": "regex", "guide": "a", "min_tokens": 1}, "min_tokens with guide_type regex"),
        ({"guide_type": "regex"}, "need a guide"),
        ({"guide_type": "json", "guide": "{}"}, "takes no guide"),
        ({"guide": "{}"}, "takes no guide"),
        ({"guide_type": "xml", "guide": "a"}, "must be one of json, json_schema, regex, ebnf_grammar"),
        ({"guide_type": "regex", "guide": "a" * 70000}, "1 to 65536 characters"),
    ]
    for params, why in contradictions:
        with pytest.raises(Refused, match=why):
            SamplingParams(**params)
    with pytest.raises(Refused, match="need a tokenizer"):
        Scheduler(FakeExecutor()).submit(Request("a", [3], SamplingParams(guide_type="json")))
    narrow = Scheduler(FakeExecutor(vocab_size=50), vocabulary=Vocabulary(MIXTRAL, 50, [EOS]))
    with pytest.raises(Refused, match="all 1024 tokens of its tokenizer, not 50"):
        narrow.submit(Request("a", [3], SamplingParams(guide_type="json")))


def test_nothing_left_to_draw_ends_that_request_alone() -> None:
    blocked, fine = scheduler().run(
        [guided("blocked", "regex", "yes", bad=["e"]), guided("fine", "regex", "yes", temperature=0.0)]
    )
    assert blocked.finish_reason == "error" and "leave no token" in (blocked.error or "")
    assert (fine.text, fine.finish_reason) == ("yes", "stop")


@pytest.mark.parametrize("kind", ["json_schema", "ebnf_grammar"])
def test_the_deepest_guide_that_is_accepted_does_not_kill_the_process(kind: str) -> None:
    # llguidance follows references by recursion; on a usual stack this is a segmentation fault.
    code = f"""
import json, test_guided
from trtbuild.engines.serving.request import MAX_GUIDE_CHARACTERS
def chain(n):
    if {kind!r} == "ebnf_grammar":
        rules = "".join(f"a{{i}}:a{{i + 1}}'x'\\n".replace("'", chr(34)) for i in range(n))
        return "start: a0\\n" + rules + f'a{{n}}: "b"'
    links = {{f"a{{i}}": {{"$ref": f"#/$defs/a{{i + 1}}"}} for i in range(n)}}
    return json.dumps({{"$defs": {{**links, f"a{{n}}": {{"const": 1}}}}, "$ref": "#/$defs/a0"}}, separators=(",", ":"))
n = next(n for n in range(5000, 0, -50) if len(chain(n)) <= MAX_GUIDE_CHARACTERS)
output = test_guided.scheduler().run([test_guided.guided("a", {kind!r}, chain(n), max_tokens=3)])[0]
print(n, output.text, output.finish_reason, output.error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=_path())
    assert done.returncode == 0, done.stderr[-500:]
    num_links, text = done.stdout.split()[:2]
    assert int(num_links) > 1500 and text.startswith(("1", "b"))


def _path() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
