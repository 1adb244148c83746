"""Progress of long work on stderr: a bar on a terminal, plain lines elsewhere, silence in tests."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import click

# On something that is not a terminal (CI logs), one line per this many seconds.
_PLAIN_INTERVAL = 5.0


class Progress(Protocol):
    """Receives the advance of one named piece of work."""

    def advance(self, amount: float = 1.0, detail: str = "") -> None: ...


class NoProgress:
    """Discards everything; for library use and tests."""

    def advance(self, amount: float = 1.0, detail: str = "") -> None:
        return


class ProgressFactory(Protocol):
    """Opens a bar for a piece of work of `total` units; `unit` is their plural."""

    def __call__(self, title: str, total: float, unit: str = "") -> AbstractContextManager[Progress]: ...


@contextmanager
def no_progress(title: str, total: float, unit: str = "") -> Iterator[Progress]:
    """For library use and tests."""
    yield NoProgress()


@contextmanager
def terminal_progress(title: str, total: float, unit: str = "") -> Iterator[Progress]:
    """A rich bar on a terminal's stderr, otherwise a begin line, occasional lines, and an end line with the seconds."""
    if sys.stderr.isatty():
        with _rich_bar(title, total, unit) as progress:
            yield progress
        return
    started = time.monotonic()
    click.echo(f"{title} ...", err=True)
    yield _PlainLines(title, total, unit)
    click.echo(f"{title}: done in {time.monotonic() - started:.1f} s", err=True)


class _PlainLines:
    def __init__(self, title: str, total: float, unit: str) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._done = 0.0
        self._next = time.monotonic() + _PLAIN_INTERVAL

    def advance(self, amount: float = 1.0, detail: str = "") -> None:
        self._done += amount
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _PLAIN_INTERVAL
            click.echo(f"{self._title}: {self._done:.0f}/{self._total:.0f} {self._unit} {detail}".rstrip(), err=True)


@contextmanager
def _rich_bar(title: str, total: float, unit: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn(f"{unit} {{task.fields[detail]}}"), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Bars(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(title, total=total, detail="")

        class Bar:
            def advance(self, amount: float = 1.0, detail: str = "") -> None:
                bars.update(task, advance=amount, detail=detail)

        yield Bar()
