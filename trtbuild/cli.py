"""The command line: parse, call one function, print. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from trtbuild import __version__
from trtbuild.errors import TrtBuildError

F = TypeVar("F", bound=Callable[..., Any])

_workspace = click.option(
    "--workspace",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    help="Where build/ and engines/ are.  [default: .]",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


class _Commands(click.Group):
    """Ctrl-C ends with 130 and says that nothing is lost."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted; a convert or compile goes on where it was when given again", err=True)
            ctx.exit(130)
        except OSError as error:
            # click itself ends quietly where the reader of a pipe has gone.
            if error.errno == errno.EPIPE:
                raise
            raise TrtBuildError(f"{error.filename or 'output'}: {error.strerror}") from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="trtbuild")
def main() -> None:
    """Hugging Face checkpoints to TensorRT engines that answer.

    MODEL is a known name (see `trtbuild models`), a hub id, a local directory, or a recipe file (*.toml).
    """


def _recipe_options(command: F) -> F:
    """The flags of a recipe; one that is not given keeps the recipe file's value, or the default."""
    options = [
        click.option("--name", help="NAME of the result.  [default: MODEL-PRECISION-tpN...]"),
        click.option("--revision", help="Hub revision (branch, tag or commit)."),
        click.option("--precision", type=click.Choice(["bf16", "fp16", "fp8", "int8", "int4"]), help="[default: bf16]"),
        click.option(
            "--kv-cache", type=click.Choice(["auto", "bf16", "fp16", "fp8"]), help="[default: auto, the 16-bit type]"
        ),
        click.option("--tp", type=int, metavar="N", help="Tensor-parallel ranks.  [default: 1]"),
        click.option("--pp", type=int, metavar="N", help="Pipeline stages.  [default: 1]"),
        click.option("--moe-tp", type=int, metavar="N", help="Ranks that cut each expert.  [default: tp / moe-ep]"),
        click.option("--moe-ep", type=int, metavar="N", help="Ranks that share out the experts.  [default: 1]"),
        click.option(
            "--calib-data", type=click.Path(path_type=Path), help="Text to calibrate fp8 on.  [default: bundled]"
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _engine_options(command: F) -> F:
    options = [
        click.option("--builder", type=click.Choice(["tensorrt-rtx"]), help="[default: tensorrt-rtx]"),
        click.option("--target", help="Compute capabilities, e.g. sm89,sm120.  [default: all that can]"),
        click.option("--max-batch-size", type=int, metavar="N", help="[default: 8]"),
        click.option("--max-input-len", type=int, metavar="N", help="[default: max-seq-len - 1]"),
        click.option("--max-seq-len", type=int, metavar="N", help="[default: the model's, at most 4096]"),
        click.option("--chunk-size", type=int, metavar="N", help="Tokens of a prefill step.  [default: 512]"),
        click.option(
            "--segment-layers",
            type=int,
            metavar="N",
            help="Decoder layers in a plan.  [default: up to 8]",
        ),
        click.option(
            "--moe-form", type=click.Choice(["auto", "conditional", "routed", "dense"]), help="[default: auto]"
        ),
        click.option(
            "--embed-weights", is_flag=True, default=None, help="Put weights into the plans (int4 always does)."
        ),
        click.option("--plan-only", is_flag=True, default=None, help="Compile plans without weights."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


_workers = click.option("--workers", type=click.IntRange(min=1), help="Parallel work.  [default: the cores]")
_force = click.option("--force", is_flag=True, help="Replace what is there under this NAME.")


@main.command()
@_json
def models(as_json: bool) -> None:
    """Families, known models, and what is supported."""
    from trtbuild.catalog import describe_models, print_models

    if as_json:
        click.echo(json.dumps(describe_models(), indent=1))
    else:
        print_models()


@main.command()
@_json
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
@_recipe_options
@_workspace
@_workers
@_force
@_json
def convert(model: str, workspace: Path, workers: int | None, force: bool, as_json: bool, **flags: Any) -> None:
    """Convert a checkpoint into a rank checkpoint in build/NAME."""
    from trtbuild.engines.compile import Job, convert_model
    from trtbuild.progress import terminal_progress
    from trtbuild.report import print_conversion
    from trtbuild.workspace import Workspace

    job = Job.resolve(_recipe(model, flags))
    checkpoint = convert_model(job, Workspace(workspace), workers=workers, force=force, progress=terminal_progress)
    print_conversion(checkpoint, as_json)


@main.command()
@click.argument("model")
@_recipe_options
@_engine_options
@_workspace
@_workers
@_force
@_json
def compile(model: str, workspace: Path, workers: int | None, force: bool, as_json: bool, **flags: Any) -> None:
    """Convert a checkpoint, and build the TensorRT engine in engines/NAME."""
    from trtbuild.engines.compile import Job, compile_engine
    from trtbuild.progress import terminal_progress
    from trtbuild.report import print_engine
    from trtbuild.workspace import Workspace

    job = Job.resolve(_recipe(model, flags))
    report = compile_engine(job, Workspace(workspace), workers=workers, force=force, progress=terminal_progress)
    print_engine(report, as_json)


def _recipe(model: str, flags: dict[str, Any]) -> Any:
    from trtbuild.engines.recipe import Recipe

    given = {key: value for key, value in flags.items() if value is not None}
    if model.endswith(".toml"):
        return Recipe.read(Path(model), **given)
    return Recipe.create(model=model, **given)


@main.command()
@click.argument("name")
@click.argument("prompt")
@click.option("--chat", is_flag=True, help="PROMPT is a user's message; apply the chat template.")
@click.option("--max-tokens", type=int, default=128, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, help="0 keeps all.")
@click.option("--top-p", type=float, default=1.0)
@click.option("--min-p", type=float, default=0.0)
@click.option("--repetition-penalty", type=float, default=1.0)
@click.option("--presence-penalty", type=float, default=0.0)
@click.option("--frequency-penalty", type=float, default=0.0)
@click.option("--seed", type=int)
@click.option("--stop", multiple=True, help="String that ends the answer; repeatable.")
@click.option(
    "--stop-token-id", "stop_token_ids", type=int, multiple=True, help="Token that ends the answer; repeatable."
)
@click.option("--ignore-eos", is_flag=True, help="Go on after the model's end token.")
@click.option("--logprobs", type=int, metavar="N", help="Log-probabilities of the N likeliest tokens (with --json).")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Compute type of the reference executor."
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.")
@_workspace
@_json
def generate(
    name: str,
    prompt: str,
    chat: bool,
    dtype: str | None,
    threads: int | None,
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
    engine, params = Workspace(workspace).engine(name), SamplingParams(**sampling)
    run(engine, prompt, params, chat=chat, dtype=dtype, threads=threads, as_json=as_json, progress=terminal_progress)


if __name__ == "__main__":
    main()
