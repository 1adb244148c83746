"""What the machine did while a point was measured: a row every 100 ms of every GPU, of the host, and of processes.

    with TelemetrySampler(path, [server.pid]) as sampler:
        ...
    point["telemetry"] = sampler.summary()

The file is CSV, each column named with its unit: `time_s` since the start, `gpuN_...` (see `gpu_reader`),
`host_cpu_percent` (100 is every core busy), `host_memory_used_bytes`, and for each process with all its descendants
`NAME_cpu_percent` (100 is one core), `NAME_rss_bytes` and `NAME_processes`; a descendant that is given itself counts
only there. What could not be read is an empty cell.
"""

from __future__ import annotations

import csv
import io
import math
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from trtbuild.errors import TrtBuildError
from trtbuild.perf.gpu_reader import GpuReader, Reading, is_slowed
from trtbuild.workspace import write_atomic

RATE_HZ = 10.0
# Looking for new children goes through every process of the machine.
_CHILDREN_EVERY_S = 1.0


class TelemetrySampler:
    """Samples in a thread of its own until the block ends; then the file appears, whole, under its name.

    `processes` are ids, or {column prefix: id}; one that is gone or ends gives empty cells. `nvml` replaces pynvml.
    """

    def __init__(
        self,
        path: Path,
        processes: Iterable[int] | Mapping[str, int] = (),
        *,
        rate_hz: float = RATE_HZ,
        nvml: Any = None,
    ) -> None:
        if rate_hz <= 0:
            raise TrtBuildError(f"telemetry at {rate_hz} Hz: the rate must be above 0")
        self._path = path
        self._period = 1 / rate_hz
        self._gpus = GpuReader(nvml)
        named = _named(processes)
        self._groups = [ProcessGroup(prefix, pid, set(named.values()) - {pid}) for prefix, pid in named.items()]
        self._rows: list[Reading] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        self._start = 0.0

    @property
    def gpu_missing(self) -> str | None:
        """Why there are no GPU columns; None where there are."""
        return self._gpus.missing

    def __enter__(self) -> TelemetrySampler:
        self._start = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._gpus.close()
        if kind is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self._path, to_csv(self._rows).encode())

    def summary(self) -> dict[str, dict[str, float]]:
        """{column: {"mean", "max"}} of the rows so far.

        Two columns are not the file's: sample_interval_s, the time between rows, which shows the rate that was reached;
        and gpuN_slowed_share, the share of rows in which power or heat held the clocks down. Of gpuN_energy_j, which
        counts up, both are what was spent between the first row and the last.
        """
        return summarise(self._rows)

    def energy_j(self) -> float | None:
        """Spent by all GPUs between the first row and the last; None where no GPU reports power or energy."""
        return spent_energy_j(self._rows)

    def _run(self) -> None:
        # psutil compares with the thread's last call; its first means nothing.
        psutil.cpu_percent()
        due = time.monotonic()
        while True:
            self._rows.append(self._sample())
            # After a late row the next is due at the next whole period: rows are never caught up in a burst.
            due += self._period * max(1, math.ceil((time.monotonic() - due) / self._period))
            if self._stop.wait(max(0.0, due - time.monotonic())):
                break
        # The counters' last word; processor shares of so short a time would mean nothing.
        self._rows.append({"time_s": time.monotonic() - self._start, **self._gpus.read()})

    def _sample(self) -> Reading:
        row: Reading = {"time_s": time.monotonic() - self._start}
        row |= self._gpus.read()
        if self._rows:
            row["host_cpu_percent"] = psutil.cpu_percent()
        row["host_memory_used_bytes"] = psutil.virtual_memory().used
        for group in self._groups:
            row |= group.read()
        return row


