"""`trtbuild serve` when something breaks or ends: nobody hangs, and the next request is answered."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from served import SLOW_STEPS, Service, is_running

from trtbuild.errors import Refused, TrtBuildError, Unavailable
from trtbuild.triton_repo.client import TritonClient
from trtbuild.triton_repo.installation import TritonInstallation
from trtbuild.triton_repo.package import package_engines
from trtbuild.triton_repo.serve import ServeOptions
from trtbuild.triton_repo.serve import serve as serve_repository
from trtbuild.triton_repo.triton_process import Ports
from trtbuild.workspace import Workspace

LONG = {"text_input": "Long", "max_tokens": 390, "stream": True, "ignore_eos": True}
SHORT = {"text_input": "Short", "max_tokens": 3}


class Streams:
    """Some long streams in flight; `ended` gets (seconds since `mark`, tokens, error) of each."""

    def __init__(self, service: Service, count: int, max_tokens: int = 390) -> None:
        self.marked_at = time.monotonic()
        self.ended: list[tuple[float, int, TrtBuildError | None]] = []
        self._url = service.url
        self._started = [threading.Event() for _ in range(count)]
        self._threads = [
            threading.Thread(target=self._run, args=(event, max_tokens), daemon=True) for event in self._started
        ]
        for thread in self._threads:
            thread.start()
        for event in self._started:
            assert event.wait(timeout=30)

    def mark(self) -> None:
        self.marked_at = time.monotonic()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(timeout=60)
            assert not thread.is_alive(), "a stream hangs"

    def _run(self, started: threading.Event, max_tokens: int) -> None:
        count, found = 0, None
        try:
            with TritonClient(self._url) as client:
                for _ in client.stream("mixtral", {**LONG, "max_tokens": max_tokens}):
                    count += 1
                    started.set()
        except TrtBuildError as error:
            found = error
        self.ended.append((time.monotonic() - self.marked_at, count, found))


def answer_again(service: Service) -> str:
    """What the next request gets once the service answers; until then every error must be a clear one."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with TritonClient(service.url) as client:
                return client.ask("mixtral-unary", SHORT).text
        except Unavailable as error:
            assert time.monotonic() < deadline, error.message
        except TrtBuildError as error:
            # Triton's own words while it loads.
            assert "not found" in error.message or "not ready" in error.message, error.message
        time.sleep(0.1)


def test_killed_processes(serve: Callable[..., Service]) -> None:
    """The engine worker, a model's stub, Triton: streams in flight end within two seconds, the next is answered."""
    service = serve()
    with TritonClient(service.url) as client:
        expected = client.ask("mixtral-unary", SHORT).text
    for part in ("serving.worker", "models/mixtral/1/model.py", "tritonserver --model"):
        log_before = len(service.log_text())
        streams = Streams(service, 3)
        (victim,) = [one for one in service.processes(part) if "backend_stub" in one.name() or part not in "model.py"][
            :1
        ]
        streams.mark()
        victim.kill()
        streams.join()
        assert all(seconds < 2 and error is not None for seconds, _, error in streams.ended), streams.ended
        assert answer_again(service) == expected
        if part != "serving.worker":
            service.wait_for_log("starting Triton again", since=log_before)
            assert "loaded mixtral" not in service.log_text()[log_before:], "the engine was loaded again"
    service.wait_for_metrics(engine_up=1, requests_active=0)
    assert service.close() == 0


def test_nothing_outlives_a_killed_serve(serve: Callable[..., Service]) -> None:
    """SIGKILL, which `serve` cannot pass on: Triton, its stubs, the front end and the engine's worker end anyway."""
    service = serve("--openai-port", str(Ports.free().http))
    started = service.processes("")
    names = " ".join(" ".join(one.cmdline()) for one in started)
    assert all(part in names for part in ("tritonserver", "backend_stub", "openai.server", "serving.worker")), names
    streams = Streams(service, 2)
    service.process.kill()
    service.process.wait()
    deadline = time.monotonic() + 30
    while any(map(is_running, started)):
        assert time.monotonic() < deadline, [one for one in started if is_running(one)]
        time.sleep(0.1)
    streams.join()


