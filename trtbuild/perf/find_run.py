"""`trtbuild perf find` over real servers: each engine is served in its turn, and every measurement is kept in a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from trtbuild.engines.passport import Passport
from trtbuild.errors import Refused
from trtbuild.perf.drivers import make_driver
from trtbuild.perf.find import Limit, LimitSearch, first_load
from trtbuild.perf.measure import PointMeasurer
from trtbuild.perf.records import Point, PointSpec
from trtbuild.perf.run_directory import RunDirectory
from trtbuild.perf.runner import RunOptions, check_sweep, run_name, runs_directory
from trtbuild.perf.sweep import Sweep
from trtbuild.perf.targets import running
from trtbuild.progress import ProgressFactory, no_progress
from trtbuild.workspace import Workspace


def run_find(
    sweep: Sweep,
    kind: Literal["concurrency", "rate"],
    place: Workspace,
    options: RunOptions,
    *,
    progress: ProgressFactory = no_progress,
    report: Callable[[Point, list[str]], None] | None = None,
    **search: Any,
) -> tuple[Path, list[Limit]]:
    """Where the points are, and the limit of each engine of the sweep, whose one load is where the search begins.

    `search` is that of `LimitSearch`. What an earlier search of the same name measured is not measured again.
    """
    specs = sweep.points()
    if sweep.slo is None or len({(spec.driver, spec.isl, spec.osl, spec.load) for spec in specs}) != 1:
        raise Refused("find takes one driver, one ISL, one OSL and an SLO; engines can be several")
    check_sweep(sweep, specs, place, options)
    limits = []
    with RunDirectory.writing(runs_directory(place) / run_name(sweep), sweep, options.command) as run:
        for spec in specs:
            limits.append(_find_one(run, spec, sweep.slo, place, options, progress, report, search))
    return run.path, sorted(limits, key=lambda limit: -limit.output_tokens_per_s)


def _find_one(
    run: RunDirectory,
    spec: PointSpec,
    slo: dict[str, float],
    place: Workspace,
    options: RunOptions,
    progress: ProgressFactory,
    report: Callable[[Point, list[str]], None] | None,
    search: dict[str, Any],
) -> Limit:
    passport = Passport.open(place.engine(spec.engine))
    driver, serve = make_driver(spec.driver, options.tools), options.serve
    with running(place, passport.name, spec.driver, serve, progress) as server:
        measurer = PointMeasurer(run, passport, server, driver, serving=serve.identity(), slo=slo)
        known = {point.point_id: point for point in run.points() if point.valid}

        def measure(one: PointSpec) -> Point:
            held = known.get(measurer.point_id(one))
            return measurer.measure(one) if held is None else held

        return LimitSearch(measure, spec, slo, report=report, **search).find()


def find_sweep(
    engines: Sequence[str], kind: Literal["concurrency", "rate"], first: float | None, **fields: Any
) -> Sweep:
    """The sweep of `run_find`: its one load is where the search begins."""
    value = first_load(kind, first).value
    return Sweep.create(engines=tuple(engines), **{kind: (int(value) if kind == "concurrency" else value,)}, **fields)
