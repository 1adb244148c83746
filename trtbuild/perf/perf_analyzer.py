"""The driver `perf-analyzer`: NVIDIA's load generator on our Triton model, over gRPC streams.

Prompts are token ids and answers have a fixed length (`ignore_eos`), so that both are exact. Of its output only the
exported times are read: its own summary means something else (`DEFINITIONS`).
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trtbuild.errors import Refused, TrtBuildError
from trtbuild.perf.external_tool import (
    ToolRun,
    client_figures,
    closed_loop,
    closed_window,
    monotonic_offset_s,
    open_window,
    patience_s,
    requests_to_send,
    run_tool,
    wrong_lengths,
)
from trtbuild.perf.load import Due, Prompts, open_loop, warmup_streams
from trtbuild.perf.perf_analyzer_binary import PerfAnalyzer, find_perf_analyzer
from trtbuild.perf.records import DriverName, Measured, PointSpec, RequestRecord, Target
from trtbuild.perf.transports import error_of

DEFINITIONS = (
    "figures are computed from the times of every response. perf_analyzer's own summary differs: of a decoupled model "
    "it says that it measures the first response's latency, but its 2.51 reports the last one's; and its throughput "
    "divides by a window of whole seconds, ramp and drain included."
    " It asks for log probabilities, without which version 2.51 loses its export: every response carries them."
)
_NANOSECONDS = 1e9
_MICROSECONDS = 1e6
# A round of warm-up that takes as long as the one before, within this share, is the last.
_STABLE = 0.1
# Each of its threads has a stream of its own; more threads than this only take turns.
_MOST_THREADS = 64
# Before the first request of a schedule.
_LEAD_S = 0.1
_WARMUP_NUMBERS = 1 << 40
_ERROR = re.compile(r"^Thread \[\d+\] had error: *(.*)$", re.MULTILINE)
_HINT = (
    "it waits for ever for a server that died or a stream that lost its end: see the server's log, and measure with "
    "--driver native, which tells errors one by one"
)


@dataclass(frozen=True)
class _Run:
    """One process of perf_analyzer: its requests in order, and how they are sent."""

    requests: Sequence[Due]
    first_number: int
    num_streams: int | None
    """None: at their own times."""


class PerfAnalyzerDriver:
    """`given`: the binary; None: it is looked for."""

    name: DriverName = "perf-analyzer"

    def __init__(self, given: Path | None = None) -> None:
        self._given = given

    def check(self) -> None:
        """Raises `Refused` where no binary runs here, with what it lacks."""
        find_perf_analyzer(self._given)

    def check_spec(self, spec: PointSpec) -> str | None:
        if spec.load.kind == "batch":
            return "perf-analyzer has no load that waits for all answers before it asks again; give --concurrency"
        return None

    def measure(self, spec: PointSpec, target: Target, raw: Path) -> Measured:
        """See `Driver`. A request that fails ends perf_analyzer without figures: then its errors are the records."""
        if target.grpc is None:
            raise Refused("--driver perf-analyzer needs Triton's gRPC address")
        streams = warmup_streams(spec.load, target.limits)
        with _Session(find_perf_analyzer(self._given), spec, target) as session:
            rounds = session.warm_up(streams)
            round_s = min(rounds)
            requests = requests_to_send(spec, round_s, streams)
            expected_s = max(requests[-1].at_s, round_s * len(requests) / streams)
            run, export = session.run(_Run(requests, 0, spec.load.num_streams), patience_s(expected_s))
            notes = {
                "perf_analyzer": session.tool.version, "definitions": DEFINITIONS, "warmup_rounds": rounds,
                "command": session.command,
            }  # fmt: skip
            if export is None:
                return replace(_failed(run), notes=notes)
            with export.open("rb") as source, gzip.open(f"{raw}.perf_analyzer.json.gz", "wb") as kept:
                shutil.copyfileobj(source, kept)
            records = read_export(load_export(export), session.offset_s)
        return _measured(spec, requests, records, run, notes)


def load_export(file: Path) -> Any:
    """The export's JSON.

    For an output that a response does not have, perf_analyzer 2.51 writes what lies in its memory, and where that is a
    float that is not finite, the file ends. Our model has such outputs only without `return_log_probs`.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TrtBuildError(
            f"perf_analyzer broke off its export ({error}): it does so where a response lacks a float output; is the "
            "server of this version of trtbuild?"
        ) from error


