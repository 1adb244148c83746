"""`trtbuild perf report`: report.html, points.csv and a PNG of every plot, of one run or several together."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtbuild.errors import Refused, TrtBuildError
from trtbuild.perf.ceiling import Ceilings, add_ceilings
from trtbuild.perf.chromium import find_chromium, open_page
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
    """Of run directories, into `output`; `engines` is the workspace's engines/, for the roofline.

    Raises `Refused` for runs without points, or with a name twice.
    """
    read = [read_run(directory) for directory in runs]
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
    notes = [*(f"no roofline: {note}" for note in ceilings), *([why] if why else [])]
    return Written(page, table, files, notes)


def read_run(directory: Path) -> ReportRun:
    """Everything of a run directory that the page shows."""
    run = RunDirectory.open(directory)
    points = run.points()
    if not points:
        raise Refused(f"{directory}: no point is measured yet; trtbuild perf sweep measures them")
    return ReportRun(run.name, points, _sweep_facts(directory), read_telemetry(directory / TELEMETRY, points))


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
