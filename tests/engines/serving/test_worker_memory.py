"""What a worker keeps of the requests that it has served: nothing that grows with their number."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_executor import TINY_MIXTRAL, FakeEngine, FakeExecutor
from transformers import AutoTokenizer

from trtbuild.engines.serving import worker
from trtbuild.engines.serving.client import Prompt, WorkerClient
from trtbuild.engines.serving.launch import start_worker
from trtbuild.engines.serving.request import SamplingParams, ServerLimits
from trtbuild.engines.serving.server import WorkerServer
from trtbuild.errors import DeadlineExceeded, Refused

MIB = 2**20


def test_products_of_many_shapes_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a bound each new length costs 0.5 MiB where oneDNN computes bfloat16 (x86 with AVX512, Arm)."""
    for name in worker.SHAPE_CACHES:
        monkeypatch.delenv(name, raising=False)
    loader = "fake_executor:load_products"
    with start_worker(Path("products"), loader=loader, threads=1, timeout_s=60) as running, running.connect() as client:
        process = psutil.Process(running.process.pid)

        def resident_after(num_tokens: range) -> float:
            for length in num_tokens:
                # Each with a token of its own, so that no slot has a beginning of it.
                output = client.generate([length % 1000] * length, SamplingParams(max_tokens=1)).result()
                assert output.usage is not None and output.usage.reused_tokens == 0
            return process.memory_info().rss / MIB

        few, many = resident_after(range(1, 513)), resident_after(range(513, 1025))
    assert many - few < 64, f"{few:.0f} MiB after 512 shapes, {many:.0f} MiB after 1024"


def test_who_sets_the_bounds_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"LRU_CACHE_CAPACITY": "7"}
    monkeypatch.setattr(os, "environ", values)
    worker._bound_shape_caches()
    assert values == {"LRU_CACHE_CAPACITY": "7", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256"}


class Served:
    """A worker's server in this process, so that its objects can be counted."""

    def __init__(self, socket_path: Path) -> None:
        self.executor = FakeExecutor(4, max_seq_len=400, chunk_size=16, vocab_size=1024)
        self.socket_path = socket_path
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._ready.wait(30)

    async def _serve(self) -> None:
        engine = FakeEngine(self.executor, AutoTokenizer.from_pretrained(TINY_MIXTRAL))
        server = WorkerServer(engine, ServerLimits(drain_s=5.0))
        await server.serve(self.socket_path, lambda _: self._ready.set())

    def close(self) -> None:
        with WorkerClient(self.socket_path) as client:
            client.shutdown()
        self._thread.join(timeout=30)

    def count(self) -> tuple[Counter[str], int]:
        """(live containers by type, allocated blocks)."""
        self.executor.calls.clear()
        gc.collect()
        return Counter(type(found).__name__ for found in gc.get_objects()), sys.getallocatedblocks()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    running = Served(tmp_path / "socket")
    yield running
    running.close()


NUM_EARLY = 20
MESSAGES = [{"role": "user", "content": "Who is there?"}]
ANSWERED: list[tuple[Prompt, dict[str, Any]]] = [
    ("To be, 你好", {}),
    ([5, 6, 7], {"temperature": 0.8, "seed": 3}),
    (MESSAGES, {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.01}),
    ("again", {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5}),
    ("logs", {"logprobs": 3}),
    ("stop", {"stop": ("q", "zz"), "stop_token_ids": (9,), "min_tokens": 2}),
    ("bad", {"bad": ("e", "the"), "bad_token_ids": ((4, 5),)}),
    ("json", {"guide_type": "json"}),
    ("digits", {"guide_type": "regex", "guide": "[0-9]{2,5}"}),
]


def ask_everything(socket_path: Path, client: WorkerClient, tag: str) -> int:
    """Requests of every kind and end, each prompt new to the worker; how many."""
    prompts = [f"{prompt} {tag}" if isinstance(prompt, str) else prompt for prompt, _ in ANSWERED]
    streams = [
        client.generate(prompt, SamplingParams(max_tokens=8, **values), request_id=f"{tag}-{index}")
        for index, (prompt, (_, values)) in enumerate(zip(prompts, ANSWERED, strict=True))
    ]
    for stream in streams:
        assert stream.result().finish_reason in ("length", "stop")
    client.score(f"Score {tag}")
    endless = SamplingParams(max_tokens=300, ignore_eos=True)
    with client.generate("Cancelled", endless) as left:
        next(left)
    for _ in range(NUM_EARLY):
        client.generate("Cancelled before it is tokenized", endless).close()
    with pytest.raises(Refused):
        client.generate([1024], endless).result()
    with pytest.raises(DeadlineExceeded):
        client.generate("Late", SamplingParams(deadline_s=1e-6)).result()
    with WorkerClient(socket_path) as gone:
        next(gone.generate("Left behind", endless))
    while client.stats()["active"]:
        pass
    return len(streams) + 5 + NUM_EARLY


def test_nothing_is_kept_of_a_request(served: Served) -> None:
    """Of any kind, however it ended. Caches fill and are full; what is kept of each request grows in every batch."""
    grown, before, num_requests = [], served.count(), 0
    with WorkerClient(served.socket_path) as client:
        for batch in range(20):
            num_requests = sum(ask_everything(served.socket_path, client, f"{batch} {index}") for index in range(10))
            after = served.count()
            kinds = {name: count - before[0][name] for name, count in after[0].items() if count > before[0][name]}
            grown.append((kinds, after[1] - before[1]))
            before = after
            if sum(kinds.values()) < num_requests / 6 and grown[-1][1] < num_requests / 5:
                return
    raise AssertionError(f"each {num_requests} requests left containers and blocks: {grown}")
