"""`engine.json`, the passport: what an engine is, what it was made from, and how to make it again.

It is read and checked before anything else of an engine is. The rule of its format version: a new field that an old
reader may leave out, with a default that is true of old engines, keeps the version. Whatever would make a reader of one
version go wrong with the other changes it, and then an engine of another version is refused with the command that
rebuilds it: it was made by another trtbuild, whose plans nobody has checked against this one's network. Engines are
never rewritten in place. 1: first. 2: kv_cache, model card, content digests; experts' loops add to one sum.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.model_config import ModelConfig
from trtbuild.checkpoints.precision import Precision
from trtbuild.checkpoints.rank_checkpoint import AUTHORITY, rank_file
from trtbuild.checkpoints.safetensors_file import read_header, sampled_digest
from trtbuild.engines.limits import EngineLimits
from trtbuild.errors import CheckpointError, Refused
from trtbuild.workspace import read_json

FORMAT_VERSION = 2
PASSPORT = "engine.json"
PLAN_DIRECTORY = "plans"
TOKENIZER_DIRECTORY = "tokenizer"
MODEL_CARD_DIRECTORY = "model_card"


@dataclass(frozen=True)
class Passport:
    """A checked engine.json; `data` is the whole of it."""

    directory: Path
    data: dict[str, Any]

    @classmethod
    def open(cls, directory: Path) -> Passport:
        """Raises Refused for another format version, CheckpointError for a missing or damaged file."""
        if not (directory / PASSPORT).is_file():
            raise CheckpointError(f"{directory}: no {PASSPORT}; this is not an engine (trtbuild compile makes one)")
        data = read_json(directory / PASSPORT)
        rebuild = data.get("rebuild", "trtbuild compile")
        if data.get("format") != FORMAT_VERSION:
            raise Refused(
                f"{directory}: passport format {data.get('format')}, this trtbuild reads {FORMAT_VERSION}; "
                f"rebuild: {rebuild}"
            )
        return cls(directory, data)

    @property
    def name(self) -> str:
        return self.data["name"]

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_dict(self.data["model"])

    @property
    def layout(self) -> Layout:
        return Layout(**self.data["layout"])

    @property
    def precision(self) -> Precision:
        return Precision.from_dict(self.data["precision"])

    @property
    def limits(self) -> EngineLimits:
        return EngineLimits(**self.data["limits"])

    @property
    def rebuild(self) -> str:
        """The command that makes this engine again."""
        return self.data["rebuild"]

    @property
    def has_weights(self) -> bool:
        """False for an engine of `--plan-only`."""
        return bool(self.data["digests"]["weights"])

    @property
    def tokenizer_directory(self) -> Path:
        return self.directory / TOKENIZER_DIRECTORY

    def check_runnable(self) -> None:
        """Raises Refused for an engine without weights."""
        if not self.has_weights:
            command = self.rebuild.replace(" --plan-only", "")
            raise Refused(f"{self.name} was compiled with --plan-only and has no weights; to run it: {command} --force")

    def check_files(self) -> None:
        """Compare every file with its digest; raises CheckpointError that names the first that differs."""
        found = file_digests(self.directory, self.layout, self.data["plans"], weights=self.has_weights)
        for group, files in self.data["digests"].items():
            if not isinstance(files, dict):
                continue
            for file, digest in files.items():
                if found[group].get(file) != digest:
                    state = "is missing" if file not in found[group] else "differs from what was built"
                    raise CheckpointError(f"{self.directory}: {file} {state}; rebuild: {self.rebuild} --force")


def file_digests(
    directory: Path, layout: Layout, plans: list[dict[str, Any]], *, weights: bool = True
) -> dict[str, Any]:
    """Digests of an engine directory's files; of weights their headers and samples (see `sampled_digest`)."""
    ranks = [rank_file(rank) for rank in range(layout.world_size)] if weights else []
    authority = [AUTHORITY] if weights else []
    plan_files = [f"{PLAN_DIRECTORY}/{plan['file']}" for plan in plans]
    return {
        "weights": {
            name: sampled_digest(read_header(directory / name)) for name in ranks if (directory / name).is_file()
        },
        "manifest": {name: _sha256(directory / name) for name in authority if (directory / name).is_file()},
        "plans": {name: _sha256(directory / name) for name in plan_files if (directory / name).is_file()},
        "tokenizer": _digests_in(directory, TOKENIZER_DIRECTORY),
        "model_card": _digests_in(directory, MODEL_CARD_DIRECTORY),
    }


def _digests_in(directory: Path, folder: str) -> dict[str, str]:
    return {f"{folder}/{file.name}": _sha256(file) for file in sorted((directory / folder).glob("*"))}


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
