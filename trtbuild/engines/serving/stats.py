"""What a scheduler tells of itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trtbuild.engines.serving.histograms import RequestHistograms
from trtbuild.engines.serving.request import FinishReason

_COUNTER_OF: dict[FinishReason, str] = {
    "stop": "finished",
    "length": "finished",
    "cancelled": "cancelled",
    "timeout": "timed_out",
    "error": "failed",
}


@dataclass(frozen=True)
class SchedulerStats:
    """Gauges of this moment, then counters since the start."""

    waiting: int
    active: int
    num_slots: int
    slots_used: int
    kv_tokens_used: int
    kv_tokens_total: int
    max_queue: int | None
    uptime_s: float
    """Since the scheduler was made, as the counters."""
    steps: int
    finished: int
    cancelled: int
    timed_out: int
    failed: int
    refused: int
    """Requests that can never run."""
    queue_full: int
    """Requests that were turned away since too many waited."""
    prompt_tokens: int
    """Of admitted requests, reused ones included."""
    prefix_reused_tokens: int
    generated_tokens: int
    histograms: dict[str, dict[str, Any]]
    """See `RequestHistograms`."""


@dataclass
class Counters:
    """The counters of `SchedulerStats`, while they grow."""

    steps: int = 0
    finished: int = 0
    cancelled: int = 0
    timed_out: int = 0
    failed: int = 0
    refused: int = 0
    queue_full: int = 0
    prompt_tokens: int = 0
    prefix_reused_tokens: int = 0
    generated_tokens: int = 0
    histograms: RequestHistograms = field(default_factory=RequestHistograms)

    def count_end(self, reason: FinishReason) -> None:
        """Count one request that ended."""
        name = _COUNTER_OF[reason]
        setattr(self, name, getattr(self, name) + 1)

    def to_dict(self) -> dict[str, Any]:
        """Ready for `SchedulerStats`."""
        return vars(self) | {"histograms": self.histograms.to_dict()}
