"""`trtbuild serve` over TensorRT-LLM engines: all ranks start, answer and end as one service."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import click

from trtbuild.errors import Refused, TrtBuildError, refuse_all
from trtbuild.progress import ProgressFactory, no_progress
from trtbuild.triton_repo.installation import TritonInstallation
from trtbuild.triton_repo.packaged_models import check_llmapi
from trtbuild.triton_repo.serve import WATCH_S, ServeOptions, drain, models_to_load, say_where, stop_signals
from trtbuild.triton_repo.tensorrt_llm.launch import (
    LaunchOptions,
    LaunchPlan,
    ServerOptions,
    launch_warnings,
    plan_launch,
)
from trtbuild.triton_repo.tensorrt_llm.preflight import check_here, count_gpus, find_server, version_problems
from trtbuild.triton_repo.tensorrt_llm.rank_processes import RankProcesses
from trtbuild.triton_repo.tensorrt_llm.served_models import TrtllmModel, read_trtllm_models
from trtbuild.triton_repo.triton_process import print_to_stderr


def serve_ranks(
    options: ServeOptions,
    launch: LaunchOptions,
    tritonserver: Path | None = None,
    *,
    progress: ProgressFactory = no_progress,
) -> None:
    """Serve until SIGINT or SIGTERM, then drain; where one rank ends, all are ended.

    Nothing is started again: that would load every rank's engine anew, which whoever supervises this command decides.
    Raises `Refused` for what cannot be started here, `TrtBuildError` where a rank ends.
    """
    names = models_to_load(options)
    models = _read_models(options, names)
    installation = find_server(tritonserver, models, dry_run=False)
    check_llmapi(options.repository, names, installation)
    plan = _plan(options, launch, models, installation)
    check_here(plan, models)
    _warn(launch_warnings(models, launch))
    with stop_signals() as stopped, _start(options, plan, installation, names, progress) as ranks:
        say_where(options, names)
        while not stopped():
            if ranks.process.poll() is not None:
                raise TrtBuildError(ranks.why_ended())
            time.sleep(WATCH_S)
        drain(ranks, None, options.exit_timeout_s)


def print_ranks(options: ServeOptions, launch: LaunchOptions, tritonserver: Path | None = None) -> None:
    """The command that `serve_ranks` would run, on standard output; what is wrong with this machine, on the other."""
    models = _read_models(options, models_to_load(options))
    installation = find_server(tritonserver, models, dry_run=True)
    click.echo(_plan(options, launch, models, installation).text())
    from trtbuild.containers import container_for, find_installed

    for version in dict.fromkeys(one.engine.version for one in models if one.engine.version):
        container = container_for(version)
        click.echo(
            f"note: TensorRT-LLM {version} is in {container.describe() if container else 'no container'}", err=True
        )
    _warn([*launch_warnings(models, launch), *version_problems(models, find_installed())])


def _warn(texts: Sequence[str]) -> None:
    for text in texts:
        click.echo(f"WARNING: {text}", err=True)


def _read_models(options: ServeOptions, names: Sequence[str]) -> tuple[TrtllmModel, ...]:
    refuse_all("serve", _unsupported(options))
    models = read_trtllm_models(options.repository, names)
    if not models:
        raise Refused(f"{options.repository}: none of its models is a TensorRT-LLM engine")
    return models


def _unsupported(options: ServeOptions) -> list[str]:
    problems: list[str] = []
    if options.openai_port is not None:
        problems.append(
            "--openai-port speaks to trtbuild's own models only, not to TensorRT-LLM's; leave it out, and use the "
            "ensemble or tensorrt_llm_bls over HTTP or gRPC"
        )
    if options.control_mode != "none":
        problems.append(
            f"--model-control-mode {options.control_mode}: ranks load an engine together, when they start; leave it out"
        )
    return problems


def _plan(
    options: ServeOptions, launch: LaunchOptions, models: Sequence[TrtllmModel], installation: TritonInstallation
) -> LaunchPlan:
    server = ServerOptions(
        options.repository, installation.binary, options.ports, tuple(models_to_load(options)) if options.names else (),
        options.exit_timeout_s, options.triton_arguments,
    )  # fmt: skip
    return plan_launch(models, server, launch, num_gpus=count_gpus() if launch.multi_model else None)


def _start(
    options: ServeOptions,
    plan: LaunchPlan,
    installation: TritonInstallation,
    names: Sequence[str],
    progress: ProgressFactory,
) -> RankProcesses:
    ranks = RankProcesses(plan, installation, options.ports, log_format=options.log_format, echo=print_to_stderr)
    waiting = set(names)
    try:
        with progress(f"Triton, {len(plan.ranks)} ranks", len(names), "models") as bar:

            def loaded(name: str) -> None:
                """Once, though every rank says it."""
                if name in waiting:
                    waiting.remove(name)
                    bar.advance(1, name)

            ranks.wait_ready(options.load_timeout_s, loaded)
    except BaseException:
        ranks.kill()
        ranks.close()
        raise
    return ranks
