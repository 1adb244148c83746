"""The driver `aiperf`: NVIDIA's AIPerf on the OpenAI port, which is the only kind of server that it knows.

Prompts go as token ids and answers have a fixed length: both through the field `extra` of its data sets, which it
merges into the body of each request. Its export holds each request's times, which our definitions are computed from.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trtbuild.errors import Refused, TrtBuildError
from trtbuild.perf.external_tool import (
    client_figures,
    closed_loop,
    closed_window,
    monotonic_offset_s,
    open_window,
    patience_s,
    requests_to_send,
    run_tool,
    wrong_lengths,
)
from trtbuild.perf.load import Due, Prompts, open_loop, warmup_streams
from trtbuild.perf.records import DriverName, Measured, PointSpec, RequestRecord, Target

DIRECTORY = Path(sys.prefix) / "aiperf"
COMMAND = f"python3 -m venv {DIRECTORY} && {DIRECTORY}/bin/pip install aiperf==0.13.0"
DEFINITIONS = (
    "figures are computed from the times of every chunk at the OpenAI port. AIPerf's own: a closed loop's throughput "
    "divides by the whole benchmark, ramp and drain included; its inter-token latency is one mean per request, our "
    "TPOT; an open loop's time to first token counts from the sending, ours from when it was due"
)
_NANOSECONDS = 1e9
_MILLISECONDS = 1e3
# Importing it takes this long on a busy machine, several processes of it at once.
_START_S = 120.0
# Offline, AIPerf 0.13 takes the path of a tokenizer for a name on the hub; nothing is fetched for a path either way.
_ENVIRONMENT = {"NO_COLOR": "1", "HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": ""}
# A round of warm-up that takes as long as the one before, within this share, is the last.
_STABLE = 0.1
_WARMUP_NUMBERS = 1 << 40
_VERSION = re.compile(r"\d+\.\d+\S*")
_HINT = "its log is above; a server that died leaves it waiting"
_KINDS = {400: "refused", 404: "refused", 422: "refused", 408: "timeout", 429: "unavailable", 503: "unavailable"}


@dataclass(frozen=True)
class Aiperf:
    """A program that runs here."""

    binary: Path
    version: str


class AiperfDriver:
    """`given`: the program; None: it is looked for."""

    name: DriverName = "aiperf"

    def __init__(self, given: Path | None = None) -> None:
        self._given = given

    def check(self) -> None:
        """Raises `Refused` where AIPerf is not here, with the command that brings it."""
        find_aiperf(self._given)

    def check_spec(self, spec: PointSpec) -> str | None:
        if spec.load.kind == "batch":
            return "aiperf has no load that waits for all answers before it asks again; give --concurrency"
        return None

    def measure(self, spec: PointSpec, target: Target, raw: Path) -> Measured:
        """See `Driver`; the warm-up is ours: AIPerf has none for a schedule."""
        if target.openai is None:
            raise Refused("--driver aiperf needs the OpenAI port: AIPerf has no Triton endpoint")
        if target.engine_dir is None:
            raise Refused("--driver aiperf needs the engine's directory, for its tokenizer")
        tool, prompts = find_aiperf(self._given), Prompts(target.limits, spec.seed, spec.shared_prefix)
        streams = warmup_streams(spec.load, target.limits)
        rounds = warm_up(spec, target, prompts, streams)
        round_s = min(rounds)
        requests = requests_to_send(spec, round_s, streams)
        expected_s = max(requests[-1].at_s, round_s * len(requests) / streams)
        with TemporaryDirectory(prefix="trtbuild-aiperf-") as held:
            directory = Path(held)
            data, log = directory / "requests.jsonl", directory / "aiperf.log"
            data.write_text("".join(_lines(prompts, requests, timed=not spec.load.is_closed)), encoding="utf-8")
            arguments = _arguments(spec, target, data, directory / "out", len(requests))
            offset_s = monotonic_offset_s()
            run = run_tool([str(tool.binary), *arguments], _ENVIRONMENT, log, _START_S + patience_s(expected_s), _HINT)
            export = directory / "out" / "profile_export.jsonl"
            if run.status != 0 or not export.is_file():
                raise TrtBuildError(f"aiperf ended with status {run.status}. It printed:\n{run.tail}")
            shutil.copy2(export, f"{raw}.aiperf.jsonl")
            records, merged = read_export(export.read_text(encoding="utf-8"), offset_s, spec)
        notes = {
            "aiperf": tool.version, "definitions": DEFINITIONS, "warmup_rounds": rounds,
            "tokens_without_a_chunk": merged, "command": _shown(arguments, held, target),
        }  # fmt: skip
        if spec.load.num_streams is None:
            window = None if spec.load.kind == "trace" else open_window(records)
        else:
            records = closed_loop(records, streams)
            window = closed_window(records, streams)
        missing = len(requests) - len(records)
        why = f"AIPerf exported {len(records)} of {len(requests)} requests" if missing else None
        return Measured(records, client_figures(run, records), why_invalid=why, window=window, notes=notes)


def find_aiperf(given: Path | None = None) -> Aiperf:
    """`given`, or the one on PATH, or in `DIRECTORY`; `Refused` where there is none that runs."""
    if given is not None and not os.access(given, os.X_OK):
        raise Refused(f"--aiperf {given}: not a program that can be run")
    on_path = shutil.which("aiperf")
    candidates = [given] if given is not None else [Path(on_path)] if on_path else [DIRECTORY / "bin" / "aiperf"]
    binary = candidates[0]
    if not os.access(binary, os.X_OK):
        raise Refused(f"no aiperf: none on PATH, none in {DIRECTORY}. In an environment of its own: {COMMAND}")
    try:
        ran = subprocess.run(
            [binary, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=_START_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Refused(f"{binary}: cannot be started ({error}); a new one: {COMMAND}") from error
    version = _VERSION.search(ran.stdout.decode(errors="replace"))
    if ran.returncode != 0 or version is None:
        printed = (ran.stderr or ran.stdout).decode(errors="replace").strip()[-500:]
        raise Refused(f"{binary} --version ends with status {ran.returncode}: {printed}; a new one: {COMMAND}")
    return Aiperf(binary, version[0])


def warm_up(spec: PointSpec, target: Target, prompts: Prompts, num_streams: int) -> list[float]:
    """Rounds of as many requests at once, until one takes as long as the one before; seconds of each, at least one.

    Raises `TrtBuildError` with the server's words where a request is not answered as it should be.
    """
    lengths = next(open_loop(spec)) if spec.load.kind == "trace" else Due(0.0, spec.isl, spec.osl)
    numbers, rounds = itertools.count(_WARMUP_NUMBERS), list[float]()
    with ThreadPoolExecutor(num_streams) as threads:
        for _ in range(max(1, spec.warmup)):
            begun = time.monotonic()
            bodies = [_body(prompts.ids(next(numbers), lengths.isl).tolist(), lengths.osl) for _ in range(num_streams)]
            list(threads.map(lambda body: _ask(target, body, lengths, spec.timeout_s), bodies))
            rounds.append(round(time.monotonic() - begun, 4))
            if len(rounds) > 1 and abs(rounds[-1] - rounds[-2]) <= _STABLE * rounds[-2]:
                break
    return rounds


def _ask(target: Target, body: Mapping[str, Any], lengths: Due, timeout_s: float) -> None:
    request = urllib.request.Request(
        f"{target.openai}/completions",
        json.dumps({"model": target.model, **body}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            usage = json.load(answer).get("usage") or {}
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")[:1000]
        raise TrtBuildError(f"{target.openai}/completions answers {error.code}: {text}") from error
    except (OSError, ValueError) as error:
        raise TrtBuildError(f"{target.openai}/completions does not answer: {error}") from error
    wrong = wrong_lengths(lengths.isl, lengths.osl, usage.get("prompt_tokens"), usage.get("completion_tokens", 0))
    if wrong is not None:
        raise TrtBuildError(f"{target.openai}/completions: {wrong.removeprefix('failed: ')}")


def _lines(prompts: Prompts, requests: Sequence[Due], timed: bool) -> Iterator[str]:
    """Its data set `single-turn`; `timed`: with the time of each, in milliseconds."""
    for number, one in enumerate(requests):
        line: dict[str, Any] = {"text": "-", "extra": _body(prompts.ids(number, one.isl).tolist(), one.osl)}
        yield json.dumps(line | ({"timestamp": one.at_s * _MILLISECONDS} if timed else {})) + "\n"


def _body(input_ids: list[int], num_tokens: int) -> dict[str, Any]:
    return {"prompt": input_ids, "max_tokens": num_tokens, "ignore_eos": True, "temperature": 0.0}


def _arguments(spec: PointSpec, target: Target, data: Path, output: Path, num_requests: int) -> list[str]:
    arguments = [
        "profile", "--model", target.model, "--url", (target.openai or "").removesuffix("/v1"),
        "--endpoint-type", "completions", "--streaming", "--tokenizer", f"{target.engine_dir}/tokenizer",
        "--use-server-token-count", "--input-file", str(data), "--custom-dataset-type", "single-turn",
        "--dataset-sampling-strategy", "sequential", "--request-count", str(num_requests),
        "--request-timeout-seconds", str(spec.timeout_s), "--random-seed", str(spec.seed),
        "--output-artifact-dir", str(output), "--export-level", "records", "--ui", "none", "--no-gpu-telemetry",
        "--no-server-metrics",
    ]  # fmt: skip
    if spec.load.num_streams is not None:
        return [*arguments, "--concurrency", str(spec.load.num_streams)]
    # The times are in the data set: the same arrivals as the other drivers'.
    return [*arguments, "--fixed-schedule"]


def _shown(arguments: Sequence[str], directory: str, target: Target) -> str:
    """For the record, without this machine's paths."""
    return shlex.join(["aiperf", *arguments]).replace(directory, "DIR").replace(str(target.engine_dir), "ENGINE")


