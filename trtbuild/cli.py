"""The command line: parse, call one function, print. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import click

from trtbuild import __version__
from trtbuild.cli_export import export
from trtbuild.cli_migrate import migrate
from trtbuild.cli_options import (
    device_option,
    engine_options,
    force_option,
    json_option,
    pool_options,
    recipe_options,
    sampling_options,
    verify_options,
    workers_option,
    workspace_option,
)
from trtbuild.cli_perf import perf
from trtbuild.cli_serving import package, serve
from trtbuild.command_group import CommandGroup


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="trtbuild")
def main() -> None:
    """Hugging Face checkpoints to TensorRT engines that answer.

    MODEL is a known name (see `trtbuild models`), a hub id, a local directory, or a recipe file (*.toml).
    """


@main.command()
@json_option
def models(as_json: bool) -> None:
    """Families, known models, and what is supported."""
    from trtbuild.catalog import describe_models, print_models

    if as_json:
        click.echo(json.dumps(describe_models(), indent=1))
    else:
        print_models()


@main.command()
@json_option
def doctor(as_json: bool) -> None:
    """What works on this machine, and what is missing: GPUs, drivers, TensorRT, Triton, perf_analyzer."""
    from trtbuild.doctor import examine, print_findings

    findings = examine()
    if as_json:
        click.echo(json.dumps([finding.to_dict() for finding in findings], indent=1))
    else:
        print_findings(findings)


@main.command()
@click.argument("model")
@recipe_options
@engine_options
@click.option("--gpu", help="One GPU type, e.g. rtx4090; a layout that does not run on it ends with 3.  [default: all]")
@click.option("--gpus", "num_gpus", type=click.IntRange(min=1), metavar="N", help="How many of it.  [default: tp x pp]")
@workers_option
@json_option
def plan(model: str, gpu: str | None, num_gpus: int | None, workers: int | None, as_json: bool, **flags: Any) -> None:
    """What an engine would take and reach, on every GPU; builds nothing, downloads no weights."""
    from trtbuild.checkpoints.convert import default_workers
    from trtbuild.engines.job import Job
    from trtbuild.planning.plan import make_plan
    from trtbuild.planning.report import print_plan

    if num_gpus is not None and gpu is None:
        raise click.UsageError("--gpus says how many of --gpu; name one")
    job = Job.resolve(_recipe(model, flags), weights=False)
    planned = make_plan(job, gpu_name=gpu, num_gpus=num_gpus, workers=workers or default_workers())
    print_plan(planned, as_json)
    planned.check(gpu)


@main.command()
@click.argument("model")
@recipe_options
@workspace_option
@workers_option
@device_option
@pool_options
@force_option
@json_option
def convert(
    model: str,
    workspace: Path,
    workers: int | None,
    device: str,
    executor: Literal["local", "ray"],
    ray_address: str | None,
    force: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Convert a checkpoint into a rank checkpoint in build/NAME."""
    from trtbuild.engines.job import Job, convert_model
    from trtbuild.pools import open_pool
    from trtbuild.progress import terminal_progress
    from trtbuild.report import print_conversion
    from trtbuild.workspace import Workspace

    place = Workspace(workspace)
    job = Job.resolve(_recipe(model, flags), sources=place.sources, device=device, progress=terminal_progress)
    job = job.settle(place, terminal_progress)
    with open_pool(executor, ray_address, workspace, workers) as pool:
        checkpoint = convert_model(
            job, place, workers=workers, force=force, progress=terminal_progress, pool=pool
        )  # fmt: skip
    print_conversion(checkpoint, as_json)


