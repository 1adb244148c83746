"""Between `trtbuild serve`, its models' stub processes, and those of the same model: what each can know of the others.

Triton (2.51) leaves the streams of a killed stub hanging and starts another stub at the next request; whoever waits
is told nothing. A file named after the process id, made by the model and removed by its `finalize`, tells a killed
stub from an unloaded model.
"""

from __future__ import annotations

import os
from pathlib import Path

from trtbuild.engines.serving.shared import runtime_directory
from trtbuild.workspace import digest_of

STUBS_VARIABLE = "TRTBUILD_STUBS"
# Who shares an engine worker: all Triton processes of one `trtbuild serve`, so that a restarted one finds it loaded.
GROUP_VARIABLE = "TRTBUILD_GROUP"
LOG_FORMAT_VARIABLE = "TRTBUILD_LOG_FORMAT"


def worker_group() -> str:
    """Of this stub: what `trtbuild serve` says, else the Triton process that it belongs to."""
    return os.environ.get(GROUP_VARIABLE) or f"triton-{os.getppid()}"


def metrics_lock(model: str) -> Path:
    """The file that tells the stubs of one model apart while it is loaded again (see `MetricsTurn`)."""
    return runtime_directory() / f"{digest_of([worker_group(), model])[:16]}.metrics"


def log_format() -> str:
    """ "text" or "json": of this stub's log, and of the engine worker that it starts."""
    return os.environ.get(LOG_FORMAT_VARIABLE) or "text"


def mark_alive() -> Path | None:
    """Leave this process's mark; None where nobody looks for it."""
    directory = os.environ.get(STUBS_VARIABLE)
    if directory is None:
        return None
    mark = Path(directory) / str(os.getpid())
    mark.touch()
    return mark


def find_dead(directory: Path) -> int | None:
    """The process id of a mark whose process is gone."""
    for mark in directory.glob("*"):
        # Looked at again: a finalize removes its mark just before the process ends.
        if not _runs(int(mark.name)) and mark.exists():
            return int(mark.name)
    return None


def _runs(process_id: int) -> bool:
    """False for a zombie too: Triton collects a dead stub only at the model's next request."""
    # Not above: the model's process has no use for it.
    import psutil

    try:
        return psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
