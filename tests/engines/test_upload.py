"""`trtbuild upload`: a manifest never stands beside missing files, wherever the store fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from click.testing import CliRunner
from fsspec.implementations.memory import MemoryFileSystem
from helpers import TINY_QWEN2

from trtbuild.checkpoints.content import Digest
from trtbuild.cli import main
from trtbuild.engines.compile import compile_engine
from trtbuild.engines.job import Job
from trtbuild.engines.load import load_engine
from trtbuild.engines.passport import Passport
from trtbuild.engines.recipe import Recipe
from trtbuild.engines.upload import upload_engine
from trtbuild.errors import CheckpointError, TrtBuildError
from trtbuild.workspace import Workspace


class FailingStore(MemoryFileSystem):
    """A store that fails after so many operations that change it: half of a file is left where it was being written."""

    protocol = "failing"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    remaining = 10**9
    log: list[str] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("failing://", "memory://"))

    def _step(self, what: str) -> bool:
        type(self).remaining -= 1
        self.log.append(what)
        if self.remaining == -1:
            return False
        if self.remaining < -1:
            raise ConnectionError(f"{what}: the network is gone")
        return True

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        whole = self._step(f"pipe {path}")
        # A small object appears whole or not at all.
        if not whole:
            raise ConnectionError(f"{path}: the network is gone")
        super().pipe_file(path, value, mode=mode, **options)

    def put_file(self, lpath: str, rpath: str, callback: Any = None, mode: str = "overwrite", **options: Any) -> None:
        content = Path(lpath).read_bytes()
        whole = self._step(f"put {rpath}")
        super().pipe_file(rpath, content if whole else content[: len(content) // 2])
        if not whole:
            raise ConnectionError(f"{rpath}: the network is gone")

    def put_back(self, path: str, content: bytes) -> None:
        super().pipe_file(path, content)

    def rm_file(self, path: str) -> None:
        if not self._step(f"rm {path}"):
            raise ConnectionError(f"{path}: the network is gone")
        super()._rm(path)

    def mv(self, path1: str, path2: str, *_: Any, **__: Any) -> None:
        if not self._step(f"mv {path1} {path2}"):
            raise ConnectionError(f"{path2}: the network is gone")
        super().pipe_file(path2, self.cat_file(path1))
        super()._rm(path1)


@pytest.fixture(scope="module", autouse=True)
def failing_protocol() -> None:
    fsspec.register_implementation("failing", FailingStore, clobber=True)


@pytest.fixture(autouse=True)
def store() -> Iterator[FailingStore]:
    FailingStore.store.clear()
    FailingStore.pseudo_dirs[:] = [""]
    FailingStore.remaining = 10**9
    FailingStore.log.clear()
    yield FailingStore()
    MemoryFileSystem.store.clear()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = Recipe.create(model=str(TINY_QWEN2), name="e", target=("sm89",), max_seq_len=64)
    directory = compile_engine(Job.resolve(recipe), Workspace(tmp_path_factory.mktemp("w")), workers=2).directory
    (directory / "runtime_cache").mkdir()
    (directory / "runtime_cache" / "gpu.bin").write_bytes(b"kernels of this machine")
    return directory


def files_of(directory: Path) -> dict[str, bytes]:
    files = (file for file in directory.rglob("*") if file.is_file() and "runtime_cache" not in file.parts)
    return {file.relative_to(directory).as_posix(): file.read_bytes() for file in files}


def stored(store: MemoryFileSystem, root: str = "/b/e") -> dict[str, bytes]:
    return {path.removeprefix(root + "/"): bytes(store.cat_file(path)) for path in store.find(root)}


def check_no_lie(store: MemoryFileSystem) -> bool:
    """Whether there is a manifest; if there is, everything that it names is there with that content."""
    found = stored(store)
    if "manifest.json" not in found:
        return False
    for name, entry in json.loads(found["manifest.json"])["files"].items():
        digest = Digest()
        digest.update(found[name])
        assert (len(found[name]), digest.hex()) == (entry["bytes"], entry["digest"]), name
    return True


def test_an_engine_comes_back_whole(engine: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    sent = upload_engine(engine, url)
    there = tmp_path / "store" / "e"
    manifest = json.loads((there / "manifest.json").read_text())
    assert files_of(there).keys() - {"manifest.json"} == files_of(engine).keys() == manifest["files"].keys()
    assert sent.bytes_sent == sum(len(content) for content in files_of(engine).values())
    assert (manifest["name"], manifest["passport"]) == ("e", manifest["files"]["engine.json"]["digest"])
    Passport.open(there).check_files()
    load_engine(there, num_slots=1).executor.close()
    before = {file: file.stat().st_mtime_ns for file in there.rglob("*")}
    again = upload_engine(engine, url)
    assert (again.num_sent, again.bytes_sent) == (0, 0)
    assert {file: file.stat().st_mtime_ns for file in there.rglob("*")} == before


def test_it_fails_anywhere_and_goes_on(engine: Path, store: FailingStore) -> None:
    """Every operation fails once; what arrived before is not sent again."""
    upload_engine(engine, "failing://b")
    assert check_no_lie(store)
    total, files = len(store.log), len(files_of(engine))
    assert total > 2 * files
    assert store.log[-1] == "mv /b/e/manifest.partial.json /b/e/manifest.json"
    for moment in range(total):
        store.store.clear()
        FailingStore.remaining = moment
        with pytest.raises(TrtBuildError, match=r"^failing://b/e: .*the network is gone; check the name"):
            upload_engine(engine, "failing://b")
        assert not check_no_lie(store)
        recorded = json.loads(stored(store).get("manifest.partial.json", b'{"files": {}}'))["files"]
        FailingStore.remaining = 10**9
        assert upload_engine(engine, "failing://b").num_sent == files - len(recorded)
        assert check_no_lie(store)
        assert stored(store).keys() == files_of(engine).keys() | {"manifest.json"}


def test_another_engine_of_the_name_takes_its_place(engine: Path, tmp_path: Path, store: FailingStore) -> None:
    """The old manifest goes before anything changes; files that both have are not sent again."""
    upload_engine(engine, "failing://b")
    changed = tmp_path / "e"
    shutil.copytree(engine, changed)
    log = next((changed / "plans").glob("*.log"))
    log.write_text(log.read_text().upper())
    gone = next(file for file in sorted((changed / "plans").glob("*.log")) if file != log)
    gone.unlink()
    before, moments = dict(stored(store)), 0
    while True:
        FailingStore.remaining = moments
        store.log.clear()
        try:
            report = upload_engine(changed, "failing://b")
            break
        except TrtBuildError:
            if check_no_lie(store):
                assert stored(store).keys() - before.keys() <= {"manifest.partial.json"}
        store.store.clear()
        for name, content in before.items():
            store.put_back(f"/b/e/{name}", content)
        moments += 1
    assert (moments, report.num_sent) == (len(store.log), 1)
    assert check_no_lie(store)
    assert f"plans/{gone.name}" not in stored(store)
    removed = store.log.index("rm /b/e/manifest.json")
    assert all("manifest" in step for step in store.log[:removed])


def test_damage_is_noticed(engine: Path, tmp_path: Path, store: FailingStore) -> None:
    """A file that vanished in the store is sent again; a damaged engine is not sent at all."""
    upload_engine(engine, "failing://b")
    store._rm("/b/e/rank0.safetensors")
    assert upload_engine(engine, "failing://b").num_sent == 1
    assert check_no_lie(store)
    damaged = tmp_path / "e"
    shutil.copytree(engine, damaged)
    (damaged / "tokenizer" / "tokenizer.json").write_text("{}")
    store.log.clear()
    with pytest.raises(CheckpointError, match=r"tokenizer/tokenizer.json differs"):
        upload_engine(damaged, "failing://c")
    assert not store.log


def test_a_flipped_weight_is_never_sent(engine: Path, tmp_path: Path, store: FailingStore) -> None:
    """In the middle of a tensor, which the passport's quick check does not read."""
    copy = tmp_path / "flipped"
    shutil.copytree(engine, copy)
    file = copy / "rank0.safetensors"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 4
    file.write_bytes(raw)
    store.log.clear()
    with pytest.raises(CheckpointError, match="content differs from what was written"):
        upload_engine(copy, "failing://b")
    assert not store.log


def test_the_command(engine: Path) -> None:
    workspace = ["--workspace", str(engine.parents[1])]
    ran = CliRunner().invoke(main, ["upload", "e", "memory://bucket/engines/", *workspace])
    assert ran.exit_code == 0, ran.output
    assert ran.stdout.startswith("memory://bucket/engines/e: ")
    assert MemoryFileSystem().exists("/bucket/engines/e/manifest.json")
    again = json.loads(
        CliRunner().invoke(main, ["upload", "e", "memory://bucket/engines", *workspace, "--json"]).stdout
    )
    assert again["num_sent"] == 0
    refused = CliRunner().invoke(main, ["upload", "e", "/tmp/somewhere", *workspace])
    assert (refused.exit_code, "is not a URL" in refused.stderr) == (3, True)
