"""A client process of the drivers `native` and `engine`: sends its share of the load, and says what came back.

    python -m trtbuild.perf.client_process        spoken to in JSON lines, by `trtbuild.perf.client_pool`

in:  the job (see `Job`), then any number of
     {"op": "wave", "number": N, "keep": bool}   one request on each stream; {"wave": seconds, "records": [...]}
     {"op": "begin"}                             what the client spends is counted from here
     {"op": "run", "at": TIME}                   the load, until it is stopped: {"record": {...}} for each request
     {"op": "mark"}                              {"cleared": true} once every request sent until now is over
     {"op": "stop"}                              gives up what is in flight, and ends with {"done": {...}}
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trtbuild.perf.load import Due, Prompts, open_loop
from trtbuild.perf.records import PointSpec, PromptLimits, RequestRecord
from trtbuild.perf.transports import Answer, Transport, TritonTransport, WorkerTransport
from trtbuild.workspace import digest_of

_DELAY_PERIOD_S = 0.01
# After an error a closed loop waits, as a client that is told "queue full" would; a loop of refusals is no load.
_ERROR_PAUSE_S = 0.05
# Requests of warm-up have prompts that the measured ones do not repeat.
WARMUP_NUMBERS = 1 << 40


@dataclass(frozen=True)
class Job:
    """This process's share: `num_streams` of a closed loop, or every `num_processes`-th request of an open one."""

    spec: dict[str, Any]
    limits: dict[str, Any]
    process: int
    num_processes: int
    num_streams: int
    grpc: str | None
    model: str
    socket: str | None


