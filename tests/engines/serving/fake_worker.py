"""Workers over a fake executor, in processes of their own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from trtbuild.engines.serving.client import WorkerClient
from trtbuild.engines.serving.launch import WorkerProcess, start_worker
from trtbuild.engines.serving.request import SamplingParams

LOADER = "fake_executor:load_fake"
LONG = SamplingParams(max_tokens=300, ignore_eos=True)


def start(name: str = "fake", **options: Any) -> WorkerProcess:
    return start_worker(Path(name), loader=LOADER, threads=1, timeout_s=60, **options)


def wait_for(client: WorkerClient, **gauges: int) -> dict[str, Any]:
    """Poll stats until they show the given values; the test fails after 5 s."""
    deadline = time.monotonic() + 5
    while True:
        stats = client.stats()
        if all(stats[name] == value for name, value in gauges.items()):
            return stats
        assert time.monotonic() < deadline, f"wanted {gauges}, have {stats}"
        time.sleep(0.01)
