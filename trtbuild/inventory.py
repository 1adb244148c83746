"""`trtbuild list` and `trtbuild prune`: what is in the workspace, what it takes on disk, and what can go.

An engine's rank weights are hard links to its rank checkpoint's, so sizes are counted by inode: what a removal frees is
only what nothing else links to.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import click

from trtbuild.errors import CheckFailed, Refused, TrtBuildError
from trtbuild.units import format_bytes
from trtbuild.workspace import PACKAGE_RECORD, REQUEST_FILE, Workspace, check_name, read_json

Stage = Literal["build", "calibration", "sources", "engines", "triton_repo"]
State = Literal["complete", "unfinished", "leftover", "unreadable"]

# The file that makes a directory a result of its stage.
_AUTHORITY: dict[Stage, str] = {
    "build": "trtbuild.json", "calibration": REQUEST_FILE, "sources": REQUEST_FILE, "engines": "engine.json",
    "triton_repo": PACKAGE_RECORD,
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One directory of a stage.

    complete: a result; unfinished: what a killed command left, which the same command continues; leftover: a replaced
    result whose removal was interrupted; unreadable: it bears a result's name but cannot be read.
    `bytes` counts each inode once; `frees` is what removing this directory alone gives back.
    """

    stage: Stage
    name: str
    path: Path
    state: State
    bytes: int
    frees: int
    about: str
    busy: bool

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def inventory(workspace: Workspace) -> list[Item]:
    """Everything in build/, build/.calibration/, build/.sources/, engines/ and triton_repo/ that trtbuild made.

    By stage and name; a package's models all have their engine's name.
    """
    items = []
    folders: dict[Stage, Path] = {
        "build": workspace.build, "calibration": workspace.calibrations, "sources": workspace.sources,
        "engines": workspace.engines, "triton_repo": workspace.models,
    }  # fmt: skip
    for stage, folder in folders.items():
        paths = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        for path in paths:
            item = _examine(stage, path)
            if item is not None:
                items.append(item)
    staging = workspace.packages_staging
    left = sorted(path for path in staging.iterdir() if path.is_dir()) if staging.is_dir() else []
    return items + [_item("triton_repo", path.name, path, "leftover", "") for path in left]


def print_inventory(items: Sequence[Item], as_json: bool) -> None:
    """A line for each, and the sum; as JSON, a list."""
    if as_json:
        click.echo(json.dumps([item.to_dict() for item in items], indent=1))
        return
    for item in items:
        state = "in use" if item.busy else item.state
        click.echo(f"{item.stage:11} {item.name:36} {format_bytes(item.bytes):>11}  {state:10}  {item.about}")
    total = disk_bytes(item.path for item in items)
    click.echo(f"{len(items)} in all, {format_bytes(total)} on disk (weights that stages share count once)")


def check_contents(items: Iterable[Item]) -> Iterator[tuple[Item, str | None]]:
    """Read every file of the complete results and compare it with what was written: what differs, or None."""
    from trtbuild.checkpoints.rank_checkpoint import RankCheckpoint, verify_content
    from trtbuild.engines.passport import Passport

    for item in items:
        if item.state != "complete" or item.stage in ("calibration", "sources", "triton_repo"):
            continue
        try:
            if item.stage == "engines":
                passport = Passport.open(item.path)
                passport.check_files()
                if not passport.has_rank_checkpoint:
                    yield item, None
                    continue
            verify_content(RankCheckpoint.open(item.path))
        except TrtBuildError as error:
            yield item, error.message
        else:
            yield item, None


def print_checks(checks: Iterable[tuple[Item, str | None]], as_json: bool) -> None:
    """One line for each; raises CheckFailed at the end where one differs."""
    found = []
    for item, problem in checks:
        found.append((item, problem))
        if not as_json:
            click.echo(f"{item.stage:11} {item.name:36} {problem or 'content as written'}")
    if as_json:
        click.echo(json.dumps([{"stage": i.stage, "name": i.name, "problem": problem} for i, problem in found]))
    broken = list(dict.fromkeys(item.name for item, problem in found if problem))
    if broken:
        raise CheckFailed(f"not as it was written: {', '.join(broken)}; build it again with --force")


def prune(
    workspace: Workspace, names: Sequence[str] = (), *, rank_checkpoints: bool = False, dry_run: bool = False
) -> list[Item]:
    """Remove what can go, and return it; nothing that a running command holds.

    Without `names`: what killed commands left, and with `rank_checkpoints` also build/NAME of every complete engine,
    which has the weights itself. With `names`: these results of all stages. `Refused` for a name that is not there,
    or that is in use.
    """
    items = inventory(workspace)
    chosen = _named(items, names) if names else [item for item in items if _can_go(item, items, rank_checkpoints)]
    if not dry_run:
        for item in chosen:
            _remove(item)
    return chosen


def print_pruned(removed: Sequence[Item], freed: int, dry_run: bool, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"removed": [i.to_dict() for i in removed], "freed": freed, "dry_run": dry_run}))
        return
    for item in removed:
        click.echo(
            f"{'would remove' if dry_run else 'removed':12} {item.path}  ({item.state}, {format_bytes(item.bytes)})"
        )
    click.echo(f"{'would free' if dry_run else 'freed'} {format_bytes(freed)}" if removed else "nothing to remove")


def freed_bytes(items: Iterable[Item]) -> int:
    """What removing all of these together gives back."""
    return _unshared(path for item in items for path in _files(item.path))