@main.command()
@click.argument("model")
@recipe_options
@engine_options
@workspace_option
@workers_option
@device_option
@pool_options
@force_option
@click.option("--no-fit-check", is_flag=True, help="Try it though this machine's memory or disk will not do.")
@click.option("--dry-run", is_flag=True, help="With --builder tensorrt-llm: print the files and commands, do nothing.")
@json_option
def compile(
    model: str,
    workspace: Path,
    workers: int | None,
    device: str,
    executor: Literal["local", "ray"],
    ray_address: str | None,
    force: bool,
    no_fit_check: bool,
    dry_run: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Convert a checkpoint, and build the TensorRT engine in engines/NAME."""
    from trtbuild.engines.job import Job
    from trtbuild.planning.watched_compile import compile_watched
    from trtbuild.pools import open_pool
    from trtbuild.progress import terminal_progress
    from trtbuild.report import print_engine
    from trtbuild.workspace import Workspace

    place, recipe = Workspace(workspace), _recipe(model, flags)
    if dry_run:
        _print_dry_run(recipe, as_json)
        return
    job = Job.resolve(recipe, sources=place.sources, device=device, progress=terminal_progress)
    job = job.settle(place, terminal_progress)
    with open_pool(executor, ray_address, workspace, workers) as pool:
        report, memory = compile_watched(
            job, place,
            workers=workers, force=force, fit_check=not no_fit_check, progress=terminal_progress, pool=pool,
        )  # fmt: skip
    print_engine(report, memory, as_json)


def _print_dry_run(recipe: Any, as_json: bool) -> None:
    from trtbuild.engines.job import Job
    from trtbuild.engines.tensorrt_llm.builder import TrtllmJob
    from trtbuild.engines.tensorrt_llm.dry_run import dry_run, dry_run_facts

    if recipe.builder != "tensorrt-llm":
        raise click.UsageError("--dry-run goes with --builder tensorrt-llm; trtbuild plan says what another one takes")
    resolved = TrtllmJob.resolve(Job.resolve(recipe, weights=False))
    click.echo(json.dumps(dry_run_facts(resolved), indent=1) if as_json else dry_run(resolved))


def _recipe(model: str, flags: dict[str, Any]) -> Any:
    from trtbuild.engines.recipe import Recipe

    given = {key: value for key, value in flags.items() if value is not None}
    if model.endswith(".toml"):
        return Recipe.read(Path(model), **given)
    return Recipe.create(model=model, **given)


@main.command("list")
@click.option("--check", is_flag=True, help="Read everything, and compare it with the digests of what was written.")
@workspace_option
@json_option
def list_(check: bool, workspace: Path, as_json: bool) -> None:
    """What is in the workspace, and what it takes on disk."""
    from trtbuild.inventory import check_contents, inventory, print_checks, print_inventory
    from trtbuild.workspace import Workspace

    items = inventory(Workspace(workspace))
    if check:
        print_checks(check_contents(items), as_json)
    else:
        print_inventory(items, as_json)


@main.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--rank-checkpoints", is_flag=True, help="Also build/NAME of every complete engine.")
@click.option("--dry-run", is_flag=True, help="Say what would go.")
@workspace_option
@json_option
def prune(names: tuple[str, ...], rank_checkpoints: bool, dry_run: bool, workspace: Path, as_json: bool) -> None:
    """Remove what killed commands left; with NAMEs, these results."""
    from trtbuild.inventory import freed_bytes, print_pruned
    from trtbuild.inventory import prune as run
    from trtbuild.workspace import Workspace

    if names and rank_checkpoints:
        raise click.UsageError("--rank-checkpoints chooses by itself; leave the NAMEs out")
    place = Workspace(workspace)
    freed = freed_bytes(run(place, names, rank_checkpoints=rank_checkpoints, dry_run=True))
    removed = run(place, names, rank_checkpoints=rank_checkpoints, dry_run=dry_run)
    print_pruned(removed, freed, dry_run, as_json)


@main.command()
@click.argument("name")
@click.argument("url")
@workspace_option
@json_option
def upload(name: str, url: str, workspace: Path, as_json: bool) -> None:
    """Copy the engine NAME to URL/NAME in an object store (s3://, gs://, az://, file://, ...).

    Its manifest.json is written last: where there is one, the engine is whole. Given again, it goes on where it was.
    """
    from trtbuild.engines.upload import print_upload, upload_engine
    from trtbuild.progress import terminal_progress
    from trtbuild.workspace import Workspace

    print_upload(upload_engine(Workspace(workspace).engine(name), url, progress=terminal_progress), as_json)


@main.command()
@click.argument("name")
@click.argument("prompt")
@sampling_options
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Compute type of the reference executor."
)
@click.option(
    "--executor",
    type=click.Choice(["auto", "reference", "tensorrt"]),
    default="auto",
    show_default=True,
    help="tensorrt needs a GPU that the engine was compiled for.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.")
@click.option("--url", metavar="HOST:PORT", help="Ask the model NAME of a running Triton, at its gRPC port, instead.")
@workspace_option
@json_option
def generate(
    name: str,
    prompt: str,
    chat: bool,
    dtype: str | None,
    executor: str,
    threads: int | None,
    url: str | None,
    workspace: Path,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Stream one answer of the engine NAME to the terminal."""
    from trtbuild.engines.generate import generate as run
    from trtbuild.engines.serving.request import SamplingParams
    from trtbuild.progress import terminal_progress
    from trtbuild.workspace import Workspace

    if sampling["logprobs"] is not None and not as_json:
        raise click.UsageError("--logprobs is printed with --json only")
    params = SamplingParams(**sampling)
    if url is not None:
        from trtbuild.triton_repo.generate_remote import generate_remote

        generate_remote(url, name, prompt, params, chat=chat, as_json=as_json)
        return
    engine = Workspace(workspace).engine(name)
    run(
        engine, prompt, params, chat=chat, dtype=dtype, executor=executor, threads=threads, as_json=as_json,
        progress=terminal_progress,
    )  # fmt: skip


@main.command()
@click.argument("name")
@verify_options
@workspace_option
@json_option
def verify(name: str, html: Path | None, workspace: Path, as_json: bool, **given: Any) -> None:
    """Compare the engine NAME with the checkpoint that it was made from, and record how good it is.

    Perplexity, KL divergence and top-1 agreement over texts, every block of every layer, the same answer in any batch,
    a prompt at the engine's limit, and --golden questions. Ends with 4 where a limit is not met.
    """
    from trtbuild.accuracy.record import print_record
    from trtbuild.accuracy.verify import VerifyOptions, check_passed, verify_engine
    from trtbuild.progress import terminal_progress
    from trtbuild.workspace import Workspace

    place, options = Workspace(workspace), VerifyOptions.from_flags(**given)
    passport = verify_engine(place.engine(name), options, sources=place.sources, progress=terminal_progress)
    print_record(name, passport.data["accuracy"], as_json)
    if html is not None:
        from trtbuild.accuracy.report_html import write_report

        write_report(html, passport.data)
    check_passed(passport)


main.add_command(export)
main.add_command(migrate)
main.add_command(package)
main.add_command(serve)
main.add_command(perf)

if __name__ == "__main__":
    main()
