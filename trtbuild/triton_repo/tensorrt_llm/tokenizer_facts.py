"""What the models' parameters say of a tokenizer, read once, when the repository is written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtbuild.errors import Refused
from trtbuild.workspace import read_json


@dataclass(frozen=True)
class TokenizerFacts:
    """`end_ids`: tokens that end an answer, the backend's own end_id first; the others become stop words."""

    end_ids: tuple[int, ...]
    pad_id: int

    @classmethod
    def read(cls, directory: Path) -> TokenizerFacts:
        """Of generation_config.json, else of the tokenizer's own end token. Raises `Refused` where there is neither."""
        tokenizer = _open(directory)
        generation = _optional(directory / "generation_config.json")
        names = _optional(directory / "tokenizer_config.json") | _optional(directory / "special_tokens_map.json")
        own = tokenizer.token_to_id(_content(names.get("eos_token")) or "")
        given = generation.get("eos_token_id", own)
        end_ids = [int(i) for i in (given if isinstance(given, list) else [given]) if i is not None]
        if not end_ids:
            raise Refused(f"{directory}: no end token, in generation_config.json or in tokenizer_config.json; add one")
        if own in end_ids:
            end_ids = [own, *(i for i in end_ids if i != own)]
        pad_id = tokenizer.token_to_id(_content(names.get("pad_token")) or "")
        return cls(tuple(dict.fromkeys(end_ids)), end_ids[0] if pad_id is None else pad_id)


def xgrammar_tokenizer_info(directory: Path, end_ids: tuple[int, ...]) -> str:
    """The file of `xgrammar_tokenizer_info_path`: tokens by id, the tokenizer, and the end tokens, in JSON."""
    tokenizer = _open(directory)
    vocabulary = sorted(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    return json.dumps({
        "encoded_vocab": [token for token, _ in vocabulary],
        "tokenizer_str": tokenizer.to_str(),
        "stop_token_ids": list(end_ids),
    })  # fmt: skip


def _open(directory: Path) -> Any:
    from tokenizers import Tokenizer

    # For a damaged file `Tokenizer` raises nothing narrower than Exception.
    read_json(directory / "tokenizer.json")
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def _optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _content(token: Any) -> str | None:
    """A special token is a string, or an object that says more of it."""
    return token.get("content") if isinstance(token, dict) else token
