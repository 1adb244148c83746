"""Evaluation texts as blocks of tokens: what source and engine are both asked to predict."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from trtbuild.errors import CheckpointError

BLOCK_TOKENS = 256
# Without --num-tokens: 16 blocks, enough for a standard error, and minutes of a CPU for a model of 7B.
DEFAULT_NUM_TOKENS = 4096
BUNDLED = "bundled"


@dataclass(frozen=True)
class EvaluationText:
    """A text and where it came from, for the record."""

    name: str
    text: str

    @classmethod
    def open(cls, file: Path | None) -> EvaluationText:
        """A file, or the bundled text, which calibration does not see. CheckpointError where it cannot be read."""
        if file is None:
            return cls(BUNDLED, resources.files("trtbuild.data").joinpath("evaluation.txt").read_text("utf-8"))
        try:
            return cls(file.name, file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"--text {file}: not a readable UTF-8 text ({error})") from error

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class TextBlocks:
    """One text cut into blocks of equal length, each beginning as the tokenizer begins a text.

    `plain` is the whole text's tokens without that beginning.
    """

    text: EvaluationText
    prefix: list[int]
    plain: list[int]
    blocks: list[list[int]]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.blocks))

    def repeated(self, length: int) -> list[int]:
        """The text over and over, exactly `length` tokens."""
        body = length - len(self.prefix)
        times = -(-max(body, 1) // len(self.plain))
        return (self.prefix + self.plain * times)[:length]


def cut_text(text: EvaluationText, tokenizer: Any, num_tokens: int, max_seq_len: int) -> TextBlocks:
    """Blocks of at most 256 tokens, evenly spaced over the text; as many as `num_tokens` allows, but one at least.

    Raises CheckpointError where the text is shorter than one block of 16 tokens.
    """
    # verbose=False: a text longer than the model's context is meant to be cut up here.
    ids: list[int] = tokenizer(text.text, verbose=False)["input_ids"]
    plain: list[int] = tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"]
    prefix = ids[: len(ids) - len(plain)] if plain and ids[-len(plain) :] == plain else []
    length = min(BLOCK_TOKENS, max_seq_len, len(plain) + len(prefix)) - len(prefix)
    if length < 16:
        raise CheckpointError(f"--text {text.name}: {len(plain)} tokens (max_seq_len {max_seq_len}); it takes 16")
    count = max(1, min(len(plain) // length, num_tokens // (length + len(prefix))))
    last = len(plain) - length
    starts = [round(last * i / max(1, count - 1)) for i in range(count)]
    return TextBlocks(text, prefix, plain, [prefix + plain[start : start + length] for start in starts])
