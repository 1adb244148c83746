"""Results appear under their name whole or not at all, and are never mixed up with another request's."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trtbuild.errors import CheckpointError, Refused, TrtBuildError, refuse_all
from trtbuild.workspace import Workspace, check_name, digest_of, read_json, staged, write_json

REQUEST = {"model": "a", "tp": 2}


def names_in(directory: Path) -> list[str]:
    return sorted(file.name for file in directory.iterdir())


def build(final: Path, text: str, request: dict[str, object] | None = None, *, force: bool = False) -> bool:
    """Whether there was something to build."""
    with staged(final, request or REQUEST, force=force) as partial:
        if partial is not None:
            (partial / "result").write_text(text)
        return partial is not None


def test_published_when_the_block_ends(tmp_path: Path) -> None:
    final = tmp_path / "build" / "x"
    with staged(final, REQUEST) as partial:
        assert partial is not None
        assert partial == tmp_path / "build" / ".x.partial"
        (partial / "deep").mkdir()
        (partial / "deep" / "file").write_text("1")
        assert not final.exists()
    assert (final / "deep" / "file").read_text() == "1"
    assert not partial.exists()
    assert read_json(final / "request.json") == {"digest": digest_of(REQUEST), "request": REQUEST}


def test_nothing_appears_after_a_failure_and_work_is_kept(tmp_path: Path) -> None:
    final = tmp_path / "x"
    with pytest.raises(RuntimeError), staged(final, REQUEST) as partial:
        assert partial is not None
        (partial / "half").write_text("done")
        raise RuntimeError
    assert not final.exists()
    with staged(final, REQUEST) as partial:
        assert partial is not None
        assert (partial / "half").read_text() == "done"
    assert (final / "half").read_text() == "done"


def test_the_same_request_is_not_built_again(tmp_path: Path) -> None:
    assert build(tmp_path / "x", "first")
    assert not build(tmp_path / "x", "second", {"tp": 2, "model": "a"})
    assert (tmp_path / "x" / "result").read_text() == "first"


def test_another_request_is_refused_and_the_difference_shown(tmp_path: Path) -> None:
    build(tmp_path / "x", "first")
    with pytest.raises(Refused, match=r"--force.*--name") as refusal:
        build(tmp_path / "x", "second", {"model": "a", "tp": 4})
    assert refusal.value.exit_code == 3
    assert "tp: 2 -> 4" in refusal.value.message
    assert "model" not in refusal.value.message.split("--name", 1)[1]
    assert (tmp_path / "x" / "result").read_text() == "first"


def test_a_directory_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "precious").write_text("1")
    with pytest.raises(Refused, match="was not made by trtbuild"):
        build(tmp_path / "x", "first")
    assert (tmp_path / "x" / "precious").read_text() == "1"


@pytest.mark.parametrize("request_", [REQUEST, {"model": "b"}])
def test_force_replaces(tmp_path: Path, request_: dict[str, object]) -> None:
    build(tmp_path / "x", "first")
    (tmp_path / "x" / "old").write_text("1")
    assert build(tmp_path / "x", "second", request_, force=True)
    assert names_in(tmp_path / "x") == ["request.json", "result"]
    assert (tmp_path / "x" / "result").read_text() == "second"
    assert names_in(tmp_path) == [".x.lock", "x"]


def test_a_forced_build_that_fails_leaves_the_old_result(tmp_path: Path) -> None:
    build(tmp_path / "x", "first")
    with pytest.raises(RuntimeError), staged(tmp_path / "x", {"model": "b"}, force=True):
        raise RuntimeError
    assert (tmp_path / "x" / "result").read_text() == "first"


def test_another_requests_partial_is_discarded(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staged(tmp_path / "x", {"model": "b"}) as partial:
        assert partial is not None
        (partial / "stale").write_text("1")
        raise RuntimeError
    build(tmp_path / "x", "fresh")
    assert names_in(tmp_path / "x") == ["request.json", "result"]


def test_a_partial_without_its_marker_is_discarded(tmp_path: Path) -> None:
    """Killed between mkdir and the marker."""
    (tmp_path / ".x.partial").mkdir()
    (tmp_path / ".x.partial" / ".request.json.partial").write_text("{")
    build(tmp_path / "x", "fresh")
    assert names_in(tmp_path / "x") == ["request.json", "result"]


def test_killed_while_replacing(tmp_path: Path) -> None:
    """Between the two renames of a forced build: the old result stands aside, nothing has the name."""
    build(tmp_path / "x", "first")
    (tmp_path / "x").rename(tmp_path / ".x.old")
    assert build(tmp_path / "x", "second")
    assert build(tmp_path / "x", "third", force=True)
    assert (tmp_path / "x" / "result").read_text() == "third"
    assert names_in(tmp_path) == [".x.lock", "x"]


def test_killed_before_the_old_result_was_removed(tmp_path: Path) -> None:
    build(tmp_path / "x", "first")
    (tmp_path / ".x.old" / "deep").mkdir(parents=True)
    assert build(tmp_path / "x", "second", force=True)
    assert (tmp_path / "x" / "result").read_text() == "second"
    assert not (tmp_path / ".x.old").exists()


def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom trtbuild.workspace import staged\n"
        "with staged(Path(sys.argv[1]), {'model': 'a', 'tp': 2}) as partial:\n"
        "    (partial / 'half').write_text('1')\n    print('inside', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "x")], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "inside\n"
        with pytest.raises(Refused, match="another trtbuild process") as refusal:
            build(tmp_path / "x", "mine")
        assert refusal.value.exit_code == 3
        build(tmp_path / "y", "another name is free")
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
    # The lock dies with its process, and the work of the same request is taken up.
    build(tmp_path / "x", "mine")
    assert names_in(tmp_path / "x") == ["half", "request.json", "result"]


@pytest.mark.parametrize("name", ["a", "mixtral-8x7b-fp8-tp2-ep2", "A.b_c-9", "x" * 128])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "-flag", "a/b", "../x", "a b", "a\n", "ä", "x" * 129, "a\0"]
)
def test_names_that_are_more_than_a_file_name(name: str) -> None:
    with pytest.raises(Refused, match=r"name .*: use letters"):
        check_name(name)


def test_an_engine_that_is_not_there_lists_the_others(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    with pytest.raises(Refused, match=r"no engine 'x' in .*there: none yet.*trtbuild compile"):
        workspace.engine("x")
    for name in ("b", "a"):
        (workspace.engines / name).mkdir(parents=True)
        write_json(workspace.engines / name / "engine.json", {})
    (workspace.engines / "unfinished").mkdir()
    with pytest.raises(Refused, match=r"no engine 'unfinished' in .*there: a, b"):
        workspace.engine("unfinished")
    with pytest.raises(Refused, match="use letters"):
        workspace.engine("../engines/a")
    assert workspace.engine("a") == tmp_path / "engines" / "a"


def test_digest_does_not_depend_on_order_and_sees_every_value() -> None:
    assert digest_of({"a": 1, "b": [1, 2]}) == digest_of({"b": [1, 2], "a": 1})
    assert len({digest_of(v) for v in ({"a": 1}, {"a": "1"}, {"a": 1.5}, {"a": None}, {"b": 1}, {})}) == 6


def test_json_is_replaced_in_one_step(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"v": 1})
    with pytest.raises(TypeError):
        write_json(file, {"v": object()})
    assert read_json(file) == {"v": 1}
    write_json(file, {"v": 2})
    assert json.loads(file.read_text()) == {"v": 2}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"1" * 5000, b"[" * 100_000])
def test_a_damaged_file_of_ours_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "trtbuild.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"trtbuild\.json is .*--force"):
        read_json(tmp_path / "trtbuild.json")
    with pytest.raises(CheckpointError, match=r"gone\.json is missing"):
        read_json(tmp_path / "gone.json")


def test_refuse_all() -> None:
    refuse_all("layout", [])
    with pytest.raises(Refused, match=r"^layout: one$"):
        refuse_all("layout", ["one"])
    with pytest.raises(TrtBuildError, match=r"^layout:\n  - one\n  - two$"):
        refuse_all("layout", iter(["one", "two"]))
