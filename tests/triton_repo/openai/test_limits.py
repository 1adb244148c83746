"""Keys, sizes, slow clients, clients that leave, deadlines, readiness, and the way out."""

from __future__ import annotations

import http.server
import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from fake_triton import FakeTriton, Script
from front_end import FrontEndProcess, Reply, completion, events_of

KEY = "sk-Schlüssel-1"
SLOW_STREAM = Script([f"{i} " for i in range(500)], delay_s=0.02)


@pytest.fixture(scope="module")
def strict(triton: FakeTriton, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontEndProcess]:
    """Keys, and limits that a test can wait for."""
    directory: Path = tmp_path_factory.mktemp("strict")
    keys = directory / "keys"
    keys.write_text(f"# ours\n\nother-key\n{KEY}\n")
    flags = ["--api-key-file", str(keys), "--max-request-bytes", "5000", "--body-timeout", "0.4"]
    flags += ["--header-timeout", "0.4", "--request-timeout", "1", "--log-format", "json"]
    front_end = FrontEndProcess(triton.port, directory / "log", *flags)
    yield front_end
    assert front_end.stop() == 0


@contextmanager
def fresh_server(triton: FakeTriton, log_path: Path, *flags: str) -> Iterator[FrontEndProcess]:
    front_end = FrontEndProcess(triton.port, log_path, *flags)
    try:
        yield front_end
    finally:
        front_end.process.kill()
        front_end.process.wait()


def test_keys(strict: FrontEndProcess) -> None:
    body = json.dumps(completion()).encode()
    for header in (None, "", "Bearer", "Bearer ", "Bearer wrong", f"Basic {KEY}", "Bearer # ours", "Bearer other-ke"):
        reply = strict.ask("POST", "/v1/completions", body, {} if header is None else {"Authorization": header})
        assert reply.status == 401, header
        assert reply.error["code"] == "invalid_api_key"
    assert strict.get("/v1/models").status == 401
    assert strict.get("/health/live").status == 200
    assert strict.client("other-key").models.list().data
    with pytest.raises(openai.AuthenticationError):
        strict.client("no").models.list()
    whole_key = {"Authorization": b"Bearer " + KEY.encode()}
    assert strict.ask("POST", "/v1/completions", body, {**whole_key, "Content-Type": "application/json"}).status == 200
    log = strict.log_path.read_text()
    assert "other-key" not in log and "other-ke" not in log


def test_a_key_file_without_keys_lets_nobody_in(triton: FakeTriton, tmp_path: Path) -> None:
    from trtbuild.errors import Refused
    from trtbuild.triton_repo.openai.settings import Settings, read_keys

    (tmp_path / "keys").write_text("# nothing\n")
    with pytest.raises(Refused, match="has no key"):
        read_keys(tmp_path / "keys")
    with pytest.raises(Refused, match="cannot be read"):
        read_keys(tmp_path / "missing")
    (tmp_path / "keys").write_text(KEY)
    settings = Settings(key_digests=read_keys(tmp_path / "keys"))
    assert settings.allows(KEY.encode()) and not settings.allows(None) and not settings.allows(b"")


def test_size(strict: FrontEndProcess, triton: FakeTriton) -> None:
    headers = {"Authorization": "Bearer other-key"}
    reply = strict.post("/v1/completions", completion(prompt="a" * 5000), headers)
    assert reply.status == 413 and "5000" in reply.error["message"] and reply.headers["connection"] == "close"
    assert strict.post("/v1/completions", completion(prompt="a" * 4900), headers).status == 200
    # Without a length, the bytes are counted as they come.
    with strict.connect() as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer other-key\r\n")
        connection.sendall(b"Transfer-Encoding: chunked\r\n\r\n" + b"3e8\r\n" + b"a" * 1000 + b"\r\n")
        for _ in range(4):
            connection.sendall(b"3e8\r\n" + b"a" * 1000 + b"\r\n")
        connection.sendall(b"1\r\na\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    assert len(triton.seen) == 1


def test_slow_bodies_and_headers_are_cut_off(strict: FrontEndProcess) -> None:
    with strict.connect() as headers, strict.connect() as body, strict.connect() as silent:
        start = time.monotonic()
        headers.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-A: ")
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer other-key\r\nContent-Length: 99\r\n\r\n"
        )
        body.sendall(head)
        closed = False
        for _ in range(20):
            # One byte now and then does not help.
            time.sleep(0.05)
            try:
                headers.sendall(b"a")
                body.sendall(b"a")
            except OSError:
                closed = True
        assert closed
        answer = body.recv(1000)
        assert answer.startswith(b"HTTP/1.1 408") and b'"timeout"' in answer
        for connection in (headers, silent):
            with pytest.raises(OSError):
                if connection.recv(1) == b"":
                    raise ConnectionResetError
        assert time.monotonic() - start < 3
    assert strict.client("other-key").completions.create(model="tiny", prompt="a").choices


