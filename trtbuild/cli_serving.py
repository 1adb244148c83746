"""The commands that serve: `package` and `serve`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from trtbuild.cli_options import json_option, workspace_option

if TYPE_CHECKING:
    from trtbuild.triton_repo.kubernetes import Deployed
    from trtbuild.triton_repo.model_config import WorkerSettings
    from trtbuild.triton_repo.serve import ServeOptions
    from trtbuild.triton_repo.tensorrt_llm.launch import LaunchOptions
    from trtbuild.workspace import Workspace

_tritonserver_option = click.option(
    "--tritonserver",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Triton's binary.  [default: PATH, NGC's container, or nvidia-pytriton's]",
)


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--slots", type=click.IntRange(min=1), help="Concurrent requests.  [default: what memory allows]")
@click.option(
    "--max-queue", type=click.IntRange(min=0), default=256, show_default=True, help="Requests that may wait for a slot."
)
@click.option("--executor", type=click.Choice(["auto", "reference", "tensorrt"]), help="[default: auto]")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Compute type of the reference executor."
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of the engine worker.")
@click.option("--alias", metavar="NAME", help="One more name of the text model, e.g. ensemble, for old clients.")
@click.option("--no-check", is_flag=True, help="Do not load the package in a Triton before it is put in place.")
@click.option(
    "--trtllm", "trtllm_options", multiple=True, metavar="NAME=VALUE",
    help="Of TensorRT-LLM's models, e.g. --trtllm kv_cache_free_gpu_mem_fraction=0.85; repeatable.",
)  # fmt: skip
@click.option(
    "--llmapi", is_flag=True, help="NAME is a Hugging Face directory for TensorRT-LLM 1.3 and later, without an engine."
)
@click.option("--prefix", metavar="NAME", help="Of the names of a TensorRT-LLM engine's models: NAME_tensorrt_llm.")
@click.option("--engine-path", metavar="DIR", help="Where Triton's container will have the TensorRT-LLM engine.")
@click.option(
    "--k8s", "k8s_directory", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
    help="Write Kubernetes manifests of the engines to DIR too.",
)  # fmt: skip
@click.option("--k8s-image", metavar="IMAGE", help="Of triton_repo/Dockerfile.  [default: trtbuild:VERSION]")
@click.option("--k8s-claim", metavar="NAME", help="Volume claim with the model repository.  [default: trtbuild-models]")
@click.option("--k8s-no-gpu", is_flag=True, help="Ask the cluster for no GPU: the reference executor answers.")
@click.option(
    "--gpus-per-node", type=click.IntRange(min=1), metavar="N",
    help="Larger layouts get a LeaderWorkerSet.  [default: 8]",
)  # fmt: skip
@_tritonserver_option
@workspace_option
@json_option
def package(
    names: tuple[str, ...],
    alias: str | None,
    no_check: bool,
    trtllm_options: tuple[str, ...],
    llmapi: bool,
    prefix: str | None,
    engine_path: str | None,
    k8s_directory: Path | None,
    k8s_image: str | None,
    k8s_claim: str | None,
    k8s_no_gpu: bool,
    gpus_per_node: int | None,
    tritonserver: Path | None,
    workspace: Path,
    as_json: bool,
    **settings: Any,
) -> None:
    """Put engines into the Triton model repository triton_repo/models, after a real Triton has answered with them.

    Each NAME becomes three models over one copy of its weights: NAME (text, streams), NAME-unary (text, plain infer)
    and NAME-tokens (token ids). Packaging again replaces them in one step each, under a running server too.

    An engine that TensorRT-LLM built becomes preprocessing, tensorrt_llm, postprocessing, ensemble and
    tensorrt_llm_bls for its C++ backend; several get their names as prefixes. With --llmapi a directory that
    `trtbuild export` wrote becomes the model tensorrt_llm (or --alias) over TensorRT-LLM's LLM API.
    """
    from trtbuild.progress import terminal_progress
    from trtbuild.triton_repo.installation import find_triton
    from trtbuild.triton_repo.model_config import WorkerSettings
    from trtbuild.triton_repo.package import package_engines, print_packaged
    from trtbuild.triton_repo.tensorrt_llm.option_texts import read_options
    from trtbuild.triton_repo.tensorrt_llm.package import TrtllmPackaging
    from trtbuild.workspace import Workspace

    if llmapi:
        _check_llmapi_flags(click.get_current_context())
        _package_llmapi(Workspace(workspace), names, alias, trtllm_options, as_json)
        return
    packaging = TrtllmPackaging(read_options(trtllm_options), prefix, engine_path)
    manifests = _manifests(
        Workspace(workspace), names, WorkerSettings(**settings), alias, k8s_directory is not None,
        image=k8s_image, claim=k8s_claim, no_gpu=k8s_no_gpu or None, gpus_per_node=gpus_per_node,
    )  # fmt: skip
    installation = None if no_check else find_triton(tritonserver)
    packaged = package_engines(
        Workspace(workspace), names, WorkerSettings(**settings), alias=alias, installation=installation,
        progress=terminal_progress, trtllm=packaging,
    )  # fmt: skip
    if no_check:
        click.echo("WARNING: --no-check: nobody has seen Triton load these packages, or answer with them", err=True)
    if as_json:
        click.echo(json.dumps([one.to_dict() for one in packaged], indent=1))
    else:
        print_packaged(packaged)
    if k8s_directory is not None:
        from trtbuild.triton_repo.kubernetes import write_manifests

        for one, path in zip(manifests, write_manifests(manifests, k8s_directory), strict=True):
            click.echo("\n".join([f"{path}: {one.kinds()}", *(f"  {note}" for note in one.notes)]), err=True)


def _check_llmapi_flags(context: click.Context) -> None:
    """What is given beside --llmapi must be for it: nothing else would read the others."""
    from click.core import ParameterSource

    from trtbuild.errors import Refused

    ours = {"names", "alias", "trtllm_options", "llmapi", "workspace", "as_json"}
    given = [
        option.opts[0]
        for option in context.command.params
        if option.name is not None
        and option.name not in ours
        and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
    ]
    if given:
        names = " and --alias names its model" if "--prefix" in given else ""
        raise Refused(
            f"{', '.join(given)}: not for --llmapi, whose model is told by --trtllm NAME=VALUE{names}; leave out"
        )


def _package_llmapi(
    place: Workspace, directories: Sequence[str], alias: str | None, texts: Sequence[str], as_json: bool
) -> None:
    from trtbuild.triton_repo.llmapi import DEFAULT_NAME, LlmapiOptions, package_llmapi, print_packaged_llmapi

    if len(directories) != 1:
        raise click.UsageError("--llmapi packages one directory; --alias names its model")
    packaged = package_llmapi(place, Path(directories[0]), alias or DEFAULT_NAME, LlmapiOptions.from_texts(texts))
    if as_json:
        click.echo(json.dumps(packaged.to_dict(), indent=1))
    else:
        print_packaged_llmapi(packaged)


def _manifests(
    place: Workspace, names: Sequence[str], settings: WorkerSettings, alias: str | None, wanted: bool, **given: Any
) -> list[Deployed]:
    """Of --k8s, made before anything is packaged, so that it can be refused; none without it."""
    from trtbuild.engines.passport import Passport
    from trtbuild.errors import Refused
    from trtbuild.triton_repo.kubernetes import KubernetesOptions, build_manifests

    given = {name: value for name, value in given.items() if value is not None}
    if not wanted:
        if given:
            raise click.UsageError("--k8s-image, --k8s-claim, --k8s-no-gpu and --gpus-per-node go with --k8s DIR")
        return []
    passports = [Passport.open(place.engine(name)) for name in dict.fromkeys(names)]
    foreign = [passport.name for passport in passports if passport.builder_name == "tensorrt-llm"]
    if foreign:
        raise Refused(f"--k8s writes manifests for our own engine worker, not for TensorRT-LLM: {', '.join(foreign)}")
    return build_manifests(passports, settings, KubernetesOptions(**given), alias=alias)


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME...]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option("--http-port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option("--grpc-port", type=click.IntRange(1, 65535), default=8001, show_default=True)
@click.option("--metrics-port", type=click.IntRange(1, 65535), default=8002, show_default=True)
@click.option("--openai-port", type=click.IntRange(1, 65535), help="Serve OpenAI's HTTP interface too, on this port.")
@click.option(
    "--api-key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Keys that the OpenAI interface accepts, one per line.  [default: everybody]",
)
@click.option("--max-request-bytes", type=click.IntRange(min=1), help="Of the OpenAI interface.  [default: 8 MiB]")
@click.option("--request-timeout", type=click.FloatRange(min=0.001), metavar="SECONDS", help="Of the OpenAI interface.")
@click.option(
    "--model-control-mode",
    type=click.Choice(["none", "poll", "explicit"]),
    default="none",
    show_default=True,
    help="Triton's: poll takes up packages that are replaced.",
)
@click.option("--exit-timeout", type=click.IntRange(min=0), default=30, show_default=True, metavar="SECONDS")
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option(
    "--triton-arg", "triton_arguments", multiple=True, metavar="ARG",
    help="Passed to tritonserver, e.g. --triton-arg=--grpc-use-ssl=true; repeatable.",
)  # fmt: skip
@click.option(
    "--launcher",
    type=click.Choice(["mpirun", "srun"]),
    help="What starts the ranks of TensorRT-LLM engines.  [default: mpirun]",
)
@click.option(
    "--hostfile", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
    help="Machines of those ranks, for mpirun: a line HOST slots=N for each.",
)  # fmt: skip
@click.option("--multi-model", is_flag=True, help="Several TensorRT-LLM engines in one server (orchestrator mode).")
@click.option(
    "--disable-spawn-processes", is_flag=True, help="Of --multi-model: start all ranks at once, by participant_ids."
)
@click.option(
    "--launcher-arg", "launcher_arguments", multiple=True, metavar="ARG", help="Passed to mpirun or srun; repeatable."
)
@click.option("--dry-run", is_flag=True, help="Print the command that would serve TensorRT-LLM engines.")
@_tritonserver_option
@click.option("--repository", type=click.Path(file_okay=False, path_type=Path), help="[default: triton_repo/models]")
@workspace_option
def serve(
    names: tuple[str, ...],
    host: str,
    http_port: int,
    grpc_port: int,
    metrics_port: int,
    openai_port: int | None,
    model_control_mode: str,
    exit_timeout: int,
    triton_arguments: tuple[str, ...],
    launcher: Literal["mpirun", "srun"] | None,
    hostfile: Path | None,
    multi_model: bool,
    disable_spawn_processes: bool,
    launcher_arguments: tuple[str, ...],
    dry_run: bool,
    tritonserver: Path | None,
    repository: Path | None,
    workspace: Path,
    **front_end: Any,
) -> None:
    """Run Triton over the model repository until Ctrl-C or SIGTERM; then requests in flight finish.

    NAME... serves only these engines, by the engine's name, its prefix or one of its models. Without a GPU the
    reference executor (PyTorch) answers, through the same repository and interface. Of a TensorRT-LLM engine each rank
    gets a process of its own, started by MPI.
    """
    from trtbuild.progress import terminal_progress
    from trtbuild.triton_repo.installation import find_triton
    from trtbuild.triton_repo.serve import ServeOptions, check_ports
    from trtbuild.triton_repo.serve import serve as run
    from trtbuild.triton_repo.tensorrt_llm.launch import LaunchOptions
    from trtbuild.triton_repo.triton_process import Ports
    from trtbuild.workspace import Workspace

    options = ServeOptions(
        repository=(repository or Workspace(workspace).models).absolute(),
        names=names,
        ports=Ports(http_port, grpc_port, metrics_port, host),
        openai_port=openai_port,
        openai_arguments=_flags(front_end),
        control_mode=model_control_mode,
        exit_timeout_s=exit_timeout,
        triton_arguments=triton_arguments,
        log_format=front_end["log_format"],
    )
    check_ports(options)
    launch = LaunchOptions(
        launcher or "mpirun", hostfile, multi_model, spawn=not disable_spawn_processes, arguments=launcher_arguments
    )
    if not _serves_ranks(options, launch, tritonserver, dry_run, wanted=launcher is not None):
        run(options, find_triton(tritonserver), progress=terminal_progress)


def _serves_ranks(
    options: ServeOptions, launch: LaunchOptions, tritonserver: Path | None, dry_run: bool, *, wanted: bool
) -> bool:
    """Serve TensorRT-LLM's models, or print how; False where there are none, which `Refused` says if one asked."""
    from trtbuild.errors import Refused
    from trtbuild.progress import terminal_progress
    from trtbuild.triton_repo.serve import models_to_load
    from trtbuild.triton_repo.tensorrt_llm.launch import LaunchOptions
    from trtbuild.triton_repo.tensorrt_llm.serve_ranks import print_ranks, serve_ranks
    from trtbuild.triton_repo.tensorrt_llm.served_models import has_trtllm_models

    if has_trtllm_models(options.repository, models_to_load(options)):
        if dry_run:
            print_ranks(options, launch, tritonserver)
        else:
            serve_ranks(options, launch, tritonserver, progress=terminal_progress)
        return True
    if dry_run or wanted or launch != LaunchOptions():
        raise Refused(
            "--dry-run, --launcher, --launcher-arg, --hostfile, --multi-model and --disable-spawn-processes are for "
            f"TensorRT-LLM engines, and {options.repository} has none"
        )
    return False


def _flags(values: dict[str, Any]) -> tuple[str, ...]:
    """As command-line flags of the front end; None is left out."""
    found: list[str] = []
    for name, value in values.items():
        found += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    return tuple(found)
