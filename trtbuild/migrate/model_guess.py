"""Which model an engine was made from.

The passport of an engine that trtbuild made says so. Nothing in another's does: a guess that the user has to confirm.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtbuild.checkpoints.known_models import KNOWN_MODELS, bundled_directory, facts_directory
from trtbuild.engines.passport import PASSPORT
from trtbuild.engines.tensorrt_llm.engine_config import ENGINE_CONFIG
from trtbuild.migrate.engine_facts import EngineFacts

UNKNOWN_MODEL = "MODEL"
# (pretrained_config's name, the Hugging Face config's)
_SIZES = (
    ("hidden_size", "hidden_size"), ("num_hidden_layers", "num_hidden_layers"),
    ("num_attention_heads", "num_attention_heads"), ("num_key_value_heads", "num_key_value_heads"),
    ("vocab_size", "vocab_size"), ("intermediate_size", "intermediate_size"),
)  # fmt: skip


@dataclass(frozen=True)
class ModelSource:
    """`reason`: what makes us think so."""

    model: str
    reason: str
    is_certain: bool = False
    revision: str | None = None


def find_model(engine: EngineFacts, tokenizer: str | None, tokenizer_directory: Path | None) -> ModelSource:
    """The model of the passport, if it is this engine's; else a guess.

    `tokenizer` is tokenizer_dir as it stands in the repository, `tokenizer_directory` where that is on this machine.
    """
    return _of_passport(engine) or ModelSource(*_guess(engine, tokenizer, tokenizer_directory))


def _of_passport(engine: EngineFacts) -> ModelSource | None:
    """None where there is none, or config.json is not the one that it was written for."""
    passport = _read_config(engine.directory / PASSPORT)
    source, digests = _section(passport.get("source")), _section(passport.get("digests"))
    model, revision = source.get("model"), source.get("revision")
    digest = _section(digests.get("engines")).get(ENGINE_CONFIG)
    if not isinstance(model, str) or not model:
        return None
    if digest != hashlib.sha256((engine.directory / ENGINE_CONFIG).read_bytes()).hexdigest():
        return None
    return ModelSource(model, f"of {PASSPORT} beside the engine", True, revision if isinstance(revision, str) else None)


def _guess(engine: EngineFacts, tokenizer: str | None, tokenizer_directory: Path | None) -> tuple[str, str]:
    if tokenizer_directory is not None and tokenizer is not None:
        config = _read_config(tokenizer_directory / "config.json")
        has_weights = any(tokenizer_directory.glob("*.safetensors"))
        if has_weights and _fits(engine, config):
            return str(tokenizer_directory), "tokenizer_dir holds weights, and its config.json has the engine's sizes"
    known = [name for name in KNOWN_MODELS if _fits(engine, _known_config(name))]
    if known:
        others = f"; so have {', '.join(known[1:])}" if len(known) > 1 else ""
        return known[0], f"a known model with the engine's sizes, as every fine-tune of it has{others}"
    if tokenizer is not None:
        return tokenizer, "it is tokenizer_dir; the engine does not name its model"
    return UNKNOWN_MODEL, "the engine does not name its model, and there is no tokenizer_dir"


def _known_config(name: str) -> Mapping[str, Any]:
    directory = facts_directory(name) or bundled_directory(name)
    return _read_config(directory / "config.json") if directory else {}


def _read_config(file: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _section(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _fits(engine: EngineFacts, config: Mapping[str, Any]) -> bool:
    """All sizes that both have are the same, and there are enough of them to tell models apart."""
    same = 0
    for ours, theirs in _SIZES:
        first, second = engine.model.get(ours), config.get(theirs)
        if first is None or second is None:
            continue
        if first != second:
            return False
        same += 1
    return same >= 5
