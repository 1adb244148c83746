"""Time and memory of a piece of work in this process; for perf/accuracy.py's children, whatever Python runs them."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
_POLL_SECONDS = 0.01


def status_bytes(field: str) -> int:
    """A field of /proc/self/status that is in kB: RssAnon, VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    sys.exit(f"/proc/self/status has no {field}; this benchmark takes Linux")


def measured(work: Callable[[], T]) -> tuple[T, dict[str, float]]:
    """What `work` returns, and its seconds, CPU seconds (with ended children's), and memory in bytes.

    `peak_anon_bytes` is the largest RssAnon (polled), with `base_anon_bytes` of the interpreter and its imports in it;
    `peak_rss_bytes` is the kernel's high-water mark, pages of mapped files included.
    """
    base = peak = status_bytes("RssAnon")
    stop = threading.Event()

    def poll() -> None:
        nonlocal peak
        while not stop.wait(_POLL_SECONDS):
            peak = max(peak, status_bytes("RssAnon"))

    thread = threading.Thread(target=poll)
    thread.start()
    started, cpu = time.perf_counter(), sum(os.times()[:4])
    try:
        result = work()
    finally:
        stop.set()
        thread.join()
    figures = {
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(sum(os.times()[:4]) - cpu, 2),
        "base_anon_bytes": base,
        "peak_anon_bytes": max(peak, status_bytes("RssAnon")),
        "peak_rss_bytes": status_bytes("VmHWM"),
    }
    return result, figures


def versions(*names: str) -> dict[str, str]:
    """Of the packages that are installed here."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def read_job() -> dict[str, Any]:
    """The child's job, by the file that its command line names."""
    return json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))


def write_result(result: dict[str, Any]) -> None:
    """Into the file that the command line names second."""
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
