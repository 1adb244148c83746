"""The checkpoint's tokenizer, through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trtbuild.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a checkpoint directory; CheckpointError where there is none. Never runs remote code."""
    if not any((directory / name).is_file() for name in _FILES):
        raise CheckpointError(f"{directory}: no tokenizer ({', '.join(_FILES)})")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{directory}: transformers cannot load the tokenizer: {error}") from error
