"""Points as a sweep would leave them, by a simple queueing model with known answers, and their run directories."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trtbuild.perf.records import Load, Point, PointSpec

ENVIRONMENT: dict[str, Any] = {
    "hostname_digest": "0123456789abcdef", "cpu": "Intel(R) Xeon(R) Processor", "cores": 2, "memory_bytes": 24 * 2**30,
    "gpus": [], "python": "3.11.7", "trtbuild": "0.1.0", "triton": "2.51.0", "torch": "2.13.0+cpu",
    "tensorrt_rtx": "1.7.1.116", "load_before": 0.4,
}  # fmt: skip
# Step in seconds of one stream, growth for each more, perplexity over the source's.
ENGINES = {"tiny-bf16": (0.010, 0.0006, None), "tiny-fp8": (0.006, 0.0005, 0.004), "tiny-int4": (0.004, 0.0007, 0.031)}
SLOTS = 32


def make_point(
    name: str = "tiny-bf16",
    load: Load | float = 1,
    isl: int = 128,
    osl: int = 64,
    *,
    scale: float = 1.0,
    width: float = 0.02,
    **changes: Any,
) -> Point:
    """`load`: a Load, or a concurrency. `scale`: how much slower all is. `width`: half of the relative intervals."""
    load = load if isinstance(load, Load) else Load("concurrency", load)
    streams = load.value
    step, growth, loss = ENGINES.get(name, (0.005, 0.0005, None))
    itl = scale * (step + growth * min(streams, SLOTS))
    ttft = scale * isl * 2e-4 * max(1.0, streams / 4)
    cycle = ttft + itl * (osl - 1)
    rate = streams / cycle
    spec = PointSpec(name, "native", load, isl, osl)

    def around(value: float, factor: float = 1.0) -> list[float]:
        return [value * (1 - width * factor), value * (1 + width * factor)]

    def metric(value: float) -> dict[str, Any]:
        names = {"mean": 1.0, "p50": 0.99, "p90": 1.1, "p95": 1.15, "p99": 1.3, "max": 1.5}
        found: dict[str, Any] = {name: value * factor for name, factor in names.items()}
        return found | {"ci": {name: around(found[name], 4 if name == "p99" else 1) for name in ("mean", "p50", "p99")}}

    rates = {"requests_per_s": rate, "output_tokens_per_s": rate * osl, "total_tokens_per_s": rate * (isl + osl)}
    text = {"name": "bundled", "ppl_increase": loss, "mean_kl": 0.01, "top1": 0.96}
    values: dict[str, Any] = {
        "point_id": spec.point_id(name, "reference", "machine"), "spec": spec, "valid": True, "why_invalid": None,
        "engine": {
            "name": name, "digest": f"digest of {name}", "precision": name.rpartition("-")[2], "layout": {"tp": 1},
            "accuracy": None if loss is None else {"passed": True, "texts": [text]},
        },
        "executor": "reference", "device": "cpu", "environment": ENVIRONMENT,
        "started_at": "2026-11-22T10:00:00Z", "seconds": 12.5, "num_requests": 48, "num_errors": 0, "errors": {},
        "metrics": {
            "ttft_s": metric(ttft), "itl_s": metric(itl), "tpot_s": metric(itl), "e2e_s": metric(cycle),
            "user_tokens_per_s": metric(1 / itl),
        },
        "throughput": {name: {"mean": value, "ci": around(value)} for name, value in rates.items()},
        "client": {"cpu_share": 0.12, "send_delay_p99_s": 0.001, "saturated": False},
        "telemetry": {"host_cpu_percent": {"mean": 71.0, "max": 99.0}},
        "steady": {"ramp_s": 1.0, "drain_s": 0.5, "kept_requests": 48},
    }  # fmt: skip
    return Point(**{**values, **changes})


def make_sweep(*, scale: float = 1.0, engines: Sequence[str] = tuple(ENGINES)) -> list[Point]:
    """3 engines x 4 concurrencies x 3 ISL x 2 OSL."""
    return [
        make_point(engine, load, isl, osl, scale=scale)
        for engine in engines
        for load in (1, 4, 16, 64)
        for isl in (64, 256, 1024)
        for osl in (32, 128)
    ]


def write_run(directory: Path, points: Sequence[Point], *, telemetry: bool = True) -> Path:
    """A run directory as `perf sweep` leaves it; telemetry has a row every 100 ms for a minute."""
    (directory / "telemetry").mkdir(parents=True)
    sweep = {"name": directory.name, "engines": sorted({point.spec.engine for point in points})}
    content = {"sweep": sweep, "digest": "f" * 64, "command": "trtbuild perf sweep"}
    (directory / "sweep.json").write_text(json.dumps(content))
    (directory / "points.jsonl").write_text("".join(json.dumps(point.to_dict()) + "\n" for point in points))
    for index, point in enumerate(points if telemetry else ()):
        header = "time_s,host_cpu_percent,host_memory_used_bytes,tritonserver_cpu_percent,tritonserver_rss_bytes\n"
        lines = [
            f"{t / 10:.4f},{50 + 40 * math.sin(t / 20 + index):.4g},{2**32 + t * 2**20},{120 if t else ''},{2**30}\n"
            for t in range(600)
        ]
        (directory / "telemetry" / f"{point.point_id}.csv").write_text(header + "".join(lines))
    return directory
