"""Serving under load, for minutes: `make soak`.

TRTBUILD_SOAK_SECONDS (300), TRTBUILD_SOAK_CANCELLATIONS (1000) and TRTBUILD_SOAK_BAD_REQUESTS (1000) make it shorter.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bad_requests import GrpcCaller, HttpCaller, bad_grpc_request, bad_http_request
from engine_without_plans import make_engine
from load_client import Clients, MemoryWatch, grpc_and_leave, http_and_leave, killed_client
from served import Service

from trtbuild.triton_repo.client import TritonClient
from trtbuild.triton_repo.model_config import WorkerSettings
from trtbuild.triton_repo.package import package_engines
from trtbuild.workspace import Workspace

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("TRTBUILD_SOAK_SECONDS", "300"))
NUM_CANCELLATIONS = int(os.environ.get("TRTBUILD_SOAK_CANCELLATIONS", "1000"))
NUM_BAD_REQUESTS = int(os.environ.get("TRTBUILD_SOAK_BAD_REQUESTS", "1000"))
NUM_STREAMS, NUM_QUESTIONS = 128, 32
WARM_UP = 1 / 2
PERF = Path(__file__).parents[2] / "perf"


def question_of(index: int) -> dict[str, Any]:
    """Every other one greedy, the others drawn with a seed; none ends by itself."""
    values: dict[str, Any] = {
        "text_input": f"{index} times upon a time, 你好, in a city by the sea,",
        "max_tokens": 24 + 4 * index,
        "stream": True,
        "ignore_eos": True,
    }
    return values | ({"temperature": 0.8, "seed": index} if index % 2 else {})


QUESTIONS = [question_of(index) for index in range(NUM_QUESTIONS)]


@pytest.fixture(scope="module")
def real_service(tmp_path_factory: pytest.TempPathFactory, importable_loader: None) -> Iterator[Service]:
    """tiny-mixtral by the reference executor, a slot for each stream."""
    yield from served(tmp_path_factory.mktemp("real"), WorkerSettings(slots=NUM_STREAMS, threads=1))


@pytest.fixture(scope="module")
def fixed_service(tmp_path_factory: pytest.TempPathFactory, importable_loader: None) -> Iterator[Service]:
    """Steps of 20 ms, slots to spare; what is asked for in thousands of tokens runs until it is cancelled."""
    settings = WorkerSettings(loader="fixed_step:load_20ms", slots=64, threads=1, max_queue=64)
    yield from served(tmp_path_factory.mktemp("fixed"), settings)


def served(workspace: Path, settings: WorkerSettings) -> Iterator[Service]:
    make_engine(workspace, "mixtral", model="tiny-mixtral", precision="fp8", max_batch_size=4)
    package_engines(Workspace(workspace), ["mixtral"], settings, installation=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(PERF), os.environ["PYTHONPATH"]]))
        service = Service(workspace)
    yield service
    assert service.close() == 0


def test_many_streams_for_minutes(real_service: Service) -> None:
    """No error, no lost or doubled token, memory flat; each of the 128 streams as it is alone, response by response."""
    num_streams, num_tokens, watch = asyncio.run(run_streams(real_service))
    lines, growing = watch.judge(WARM_UP)
    print(f"{num_streams} streams, {num_tokens} tokens in {SECONDS:g} s", *lines, sep="\n")  # noqa: T201
    real_service.wait_for_metrics(requests_active=0, requests_waiting=0, slots_used=0, requests_cancelled_total=0)
    assert num_streams > NUM_STREAMS
    assert SECONDS < 120 or not growing, growing


async def run_streams(service: Service) -> tuple[int, int, MemoryWatch]:
    """(streams answered, their tokens, the memory beside them); raises at the first answer that is not the solo one."""
    clients, watch, draw = Clients(service.url), MemoryWatch(service), random.Random(5)
    alone = [await clients.answer(values) for values in QUESTIONS]
    assert [len(texts) for texts in alone] == [values["max_tokens"] for values in QUESTIONS]
    assert len({"".join(texts) for texts in alone}) == NUM_QUESTIONS
    end, counts = time.monotonic() + SECONDS, [0, 0]

    async def ask_on() -> None:
        while time.monotonic() < end:
            index = draw.randrange(NUM_QUESTIONS)
            texts = await clients.answer(QUESTIONS[index])
            assert texts == alone[index], f"question {index} is answered otherwise under load"
            counts[0] += 1
            counts[1] += len(texts)

    watching = asyncio.ensure_future(watch.run())
    try:
        await asyncio.gather(*(ask_on() for _ in range(NUM_STREAMS)))
    finally:
        watching.cancel()
        await clients.close()
    return counts[0], counts[1], watch


def test_a_thousand_cancellations_leave_every_slot_free(fixed_service: Service) -> None:
    """At random times, before the first token too, by gRPC's cancel, HTTP's disconnect and killed client processes."""
    service = fixed_service
    pids = MemoryWatch(service).pids
    before = service.wait_for_metrics(requests_active=0)
    kinds = asyncio.run(leave_many(service))
    left_at = time.monotonic()
    found = service.wait_for_metrics(requests_active=0, requests_waiting=0, slots_used=0, kv_tokens_used=0)
    free_after_s = time.monotonic() - left_at
    cancelled = found["requests_cancelled_total"] - before["requests_cancelled_total"]
    print(f"{dict(kinds)}: {cancelled:.0f} cancelled in the engine, all slots free after {free_after_s:.1f} s")  # noqa: T201
    # Of those that leave at once, some are gone before the engine hears of them.
    assert 0.7 * kinds.total() < cancelled <= kinds.total()
    assert free_after_s < 5
    assert MemoryWatch(service).pids == pids
    with TritonClient(service.url) as client:
        for _ in range(3):
            assert len(list(client.stream("mixtral", {**question_of(0), "max_tokens": 5}))) == 5


async def leave_many(service: Service) -> Counter[str]:
    """How many of which kind; at most forty at once."""
    clients, draw, room = Clients(service.url), random.Random(11), asyncio.Semaphore(40)
    values = {"text_input": "Leave me", "max_tokens": 3000, "stream": True, "ignore_eos": True}
    kinds: Counter[str] = Counter()

    async def leave(kind: str, after_s: float) -> None:
        async with room:
            if kind == "grpc":
                await grpc_and_leave(clients, values, after_s)
            elif kind == "http":
                await http_and_leave(service.ports.http, values, after_s)
            else:
                await killed_client(service, values, 5, after_s, grpc=kind == "killed grpc")

    leaving = []
    while kinds.total() < NUM_CANCELLATIONS:
        kind = draw.choices(["grpc", "http", "killed grpc", "killed http"], [600, 350, 4, 6])[0]
        kinds[kind] += 5 if kind.startswith("killed") else 1
        leaving.append(leave(kind, draw.choice([draw.uniform(0, 0.02), draw.uniform(0, 1.0)])))
    await asyncio.gather(*leaving)
    await clients.close()
    return kinds


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_thousand_bad_requests_are_told_so(fixed_service: Service, protocol: str) -> None:
    """A clear error for each, and the next good request is answered as ever, by the same processes."""
    service, draw = fixed_service, random.Random(3)
    pids = MemoryWatch(service).pids
    caller = GrpcCaller(service.url) if protocol == "grpc" else HttpCaller(service.ports.http)
    make = bad_grpc_request if protocol == "grpc" else bad_http_request
    outcomes: Counter[str] = Counter()
    problems: list[str] = []
    expected = caller.good()
    for index in range(NUM_BAD_REQUESTS):
        name, request = make(draw)
        status, message = caller.send(request)
        outcomes[f"{name}: {status}"] += 1
        if status in ("OK", "200") or len(message) < 8 or "healthy" in message:
            problems.append(f"{index} {name}: {status} {message[:300]}")
        assert caller.good() == expected, f"after {index} {name}: {message[:300]}"
    caller.close()
    print(*(f"{count:4} {outcome}" for outcome, count in sorted(outcomes.items())), sep="\n")  # noqa: T201
    assert MemoryWatch(service).pids == pids, "something was started again"
    assert not problems, "\n".join(problems[:20])
    service.wait_for_metrics(requests_active=0, slots_used=0)
