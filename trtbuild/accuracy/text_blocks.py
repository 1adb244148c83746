"""Evaluation texts as blocks of tokens: what source and engine are both asked to predict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trtbuild.engines.calibration.text import Text, TextTokens
from trtbuild.errors import CheckpointError

BLOCK_TOKENS = 256
_SHORTEST_BLOCK = 16
# Without --num-tokens: 16 blocks, enough for a standard error, and minutes of a CPU for a model of 7B.
DEFAULT_NUM_TOKENS = 4096


class EvaluationText(Text):
    """What models are compared on; calibration does not see the bundled one."""

    option = "--text"
    bundled_file = "evaluation.txt"


@dataclass(frozen=True)
class TextBlocks:
    """One text cut into blocks of equal length, each beginning as the tokenizer begins a text."""

    text: EvaluationText
    tokens: TextTokens
    blocks: list[list[int]]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.blocks))

    def repeated(self, length: int) -> list[int]:
        """The text over and over, exactly `length` tokens."""
        prefix, plain = self.tokens.prefix, self.tokens.plain
        times = -(-max(length - len(prefix), 1) // len(plain))
        return (prefix + plain * times)[:length]


def cut_text(text: EvaluationText, tokenizer: Any, num_tokens: int, max_seq_len: int) -> TextBlocks:
    """Blocks of at most 256 tokens, evenly spaced over the text; as many as `num_tokens` allows, but one at least.

    Raises CheckpointError where the text is shorter than one block of 16 tokens.
    """
    tokens = TextTokens.of(text, tokenizer)
    num_prefix, num_plain = len(tokens.prefix), len(tokens.plain)
    length = min(BLOCK_TOKENS, max_seq_len, num_plain + num_prefix) - num_prefix
    if length < _SHORTEST_BLOCK:
        raise CheckpointError(f"--text {text.name}: {num_plain} tokens (max_seq_len {max_seq_len}); it takes 16")
    count = max(1, min(num_plain // length, num_tokens // (length + num_prefix)))
    return TextBlocks(text, tokens, tokens.sequences(count, length))
