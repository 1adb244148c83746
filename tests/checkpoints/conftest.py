from __future__ import annotations

import os

import pytest
from helpers import make_checkpoint

import trtbuild.checkpoints.convert as convert_module
from trtbuild.checkpoints.source import CheckpointSource


@pytest.fixture
def journal_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every unit is journalled before the next begins, so that kills find it; there is a test of the thread too.

    A kill, unlike a power cut, loses nothing that was written: waiting for the disk would only make the tests slow.
    """
    monkeypatch.setattr(convert_module, "SYNC_SECONDS", 0.0)
    monkeypatch.setattr(os, "fdatasync", lambda _: None)
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> CheckpointSource:
    """Two layers of a small Mixtral, in two shards."""
    directory = make_checkpoint(tmp_path_factory.mktemp("hf") / "m", "mixtral", num_hidden_layers=2, shards=2)
    return CheckpointSource.open(str(directory))
