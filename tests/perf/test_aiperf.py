"""The driver `aiperf`: its export, and the real AIPerf against a server whose times are known."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trtbuild.errors import Refused, TrtBuildError
from trtbuild.perf import aiperf
from trtbuild.perf.aiperf import AiperfDriver, find_aiperf, read_export, warm_up
from trtbuild.perf.load import Due, Prompts
from trtbuild.perf.records import Load, Measured, PointSpec, PromptLimits, Target
from trtbuild.perf.statistics import Figures, figures_of

LIMITS = PromptLimits(4096, 4000, 16, 1000, (0, 1, 2))
SERVER = Path(__file__).with_name("scripted_openai.py")
TINY_MIXTRAL = Path(__file__).parents[1] / "checkpoints" / "tiny-mixtral"


def why_not_here() -> str | None:
    try:
        find_aiperf()
    except Refused as error:
        return f"{error.message}; make aiperf"
    return None


Start = Callable[..., tuple[Target, Callable[[], list[dict[str, Any]]]]]


@pytest.fixture
def openai(tmp_path: Path) -> Iterator[Start]:
    """Start a scripted one: what to measure, and what it was asked."""
    started: list[subprocess.Popen[str]] = []
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "tokenizer").symlink_to(TINY_MIXTRAL)

    def start(**script: Any) -> tuple[Target, Callable[[], list[dict[str, Any]]]]:
        log = tmp_path / "server.jsonl"
        command = [sys.executable, str(SERVER), json.dumps({"log": str(log), **script})]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        wait_for(url)
        target = Target("m", LIMITS, engine_dir=tmp_path / "engine", openai=f"{url}/v1")
        return target, lambda: [json.loads(line) for line in log.read_text().splitlines()]

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_for(url: str) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            urllib.request.urlopen(f"{url}/openapi.json", timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def spec_of(load: Load, isl: int = 40, osl: int = 6, **fields: Any) -> PointSpec:
    return PointSpec("m", "aiperf", load, isl, osl, **{"num_requests": 12, "warmup": 1, **fields})


@pytest.mark.slow
@pytest.mark.parametrize("streams", [1, 4, 16, 64])
def test_known_latencies_are_measured_within_two_percent(openai: Start, tmp_path: Path, streams: int) -> None:
    """Delays are longer with more streams: AIPerf's processes need over 1 ms of the client's CPU per token."""
    slower = 1 if streams <= 16 else 3
    target, asked = openai(ttft_s=0.2 * slower, spread_s=0.1 * slower, itl_s=0.05 * slower)
    spec = spec_of(Load("concurrency", streams), osl=16, num_requests=max(12, 4 * streams))
    figures, measured = measure(spec, target, tmp_path)
    seen = streamed(asked())
    ttft_s = sum(one["ttft_s"] for one in seen) / len(seen)
    cycle_s = ttft_s + 15 * 0.05 * slower
    assert figures.metrics["ttft_s"]["mean"] == pytest.approx(ttft_s, rel=0.02)
    assert figures.metrics["itl_s"]["mean"] == pytest.approx(0.05 * slower, rel=0.02)
    assert figures.metrics["e2e_s"]["mean"] == pytest.approx(cycle_s, rel=0.02)
    assert figures.throughput["output_tokens_per_s"]["mean"] == pytest.approx(16 * streams / cycle_s, rel=0.02)
    check_requests(seen, measured, osl=16)


@pytest.mark.slow
def test_an_open_loop_arrives_as_it_is_due(openai: Start, tmp_path: Path) -> None:
    target, asked = openai(ttft_s=0.2, itl_s=0.05)
    figures, measured = measure(spec_of(Load("rate", 8.0, "poisson")), target, tmp_path)
    assert figures.metrics["ttft_s"]["p50"] == pytest.approx(0.2, rel=0.05)
    assert figures.metrics["itl_s"]["mean"] == pytest.approx(0.05, rel=0.02)
    check_requests(streamed(asked()), measured, osl=6)
    assert (tmp_path / "raw.aiperf.jsonl").is_file()


def measure(spec: PointSpec, target: Target, directory: Path) -> tuple[Figures, Measured]:
    if (why := why_not_here()) is not None:
        pytest.skip(why)
    measured = AiperfDriver().measure(spec, target, directory / "raw")
    figures = figures_of(spec, measured.records, measured.window)
    assert (figures.num_errors, measured.why_invalid) == (0, None)
    assert figures.num_requests >= spec.num_requests
    return figures, measured


def streamed(asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the warm-up's."""
    return [one for one in asked if one["body"].get("stream")]


