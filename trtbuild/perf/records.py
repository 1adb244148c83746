"""What is measured: one record per request, one point per cell of a sweep, and what a driver gets and gives.

Free of numpy, gRPC and Triton, so that everything in this room can import it. All times are time.monotonic() of this
machine in seconds, which every process of it shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from trtbuild.workspace import digest_of

LoadKind = Literal["concurrency", "batch", "rate", "trace"]
Arrival = Literal["closed", "poisson", "constant"]
DriverName = Literal["native", "perf-analyzer", "aiperf", "engine"]

METRICS = ("ttft_s", "itl_s", "tpot_s", "e2e_s", "user_tokens_per_s")
THROUGHPUTS = ("requests_per_s", "output_tokens_per_s", "total_tokens_per_s")
POINT_ID_CHARACTERS = 16


@dataclass(frozen=True)
class RequestRecord:
    """One request as its client saw it."""

    start_s: float
    """When it was sent."""
    send_delay_s: float
    """How much later than it was due: than its time in an open loop, than the end of the one before in a closed one."""
    token_times_s: list[float]
    """When each token of the answer came."""
    prompt_tokens: int
    output_tokens: int
    """As the server counts them where it says so."""
    error: str | None = None
    """"refused" | "unavailable" | "timeout" | "failed: ..."; None for an answer that is whole."""
    finish_reason: str | None = None
    end_s: float | None = None
    """When the answer or its error was complete; None: with the last token."""

    @property
    def due_s(self) -> float:
        return self.start_s - self.send_delay_s

    @property
    def finished_s(self) -> float:
        """When it was over, however it ended."""
        if self.end_s is not None:
            return self.end_s
        return self.token_times_s[-1] if self.token_times_s else self.start_s

    @property
    def error_kind(self) -> str | None:
        """`error` without its message."""
        return None if self.error is None else self.error.partition(":")[0]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RequestRecord:
        return cls(**values)


@dataclass(frozen=True)
class Load:
    """How requests arrive.

    concurrency: `value` streams, each asks again when it was answered. batch: `value` requests at once, and the next
    ones when all are answered. rate: `value` requests per second, whatever the answers do. trace: requests at the times
    and of the lengths in the file `trace`; `value` is how much faster than it says.
    """

    kind: LoadKind
    value: float = 1.0
    arrival: Arrival = "closed"
    trace: str | None = None
    trace_digest: str | None = None

    @property
    def num_streams(self) -> int | None:
        """Requests in flight; None for an open loop, where the server decides."""
        return int(self.value) if self.is_closed else None

    @property
    def is_closed(self) -> bool:
        return self.kind in ("concurrency", "batch")

    def label(self) -> str:
        """For tables: c16, b8, 4/s, 4/s constant, trace x2."""
        if self.kind in ("concurrency", "batch"):
            return f"{self.kind[0]}{self.value:g}"
        if self.kind == "trace":
            return f"trace {Path(self.trace or '').name}" + ("" if self.value == 1 else f" x{self.value:g}")
        return f"{self.value:g}/s" + (" constant" if self.arrival == "constant" else "")


@dataclass(frozen=True)
class PointSpec:
    """One point of a sweep: an engine under one load. Lengths are in tokens."""

    engine: str
    driver: DriverName
    load: Load
    isl: int
    osl: int
    shared_prefix: int = 0
    """Leading tokens that all prompts have in common."""
    num_requests: int = 32
    """That are kept: those of the ramp and the drain come on top."""
    min_seconds: float = 0.0
    """The measurement goes on for at least so long."""
    warmup: int = 8
    """Rounds at most, of as many requests as are in flight, until three take as long as each other."""
    seed: int = 0
    timeout_s: float = 300.0
    """A request that takes longer is given up, as a "timeout"."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PointSpec:
        return cls(**{**values, "load": Load(**values["load"])})

    def point_id(
        self, engine_digest: str, executor: str, machine_digest: str, serving: Mapping[str, Any] | None = None
    ) -> str:
        """The same for the same measurement of the same engine on the same machine, and for nothing else.

        `serving`: how it was served (slots, threads, ...), or by whom.
        """
        identity = {"spec": self.to_dict(), "engine": engine_digest, "executor": executor, "machine": machine_digest}
        identity |= {"serving": dict(serving or {})}
        return digest_of(identity)[:POINT_ID_CHARACTERS]

    def label(self) -> str:
        return f"{self.engine} {self.driver} {self.load.label()} {self.isl}->{self.osl}"


