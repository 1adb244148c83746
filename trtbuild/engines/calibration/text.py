"""Texts that models read, and the equally long sequences of tokens that are cut out of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.checkpoints.tokenizer import load_tokenizer
from trtbuild.errors import CheckpointError

NUM_SEQUENCES = 16
SEQUENCE_LENGTH = 512
BUNDLED = "bundled"
T = TypeVar("T", bound="Text")


@dataclass(frozen=True)
class Text:
    """A text and where it came from, for the record. Its kinds differ in who names it and what is bundled for it."""

    name: str
    text: str
    option: ClassVar[str]
    bundled_file: ClassVar[str]

    @classmethod
    def open(cls: type[T], file: Path | None) -> T:
        """A file, or the bundled text. CheckpointError where it cannot be read."""
        if file is None:
            return cls(BUNDLED, resources.files("trtbuild.data").joinpath(cls.bundled_file).read_text("utf-8"))
        try:
            return cls(file.name, file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{cls.option} {file}: not a readable UTF-8 text ({error})") from error

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


class CalibrationText(Text):
    """What a calibration reads."""

    option = "--calib-data"
    bundled_file = "calibration.txt"


@dataclass(frozen=True)
class TextTokens:
    """A text's tokens: `prefix` is what the tokenizer begins a text with, `plain` all the rest."""

    prefix: list[int]
    plain: list[int]

    @classmethod
    def of(cls, text: Text, tokenizer: Any) -> TextTokens:
        # verbose=False: a text longer than the model's context is meant to be cut up here.
        ids: list[int] = tokenizer(text.text, verbose=False)["input_ids"]
        plain: list[int] = tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"]
        return cls(ids[: len(ids) - len(plain)] if plain and ids[-len(plain) :] == plain else [], plain)

    def sequences(self, count: int, length: int) -> list[list[int]]:
        """`count` sequences of the prefix and `length` tokens (of `plain` at most), evenly spaced over the text."""
        last = len(self.plain) - length
        starts = [round(last * i / max(1, count - 1)) for i in range(count)]
        return [self.prefix + self.plain[start : start + length] for start in starts]


def calibration_tokens(source: CheckpointSource, text: CalibrationText) -> list[list[int]]:
    """Sequences of equal length, evenly spaced over the text, each beginning as the tokenizer begins a text.

    Raises CheckpointError for a text that is shorter than one of them.
    """
    tokens = TextTokens.of(text, load_tokenizer(source.directory))
    length = min(SEQUENCE_LENGTH, source.config.max_position_embeddings) - len(tokens.prefix)
    spare = len(tokens.plain) - length
    if spare < 0:
        raise CheckpointError(
            f"calibration text {text.name!r} has {len(tokens.plain)} tokens; it takes at least {length}"
        )
    # Neighbours overlap by half at most.
    return tokens.sequences(min(NUM_SEQUENCES, 1 + spare // max(1, length // 2)), length)
