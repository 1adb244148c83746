"""The command group: how a command ends that is interrupted, terminated, or runs out of something."""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from trtbuild.errors import TrtBuildError


class _Terminated(BaseException):
    """SIGTERM, as KeyboardInterrupt is SIGINT: the blocks that it leaves end their child processes."""


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """A second SIGTERM ends the process where it is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class CommandGroup(click.Group):
    """Ctrl-C ends with 130, SIGTERM with 143 (128 + the signal's number, as shells do), and nothing is lost."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _sigterm_raises():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted; convert, compile and perf sweep go on where they were when given again", err=True)
            ctx.exit(130)
        except _Terminated:
            click.echo("terminated; convert, compile and perf sweep go on where they were when given again", err=True)
            ctx.exit(143)
        except MemoryError as error:
            raise TrtBuildError("out of memory; fewer --workers need less") from error
        except OSError as error:
            # click itself ends quietly where the reader of a pipe has gone.
            if error.errno == errno.EPIPE:
                raise
            hint = (
                "\nfree some and give the command again: what is finished stays" if error.errno == errno.ENOSPC else ""
            )
            raise TrtBuildError(f"{error.filename or 'output'}: {error.strerror}{hint}") from error
