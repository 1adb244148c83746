"""Bad strings never appear in the text of an executor of random logits, however tokens would make them."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from fake_executor import TINY_MIXTRAL, FakeExecutor
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from trtbuild.engines.serving.bad_words import BadSequences, BadStrings
from trtbuild.engines.serving.detokenizer import decoder_of
from trtbuild.engines.serving.request import Request, RequestOutput, SamplingParams
from trtbuild.engines.serving.scheduler import Scheduler
from trtbuild.engines.serving.vocabulary import Vocabulary
from trtbuild.errors import Refused

MIXTRAL = AutoTokenizer.from_pretrained(TINY_MIXTRAL)
WIDTH = 1024
VOCABULARY = Vocabulary(MIXTRAL, WIDTH, [2])


def answers(count: int, **params: Any) -> list[RequestOutput]:
    executor = FakeExecutor(8, max_seq_len=150, chunk_size=16, vocab_size=WIDTH)
    made = Scheduler(executor, eos_token_ids=[2], decode_text=decoder_of(MIXTRAL), vocabulary=VOCABULARY)
    sampling = [
        SamplingParams(temperature=1.0, seed=i, ignore_eos=True, max_tokens=100, **params) for i in range(count)
    ]
    return made.run([Request(str(i), [5, 6, 7], p) for i, p in enumerate(sampling)])


def test_text_never_appears_across_token_boundaries() -> None:
    free = answers(24)
    text = "\n".join(output.text for output in free)
    tokens = {MIXTRAL.decode([i]) for i in range(WIDTH)}
    # The commonest strings of two to four letters that no token contains, so that only boundaries make them.
    counts = Counter(text[i : i + n] for n in (2, 3, 4) for i in range(len(text) - n))
    across = [s for s, _ in counts.most_common() if s.isalpha() and s.isascii() and not any(s in t for t in tokens)]
    inside = [s for s, _ in counts.most_common() if len(s) == 3 and any(s in t for t in tokens)]
    bad = [*across[:15], *inside[:5], "é", "世", " th"]
    assert sum(text.count(word) for word in across[:15]) > 20, "without the ban they do appear"
    held = answers(24, bad=bad)
    assert all(len(output.token_ids) == 100 for output in held)
    assert [(o.request_id, w) for o in held for w in bad if w in o.text] == []


@settings(deadline=None, max_examples=300)
@given(
    ids=st.lists(st.integers(0, WIDTH - 1), max_size=12),
    strings=st.lists(st.text("aeth 你é", min_size=1, max_size=5), min_size=1, max_size=4),
)
def test_exactly_the_tokens_that_complete_a_string_are_forbidden(ids: list[int], strings: list[str]) -> None:
    made = BadStrings(strings, VOCABULARY)
    text = b""
    words = [s.encode() for s in strings]
    for token in ids:
        if any(word in text + VOCABULARY.bytes_of(token) for word in words):
            break
        made.accept(token)
        text += VOCABULARY.bytes_of(token)
    scores = torch.zeros(WIDTH)
    made.forbid(scores)
    completing = [i for i in range(WIDTH) if any(word in text + VOCABULARY.bytes_of(i) for word in words)]
    assert (~torch.isfinite(scores)).nonzero()[:, 0].tolist() == completing


def test_special_tokens_in_between_do_not_help() -> None:
    made = BadStrings(["ab"], VOCABULARY)
    a, b = (MIXTRAL.convert_tokens_to_ids(letter) for letter in "ab")
    for token in (a, 1):
        made.accept(token)
    scores = torch.zeros(WIDTH)
    made.forbid(scores)
    assert scores[b] == float("-inf") and MIXTRAL.decode([a, 1, b], skip_special_tokens=True) == "ab"


@settings(deadline=None, max_examples=200)
@given(
    ids=st.lists(st.integers(0, 3), max_size=20),
    sequences=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_a_sequences_last_token_is_forbidden_behind_the_others(ids: list[int], sequences: list[list[int]]) -> None:
    made = BadSequences(sequences, 4)
    for token in ids:
        made.accept(token)
    scores = torch.zeros(4)
    made.forbid(scores)
    expected = {s[-1] for s in sequences if [*ids, s[-1]][-len(s) :] == s}
    assert {i for i in range(4) if scores[i] == float("-inf")} == expected


def test_bad_sequences_never_appear_and_the_rest_is_free() -> None:
    free = answers(6)
    pairs = [tuple(output.token_ids[i : i + 2]) for output in free for i in (3, 40)]
    single = (free[0].token_ids[0],)
    held = answers(6, bad_token_ids=[*pairs, single, (WIDTH + 5,)])
    for output in held:
        ids = output.token_ids
        assert single[0] not in ids and not {*itertools.pairwise(ids)} & {*pairs}
    assert any(pairs[2][0] in output.token_ids for output in held), "the first of a pair is allowed"


def test_limits() -> None:
    with pytest.raises(Refused, match="5000 characters in all, at most 4096"):
        SamplingParams(bad=("a" * 1000,) * 5)
    with pytest.raises(Refused, match="bad_token_ids"):
        SamplingParams(bad_token_ids=((),))
    with pytest.raises(Refused, match=r"bad .*characters"):
        SamplingParams(bad=("",))
    with pytest.raises(Refused, match="need a tokenizer"):
        Scheduler(FakeExecutor()).submit(Request("a", [3], SamplingParams(bad=("x",))))
    assert SamplingParams(bad="x").bad == ("x",)  # type: ignore[arg-type]
