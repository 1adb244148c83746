"""`trtbuild perf report`: report.html, points.csv and a PNG of every plot, of one run or several together."""

from __future__ import annotations

import base64
import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtbuild.engines.passport import Passport
from trtbuild.errors import Refused, TrtBuildError
from trtbuild.perf.ceiling import Ceilings, add_ceilings
from trtbuild.perf.chromium import find_chromium, open_page
from trtbuild.perf.measure import engine_facts
from trtbuild.perf.records import Point
from trtbuild.perf.report_html import ReportRun, render
from trtbuild.perf.report_rows import make_rows, to_csv
from trtbuild.perf.report_telemetry import read_telemetry
from trtbuild.perf.run_directory import SWEEP, TELEMETRY, RunDirectory
from trtbuild.workspace import write_atomic

PAGE, TABLE = "report.html", "points.csv"
_PICTURES = re.compile(r'<script id="pictures" type="application/json">(.*?)</script>', re.DOTALL)
_PNG = "data:image/png;base64,"


@dataclass(frozen=True)
class Written:
    """Files of a report; `notes` says what is missing in it and why."""

    page: Path
    table: Path
    pictures: list[Path]
    notes: list[str]


def write_report(runs: Sequence[Path], output: Path, engines: Path, *, pictures: bool = True) -> Written:
    """Of run directories, into `output`; `engines` is the workspace's engines/, for the roofline and for accuracy.

    Raises `Refused` for runs without points, or with a name twice.
    """
    read = [read_run(directory, engines) for directory in runs]
    names = [run.name for run in read]
    if len(set(names)) != len(names):
        raise Refused(f"runs {', '.join(names)}: a name is there twice; rename one of the directories")
    rows = make_rows({run.name: run.points for run in read})
    ceilings = add_ceilings(rows, [point for run in read for point in run.points], Ceilings(engines))
    output.mkdir(parents=True, exist_ok=True)
    page, table = output / PAGE, output / TABLE
    write_atomic(table, to_csv(rows).encode())
    write_atomic(page, render(read, rows, ceilings).encode())
    files, why = write_pictures(page) if pictures else ([], "no PNGs: --no-png")
    notes = [*_unverified(read), *(f"no roofline: {note}" for note in ceilings), *([why] if why else [])]
    return Written(page, table, files, notes)


def read_run(directory: Path, engines: Path) -> ReportRun:
    """Everything of a run directory that the page shows."""
    run = RunDirectory.open(directory)
    points = _verified_since(run.points(), engines)
    if not points:
        raise Refused(f"{directory}: no point is measured yet; trtbuild perf sweep measures them")
    return ReportRun(run.name, points, _sweep_facts(directory), read_telemetry(directory / TELEMETRY, points))


def _verified_since(points: Sequence[Point], engines: Path) -> list[Point]:
    """With what `trtbuild verify` found after points were measured, if the engine in `engines` has the same content."""
    found: dict[str, Mapping[str, Any]] = {}
    for name in {point.spec.engine for point in points if point.engine.get("accuracy") is None}:
        with contextlib.suppress(TrtBuildError):
            found[name] = engine_facts(Passport.open(engines / name))
    return [
        replace(point, engine={**point.engine, "accuracy": found[point.spec.engine]["accuracy"]})
        if point.engine.get("accuracy") is None
        and found.get(point.spec.engine, {}).get("digest") == point.engine.get("digest") is not None
        else point
        for point in points
    ]


def _unverified(runs: Sequence[ReportRun]) -> list[str]:
    points = [point for run in runs for point in run.points]
    names = sorted({point.spec.engine for point in points if point.engine.get("accuracy") is None})
    return [f"no accuracy of {name}: trtbuild verify {name} measures it, then make the report again" for name in names]


def _sweep_facts(directory: Path) -> Mapping[str, Any]:
    try:
        content = json.loads((directory / SWEEP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {SWEEP: "damaged"}
    facts = content.get("sweep", {}) if isinstance(content.get("sweep"), dict) else {}
    return facts | {key: value for key, value in content.items() if key != "sweep"}


def write_pictures(page: Path) -> tuple[list[Path], str | None]:
    """A PNG of every plot of the page beside it, drawn by the page itself; the files, and why there are none."""
    binary = find_chromium()
    if binary is None:
        return [], "no PNGs: no Chromium on PATH draws them (apt-get install chromium)"
    try:
        opened = open_page(binary, page, fragment="png")
    except TrtBuildError as error:
        return [], f"no PNGs: {error.format_message()}"
    match = _PICTURES.search(opened.html)
    if match is None:
        said = f" ({'; '.join(opened.console)[:300]})" if opened.console else ""
        return [], f"no PNGs: the page drew none in {binary.name}{said}"
    files = []
    for name, content in json.loads(match[1]).items():
        files.append(page.parent / f"{name}.png")
        write_atomic(files[-1], base64.b64decode(content.removeprefix(_PNG)))
    return files, None