def test_terminated_under_load(serve: Callable[..., Service]) -> None:
    """No new requests, streams in flight finish, exit 0; what does not finish in time is told."""
    service = serve("--exit-timeout", "20")
    streams = Streams(service, 3, max_tokens=60)
    service.process.send_signal(signal.SIGTERM)
    streams.join()
    assert [(count, error) for _, count, error in streams.ended] == [(60, None)] * 3
    assert service.process.wait(timeout=30) == 0

    service = serve("--exit-timeout", "2")
    streams = Streams(service, 3)
    streams.mark()
    service.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    with TritonClient(service.url) as client, pytest.raises(TrtBuildError):
        client.ask("mixtral-unary", SHORT)
    streams.join()
    assert all(error is not None and seconds < 10 for seconds, _, error in streams.ended), streams.ended
    assert service.process.wait(timeout=30) == 0


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("mixtral/1/engine/rank0.safetensors", "short", "rank0.safetensors: a header of"),
        pytest.param("mixtral/config.pbtxt", "name: 'mixtral' input {", "mixtral", marks=pytest.mark.slow),
        pytest.param("mixtral/1/engine/engine.json", None, "engine.json", marks=pytest.mark.slow),
        pytest.param("mixtral/1/engine/engine.json", "{", "engine.json is missing", marks=pytest.mark.slow),
        pytest.param("mixtral-unary/1/model.py", "not python", "mixtral-unary", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_repository_is_named(
    packaged: Path, tmp_path: Path, file: str, content: str | None, named: str
) -> None:
    shutil.copytree(packaged / "triton_repo", tmp_path / "triton_repo")
    damaged = tmp_path / "triton_repo" / "models" / file
    damaged.unlink()
    if content is not None:
        damaged.write_text(content)
    for config in (tmp_path / "triton_repo" / "models").glob("*/config.pbtxt"):
        # The real executor: the tests' own reads no engine.
        lines = config.read_text().replace("fake_executor:load_fake", "trtbuild.engines.load:load_engine")
        config.write_text(lines)
    with pytest.raises(AssertionError, match="serve ended") as ended:
        Service(tmp_path)
    assert "Triton ended with status 1" in str(ended.value)
    assert named in str(ended.value).split("Triton ended with status 1")[1]


@pytest.mark.slow
def test_packages_replaced_under_a_polling_server(serve: Callable[..., Service], workspace: Path) -> None:
    """While packages are replaced, every request is answered, and by a whole package."""
    package_engines(Workspace(workspace), ["mixtral"], SLOW_STEPS, installation=None)
    service = serve("--model-control-mode", "poll")
    stop, errors, answers = threading.Event(), [], []

    def ask() -> None:
        while not stop.is_set():
            try:
                with TritonClient(service.url) as client:
                    answers.append("".join(part.text for part in client.stream("mixtral", {**SHORT, "stream": True})))
            except TrtBuildError as error:
                errors.append(error.message)

    thread = threading.Thread(target=ask)
    thread.start()
    for _ in range(5):
        before = service.log_text().count("successfully loaded 'mixtral'")
        package_engines(Workspace(workspace), ["mixtral"], SLOW_STEPS, installation=None)
        deadline = time.monotonic() + 60
        while service.log_text().count("successfully loaded 'mixtral'") == before:
            assert time.monotonic() < deadline, "the new package was never loaded"
            time.sleep(0.2)
    stop.set()
    thread.join()
    service.wait_for_metrics(engine_up=1, requests_active=0)
    assert errors == []
    assert "starting Triton again" not in service.log_text()
    assert len(set(answers)) == 1
    assert len(answers) > 20
    assert json.loads((workspace / "triton_repo/models/mixtral/trtbuild.json").read_text())["engine"] == "mixtral"


def test_what_cannot_be_served_is_refused(packaged: Path, tmp_path: Path) -> None:
    """Before anything is started."""
    installation = TritonInstallation(tmp_path / "never-run", "nowhere")
    repository = packaged / "triton_repo" / "models"
    for options, names in (
        (ServeOptions(tmp_path), "no model in it; trtbuild package NAME makes one"),
        (ServeOptions(repository, ("mixtrel",)), "mixtrel: not in"),
        (
            ServeOptions(repository, openai_port=9, triton_arguments=("--grpc-use-ssl=true",)),
            "leave out --grpc-use-ssl",
        ),
    ):
        with pytest.raises(Refused) as refused:
            serve_repository(options, installation)
        assert names in refused.value.message