@dataclass(frozen=True)
class PromptLimits:
    """What an engine can be asked, and which token ids prompts are made of."""

    max_seq_len: int
    max_input_len: int
    max_batch_size: int
    vocab_size: int
    special_tokens: tuple[int, ...] = ()
    """Ids that prompts do not hold."""


@dataclass(frozen=True)
class Target:
    """What a driver measures; addresses are None where that door does not exist."""

    model: str
    """Name of the Triton model, and of the model of the OpenAI port."""
    limits: PromptLimits
    engine_dir: Path | None = None
    grpc: str | None = None
    """HOST:PORT"""
    http: str | None = None
    """http://HOST:PORT"""
    metrics: str | None = None
    """http://HOST:PORT/metrics"""
    openai: str | None = None
    """http://HOST:PORT/v1"""
    socket: Path | None = None
    """The engine worker's, for the driver "engine"."""
    process_ids: tuple[int, ...] = ()
    """Of the server, whose descendants its workers are, and of what stands beside it; for telemetry."""


@dataclass(frozen=True)
class ClientFigures:
    """What the load generator itself spent; what a tool does not tell is None."""

    cpu_share: float | None
    """CPU seconds per second of the busiest client process: 1 is a whole core, more than one process can have."""
    send_delay_p99_s: float | None
    loop_delay_p99_s: float | None = None
    """How late the client's own timers ran, while it measured."""
    cpu_per_token_s: float | None = None
    num_processes: int = 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Measured:
    """What a driver gives back: every request that it sent, warm-up left out."""

    records: list[RequestRecord]
    client: ClientFigures
    why_invalid: str | None = None
    """Where the measurement is not what was asked for, in words."""
    window: tuple[float, float] | None = None
    """Requests that were sent after its begin and until its end are those of a steady load, and all of them are over
    before the load ends; None: `statistics.steady_window` finds one."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Of the tool: versions, command lines, definitions that differ."""


class Driver(Protocol):
    """A load generator."""

    @property
    def name(self) -> DriverName: ...

    def check(self) -> None:
        """Raise `Refused` naming what is missing on this machine, before anything runs."""

    def check_spec(self, spec: PointSpec) -> str | None:
        """Why this driver cannot run that point; None where it can."""

    def measure(self, spec: PointSpec, target: Target, raw: Path) -> Measured:
        """Put the load on `target`, warm-up first. The tool's own exports go beside `raw` (raw/POINT_ID, no suffix).

        Raises `TrtBuildError` where the tool itself fails; requests that fail are records.
        """
        ...


@dataclass(frozen=True)
class Point:
    """A line of points.jsonl. `metrics` and `throughput` are empty where nothing was answered."""

    point_id: str
    spec: PointSpec
    valid: bool
    why_invalid: str | None
    engine: dict[str, Any]
    """name, digest, precision, layout, limits, accuracy (the figures of its passport's record, or None)"""
    executor: str
    device: str
    environment: dict[str, Any]
    started_at: str
    seconds: float
    num_requests: int
    num_errors: int
    errors: dict[str, int]
    metrics: dict[str, dict[str, Any]]
    throughput: dict[str, dict[str, Any]]
    slo: dict[str, float] | None = None
    """Upper bounds in seconds by metric: {"ttft_s": 0.5, "itl_s": 0.05}"""
    goodput_per_s: float | None = None
    server: dict[str, float] | None = None
    client: dict[str, Any] = field(default_factory=dict)
    telemetry: dict[str, dict[str, float]] = field(default_factory=dict)
    energy_per_token_j: float | None = None
    steady: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Point:
        return cls(**{**values, "spec": PointSpec.from_dict(values["spec"])})
