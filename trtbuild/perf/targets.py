"""What a sweep measures, running: an engine behind a Triton of our own, behind somebody's, or as a bare worker."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from trtbuild.engines.passport import Passport, verified_digest
from trtbuild.errors import Refused, TrtBuildError
from trtbuild.perf.records import DriverName, PromptLimits, Target
from trtbuild.progress import ProgressFactory, no_progress
from trtbuild.triton_repo.installation import TritonInstallation, find_triton
from trtbuild.triton_repo.model_config import WorkerSettings
from trtbuild.triton_repo.package import package_engines
from trtbuild.triton_repo.serve import ServeOptions, start_front_end
from trtbuild.triton_repo.triton_process import Ports, TritonProcess
from trtbuild.workspace import PACKAGE_RECORD, Workspace, read_json

_LOAD_TIMEOUT_S = 1800.0
_WORKER_MODULE = "trtbuild.engines.serving.worker"


@dataclass(frozen=True)
class ServeRequest:
    """How engines are served; `url`, HOST:PORT of a running Triton's gRPC service, instead of serving them."""

    settings: WorkerSettings = field(default_factory=WorkerSettings)
    tritonserver: Path | None = None
    url: str | None = None
    openai_url: str | None = None
    metrics_url: str | None = None

    def identity(self) -> dict[str, Any]:
        """What of this changes a figure; for the point's id."""
        return {"url": self.url, **self.settings.to_parameters()}


@dataclass(frozen=True)
class Running:
    """`why_dead` tells why it no longer answers, None while it does."""

    target: Target
    executor: str
    device: str
    triton: str | None
    why_dead: Callable[[], str | None]


@contextmanager
def running(
    place: Workspace, name: str, driver: DriverName, request: ServeRequest, progress: ProgressFactory = no_progress
) -> Iterator[Running]:
    """The engine, as that driver needs it, until the block ends. Raises `TrtBuildError` where it does not start."""
    passport = Passport.open(place.engine(name))
    target = Target(name, prompt_limits(passport), engine_dir=passport.directory)
    if request.url is not None:
        yield _remote(target, request)
    elif driver == "engine":
        with _bare_worker(target, request.settings) as found:
            yield found
    else:
        installation = find_triton(request.tritonserver)
        package_where_needed(place, passport, request.settings, progress)
        with _own_triton(place, target, installation, driver == "aiperf", progress) as found:
            yield found


def prompt_limits(passport: Passport) -> PromptLimits:
    limits = passport.limits
    special: list[int] = []
    file = passport.tokenizer_directory / "tokenizer.json"
    if file.is_file():
        tokens = json.loads(file.read_text(encoding="utf-8")).get("added_tokens") or []
        special = [token["id"] for token in tokens if token.get("special")]
    return PromptLimits(
        max_seq_len=limits.max_seq_len,
        max_input_len=limits.max_input_len or limits.max_seq_len - 1,
        max_batch_size=limits.max_batch_size,
        vocab_size=passport.config.vocab_size,
        special_tokens=tuple(sorted(special)),
    )


def package_where_needed(
    place: Workspace, passport: Passport, settings: WorkerSettings, progress: ProgressFactory = no_progress
) -> bool:
    """Whether it had to be done: not where the same content is packaged with the same settings. Without the check."""
    name = passport.name
    record, config = place.models / name / PACKAGE_RECORD, place.models / name / "config.pbtxt"
    if record.is_file() and config.is_file():
        same = read_json(record).get("engine_digest") == verified_digest(passport.data)
        if same and settings_of(config).to_parameters() == settings.to_parameters():
            return False
    with progress(f"packaging {name}", 1):
        package_engines(place, [name], settings, installation=None)
    return True


