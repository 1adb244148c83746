"""Where perf_analyzer is on this machine, whether it runs here, and what is missing where it does not.

NVIDIA ships it in wheels for Linux on x86-64: that of tritonclient up to 2.51 runs on glibc 2.34 and later, newer ones
and the wheel `perf-analyzer` want glibc 2.38. It needs libb64 and CUDA's runtime library, with no GPU too; Triton's
wheel `nvidia-pytriton` has both among its own.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from trtbuild.errors import Refused

DIRECTORY = Path(sys.prefix) / "perf-analyzer"
_WHEEL = "tritonclient==2.51.0"
COMMAND = (
    f"pip install --no-deps --only-binary=:all: --platform manylinux1_x86_64 --target {DIRECTORY} {_WHEEL}"
    "  (a directory of its own: it is not the client that trtbuild uses)"
)
# Where a missing library comes from; the names are those that the binary asks for.
_PACKAGES = {
    "libb64": "apt-get install libb64-0d",
    "libcudart": "pip install nvidia-cuda-runtime-cu12",
}
_MISSING = re.compile(r"^\s*(\S+) => not found", re.MULTILINE)
_GLIBC = re.compile(r"version `((?:GLIBC|GLIBCXX|CXXABI)_[\d.]+)' not found")
_VERSION = re.compile(r"Version ([\d.]+)")
_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class PerfAnalyzer:
    """A binary that runs here. `libraries`: those that it does not find itself, by the name that it asks for."""

    binary: Path
    version: str
    libraries: dict[str, Path] = field(default_factory=dict)

    @contextmanager
    def environment(self) -> Iterator[dict[str, str]]:
        """The variables to start it with."""
        with linked(self.libraries) as variables:
            yield variables


@contextmanager
def linked(libraries: dict[str, Path]) -> Iterator[dict[str, str]]:
    """Variables with which the loader finds those libraries: other wheels keep them under other names."""
    with ExitStack() as stack:
        if not libraries:
            yield {}
            return
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="perf-analyzer-")))
        for name, file in libraries.items():
            (directory / name).symlink_to(file)
        paths = [str(directory), os.environ.get("LD_LIBRARY_PATH", "")]
        yield {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths))}


def find_perf_analyzer(given: Path | None = None) -> PerfAnalyzer:
    """`given`, or the first that runs here of PATH, this Python's environment and `DIRECTORY`.

    Raises `Refused`: for each one that was found what it lacks and the command that brings it.
    """
    if given is not None and not os.access(given, os.X_OK):
        raise Refused(f"--perf-analyzer {given}: not a program that can be run")
    problems: list[str] = []
    for binary in [given] if given is not None else _candidates():
        found = _try(binary)
        if isinstance(found, PerfAnalyzer):
            return found
        problems.append(f"{binary}: {found}")
    if problems:
        raise Refused("perf_analyzer does not run here:" + "".join(f"\n  - {problem}" for problem in problems))
    raise Refused(
        f"no perf_analyzer: none on PATH, none in {DIRECTORY}. It comes in a wheel, on Linux x86_64: {COMMAND}"
    )


def _candidates() -> list[Path]:
    """Each once; a wheel that was unpacked, rather than installed, keeps it in *.data/data/bin."""
    on_path = shutil.which("perf_analyzer")
    found = [] if on_path is None else [Path(on_path)]
    found += [Path(sys.prefix, "bin", "perf_analyzer"), DIRECTORY / "bin" / "perf_analyzer"]
    found += sorted(DIRECTORY.glob("*.data/data/bin/perf_analyzer"))
    return list(dict.fromkeys(binary for binary in found if os.access(binary, os.X_OK)))


def _try(binary: Path) -> PerfAnalyzer | str:
    """The binary with the libraries that it needs, or why it does not run."""
    try:
        # What ldd does: the loader lists the libraries, and the program does not start.
        listed = _output(binary, {"LD_TRACE_LOADED_OBJECTS": "1"})
        missing = _MISSING.findall(listed)
        libraries = {name: file for name in missing if (file := _library(name)) is not None}
        unknown = [name for name in missing if name not in libraries]
        versions = sorted(set(_GLIBC.findall(listed)))
        if versions:
            return f"needs {', '.join(versions)}, newer than this system's; one that runs on glibc 2.34: {COMMAND}"
        if unknown:
            return "; ".join(f"needs {name}: {_package_of(name)}" for name in unknown)
        with linked(libraries) as variables:
            printed = _output(binary, variables, "--version")
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"cannot be started ({error})"
    version = _VERSION.search(printed)
    if version is None:
        return f"does not tell its version: {printed.strip()[:300]!r}"
    return PerfAnalyzer(binary, version[1], libraries)


def _output(binary: Path, variables: dict[str, str], *arguments: str) -> str:
    ran = subprocess.run(
        [binary, *arguments], env=os.environ | variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, timeout=_TIMEOUT_S, check=False,
    )  # fmt: skip
    return ran.stdout.decode(errors="replace")


def _library(name: str) -> Path | None:
    """libb64.so.0d as itself, or as libb64-98cb6333.so.0d and libcudart-09529672.so.12.6.77 are in wheels."""
    stem, _, version = name.partition(".so.")
    for directory in _library_directories():
        found = [directory / name, *sorted(directory.glob(f"{stem}-*.so.{version}*"))]
        for file in found:
            if file.is_file():
                return file
    return None


@functools.cache
def _library_directories() -> tuple[Path, ...]:
    """Of the wheels nvidia-pytriton and nvidia-cuda-runtime, and beside an unpacked binary."""
    found = [DIRECTORY / "lib"]
    for package, part in (("pytriton", "../nvidia_pytriton.libs"), ("nvidia", "cuda_runtime/lib")):
        spec = importlib.util.find_spec(package)
        found += [Path(place, part).resolve() for place in (spec.submodule_search_locations or ())] if spec else []
    return tuple(directory for directory in found if directory.is_dir())


def _package_of(name: str) -> str:
    stem = name.partition(".so")[0]
    return _PACKAGES.get(stem, "install the package of your distribution that has it")
