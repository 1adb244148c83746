"""The exception tree, and the exit codes that a script can rely on.

Codes: 0 done, 1 failed, 2 wrong usage (click's own), 3 refused, 4 a check failed, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO, Any

import click

# Longer lines and lists are quotations of a damaged file.
_MAX_LINE, _MAX_LINES = 1500, 40


class TrtBuildError(click.ClickException):
    """Something failed; the message names the input, what was found, what is allowed and the fix.

    Messages quote untrusted files: control characters are escaped, and what is very long is shortened.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(_printable(message))

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"error: {self.format_message()}", file=file, err=file is None)


class CheckpointError(TrtBuildError):
    """A checkpoint, engine directory or other input file is damaged or incomplete."""


class EngineBuildError(TrtBuildError):
    """The TensorRT builder failed, or logged an error while it claimed success."""


class Refused(TrtBuildError):
    """A combination that is unsupported, does not fit, or contradicts what is already there."""

    exit_code = 3


class Unavailable(TrtBuildError):
    """Not now: the queue is full, or the worker is stopping or restarting. The same request can be sent again later."""


class DeadlineExceeded(TrtBuildError):
    """The time that the caller gave a request is over; what it had produced is lost."""


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


def _printable(message: str) -> str:
    lines = message.split("\n")
    if len(lines) > _MAX_LINES:
        lines = [*lines[:_MAX_LINES], f"  ... and {len(lines) - _MAX_LINES} more lines"]
    half = _MAX_LINE // 2
    cut = (line if len(line) <= _MAX_LINE else f"{line[:half]} ... {line[-half:]}" for line in lines)
    return "\n".join("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in cut)
