"""The commands that measure: `trtbuild perf ...`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from trtbuild.cli_options import json_option, workspace_option
from trtbuild.cli_perf_results import compare, find, report, watch


@click.group()
def perf() -> None:
    """Measure engines: sweeps over loads and lengths, and what to make of them."""


@perf.command()
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--engines", metavar="NAME,...", help="Engines of the workspace.")
@click.option(
    "--driver", metavar="NAME,...",
    help="native (gRPC streams), engine (no server), perf-analyzer, aiperf.  [default: native]",
)  # fmt: skip
@click.option("--concurrency", metavar="N,...", help="Closed loop: N streams, each asks again when it was answered.")
@click.option("--batch", metavar="N,...", help="N requests at once, the next ones when all are answered.")
@click.option("--rate", metavar="R,...", help="Open loop: R requests per second, whatever comes back.")
@click.option("--arrival", type=click.Choice(["poisson", "constant"]), help="Of --rate.  [default: poisson]")
@click.option("--trace", metavar="FILE,...", help="JSON lines with timestamp (ms), input_length and output_length.")
@click.option("--isl", metavar="N,...", help="Prompt lengths in tokens.  [default: 128]")
@click.option("--osl", metavar="N,...", help="Answer lengths in tokens.  [default: 64]")
@click.option("--shared-prefix", type=click.IntRange(min=0), help="Tokens that all prompts begin with.")
@click.option(
    "--requests", type=click.IntRange(min=1), help="Kept per point, and 3 per stream at least.  [default: 32]"
)
@click.option("--seconds", type=click.FloatRange(min=0), help="Of every point at least.  [default: 0]")
@click.option(
    "--warmup", type=click.IntRange(min=0), help="Rounds at most, until three take the same time.  [default: 8]"
)
@click.option("--timeout", type=click.FloatRange(min=0.001), help="Seconds per request.  [default: 300]")
@click.option("--slo", metavar="BOUNDS", help="Goodput counts requests within e.g. ttft=500ms,itl=50ms (tpot, e2e).")
@click.option("--seed", type=int, help="Of prompts and arrivals.  [default: 0]")
@click.option("--name", help="The run is perf/runs/NAME.  [default: FILE's name, or one of the sweep's digest]")
@click.option("--url", metavar="HOST:PORT", help="Measure the Triton whose gRPC service is there; serve nothing.")
@click.option("--openai-url", metavar="URL", help="Of --url's OpenAI interface, http://HOST:PORT/v1, for aiperf.")
@click.option("--metrics-url", metavar="URL", help="Of --url's metrics, http://HOST:PORT/metrics.")
@click.option("--slots", type=click.IntRange(min=1), help="Concurrent requests.  [default: what memory allows]")
@click.option("--max-queue", type=click.IntRange(min=0), help="Requests that may wait for a slot.  [default: 256]")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of the engine worker.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of the reference executor.")
@click.option("--executor", type=click.Choice(["auto", "reference", "tensorrt"]), help="[default: auto]")
@click.option("--loader", hidden=True, help="MODULE:FUNCTION that loads the engine.")
@click.option("--tritonserver", type=click.Path(dir_okay=False, path_type=Path), help="Triton's binary.")
@click.option("--perf-analyzer", type=click.Path(dir_okay=False, path_type=Path), help="perf_analyzer's binary.")
@click.option("--aiperf", type=click.Path(dir_okay=False, path_type=Path), help="aiperf's command.")
@workspace_option
@json_option
def sweep(
    file: Path | None,
    url: str | None,
    openai_url: str | None,
    metrics_url: str | None,
    tritonserver: Path | None,
    perf_analyzer: Path | None,
    aiperf: Path | None,
    workspace: Path,
    as_json: bool,
    **flags: Any,
) -> None:
    """Measure engines x loads x ISL x OSL into perf/runs/NAME; FILE (TOML) has the flags' names as keys.

    What is not served is packaged and served. Given again, the same command goes on where it was killed and skips what
    is measured. Ends with 4 where a point is invalid.
    """
    from trtbuild.perf.drivers import ToolPaths
    from trtbuild.perf.live_table import print_points, sweep_view
    from trtbuild.perf.runner import RunOptions, check_valid, run_sweep
    from trtbuild.perf.sweep import Sweep
    from trtbuild.perf.targets import ServeRequest
    from trtbuild.progress import terminal_progress
    from trtbuild.triton_repo.model_config import WorkerSettings
    from trtbuild.workspace import Workspace

    given = {name: value for name, value in flags.items() if value is not None}
    serving = {name: given.pop(name) for name in _SERVING if name in given}
    asked = Sweep.read(file, **given) if file is not None else Sweep.create(**given)
    options = RunOptions(
        ServeRequest(WorkerSettings(**serving), tritonserver, url, openai_url, metrics_url),
        ToolPaths(perf_analyzer, aiperf),
        shlex.join(["trtbuild", *sys.argv[1:]]),
    )
    with sweep_view(len(asked.points())) as view:
        run = run_sweep(asked, Workspace(workspace), options, view, terminal_progress)
    points = run.points()
    if as_json:
        click.echo(json.dumps([point.to_dict() for point in points], indent=1))
    else:
        print_points(points)
        click.echo(f"{len(points)} points in {run.path}; trtbuild perf report {run.path} draws them", err=True)
    check_valid(points)


_SERVING = ("slots", "max_queue", "threads", "dtype", "executor", "loader")

for command in (report, compare, find, watch):
    perf.add_command(command)
