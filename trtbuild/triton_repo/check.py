"""The check after packaging: a real Triton must answer as the bare engine does, through all three models.

The engine worker answers first, on its own; then Triton loads the package and is asked the same. Tokens and text must
be equal: greedy decoding is deterministic. The time per token of both is told, as a first look at the overhead;
`perf/` measures it properly.
"""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trtbuild.engines.serving.launch import start_worker
from trtbuild.engines.serving.request import RequestOutput, SamplingParams
from trtbuild.errors import CheckFailed
from trtbuild.progress import ProgressFactory
from trtbuild.triton_repo.client import TritonClient, tensor_values
from trtbuild.triton_repo.installation import TritonInstallation
from trtbuild.triton_repo.model_config import WorkerSettings
from trtbuild.triton_repo.tensors import model_name
from trtbuild.triton_repo.triton_process import Ports, TritonProcess

PROMPT = "Once upon a time, in a city by the sea,"
# The end token does not end it: a model that says nothing would be checked by nothing.
PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)
LOAD_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class CheckResult:
    """Milliseconds are medians between two tokens of one stream on an otherwise idle server."""

    executor: str
    device: str
    triton: str
    num_tokens: int
    text: str
    engine_ms_per_token: float | None
    triton_ms_per_token: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_package(
    repository: Path, name: str, settings: WorkerSettings, installation: TritonInstallation, progress: ProgressFactory
) -> CheckResult:
    """Raises `CheckFailed` where an answer differs, `TrtBuildError` where Triton does not load the package."""
    with progress(f"checking {name}: the engine alone", 1):
        alone = _ask_worker(repository / name / "1" / "engine", settings)
    with (
        progress(f"checking {name}: the same through Triton ({installation.source})", 1),
        TritonProcess(installation, repository, Ports.free()) as server,
    ):
        server.wait_ready(LOAD_TIMEOUT_S)
        with TritonClient(f"127.0.0.1:{server.ports.grpc}") as client:
            triton_gaps = _compare(client, name, alone)
    return CheckResult(
        executor=alone.hello["executor"],
        device=alone.hello["device"],
        triton=installation.source,
        num_tokens=len(alone.output.token_ids),
        text=alone.output.text,
        engine_ms_per_token=_median_ms(alone.gaps),
        triton_ms_per_token=_median_ms(triton_gaps),
    )


@dataclass(frozen=True)
class _Alone:
    """The engine's own answer; gaps are seconds between its tokens."""

    hello: dict[str, Any]
    prompt_ids: list[int]
    output: RequestOutput
    gaps: list[float]


def _ask_worker(engine: Path, settings: WorkerSettings) -> _Alone:
    with (
        start_worker(
            engine, slots=settings.slots, threads=settings.threads, dtype=settings.dtype, executor=settings.executor,
            loader=settings.loader,
        ) as worker,
        worker.connect() as client,
    ):  # fmt: skip
        prompt_ids, _ = client.score(PROMPT)
        # Once to warm up, once to measure.
        client.generate(PROMPT, PARAMS).result()
        output, times = RequestOutput("check"), []
        for event in client.generate(PROMPT, PARAMS):
            times.append(time.perf_counter())
            output.add(event)
        return _Alone(worker.hello, prompt_ids, output, _gaps(times))


def _compare(client: TritonClient, name: str, alone: _Alone) -> list[float]:
    """Ask every model; the times between the streamed tokens."""
    question = {"text_input": PROMPT, **tensor_values(PARAMS)}
    list(client.stream(name, {**question, "stream": True}))
    parts = list(client.stream(name, {**question, "stream": True}))
    _require(name, "".join(part.text for part in parts), alone.output.text)
    unary = model_name(name, "unary")
    _require(unary, client.ask(unary, question).text, alone.output.text)
    tokens = model_name(name, "tokens")
    ids = {"input_ids": alone.prompt_ids, "exclude_input_in_output": True, **tensor_values(PARAMS, "tokens")}
    found = [part.values["output_ids"].reshape(-1).tolist() for part in client.stream(tokens, ids)]
    _require(tokens, found, [alone.output.token_ids])
    return _gaps([part.received_at for part in parts])


def _require(model: str, found: object, expected: object) -> None:
    if found != expected:
        raise CheckFailed(
            f"Triton's model {model} does not answer as the engine does\n  engine: {expected!r}\n  Triton: {found!r}"
        )


def _gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times)]


def _median_ms(gaps: list[float]) -> float | None:
    """None where there was a single token."""
    return round(1000 * statistics.median(gaps), 3) if gaps else None
