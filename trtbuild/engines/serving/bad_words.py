"""Strings and token sequences that an answer never contains.

A bad string is forbidden in the answer's text, wherever its letters come from: a token that contains it, or that
completes it behind what is already there, cannot be drawn. It does not matter how the tokenizer would cut it, whether a
space stands before it, or whether a special token, which is not shown, stands in between. Because it is about text,
"cat" also forbids "concatenate". TensorRT-LLM and vLLM forbid the token sequences of the word with and without a space
instead, and let other ways to cut it through; who wants that gives `bad_token_ids`.

Not covered: other cases of letters, other Unicode forms of the same character, text of the prompt (an answer may go on
with the rest of a word), and U+FFFD, which stands for bytes that are no text.
A bad sequence of tokens is matched against the answer's tokens: its last one is forbidden behind the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trtbuild.engines.serving.vocabulary import Vocabulary


class BadStrings:
    """Forbids the next token of one answer to complete any of `strings`. Raises `Refused` as `Vocabulary` does."""

    complete = False

    def __init__(self, strings: Sequence[str], vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._words = [string.encode() for string in strings]
        self._longest = max(len(word) for word in self._words)
        self._tail = b""
        """The newest bytes of the answer, as many as can matter."""
        self._always = torch.tensor(vocabulary.containing(self._words), dtype=torch.long)

    def forbid(self, scores: torch.Tensor) -> None:
        """Set what would complete a bad string to -inf in a row [vocab]."""
        scores[self._always.to(scores.device)] = float("-inf")
        for word in self._words:
            for length in range(1, len(word)):
                if self._tail.endswith(word[:length]):
                    completing = self._vocabulary.starting_with(word[length:])
                    scores[completing.to(scores.device)] = float("-inf")

    def accept(self, token_id: int) -> None:
        """Record that the token became part of the answer."""
        self._tail = (self._tail + self._vocabulary.bytes_of(token_id))[-self._longest :]


class BadSequences:
    """Forbids the last token of each sequence behind its others."""

    complete = False

    def __init__(self, sequences: Sequence[Sequence[int]], vocab_size: int) -> None:
        self._sequences = [list(s) for s in sequences if max(s) < vocab_size]
        self._longest = max((len(s) for s in self._sequences), default=0)
        self._tail: list[int] = []

    def forbid(self, scores: torch.Tensor) -> None:
        """Set what would complete a bad sequence to -inf in a row [vocab]."""
        completing = [s[-1] for s in self._sequences if self._tail[len(self._tail) - len(s) + 1 :] == s[:-1]]
        if completing:
            scores[torch.tensor(completing, device=scores.device)] = float("-inf")

    def accept(self, token_id: int) -> None:
        """Record that the token became part of the answer."""
        self._tail = [*self._tail, token_id][-self._longest :] if self._longest else []
