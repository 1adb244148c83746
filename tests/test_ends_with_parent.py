"""A tied process: its parent's end is its own (`trtbuild serve`'s children: tests/triton_repo/test_service.py)."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest

from trtbuild.ends_with_parent import tied

# Starts a tied `sleep`, says its process id, and waits to be killed.
PARENT = """
import subprocess, sys, time
from trtbuild.ends_with_parent import tied
print(subprocess.Popen(tied(["sleep", "60"])).pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_ends_with_a_killed_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    deadline = time.monotonic() + 20
    while child.name() != "sleep":
        assert time.monotonic() < deadline, child.cmdline()
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "it outlives its parent"
        time.sleep(0.02)


def test_is_the_program_itself() -> None:
    """Its process id, status and signals; what cannot be run is named."""
    ended = subprocess.Popen(tied(["sh", "-c", "kill -USR1 $$"]))
    assert ended.wait(timeout=20) == -signal.SIGUSR1
    missing = subprocess.run(tied(["/no/such/program"]), capture_output=True, text=True, check=False)
    assert missing.returncode == 1 and missing.stderr.strip() == "/no/such/program: No such file or directory"
