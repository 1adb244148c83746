"""A process that ends when the one that started it does, even by SIGKILL (Linux).

`python ends_with_parent.py PARENT PROGRAM ARGUMENT...` becomes PROGRAM, which then gets SIGTERM: an exec keeps what was
asked of the kernel. It needs nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

# prctl's option (linux/prctl.h): a signal for this process when the thread that started it ends.
_PR_SET_PDEATHSIG = 1


def end_with_parent(number: int, parent: int) -> None:
    """Have Linux send signal `number` to this process when its parent ends; end now where that is no longer `parent`.

    Elsewhere nothing happens.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(1)


def tied(command: Sequence[str]) -> list[str]:
    """The command line that runs `command` as a child of this process, tied to the thread that starts it."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def main() -> None:
    parent, *command = sys.argv[1:]
    end_with_parent(signal.SIGTERM, int(parent))
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
