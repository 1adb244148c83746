"""What a calibration reads: a text, cut into sequences of tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.checkpoints.tokenizer import load_tokenizer
from trtbuild.errors import CheckpointError

NUM_SEQUENCES = 16
SEQUENCE_LENGTH = 512


@dataclass(frozen=True)
class CalibrationText:
    """A text and where it came from, for the record."""

    name: str
    text: str

    @classmethod
    def open(cls, file: Path | None) -> CalibrationText:
        """A file, or the bundled public-domain text."""
        if file is None:
            return cls("bundled", resources.files("trtbuild.data").joinpath("calibration.txt").read_text("utf-8"))
        try:
            return cls(file.name, file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"--calib-data {file}: not a readable UTF-8 text ({error})") from error

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def calibration_tokens(source: CheckpointSource, text: CalibrationText) -> list[list[int]]:
    """Sequences of equal length, evenly spaced over the text, each beginning as the tokenizer begins a text."""
    tokenizer = load_tokenizer(source.directory)
    # verbose=False: a text longer than the model's context is meant to be cut up here.
    ids: list[int] = tokenizer(text.text, verbose=False)["input_ids"]
    plain: list[int] = tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"]
    prefix = ids[: len(ids) - len(plain)] if ids[-len(plain) :] == plain else []
    length = min(SEQUENCE_LENGTH, source.config.max_position_embeddings) - len(prefix)
    if len(plain) < length:
        raise CheckpointError(f"calibration text {text.name!r} has {len(plain)} tokens; it takes at least {length}")
    last = len(plain) - length
    count = min(NUM_SEQUENCES, 1 + last // max(1, length // 2))
    starts = [round(last * i / max(1, count - 1)) for i in range(count)]
    return [prefix + plain[start : start + length] for start in starts]