def test_slow_second_request_of_a_connection(strict: FrontEndProcess) -> None:
    with strict.connect() as connection:
        for _ in range(2):
            connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b'{"status":"live"}'):
                answer += connection.recv(1000)
            # Idle between requests, it stays open.
            time.sleep(0.6)
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHo")
        with pytest.raises(OSError):
            if connection.recv(1) == b"":
                raise ConnectionResetError


def test_deadline(strict: FrontEndProcess, triton: FakeTriton) -> None:
    """Where even Triton does not say that the deadline has passed; it had two seconds more for that."""
    triton.script = lambda values: Script(["a"] * int(values["text_input"]), hangs=True)
    headers = {"Authorization": "Bearer other-key"}

    def ask(case: tuple[bool, str]) -> Reply:
        return strict.post("/v1/completions", completion(stream=case[0], prompt=case[1]), headers)

    cases = [(False, "0"), (False, "3"), (True, "0"), (True, "3")]
    start = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(ask, cases))
    assert 2.9 < time.monotonic() - start < 5
    for case, reply in zip(cases, replies, strict=True):
        error = events_of(reply.text)[-1]["error"] if case == (True, "3") else reply.error
        assert error["code"] == "timeout" and "1 s" in error["message"]
        assert reply.status == (200 if case == (True, "3") else 408)
    assert {seen.timeout_us for seen in triton.seen} == {1_000_000}
    triton.wait_idle()


def test_json_log(strict: FrontEndProcess) -> None:
    headers = {"Authorization": "Bearer other-key", "X-Request-Id": "look-for-me"}
    strict.post("/v1/completions", completion(), headers)
    line = json.loads(strict.wait_log("look-for-me"))
    assert line["status"] == 200 and line["model"] == "tiny" and line["path"] == "/v1/completions"
    assert line["level"] == "info" and line["seconds"] < 5


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(server: FrontEndProcess, triton: FakeTriton, stream: bool) -> None:
    triton.script = lambda _: SLOW_STREAM
    cancelled = triton.num_cancelled
    body = json.dumps(completion(stream=stream, max_tokens=500)).encode()
    with server.connect() as connection:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        triton.wait_active(1)
        if stream:
            assert connection.recv(10)
    start = time.monotonic()
    triton.wait_idle()
    assert time.monotonic() - start < 0.5
    assert triton.num_cancelled == cancelled + 1
    server.wait_log("client_gone=true")


def test_a_client_that_closes_its_stream(server: FrontEndProcess, triton: FakeTriton) -> None:
    triton.script = lambda _: SLOW_STREAM
    for _ in range(20):
        stream = server.client().completions.create(model="tiny", prompt="a", stream=True, max_tokens=500)
        next(iter(stream))
        stream.close()
    triton.wait_idle()


def test_sixty_streams_at_once(server: FrontEndProcess, triton: FakeTriton) -> None:
    def script(values: dict[str, Any]) -> Script:
        return Script([f"{values['text_input']}-{i} " for i in range(40)], delay_s=0.005)

    triton.script = script
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        stream = server.client().completions.create(model="tiny", prompt=f"p{number}", stream=True, max_tokens=40)
        found[number] = "".join(chunk.choices[0].text for chunk in stream)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == {number: "".join(f"p{number}-{i} " for i in range(40)) for number in range(60)}


def test_readiness_without_metrics(server: FrontEndProcess, triton: FakeTriton) -> None:
    reply = server.get("/health/ready")
    assert reply.status == 200 and reply.json()["models"] == {"other": "ready", "tiny": "ready"}
    triton.ready_models = {"other", "plain-python"}
    reply = server.get("/health/ready")
    assert reply.status == 503 and "tiny" in reply.json()["models"] and reply.json()["models"]["other"] == "ready"
    triton.server_ready = False
    assert server.get("/health/ready").status == 503
    assert server.get("/health/live").status == 200


