"""One process of trtllm-build for each rank, as many at once as there are GPUs; each finished rank is kept."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from trtbuild.engines.tensorrt_llm.engine_config import ENGINE_CONFIG, engine_file
from trtbuild.engines.tensorrt_llm.flags import FlagValue, arguments
from trtbuild.engines.tensorrt_llm.log import STAGES, cause, stage_of
from trtbuild.errors import EngineBuildError
from trtbuild.progress import Progress, ProgressFactory, no_progress
from trtbuild.workspace import sync

LOGS = "logs"
_KEPT_LINES = 200
_STOP_SECONDS = 10


def rank_command(rank: int, flags: Mapping[str, FlagValue]) -> list[str]:
    """argv after the interpreter's name."""
    return ["-m", "trtbuild.engines.tensorrt_llm.rank_build", str(rank), *arguments(flags)]


@dataclass
class RankBuilds:
    """Builds ranks into `directory`; `flags` are trtllm-build's, without output_dir."""

    directory: Path
    flags: Mapping[str, FlagValue]
    gpus: Sequence[int]
    progress: ProgressFactory = no_progress
    _running: dict[int, subprocess.Popen[str]] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)
    _stopped: bool = False

    def run(self, world_size: int) -> dict[int, float]:
        """Build the ranks that are not there yet; the seconds that each took.

        Raises EngineBuildError that names every rank that failed and why; the others stay, and are not built again.
        """
        missing = [rank for rank in range(world_size) if not self._is_built(rank)]
        (self.directory / LOGS).mkdir(exist_ok=True)
        free = deque(self.gpus)
        with self.progress("trtllm-build", world_size * len(STAGES), "steps") as bar:
            bar.advance((world_size - len(missing)) * len(STAGES))

            def work(rank: int) -> tuple[float, str | None]:
                gpu = free.popleft()
                try:
                    return self._build(rank, gpu, bar)
                finally:
                    free.append(gpu)

            with ThreadPoolExecutor(len(self.gpus)) as pool:
                try:
                    results = dict(zip(missing, pool.map(work, missing), strict=True))
                finally:
                    self._stop()
        failed = [
            f"rank {rank}: {why} (log: {self.directory / LOGS / f'rank{rank}.log'})"
            for rank, (_, why) in results.items()
            if why is not None
        ]
        if failed:
            done = world_size - len(failed)
            kept = f"; the {done} ranks that are done stay, and the same command goes on with the others" * (done > 0)
            raise EngineBuildError("trtllm-build failed for " + "; ".join(failed) + kept)
        return {rank: seconds for rank, (seconds, _) in results.items()}

    def _is_built(self, rank: int) -> bool:
        return (self.directory / engine_file(rank)).is_file()

    def _build(self, rank: int, gpu: int, bar: Progress) -> tuple[float, str | None]:
        """Seconds, and why it failed."""
        started = time.monotonic()
        output = self.directory / f"rank{rank}.partial"
        flags = {**self.flags, "output_dir": str(output)}
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": _visible(gpu), "PYTHONUNBUFFERED": "1"}
        with self._lock:
            if self._stopped:
                return 0.0, "it was not begun"
            process = subprocess.Popen(
                [sys.executable, *rank_command(rank, flags)], env=environment, text=True, errors="replace",
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            self._running[rank] = process
        lines = self._follow(process, rank, bar)
        code = process.wait()
        with self._lock:
            self._running.pop(rank, None)
        if code != 0:
            return time.monotonic() - started, cause(lines, code)
        return time.monotonic() - started, self._take(rank, output)

    def _follow(self, process: subprocess.Popen[str], rank: int, bar: Progress) -> list[str]:
        """Its last lines; all of them are in its log."""
        assert process.stdout is not None
        last: deque[str] = deque(maxlen=_KEPT_LINES)
        stage = -1
        with (self.directory / LOGS / f"rank{rank}.log").open("w", encoding="utf-8") as log:
            for line in process.stdout:
                log.write(line)
                log.flush()
                last.append(line)
                reached = stage_of(line, stage)
                if reached > stage:
                    bar.advance(reached - stage, f"rank {rank}: {STAGES[reached][0]}")
                    stage = reached
        return list(last)

    def _take(self, rank: int, output: Path) -> str | None:
        """Move what a finished rank wrote to its place, the engine last: it says that the rank is whole."""
        engine = output / engine_file(rank)
        if not engine.is_file() or not engine.stat().st_size:
            return f"it said that it succeeded, and wrote no {engine.name}"
        if rank == 0 and not (output / ENGINE_CONFIG).is_file():
            return f"it said that it succeeded, and wrote no {ENGINE_CONFIG}"
        for file in sorted(output.iterdir(), key=lambda file: file == engine):
            sync(file)
            file.replace(self.directory / file.name)
        sync(self.directory)
        output.rmdir()
        return None

    def _stop(self) -> None:
        """End what still runs, after Ctrl-C."""
        with self._lock:
            self._stopped = True
            running = list(self._running.values())
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _visible(gpu: int) -> str:
    """A GPU's name for a child, where this process sees only some of them."""
    given = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return given[gpu] if gpu < len(given) else str(gpu)
