"""A tokenizer of tiny-mixtral's vocabulary in which characters span tokens that the model says one after another."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from trtllm_engine import TINY_MIXTRAL

CHARACTERS = ("語", "é", "🌍", "ß", "数")


def write_split_tokenizer(file: Path, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> list[str]:
    """Into `file`: wherever the answer has a pair of tokens that always come together, each gets half of a character.

    The prompt is cut as before. The characters that the answer has now.
    """
    data = json.loads((TINY_MIXTRAL / "tokenizer.json").read_text())
    names = {token_id: name for name, token_id in data["model"]["vocab"].items()}
    letters = _byte_letters()
    used: list[str] = []
    for (first, second), character in zip(_pairs(prompt_ids, answer_ids), CHARACTERS, strict=False):
        raw = [letters[byte] for byte in character.encode()]
        names[first], names[second] = f"{names[first]}{raw[0]}", f"{''.join(raw[1:])}Ġ{names[second].lstrip('Ġ')}"
        used.append(character)
    old = {name for name in data["model"]["vocab"] if name not in set(names.values())}
    data["model"]["vocab"] = {name: token_id for token_id, name in names.items()}
    data["model"]["merges"] = [
        pair for pair in data["model"]["merges"] if not {*pair, "".join(pair)} & old
    ]  # fmt: skip
    file.write_text(json.dumps(data))
    return used


def _pairs(prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> list[tuple[int, int]]:
    """Of two tokens that the answer has together only, and the prompt has not; no token is in two pairs."""
    found: list[tuple[int, int]] = []
    for pair in itertools.pairwise(answer_ids):
        together = list(itertools.pairwise(answer_ids)).count(pair)
        alone = all(answer_ids.count(one) == together and one not in prompt_ids for one in pair)
        if alone and pair[0] != pair[1] and not any(one in other for other in found for one in pair):
            found.append(pair)
    return found


def _byte_letters() -> dict[int, str]:
    """What byte-level tokenizers write for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + index) for index, byte in enumerate(rest)}


def open_tokenizer(file: Path) -> Tokenizer:
    return Tokenizer.from_file(str(file))
