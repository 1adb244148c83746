"""The same load by the drivers native, perf-analyzer and aiperf, on one engine: do their figures agree?

    python perf/drivers.py [--concurrency N ...] [--rounds N] [--requests N] [--osl N] [--step 20|100]
                           [--aiperf BIN] [--save]

The executor takes 20 ms a step (`fixed_step`), or 100 ms for a busy machine. The drivers take turns, so that what the
machine does beside shows as a difference between the rounds of one driver. AIPerf goes through the OpenAI front end,
the others to Triton: what lies between the two is a difference of the doors, not of the tools. Intervals are 95 %.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from serving import make_engine

from trtbuild.errors import Refused
from trtbuild.perf.drivers import ToolPaths, make_driver
from trtbuild.perf.records import DriverName, Load, Measured, PointSpec, Target
from trtbuild.perf.statistics import Figures, figures_of
from trtbuild.perf.targets import ServeRequest, running
from trtbuild.triton_repo.model_config import WorkerSettings
from trtbuild.workspace import Workspace

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "drivers.jsonl"
NAMES: tuple[DriverName, ...] = ("native", "perf-analyzer", "aiperf")
ISL = 32
SHOWN = ("ttft_s", "itl_s", "e2e_s")


def main() -> None:
    """Print a table for each concurrency; `--save` appends a JSON line for each driver."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--osl", type=int, default=64)
    parser.add_argument("--step", type=int, choices=[20, 100], default=20, metavar="MS")
    parser.add_argument("--aiperf", type=Path)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    figures: list[dict[str, Any]] = []
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as place:
        make_engine(Path(place))
        name = next(Path(place, "engines").glob("*/engine.json")).parent.name
        request = ServeRequest(WorkerSettings(loader=f"fixed_step:load_{options.step}ms", slots=64, threads=1))
        with running(Workspace(Path(place)), name, "aiperf", request) as found:
            for concurrency in options.concurrency:
                figures += compare(found.target, concurrency, options, Path(place))
    if options.save:
        from serving import machine

        with RESULTS.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(figure | {"machine": machine()}) + "\n" for figure in figures)


def compare(target: Target, concurrency: int, options: argparse.Namespace, place: Path) -> list[dict[str, Any]]:
    """Every driver in turn, `rounds` times; those that are not here are named and left out."""
    tools = ToolPaths(aiperf=options.aiperf)
    rounds: dict[DriverName, list[Measured]] = {}
    load = os.getloadavg()[0]
    for number in range(options.rounds):
        for name in NAMES:
            driver = make_driver(name, tools)
            try:
                driver.check()
            except Refused as error:
                print(f"{name}: left out: {error.message}", file=sys.stderr)
                continue
            spec = PointSpec(
                target.model, name, Load("concurrency", concurrency), ISL, options.osl, 0, options.requests, seed=number
            )
            rounds.setdefault(name, []).append(driver.measure(spec, target, place / f"{name}-{concurrency}-{number}"))
    loads = f"{load:.1f} {os.getloadavg()[0]:.1f}"
    print(f"\nconcurrency {concurrency}, {ISL} -> {options.osl} tokens, steps of {options.step} ms, load {loads}")
    found = [figure_of(name, concurrency, measured, load, options) for name, measured in rounds.items()]
    print_table(found)
    return found


def figure_of(
    name: DriverName, concurrency: int, rounds: list[Measured], load: float, options: argparse.Namespace
) -> dict[str, Any]:
    spec = PointSpec("e", name, Load("concurrency", concurrency), ISL, options.osl)
    parts = [figures_of(spec, measured.records, measured.window) for measured in rounds]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "figure": "the same load by three drivers",
        "driver": name,
        "concurrency": concurrency,
        "isl": ISL,
        "osl": options.osl,
        "step_ms": options.step,
        "num_requests": sum(part.num_requests for part in parts),
        "errors": sum(part.num_errors for part in parts),
        **{metric.replace("_s", "_ms"): [_ms(part, metric) for part in parts] for metric in SHOWN},
        "output_tokens_per_s": [_rounded(part.throughput["output_tokens_per_s"], 1.0, 1) for part in parts],
        "client_cpu_share": [_share(measured) for measured in rounds],
        "load": round(load, 2),
    }


def _ms(figures: Figures, metric: str) -> dict[str, Any]:
    summary = figures.metrics[metric]
    return {"p50": round(1e3 * summary["p50"], 2), **_rounded({**summary, "ci": summary["ci"]["mean"]}, 1e3, 2)}


def _rounded(summary: dict[str, Any], factor: float, digits: int) -> dict[str, Any]:
    """The mean and its interval."""
    return {
        "mean": round(factor * summary["mean"], digits),
        "ci": [round(factor * one, digits) for one in summary["ci"]],
    }


def _share(measured: Measured) -> float | None:
    return None if measured.client.cpu_share is None else round(measured.client.cpu_share, 3)


def print_table(figures: list[dict[str, Any]]) -> None:
    """One line for each round of a driver: mean [95 % interval]."""
    columns = [metric.replace("_s", "_ms") for metric in SHOWN] + ["output_tokens_per_s"]
    print(f"{'driver':14}" + "".join(f"{column:>26}" for column in columns))
    for one in figures:
        for number in range(len(one["client_cpu_share"])):
            cells = [one[column][number] for column in columns]
            shown = [f"{cell['mean']:g} [{cell['ci'][0]:g}, {cell['ci'][1]:g}]" for cell in cells]
            print(f"{one['driver']:14}" + "".join(f"{cell:>26}" for cell in shown))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
