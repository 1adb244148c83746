"""Small engines to verify, and a way to break copies of them that keeps every digest right."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_without_plans import no_plans
from safetensors.torch import load_file, save_file

from trtbuild.checkpoints.rank_checkpoint import AUTHORITY, rank_file
from trtbuild.engines.compile import compile_engine
from trtbuild.engines.job import Job
from trtbuild.engines.passport import PASSPORT, Passport, file_digests
from trtbuild.engines.recipe import Recipe
from trtbuild.workspace import Workspace

SMALL: dict[str, Any] = {"target": ("sm89",), "max_batch_size": 3, "max_seq_len": 128, "chunk_size": 64}
RECIPES: dict[str, dict[str, Any]] = {
    "qwen2-bf16": {"model": "tiny-qwen2", "tp": 2},
    "mixtral-int4": {"model": "tiny-mixtral", "precision": "int4", "tp": 2},
    "mixtral-fp8": {"model": "tiny-mixtral", "precision": "fp8"},
}
# The others are not compiled, which takes most of a minute and has tests of its own; nothing here reads a plan.
COMPILED = "qwen2-bf16"
Ranks = list[dict[str, torch.Tensor]]
Break = Callable[[Ranks, dict[str, Any]], None]


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """One for all test workers, so that each engine is compiled once."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "accuracy"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def healthy(shared_folder: Path) -> Callable[[str], Path]:
    """Directory of an engine of `RECIPES`; not to be written to."""

    def get(name: str) -> Path:
        with (shared_folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            job = Job.resolve(Recipe.create(name=name, **SMALL, **RECIPES[name]))
            with pytest.MonkeyPatch.context() as patch:
                if name != COMPILED:
                    patch.setattr("trtbuild.engines.compile.build_plans", no_plans)
                return compile_engine(job, Workspace(shared_folder), workers=1).directory

    return get


@pytest.fixture
def copy_of(healthy: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of an engine in a workspace of its own, to write to."""

    def get(name: str) -> Path:
        return shutil.copytree(healthy(name), tmp_path / "engines" / name)

    return get


@pytest.fixture
def broken(copy_of: Callable[[str], Path]) -> Callable[[str, Break], Path]:
    """A copy whose rank tensors and manifest `break_it` has changed, with digests that fit."""

    def get(name: str, break_it: Break) -> Path:
        directory = copy_of(name)
        passport = Passport.open(directory)
        files = [directory / rank_file(rank) for rank in range(passport.layout.world_size)]
        ranks, authority = [load_file(file) for file in files], json.loads((directory / AUTHORITY).read_text())
        break_it(ranks, authority)
        for file, tensors in zip(files, ranks, strict=True):
            file.unlink()
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
        (directory / AUTHORITY).unlink()
        (directory / AUTHORITY).write_text(json.dumps(authority))
        data = passport.data | {"digests": file_digests(directory, passport.layout, passport.data["plans"])}
        (directory / PASSPORT).write_text(json.dumps(data))
        return directory

    return get


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where answers in batches are not what is looked at."""
    monkeypatch.setattr("trtbuild.accuracy.invariance.NUM_STEPS", 2)
    yield
