"""Histograms: what falls where."""

from __future__ import annotations

from trtbuild.engines.serving.histograms import Histogram, RequestHistograms


def test_bounds_are_inclusive_and_the_last_count_is_what_is_beyond() -> None:
    histogram = Histogram([1, 2, 5])
    for value in (0, 1, 1.5, 2, 5, 5.1, 100):
        histogram.observe(value)
    assert histogram.to_dict() == {"buckets": [1, 2, 5], "counts": [2, 2, 1, 2], "sum": 114.6, "count": 7}


def test_names_and_rising_buckets() -> None:
    found = RequestHistograms().to_dict()
    assert list(found) == [
        "queue_seconds",
        "ttft_seconds",
        "itl_seconds",
        "e2e_seconds",
        "prompt_tokens",
        "completion_tokens",
    ]
    for values in found.values():
        assert values["buckets"] == sorted(set(values["buckets"]))
        assert values["counts"] == [0] * (len(values["buckets"]) + 1)
