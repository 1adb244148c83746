"""From a request's sampling parameters to what constrains its tokens."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from trtbuild.engines.serving.bad_words import BadSequences, BadStrings
from trtbuild.engines.serving.request import SamplingParams
from trtbuild.engines.serving.sampling import Constraint
from trtbuild.engines.serving.vocabulary import Vocabulary
from trtbuild.errors import Refused

if TYPE_CHECKING:
    from trtbuild.engines.serving.guided import Guides


class Constrainer:
    """Makes the constraints of one engine's requests; safe for threads. `vocabulary`: None without a tokenizer."""

    def __init__(self, vocabulary: Vocabulary | None, vocab_size: int) -> None:
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._guides: Guides | None = None

    def of(self, params: SamplingParams) -> list[Constraint]:
        """Milliseconds, the first time seconds. Raises `Refused` where a guide does not compile."""
        constraints: list[Constraint] = []
        if params.bad_token_ids:
            constraints.append(BadSequences(params.bad_token_ids, self._vocab_size))
        if not params.bad and params.guide_type is None:
            return constraints
        if self._vocabulary is None:
            raise Refused("guides and bad strings need a tokenizer, and this engine has none")
        if params.bad:
            constraints.append(BadStrings(params.bad, self._vocabulary))
        if params.guide_type is not None:
            constraints.append(self._guides_of(self._vocabulary).compile(params))
        return constraints

    def close(self) -> None:
        """End what runs in the background."""
        with self._lock:
            if self._guides is not None:
                self._guides.close()

    def _guides_of(self, vocabulary: Vocabulary) -> Guides:
        from trtbuild.engines.serving.guided import Guides

        with self._lock:
            if self._guides is None:
                self._guides = Guides(vocabulary)
            return self._guides