def read_export(text: str, offset_s: float, spec: PointSpec) -> tuple[list[RequestRecord], int]:
    """Of profile_export.jsonl: the measured requests, and the number of tokens that had no chunk of their own.

    The server sends no chunk for a token that completes no character. Raises `TrtBuildError` where it is no such file.
    """
    try:
        lines = [json.loads(line) for line in text.splitlines() if line.strip()]
        kept = [one for one in lines if one["metadata"].get("benchmark_phase", "profiling") == "profiling"]
        records = [_record(one, offset_s, spec) for one in kept]
    except (ValueError, KeyError, TypeError) as error:
        raise TrtBuildError(f"AIPerf's export is not as its version 0.13 writes it: {error!r}") from error
    merged = sum(max(0, one.output_tokens - len(one.token_times_s)) for one in records if one.error is None)
    return records, merged


def _record(line: Mapping[str, Any], offset_s: float, spec: PointSpec) -> RequestRecord:
    metadata, metrics = line["metadata"], {name: one["value"] for name, one in line["metrics"].items()}
    start, end = (metadata[f"request_{name}_ns"] / _NANOSECONDS + offset_s for name in ("start", "end"))
    # A credit is what allows a request: issued when it is due in an open loop.
    due = (metadata.get("credit_issued_ns") or metadata["request_start_ns"]) / _NANOSECONDS + offset_s
    times: list[float] = []
    if "time_to_first_token" in metrics:
        gaps = [metrics["time_to_first_token"], *metrics.get("inter_chunk_latency", [])]
        times = [start + at / _MILLISECONDS for at in itertools.accumulate(gaps)]
    num_tokens = int(metrics.get("usage_completion_tokens", len(times)))
    prompt_tokens = int(metrics.get("usage_prompt_tokens", spec.isl))
    error = _error(line)
    if error is None and spec.load.kind != "trace":
        error = wrong_lengths(spec.isl, spec.osl, prompt_tokens, num_tokens)
    if error is None and not times:
        error = "failed: no token came"
    return RequestRecord(
        start_s=start,
        send_delay_s=start - due,
        token_times_s=times,
        prompt_tokens=prompt_tokens,
        output_tokens=num_tokens,
        error=error,
        end_s=times[-1] if times and error is None else end,
    )


def _error(line: Mapping[str, Any]) -> str | None:
    if line["metadata"].get("was_cancelled"):
        return "timeout: AIPerf cancelled it"
    error = line.get("error")
    if not error:
        return None
    code, message = error.get("code"), str(error.get("message") or error.get("type"))
    if "timeout" in str(error.get("type")).lower():
        return f"timeout: {message}"
    return f"{_KINDS.get(code, 'failed')}: {message}"
