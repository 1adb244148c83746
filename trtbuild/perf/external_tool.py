"""What the drivers of other projects' load generators share: running the tool, its CPU and clock, the steady part."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal
import subprocess
import threading
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from trtbuild.errors import TrtBuildError
from trtbuild.perf.load import Due, open_loop
from trtbuild.perf.records import ClientFigures, PointSpec, RequestRecord

_SAMPLE_S = 0.1
_TAIL_CHARACTERS = 1500
# Requests of a closed loop that are sent on top of those that are kept: each stream's first one and its last two.
_EXTRA_ROUNDS = 3
# An open loop is steady from its first answer until an answer before its last request; in rounds of warm-up.
_EDGE_ROUNDS = 1.5
# A tool is given up after so many times the time that it should take.
_PATIENCE, _LEAST_PATIENCE_S = 4.0, 30.0


@dataclass
class ToolRun:
    """A finished run. `cpu_s`: (time.monotonic(), CPU seconds so far by process id), several times a second."""

    status: int
    output: str
    seconds: float
    samples: list[tuple[float, dict[int, float]]] = field(default_factory=list)

    @property
    def tail(self) -> str:
        """The end of what it printed, for messages."""
        return self.output.strip()[-_TAIL_CHARACTERS:]


def run_tool(command: Sequence[str], environment: Mapping[str, str], log: Path, timeout_s: float, hint: str) -> ToolRun:
    """Run it to its end, output to `log`. After `timeout_s` it is ended, and `TrtBuildError` with `hint` raised."""
    begun, samples = time.monotonic(), list[tuple[float, dict[int, float]]]()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=os.environ | dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    watcher = threading.Thread(target=_watch, args=(psutil.Process(process.pid), samples), daemon=True)
    watcher.start()
    try:
        status = process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        printed = log.read_text(encoding="utf-8", errors="replace").strip()[-_TAIL_CHARACTERS:]
        name = Path(command[0]).name
        raise TrtBuildError(
            f"{name} was not done within {timeout_s:.0f} s and was ended; {hint}. It printed:\n{printed}"
        ) from None
    finally:
        _end(process)
    watcher.join()
    return ToolRun(status, log.read_text(encoding="utf-8", errors="replace"), time.monotonic() - begun, samples)


def _watch(process: psutil.Process, samples: list[tuple[float, dict[int, float]]]) -> None:
    """Until the process is over."""
    while process.is_running():
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return
            everyone = [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        spent: dict[int, float] = {}
        for one in everyone:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                times = one.cpu_times()
                spent[one.pid] = times.user + times.system
        samples.append((time.monotonic(), spent))
        time.sleep(_SAMPLE_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    """It and what it started; they have a process group of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def monotonic_offset_s() -> float:
    """What to add to a time of day (time.time()) for time.monotonic(): the tools write times of day.

    The smallest of some differences: between the two readings the process may have had to wait.
    """
    return max(time.monotonic() - time.time() for _ in range(20))


def requests_to_send(spec: PointSpec, round_s: float, num_streams: int) -> list[Due]:
    """Those of a run that keeps `num_requests` and lasts `min_seconds`, which the edges come on top of.

    `round_s`: of one request on each of `num_streams` streams.
    """
    if spec.load.kind == "trace":
        return list(open_loop(spec))
    if spec.load.is_closed:
        rounds = max(math.ceil(spec.num_requests / num_streams), math.ceil(spec.min_seconds / max(round_s, 1e-3)))
        return [Due(0.0, spec.isl, spec.osl)] * ((rounds + _EXTRA_ROUNDS) * num_streams)
    found, begin_s = list[Due](), _EDGE_ROUNDS * round_s
    for request in open_loop(spec):
        found.append(request)
        end_s = request.at_s - _EDGE_ROUNDS * round_s
        if end_s - begin_s >= spec.min_seconds:
            kept = bisect_right(found, end_s, key=_at) - bisect_right(found, begin_s, key=_at)
            if kept >= spec.num_requests:
                break
    return found


def _at(request: Due) -> float:
    return request.at_s


def patience_s(expected_s: float) -> float:
    """How long to wait for a run that should take so long."""
    return _LEAST_PATIENCE_S + _PATIENCE * expected_s


