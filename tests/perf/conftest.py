"""A scripted server that speaks Triton's protocol, and an engine to name when it is measured."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engine_without_plans import make_engine

from trtbuild.perf.records import PromptLimits, Target

LIMITS = PromptLimits(4096, 4000, 16, 1000, (0, 1, 2))


@dataclass
class ScriptedServer:
    """A process of `scripted_server.py`."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    @property
    def target(self) -> Target:
        return Target("m", LIMITS, grpc=self.url)

    def requests(self) -> list[dict[str, Any]]:
        """What it was asked, and when it sent; in the order of their ends."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Callable[..., ScriptedServer]]:
    """Start one with the fields of its `Script`."""
    started: list[ScriptedServer] = []

    def start(**script: Any) -> ScriptedServer:
        log = tmp_path / f"server-{len(started)}.jsonl"
        command = [sys.executable, str(Path(__file__).with_name("scripted_server.py"))]
        process = subprocess.Popen(
            [*command, json.dumps({"log": str(log), **script})], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        started.append(ScriptedServer(process, f"127.0.0.1:{int(process.stdout.readline())}", log))
        return started[-1]

    yield start
    for server in started:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="session")
def engine_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the engine `mixtral`, of 256 tokens."""
    folder = tmp_path_factory.mktemp("workspace")
    make_engine(folder, "mixtral", model="tiny-mixtral", precision="fp8")
    return folder