class Client:
    """See the module."""

    def __init__(self, job: Job) -> None:
        self.job, self.spec = job, PointSpec.from_dict(job.spec)
        limits = PromptLimits(**{**job.limits, "special_tokens": tuple(job.limits["special_tokens"])})
        # Other points have other prompts: what an engine still holds of the last one must not help it.
        self.prompts = Prompts(limits, int(digest_of(job.spec)[:12], 16), self.spec.shared_prefix)
        self.transport: Transport = (
            TritonTransport(job.grpc or "", job.model) if job.socket is None else WorkerTransport(Path(job.socket))
        )
        self.running: asyncio.Task[None] | None = None
        self.in_flight: set[asyncio.Task[Any]] = set()
        self.delays: list[float] = []
        self.num_tokens = 0
        self.begun = (time.monotonic(), time.process_time())
        self.wave_ends: dict[int, float] = {}
        self.tasks: set[asyncio.Task[Any]] = set()

    async def serve(self, lines: asyncio.StreamReader) -> None:
        """Until `stop`, or until the parent is gone."""
        tell({"ready": True})
        while line := await lines.readline():
            message = json.loads(line)
            match message["op"]:
                case "wave":
                    await self.wave(message["number"], message["keep"])
                case "begin":
                    self.begun, self.num_tokens = (time.monotonic(), time.process_time()), 0
                    self.start(self.watch_delays())
                case "run":
                    self.running = self.start(self.run(message["at"]))
                case "mark":
                    self.start(self.clear(set(self.in_flight)))
                case "stop":
                    await self.stop()
                    return

    def start(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def wave(self, number: int, keep: bool) -> None:
        """One request on each stream at once; a batch, or a round of warm-up."""
        begun = time.monotonic()
        base = number * self.job.num_streams * self.job.num_processes + self.job.process
        base += 0 if keep else WARMUP_NUMBERS
        asked = [
            self.ask(base + index * self.job.num_processes, self.wave_ends.get(index, begun), self.warmup_lengths())
            for index in range(self.job.num_streams)
        ]
        records = await asyncio.gather(*asked)
        self.wave_ends = {index: record.finished_s for index, record in enumerate(records)} if keep else {}
        tell({"wave": time.monotonic() - begun, "records": [record.to_dict() for record in records if keep]})

    def warmup_lengths(self) -> Due:
        """Of a trace, those of its first request."""
        return next(open_loop(self.spec)) if self.spec.load.kind == "trace" else Due(0, self.spec.isl, self.spec.osl)

    async def run(self, at: float) -> None:
        if self.spec.load.is_closed:
            await asyncio.gather(*(self.stream(index, at) for index in range(self.job.num_streams)))
            return
        mine = itertools.islice(enumerate(open_loop(self.spec)), self.job.process, None, self.job.num_processes)
        await self.open(mine, at)

    async def stream(self, index: int, at: float) -> None:
        """One user of a closed loop."""
        stride = self.job.num_processes * self.job.num_streams
        number, due = index * self.job.num_processes + self.job.process, at
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        while True:
            # A task of its own, so that `mark` and `stop` see it.
            record = await self.start_request(number, due, Due(0, self.spec.isl, self.spec.osl))
            tell({"record": record.to_dict()})
            number, due = number + stride, record.finished_s
            if record.error is not None:
                await asyncio.sleep(_ERROR_PAUSE_S)
                due = time.monotonic()

    async def open(self, requests: Iterator[tuple[int, Due]], at: float) -> None:
        """Sends when it is time, whatever came back until then."""
        for number, request in requests:
            due = at + request.at_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            self.start_request(number, due, request).add_done_callback(tell_record)
        await asyncio.gather(*self.in_flight, return_exceptions=True)
        tell({"all": True})

    def start_request(self, number: int, due: float, lengths: Due) -> asyncio.Task[RequestRecord]:
        task = asyncio.create_task(self.ask(number, due, lengths))
        self.in_flight.add(task)
        task.add_done_callback(self.in_flight.discard)
        return task

    async def ask(self, number: int, due: float, lengths: Due) -> RequestRecord:
        answer = Answer()
        request = self.transport.prepare(self.prompts.ids(number, lengths.isl), lengths.osl)
        sent = time.monotonic()
        await self.transport.ask(request, self.spec.timeout_s, answer)
        self.num_tokens += len(answer.token_times_s)
        return record_of(answer, sent, due, lengths)

    async def clear(self, waited_for: set[asyncio.Task[Any]]) -> None:
        await asyncio.gather(*waited_for, return_exceptions=True)
        tell({"cleared": True})

    async def watch_delays(self) -> None:
        """How late this process's timers are: as late as it sees a token."""
        while True:
            due = time.monotonic() + _DELAY_PERIOD_S
            await asyncio.sleep(_DELAY_PERIOD_S)
            self.delays.append(time.monotonic() - due)

    async def stop(self) -> None:
        seconds, cpu = time.monotonic() - self.begun[0], time.process_time() - self.begun[1]
        figures = {"seconds": seconds, "cpu_s": cpu, "num_tokens": self.num_tokens, "delays": self.delays}
        for task in (*self.tasks, *self.in_flight):
            task.cancel()
        await asyncio.gather(*self.tasks, *self.in_flight, return_exceptions=True)
        await self.transport.close()
        tell({"done": figures})


def record_of(answer: Answer, sent: float, due: float, lengths: Due) -> RequestRecord:
    """An answer of another length than was asked for is an error: its figures would be of another measurement."""
    ended, num_tokens = time.monotonic(), answer.num_output_tokens
    error = answer.error
    if error is None and len(answer.token_times_s) != lengths.osl:
        error = f"failed: {len(answer.token_times_s)} tokens came, {lengths.osl} were asked for"
    if error is None and answer.num_input_tokens not in (None, lengths.isl):
        error = f"failed: the server read {answer.num_input_tokens} prompt tokens, {lengths.isl} were sent"
    return RequestRecord(
        start_s=sent,
        send_delay_s=sent - due,
        token_times_s=answer.token_times_s,
        prompt_tokens=lengths.isl if answer.num_input_tokens is None else answer.num_input_tokens,
        output_tokens=len(answer.token_times_s) if num_tokens is None else num_tokens,
        error=error,
        finish_reason=answer.finish_reason,
        end_s=ended if error is not None or not answer.token_times_s else answer.token_times_s[-1],
    )


def tell_record(task: asyncio.Task[RequestRecord]) -> None:
    if not task.cancelled():
        tell({"record": task.result().to_dict()})


def tell(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message, separators=(",", ":")) + "\n")
    sys.stdout.flush()


async def main() -> None:
    """Reads stdin as a stream."""
    lines = asyncio.StreamReader(limit=1 << 24)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    job = Job(**json.loads(await lines.readline()))
    # Nothing here makes cycles in number, and a collection would be a delay.
    gc.disable()
    await Client(job).serve(lines)


def job_line(job: Job) -> bytes:
    return json.dumps(asdict(job)).encode() + b"\n"


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
