"""A small model exported for the LLM API, and its package in a Triton that has the stand-in."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from exporting import WIDE, Case, converted

from trtbuild.engines.export.export import Companions, SchemeName, export_checkpoint
from trtbuild.triton_repo.installation import PATHS_VARIABLE, TritonInstallation
from trtbuild.triton_repo.llmapi import LlmapiOptions, package_llmapi
from trtbuild.triton_repo.triton_process import Ports, TritonProcess
from trtbuild.workspace import Workspace

FAKE = Path(__file__).parent / "fake_llmapi"


def with_fake(installation: TritonInstallation) -> TritonInstallation:
    """A Triton whose Python finds the stand-in first."""
    paths = os.pathsep.join([str(FAKE), installation.environment[PATHS_VARIABLE]])
    return replace(installation, environment={**installation.environment, PATHS_VARIABLE: paths})


def export(folder: Path, precision: Any, scheme: SchemeName, family: str = "llama") -> Path:
    checkpoint, source = converted(folder, Case(family, precision, changes=WIDE))
    (source / "tokenizer.json").write_text("{}")
    return export_checkpoint(checkpoint, Companions((source,)), folder / "export", scheme).directory


class Server:
    """Triton over one llmapi package; `log` is what the stand-in was asked."""

    def __init__(self, process: TritonProcess, ports: Ports, log: Path) -> None:
        self.process, self.ports, self._log = process, ports, log

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    def generate(self, **fields: Any) -> dict[str, Any]:
        """Triton's own generate endpoint."""
        url = f"http://127.0.0.1:{self.ports.http}/v2/models/tensorrt_llm/generate"
        request = urllib.request.Request(url, json.dumps(fields).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.loads(answer.read())


def start(folder: Path, installation: TritonInstallation, options: LlmapiOptions, patch: pytest.MonkeyPatch) -> Server:
    place = Workspace(folder)
    package_llmapi(place, export(folder / "model", "fp8", "modelopt"), options=options)
    patch.setenv("FAKE_LLMAPI_LOG", str(folder / "log.jsonl"))
    patch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    ports = Ports.free()
    process = TritonProcess(with_fake(installation), place.models, ports, ["--disable-auto-complete-config"])
    process.wait_ready(60)
    return Server(process, ports, folder / "log.jsonl")
