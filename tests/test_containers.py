"""The table of containers: what it says, what follows from it, and that the documents say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trtbuild import containers as module
from trtbuild import doctor
from trtbuild.containers import (
    Container,
    Installed,
    container_for,
    containers,
    containers_with,
    find_installed,
    markdown_table,
    mismatch,
    release_of,
)

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_is_whole_and_newest_first() -> None:
    rows = containers()
    tags = [one.tag for one in rows]
    assert tags == sorted(set(tags), reverse=True)
    assert (tags[0], tags[-1]) == ("26.07", "24.02")
    for one in rows:
        assert re.fullmatch(r"2[4-9]\.(0[1-9]|1[0-2])", one.tag)
        assert one.sure in ("official", "from an issue", "inferred")
        # An official row is a whole one.
        assert one.sure != "official" or (one.tensorrt and one.cuda and one.driver and one.min_driver)


def test_versions_only_grow() -> None:
    """A swapped digit in a row would break the order somewhere."""
    rows = [one for one in reversed(containers()) if one.sure == "official"]
    for name in ("tensorrt_llm", "tensorrt", "cuda"):
        versions = [tuple(int(n) for n in re.findall(r"\d+", getattr(one, name))[:3]) for one in rows]
        assert versions == sorted(versions), name


def test_the_driver_follows_from_cuda() -> None:
    """CUDA's minor version compatibility: 13.x from 580 on, 12.x from 525 on."""
    for one in containers():
        if one.cuda is not None:
            assert one.min_driver == {"13": "580", "12": "525"}[one.cuda.split(".")[0]]


@pytest.mark.parametrize(
    ("version", "tag", "tensorrt"),
    [
        ("1.2.1", "26.07", "10.14.1.48"),
        ("1.2.0", "26.03", "10.14.1.48"),
        ("1.1.0", "26.02", "10.13.3.9"),
        ("1.0.0", "25.10", "10.11.0.33"),
        ("0.17.0", "25.02", "10.8.0.43"),
        ("0.12.0+cu12", "24.08", "10.3.0"),
    ],
)
def test_the_container_of_a_release(version: str, tag: str, tensorrt: str) -> None:
    found = container_for(version)
    assert found is not None
    assert (found.tag, found.tensorrt) == (tag, tensorrt)
    assert found.image == f"nvcr.io/nvidia/tritonserver:{tag}-trtllm-python-py3"


@pytest.mark.parametrize("version", ["1.2.0rc8", "1.2", "0.7.1", "1.3.0", ""])
def test_a_release_that_no_container_has(version: str) -> None:
    assert container_for(version) is None


def test_containers_with() -> None:
    assert [one.tag for one in containers_with(tensorrt_llm="1.2.1")] == ["26.07", "26.06", "26.05", "26.04"]
    assert [one.tag for one in containers_with(tensorrt_llm="1.0")] == ["25.11", "25.10", "25.09"]
    assert [one.tag for one in containers_with(tensorrt="10.10")] == ["25.07", "25.06"]
    # 10.1 is not the beginning of 10.10, and a row without TensorRT has none.
    assert [one.tag for one in containers_with(tensorrt="10.1")] == ["24.07"]
    assert containers_with(tag="24.02", tensorrt="10") == ()
    assert len(containers_with()) == len(containers())


def test_a_container_describes_itself() -> None:
    found = container_for("1.2.1")
    assert found is not None
    assert found.describe() == (
        "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3 "
        "(TensorRT-LLM 1.2.1, TensorRT 10.14.1.48, CUDA 13.1.0.036, driver 580 or later)"
    )
    old = container_for("0.8.0")
    assert old is not None
    assert old.describe().endswith("(TensorRT-LLM 0.8.0; from an issue)")


@pytest.mark.parametrize(
    ("driver", "is_old"), [("535.183.01", True), ("579.99", True), ("580.65.06", False), ("590.44.01", False)]
)
def test_a_driver_that_is_too_old(driver: str, is_old: bool) -> None:
    found = container_for("1.2.1")
    assert found is not None
    problem = found.driver_problem(driver)
    assert (problem is not None) == is_old
    if problem:
        assert driver in problem and "580" in problem
    assert Container("x", "1", "inferred").driver_problem(driver) is None