def test_readiness_with_the_engine_gauge(triton: FakeTriton, tmp_path: Path) -> None:
    page = ['trtbuild_engine_up{model="tiny"} 1\ntrtbuild_engine_up{model="other",gpu="0"} 1\n']

    class Metrics(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(page[0].encode())

        def log_message(self, format: str, *args: Any) -> None: ...

    metrics = http.server.HTTPServer(("127.0.0.1", 0), Metrics)
    threading.Thread(target=metrics.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{metrics.server_address[1]}/metrics"
    with fresh_server(triton, tmp_path / "log", "--metrics-url", url) as server:
        assert server.get("/health/ready").status == 200
        page[0] = page[0].replace('"tiny"} 1', '"tiny"} 0')
        reply = server.get("/health/ready")
        assert reply.status == 503
        assert reply.json()["models"] == {"other": "ready", "tiny": "its engine worker does not answer"}
        page[0] = ""
        assert server.get("/health/ready").status == 503
        metrics.shutdown()
        metrics.server_close()
        assert server.get("/health/ready").status == 503


def test_own_metrics(server: FrontEndProcess) -> None:
    server.complete()
    text = server.get("/metrics").text
    assert 'trtbuild_openai_requests_total{path="/v1/completions",status="200"}' in text
    assert "trtbuild_openai_requests_active 0\n" in text


def test_triton_away_and_back(tmp_path: Path) -> None:
    triton = FakeTriton()
    triton.start()
    with fresh_server(triton, tmp_path / "log") as server:
        assert server.complete().status == 200
        triton.stop()
        for reply in (server.complete(), server.get("/health/ready")):
            assert reply.status == 503 and "Triton does not answer" in reply.error["message"]
            assert "retry-after" in reply.headers
        assert server.get("/health/live").status == 200
        triton.start()
        end = time.monotonic() + 5
        while server.complete().status != 200:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert server.get("/health/ready").status == 200
    triton.stop()


def test_stop_lets_streams_finish(triton: FakeTriton, tmp_path: Path) -> None:
    triton.script = lambda _: Script([f"{i} " for i in range(50)], delay_s=0.02)
    with fresh_server(triton, tmp_path / "log") as server:
        stream = server.client().completions.create(model="tiny", prompt="a", stream=True, max_tokens=50)
        chunks = iter(stream)
        text = next(chunks).choices[0].text
        server.signal(signal.SIGTERM)
        time.sleep(0.2)
        reply = server.complete()
        assert reply.status == 503 and reply.headers["retry-after"] == "5"
        assert server.get("/health/ready").status == 503
        assert server.get("/health/live").status == 200
        text += "".join(chunk.choices[0].text for chunk in chunks)
        assert text == "".join(f"{i} " for i in range(50))
        assert server.process.wait(5) == 0


@pytest.mark.parametrize("second_signal", [False, True])
def test_stop_ends_what_takes_too_long(triton: FakeTriton, tmp_path: Path, second_signal: bool) -> None:
    triton.script = lambda _: Script(["a"], hangs=True)
    with fresh_server(triton, tmp_path / "log", "--exit-timeout", "30" if second_signal else "0.5") as server:
        errors: list[Any] = []

        def ask() -> None:
            errors.append(server.complete())

        whole = threading.Thread(target=ask)
        whole.start()
        stream = server.client().completions.create(model="tiny", prompt="a", stream=True)
        chunks = iter(stream)
        next(chunks)
        triton.wait_active(2)
        start = time.monotonic()
        server.signal(signal.SIGTERM)
        if second_signal:
            time.sleep(0.2)
            server.signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="stopping"):
            list(chunks)
        whole.join(5)
        assert errors[0].status == 503 and "stopping" in errors[0].error["message"]
        assert server.process.wait(5) == 0
        assert time.monotonic() - start < 3
    triton.wait_idle()


def test_a_client_that_reads_nothing_does_not_hold_up_the_exit(triton: FakeTriton, tmp_path: Path) -> None:
    triton.script = lambda _: Script(["x" * 100_000] * 400)
    with fresh_server(triton, tmp_path / "log", "--exit-timeout", "0.5") as server:
        body = json.dumps(completion(stream=True, max_tokens=400)).encode()
        with server.connect() as connection:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
            connection.sendall(head + str(len(body)).encode() + b"\r\n\r\n" + body)
            time.sleep(0.5)
            server.signal(signal.SIGTERM)
            assert server.process.wait(8) == 0


def test_a_taken_port_is_one_clear_error(server: FrontEndProcess, triton: FakeTriton, tmp_path: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "trtbuild.triton_repo.openai.server", "--port", str(server.port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert f"--port {server.port}: cannot listen there" in done.stderr and "Traceback" not in done.stderr
