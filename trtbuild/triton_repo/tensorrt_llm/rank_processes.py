"""The ranks of TensorRT-LLM engines as one server: started by MPI, ready when rank 0 is, and ended together."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from trtbuild.triton_repo.installation import TritonInstallation
from trtbuild.triton_repo.tensorrt_llm.launch import LaunchPlan
from trtbuild.triton_repo.triton_process import Ports, TritonProcess

# For the driver to let a killed process go.
_KILL_WAIT_S = 2.0
# For requests in flight where no time is given; for the other ranks to follow rank 0.
_CLOSE_S, _WORKERS_S = 10.0, 3.0
_POLL_S = 0.02
# Open MPI's and Slurm's words on the rank that ended first.
_LAUNCHER_SAYS = re.compile(
    r"^\s*(?:(?:mpirun|prterun) (?:noticed|detected)|(?:srun|slurmstepd): error|Process name:|Exit code:|exited on)"
)


class RankProcesses(TritonProcess):
    """The launcher and its ranks as one process that is watched; a context manager that ends all of them."""

    def __init__(
        self,
        plan: LaunchPlan,
        installation: TritonInstallation,
        ports: Ports,
        *,
        log_format: str = "text",
        echo: Callable[[str], None] | None = None,
    ) -> None:
        self._plan = plan
        self._seen: dict[int, psutil.Process] = {}
        super().__init__(installation, Path(), ports, log_format=log_format, echo=echo)

    def why_ended(self) -> str:
        """With what the launcher says of who ended first, and what the log says of why."""
        count, status = len(self._plan.ranks), self.process.poll()
        if self._plan.launcher and status is not None and status < 0:
            return f"{self._plan.launcher[0]} was killed by signal {-status}, and all {count} ranks were ended"
        return f"a rank ended, and with it all {count} (status {status}){self._failures()}"

    def __enter__(self) -> RankProcesses:
        return self

    def is_ready(self) -> bool:
        self._processes()
        return super().is_ready()

    def stop(self) -> None:
        """Ask rank 0 to end, which tells the others.

        SIGTERM to mpirun would kill all ranks a moment later, with the requests in flight; srun passes it on and waits.
        """
        leader = None if self._plan.uses_srun else self._rank_0()
        if leader is None:
            super().stop()
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            leader.terminate()

    def close(self, timeout_s: float = 0.0) -> int:
        """End all ranks, by SIGKILL after `timeout_s`; the launcher's exit status."""
        self._processes()
        if self.process.poll() is not None:
            # They hold the log open, whose end is waited for.
            self._kill_ranks()
        leader = self._rank_0()
        if leader is not None and not self._plan.uses_srun:
            self.stop()
            _wait_for([leader], timeout_s or _CLOSE_S)
            if _lives(leader):
                self.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=_WORKERS_S)
            # Ranks that did not follow are the launcher's to end.
            timeout_s = _WORKERS_S
        status = super().close(timeout_s)
        self._kill_ranks()
        return status

    def kill(self) -> None:
        """At once, and all of them: ranks outlive a killed launcher."""
        self._processes()
        super().kill()
        self._kill_ranks()

    def _command(self, repository: Path, arguments: Sequence[str], exit_timeout_s: int) -> list[str]:
        return self._plan.command()

    def _added_environment(self) -> dict[str, str]:
        """Without trtbuild's PATH: the models take their packages from the container's own Python."""
        added = {name: value for name, value in self._installation.environment.items() if name != "PATH"}
        return {**added, **self._plan.environment}

    def _failures(self) -> str:
        said = [line for line in self._log if _LAUNCHER_SAYS.match(line)]
        return "".join(f"\n    {line.strip()}" for line in said[-8:]) + super()._failures()

    def _rank_0(self) -> psutil.Process | None:
        """None where it has ended, or has no launcher above it."""
        arguments = list(self._plan.ranks[0][1:])
        for one in self._processes() if self._plan.launcher else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                # A launcher of a single rank has the same end of its command line.
                if one.pid != self.process.pid and one.cmdline()[-len(arguments) :] == arguments:
                    return one
        return None

    def _processes(self) -> list[psutil.Process]:
        """The launcher and what is under it, with what was seen there before and still runs."""
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self.process.pid)
            self._seen |= {one.pid: one for one in (launcher, *launcher.children(recursive=True))}
        return [one for one in self._seen.values() if one.is_running()]

    def _kill_ranks(self) -> None:
        left = [one for one in self._processes() if one.pid != self.process.pid]
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        _wait_for(left, _KILL_WAIT_S)


def _wait_for(processes: Sequence[psutil.Process], timeout_s: float) -> None:
    """Until they have ended, or the time is over."""
    deadline = time.monotonic() + timeout_s
    while any(map(_lives, processes)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _lives(process: psutil.Process) -> bool:
    """A zombie does not: nobody may collect the ranks of a killed launcher."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
