"""`trtbuild migrate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trtbuild.cli_options import json_option

if TYPE_CHECKING:
    from trtbuild.migrate.migrate import EngineMigration, Migration

_COLOURS = {"error": "red", "warning": "yellow", "info": "blue"}


@click.command()
@click.argument("repo", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Recipe file.  [default: stdout]")
@click.option("--model", metavar="NAME", help="Whose recipe, where several models have engines.")
@click.option(
    "--mount", "mounts", multiple=True, metavar="CONTAINER=HERE",
    help="Where a directory of the container is on this machine; repeatable.",
)  # fmt: skip
@click.option("--release", metavar="VERSION", help="TensorRT-LLM that serves it.  [default: the installed one]")
@click.option("--container", metavar="YY.MM", help="NGC container that serves it.")
@click.option("--world-size", type=click.IntRange(min=1), metavar="N", help="Ranks that MPI starts.")
@click.option("--force", is_flag=True, help="Replace the file of -o.")
@json_option
def migrate(
    repo: Path,
    output: Path | None,
    model: str | None,
    mounts: tuple[str, ...],
    release: str | None,
    container: str | None,
    world_size: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Read REPO, a Triton repository (inflight_batcher_llm of 0.8 to 1.2) that was filled by hand.

    Says what is wrong with it, and writes the recipe that would produce its engine. Changes nothing in it. Ends with 4
    where there are errors.
    """
    from trtbuild.errors import Refused
    from trtbuild.migrate.migrate import migrate_repository

    if release and container:
        raise click.UsageError("--release and --container say the same; give one")
    if output is not None and output.exists() and not force:
        raise Refused(f"{output} is there already; give another -o, or --force")
    found = migrate_repository(repo, mounts=mounts, release=release, container=container, world_size=world_size)
    engine = found.engine(model)
    if output is not None:
        _write(output, found, engine)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=1))
    else:
        # The recipe alone goes to stdout, so that it can be redirected.
        _print_findings(found, to_stderr=output is None)
        if output is None and engine is not None:
            click.echo(engine.toml, nl=False)
    _print_recipe(found, engine, output, to_stderr=as_json or output is None)
    found.check()


def _write(output: Path, found: Migration, engine: EngineMigration | None) -> None:
    from trtbuild.errors import Refused
    from trtbuild.workspace import write_atomic

    if engine is None and len(found.engines) > 1:
        raise Refused(f"-o takes one recipe; say --model: {', '.join(engine.model for engine in found.engines)}")
    if engine is not None:
        try:
            write_atomic(output, engine.toml.encode("utf-8"))
        except OSError as error:
            raise Refused(f"-o {output}: {error.strerror}") from error


def _print_recipe(found: Migration, engine: EngineMigration | None, output: Path | None, to_stderr: bool) -> None:
    """Where the recipe went, or why there is none."""
    if engine is not None and output is not None:
        click.echo(f"recipe of {engine.model}: {output}", err=to_stderr)
    elif not found.engines:
        where = "" if output is None else f", and {output} is not written"
        click.echo(f"no recipe{where}: {found.why_no_recipe}", err=to_stderr)


def _print_findings(found: Migration, to_stderr: bool) -> None:
    from trtbuild.migrate.findings import plural

    release = f" for TensorRT-LLM {found.release}" if found.release else ""
    click.echo(f"repository {found.repository}{release}", err=to_stderr)
    for name, role in found.roles.items():
        click.echo(f"  {name:24} {role}", err=to_stderr)
    for finding in found.findings:
        click.echo(f"{click.style(finding.severity, fg=_COLOURS[finding.severity])} {finding.place}", err=to_stderr)
        click.echo(f"  {finding.key}: found {finding.found}; allowed: {finding.allowed}", err=to_stderr)
        click.echo(f"  fix: {finding.fix}", err=to_stderr)
    words = {"error": "error", "warning": "warning", "info": "note"}
    click.echo(", ".join(plural(found.count(severity), word) for severity, word in words.items()), err=to_stderr)
    if len(found.engines) > 1:
        names = ", ".join(engine.model for engine in found.engines)
        click.echo(f"several engines: --model says whose recipe is wanted ({names})", err=to_stderr)
