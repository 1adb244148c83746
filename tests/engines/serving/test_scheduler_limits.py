"""The scheduler's clock: timings, deadlines, a bounded queue, and the histograms of what requests took."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_executor import FakeExecutor, request

from trtbuild.engines.serving.scheduler import Scheduler
from trtbuild.errors import Refused, Unavailable


def test_timings_are_on_the_given_clock() -> None:
    now = iter(range(100))
    scheduler = Scheduler(FakeExecutor(), clock=lambda: float(next(now)))
    usage = scheduler.run([request("a", [3, 4], max_tokens=2)])[0].usage
    # submitted 0, admitted 1, first token 2, finished 3.
    assert usage is not None and (usage.queue_s, usage.ttft_s, usage.total_s) == (1, 2, 3)


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_deadlines_end_waiting_and_running_requests_before_the_step() -> None:
    clock, executor = Clock(), FakeExecutor(num_slots=1, chunk_size=3)
    scheduler = Scheduler(executor, clock=clock)
    scheduler.submit(request("runs", [3] * 9, deadline_s=5.0))
    scheduler.submit(request("waits", [4], deadline_s=2.0))
    scheduler.submit(replace(request("late", [4], deadline_s=2.0), submitted_at=-1.0))
    scheduler.submit(request("free", [7], max_tokens=2))
    scheduler.step()
    clock.now = 1.0
    assert [(e.request_id, e.finish_reason) for e in scheduler.step() if e.finish_reason] == [("late", "timeout")]
    clock.now = 2.0
    ended = [e for e in scheduler.step() if e.finish_reason]
    assert [(e.request_id, e.finish_reason, e.error) for e in ended] == [
        ("waits", "timeout", "the request's deadline of 2 s has passed")
    ]
    assert ended[0].usage is not None and (ended[0].usage.queue_s, ended[0].usage.completion_tokens) == (2.0, 0)
    clock.now = 4.99
    assert all(e.finish_reason is None for e in scheduler.step())
    clock.now = 5.0
    executor.calls.clear()
    events = scheduler.step()
    assert [(e.request_id, e.finish_reason) for e in events if e.finish_reason == "timeout"] == [("runs", "timeout")]
    assert executor.calls[0] == ("prefill", 0, 0, 1), "the slot goes to the next in the same step"
    while scheduler.has_work:
        events += scheduler.step()
    assert (events[-1].request_id, events[-1].finish_reason) == ("free", "length")
    stats = scheduler.stats()
    assert (stats.timed_out, stats.finished, stats.slots_used, stats.waiting) == (3, 1, 0, 0)


def test_queue_is_bounded_beyond_what_the_next_step_admits() -> None:
    for limit in (0, 1, 3):
        scheduler = Scheduler(FakeExecutor(num_slots=2), max_queue=limit)
        for i in range(2 + limit):
            scheduler.submit(request(str(i), [3 + i], max_tokens=20, ignore_eos=True))
        for _ in range(2):
            with pytest.raises(
                Unavailable, match=rf"2 slots are in use and {limit} requests wait, at most {limit} may"
            ):
                scheduler.submit(request("more", [9]))
            scheduler.step()
        scheduler.cancel("0")
        scheduler.submit(request("next", [9]))
        with pytest.raises(Unavailable):
            scheduler.submit(request("more", [9]))
        with pytest.raises(Refused, match="no tokens"):
            scheduler.submit(request("bad", []))
        stats = scheduler.stats()
        assert (stats.queue_full, stats.refused, stats.max_queue) == (3, 1, limit)
        while scheduler.has_work:
            scheduler.step()
        assert scheduler.stats().finished == 2 + limit


def test_histograms_count_what_requests_took() -> None:
    clock = Clock()
    scheduler = Scheduler(FakeExecutor(num_slots=1), clock=clock)
    scheduler.submit(request("a", [3, 4], max_tokens=3, ignore_eos=True))
    scheduler.submit(request("b", [5] * 7, max_tokens=2, ignore_eos=True))
    scheduler.submit(request("c", [5]))
    while scheduler.has_work:
        clock.now += 0.2
        scheduler.step()
        if scheduler.stats().finished == 2:
            scheduler.cancel("c")
    stats = scheduler.stats()
    found = {name: (h["count"], round(h["sum"], 6)) for name, h in stats.histograms.items()}
    # a: tokens 1 and 2 at 0.2 (prefill and decode share a step), token 3 at 0.4; b is admitted at 0.6, a chunk of 5
    # and one of 2, both tokens at 0.8.
    assert found == {
        "queue_seconds": (2, 0.8),
        "ttft_seconds": (2, 1.0),
        "itl_seconds": (3, 0.2),
        "e2e_seconds": (2, 1.2),
        "prompt_tokens": (2, 9.0),
        "completion_tokens": (2, 5.0),
    }
    tokens = stats.histograms["completion_tokens"]
    assert dict(zip(tokens["buckets"], tokens["counts"], strict=False)) | {2: 1, 5: 1} == dict.fromkeys(
        tokens["buckets"], 0
    ) | {2: 1, 5: 1}
    assert len(tokens["counts"]) == len(tokens["buckets"]) + 1
    assert stats.uptime_s == pytest.approx(clock.now)
