"""The bytes of every token, which grammars and forbidden strings are checked against."""

from __future__ import annotations

import bisect
import functools
import re
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

from trtbuild.errors import Refused

if TYPE_CHECKING:
    import torch
    from llguidance import LLTokenizer


class Vocabulary:
    """A model's tokens as text and bytes; built when first used (seconds for 150,000 tokens). Safe for threads.

    `size` is the width of the logits: ids that the tokenizer does not have are padding. `end_ids` end an answer.
    """

    def __init__(self, tokenizer: Any, size: int, end_ids: Iterable[int]) -> None:
        self.size = size
        self.end_ids = sorted(set(end_ids))
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._grammars: LLTokenizer | None = None
        self._token_bytes: list[bytes] = []
        self._sorted_bytes: list[bytes] = []
        self._sorted_ids: torch.Tensor | None = None
        self.text_of = functools.lru_cache(maxsize=65536)(self._text_of)
        """Text of one token alone, special tokens by name; half a character is U+FFFD."""

    @property
    def grammars(self) -> LLTokenizer:
        """llguidance's view of it. Raises `Refused` for a tokenizer that it cannot read."""
        with self._lock:
            if self._grammars is None:
                self._grammars = self._build()
            return self._grammars

    def prepare(self) -> None:
        """Build all of it now. Raises `Refused` as `grammars` does."""
        self._table()

    def bytes_of(self, token_id: int) -> bytes:
        """What a token adds to the answer's text: nothing for special tokens and padding."""
        return self._table()[token_id]

    def starting_with(self, prefix: bytes) -> torch.Tensor:
        """Ids of all tokens whose bytes begin with `prefix` (UTF-8, not empty)."""
        self._table()
        # 0xff is in no UTF-8, so that this is the end of all that begin with the prefix.
        after = prefix[:-1] + bytes([prefix[-1] + 1])
        start, end = (bisect.bisect_left(self._sorted_bytes, edge) for edge in (prefix, after))
        return cast("torch.Tensor", self._sorted_ids)[start:end]

    def containing(self, parts: Iterable[bytes]) -> list[int]:
        """Ids of all tokens whose bytes contain any of `parts`."""
        search = re.compile(b"|".join(map(re.escape, parts))).search
        return [token_id for token_id, token_bytes in enumerate(self._table()) if search(token_bytes)]

    def _build(self) -> LLTokenizer:
        from llguidance.hf import from_tokenizer

        if getattr(self._tokenizer, "backend_tokenizer", None) is None:
            raise Refused("guides and bad strings need a fast tokenizer (tokenizer.json), and this engine has none")
        if not self.end_ids:
            raise Refused("guides and bad strings need an end token, and this engine has none")
        known = len(self._tokenizer)
        if known > self.size:
            raise Refused(
                f"guides and bad strings need a model of all {known} tokens of its tokenizer, not {self.size}"
            )
        return from_tokenizer(self._tokenizer, n_vocab=self.size, eos_token=self.end_ids)

    def _table(self) -> list[bytes]:
        grammars = self.grammars
        with self._lock:
            if not self._token_bytes:
                import torch

                added = self._tokenizer.backend_tokenizer.get_added_tokens_decoder()
                hidden = {token_id for token_id, token in added.items() if token.special}
                shown = [i for i in range(len(self._tokenizer)) if i not in hidden]
                table = [b""] * self.size
                for token_id in shown:
                    table[token_id] = grammars.decode_bytes([token_id])
                shown.sort(key=table.__getitem__)
                self._sorted_bytes = [table[token_id] for token_id in shown]
                self._sorted_ids = torch.tensor(shown, dtype=torch.long)
                self._token_bytes = table
            return self._token_bytes

    def _text_of(self, token_id: int) -> str:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is not None:
            once, twice = (backend.decode([token_id] * count, skip_special_tokens=False) for count in (1, 2))
        else:
            once, twice = (self._tokenizer.decode([token_id] * count) for count in (1, 2))
        # A sentencepiece decoder drops the space of the first token only.
        return twice[len(once) :] if twice.startswith(once) else once