def disk_bytes(directories: Iterable[Path]) -> int:
    """Bytes of all files, each inode once."""
    seen = {(s.st_dev, s.st_ino): s.st_size for directory in directories for s in map(os.lstat, _files(directory))}
    return sum(seen.values())


def _examine(stage: Stage, path: Path) -> Item | None:
    """None for a directory that trtbuild did not make."""
    name, state = path.name, cast("State", "complete")
    if stage == "triton_repo":
        return _examine_model(path)
    if name.startswith(".") and name.endswith((".partial", ".old")):
        state = "unfinished" if name.endswith(".partial") else "leftover"
        name = name[1:].rpartition(".")[0]
    elif not (path / REQUEST_FILE).is_file():
        return None
    about = ""
    if state == "complete":
        try:
            about = _describe(stage, read_json(path / _AUTHORITY[stage]))
        except (TrtBuildError, KeyError, TypeError) as error:
            state, about = "unreadable", f"{_AUTHORITY[stage]}: {error}"
    return _item(stage, name, path, state, about)


def _examine_model(path: Path) -> Item | None:
    """A Triton model directory; None for somebody else's."""
    if not (path / PACKAGE_RECORD).is_file():
        return None
    try:
        record = read_json(path / PACKAGE_RECORD)
        name, about = str(record["engine"]), f"Triton model {path.name}"
    except (TrtBuildError, KeyError) as error:
        return _item("triton_repo", path.name, path, "unreadable", f"{PACKAGE_RECORD}: {error}")
    return _item("triton_repo", name, path, "complete", about)


def _item(stage: Stage, name: str, path: Path, state: State, about: str) -> Item:
    # Of packages, not even the lock is where Triton would take it for a model.
    locks = path.parents[1] if stage == "triton_repo" else path.parent
    return Item(stage, name, path, state, disk_bytes([path]), _unshared(_files(path)), about, _is_locked(locks, name))


def _describe(stage: Stage, authority: dict[str, Any]) -> str:
    if stage == "calibration":
        request = authority["request"]
        kind, _ = request.get("algorithm", ("fp8", 1))
        told = {"fp8": "activation ranges", "sensitivity": "what each linear layer's precision costs"}
        return f"{told.get(kind, f'{kind} values')}, for every layout"
    if stage == "sources":
        return f"fetched from {authority['request']['url']}"
    layout, precision = authority["layout"], authority["precision"]["weights"]
    ranks = f"tp {layout['tp']} pp {layout['pp']}"
    if authority["model"].get("moe"):
        ranks += f" moe-tp {layout['moe_tp']} moe-ep {layout['moe_ep']}"
    parts = [authority["model"]["architecture"], precision, ranks]
    if stage == "engines":
        parts += [f"{authority['builder']['name']} {authority['builder']['version']}", authority["created"][:10]]
        parts.append(_accuracy(authority))
    return ", ".join(parts)


def _accuracy(passport: dict[str, Any]) -> str:
    """In a word; only what `trtbuild verify` can run is told to be not verified."""
    from trtbuild.engines.passport import accuracy_state

    if passport["digests"].get("engines"):
        return "verify cannot run it"
    if not passport["digests"]["weights"]:
        return "plans only"
    state = accuracy_state(passport)
    told = {"none": "not verified", "stale": "verified before it changed", "failed": "failed verify"}
    return told.get(state) or f"verified {passport['accuracy']['date'][:10]}"


def _can_go(item: Item, items: Sequence[Item], rank_checkpoints: bool) -> bool:
    if item.busy:
        return False
    if item.state in ("unfinished", "leftover"):
        return True
    has_engine = any(
        other.stage == "engines" and other.name == item.name and other.state == "complete" for other in items
    )
    return rank_checkpoints and item.stage == "build" and has_engine


def _named(items: Sequence[Item], names: Sequence[str]) -> list[Item]:
    chosen = []
    for name in dict.fromkeys(names):
        found = [item for item in items if item.name == check_name(name)]
        if not found:
            there = ", ".join(sorted({item.name for item in items})) or "nothing"
            raise Refused(f"{name!r} is neither in build/, nor in engines/, nor in triton_repo/; there: {there}")
        busy = [item for item in found if item.busy]
        if busy:
            raise Refused(f"{busy[0].path} is being written by another trtbuild process; nothing was removed")
        chosen += found
    return chosen


def _remove(item: Item) -> None:
    """A result loses its name first, so that a kill never leaves half of one under it."""
    doomed = item.path
    if item.stage == "triton_repo":
        doomed = item.path.parents[1] / ".staging" / f"{item.path.name}.old"
        doomed.parent.mkdir(exist_ok=True)
        shutil.rmtree(doomed, ignore_errors=True)
        item.path.replace(doomed)
    elif not doomed.name.startswith("."):
        doomed = item.path.with_name(f".{item.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        item.path.replace(doomed)
    shutil.rmtree(doomed)


def _is_locked(folder: Path, name: str) -> bool:
    """Whether a command holds NAME's lock (see `workspace.staged`)."""
    lock = folder / f".{name}.lock"
    if not lock.is_file():
        return False
    with lock.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())


def _unshared(files: Iterable[Path]) -> int:
    """Bytes of the inodes all of whose links are among `files`."""
    stats = [os.lstat(path) for path in files]
    links = Counter((s.st_dev, s.st_ino) for s in stats)
    sizes = {(s.st_dev, s.st_ino): s.st_size for s in stats if links[s.st_dev, s.st_ino] == s.st_nlink}
    return sum(sizes.values())
