"""build/Dockerfile: the container it begins with, what it copies, and that trtbuild takes what it is started with."""

from __future__ import annotations

import json
import re
from pathlib import Path

from click.testing import CliRunner

from trtbuild import __version__
from trtbuild.cli import main
from trtbuild.containers import IMAGE, container_for, containers_with

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "build" / "Dockerfile").read_text()


def instructions(name: str) -> list[str]:
    """Arguments of every instruction of that name; a trailing backslash joins lines."""
    joined = re.sub(r"\\\n\s*", " ", DOCKERFILE)
    return [line.split(maxsplit=1)[1] for line in joined.splitlines() if line.startswith(f"{name} ")]


def test_every_line_is_an_instruction() -> None:
    known = {
        "ARG",
        "FROM",
        "USER",
        "SHELL",
        "RUN",
        "ENV",
        "COPY",
        "WORKDIR",
        "EXPOSE",
        "STOPSIGNAL",
        "ENTRYPOINT",
        "CMD",
    }
    joined = re.sub(r"\\\n\s*", " ", DOCKERFILE)
    lines = [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    assert {line.split(maxsplit=1)[0] for line in lines} <= known
    assert lines[0].startswith("ARG TAG=") and lines[1].startswith("FROM ")


def test_it_begins_with_the_newest_container_of_the_last_release() -> None:
    assert instructions("FROM") == [f"{IMAGE}:${{TAG}}-trtllm-python-py3"]
    newest = container_for("1.2.1")
    assert newest is not None
    assert instructions("ARG")[0] == f"TAG={newest.tag}"
    # The tag to fall back to is one of the same release.
    (fallback,) = re.findall(r"--build-arg TAG=(\d\d\.\d\d)", instructions("RUN")[0])
    assert fallback != newest.tag
    assert fallback in {one.tag for one in containers_with(tensorrt_llm="1.2.1")}


def test_it_changes_no_package_of_the_container() -> None:
    (install,) = (run for run in instructions("RUN") if " pip " in run or "-m pip" in run)
    assert "--system-site-packages" in install
    assert "-c /tmp/constraints.txt" in install
    assert not re.search(r"pip install(?! -c)", install)


def test_extras_and_copies_are_there() -> None:
    extras = dict(argument.split("=", 1) for argument in instructions("ARG"))["EXTRAS"].split(",")
    offered = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert set(extras) <= set(offered)
    ignore = (ROOT / "build" / "Dockerfile.dockerignore").read_text().splitlines()
    copied = {source for line in instructions("COPY") for source in line.split()[:-1]}
    assert copied == {line[1:] for line in ignore if line.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)
    kept = (ROOT / ".gitignore").read_text().splitlines()
    assert {"!/build/Dockerfile", "!/build/Dockerfile.dockerignore"} <= set(kept)


def test_it_is_not_run_as_root_and_starts_trtbuild() -> None:
    assert instructions("USER")[-1] == "1000:1000"
    assert json.loads(instructions("ENTRYPOINT")[0])[-1] == "trtbuild"
    command = json.loads(instructions("CMD")[0])
    assert command[0] in main.commands
    assert CliRunner().invoke(main, [*command, "--help"]).exit_code == 0
    assert f"-t trtbuild-trtllm:{__version__} " in DOCKERFILE
