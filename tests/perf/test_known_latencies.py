"""A server of known latencies, measured by the native driver at the concurrencies that users sweep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from trtbuild.perf.client_pool import ClientPool
from trtbuild.perf.records import Load, PointSpec
from trtbuild.perf.statistics import figures_of

TTFT_S, ITL_S, OSL = 0.2, 0.05, 16


@pytest.mark.slow
@pytest.mark.parametrize("concurrency", [1, 16, 64])
def test_within_two_percent(scripted: Callable[..., Any], concurrency: int) -> None:
    """What the server really did is the truth: on a busy machine its own timers are late too."""
    server = scripted(ttft_s=TTFT_S, itl_s=ITL_S)
    spec = PointSpec("m", "native", Load("concurrency", concurrency), 64, OSL, num_requests=max(24, 3 * concurrency))
    with ClientPool(spec, server.target) as pool:
        measured = pool.measure()
    figures = figures_of(spec, measured.records, measured.window)
    first, last = (measured.window or (0.0, 0.0))[0], max(one.finished_s for one in measured.records)
    true = [one for one in server.requests() if first < one["arrived"] <= last]
    ttft = sum(one["sent"][0] - one["arrived"] for one in true) / len(true)
    itl = sum(one["sent"][-1] - one["sent"][0] for one in true) / len(true) / (OSL - 1)
    cycle = sum(one["sent"][-1] - one["arrived"] for one in true) / len(true)
    assert figures.metrics["ttft_s"]["mean"] == pytest.approx(ttft, rel=0.02)
    assert figures.metrics["itl_s"]["mean"] == pytest.approx(itl, rel=0.02)
    assert figures.throughput["output_tokens_per_s"]["mean"] == pytest.approx(concurrency * OSL / cycle, rel=0.02)
    print(  # noqa: T201
        f"\nc{concurrency}: TTFT {1e3 * figures.metrics['ttft_s']['mean']:.1f} ms (server {1e3 * ttft:.1f}), "
        f"ITL {1e3 * figures.metrics['itl_s']['mean']:.2f} ms (server {1e3 * itl:.2f}), "
        f"{figures.throughput['output_tokens_per_s']['mean']:.1f} tokens/s (server {concurrency * OSL / cycle:.1f}), "
        f"{measured.client.num_processes} processes, cpu share {measured.client.cpu_share:.2f}"
    )