class ProcessGroup:
    """A process and its descendants, as one: CPU time used since the last reading, resident memory, and number.

    `others` are processes with groups of their own: they and theirs do not count here, though they descend from it.
    """

    def __init__(self, prefix: str, pid: int, others: Collection[int] = ()) -> None:
        self._others = others
        self._prefix = prefix
        self._pid = pid
        self._members: dict[int, psutil.Process] = {}
        self._cpu: dict[int, float] = {}
        self._looked = -_CHILDREN_EVERY_S
        self._read_at = 0.0

    def read(self) -> Reading:
        """Without a CPU column in the first reading; empty once the process is gone."""
        now = time.monotonic()
        if now - self._looked >= _CHILDREN_EVERY_S:
            self._find(now)
        rss, used, alive = 0, 0.0, 0
        for pid, process in list(self._members.items()):
            try:
                times = process.cpu_times()
                rss += process.memory_info().rss
            except psutil.Error:
                del self._members[pid]
                continue
            total, alive = times.user + times.system, alive + 1
            # A child that was found later counts from then on.
            used += total - self._cpu.get(pid, total)
            self._cpu[pid] = total
        passed, first, self._read_at = now - self._read_at, not self._read_at, now
        if not alive:
            return {}
        row: Reading = {f"{self._prefix}_rss_bytes": rss, f"{self._prefix}_processes": alive}
        return row if first else {f"{self._prefix}_cpu_percent": 100 * used / passed, **row}

    def _find(self, now: float) -> None:
        self._looked = now
        try:
            root = psutil.Process(self._pid)
            found = [root, *root.children(recursive=True)]
            apart = {pid for other in found if other.pid in self._others for pid in _family(other)}
        except psutil.Error:
            self._members = {}
            return
        self._members = {one.pid: self._members.get(one.pid, one) for one in found if one.pid not in apart}


def _family(process: psutil.Process) -> set[int]:
    return {process.pid, *(child.pid for child in process.children(recursive=True))}


def _named(processes: Iterable[int] | Mapping[str, int]) -> dict[str, int]:
    """Prefixes for ids without one: the program's name, with the id where two are alike."""
    if isinstance(processes, Mapping):
        return {str(prefix): pid for prefix, pid in processes.items()}
    named: dict[str, int] = {}
    for pid in processes:
        try:
            name = psutil.Process(pid).name().replace(",", "_")
        except psutil.Error:
            name = "process"
        named[name if name not in named else f"{name}-{pid}"] = pid
    return named


def to_csv(rows: Iterable[Reading]) -> str:
    """Columns in the order in which they first appear; floats with six significant digits, times to the 0.1 ms."""
    rows = list(rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    output = io.StringIO()
    writer = csv.DictWriter(output, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({column: _cell(column, value) for column, value in row.items()})
    return output.getvalue()


def _cell(column: str, value: float | str) -> float | str:
    if not isinstance(value, float):
        return value
    # A counter of joules since the driver was loaded needs all its digits: differences are taken of it.
    return f"{value:.4f}" if column == "time_s" else f"{value:.3f}" if column.endswith("energy_j") else f"{value:.6g}"


def summarise(rows: list[Reading]) -> dict[str, dict[str, float]]:
    """See `TelemetrySampler.summary`."""
    found: dict[str, dict[str, float]] = {}
    columns = dict.fromkeys(column for row in rows for column in row if column != "time_s")
    for column in columns:
        values = [row[column] for row in rows if column in row]
        if column.endswith("_throttle_reasons"):
            slowed = [float(is_slowed(str(value))) for value in values]
            found[column.replace("throttle_reasons", "slowed_share")] = _mean_and_max(slowed)
        elif column.endswith("_energy_j"):
            spent = float(values[-1]) - float(values[0])
            found[column] = {"mean": spent, "max": spent}
        else:
            found[column] = _mean_and_max([float(value) for value in values])
    times = [float(row["time_s"]) for row in rows]
    if len(times) > 1:
        found["sample_interval_s"] = _mean_and_max([b - a for a, b in pairwise(times)])
    return found


def _mean_and_max(values: list[float]) -> dict[str, float]:
    return {"mean": sum(values) / len(values), "max": max(values)}


def spent_energy_j(rows: list[Reading]) -> float | None:
    """By each GPU's energy counter, or, where it has none (before Volta), by the trapezoids under its power."""
    names = {column.split("_")[0] for row in rows for column in row if column.endswith(("_energy_j", "_power_w"))}
    total: float | None = None
    for name in sorted(names):
        counted = [float(row[f"{name}_energy_j"]) for row in rows if f"{name}_energy_j" in row]
        power = [(float(row["time_s"]), float(row[f"{name}_power_w"])) for row in rows if f"{name}_power_w" in row]
        if len(counted) > 1:
            total = (total or 0.0) + counted[-1] - counted[0]
        elif len(power) > 1:
            pairs = pairwise(power)
            total = (total or 0.0) + sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairs)
    return total
