"""What a figure was measured on: the machine, which must be the same for a comparison, and the software."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import socket
from pathlib import Path
from typing import Any

import psutil

from trtbuild import __version__
from trtbuild.workspace import digest_of

_MACHINE_KEYS = ("hostname_digest", "cpu", "cores", "memory_bytes", "gpus")


def environment(triton: str | None = None) -> dict[str, Any]:
    """As in `Point.environment`; the host's name is told by its digest only. None: not installed."""
    return {
        "hostname_digest": hashlib.sha256(socket.gethostname().encode()).hexdigest()[:16],
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": _gpus(),
        "python": platform.python_version(),
        "trtbuild": __version__,
        "triton": triton,
        "torch": _version("torch"),
        "tensorrt_rtx": _version("tensorrt-rtx-cu12"),
        "load_before": round(os.getloadavg()[0], 2),
    }


def machine_digest(found: dict[str, Any]) -> str:
    """Of the hardware alone."""
    return digest_of({key: found[key] for key in _MACHINE_KEYS})


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpus() -> list[dict[str, str]]:
    """Name and driver of each; none where NVML or the driver is missing."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [{"name": pynvml.nvmlDeviceGetName(handle), "driver": driver} for handle in handles]
    finally:
        pynvml.nvmlShutdown()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
