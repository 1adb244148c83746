"""`trtbuild upload`: a finished engine into an object store, whole or not at all.

`manifest.json` is written last and removed first: a reader that sees one sees all its files. Until then the same list
stands in `manifest.partial.json`, file by file as they arrive; an upload that ended early goes on from it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import trtbuild
from trtbuild.checkpoints.content import ALGORITHM, Digest
from trtbuild.checkpoints.rank_checkpoint import RankCheckpoint, verify_content
from trtbuild.engines.passport import PASSPORT, Passport
from trtbuild.errors import CheckFailed
from trtbuild.object_store import open_store, store_errors
from trtbuild.progress import ProgressFactory, no_progress

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

MANIFEST, PARTIAL = "manifest.json", "manifest.partial.json"
FORMAT_VERSION = 1
# Kernels of this machine's GPU and driver: of no use elsewhere.
_LOCAL_FOLDERS = ("runtime_cache",)
_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class UploadReport:
    """Where the engine is now, and how many of its files, and bytes, had to be sent."""

    url: str
    num_files: int
    num_sent: int
    bytes_sent: int


def upload_engine(directory: Path, url: str, *, progress: ProgressFactory = no_progress) -> UploadReport:
    """Copy an engine directory to `url`/NAME; what is there already with the same content is not sent again.

    Raises CheckpointError for a damaged engine, before anything is sent, and TrtBuildError where the store fails.
    """
    passport = Passport.open(directory)
    passport.check_files()
    if passport.has_rank_checkpoint:
        verify_content(RankCheckpoint.open(directory))
    destination = f"{url.rstrip('/')}/{directory.name}"
    store, path = open_store(destination)
    manifest = make_manifest(directory)
    with store_errors(destination):
        upload = _Upload(store, path, directory, manifest)
        if upload.is_complete():
            return UploadReport(destination, len(manifest["files"]), 0, 0)
        missing = upload.begin()
        with progress(f"uploading to {destination}", len(missing), "files") as bar:
            for name in missing:
                upload.send(name)
                bar.advance(1, name)
        upload.end()
    sent = sum(manifest["files"][name]["bytes"] for name in missing)
    return UploadReport(destination, len(manifest["files"]), len(missing), sent)


def make_manifest(directory: Path) -> dict[str, Any]:
    """Every file of an engine by its path, with bytes and content digest; `passport` is the digest of engine.json."""
    files = {}
    for file in sorted(directory.rglob("*")):
        name = file.relative_to(directory)
        if file.is_file() and name.parts[0] not in _LOCAL_FOLDERS and not file.name.startswith("."):
            files[name.as_posix()] = {"bytes": file.stat().st_size, "digest": _digest(file)}
    return {
        "format": FORMAT_VERSION,
        "trtbuild": trtbuild.__version__,
        "name": directory.name,
        "digest_algorithm": ALGORITHM,
        "passport": files[PASSPORT]["digest"],
        "files": files,
    }


class _Upload:
    """One engine's way into a store."""

    def __init__(self, store: AbstractFileSystem, path: str, directory: Path, manifest: dict[str, Any]) -> None:
        self._store, self._path, self._directory, self._manifest = store, path, directory, manifest
        self._arrived: dict[str, Any] = {}

    def is_complete(self) -> bool:
        """Whether this very engine is there already."""
        return self._read(MANIFEST) == self._manifest and all(map(self._has, self._manifest["files"]))

    def begin(self) -> list[str]:
        """Take the manifest of what was there away, and the files that are no longer part; the names to send."""
        known = (self._read(MANIFEST) or self._read(PARTIAL) or {}).get("files", {})
        wanted = self._manifest["files"]
        self._arrived = {name: known[name] for name in wanted if known.get(name) == wanted[name] and self._has(name)}
        self._write_partial()
        if self._store.exists(self._at(MANIFEST)):
            self._store.rm_file(self._at(MANIFEST))
        for name in known.keys() - wanted.keys():
            if self._store.exists(self._at(name)):
                self._store.rm_file(self._at(name))
        return [name for name in wanted if name not in self._arrived]

    def send(self, name: str) -> None:
        """One file; CheckFailed where not all of it arrived, or where it is not what the manifest says."""
        file, entry = self._directory / name, self._manifest["files"][name]
        self._store.makedirs(self._at(name).rpartition("/")[0], exist_ok=True)
        self._store.put_file(str(file), self._at(name))
        if not self._has(name):
            raise CheckFailed(f"{self._at(name)}: not all of {entry['bytes']} bytes arrived; give the command again")
        self._arrived[name] = entry
        self._write_partial()

    def end(self) -> None:
        """Publish: the list of what arrived becomes the manifest."""
        if make_manifest(self._directory) != self._manifest:
            raise CheckFailed(f"{self._directory} was changed while it was uploaded; give the command again")
        self._store.mv(self._at(PARTIAL), self._at(MANIFEST))

    def _write_partial(self) -> None:
        self._store.makedirs(self._path, exist_ok=True)
        listed = self._manifest | {
            "files": {n: self._arrived[n] for n in self._manifest["files"] if n in self._arrived}
        }
        self._store.pipe_file(self._at(PARTIAL), json.dumps(listed, indent=1).encode())

    def _read(self, name: str) -> dict[str, Any] | None:
        """None where it is not there, or damaged: then everything is sent."""
        try:
            found = json.loads(self._store.cat_file(self._at(name)))
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _has(self, name: str) -> bool:
        self._store.invalidate_cache()
        try:
            return self._store.info(self._at(name))["size"] == self._manifest["files"][name]["bytes"]
        except FileNotFoundError:
            return False

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"


def _digest(file: Path) -> str:
    digest = Digest()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hex()


def print_upload(report: UploadReport, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(vars(report)))
        return
    size = f"{report.bytes_sent / 2**20:.1f} MiB"
    sent = f"{report.num_sent} sent ({size})" if report.num_sent else "all there already"
    click.echo(f"{report.url}: {report.num_files} files, {sent}; {MANIFEST} is in place")
