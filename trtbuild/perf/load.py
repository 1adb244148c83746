"""When requests are sent and what they hold: arrival times, traces, and prompts of exact lengths. All of it seeded."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trtbuild.errors import Refused
from trtbuild.perf.records import Load, PointSpec, PromptLimits

_TRACE_KEYS = ("timestamp", "input_length", "output_length")
# A client process spends about 60 us on a token (perf/client_cost.py); a quarter of a core leaves room for bursts.
_STREAMS_PER_PROCESS = 16
_TOKENS_PER_PROCESS_S = 2000.0


@dataclass(frozen=True)
class Due:
    """One request of an open loop: seconds after the begin, and its lengths in tokens."""

    at_s: float
    isl: int
    osl: int


def open_loop(spec: PointSpec) -> Iterator[Due]:
    """The requests of a rate (without end) or of a trace, in order."""
    if spec.load.kind == "trace":
        yield from read_trace(Path(spec.load.trace or ""), spec.load.value)
        return
    gaps = np.random.default_rng(spec.seed)
    at = 0.0
    for number in itertools.count():
        # Constant arrivals from a multiple, so that rounding does not add up.
        at = number / spec.load.value if spec.load.arrival == "constant" else at + gaps.exponential(1 / spec.load.value)
        yield Due(at, spec.isl, spec.osl)


def read_trace(file: Path, faster: float = 1.0) -> list[Due]:
    """JSON lines with timestamp (ms, as AIPerf's and Mooncake's), input_length and output_length (tokens), in order.

    The first request is due at 0; `faster` divides the times. Other keys are ignored. Raises `Refused` naming the line.
    """
    found: list[Due] = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"trace {file}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            at, isl, osl = (json.loads(line)[key] for key in _TRACE_KEYS)
        except (ValueError, KeyError, TypeError) as error:
            raise Refused(f"trace {file}, line {number}: needs {', '.join(_TRACE_KEYS)} ({error!r})") from error
        if not (_is_number(at) and isinstance(isl, int) and isinstance(osl, int) and isl > 0 and osl > 0):
            raise Refused(f"trace {file}, line {number}: times must be numbers and lengths whole numbers above 0")
        found.append(Due(at / 1000 / faster, isl, osl))
    if not found:
        raise Refused(f"trace {file}: no request in it")
    first = found[0].at_s
    if any(later.at_s < earlier.at_s for earlier, later in itertools.pairwise(found)):
        raise Refused(f"trace {file}: its timestamps must not go back")
    return [Due(one.at_s - first, one.isl, one.osl) for one in found]


def why_unfit(spec: PointSpec, limits: PromptLimits) -> str | None:
    """Why the engine cannot be asked this; None where it can."""
    requests = read_trace(Path(spec.load.trace or "")) if spec.load.kind == "trace" else [Due(0, spec.isl, spec.osl)]
    for one in requests:
        if one.isl > limits.max_input_len:
            return f"isl {one.isl} is above the engine's max_input_len {limits.max_input_len}"
        if one.isl + one.osl > limits.max_seq_len:
            return f"isl {one.isl} + osl {one.osl} is above the engine's max_seq_len {limits.max_seq_len}"
    return None


class Prompts:
    """Token ids of exact lengths: random, so that no cache knows them, after a prefix that all have in common."""

    def __init__(self, limits: PromptLimits, seed: int, shared_prefix: int = 0) -> None:
        self._ids = np.setdiff1d(
            np.arange(limits.vocab_size, dtype=np.int32), np.array(limits.special_tokens, np.int32)
        )
        if len(self._ids) == 0:
            raise Refused(f"a vocabulary of {limits.vocab_size} tokens, all of them special: no prompt can be made")
        self._seed = seed
        self._prefix = np.random.default_rng([seed, 1]).choice(self._ids, shared_prefix)

    def ids(self, number: int, length: int) -> np.ndarray:
        """[length] int32, of the request with that number; the same each time."""
        own = np.random.default_rng([self._seed, 2, number])
        return np.concatenate([self._prefix, own.choice(self._ids, length)])[:length].astype(np.int32)


def num_processes(spec: PointSpec, cores: int) -> int:
    """Client processes that this load needs, so that none of them is the bottleneck."""
    if spec.load.num_streams is not None:
        return math.ceil(spec.load.num_streams / _STREAMS_PER_PROCESS)
    requests = list(itertools.islice(open_loop(spec), 10_000))
    seconds = max(requests[-1].at_s, 1e-3) if len(requests) > 1 else 1.0
    tokens_per_s = sum(one.osl for one in requests) / seconds
    return min(max(1, cores), math.ceil(tokens_per_s / _TOKENS_PER_PROCESS_S) or 1)


def split(total: int, parts: int) -> list[int]:
    """`total` in `parts` shares that differ by one at most."""
    return [total // parts + (index < total % parts) for index in range(parts)]


def warmup_streams(load: Load, limits: PromptLimits) -> int:
    """Requests at once in a round of warm-up: those of the load, and of an open loop as many as fill the engine."""
    return load.num_streams or min(8, limits.max_batch_size)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
