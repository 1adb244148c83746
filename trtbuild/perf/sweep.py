"""What to measure: a sweep over engines, loads and lengths, from flags or a TOML file, and its points in order."""

from __future__ import annotations

import hashlib
import itertools
import re
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from trtbuild.errors import Refused
from trtbuild.perf.records import Arrival, DriverName, Load, PointSpec
from trtbuild.workspace import check_name, digest_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# What an SLO can bound; all are upper bounds on a request's own figure.
SLO_METRICS = {"ttft": "ttft_s", "itl": "itl_s", "tpot": "tpot_s", "e2e": "e2e_s"}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(us|ms|s)")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
# Of every stream at least so many requests are kept.
_ROUNDS_PER_STREAM = 3


class Sweep(BaseModel):
    """Field names are the flags of `trtbuild perf sweep`, with underscores; a TOML file has the same keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str | None = None
    engines: tuple[str, ...] = ()
    driver: tuple[DriverName, ...] = ("native",)
    concurrency: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    rate: tuple[float, ...] = ()
    trace: tuple[str, ...] = ()
    arrival: Arrival = "poisson"
    """Of `rate`: poisson or constant."""
    isl: tuple[int, ...] = (128,)
    osl: tuple[int, ...] = (64,)
    shared_prefix: int = Field(default=0, ge=0)
    requests: int = Field(default=32, ge=1)
    seconds: float = Field(default=0.0, ge=0)
    warmup: int = Field(default=8, ge=0)
    timeout: float = Field(default=300.0, gt=0)
    slo: dict[str, float] | None = None
    """Upper bounds in seconds by metric, e.g. {"ttft_s": 0.5}."""
    seed: int = 0

    @field_validator("engines", "driver", "concurrency", "batch", "rate", "trace", "isl", "osl", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """One, a list, or as on the command line: 1,4,16."""
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(","))
        return (value,) if isinstance(value, int | float) else value

    @field_validator("slo", mode="before")
    @classmethod
    def _slo(cls, value: Any) -> Any:
        """As on the command line: ttft=500ms,itl=50ms; in TOML a table too."""
        return parse_slo(value) if isinstance(value, str | dict) else value

    @field_validator("concurrency", "batch", "isl", "osl", "rate")
    @classmethod
    def _positive(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < value < float("inf") for value in values):
            raise ValueError("every value must be above 0")
        if len(set(values)) != len(values):
            raise ValueError("a value is given twice")
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Sweep:
        if not (self.concurrency or self.batch or self.rate or self.trace):
            raise ValueError("no load: give concurrency, batch, rate or trace")
        if self.arrival == "closed":
            raise ValueError("arrival is of rate: poisson or constant")
        if self.shared_prefix > min(self.isl):
            raise ValueError(f"shared_prefix {self.shared_prefix} is longer than the shortest isl {min(self.isl)}")
        return self

    @classmethod
    def read(cls, file: Path, **overrides: Any) -> Sweep:
        """A sweep file, with flags on top; a `trace` that begins with ./ or ../ is relative to the file."""
        try:
            content = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise Refused(f"sweep {file}: {error}") from error
        unknown = sorted(set(content) - set(cls.model_fields))
        if unknown:
            raise Refused(f"sweep {file}: unknown key {unknown[0]!r}; keys: {', '.join(cls.model_fields)}")
        traces = content.get("trace", ())
        content["trace"] = [
            str(file.parent / one) if one.startswith(("./", "../")) else one
            for one in ([traces] if isinstance(traces, str) else traces)
        ]
        content.setdefault("name", file.stem)
        return cls.create(**{**content, **overrides})

    @classmethod
    def create(cls, **fields: Any) -> Sweep:
        """Validate; raises `Refused` that lists every field that is wrong and what is allowed."""
        try:
            sweep = cls(**fields)
        except ValidationError as error:
            lines = [
                f"{'.'.join(map(str, e['loc'])) or 'sweep'}: {e['msg']}"
                + (f" (found {e['input']!r})" if e["loc"] else "")
                for e in error.errors()
            ]
            raise Refused("sweep: " + "; ".join(lines)) from error
        if sweep.name is not None:
            check_name(sweep.name)
        return sweep

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    @property
    def digest(self) -> str:
        """sha256 of what is measured; names do not count, nor the SLO, which only sorts what was measured."""
        return digest_of({**self.to_dict(), "name": None, "slo": None})

    @property
    def loads(self) -> list[Load]:
        traces = [Load("trace", 1.0, "constant", trace, _digest_of_file(Path(trace))) for trace in self.trace]
        return [
            *(Load("concurrency", value) for value in self.concurrency),
            *(Load("batch", value) for value in self.batch),
            *(Load("rate", value, self.arrival) for value in self.rate),
            *traces,
        ]

    def points(self) -> list[PointSpec]:
        """In the order that they are measured: engine by engine, so that one is served at a time; small loads first.

        A trace says its own lengths, so it is measured once, with the largest of `isl` and `osl` as its bounds.
        """
        found: list[PointSpec] = []
        for engine, driver in itertools.product(dict.fromkeys(self.engines), dict.fromkeys(self.driver)):
            for load in self.loads:
                lengths = itertools.product(self.isl, self.osl)
                for isl, osl in [(max(self.isl), max(self.osl))] if load.kind == "trace" else lengths:
                    found.append(self.spec(engine, driver, load, isl, osl))
        return found

    def spec(self, engine: str, driver: DriverName, load: Load, isl: int, osl: int) -> PointSpec:
        """One point, with as many requests as its load needs for a steady state."""
        num_requests = max(self.requests, _ROUNDS_PER_STREAM * (load.num_streams or 0))
        return PointSpec(
            engine, driver, load, isl, osl, self.shared_prefix, num_requests, self.seconds, self.warmup, self.seed,
            self.timeout,
        )  # fmt: skip


def parse_slo(value: str | dict[str, Any]) -> dict[str, float]:
    """{"ttft_s": 0.5, "itl_s": 0.05} of "ttft=500ms,itl=50ms", of a table of such values, or of itself."""
    pairs: dict[str, Any] = {}
    for part in value.split(",") if isinstance(value, str) else ():
        name, _, bound = part.partition("=")
        pairs[name] = bound
    pairs = pairs if isinstance(value, str) else value
    found: dict[str, float] = {}
    for name, bound in ((name.strip(), bound) for name, bound in pairs.items()):
        metric = SLO_METRICS.get(name, name)
        if metric not in SLO_METRICS.values():
            raise ValueError(f"{name!r} is no bound of an SLO; there are {', '.join(SLO_METRICS)}")
        found[metric] = _seconds(bound)
    return found


def _seconds(value: Any) -> float:
    if isinstance(value, int | float) and value > 0:
        return float(value)
    match = _DURATION.fullmatch(str(value).strip())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"{value!r} is no duration such as 500ms or 2s")
    return float(match[1]) * _SECONDS[match[2]]


def _digest_of_file(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise Refused(f"trace {file}: {error.strerror}") from error
