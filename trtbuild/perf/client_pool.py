"""The client processes of one point, led as one: warm-up until stable, the load, its steady part, its end."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from trtbuild.errors import TrtBuildError
from trtbuild.perf.client_process import Job, job_line
from trtbuild.perf.load import num_processes, split, warmup_streams
from trtbuild.perf.records import ClientFigures, Measured, PointSpec, RequestRecord, Target

_START_TIMEOUT_S = 60.0
# Warm-up ends after so many rounds that take as long as each other, within this share.
_ALIKE, _STABLE = 3, 0.1
_LEAD_S = 0.05


class ClientPool:
    """A context manager: the processes of a point; `measure` is the way through it."""

    def __init__(self, spec: PointSpec, target: Target, *, engine: bool = False) -> None:
        self.spec, self.target = spec, target
        self._messages: queue.SimpleQueue[tuple[int, dict[str, Any] | None]] = queue.SimpleQueue()
        self._count = num_processes(spec, os.cpu_count() or 1)
        streams = split(warmup_streams(spec.load, target.limits), self._count)
        self._processes = [
            _start(
                Job(
                    spec=spec.to_dict(),
                    limits=asdict(target.limits),
                    process=index,
                    num_processes=self._count,
                    num_streams=streams[index],
                    grpc=target.grpc,
                    model=target.model,
                    socket=str(target.socket) if engine else None,
                )
            )
            for index in range(self._count)
        ]
        for index, process in enumerate(self._processes):
            threading.Thread(target=self._read, args=(index, process), daemon=True).start()

    def measure(self) -> Measured:
        """Warm up, put the load on until enough requests are over, and gather what came back."""
        self._wait("ready", _START_TIMEOUT_S)
        rounds = self._warm_up()
        self._tell({"op": "begin"})
        records, window = self._batches() if self.spec.load.kind == "batch" else self._load()
        self._tell({"op": "stop"})
        done = [message["done"] for message in self._wait("done")]
        return Measured(records, _figures(done, records), window=window, notes={"warmup_rounds": rounds})

    def _warm_up(self) -> list[float]:
        """Seconds of each round."""
        rounds: list[float] = []
        for number in range(self.spec.warmup):
            rounds.append(self._wave(number, keep=False)[0])
            last = rounds[-_ALIKE:]
            if len(last) == _ALIKE and max(last) - min(last) <= _STABLE * max(last):
                break
        return [round(seconds, 4) for seconds in rounds]

    def _wave(self, number: int, keep: bool) -> tuple[float, list[RequestRecord]]:
        self._tell({"op": "wave", "number": number, "keep": keep})
        answers = self._wait("wave")
        records = [RequestRecord.from_dict(one) for answer in answers for one in answer["records"]]
        return max(answer["wave"] for answer in answers), records

    def _batches(self) -> tuple[list[RequestRecord], tuple[float, float]]:
        """Whole batches; the first one is the ramp."""
        begun, records, first = time.monotonic(), list[RequestRecord](), list[RequestRecord]()
        for number in range(1 << 30):
            made = self._wave(number, keep=True)[1]
            first = first or made
            records += made
            if len(records) >= self.spec.num_requests + len(first) and self._long_enough(begun):
                break
        return records, (max(one.start_s for one in first), max(one.start_s for one in records))

    def _load(self) -> tuple[list[RequestRecord], tuple[float, float]]:
        """Sends on until every request of the steady part is over, so that none of them ran beside a falling load."""
        at = time.monotonic() + _LEAD_S
        self._tell({"op": "run", "at": at})
        records: list[RequestRecord] = []
        steady = _Steady(self.spec, at)
        cleared, ended, until = 0, 0, math.inf
        while cleared < self._count and ended < self._count:
            message = self._next()[1]
            cleared += "cleared" in message
            ended += "all" in message
            if "record" not in message:
                continue
            records.append(RequestRecord.from_dict(message["record"]))
            steady.add(records[-1])
            if until == math.inf and steady.is_enough() and self._long_enough(steady.begin or at):
                until = time.monotonic()
                self._tell({"op": "mark"})
        begin = at - 1.0 if self.spec.load.kind == "trace" else steady.begin or at
        return records, (begin, min(until, time.monotonic()))

    def _long_enough(self, begun: float) -> bool:
        return time.monotonic() - begun >= self.spec.min_seconds

    def _tell(self, message: dict[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        for process in self._processes:
            # An error here: the reader sees its end, and says so.
            with contextlib.suppress(OSError):
                if process.stdin is not None:
                    process.stdin.write(line)
                    process.stdin.flush()

    def _next(self, timeout_s: float | None = None) -> tuple[int, dict[str, Any]]:
        try:
            index, message = self._messages.get(timeout=timeout_s)
        except queue.Empty:
            raise TrtBuildError(f"a client process did not answer within {timeout_s} s") from None
        if message is None:
            raise TrtBuildError(f"a client process ended with status {self._processes[index].wait()}; see above")
        return index, message

    def _wait(self, key: str, timeout_s: float | None = None) -> list[dict[str, Any]]:
        """The message with that key of every process; what else comes meanwhile is of no use any more."""
        found: dict[int, dict[str, Any]] = {}
        while len(found) < self._count:
            index, message = self._next(timeout_s)
            if key in message:
                found[index] = message
        return list(found.values())

    def _read(self, index: int, process: subprocess.Popen[bytes]) -> None:
        """In a thread: the pipe of a process never fills."""
        if process.stdout is None:
            raise AssertionError("its output is a pipe")
        finished = False
        for line in process.stdout:
            message = json.loads(line)
            finished = "done" in message
            self._messages.put((index, message))
        if not finished:
            self._messages.put((index, None))

    def __enter__(self) -> ClientPool:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
            try:
                process.wait(timeout=5.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class _Steady:
    """Follows the records: when the load was reached, and when enough requests are over."""

    def __init__(self, spec: PointSpec, at: float) -> None:
        self._streams, self._wanted = spec.load.num_streams, spec.num_requests
        self._at = at
        self._trace = spec.load.kind == "trace"
        self._first: list[float] = []
        self.begin: float | None = None
        self._over = 0

    def add(self, record: RequestRecord) -> None:
        if self.begin is not None:
            self._over += record.start_s > self.begin
            return
        # A closed loop is there once each stream has sent its first, an open loop once answers come as fast as
        # questions do: not before the first is over.
        if record.due_s <= self._at + 1e-6:
            self._first.append(record.start_s)
        if self._streams is None:
            self.begin = record.finished_s
        elif len(self._first) >= self._streams:
            self.begin = max(self._first)

    def is_enough(self) -> bool:
        """Those in flight at that moment are kept too."""
        return not self._trace and self._over >= self._wanted


def _start(job: Job) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", "trtbuild.perf.client_process"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    if process.stdin is None:
        raise AssertionError("its input is a pipe")
    process.stdin.write(job_line(job))
    process.stdin.flush()
    return process


def _figures(done: Sequence[dict[str, Any]], records: Sequence[RequestRecord]) -> ClientFigures:
    num_tokens = sum(one["num_tokens"] for one in done)
    return ClientFigures(
        cpu_share=max(one["cpu_s"] / one["seconds"] for one in done),
        send_delay_p99_s=_p99([record.send_delay_s for record in records]),
        loop_delay_p99_s=max((_p99(one["delays"]) or 0.0 for one in done), default=None),
        cpu_per_token_s=sum(one["cpu_s"] for one in done) / num_tokens if num_tokens else None,
        num_processes=len(done),
    )


def _p99(values: Sequence[float]) -> float | None:
    return sorted(values)[math.ceil(0.99 * len(values)) - 1] if values else None
