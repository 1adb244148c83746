"""The front end as tests run it: a process of its own."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai


@dataclass
class Reply:
    """`headers` have names in lower case."""

    status: int
    headers: dict[str, str]
    text: str

    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error object; it has all four fields."""
        found = self.json()["error"]
        assert set(found) == {"message", "type", "param", "code"}, found
        return found


class FrontEndProcess:
    """`flags` are the server's; its log is in `log_path`."""

    def __init__(self, triton_port: int, log_path: Path, *flags: str) -> None:
        read_fd, write_fd = os.pipe()
        self.log_path = log_path
        command = [sys.executable, "-m", "trtbuild.triton_repo.openai.server", "--port", "0"]
        command += ["--triton", f"127.0.0.1:{triton_port}", "--ready-fd", str(write_fd), *flags]
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(command, stderr=log, pass_fds=(write_fd,))
        os.close(write_fd)
        with os.fdopen(read_fd) as pipe:
            hello = json.loads(pipe.readline())
        assert hello["type"] == "hello", hello
        self.port: int = hello["port"]
        self.url = f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "none") -> openai.OpenAI:
        """The official client; it does not try again by itself here."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20)

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, Any] | None = None) -> Reply:
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, found, response.read().decode("utf-8"))
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.ask("GET", path, headers=headers)

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Reply:
        """`body` as JSON; bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", path, data, {"Content-Type": "application/json"} | (headers or {}))

    def chat(self, **values: Any) -> Reply:
        """`chat(**values)`, sent."""
        return self.post("/v1/chat/completions", chat(**values))

    def complete(self, **values: Any) -> Reply:
        """`completion(**values)`, sent."""
        return self.post("/v1/completions", completion(**values))

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def wait_log(self, *parts: str, timeout_s: float = 5.0) -> str:
        """The log line that has all these parts; it is written after the response."""
        end = time.monotonic() + timeout_s
        while True:
            lines = self.log_path.read_text().splitlines()
            for line in lines:
                if all(part in line for part in parts):
                    return line
            assert time.monotonic() < end, f"no line with {parts} in:\n" + "\n".join(lines[-20:])
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


def completion(**values: Any) -> dict[str, Any]:
    """A good body of /v1/completions, and what the test changes."""
    return {"model": "tiny", "prompt": "Once"} | values


def chat(**values: Any) -> dict[str, Any]:
    """A good body of /v1/chat/completions, and what the test changes."""
    return {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]} | values


def events_of(text: str) -> list[Any]:
    """The server-sent events of a response; the closing [DONE] is checked and left out."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]", text[-200:]
    return [json.loads(line) for line in lines[:-1]]
