"""What a sweep shows while it runs: a table with an ETA on a terminal, a line per point elsewhere. On stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import click

from trtbuild.perf.records import Point, PointSpec

_MOST_ROWS = 24
_COLUMNS = ("point", "TTFT p50", "p99", "ITL p50", "p99", "tokens/s", "requests/s", "")


class SweepView(Protocol):
    """Is told what happens."""

    def start(self, spec: PointSpec) -> None: ...

    def finish(self, point: Point, *, skipped: bool = False) -> None: ...


class NoView:
    """For tests and library use."""

    def start(self, spec: PointSpec) -> None:
        return

    def finish(self, point: Point, *, skipped: bool = False) -> None:
        return


class Eta:
    """Of the points that are left, from those that were measured."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self._seconds: list[float] = []

    def add(self, point: Point, skipped: bool) -> None:
        self.done += 1
        if not skipped:
            self._seconds.append(point.seconds)

    def text(self) -> str:
        left = self.total - self.done
        if left == 0 or not self._seconds:
            return f"{self.done}/{self.total}"
        seconds = left * sum(self._seconds) / len(self._seconds)
        return f"{self.done}/{self.total}, about {_duration(seconds)} left"


class PlainLines:
    """A line per point."""

    def __init__(self, total: int) -> None:
        self._eta = Eta(total)

    def start(self, spec: PointSpec) -> None:
        return

    def finish(self, point: Point, *, skipped: bool = False) -> None:
        self._eta.add(point, skipped)
        cells = [f"{name} {cell}" for name, cell in zip(_COLUMNS[1:-1], _cells(point)[1:-1], strict=True)]
        state = "measured before" if skipped else point.why_invalid or ""
        figures = ", ".join(cells) if point.metrics else "no figures"
        mark = " " if point.valid else " INVALID: "
        click.echo(f"[{self._eta.text()}] {point.spec.label()}: {figures}{mark}{state}".rstrip(), err=True)


class LiveTable:
    """Redrawn as points come; the last rows of a long sweep."""

    def __init__(self, total: int, live: Any) -> None:
        self._eta, self._live = Eta(total), live
        self._rows: list[tuple[str, ...]] = []
        self._now: tuple[PointSpec, float] | None = None

    def start(self, spec: PointSpec) -> None:
        self._now = (spec, time.monotonic())
        self._live.update(self, refresh=True)

    def finish(self, point: Point, *, skipped: bool = False) -> None:
        self._eta.add(point, skipped)
        self._rows.append(_cells(point, skipped))
        self._now = None
        self._live.update(self, refresh=True)

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title=f"points {self._eta.text()}", title_justify="left")
        for column in _COLUMNS:
            table.add_column(column, justify="left" if column in ("point", "") else "right")
        for row in self._rows[-_MOST_ROWS:]:
            table.add_row(*row)
        if self._now is not None:
            spec, since = self._now
            table.add_row(spec.label(), *[""] * 6, f"{time.monotonic() - since:.0f} s ...")
        return table


@contextmanager
def sweep_view(total: int) -> Iterator[SweepView]:
    """For `total` points."""
    if not sys.stderr.isatty():
        yield PlainLines(total)
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), refresh_per_second=2) as live:
        yield LiveTable(total, live)


def print_points(points: Sequence[Point]) -> None:
    """The table at the end, on stdout."""
    rows = [_COLUMNS[:-1], *(_cells(point)[:-1] for point in points)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row, state in zip(rows, ["", *(_cells(point)[-1] for point in points)], strict=True):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        click.echo("  ".join([*cells, state]).rstrip())


def _cells(point: Point, skipped: bool = False) -> tuple[str, ...]:
    state = "measured before" if skipped else ""
    if not point.valid:
        state = f"invalid: {point.why_invalid}"
    elif point.num_errors:
        state = ", ".join(f"{number} {kind}" for kind, number in point.errors.items())
    times = [_milliseconds(point, metric, name) for metric in ("ttft_s", "itl_s") for name in ("p50", "p99")]
    rates = [_rate(point, name) for name in ("output_tokens_per_s", "requests_per_s")]
    return (point.spec.label(), *times, *rates, state)


def _milliseconds(point: Point, metric: str, name: str) -> str:
    found = point.metrics.get(metric)
    return "-" if found is None else f"{1e3 * found[name]:.1f} ms"


def _rate(point: Point, name: str) -> str:
    found = point.throughput.get(name)
    return "-" if found is None else f"{found['mean']:.2f}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
