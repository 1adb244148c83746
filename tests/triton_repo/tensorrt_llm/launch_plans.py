"""What `trtbuild serve` would start over a repository of TensorRT-LLM engines, or why it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fake_ranks import make_repository

from trtbuild.checkpoints.layout import Layout
from trtbuild.cli import main
from trtbuild.errors import Refused
from trtbuild.triton_repo.tensorrt_llm.launch import LaunchOptions, LaunchPlan, ServerOptions, plan_launch
from trtbuild.triton_repo.tensorrt_llm.served_models import read_trtllm_models

TP2, TP4, TP2_PP2 = Layout(tp=2, moe_tp=2), Layout(tp=4, moe_tp=4), Layout(tp=2, pp=2, moe_tp=2)
TWO = {"layout": TP2}


def plan(
    folder: Path,
    models: dict[str, dict[str, Any]] | None = None,
    options: LaunchOptions | None = None,
    environment: dict[str, str] | None = None,
    **server: Any,
) -> LaunchPlan:
    repository = make_repository(folder, models)
    found = read_trtllm_models(repository, ["preprocessing", *(models or {"tensorrt_llm": {}})])
    where = ServerOptions(repository, Path("tritonserver"), **server)
    return plan_launch(found, where, options or LaunchOptions(), environment=environment or {})


def hostfile(folder: Path, *lines: str) -> LaunchOptions:
    file = folder / "hosts"
    file.write_text("\n".join(lines))
    return LaunchOptions(hostfile=file)


def refused(folder: Path, models: dict[str, dict[str, Any]] | None, options: LaunchOptions | None = None) -> str:
    with pytest.raises(Refused) as found:
        plan(folder, models, options)
    return found.value.message


def serve(repository: Path, *arguments: str) -> Any:
    return CliRunner().invoke(main, ["serve", "--repository", str(repository), *arguments])