def settings_of(config: Path) -> WorkerSettings:
    """Of a config.pbtxt."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    parsed: Any = text_format.Parse(config.read_text(encoding="utf-8"), vars(model_config_pb2)["ModelConfig"]())
    return WorkerSettings.from_parameters({key: value.string_value for key, value in parsed.parameters.items()})


@contextmanager
def _own_triton(
    place: Workspace, target: Target, installation: TritonInstallation, openai: bool, progress: ProgressFactory
) -> Iterator[Running]:
    ports = Ports.free()
    arguments = ["--model-control-mode", "explicit", f"--load-model={target.model}"]
    with ExitStack() as stack:
        server = stack.enter_context(TritonProcess(installation, place.models, ports, arguments, exit_timeout_s=5))
        with progress(f"starting {target.model} in Triton ({installation.source})", 1):
            server.wait_ready(_LOAD_TIMEOUT_S)
        worker = find_worker(server.process.pid)
        hello = _hello(worker[1])
        target = replace(
            _with_limits(target, hello),
            grpc=f"127.0.0.1:{ports.grpc}",
            http=f"http://127.0.0.1:{ports.http}",
            metrics=f"http://127.0.0.1:{ports.metrics}/metrics",
            process_ids=(server.process.pid,),
        )
        front_end = None
        if openai:
            port = _free_port()
            front_end = start_front_end(ServeOptions(place.models, ports=ports, openai_port=port), stack)
            own = () if front_end is None else (front_end.pid,)
            target = replace(
                target, openai=f"http://127.0.0.1:{port}/v1", process_ids=(*target.process_ids, *own)
            )  # fmt: skip

        def why_dead() -> str | None:
            if server.process.poll() is not None:
                return f"Triton ended with status {server.process.returncode}"
            if server.dead_stub() is not None:
                return "the model's process in Triton ended"
            if not psutil.pid_exists(worker[0]):
                return "the engine worker ended"
            if front_end is not None and front_end.poll() is not None:
                return f"the OpenAI front end ended with status {front_end.returncode}"
            return None

        yield Running(target, hello["executor"], hello["device"], installation.source, why_dead)


@contextmanager
def _bare_worker(target: Target, settings: WorkerSettings) -> Iterator[Running]:
    from trtbuild.engines.serving.launch import describe_status, start_worker

    if target.engine_dir is None:
        raise Refused("--driver engine needs the engine itself")
    options: dict[str, Any] = {name.replace("-", "_"): value for name, value in settings.flags().items()}
    with start_worker(target.engine_dir, **options) as worker:
        target = replace(
            _with_limits(target, worker.hello), socket=worker.socket_path, process_ids=(worker.process.pid,)
        )

        def why_dead() -> str | None:
            status = worker.process.poll()
            return None if status is None else f"the engine worker ended: {describe_status(status)}"

        yield Running(target, worker.hello["executor"], worker.hello["device"], None, why_dead)


def _remote(target: Target, request: ServeRequest) -> Running:
    """Somebody's server: which executor answers there is not ours to know."""
    target = replace(target, grpc=request.url, openai=request.openai_url, metrics=request.metrics_url)

    def why_dead() -> str | None:
        return None if _is_ready(request.url or "") else f"no Triton answers at {request.url}"

    if (why := why_dead()) is not None:
        raise TrtBuildError(why)
    return Running(target, "unknown (--url)", "unknown (--url)", _server_version(request.url or ""), why_dead)


def find_worker(pid: int) -> tuple[int, Path]:
    """Process id and socket of the engine worker below a Triton; raises `TrtBuildError` where there is none."""
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            if _WORKER_MODULE in command:
                return process.pid, Path(command[command.index("--socket") + 1])
    raise TrtBuildError("the engine worker of this Triton was not found among its processes")


def _hello(path: Path) -> dict[str, Any]:
    from trtbuild.engines.serving.client import WorkerClient

    with WorkerClient(path) as client:
        return client.hello


def _with_limits(target: Target, hello: dict[str, Any]) -> Target:
    """What was loaded may have shorter slots than the engine could have."""
    found, limits = hello["limits"], target.limits
    max_seq_len = min(limits.max_seq_len, found["max_seq_len"])
    limits = replace(
        limits,
        max_seq_len=max_seq_len,
        max_input_len=min(limits.max_input_len, max_seq_len - 1),
        max_batch_size=min(limits.max_batch_size, found["num_slots"]),
        vocab_size=min(limits.vocab_size, found["vocab_size"]),
    )
    return replace(target, limits=limits)


def _is_ready(address: str) -> bool:
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    pb: Any = service_pb2
    with grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            return stub.ServerReady(pb.ServerReadyRequest(), timeout=5.0).ready
        except grpc.RpcError:
            return False


def _server_version(address: str) -> str | None:
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    pb: Any = service_pb2
    with grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            return stub.ServerMetadata(pb.ServerMetadataRequest(), timeout=5.0).version or None
        except grpc.RpcError:
            return None


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
