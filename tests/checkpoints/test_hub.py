"""Hub ids, offline: huggingface_hub's own cache layout, filled by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import TINY_QWEN2

from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.errors import CheckpointError, Refused

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one model, owner/tiny, whose `main` and tag `v1` are COMMIT; files are links to blobs."""
    repository = tmp_path / "models--owner--tiny"
    snapshot, blobs, refs = repository / "snapshots" / COMMIT, repository / "blobs", repository / "refs"
    for directory in (snapshot, blobs, refs):
        directory.mkdir(parents=True)
    for number, file in enumerate(sorted(TINY_QWEN2.iterdir())):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    for ref in ("main", "v1"):
        (refs / ref).write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_a_revision_is_pinned_to_its_commit(cache: Path, revision: str | None) -> None:
    source = CheckpointSource.open("owner/tiny", revision)
    assert source.revision == COMMIT
    assert source.digest == CheckpointSource.open(str(TINY_QWEN2)).digest
    assert source.tensor("layers.0.q").shape == (256, 256)


def test_a_model_that_is_not_cached_is_named(cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot fetch owner/other from the hub.*local directory"):
        CheckpointSource.open("owner/other")


@pytest.mark.parametrize("model", ["a/b/c", "./missing", "/missing", "owner/bad name"])
def test_what_is_no_hub_id_is_refused(cache: Path, model: str) -> None:
    with pytest.raises(Refused, match="model"):
        CheckpointSource.open(model)