def closed_loop(records: Sequence[RequestRecord], num_streams: int) -> list[RequestRecord]:
    """In the order of their starts, with `send_delay_s` since the answer that each of them followed.

    A tool does not tell which stream sent a request; while all streams are busy, each answer makes one request.
    """
    ordered = sorted(records, key=lambda record: record.start_s)
    ends = sorted(record.finished_s for record in records)
    falls = _falls_at(ordered, num_streams)
    found = []
    for number, record in enumerate(ordered):
        if number < num_streams:
            due = record.start_s
        elif falls is None or record.start_s <= falls:
            due = ends[number - num_streams]
        else:
            due = max((end for end in ends if end <= record.start_s), default=record.start_s)
        found.append(replace(record, send_delay_s=max(0.0, record.start_s - due)))
    return found


def closed_window(records: Sequence[RequestRecord], num_streams: int) -> tuple[float, float] | None:
    """`Measured.window` of a closed loop whose streams send so many requests each: they do not stop together.

    None where there never was a request on every stream.
    """
    ordered = sorted(records, key=lambda record: record.start_s)
    falls = _falls_at(ordered, num_streams)
    if falls is None:
        return None
    begin = ordered[num_streams - 1].start_s
    last = [record.start_s for record in itertools.takewhile(lambda one: one.finished_s <= falls, ordered)]
    return begin, max(last, default=begin)


def open_window(records: Sequence[RequestRecord]) -> tuple[float, float] | None:
    """`Measured.window` of an open loop: after the first answer, and over before nothing was sent any more."""
    if not records:
        return None
    ordered = sorted(records, key=lambda record: record.start_s)
    begin, stopped = min(one.finished_s for one in ordered), ordered[-1].start_s
    last = [one.start_s for one in itertools.takewhile(lambda one: one.finished_s <= stopped, ordered)]
    return begin, max(last, default=begin)


def _falls_at(ordered: Sequence[RequestRecord], num_streams: int) -> float | None:
    """When one stream had nothing more to send: the first end after which no request was on every stream again."""
    # At the same moment an end comes before the start that it makes.
    events = sorted([(one.start_s, 1) for one in ordered] + [(one.finished_s, -1) for one in ordered])
    in_flight, full_at = 0, None
    for at, change in events:
        in_flight += change
        if change > 0 and in_flight == num_streams:
            full_at = at
    if full_at is None:
        return None
    return min(one.finished_s for one in ordered if one.finished_s > full_at)


def client_figures(run: ToolRun, records: Sequence[RequestRecord]) -> ClientFigures:
    """CPU of the busiest process while the requests ran, and how late they were sent."""
    delays = sorted(record.send_delay_s for record in records)
    late = delays[min(len(delays) - 1, int(0.99 * len(delays)))] if delays else None
    if not records:
        return ClientFigures(cpu_share=None, send_delay_p99_s=late)
    first, last = min(one.start_s for one in records), max(one.finished_s for one in records)
    inside = [sample for sample in run.samples if first <= sample[0] <= last]
    if len(inside) < 2:
        return ClientFigures(cpu_share=None, send_delay_p99_s=late)
    seconds = inside[-1][0] - inside[0][0]
    spent = [inside[-1][1][pid] - inside[0][1][pid] for pid in inside[0][1].keys() & inside[-1][1].keys()]
    tokens = sum(inside[0][0] <= at <= inside[-1][0] for one in records for at in one.token_times_s)
    return ClientFigures(
        cpu_share=max(spent, default=0.0) / seconds,
        send_delay_p99_s=late,
        cpu_per_token_s=sum(spent) / tokens if tokens else None,
        num_processes=len(spent),
    )


def wrong_lengths(spec_isl: int, spec_osl: int, prompt_tokens: int | None, output_tokens: int) -> str | None:
    """An answer of another length than was asked for is an error: its figures would be of another measurement."""
    if output_tokens != spec_osl:
        return f"failed: {output_tokens} tokens came, {spec_osl} were asked for"
    if prompt_tokens not in (None, spec_isl):
        return f"failed: the server read {prompt_tokens} prompt tokens, {spec_isl} were sent"
    return None
