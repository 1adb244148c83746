"""Where a Triton server is on this machine, and what it needs around it.

Triton comes as a container; on a machine without one, the wheel `nvidia-pytriton` holds a whole server for the CPU and
GPU, whose Python backend has a stub for each Python version and needs the wheel's bundled libraries.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import trtbuild
from trtbuild.engines.serving.shared import PYTHON_VARIABLE
from trtbuild.errors import Refused

# nvidia-pytriton's stub is built for numpy 1 and reads tensors wrongly with numpy 2. It takes its packages from the
# environment whose python3 is first on PATH, and ignores PYTHONPATH: so it gets an environment of its own.
STUB_ENVIRONMENT = Path(sys.prefix) / "triton-stub"
PYTRITON_COMMAND = (
    "pip install --no-deps nvidia-pytriton==0.7.0 && "
    f"python3 -m venv {STUB_ENVIRONMENT} && {STUB_ENVIRONMENT}/bin/pip install 'numpy<2'"
)
# Where the model finds trtbuild and click, after the stub's own packages.
PATHS_VARIABLE = "TRTBUILD_PYTHONPATH"
_CONTAINER_BINARY = Path("/opt/tritonserver/bin/tritonserver")
_STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class TritonInstallation:
    """A server's binary; `source` says where it is from. `stub` is the Python stub that its backend lacks."""

    binary: Path
    source: str
    backends: Path | None = None
    stub: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)

    def prepare(self, directory: Path) -> list[str]:
        """Lay out in `directory` what this server needs; the arguments that point to it."""
        if self.backends is None or self.stub is None:
            return []
        backend = directory / "backends" / "python"
        backend.mkdir(parents=True)
        for file in (self.backends / "python").iterdir():
            (backend / file.name).symlink_to(file)
        # A copy: the stub looks for its Python beside itself.
        shutil.copy2(self.stub, backend / _STUB)
        return ["--backend-directory", str(backend.parent)]


def find_triton(given: Path | None = None) -> TritonInstallation:
    """`given`, or the first of PATH, NGC's container and nvidia-pytriton; `Refused` where there is none."""
    if given is not None:
        if not os.access(given, os.X_OK):
            raise Refused(f"--tritonserver {given}: not a program that can be run")
        return TritonInstallation(given, str(given), environment=_python_environment())
    on_path = shutil.which("tritonserver")
    if on_path is not None:
        return TritonInstallation(Path(on_path), "PATH", environment=_python_environment())
    if _CONTAINER_BINARY.is_file():
        return TritonInstallation(_CONTAINER_BINARY, "container", environment=_python_environment())
    return _pytriton()


def _pytriton() -> TritonInstallation:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise Refused(
            "no Triton server: none on PATH, none in /opt/tritonserver, and no wheel nvidia-pytriton. "
            f"On Linux x86_64: {PYTRITON_COMMAND}; or work in NGC's tritonserver container"
        )
    package = Path(next(iter(spec.submodule_search_locations)))
    root, version = package / "tritonserver", f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / version / _STUB
    # Its stub for 3.13 needs a numpy 1, which there is none of for 3.13.
    if not stub.is_file() or sys.version_info >= (3, 13):
        known = ", ".join(sorted(d.name for d in (root / "python_backend_stubs").iterdir()))
        raise Refused(f"nvidia-pytriton has no Python backend for Python {version}; it has {known}")
    if not (STUB_ENVIRONMENT / "bin" / "python3").exists():
        raise Refused(f"nvidia-pytriton's Python backend needs numpy 1 in {STUB_ENVIRONMENT}: {PYTRITON_COMMAND}")
    libraries = [str(package.parent / "nvidia_pytriton.libs"), os.environ.get("LD_LIBRARY_PATH", "")]
    environment = _python_environment(STUB_ENVIRONMENT) | {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries))}
    source = f"nvidia-pytriton {importlib.metadata.version('nvidia-pytriton')}"
    return TritonInstallation(root / "bin" / "tritonserver", source, root / "backends", stub, environment)


def _python_environment(environment: Path = Path(sys.prefix)) -> dict[str, str]:
    """The stub embeds a Python that takes its packages from `environment`, and then from ours."""
    source = Path(trtbuild.__file__).parent.parent
    paths = dict.fromkeys([str(source), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    return {
        PATHS_VARIABLE: os.pathsep.join(paths),
        PYTHON_VARIABLE: sys.executable,
        "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
    }
