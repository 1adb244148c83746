"""What the engine worker counts, as metrics on Triton's metrics port.

Triton's Python backend has counters and gauges in every release, histograms only in late ones: a histogram is written
as the three counters that a Prometheus histogram consists of (`_bucket`, `_sum`, `_count`), which queries cannot tell
from one.

Metrics of equal name and labels are one object in Triton's process; whoever deletes its own first frees that of the
others (2.51; triton-inference-server/server, issue 8663). While a model is loaded again, its old and its new process
both live: by `MetricsTurn` only one of them has metrics.
"""

from __future__ import annotations

import fcntl
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

GAUGES: dict[str, tuple[str, str]] = {
    "active": ("trtbuild_requests_active", "Requests that hold a slot"),
    "waiting": ("trtbuild_requests_waiting", "Requests that wait for a slot"),
    "num_slots": ("trtbuild_slots_total", "Slots of the engine"),
    "slots_used": ("trtbuild_slots_used", "Slots that a request holds"),
    "kv_tokens_used": ("trtbuild_kv_tokens_used", "Tokens in the KV caches of all slots"),
    "kv_tokens_total": ("trtbuild_kv_tokens_total", "Tokens that the KV caches of all slots can hold"),
}
COUNTERS: dict[str, tuple[str, str]] = {
    "finished": ("trtbuild_requests_finished_total", "Requests that were answered to the end"),
    "cancelled": ("trtbuild_requests_cancelled_total", "Requests that their client ended or left"),
    "refused": ("trtbuild_requests_refused_total", "Requests that can never run"),
    "queue_full": ("trtbuild_requests_queue_full_total", "Requests that found no place to wait"),
    "failed": ("trtbuild_requests_failed_total", "Requests that ended with an error of the engine"),
    "timed_out": ("trtbuild_requests_timed_out_total", "Requests whose deadline passed"),
    "steps": ("trtbuild_steps_total", "Steps of the scheduler"),
    "prompt_tokens": ("trtbuild_prompt_tokens_total", "Tokens of admitted prompts, reused ones included"),
    "prefix_reused_tokens": ("trtbuild_prefix_reused_tokens_total", "Prompt tokens that were still in a cache"),
    "generated_tokens": ("trtbuild_generated_tokens_total", "Tokens generated"),
}
HISTOGRAMS: dict[str, tuple[str, str]] = {
    "queue_seconds": ("trtbuild_queue_seconds", "From submission to a slot"),
    "ttft_seconds": ("trtbuild_time_to_first_token_seconds", "From submission to the first token"),
    "itl_seconds": ("trtbuild_inter_token_latency_seconds", "Between two tokens of a stream"),
    "e2e_seconds": ("trtbuild_request_seconds", "From submission to the end"),
    "prompt_tokens": ("trtbuild_request_prompt_tokens", "Prompt tokens of finished requests"),
    "completion_tokens": ("trtbuild_request_completion_tokens", "Generated tokens of finished requests"),
}


class MetricsTurn:
    """A file that one process at a time can hold; it is free again when that process has left or ended."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("w")

    def take(self) -> bool:
        """Whether this process holds it, from now on or already."""
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def __enter__(self) -> MetricsTurn:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


class EngineMetrics:
    """`pb_utils` is Triton's `triton_python_backend_utils`; every metric has the label model."""

    def __init__(self, pb_utils: Any, model: str) -> None:
        self._pb_utils = pb_utils
        self._labels = {"model": model}
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, str], Any] = {}
        self._counted: dict[tuple[str, str], float] = {}

    def update(self, stats: Mapping[str, Any]) -> None:
        """`stats`: of `WorkerClient.stats`."""
        self._set("trtbuild_engine_up", "1 where the engine worker answers", 1)
        for key, (name, text) in GAUGES.items():
            self._set(name, text, stats[key])
        for key, (name, text) in COUNTERS.items():
            self._count(name, text, stats[key])
        for key, (name, text) in HISTOGRAMS.items():
            self._observe(name, text, stats["histograms"][key])

    def down(self) -> None:
        """The worker does not answer."""
        self._set("trtbuild_engine_up", "1 where the engine worker answers", 0)

    def delete(self) -> None:
        """In Triton's process, too; before the model's `finalize` returns, since a later deletion crashes the stub."""
        self._metrics.clear()
        self._families.clear()

    def _set(self, name: str, text: str, value: float) -> None:
        self._metric(name, text, self._pb_utils.MetricFamily.GAUGE).set(value)

    def _count(self, name: str, text: str, value: float, le: str = "") -> None:
        """Counters only grow: a worker that was started again begins at zero, and its count is added."""
        metric = self._metric(name, text, self._pb_utils.MetricFamily.COUNTER, le)
        before = self._counted.get((name, le), 0)
        grown = value if value < before else value - before
        self._counted[name, le] = value
        if grown:
            metric.increment(grown)

    def _observe(self, name: str, text: str, histogram: Mapping[str, Any]) -> None:
        total = 0
        for bound, count in zip([*histogram["buckets"], "+Inf"], histogram["counts"], strict=True):
            total += count
            self._count(f"{name}_bucket", text, total, le=str(bound))
        self._count(f"{name}_sum", text, histogram["sum"])
        self._count(f"{name}_count", text, histogram["count"])

    def _metric(self, name: str, text: str, kind: Any, le: str = "") -> Any:
        if (name, le) not in self._metrics:
            if name not in self._families:
                self._families[name] = self._pb_utils.MetricFamily(name=name, description=text, kind=kind)
            labels = {**self._labels, "le": le} if le else self._labels
            self._metrics[name, le] = self._families[name].Metric(labels=labels)
        return self._metrics[name, le]
