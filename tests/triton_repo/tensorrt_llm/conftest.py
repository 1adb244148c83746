"""A TensorRT-LLM repository in a real Triton, with the stand-in for its C++ backend over the reference executor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engine_without_plans import make_engine
from trtllm_engine import make_trtllm_engine

from trtbuild.engines.passport import Passport
from trtbuild.engines.serving.client import WorkerClient
from trtbuild.engines.serving.launch import WorkerProcess, start_worker
from trtbuild.engines.tensorrt_llm.engine_config import TrtllmEngine
from trtbuild.triton_repo.installation import TritonInstallation
from trtbuild.triton_repo.tensorrt_llm.check import lend_packages, read_config
from trtbuild.triton_repo.tensorrt_llm.options import TrtllmOptions
from trtbuild.triton_repo.tensorrt_llm.repository import write_repository
from trtbuild.triton_repo.triton_process import Ports, TritonProcess

STAND_IN = Path(__file__).with_name("engine_stand_in.py")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., tuple[Passport, TrtllmEngine]]:
    """An engine directory with the given fields of `make_trtllm_engine`."""

    def made(name: str = "tiny-trtllm", **fields: Any) -> tuple[Passport, TrtllmEngine]:
        directory = make_trtllm_engine(tmp_path / "engines" / name, **fields)
        return Passport.open(directory), TrtllmEngine.open(directory)

    return made


@pytest.fixture(scope="session")
def worker(tmp_path_factory: pytest.TempPathFactory, importable_loader: None) -> Iterator[WorkerProcess]:
    """The reference executor over tiny-mixtral."""
    engine = make_engine(tmp_path_factory.mktemp("reference"), "mixtral", model="tiny-mixtral", precision="bf16")
    with start_worker(engine, slots=4, threads=1) as process:
        yield process


@pytest.fixture
def executor(worker: WorkerProcess) -> Iterator[WorkerClient]:
    """The same worker, asked directly."""
    with worker.connect() as client:
        yield client


@dataclass
class Served:
    """A running repository."""

    ports: Ports
    record: Path

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.ports.grpc}"

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.ports.http}"

    def requests(self) -> list[dict[str, Any]]:
        """What the stand-in was asked, the oldest first."""
        return [json.loads(line) for line in self.record.read_text().splitlines()]


@pytest.fixture(scope="module")
def serve(
    worker: WorkerProcess, triton: TritonInstallation, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Served]]:
    """Start a Triton over the repository of `options`."""
    running: list[TritonProcess] = []

    def start(options: TrtllmOptions, *, tokenizer: Path | None = None, prefix: str | None = None) -> Served:
        folder = tmp_path_factory.mktemp("served")
        engine = make_trtllm_engine(folder / "engines" / "tiny-trtllm")
        if tokenizer is not None:
            shutil.copyfile(tokenizer, engine / "tokenizer" / "tokenizer.json")
        repository = folder / "models"
        names = write_repository(repository, Passport.open(engine), TrtllmEngine.open(engine), options, prefix=prefix)
        record = folder / "record.jsonl"
        record.touch()
        put_stand_in(repository / next(n for n in names if n.endswith("tensorrt_llm")), worker.socket_path, record)
        lent = lend_packages(triton, folder / "packages")
        server = TritonProcess(lent, repository, Ports.free(), ["--disable-auto-complete-config"])
        running.append(server)
        server.wait_ready(120)
        return Served(server.ports, record)

    yield start
    for server in running:
        server.close()


def put_stand_in(model: Path, worker: Path, record: Path) -> None:
    """In place of the C++ backend; every tensor and parameter stays."""
    from google.protobuf import text_format

    config = read_config(model / "config.pbtxt")
    config.backend = "python"
    config.parameters["worker"].string_value = str(worker)
    config.parameters["record"].string_value = str(record)
    (model / "config.pbtxt").write_text(text_format.MessageToString(config))
    shutil.copyfile(STAND_IN, model / "1" / "model.py")
