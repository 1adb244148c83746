"""`engine.json`, the passport: what an engine is, what it was made from, and how to make it again.

It is read and checked before anything else of an engine is. The rule of its format version: a new field that an old
reader may leave out, with a default that is true of old engines, keeps the version. Whatever would make a reader of one
version go wrong with the other changes it, and then an engine of another version is refused with the command that
rebuilds it: it was made by another trtbuild, whose plans nobody has checked against this one's network. Of an engine
only the record of accuracy is ever rewritten. 1: first. 2: kv_cache, model card, content digests; experts' loops add to
one sum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.model_config import ModelConfig
from trtbuild.checkpoints.precision import Precision
from trtbuild.checkpoints.rank_checkpoint import AUTHORITY, rank_file
from trtbuild.checkpoints.safetensors_file import read_header, sampled_digest
from trtbuild.engines.limits import EngineLimits
from trtbuild.errors import CheckpointError, Refused, refuse_all
from trtbuild.workspace import digest_of, read_json, write_json

FORMAT_VERSION = 2
PASSPORT = "engine.json"
PLAN_DIRECTORY = "plans"
# Of TensorRT-LLM's engines.
_ENGINE_FILES = "rank*.engine"
_ENGINE_CONFIG = "config.json"
_NOT_VERIFIABLE = (
    "nothing here can run an engine of TensorRT-LLM: trtbuild verify the same model and precision built with --builder "
    "tensorrt-rtx, or compare answers after trtbuild serve"
)
TOKENIZER_DIRECTORY = "tokenizer"
MODEL_CARD_DIRECTORY = "model_card"

AccuracyState = Literal["passed", "failed", "none", "stale"]


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
    def has_rank_checkpoint(self) -> bool:
        """Whether the directory is a rank checkpoint, too.

        False for an engine of `--plan-only`, and for one of TensorRT-LLM, whose weights are in its engine files.
        """
        return bool(self.data["digests"]["weights"])

    @property
    def builder_name(self) -> str:
        """tensorrt-rtx, tensorrt or tensorrt-llm."""
        return self.data["builder"]["name"]

    @property
    def tokenizer_directory(self) -> Path:
        return self.directory / TOKENIZER_DIRECTORY

    def accuracy_state(self) -> AccuracyState:
        """Whether `trtbuild verify` passed for what this engine now is."""
        return accuracy_state(self.data)

    def check_accuracy(self) -> str | None:
        """Before an engine is given to others: Refused where verify failed; a warning where nothing is known."""
        state, command = self.accuracy_state(), f"trtbuild verify {self.name}"
        if state == "failed":
            record = self.data["accuracy"]
            refuse_all(
                f"{self.name} failed verify on {record['date']}; build it again, or {command} with other limits",
                record["failures"],
            )
        if state == "stale":
            return f"{self.name}: its record of accuracy is of other content; {command} makes a new one"
        if state == "none":
            how = _NOT_VERIFIABLE if self.builder_name == "tensorrt-llm" else f"{command} compares it with its source"
            return f"{self.name}: its accuracy was never checked; {how}"
        return None

    def check_runnable(self) -> None:
        """Raises Refused for an engine without weights."""
        if self.builder_name == "tensorrt-llm":
            raise Refused(
                f"{self.name} is an engine of TensorRT-LLM, which runs inside Triton's tensorrtllm backend alone: "
                f"trtbuild package {self.name}, then trtbuild serve in its container"
            )
        if not self.has_rank_checkpoint:
            command = self.rebuild.replace(" --plan-only", "")
            raise Refused(f"{self.name} was compiled with --plan-only and has no weights; to run it: {command} --force")

    def check_files(self) -> None:
        """Compare every file with its digest; raises CheckpointError that names the first that differs."""
        found = file_digests(self.directory, self.layout, self.data["plans"], weights=self.has_rank_checkpoint)
        for group, files in self.data["digests"].items():
            if not isinstance(files, dict):
                continue
            for file, digest in files.items():
                if found.get(group, {}).get(file) != digest:
                    state = "is missing" if file not in found.get(group, {}) else "differs from what was built"
                    raise CheckpointError(f"{self.directory}: {file} {state}; rebuild: {self.rebuild} --force")


def verified_digest(data: Mapping[str, Any]) -> str:
    """What a record of accuracy is of: everything else in the passport, with the digests of all files."""
    return digest_of({key: value for key, value in data.items() if key != "accuracy"})


def accuracy_state(data: Mapping[str, Any]) -> AccuracyState:
    """Of a passport's content; "stale" where its record was made of another content."""
    record = data.get("accuracy")
    if not record:
        return "none"
    if record["engine_digest"] != verified_digest(data):
        return "stale"
    return "passed" if record["passed"] else "failed"


def write_accuracy(passport: Passport, record: Mapping[str, Any]) -> Passport:
    """Put a record of `passport`'s content into engine.json, which is replaced in one step.

    Raises Refused where the engine was built again meanwhile.
    """
    now, digest = Passport.open(passport.directory), verified_digest(passport.data)
    if verified_digest(now.data) != digest:
        raise Refused(f"{passport.directory} was built again while it was verified; verify it again")
    data = now.data | {"accuracy": {**record, "engine_digest": digest}}
    write_json(passport.directory / PASSPORT, data)
    return Passport(passport.directory, data)


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
        **_engine_digests(directory),
    }


def _engine_digests(directory: Path) -> dict[str, dict[str, str]]:
    """TensorRT-LLM's files, where it built the engine."""
    engines = sorted(directory.glob(_ENGINE_FILES))
    if not engines:
        return {}
    return {"engines": {file.name: _sha256(file) for file in (*engines, directory / _ENGINE_CONFIG)}}


def _digests_in(directory: Path, folder: str) -> dict[str, str]:
    return {f"{folder}/{file.name}": _sha256(file) for file in sorted((directory / folder).glob("*"))}


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
