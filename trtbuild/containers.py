"""NGC's Triton containers with TensorRT-LLM: which release, TensorRT and driver each has, from data/containers.toml.

A plan deserializes only in the TensorRT that built it, and TensorRT-LLM's plugins only in their own release. So an
engine is converted, built and served with one release, and a wrong version has two fixes: a container, or a rebuild.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

IMAGE = "nvcr.io/nvidia/tritonserver"
CONTAINERS_FILE = Path(__file__).parent / "data" / "containers.toml"
Certainty = Literal["official", "from an issue", "inferred"]
# Set in NGC's containers, to YY.MM.
TAG_VARIABLE = "NVIDIA_TRITON_SERVER_VERSION"


@dataclass(frozen=True)
class Container:
    """One row; None: not established. Versions as NVIDIA writes them."""

    tag: str
    tensorrt_llm: str
    sure: Certainty
    tensorrt: str | None = None
    triton: str | None = None
    cuda: str | None = None
    driver: str | None = None
    min_driver: str | None = None
    notes: str = ""

    @property
    def image(self) -> str:
        return f"{IMAGE}:{self.tag}-trtllm-python-py3"

    def describe(self) -> str:
        """One line for messages and `doctor`."""
        parts = [f"TensorRT-LLM {self.tensorrt_llm}"]
        parts += [f"{name} {value}" for name, value in (("TensorRT", self.tensorrt), ("CUDA", self.cuda)) if value]
        parts += [] if self.min_driver is None else [f"driver {self.min_driver} or later"]
        doubt = "" if self.sure == "official" else f"; {self.sure}"
        return f"{self.image} ({', '.join(parts)}{doubt})"

    def driver_problem(self, driver: str) -> str | None:
        """Why an NVIDIA driver, such as "535.183.01", is too old for it; None where it is not, or nothing is known."""
        if self.min_driver is None or _numbers(driver) >= _numbers(self.min_driver):
            return None
        return (
            f"driver {driver} is older than {self.min_driver}, the oldest for CUDA {self.cuda} of {self.image}; update "
            "it (data-centre GPUs may also run with the container's forward compatibility package)"
        )


@dataclass(frozen=True)
class Installed:
    """What this Python, or the container around it, has of TensorRT-LLM."""

    tensorrt_llm: str | None
    tensorrt: str | None = None
    container: Container | None = None


@functools.cache
def containers() -> tuple[Container, ...]:
    """All rows, newest first."""
    rows: list[dict[str, Any]] = tomllib.loads(CONTAINERS_FILE.read_text(encoding="utf-8"))["container"]
    return tuple(Container(**row) for row in rows)


def containers_with(
    *, tensorrt_llm: str | None = None, tensorrt: str | None = None, tag: str | None = None
) -> tuple[Container, ...]:
    """Those that have all that is given, newest first; "1.2" means any 1.2.x, "1.2.1" that release."""
    return tuple(
        one
        for one in containers()
        if (tensorrt_llm is None or _begins(one.tensorrt_llm, tensorrt_llm))
        and (tensorrt is None or _begins(one.tensorrt, tensorrt))
        and (tag is None or one.tag == tag)
    )


def container_for(tensorrt_llm_version: str) -> Container | None:
    """The newest with that very release; None for one that no container has (a release candidate, 0.7)."""
    wanted = release_of(tensorrt_llm_version)
    return next((one for one in containers() if release_of(one.tensorrt_llm) == wanted), None)


def release_of(version: str) -> str:
    """Without a local part and post-release: 0.17.0.post1 runs the engines of 0.17.0."""
    return re.sub(r"\.post\d+$", "", version.strip().partition("+")[0])


def find_installed(environment: Mapping[str, str] | None = None) -> Installed:
    """What is importable here; else what the container's tag says."""
    environment = os.environ if environment is None else environment
    version, tensorrt = _distribution("tensorrt_llm"), _distribution("tensorrt", "tensorrt_cu13", "tensorrt_cu12")
    found = containers_with(tag=environment.get(TAG_VARIABLE, ""))
    container = found[0] if found else None
    if version is not None and container is not None and release_of(container.tensorrt_llm) != release_of(version):
        container = None
    if version is None and container is not None and _has_engine_backend():
        version = container.tensorrt_llm
    return Installed(version, tensorrt, container)


def mismatch(
    engine_version: str | None,
    installed: Installed | str | None,
    *,
    engine_tensorrt: str | None = None,
    rebuild: str = "",
) -> str | None:
    """Why an engine of the release `engine_version` does not run in `installed`, with the fix; None where it does.

    `engine_tensorrt`: the TensorRT that the passport names. None where one of the versions is not known.
    `rebuild`: the command that builds the engine again.
    """
    here = Installed(installed) if isinstance(installed, str) or installed is None else installed
    if engine_version is None or here.tensorrt_llm is None:
        return None
    if release_of(engine_version) != release_of(here.tensorrt_llm):
        what = f"the engine was built by TensorRT-LLM {engine_version}, and this is {here.tensorrt_llm}"
    elif engine_tensorrt and here.tensorrt and not _same_tensorrt(engine_tensorrt, here.tensorrt):
        what = f"the engine was built by TensorRT {engine_tensorrt}, and this is {here.tensorrt}"
    else:
        return None
    return (
        f"{what}; engines run only in the release that built them. {_fix(engine_version, here.tensorrt_llm, rebuild)}"
    )


def markdown_table() -> str:
    """Of all rows, for the README."""
    lines = ["| tag | TensorRT-LLM | TensorRT | CUDA | driver, at least |", "|---|---|---|---|---|"]
    for one in containers():
        doubt = "" if one.sure == "official" else f" ({one.sure})"
        cells = (one.tag, one.tensorrt_llm + doubt, one.tensorrt, one.cuda, one.min_driver)
        lines.append("| " + " | ".join(cell or "" for cell in cells) + " |")
    return "\n".join(lines)


def _fix(engine_version: str, here: str, rebuild: str) -> str:
    wanted = container_for(engine_version)
    again = f"{rebuild} --force" if rebuild else "trtbuild compile MODEL --builder tensorrt-llm --force"
    if wanted is None:
        return f"No NGC container has {engine_version}: serve it where it was built, or rebuild it with {here}: {again}"
    return f"Serve it in {wanted.image}, or rebuild it with {here}: {again}"


def _same_tensorrt(one: str, other: str) -> bool:
    """10.7.0 in the table is 10.7.0.23 in a wheel."""
    first, second = release_of(one).split("."), release_of(other).split(".")
    shared = min(len(first), len(second))
    return first[:shared] == second[:shared]


def _begins(version: str | None, with_: str) -> bool:
    if version is None:
        return False
    parts = release_of(with_).split(".")
    return release_of(version).split(".")[: len(parts)] == parts


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _distribution(*names: str) -> str | None:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _has_engine_backend() -> bool:
    """NGC's other containers have the same tags."""
    return Path("/opt/tritonserver/backends/tensorrtllm").is_dir()
