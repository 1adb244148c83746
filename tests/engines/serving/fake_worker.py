"""Workers over a fake executor, in processes of their own, and what they must answer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fake_executor import TINY_MIXTRAL, FakeExecutor
from transformers import AutoTokenizer

from trtbuild.engines.serving.client import WorkerClient
from trtbuild.engines.serving.detokenizer import decoder_of
from trtbuild.engines.serving.launch import WorkerProcess, start_worker
from trtbuild.engines.serving.request import Request, RequestOutput, SamplingParams
from trtbuild.engines.serving.scheduler import Scheduler

LOADER = "fake_executor:load_fake"
TOKENIZER = AutoTokenizer.from_pretrained(TINY_MIXTRAL)
LONG = SamplingParams(max_tokens=300, ignore_eos=True)


def start(name: str = "fake", **options: Any) -> WorkerProcess:
    return start_worker(Path(name), loader=LOADER, threads=1, timeout_s=60, **options)


def alone(prompt: str | list[int], params: SamplingParams) -> RequestOutput:
    """The scheduler's answer with nobody beside it."""
    ids = TOKENIZER.encode(prompt) if isinstance(prompt, str) else prompt
    executor = FakeExecutor(4, max_seq_len=400, chunk_size=16, vocab_size=1024)
    scheduler = Scheduler(executor, eos_token_ids=[2], decode_text=decoder_of(TOKENIZER))
    return scheduler.run([Request("alone", ids, params)])[0]


def wait_for(client: WorkerClient, **gauges: int) -> dict[str, Any]:
    """Poll stats until they show the given values; the test fails after 5 s."""
    deadline = time.monotonic() + 5
    while True:
        stats = client.stats()
        if all(stats[name] == value for name, value in gauges.items()):
            return stats
        assert time.monotonic() < deadline, f"wanted {gauges}, have {stats}"
        time.sleep(0.01)
