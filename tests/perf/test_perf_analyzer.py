"""The driver `perf-analyzer`: the real binary against servers whose times are known, and what it lacks elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trtbuild.errors import Refused, TrtBuildError
from trtbuild.perf import external_tool, perf_analyzer_binary
from trtbuild.perf.external_tool import closed_loop, closed_window, open_window, requests_to_send
from trtbuild.perf.load import Due
from trtbuild.perf.perf_analyzer import PerfAnalyzerDriver, intervals_us, load_export, read_export, sent_late
from trtbuild.perf.perf_analyzer_binary import find_perf_analyzer
from trtbuild.perf.records import Load, Measured, PointSpec, PromptLimits, RequestRecord, Target
from trtbuild.perf.statistics import figures_of

LIMITS = PromptLimits(4096, 4000, 16, 1000, (0, 1, 2))
SERVER = Path(__file__).with_name("scripted_triton.py")


def why_not_here() -> str | None:
    try:
        find_perf_analyzer()
    except Refused as error:
        return f"{error.message}; make perf-analyzer"
    return None


WHY_NOT = why_not_here()
needs_binary = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")


@pytest.fixture
def triton(tmp_path: Path) -> Iterator[Callable[..., tuple[Target, Callable[[], list[dict[str, Any]]]]]]:
    """Start a scripted one: what to measure, and what it was asked."""
    started: list[subprocess.Popen[str]] = []

    def start(**script: Any) -> tuple[Target, Callable[[], list[dict[str, Any]]]]:
        log = tmp_path / "server.jsonl"
        process = subprocess.Popen(
            [sys.executable, str(SERVER), json.dumps({"log": str(log), **script})], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        target = Target("m", LIMITS, grpc=f"127.0.0.1:{int(process.stdout.readline())}")
        return target, lambda: [json.loads(line) for line in log.read_text().splitlines()]

    yield start
    for process in started:
        process.kill()
        process.wait()


def spec_of(load: Load, isl: int = 40, osl: int = 6, **fields: Any) -> PointSpec:
    return PointSpec("m", "perf-analyzer", load, isl, osl, **{"num_requests": 8, "warmup": 1, **fields})


def measure(spec: PointSpec, target: Target, place: Path) -> Measured:
    return PerfAnalyzerDriver().measure(spec, target, place / "raw")


@pytest.mark.slow
@needs_binary
@pytest.mark.parametrize("concurrency", [1, 4, 16, 64])
def test_known_latencies_are_measured_within_two_percent_and_lengths_are_exact(
    triton: Any, tmp_path: Path, concurrency: int
) -> None:
    target, asked = triton(ttft_s=0.2, itl_s=0.05)
    spec = spec_of(Load("concurrency", concurrency), num_requests=max(8, 3 * concurrency))
    measured = measure(spec, target, tmp_path)
    figures = figures_of(spec, measured.records, measured.window)
    assert figures.metrics["ttft_s"]["mean"] == pytest.approx(0.2, rel=0.02)
    assert figures.metrics["itl_s"]["mean"] == pytest.approx(0.05, rel=0.02)
    assert figures.metrics["e2e_s"]["mean"] == pytest.approx(0.45, rel=0.02)
    assert figures.throughput["requests_per_s"]["mean"] == pytest.approx(concurrency / 0.45, rel=0.02)
    assert figures.num_requests >= spec.num_requests
    assert {record.output_tokens for record in measured.records} == {6}
    # The server's own log: the warm-up's round of one for each stream, and each prompt once.
    seen = asked()
    assert {one["prompt_tokens"] for one in seen} == {40}
    assert len(seen) == len(measured.records) + concurrency == len({tuple(one["head"]) for one in seen})
    # Its clock and ours are one: the first token came when the server sent it.
    sent = sorted(one["sent"][0] for one in seen)[concurrency:]
    came = sorted(record.token_times_s[0] for record in measured.records)
    assert max(abs(late - early) for early, late in zip(sent, came, strict=True)) < 0.02
    assert (tmp_path / "raw.perf_analyzer.json.gz").stat().st_size > 100


@pytest.mark.slow
@needs_binary
def test_an_open_loop_shows_a_stall_and_sends_on_time(triton: Any, tmp_path: Path) -> None:
    # The stall counts from the first request, that of the warm-up, which takes one or two seconds.
    target, _ = triton(ttft_s=0.01, itl_s=0.002, stall_at_s=2.6, stall_s=0.8)
    spec = spec_of(Load("rate", 20.0, "constant"), num_requests=60)
    measured = measure(spec, target, tmp_path)
    starts = sorted(record.start_s for record in measured.records)
    assert starts[-1] - starts[0] == pytest.approx((len(starts) - 1) / 20, rel=0.05)
    ttft = figures_of(spec, measured.records, measured.window).metrics["ttft_s"]
    assert ttft["max"] > 0.6 and ttft["p50"] < 0.05
    delays = sorted(record.send_delay_s for record in measured.records)
    assert delays[0] >= 0.0 and delays[len(delays) // 2] < 0.02


@needs_binary
def test_a_request_that_fails_is_said_and_never_a_silent_zero(triton: Any, tmp_path: Path) -> None:
    target, _ = triton(ttft_s=0.01, refuse_every=7)
    measured = measure(spec_of(Load("concurrency", 2)), target, tmp_path)
    assert measured.why_invalid is not None and "refused: as the script says" in measured.why_invalid
    assert {record.error_kind for record in measured.records} == {"refused"}


@needs_binary
def test_a_server_that_dies_is_said(triton: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_tool, "_LEAST_PATIENCE_S", 3.0)
    monkeypatch.setattr(external_tool, "_PATIENCE", 0.0)
    target, _ = triton(ttft_s=0.01, die_after=6)
    with pytest.raises(TrtBuildError, match=r"perf_analyzer (was not done within 3 s|ended with status)"):
        measure(spec_of(Load("concurrency", 2), timeout_s=3.0), target, tmp_path)


@needs_binary
def test_no_server_is_said(tmp_path: Path) -> None:
    with pytest.raises(TrtBuildError, match="failed to connect"):
        measure(spec_of(Load("concurrency", 2)), Target("m", LIMITS, grpc="127.0.0.1:9"), tmp_path)


@needs_binary
@pytest.mark.slow
def test_the_real_triton_answers_it(tmp_path: Path, engine_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trtbuild.perf.targets import ServeRequest, running
    from trtbuild.triton_repo.model_config import WorkerSettings
    from trtbuild.workspace import Workspace

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "engines" / "serving"))
    request = ServeRequest(WorkerSettings(loader="fake_executor:load_fake", slots=4, threads=1))
    spec = PointSpec("mixtral", "perf-analyzer", Load("concurrency", 4), 16, 40, num_requests=12, warmup=1)
    with running(Workspace(engine_workspace), "mixtral", "perf-analyzer", request) as found:
        measured = measure(spec, found.target, tmp_path)
    assert {record.error for record in measured.records} == {None}
    assert {(record.prompt_tokens, record.output_tokens) for record in measured.records} == {(16, 40)}
    # Its executor takes 20 ms a step.
    itl = figures_of(spec, measured.records, measured.window).metrics["itl_s"]
    assert 0.019 < itl["p50"] < 0.04


def test_a_load_that_it_does_not_have_is_refused() -> None:
    assert "--concurrency" in (PerfAnalyzerDriver().check_spec(spec_of(Load("batch", 4))) or "")
    assert PerfAnalyzerDriver().check_spec(spec_of(Load("rate", 4, "poisson"))) is None


@needs_binary
def test_missing_libraries_are_named_with_what_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perf_analyzer_binary, "_library_directories", tuple)
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    with pytest.raises(Refused) as caught:
        find_perf_analyzer(perf_analyzer_binary.DIRECTORY / "bin" / "perf_analyzer")
    found = caught.value.message
    # A system may have one of them itself.
    assert (
        "needs libcudart.so.12: pip install nvidia-cuda-runtime-cu12" in found or "apt-get install libb64-0d" in found
    )


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (
            "./perf_analyzer: /lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.38' not found (required by ./x)",
            "GLIBC_2.38",
        ),
        (
            "\tlibb64.so.0d => not found\n\tlibc.so.6 => /lib/libc.so.6 (0x7f)",
            "libb64.so.0d: apt-get install libb64-0d",
        ),
        ("\tlibnew.so.3 => not found\n", "libnew.so.3: install the package of your distribution"),
        ("hello", "does not tell its version: 'hello'"),
    ],
)
def test_what_the_loader_says(listed: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "perf_analyzer"
    binary.touch(mode=0o755)
    monkeypatch.setattr(perf_analyzer_binary, "_library_directories", tuple)
    monkeypatch.setattr(perf_analyzer_binary, "_output", lambda *_: listed)
    with pytest.raises(Refused, match="does not run here") as caught:
        find_perf_analyzer(binary)
    assert expected in caught.value.message


def test_none_at_all_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(perf_analyzer_binary, "_candidates", list)
    with pytest.raises(Refused, match=r"pip install .*--target .* tritonclient==2\.51\.0"):
        find_perf_analyzer()
    with pytest.raises(Refused, match="not a program"):
        find_perf_analyzer(tmp_path / "nothing")


EXPORT = {
    "experiments": [
        {
            "requests": [
                {
                    "timestamp": 5_000_000_000,
                    "request_inputs": {"input_ids": [5, 6], "max_tokens": 3, "text_input": ""},
                    "response_timestamps": [5_200_000_000, 5_250_000_000, 5_300_000_000],
                    "response_outputs": [
                        {},
                        {},
                        {"num_input_tokens": 2, "num_output_tokens": 3, "finish_reason": "length"},
                    ],
                },
                {
                    "timestamp": 6_000_000_000,
                    "request_inputs": {"input_ids": 7, "max_tokens": 3},
                    "response_timestamps": [6_100_000_000],
                    "response_outputs": [{"num_input_tokens": 1, "num_output_tokens": 1, "finish_reason": "stop"}],
                },
            ]
        }
    ]
}


def test_an_export_becomes_records() -> None:
    first, second = read_export(EXPORT, offset_s=100.0)
    assert (first.start_s, first.token_times_s, first.end_s) == (105.0, pytest.approx([105.2, 105.25, 105.3]), 105.3)
    assert (first.prompt_tokens, first.output_tokens, first.finish_reason, first.error) == (2, 3, "length", None)
    assert second.error == "failed: 1 tokens came, 3 were asked for"


def test_an_export_that_is_none_is_said(tmp_path: Path) -> None:
    with pytest.raises(TrtBuildError, match="export"):
        read_export({"experiments": [{}]}, 0.0)
    # As a float that is not finite leaves it.
    (tmp_path / "export.json").write_text('{"experiments":[{"requests":[{"cum_log_probs":')
    with pytest.raises(TrtBuildError, match="broke off its export"):
        load_export(tmp_path / "export.json")


def record(start: float, end: float) -> RequestRecord:
    return RequestRecord(start, 0.0, [end], 1, 1, end_s=end)


def test_a_closed_loop_without_stream_names() -> None:
    """Two streams: one sends at 0, 1.1, 2.2 (a second each), the other one at 0.05, 0.75 and no more."""
    records = [record(0, 1), record(1.1, 2.1), record(2.2, 3.2), record(0.05, 0.7), record(0.75, 1.4)]
    found = closed_loop(records, 2)
    assert [one.start_s for one in found] == [0, 0.05, 0.75, 1.1, 2.2]
    assert [one.send_delay_s for one in found] == pytest.approx([0, 0, 0.05, 0.1, 0.1])
    # Full until 1.4: of the requests that were over by then, the last was sent at 0.75.
    assert closed_window(found, 2) == (0.05, 0.75)
    assert closed_window(found, 3) is None


def test_an_open_loops_delays_and_window() -> None:
    due = [Due(at, 1, 1) for at in (0.0, 0.5, 1.0, 1.5)]
    found = sent_late([record(10.02, 10.3), record(11.0, 11.3), record(10.5, 10.8), record(11.7, 12)], due)
    assert [one.send_delay_s for one in found] == pytest.approx([0.02, 0.0, 0.0, 0.2])
    assert open_window(found) == (10.3, 11.0)
    assert intervals_us(due) == [100_000, 500_000, 500_000, 500_000]
    assert sum(intervals_us([Due(n / 3, 1, 1) for n in range(301)])) == 100_100_000


@pytest.mark.parametrize("arrival", ["poisson", "constant"])
def test_enough_requests_are_sent(arrival: Any) -> None:
    closed = requests_to_send(spec_of(Load("concurrency", 4), num_requests=10, min_seconds=5.0), 0.5, 4)
    assert len(closed) == (10 + 3) * 4
    rate = spec_of(Load("rate", 20.0, arrival), num_requests=50, min_seconds=1.0)
    times = [one.at_s for one in requests_to_send(rate, 0.4, 8)]
    assert sum(0.6 < at <= times[-1] - 0.6 for at in times) >= 50
    assert len(times) < 100