def check_requests(seen: list[dict[str, Any]], measured: Measured, osl: int) -> None:
    """Exact lengths, each prompt once; its times of day became our monotonic ones: requests arrived when sent."""
    assert {len(one["body"]["prompt"]) for one in seen} == {40}
    assert {(one["body"]["max_tokens"], one["body"]["ignore_eos"]) for one in seen} == {(osl, True)}
    assert len({tuple(one["body"]["prompt"]) for one in seen}) == len(seen) == len(measured.records)
    sent = sorted(record.start_s for record in measured.records)
    late = sorted(one["arrived"] - start for one, start in zip(seen, sent, strict=True))
    assert -0.02 < late[len(late) // 2] < 0.05


def line(**metadata: Any) -> dict[str, Any]:
    """As AIPerf 0.13 writes it, shortened: sent at 5 s, allowed at 4.99 s, three tokens."""
    times = {"credit_issued_ns": 4_990_000_000, "request_start_ns": 5_000_000_000, "request_end_ns": 5_400_000_000}
    metrics = {
        "time_to_first_token": {"value": 200.0, "unit": "ms"},
        "inter_chunk_latency": {"value": [50.0, 60.0], "unit": "ms"},
        "usage_prompt_tokens": {"value": 40, "unit": "tokens"},
        "usage_completion_tokens": {"value": 3, "unit": "tokens"},
    }
    return {"metadata": {"benchmark_phase": "profiling", **times, **metadata}, "metrics": metrics}


def read(*lines: dict[str, Any], osl: int = 3) -> tuple[list[Any], int]:
    return read_export("\n".join(map(json.dumps, lines)), 100.0, spec_of(Load("rate", 1.0, "constant"), osl=osl))


def test_an_export_becomes_records() -> None:
    (found,), merged = read(line(), line(benchmark_phase="warmup"))
    assert found.token_times_s == pytest.approx([105.2, 105.25, 105.31])
    assert (found.start_s, found.send_delay_s, found.end_s) == pytest.approx((105.0, 0.01, 105.31))
    assert (found.prompt_tokens, found.output_tokens, found.error, merged) == (40, 3, None, 0)


def test_tokens_without_a_chunk_are_counted_and_other_lengths_are_errors() -> None:
    many = line()
    many["metrics"]["usage_completion_tokens"]["value"] = 5
    (found,), merged = read(many, osl=5)
    assert (found.error, found.output_tokens, len(found.token_times_s), merged) == (None, 5, 3, 2)
    (found,), _ = read(line(), osl=4)
    assert found.error == "failed: 3 tokens came, 4 were asked for"
    many["metrics"]["usage_prompt_tokens"]["value"] = 39
    (found,), _ = read(many, osl=5)
    assert found.error == "failed: the server read 39 prompt tokens, 40 were sent"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"code": 400, "type": "Bad Request", "message": "max_tokens"}, "refused"),
        ({"code": 429, "type": "Too Many Requests", "message": "queue full"}, "unavailable"),
        ({"code": 503, "type": "Service Unavailable", "message": "starting"}, "unavailable"),
        ({"code": 408, "type": "Request Timeout", "message": "late"}, "timeout"),
        ({"code": None, "type": "TimeoutError", "message": ""}, "timeout"),
        ({"code": 500, "type": "Internal", "message": "crash"}, "failed"),
        ({"code": None, "type": "ServerDisconnectedError", "message": "gone"}, "failed"),
    ],
)
def test_errors_are_of_our_kinds(error: dict[str, Any], kind: str) -> None:
    (found,), _ = read({**line(), "metrics": {}, "error": error})
    assert found.error_kind == kind
    assert error["message"] in found.error
    assert (found.token_times_s, found.end_s) == ([], 105.4)


def test_a_file_that_is_no_export_is_said() -> None:
    with pytest.raises(TrtBuildError, match="AIPerf's export"):
        read_export('{"metadata": {}}', 0.0, spec_of(Load("concurrency", 1)))


def test_the_warm_up_says_what_the_server_says(openai: Start) -> None:
    target, asked = openai(ttft_s=0.02, refuse_every=4)
    with pytest.raises(TrtBuildError, match=r"answers 429.*queue is full"):
        warm_up(spec_of(Load("concurrency", 4), warmup=2), target, Prompts(LIMITS, 0), 4)
    assert {len(one["body"]["prompt"]) for one in asked()} == {40}


def test_its_data_set_has_exact_lengths_and_times() -> None:
    requests = [Due(0.0, 5, 2), Due(0.25, 7, 3)]
    lines = [json.loads(one) for one in aiperf._lines(Prompts(LIMITS, 3), requests, timed=True)]
    assert [(len(one["extra"]["prompt"]), one["extra"]["max_tokens"], one["timestamp"]) for one in lines] == [
        (5, 2, 0.0),
        (7, 3, 250.0),
    ]
    assert "timestamp" not in next(aiperf._lines(Prompts(LIMITS, 3), requests, timed=False))


def test_what_is_missing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aiperf, "DIRECTORY", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Refused, match=r"pip install aiperf=="):
        find_aiperf()
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho ImportError >&2; exit 1\n")
    broken.chmod(0o755)
    with pytest.raises(Refused, match="ends with status 1: ImportError"):
        find_aiperf(broken)
    with pytest.raises(Refused, match="no Triton endpoint"):
        AiperfDriver().measure(spec_of(Load("concurrency", 1)), Target("m", LIMITS, grpc="x:1"), tmp_path)
    assert "--concurrency" in (AiperfDriver().check_spec(spec_of(Load("batch", 4))) or "")


def test_a_run_that_fails_is_said_with_its_words(openai: Start, tmp_path: Path) -> None:
    fake = tmp_path / "aiperf"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 0.13.0 && exit\necho no tokenizer; exit 1\n')
    fake.chmod(0o755)
    target, _ = openai()
    with pytest.raises(TrtBuildError, match=r"status 1\. It printed:\nno tokenizer"):
        AiperfDriver(fake).measure(spec_of(Load("concurrency", 1)), target, tmp_path / "raw")
