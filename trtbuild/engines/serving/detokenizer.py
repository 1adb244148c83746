"""Token ids to text while they arrive: whole characters only, at constant cost per token, stop strings held back.

Tokens are not characters: a Chinese character or an emoji can span several, and a sentencepiece decoder drops the
space of whatever it thinks is the beginning. So a short window of recent tokens is decoded with and without the
newest ones, and the difference is the new text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Decode = Callable[[Sequence[int]], str]

REPLACEMENT = "\ufffd"
# A character is at most four byte tokens; text that still looks unfinished after this many is invalid, not unfinished.
MAX_PENDING = 8


def decoder_of(tokenizer: Any) -> Decode:
    """`decode(ids) -> str` of a transformers tokenizer: special tokens skipped, spaces left as the model wrote them.

    The `tokenizers` backend is called directly where there is one: it is twenty times faster, and unlike transformers'
    `clean_up_tokenization_spaces` it never rewrites code such as "a , b".
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return lambda ids: backend.decode(list(ids), skip_special_tokens=True)
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Detokenizer:
    """Incremental decoding of one output: the pieces joined are `decode(all ids)`.

    One exception, on purpose: a byte-fallback tokenizer decodes a run of byte tokens with one bad byte to nothing but
    replacement characters; characters of that run that were complete have been shown by then and stay.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []
        # Tokens at the start of the window whose text is out already; they are kept as context for the next ones.
        self._num_shown = 0
        self._shown_text = ""
        self._window_text = ""

    def push(self, token_id: int) -> str:
        """The text that is certain now, given one more token; often empty."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text == self._window_text and not self._decode([token_id, token_id]):
            # Invisible (special, or not in the vocabulary): a long run of them must not lengthen the window. Twice,
            # since a sentencepiece decoder hides a single leading space.
            self._window.pop()
            return ""
        self._window_text = text
        if text.endswith(REPLACEMENT):
            return self._cut_invalid(text) if len(self._window) - self._num_shown > MAX_PENDING else ""
        if len(text) <= len(self._shown_text):
            return ""
        return self._advance(text, len(self._window))

    def finish(self) -> str:
        """Whatever is left, an incomplete character included (as replacement characters)."""
        return self._advance(self._decode(self._window), len(self._window)) if self._window else ""

    def _advance(self, text: str, end: int) -> str:
        """Show `text`, the decoded window up to `end`, and keep only its newest tokens."""
        if text.startswith(self._shown_text):
            new = text[len(self._shown_text) :]
        else:
            # A bad byte made the decoder take back a run that is out already: decode the new tokens alone.
            new = self._decode(self._window[self._num_shown : end])
        self._window = self._window[self._num_shown :]
        self._num_shown = end - self._num_shown
        self._shown_text = self._decode(self._window[: self._num_shown])
        self._window_text = self._decode(self._window)
        return new

    def _cut_invalid(self, text: str) -> str:
        """Too many unfinished tokens: some of those bytes are invalid. Show up to the newest safe boundary.

        A boundary is safe where both sides decode to the same as the whole: a character across it would merge.
        """
        for cut in range(len(self._window) - 1, self._num_shown, -1):
            left, right = self._decode(self._window[:cut]), self._decode(self._window[cut:])
            if right and left + right == text:
                return self._advance(left, cut)
        return ""


class StopMatcher:
    """Finds stop strings in text that comes in pieces; holds back what could be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text to show, whether a stop string was found). The match and what follows it are dropped.

        Where several match, the one that is complete first counts, so that the result does not depend on the pieces.
        """
        self._held += text
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            shown, self._held = self._held[: min(found)[1]], ""
            return shown, True
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown, False

    def finish(self) -> str:
        """The text held back, which turned out not to be a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class TextStream:
    """Detokenizer and stop matcher of one request; with no `decode`, every text is empty."""

    def __init__(self, decode: Decode | None, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._detokenizer = Detokenizer(decode) if decode is not None else None
        self._matcher = StopMatcher(stop)
        self._min_tokens = min_tokens
        self._num_tokens = 0

    def push(self, token_id: int) -> tuple[str, bool]:
        """(text to show, whether a stop string ended it) for one more token."""
        self._num_tokens += 1
        if self._detokenizer is None:
            return "", False
        text = self._detokenizer.push(token_id)
        # vLLM's rule: text of the first `min_tokens` tokens is not searched.
        return (text, False) if self._num_tokens <= self._min_tokens else self._matcher.push(text)

    def finish(self) -> tuple[str, bool]:
        """(the rest of the text, whether a stop string was found in it); the stream is over."""
        if self._detokenizer is None:
            return "", False
        text, stopped = self._matcher.push(self._detokenizer.finish())
        return (text, True) if stopped else (text + self._matcher.finish(), False)
