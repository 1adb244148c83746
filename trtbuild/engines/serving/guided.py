"""Answers that match a JSON schema, a regular expression or a grammar: llguidance's masks over the logits.

Every token that would leave the grammar is cut before penalties and truncation, so that the answer is a prefix of the
grammar at any moment, and all of it where it ends by itself ("stop"); one that `max_tokens` cuts ends with "length".
The model's end tokens can be drawn where the grammar may end; where it must end the answer does so at once, without
one. Stop strings and stop ids still end an answer wherever they come up. The mask of a request depends on its grammar
and its own tokens alone.

JSON has at most one space where JSON allows white space: a model that pads for ever could not end otherwise.
Property order is the schema's. What llguidance does not implement is refused, not ignored; its departures from JSON
schema are in its docs/json_schema.md.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance import numpy as masks

from trtbuild.engines.serving.request import SamplingParams
from trtbuild.engines.serving.vocabulary import Vocabulary
from trtbuild.errors import Refused, TrtBuildError

# llguidance compiles recursively, and a chain of 5,000 references overflows the usual 8 MB, which kills the process.
# This is address space; only what is used becomes memory.
STACK_BYTES = 512 * 2**20
# A client's "x-guidance" must not undo these.
_JSON_OPTIONS: Any = {"whitespace_flexible": True, "whitespace_pattern": "[ ]", "lenient": False}


class Guide:
    """One request's way through its grammar. The next mask is computed beside the executor's step."""

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary, pool: ThreadPoolExecutor) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._pool = pool
        self.complete = False
        """Whether the grammar is matched and nothing can follow."""
        # The matcher belongs to the pool's thread until this is there.
        self._next: Future[torch.Tensor] = pool.submit(self._allowed)

    def forbid(self, scores: torch.Tensor) -> None:
        """Set what may not come next to -inf in a row [vocab]. Raises `TrtBuildError` where the grammar is too hard."""
        allowed = self._next.result()
        scores.masked_fill_(~allowed.to(scores.device), float("-inf"))

    def accept(self, token_id: int) -> None:
        """Go on by a token that `forbid` left; end tokens need not be told."""
        self._next.result()
        self._matcher.consume_token(token_id)
        self.complete = self._matcher.is_stopped() and not self._matcher.is_error()
        if not self.complete:
            self._next = self._pool.submit(self._allowed)

    def _allowed(self) -> torch.Tensor:
        """bool [vocab], in a thread of the pool; llguidance releases the GIL."""
        size = self._vocabulary.size
        words = masks.allocate_token_bitmask(1, size)
        masks.fill_next_token_bitmask(self._matcher, words)
        if self._matcher.is_error():
            raise TrtBuildError(f"the guide cannot be followed further: {_first_line(self._matcher.get_error())}")
        return torch.from_numpy(np.unpackbits(words.view(np.uint8)[0], count=size, bitorder="little").view(np.bool_))


class Guides:
    """Compiles the guides of one engine's requests. Safe for threads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._compiling = _pool_of(1, "guide-compile")
        self._masks = _pool_of(2, "guide-mask")

    def compile(self, params: SamplingParams) -> Guide:
        """A guide at its beginning; milliseconds, large ones more. Raises `Refused` with llguidance's message."""
        grammars = self._vocabulary.grammars
        try:
            matcher = self._compiling.submit(_matcher_of, grammars, params).result()
            problem = matcher.get_error()
        except ValueError as error:
            # The schema is no JSON at all.
            matcher, problem = None, str(error)
        if matcher is None or problem:
            raise Refused(f"guide ({params.guide_type}): {problem.strip()}")
        return Guide(matcher, self._vocabulary, self._masks)

    def close(self) -> None:
        """End the threads."""
        self._compiling.shutdown(wait=False)
        self._masks.shutdown(wait=False)


def _matcher_of(grammars: LLTokenizer, params: SamplingParams) -> LLMatcher:
    # Its verbose errors quote the grammar and the answer.
    limits = LLParserLimits(verbose_errors=False)
    return LLMatcher(grammars, _grammar_of(params), limits=limits, log_level=0)


def _grammar_of(params: SamplingParams) -> str:
    if params.guide_type == "json":
        return LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=_JSON_OPTIONS)
    text = params.guide or ""
    makers: dict[str | None, Callable[[str], str]] = {
        "json_schema": lambda schema: LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS),
        "regex": LLMatcher.grammar_from_regex,
        "ebnf_grammar": LLMatcher.grammar_from_lark,
    }
    return makers[params.guide_type](text)


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0]


def _pool_of(num_threads: int, name: str) -> ThreadPoolExecutor:
    """A pool whose threads are all there, with the large stack, which can be set only while they start."""
    pool = ThreadPoolExecutor(num_threads, name)
    together = threading.Barrier(num_threads + 1)
    usual = threading.stack_size(STACK_BYTES)
    try:
        for _ in range(num_threads):
            pool.submit(together.wait)
    finally:
        threading.stack_size(usual)
    together.wait()
    return pool