def test_engines_run_in_their_own_release_only() -> None:
    message = mismatch("1.1.0", "1.2.1", rebuild="trtbuild compile mixtral --builder tensorrt-llm")
    assert message == (
        "the engine was built by TensorRT-LLM 1.1.0, and this is 1.2.1; engines run only in the release that "
        "built them. Serve it in nvcr.io/nvidia/tritonserver:26.02-trtllm-python-py3, or rebuild it with 1.2.1: "
        "trtbuild compile mixtral --builder tensorrt-llm --force"
    )
    message = mismatch("1.2.0rc8", "1.2.1")
    assert message is not None and "No NGC container has 1.2.0rc8" in message
    same_release = Installed("1.2.1", tensorrt="10.15.0.1")
    message = mismatch("1.2.1", same_release, engine_tensorrt="10.14.1.48")
    assert message is not None and "built by TensorRT 10.14.1.48, and this is 10.15.0.1" in message


@pytest.mark.parametrize(
    ("engine", "installed", "tensorrt"),
    [
        ("1.2.1", Installed("1.2.1", "10.14.1.48"), "10.14.1.48"),
        ("1.2.1", Installed("1.2.1", "10.14.1.48.post1"), "10.14.1.48"),
        ("0.16.0", Installed("0.16.0", "10.7.0.23"), "10.7.0"),
        ("0.17.0", Installed("0.17.0.post1"), None),
        ("1.2.1", Installed("1.2.1"), "10.14.1.48"),
        ("1.2.1", None, None),
        (None, "1.2.1", None),
    ],
)
def test_what_is_no_mismatch(engine: str | None, installed: Installed | str | None, tensorrt: str | None) -> None:
    assert mismatch(engine, installed, engine_tensorrt=tensorrt) is None


def test_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"tensorrt_llm": "1.1.0", "tensorrt": "10.13.3.9"}
    monkeypatch.setattr(module, "_distribution", lambda *names: next((found[n] for n in names if n in found), None))
    tag = module.TAG_VARIABLE
    here = find_installed({tag: "26.01"})
    assert (here.tensorrt_llm, here.tensorrt, here.container and here.container.tag) == ("1.1.0", "10.13.3.9", "26.01")
    # Somebody put another release into the container, or has no container.
    assert find_installed({tag: "26.07"}) == find_installed({}) == Installed("1.1.0", "10.13.3.9")
    # Another Python than the container's, in which the tag and the backend say it; not in a container without.
    found.clear()
    monkeypatch.setattr(module, "_has_engine_backend", lambda: True)
    assert find_installed({tag: "26.01"}).tensorrt_llm == "1.1.0"
    monkeypatch.setattr(module, "_has_engine_backend", lambda: False)
    assert find_installed({tag: "26.01"}).tensorrt_llm is None


@pytest.mark.parametrize(
    ("version", "driver", "status", "words"),
    [
        (None, None, "info", ["not installed", "--dry-run"]),
        ("1.2.1", "590.44.01", "ok", ["1.2.1", "26.07-trtllm", "driver 580 or later", "driver 590.44.01"]),
        ("1.2.1", "535.183.01", "missing", ["driver 535.183.01 is older than 580"]),
        ("1.2.1", None, "info", ["26.07-trtllm", "no GPU: it can plan (--dry-run) but not build here"]),
        ("1.3.0rc1", None, "info", ["no NGC container has this release", "1.2.1, 1.2.0, 1.1.0"]),
    ],
)
def test_doctor_says_which_container_it_is(
    version: str | None, driver: str | None, status: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_installed", lambda: Installed(version))
    monkeypatch.setattr(doctor, "_driver", lambda: driver)
    monkeypatch.setattr(doctor, "_has_cuda_gpu", lambda: driver is not None)
    finding = doctor._tensorrt_llm()
    assert finding.status == status
    assert [word for word in words if word not in finding.detail] == []
    assert ("docker build -f build/Dockerfile" in finding.fix) == (version is None)


def test_the_document_has_the_table() -> None:
    assert markdown_table() in (ROOT / "build" / "README.md").read_text(), "build/README.md: put markdown_table() there"


def test_release_of() -> None:
    assert [release_of(v) for v in ("1.0.3.2510", "0.17.0.post1", "1.2.0rc8", " 1.2.1+cu13 ")] == [
        "1.0.3.2510", "0.17.0", "1.2.0rc8", "1.2.1",
    ]  # fmt: skip
