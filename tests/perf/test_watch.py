"""The metrics port as figures: parsing, rates, percentiles of a histogram, and a real HTTP server that counts."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from fake_nvml import FakeNvml
from rich.console import Console

from trtbuild.errors import TrtBuildError
from trtbuild.perf.gpu_reader import GpuReader
from trtbuild.perf.watch import Reading, draw, gpu_states, model_states, parse_metrics, quantile, read_metrics, watch

MODEL = '{model="tiny"}'


def metrics(tokens: int, finished: int, buckets: tuple[int, int, int]) -> str:
    low, middle, every = buckets
    name = "trtbuild_time_to_first_token_seconds"
    return f"""# HELP trtbuild_engine_up 1 where the engine worker answers
# TYPE trtbuild_engine_up gauge
trtbuild_engine_up{MODEL} 1
trtbuild_requests_active{MODEL} 3
trtbuild_requests_waiting{MODEL} 2
trtbuild_slots_used{MODEL} 3
trtbuild_slots_total{MODEL} 4
trtbuild_kv_tokens_used{MODEL} 100
trtbuild_kv_tokens_total{MODEL} 4096
trtbuild_generated_tokens_total{MODEL} {tokens}
trtbuild_prompt_tokens_total{MODEL} {tokens * 2}
trtbuild_requests_finished_total{MODEL} {finished}
trtbuild_requests_failed_total{MODEL} 1
{name}_bucket{{model="tiny",le="0.1"}} {low}
{name}_bucket{{model="tiny",le="0.5"}} {middle}
{name}_bucket{{model="tiny",le="+Inf"}} {every}
nv_gpu_utilization{{gpu_uuid="GPU-1"}} 0.5
nv_gpu_power_usage{{gpu_uuid="GPU-1"}} 71.5
"""


@pytest.fixture
def server() -> Iterator[str]:
    """Each reading has 50 tokens and 2 requests more."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            n = len(asked)
            body = metrics(50 * n, 2 * n, (n, 2 * n, 2 * n)).encode() if self.path == "/metrics" else b"hello"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_rates_and_percentiles_are_of_the_time_between_two_readings() -> None:
    before = Reading(10.0, parse_metrics(metrics(1000, 20, (10, 20, 20))))
    now = Reading(12.0, parse_metrics(metrics(1100, 24, (11, 24, 24))))
    state = model_states(before, now)["tiny"]
    assert state["output_tokens_per_s"] == pytest.approx(50)
    assert state["prompt_tokens_per_s"] == pytest.approx(100)
    assert (state["finished_per_s"], state["not_answered_per_s"]) == (2, 0)
    assert (state["active"], state["waiting"], state["slots"], state["up"]) == (3, 2, 4, 1)
    # 4 requests meanwhile: 1 within 0.1 s, 3 between 0.1 and 0.5 s; the second of them ends a third of the way.
    assert state["ttft_p50_ms"] == pytest.approx(1e3 * (0.1 + 0.4 / 3))
    assert state["itl_p50_ms"] is None


def test_a_server_that_began_again_gives_no_negative_rate() -> None:
    before = Reading(1.0, parse_metrics(metrics(1000, 20, (10, 20, 20))))
    state = model_states(before, Reading(2.0, parse_metrics(metrics(5, 1, (1, 1, 1)))))["tiny"]
    assert state["output_tokens_per_s"] is None
    assert state["ttft_p99_ms"] is None


def test_quantiles() -> None:
    assert quantile({}, 0.5) is None
    assert quantile({1.0: 0, float("inf"): 0}, 0.5) is None
    assert quantile({1.0: 10, 2.0: 10, float("inf"): 10}, 0.5) == pytest.approx(0.5)
    assert quantile({1.0: 5, 2.0: 10, float("inf"): 10}, 0.9) == pytest.approx(1.8)
    # Beyond the last bound nothing is known but the bound.
    assert quantile({1.0: 1, float("inf"): 10}, 0.9) == 1.0


def test_labels_with_escapes_and_odd_lines() -> None:
    found = parse_metrics('a{x="q\\"u\\\\o",y="1,2}"} 3 1700000000\nb 1e-3\nc{} NaN\nnot a sample at all\n# b 5\n')
    assert found["a"] == {(("x", 'q"u\\o'), ("y", "1,2}")): 3.0}
    assert found["b"] == {(): 0.001}
    assert "not" not in found


def test_gpus_by_nvml_or_as_the_server_says() -> None:
    now = Reading(0.0, parse_metrics(metrics(1, 1, (1, 1, 1))))
    assert gpu_states(now, None) == {"GPU-1": {"utilization_percent": 50.0, "power_w": 71.5}}
    assert gpu_states(now, GpuReader(FakeNvml(broken=True))) == gpu_states(now, None)
    own = gpu_states(now, GpuReader(FakeNvml()))
    assert own["gpu0"]["power_w"] == 123.456


def test_a_live_server_is_read(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    watch(f"{server}/metrics", 0.2, 2, as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2
    assert lines[1]["models"]["tiny"]["output_tokens_per_s"] == pytest.approx(250, rel=0.2)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(draw(lines[1], server))
    text = console.export_text()
    assert "3 + 2" in text
    assert "3 of 4" in text


def test_what_is_no_metrics_port_is_said(server: str) -> None:
    with pytest.raises(TrtBuildError, match="not with Triton's metrics"):
        read_metrics(f"{server}/other")
    with pytest.raises(TrtBuildError, match="Connection refused"):
        read_metrics("http://127.0.0.1:9/metrics")
