"""The `perf` commands that make something of measurements: report, compare, find and watch."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trtbuild.cli_options import json_option, workspace_option

if TYPE_CHECKING:
    from trtbuild.perf.records import Point


def _run_directory(workspace: Path, run: str) -> Path:
    """A run by its directory, or by its NAME in perf/runs/."""
    given, named = Path(run), workspace / "perf" / "runs" / run
    return given if given.is_dir() and not named.is_dir() else named


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
    help="[default: the run's own directory; needed for several]",
)  # fmt: skip
@click.option("--no-png", is_flag=True, help="Leave out the pictures, which Chromium draws.")
@workspace_option
@json_option
def report(runs: tuple[str, ...], output: Path | None, no_png: bool, workspace: Path, as_json: bool) -> None:
    """One HTML page of RUN... (names in perf/runs/, or directories) that opens offline, with points.csv and PNGs."""
    from trtbuild.perf.report import write_report
    from trtbuild.workspace import Workspace

    directories = [_run_directory(workspace, run) for run in runs]
    if output is None and len(directories) > 1:
        raise click.UsageError("several runs: say with --output DIR where their report goes")
    written = write_report(directories, output or directories[0], Workspace(workspace).engines, pictures=not no_png)
    if as_json:
        files = {"page": str(written.page), "table": str(written.table), "pictures": list(map(str, written.pictures))}
        click.echo(json.dumps({**files, "notes": written.notes}))
        return
    for file in (written.page, written.table, *written.pictures):
        click.echo(str(file))
    for note in written.notes:
        click.echo(note, err=True)


@click.command()
@click.argument("before", metavar="A")
@click.argument("after", metavar="B")
@click.option(
    "--fail-on-regression", "limit", metavar="PART",
    help="End with 4 where a figure is worse by more than this, e.g. 5%, and not by chance.",
)  # fmt: skip
@click.option("--other-hardware", is_flag=True, help="Compare all the same where machine, driver or executor differ.")
@workspace_option
@json_option
def compare(before: str, after: str, limit: str | None, other_hardware: bool, workspace: Path, as_json: bool) -> None:
    """Run B against run A, point by point, with confidence intervals; says what is not comparable, and why."""
    from trtbuild.accuracy.gate import parse_part
    from trtbuild.perf.compare import compare_runs, print_comparison
    from trtbuild.perf.run_directory import RunDirectory

    try:
        allowed = None if limit is None else parse_part(limit)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--fail-on-regression") from error
    points = [RunDirectory.open(_run_directory(workspace, run)).points() for run in (before, after)]
    comparison = compare_runs(
        *points, limit=0.05 if allowed is None else allowed, other_hardware=other_hardware
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps(comparison.to_dict(), indent=1))
    else:
        print_comparison(comparison)
    if allowed is not None:
        comparison.check(allowed)


@click.command()
@click.argument("engines", nargs=-1, required=True, metavar="NAME...")
@click.option("--slo", required=True, metavar="BOUNDS", help="ttft=500ms,itl=50ms (also tpot, e2e).")
@click.option("--load", "kind", type=click.Choice(["concurrency", "rate"]), default="concurrency", show_default=True)
@click.option("--first", type=click.FloatRange(min=0, min_open=True), help="Load to begin with.  [default: 1]")
@click.option(
    "--most", type=click.FloatRange(min=0, min_open=True), default=256, show_default=True, help="Load to end."
)
@click.option(
    "--held-by", "statistic", type=click.Choice(["mean", "p50", "p90", "p95", "p99"]), default="p99", show_default=True
)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Measurements of the answer.")
@click.option("--tolerance", type=click.FloatRange(0.001, 1), default=0.05, show_default=True, help="Of a rate.")
@click.option("--gpu-price", type=click.FloatRange(min=0, min_open=True), help="Of a GPU and hour: says the cheapest.")
@click.option("--driver", type=click.Choice(["native", "engine", "perf-analyzer", "aiperf"]), default="native")
@click.option("--isl", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--osl", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--requests", type=click.IntRange(min=1), default=32, show_default=True, help="Kept per measurement.")
@click.option("--seconds", type=click.FloatRange(min=0), default=0.0, help="Of every measurement at least.")
@click.option("--name", help="The run is perf/runs/NAME.  [default: one of what is asked]")
@click.option("--slots", type=click.IntRange(min=1), help="Concurrent requests.  [default: what memory allows]")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of the engine worker.")
@click.option("--tritonserver", type=click.Path(dir_okay=False, path_type=Path), help="Triton's binary.")
@workspace_option
@json_option
def find(
    engines: tuple[str, ...],
    kind: Any,
    first: float | None,
    gpu_price: float | None,
    slots: int | None,
    threads: int | None,
    tritonserver: Path | None,
    workspace: Path,
    as_json: bool,
    **given: Any,
) -> None:
    """The highest load at which each engine meets the SLO, by bisection, and the cheapest of them."""
    from trtbuild.perf.find import print_limits
    from trtbuild.perf.find_run import find_sweep, run_find
    from trtbuild.perf.runner import RunOptions
    from trtbuild.perf.targets import ServeRequest
    from trtbuild.progress import terminal_progress
    from trtbuild.triton_repo.model_config import WorkerSettings
    from trtbuild.workspace import Workspace

    search = {key: given.pop(key) for key in ("most", "statistic", "repeats", "tolerance")}
    serving = WorkerSettings(slots=slots, threads=threads)
    sweep = find_sweep(engines, kind, first, **{key: value for key, value in given.items() if value is not None})
    options = RunOptions(ServeRequest(serving, tritonserver), command=shlex.join(["trtbuild", *sys.argv[1:]]))
    run, limits = run_find(
        sweep, kind, Workspace(workspace), options, progress=terminal_progress, report=_tell, **search
    )  # fmt: skip
    if as_json:
        found = [
            {
                "engine": one.engine, "load": kind, "value": one.value, "output_tokens_per_s": one.output_tokens_per_s,
                "ended_by": one.ended_by, "next_misses": one.misses, "measured": one.num_measured,
                "price_per_million": None if gpu_price is None else one.price_per_million(gpu_price),
            }
            for one in limits
        ]  # fmt: skip
        click.echo(json.dumps({"run": str(run), "limits": found}, indent=1))
    else:
        print_limits(limits, kind, gpu_price)
        click.echo(f"points: {run}", err=True)


def _tell(point: Point, missed: list[str]) -> None:
    click.echo(f"{point.spec.label()}: {'; '.join(missed) or 'meets the SLO'}", err=True)


@click.command()
@click.argument("url", default="http://127.0.0.1:8002/metrics")
@click.option("--interval", type=click.FloatRange(min=0.1), default=1.0, show_default=True, metavar="SECONDS")
@click.option("--count", type=click.IntRange(min=1), help="End after so many pictures.  [default: Ctrl-C]")
@json_option
def watch(url: str, interval: float, count: int | None, as_json: bool) -> None:
    """A live view of a running server: its requests, speeds and latencies, and the GPUs.

    URL is Triton's metrics port.  [default: that of trtbuild serve on this machine]
    """
    from trtbuild.perf.watch import watch as run

    run(url, interval, count, as_json)
