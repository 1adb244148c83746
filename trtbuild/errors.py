"""The exception tree, and the exit codes that a script can rely on.

Codes: 0 done, 1 failed, 2 wrong usage (click's own), 3 refused, 4 a check failed, 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO, Any

import click


class TrtBuildError(click.ClickException):
    """Something failed; the message names the input, what was found, what is allowed and the fix."""

    exit_code = 1

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"error: {self.format_message()}", file=file, err=file is None)


class CheckpointError(TrtBuildError):
    """A checkpoint, engine directory or other input file is damaged or incomplete."""


class EngineBuildError(TrtBuildError):
    """The TensorRT builder failed, or logged an error while it claimed success."""


class Refused(TrtBuildError):
    """A combination that is unsupported, does not fit, or contradicts what is already there."""

    exit_code = 3


class CheckFailed(TrtBuildError):
    """The result exists, but a check of it failed: a plan's precision, an accuracy gate."""

    exit_code = 4


def refuse_all(subject: str, problems: Iterable[str]) -> None:
    """Raise one `Refused` that lists every problem found, so that none has to be found by retrying."""
    found = list(problems)
    if len(found) == 1:
        raise Refused(f"{subject}: {found[0]}")
    if found:
        raise Refused(f"{subject}:" + "".join(f"\n  - {problem}" for problem in found))
