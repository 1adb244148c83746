"""A packaged engine, and `trtbuild serve` over it, with a real Triton; a model to package."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_without_plans import make_engine
from helpers import TINY_MIXTRAL
from served import SLOW_STEPS, Service

from trtbuild.errors import Refused
from trtbuild.triton_repo.client import TritonClient
from trtbuild.triton_repo.installation import TritonInstallation, find_triton
from trtbuild.triton_repo.package import package_engines
from trtbuild.workspace import Workspace

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def importable_loader() -> Iterator[None]:
    """For the engine worker, which Triton's stub starts."""
    with pytest.MonkeyPatch.context() as patch:
        paths = [str(TESTS / "engines" / "serving"), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory, importable_loader: None) -> Path:
    """With the engine `mixtral`."""
    folder = tmp_path_factory.mktemp("workspace")
    make_engine(folder, "mixtral", model="tiny-mixtral", precision="fp8")
    return folder


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: a hard link changes the file's ctime, by which other tests would see the bundled one as touched."""
    return Path(shutil.copytree(TINY_MIXTRAL, tmp_path_factory.mktemp("hf") / "tiny-mixtral"))


@pytest.fixture(scope="session")
def triton() -> TritonInstallation:
    """The Triton of this machine; `make venv` brings one wherever there can be one."""
    try:
        return find_triton()
    except Refused as error:
        pytest.skip(error.message)


@pytest.fixture(scope="session")
def packaged(workspace: Path, triton: TritonInstallation) -> Path:
    """The workspace, where `mixtral` is packaged over an executor of fixed step time, without the check."""
    package_engines(Workspace(workspace), ["mixtral"], SLOW_STEPS, installation=None)
    return workspace


@pytest.fixture(scope="module")
def serve(packaged: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Service]]:
    """Start a service of one's own."""
    started: list[Service] = []

    def start(*arguments: str, workspace: Path = packaged) -> Service:
        started.append(Service(workspace, *arguments))
        return started[-1]

    yield start
    for service in started:
        service.close()


@pytest.fixture(scope="module")
def service(serve: Callable[..., Service]) -> Service:
    """One for the tests that leave it as it was."""
    return serve()


@pytest.fixture
def client(service: Service) -> Iterator[TritonClient]:
    with TritonClient(service.url) as connected:
        yield connected
