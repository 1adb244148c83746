"""Histograms of what requests took, in the form that metrics systems add up."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Histogram:
    """Counts of values by upper bound (inclusive); what is above the last one is counted too."""

    def __init__(self, buckets: Sequence[float]) -> None:
        self._buckets = list(buckets)
        self._counts = [0] * (len(self._buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect.bisect_left(self._buckets, value)] += 1
        self._sum += value

    def to_dict(self) -> dict[str, Any]:
        """ "buckets": upper bounds; "counts": of each bucket alone, the last one beyond them; "sum"; "count"."""
        return {
            "buckets": list(self._buckets),
            "counts": list(self._counts),
            "sum": self._sum,
            "count": sum(self._counts),
        }


class RequestHistograms:
    """Of all requests: queue_seconds at admission, ttft_seconds at the first token, itl_seconds at each later one;
    of finished generations (stop, length): e2e_seconds, prompt_tokens, completion_tokens.
    """

    def __init__(self) -> None:
        self.queue_seconds = Histogram(_SECONDS)
        self.ttft_seconds = Histogram(_SECONDS)
        self.itl_seconds = Histogram(_SECONDS)
        self.e2e_seconds = Histogram(_SECONDS)
        self.prompt_tokens = Histogram(_TOKENS)
        self.completion_tokens = Histogram(_TOKENS)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Name -> `Histogram.to_dict`."""
        return {name: histogram.to_dict() for name, histogram in vars(self).items()}
