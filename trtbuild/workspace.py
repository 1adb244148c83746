"""The workspace: one folder per stage, and results that appear under their name only when complete.

A stage writes into `.NAME.partial` beside its final place, under a lock, and renames it at the end. What a killed
command left there is continued by the next one, if it was made for the same request, and discarded otherwise.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Any

from trtbuild.errors import CheckpointError, Refused

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# Recipes, READMEs and container files live in the stage folders too.
_EDITED_FILES = (".toml", ".md", ".yaml", "dockerfile")
REQUEST_FILE = "request.json"
# In each directory of the Triton model repository that is ours.
PACKAGE_RECORD = "trtbuild.json"
# linux/fs.h, linux/fcntl.h
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@dataclass(frozen=True)
class Workspace:
    """Folders of the stages under `root`, created when something lands in them."""

    root: Path

    @property
    def build(self) -> Path:
        return self.root / "build"

    @property
    def calibrations(self) -> Path:
        """Activation ranges, which every layout of a model shares."""
        return self.build / ".calibration"

    @property
    def sources(self) -> Path:
        """Checkpoints that were fetched from object stores."""
        return self.build / ".sources"

    @property
    def engines(self) -> Path:
        return self.root / "engines"

    @property
    def models(self) -> Path:
        """The Triton model repository."""
        return self.root / "triton_repo" / "models"

    @property
    def packages_staging(self) -> Path:
        """Where packages are laid out: not among the models, where Triton would find them."""
        return self.models.parent / ".staging"

    def engine_names(self) -> list[str]:
        return sorted(file.parent.name for file in self.engines.glob("*/engine.json"))

    def engine(self, name: str) -> Path:
        """Directory of the engine NAME; `Refused`, listing what there is, when it does not exist."""
        directory = self.engines / check_name(name)
        if not (directory / "engine.json").is_file():
            known = ", ".join(self.engine_names()) or "none yet"
            raise Refused(f"no engine {name!r} in {self.engines}; there: {known}. Build it with trtbuild compile")
        return directory


def check_name(name: str) -> str:
    """A NAME is a file name, nothing more: letters, digits, dot, underscore, hyphen."""
    if name.lower().endswith(_EDITED_FILES):
        raise Refused(f"name {name!r}: names of files that a person keeps beside the results are not for results")
    if not _NAME.fullmatch(name):
        raise Refused(
            f"name {name!r}: use letters, digits, '.', '_' and '-', beginning with a letter or digit, at most 128"
        )
    return name


def digest_of(value: Any) -> str:
    """sha256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_atomic(path: Path, content: bytes) -> None:
    """A whole file, or none under this name."""
    with atomic_file(path) as file:
        file.write(content)


@contextmanager
def atomic_file(path: Path) -> Iterator[BufferedRandom]:
    """A file to write and read beside `path`; on disk and renamed when the block ends without an exception."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        # Of a failed write Python does not say which file it was.
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(file: Path, value: Any) -> None:
    """Replace `file` with the value, in one step and on disk."""
    write_atomic(file, (json.dumps(value, indent=1) + "\n").encode())


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object that one of our stages wrote; CheckpointError names the file where it is damaged."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is missing or damaged ({error}); build it again with --force") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is not a JSON object; build it again with --force")
    return value


@contextmanager
def staged(final: Path, request: dict[str, Any], *, force: bool = False) -> Iterator[Path | None]:
    """The directory in which to build `final`; published when the block ends without an exception.

    Yields None when `final` is there already, made for the same `request`. Raises `Refused` when it was made for
    another one (unless `force`), and when another process is building it.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    digest = digest_of(request)
    with locked(final.with_name(f".{final.name}.lock"), final):
        if final.exists():
            if not (final / REQUEST_FILE).is_file():
                raise Refused(f"{final} is there and was not made by trtbuild; choose another --name")
            if not force:
                _check_same_request(final, digest, request)
                yield None
                return
        partial = final.with_name(f".{final.name}.partial")
        marker = partial / REQUEST_FILE
        if partial.exists() and not (marker.is_file() and read_json(marker).get("digest") == digest):
            shutil.rmtree(partial)
        partial.mkdir(exist_ok=True)
        if not marker.is_file():
            write_json(marker, {"digest": digest, "request": request})
        yield partial
        _publish(partial, final)


def _check_same_request(final: Path, digest: str, request: dict[str, Any]) -> None:
    before = read_json(final / REQUEST_FILE)
    if before.get("digest") == digest:
        return
    old = before.get("request", {})
    changed = [f"{key}: {old.get(key)!r} -> {value!r}" for key, value in request.items() if old.get(key) != value]
    details = "".join(f"\n  - {line[:300]}" for line in changed)
    raise Refused(f"{final} was made for another request; replace it with --force, or choose another --name{details}")


@contextmanager
def locked(lock: Path, final: Path) -> Iterator[None]:
    """Hold `lock` while `final` is written; `Refused` where another process does."""
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refused(
                f"{final} is being written by another trtbuild process; wait for it, or use another --name"
            ) from error
        yield


def _publish(partial: Path, final: Path) -> None:
    for left_by_kills in partial.rglob(".*.tmp"):
        left_by_kills.unlink()
    for path in (*partial.rglob("*"), partial):
        sync(path)
    replace_directory(partial, final, final.with_name(f".{final.name}.old"))


def replace_directory(new: Path, final: Path, old: Path) -> None:
    """Put the directory `new` under the name `final`; what was there is removed by way of the name `old`.

    One step (Linux's renameat2) where the file system has it, so that a reader sees the one or the other; two renames
    elsewhere. All on one file system.
    """
    shutil.rmtree(old, ignore_errors=True)  # A kill in the lines below leaves one.
    if final.exists() and _exchange(new, final):
        new.replace(old)
    else:
        if final.exists():
            final.replace(old)
        new.replace(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step; False where this system or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def sync(path: Path) -> None:
    """Put a file's content, or a directory's entries, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