def read_export(export: Mapping[str, Any], offset_s: float) -> list[RequestRecord]:
    """Of --profile-export-file; `offset_s` as of `monotonic_offset_s`. Raises `TrtBuildError` where it is none."""
    try:
        return [_record(one, offset_s) for experiment in export["experiments"] for one in experiment["requests"]]
    except (KeyError, IndexError, TypeError) as error:
        raise TrtBuildError(f"perf_analyzer's export is not as its version 2.51 writes it: {error!r}") from error


def _record(request: Mapping[str, Any], offset_s: float) -> RequestRecord:
    times = [at / _NANOSECONDS + offset_s for at in request["response_timestamps"]]
    # Counts come with the last response; in the others perf_analyzer writes zeros for what is not there.
    last = request["response_outputs"][-1] if request["response_outputs"] else {}
    isl, osl = len(_listed(request["request_inputs"]["input_ids"])), int(request["request_inputs"]["max_tokens"])
    prompt_tokens = int(last.get("num_input_tokens", 0)) or isl
    start = request["timestamp"] / _NANOSECONDS + offset_s
    return RequestRecord(
        start_s=start,
        send_delay_s=0.0,
        token_times_s=times,
        prompt_tokens=prompt_tokens,
        output_tokens=int(last.get("num_output_tokens", 0)) or len(times),
        error=wrong_lengths(isl, osl, prompt_tokens, len(times)),
        finish_reason=last.get("finish_reason") or None,
        end_s=times[-1] if times else start,
    )


def _listed(value: Any) -> list[Any]:
    """It writes tensors of one element as that element."""
    return value if isinstance(value, list) else [value]


def _measured(
    spec: PointSpec, requests: Sequence[Due], records: list[RequestRecord], run: ToolRun, notes: dict[str, Any]
) -> Measured:
    streams = spec.load.num_streams
    if streams is not None:
        found = closed_loop(records, streams)
        return Measured(found, client_figures(run, found), window=closed_window(found, streams), notes=notes)
    found = sent_late(records, requests)
    # A trace is short and whole: `statistics` knows its window.
    window = None if spec.load.kind == "trace" else open_window(found)
    return Measured(found, client_figures(run, found), window=window, notes=notes)


def sent_late(records: Sequence[RequestRecord], requests: Sequence[Due]) -> list[RequestRecord]:
    """With `send_delay_s`: one thread sends in the schedule's order; the most punctual request says when it began."""
    ordered = sorted(records, key=lambda record: record.start_s)
    begin = min(record.start_s - due.at_s for record, due in zip(ordered, requests, strict=False))
    return [
        replace(record, send_delay_s=record.start_s - begin - due.at_s)
        for record, due in zip(ordered, requests, strict=False)
    ]


def _failed(run: ToolRun) -> Measured:
    """No export: what it printed of its threads' errors; raises `TrtBuildError` where it is not the requests' fault."""
    errors = _ERROR.findall(run.output)
    if not errors:
        raise TrtBuildError(f"perf_analyzer ended with status {run.status} and no export. It printed:\n{run.tail}")
    at = run.samples[-1][0] if run.samples else 0.0
    records = [RequestRecord(at, 0.0, [], 0, 0, error=error_of(message), end_s=at) for message in errors]
    why = f"perf_analyzer ends at the first request that fails, and exports nothing: {errors[0].strip()}"
    return Measured(records, client_figures(run, []), why_invalid=why)


