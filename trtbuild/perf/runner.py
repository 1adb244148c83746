"""`trtbuild perf sweep`: every point of a sweep, one engine at a time; what was measured already is skipped."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from trtbuild.engines.passport import Passport, verified_digest
from trtbuild.errors import CheckFailed, Refused, TrtBuildError, refuse_all
from trtbuild.perf.drivers import ToolPaths, make_driver
from trtbuild.perf.environment import environment, machine_digest
from trtbuild.perf.live_table import NoView, SweepView
from trtbuild.perf.load import why_unfit
from trtbuild.perf.measure import PointMeasurer
from trtbuild.perf.records import Point, PointSpec
from trtbuild.perf.run_directory import RunDirectory
from trtbuild.perf.statistics import figures_of
from trtbuild.perf.sweep import Sweep
from trtbuild.perf.targets import ServeRequest, prompt_limits, running
from trtbuild.progress import ProgressFactory, no_progress
from trtbuild.triton_repo.installation import find_triton
from trtbuild.workspace import Workspace

# A server that dies so often in a row is broken: its other points are not tried.
_MOST_DEATHS = 3


@dataclass(frozen=True)
class RunOptions:
    """How a sweep is run; nothing here is part of what it measures but `serve`."""

    serve: ServeRequest = field(default_factory=ServeRequest)
    tools: ToolPaths = field(default_factory=ToolPaths)
    command: str = "trtbuild perf sweep"


def run_name(sweep: Sweep) -> str:
    """Its name, or one that the same sweep has again, so that it is resumed."""
    return sweep.name or f"sweep-{sweep.digest[:8]}"


def run_sweep(
    sweep: Sweep,
    place: Workspace,
    options: RunOptions,
    view: SweepView | None = None,
    progress: ProgressFactory = no_progress,
) -> RunDirectory:
    """Measure what is missing in perf/runs/NAME. Raises `Refused` before anything runs; invalid points are results."""
    view = view or NoView()
    specs = sweep.points()
    check_sweep(sweep, specs, place, options)
    with RunDirectory.writing(runs_directory(place) / run_name(sweep), sweep, options.command) as run:
        for (engine, _), group in itertools.groupby(specs, key=lambda spec: (spec.engine, spec.driver)):
            passport = Passport.open(place.engine(engine))
            missing = _skip_measured(run, passport, list(group), sweep, options.serve, view)
            _Group(run, place, passport, sweep, options, view, progress).measure(missing)
    return run


def runs_directory(place: Workspace) -> Path:
    return place.root / "perf" / "runs"


def check_sweep(sweep: Sweep, specs: Sequence[PointSpec], place: Workspace, options: RunOptions) -> None:
    """Raises `Refused` with everything that is wrong: engines, tools, lengths that do not fit."""
    if not sweep.engines:
        raise Refused(f"sweep: no engine is named; there: {', '.join(place.engine_names()) or 'none yet'}")
    drivers = {name: make_driver(name, options.tools) for name in sweep.driver}
    problems: list[str] = []
    for driver in drivers.values():
        try:
            driver.check()
        except Refused as error:
            problems.append(error.message)
    if options.serve.url is None and set(sweep.driver) - {"engine"}:
        find_triton(options.serve.tritonserver)
    if options.serve.url is not None and "engine" in sweep.driver:
        problems.append("--url: the driver engine runs an engine itself; leave one of them out")
    if options.serve.url is not None and "aiperf" in sweep.driver and options.serve.openai_url is None:
        problems.append("--url: aiperf needs --openai-url too")
    for engine in dict.fromkeys(sweep.engines):
        passport = Passport.open(place.engine(engine))
        if options.serve.url is None:
            passport.check_runnable()
            passport.check_accuracy()
        limits = prompt_limits(passport)
        for spec in (one for one in specs if one.engine == engine):
            why = why_unfit(spec, limits) or drivers[spec.driver].check_spec(spec)
            problems += [] if why is None else [f"{spec.label()}: {why}"]
    refuse_all("perf sweep", dict.fromkeys(problems))


def _skip_measured(
    run: RunDirectory,
    passport: Passport,
    specs: Sequence[PointSpec],
    sweep: Sweep,
    serve: ServeRequest,
    view: SweepView,
) -> list[PointSpec]:
    """The specs that have no valid point of this engine on this machine yet, whichever executor measured it."""
    digest, machine = verified_digest(passport.data), machine_digest(environment())
    known = {point.point_id: point for point in run.points() if point.valid}
    executors = {point.executor for point in known.values()}
    missing: list[PointSpec] = []
    for spec in specs:
        ids = [spec.point_id(digest, executor, machine, serve.identity()) for executor in executors]
        point = next((known[one] for one in ids if one in known), None)
        if point is None:
            missing.append(spec)
        else:
            view.finish(_with_slo(run, point, sweep), skipped=True)
    return missing


def _with_slo(run: RunDirectory, point: Point, sweep: Sweep) -> Point:
    """The goodput under another SLO follows from the records."""
    if point.slo == sweep.slo:
        return point
    records, window = run.read_raw(point.point_id)
    figures = figures_of(point.spec, records, window, sweep.slo)
    again = replace(point, slo=sweep.slo, goodput_per_s=figures.goodput_per_s)
    run.add(again)
    return again


@dataclass
class _Group:
    """The points of one engine and driver, which share a server; it is started again when it died."""

    run: RunDirectory
    place: Workspace
    passport: Passport
    sweep: Sweep
    options: RunOptions
    view: SweepView
    progress: ProgressFactory

    def measure(self, specs: list[PointSpec]) -> None:
        deaths = 0
        while specs:
            left = self._serve_and_measure(specs)
            # A point that was measured as the first of a new server says that it works again.
            deaths = deaths + 1 if len(specs) - len(left) == 1 else 1
            if left and deaths >= _MOST_DEATHS:
                raise TrtBuildError(
                    f"{self.passport.name}: its server died {deaths} times in a row; {len(left)} points were not "
                    "measured. What it died of stands in points.jsonl; the same command goes on"
                )
            specs = left

    def _serve_and_measure(self, specs: list[PointSpec]) -> list[PointSpec]:
        """Those that are left where the server died."""
        driver, serve = make_driver(specs[0].driver, self.options.tools), self.options.serve
        with running(self.place, self.passport.name, specs[0].driver, serve, self.progress) as server:
            measurer = PointMeasurer(
                self.run, self.passport, server, driver, serving=serve.identity(), slo=self.sweep.slo
            )
            for number, spec in enumerate(specs, 1):
                self.view.start(spec)
                self.view.finish(measurer.measure(spec))
                if server.why_dead() is not None:
                    return specs[number:]
        return []


def check_valid(points: Sequence[Point]) -> None:
    """Raises `CheckFailed` where a point is not what was asked for."""
    invalid = [f"{point.spec.label()}: {point.why_invalid}" for point in points if not point.valid]
    if invalid:
        raise CheckFailed(
            f"{len(invalid)} of {len(points)} points are invalid; the same command measures them again"
            + "".join(f"\n  - {line}" for line in invalid)
        )
