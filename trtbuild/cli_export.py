"""The command that gives checkpoints to other engines: `export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trtbuild.cli_options import (
    device_option,
    force_option,
    json_option,
    recipe_options,
    workers_option,
    workspace_option,
)

if TYPE_CHECKING:
    from trtbuild.checkpoints.rank_checkpoint import RankCheckpoint
    from trtbuild.engines.export.export import Exported
    from trtbuild.workspace import Workspace


@click.command()
@click.argument("origin", metavar="NAME|MODEL")
@click.option("--format", "form", type=click.Choice(["hf"]), default="hf", show_default=True)
@click.option(
    "--scheme",
    type=click.Choice(["compressed-tensors", "modelopt"]),
    default="compressed-tensors",
    show_default=True,
    help="How quantized weights are written: vLLM and SGLang read the one, TensorRT-LLM the other.",
)
@click.option(
    "-o", "--output", type=click.Path(file_okay=False, path_type=Path), required=True, help="Directory to write."
)
@click.option("--source", metavar="MODEL", help="Where the source of NAME is now.  [default: where it was]")
@recipe_options
@workspace_option
@workers_option
@device_option
@force_option
@json_option
def export(
    origin: str,
    form: str,
    scheme: str,
    output: Path,
    source: str | None,
    workspace: Path,
    workers: int | None,
    device: str,
    force: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Write a Hugging Face checkpoint with our quantized weights, for vLLM, SGLang and TensorRT-LLM 1.3 and later.

    NAME is a rank checkpoint in build/, or an engine. A MODEL is converted first, as `convert` does it. The codes and
    scales are ours, to the bit; no engine is built.
    """
    from trtbuild.engines.export.export import export_checkpoint
    from trtbuild.engines.export.sources import open_origin
    from trtbuild.progress import terminal_progress
    from trtbuild.workspace import Workspace

    del form
    place = Workspace(workspace)
    given = {key: value for key, value in flags.items() if value is not None}
    checkpoint, companions = open_origin(
        place, origin, given, moved=source, convert=lambda: _convert(place, origin, given, workers, device),
        progress=terminal_progress,
    )  # fmt: skip
    done = export_checkpoint(
        checkpoint, companions, output, scheme, force=force, progress=terminal_progress  # pyright: ignore
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps(done.to_dict(), indent=1))
    else:
        _print(done)


def _convert(
    place: Workspace, model: str, flags: dict[str, Any], workers: int | None, device: str
) -> tuple[RankCheckpoint, Path]:
    from trtbuild.engines.job import Job, convert_model
    from trtbuild.engines.recipe import Recipe
    from trtbuild.progress import terminal_progress

    recipe = Recipe.read(Path(model), **flags) if model.endswith(".toml") else Recipe.create(model=model, **flags)
    job = Job.resolve(recipe, sources=place.sources, device=device, progress=terminal_progress)
    return convert_model(job, place, workers=workers, progress=terminal_progress), job.source.directory


def _print(done: Exported) -> None:
    from trtbuild.units import format_bytes

    how = f"{done.precision}, {done.scheme}" if done.scheme else f"{done.precision}, not quantized"
    there = "" if done.written else " (was there already)"
    click.echo(f"{done.directory}: {how}, {format_bytes(done.num_bytes)} in {done.num_files} files{there}")
    click.echo(f"  loads in {', '.join(done.loads_in) or 'no engine that we know of'}; no engine was built")
    for note in done.notes:
        click.echo(f"  note: {note}")