class _Session:
    """One point's runs of the tool; a context manager that holds its files."""

    def __init__(self, tool: PerfAnalyzer, spec: PointSpec, target: Target) -> None:
        self.tool, self.offset_s, self.command = tool, monotonic_offset_s(), ""
        self._spec, self._target = spec, target
        self._prompts = Prompts(target.limits, spec.seed, spec.shared_prefix)
        self._held = ExitStack()

    def __enter__(self) -> _Session:
        self._directory = Path(self._held.enter_context(TemporaryDirectory(prefix="trtbuild-perf-analyzer-")))
        self._variables = self._held.enter_context(self.tool.environment())
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def warm_up(self, num_streams: int) -> list[float]:
        """Rounds of one request on every stream, until one takes as long as the one before; seconds of each."""
        first = next(open_loop(self._spec)) if self._spec.load.kind == "trace" else None
        lengths = Due(0.0, first.isl, first.osl) if first else Due(0.0, self._spec.isl, self._spec.osl)
        rounds: list[float] = []
        # At least one: the length of the measurement follows from it.
        for number in range(max(1, self._spec.warmup)):
            numbers = _WARMUP_NUMBERS + number * num_streams
            run, export = self.run(
                _Run([lengths] * num_streams, numbers, num_streams), patience_s(0) + self._spec.timeout_s
            )
            if export is None:
                raise TrtBuildError(f"perf_analyzer's warm-up failed: {_failed(run).why_invalid}")
            records = read_export(load_export(export), self.offset_s)
            begin = min(record.start_s for record in records)
            rounds.append(round(max(record.finished_s for record in records) - begin, 4))
            if len(rounds) > 1 and abs(rounds[-1] - rounds[-2]) <= _STABLE * rounds[-2]:
                break
        return rounds

    def run(self, run: _Run, timeout_s: float) -> tuple[ToolRun, Path | None]:
        """One process, and its export, None where it wrote none."""
        data, export = self._directory / "data.json", self._directory / "export.json"
        export.unlink(missing_ok=True)
        data.write_text(json.dumps({"data": list(self._data(run))}, separators=(",", ":")), encoding="utf-8")
        arguments = [
            "-m", self._target.model, "-i", "grpc", "--streaming", "-u", self._target.grpc or "", "--async",
            "--input-data", str(data), "--request-count", str(len(run.requests)), "--profile-export-file", str(export),
        ]  # fmt: skip
        if run.num_streams is not None:
            threads = min(run.num_streams, _MOST_THREADS)
            arguments += ["--concurrency-range", str(run.num_streams), "--max-threads", str(threads)]
        else:
            intervals = self._directory / "intervals.txt"
            intervals.write_text("".join(f"{gap}\n" for gap in intervals_us(run.requests)), encoding="ascii")
            # One thread: several would not take the prompts and the times in order.
            arguments += ["--request-intervals", str(intervals), "--max-threads", "1"]
        self.command = " ".join(["perf_analyzer", *arguments]).replace(str(self._directory), "DIR")
        log = self._directory / "perf_analyzer.log"
        done = run_tool([str(self.tool.binary), *arguments], self._variables, log, timeout_s, _HINT)
        return done, export if done.status == 0 and export.is_file() else None

    def _data(self, run: _Run) -> Iterator[dict[str, Any]]:
        """One step per request: each of N threads takes every N-th, so none is sent twice."""
        for number, request in enumerate(run.requests, run.first_number):
            ids = self._prompts.ids(number, request.isl).tolist()
            # With log probabilities: see `load_export`.
            yield {
                "text_input": [""], "input_ids": {"content": ids, "shape": [len(ids)]}, "max_tokens": [request.osl],
                "ignore_eos": [True], "stream": [True], "return_log_probs": [True],
            }  # fmt: skip


def intervals_us(requests: Sequence[Due]) -> list[int]:
    """Whole microseconds before each request, the first one too; rounding does not add up."""
    at = [round((_LEAD_S + one.at_s) * _MICROSECONDS) for one in requests]
    return [later - earlier for earlier, later in itertools.pairwise([0, *at])]
