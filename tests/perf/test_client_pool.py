"""The native driver against a server that answers at programmed times and writes down when it really sent."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import psutil
import pytest

from trtbuild.perf.client_pool import ClientPool
from trtbuild.perf.records import Load, Measured, PointSpec
from trtbuild.perf.statistics import Figures, figures_of, saturation

Start = Callable[..., Any]


def spec_of(load: Load, **fields: Any) -> PointSpec:
    return PointSpec("m", "native", load, **{"isl": 24, "osl": 6, "num_requests": 8, "warmup": 2, **fields})


def measure(server: Any, spec: PointSpec) -> tuple[Measured, Figures]:
    with ClientPool(spec, server.target) as pool:
        measured = pool.measure()
    return measured, figures_of(spec, measured.records, measured.window)


@pytest.mark.slow
def test_times_are_those_of_the_server(scripted: Start) -> None:
    """Within 2 ms of when it really sent, at the median; each token of each request."""
    server = scripted(ttft_s=0.2, itl_s=0.05)
    measured, figures = measure(server, spec_of(Load("concurrency", 4), num_requests=12))
    behind: list[float] = []
    for record in measured.records:
        if record.error is None:
            closest = min(server.requests(), key=lambda one: abs(one["sent"][0] - record.token_times_s[0]))
            behind += (np.array(record.token_times_s) - np.array(closest["sent"])).tolist()
    assert 0 <= np.median(behind) < 0.002
    assert figures.metrics["ttft_s"]["p50"] == pytest.approx(0.2, abs=0.008)
    assert figures.metrics["itl_s"]["p50"] == pytest.approx(0.05, abs=0.002)
    assert figures.throughput["output_tokens_per_s"]["mean"] == pytest.approx(4 * 6 / 0.45, rel=0.05)
    assert figures.steady["kept_requests"] >= 12
    assert figures.errors == {}


def test_prompts_and_answers_have_the_exact_length(scripted: Start) -> None:
    server = scripted()
    spec = spec_of(Load("concurrency", 20), isl=37, osl=5, shared_prefix=10, num_requests=60)
    measured, figures = measure(server, spec)
    assert measured.client.num_processes == 2
    asked = server.requests()
    assert {one["prompt_tokens"] for one in asked} == {37}
    assert {len(one["sent"]) for one in asked} == {5}
    heads = [tuple(one["head"]) for one in asked]
    assert len(set(heads)) == len(heads), "a prompt was sent twice"
    assert len({head[:10] for head in heads}) == 1
    whole = [one for one in measured.records if one.error is None]
    assert {(one.prompt_tokens, one.output_tokens, len(one.token_times_s)) for one in whole} == {(37, 5, 5)}
    assert figures.num_requests >= 60


@pytest.mark.slow
def test_a_stall_is_seen_in_an_open_loop(scripted: Start) -> None:
    """One second of 3.5: 30 % of the requests wait for its end, up to all of it."""
    server = scripted(ttft_s=0.02, itl_s=0.01, stall_at_s=1.5, stall_s=1.0)
    spec = spec_of(Load("rate", 20.0, "constant"), num_requests=60, warmup=1, min_seconds=3.0)
    measured, figures = measure(server, spec)
    assert figures.metrics["ttft_s"]["p99"] > 0.8
    assert figures.metrics["ttft_s"]["p50"] < 0.1
    assert 0.2 < np.mean([one.token_times_s[0] - one.due_s > 0.1 for one in measured.records]) < 0.45
    # Requests were sent when they were due, while none was answered.
    assert (measured.client.send_delay_p99_s or 0.0) < 0.3


@pytest.mark.slow
def test_batches_wait_for_each_other(scripted: Start) -> None:
    server = scripted(ttft_s=0.05, itl_s=0.01)
    measured, figures = measure(server, spec_of(Load("batch", 3), num_requests=9))
    starts = sorted(one.start_s for one in measured.records)
    waves = [starts[index : index + 3] for index in range(0, len(starts), 3)]
    assert all(wave[-1] - wave[0] < 0.04 for wave in waves)
    assert figures.num_requests == 9


def test_a_trace_is_sent_as_written(scripted: Start, tmp_path: Any) -> None:
    file = tmp_path / "trace.jsonl"
    lengths = [(0, 5, 2), (100, 30, 4), (100, 8, 1), (400, 12, 3)]
    keys = ("timestamp", "input_length", "output_length")
    file.write_text("".join(json.dumps(dict(zip(keys, one, strict=True))) + "\n" for one in lengths))
    server = scripted()
    measured, figures = measure(server, spec_of(Load("trace", 1.0, "constant", str(file)), warmup=0))
    records = sorted(measured.records, key=lambda one: one.due_s)
    assert sorted((one.prompt_tokens, one.output_tokens) for one in records) == sorted(one[1:] for one in lengths)
    dues = np.array([one.due_s for one in records]) - records[0].due_s
    assert dues == pytest.approx([0.0, 0.1, 0.1, 0.4], abs=1e-3)
    assert figures.num_requests == 4


def test_refusals_are_counted(scripted: Start) -> None:
    measured, figures = measure(scripted(refuse_every=4), spec_of(Load("concurrency", 1), num_requests=16, warmup=0))
    assert figures.errors == {"refused": pytest.approx(figures.num_requests / 4, abs=1)}
    assert {one.error for one in measured.records if one.error} == {"refused: as the script says"}


def test_a_server_that_dies_ends_the_point(scripted: Start) -> None:
    server = scripted(ttft_s=0.02, die_after=9)
    measured, figures = measure(server, spec_of(Load("concurrency", 2), num_requests=20, warmup=0))
    assert figures.errors["unavailable"] > 5
    # The eighth may have been in flight.
    assert len([one for one in measured.records if one.error is None]) in (7, 8)


@pytest.mark.slow
def test_a_request_has_its_time(scripted: Start) -> None:
    server = scripted(ttft_s=30.0)
    begun = time.monotonic()
    measured, figures = measure(server, spec_of(Load("concurrency", 1), num_requests=1, warmup=0, timeout_s=0.3))
    assert figures.errors == {"timeout": 1}
    assert time.monotonic() - begun < 10
    assert all(0.25 < one.finished_s - one.start_s < 0.6 for one in measured.records)


@pytest.mark.slow
def test_warm_up_goes_on_until_it_is_stable(scripted: Start) -> None:
    """A server whose first four requests are slow."""
    server = scripted(ttft_s=0.1, pause_s=0.5, pauses=4)
    measured, figures = measure(server, spec_of(Load("concurrency", 2), warmup=8))
    rounds = measured.notes["warmup_rounds"]
    assert 5 <= len(rounds) <= 8
    assert figures.metrics["ttft_s"]["max"] < 0.3


@contextmanager
def interrupted_clients() -> Iterator[None]:
    """Client processes that get no CPU for 40 ms of every 100."""
    ended = threading.Event()

    def interrupt() -> None:
        while not ended.wait(0.06):
            for child in psutil.Process().children():
                try:
                    if "trtbuild.perf.client_process" in child.cmdline():
                        child.suspend()
                        ended.wait(0.04)
                        child.resume()
                except psutil.Error:
                    continue

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_a_client_that_is_late_is_found(scripted: Start) -> None:
    server = scripted(ttft_s=0.05, itl_s=0.02)
    spec = spec_of(Load("concurrency", 2), num_requests=12)
    with interrupted_clients():
        late, figures = measure(server, spec)
    assert (late.client.loop_delay_p99_s or 0.0) > 0.02
    assert "late" in (saturation(late.client.to_dict(), figures.metrics["itl_s"]["p50"]) or "")


def test_no_client_process_is_left(scripted: Start) -> None:
    server = scripted(ttft_s=0.01)
    with ClientPool(spec_of(Load("concurrency", 40)), server.target) as pool:
        pids = [process.pid for process in pool._processes]
        assert len(pids) == 3
    assert not any(psutil.pid_exists(pid) for pid in pids)
