"""`trtbuild perf watch`: what a running server does, every second, from its metrics port and, on this machine, NVML.

Rates and percentiles are of the time between two readings; percentiles are read off the histograms' buckets by linear
interpolation, as Prometheus' histogram_quantile does, so they are as coarse as the buckets.
"""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from trtbuild.errors import Refused, TrtBuildError
from trtbuild.perf.gpu_reader import GpuReader

if TYPE_CHECKING:
    from rich.console import Group

# A line of Prometheus' text format, version 0.0.4: name{labels} value [timestamp]
_LINE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')
_ESCAPES = {r"\n": "\n", r"\"": '"', r"\\": "\\"}
_LOCAL = ("127.0.0.1", "localhost", "::1")
_MAX_BYTES = 16 << 20
_GAUGES = {
    "active": "trtbuild_requests_active", "waiting": "trtbuild_requests_waiting", "slots_used": "trtbuild_slots_used",
    "slots": "trtbuild_slots_total", "kv_tokens_used": "trtbuild_kv_tokens_used",
    "kv_tokens": "trtbuild_kv_tokens_total",
}  # fmt: skip
_RATES = {
    "finished_per_s": ("finished",), "not_answered_per_s": ("refused", "queue_full", "failed", "timed_out"),
    "cancelled_per_s": ("cancelled",),
}  # fmt: skip
_LATENCIES = {"ttft": "trtbuild_time_to_first_token_seconds", "itl": "trtbuild_inter_token_latency_seconds"}
# Triton's own GPU metrics, where the server is elsewhere; utilisation is a part there.
_TRITON_GPU = {
    "nv_gpu_utilization": ("utilization_percent", 100.0), "nv_gpu_power_usage": ("power_w", 1.0),
    "nv_gpu_memory_used_bytes": ("memory_used_bytes", 1.0),
}  # fmt: skip
Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Reading:
    """The metrics port at one moment: {name: {labels: value}}; `at` is time.monotonic()."""

    at: float
    samples: Mapping[str, Mapping[Labels, float]]

    def of_model(self, name: str, model: str) -> float | None:
        """The sample of that name whose label `model` it is."""
        return next((v for labels, v in self.samples.get(name, {}).items() if ("model", model) in labels), None)

    def buckets(self, name: str, model: str) -> dict[float, float]:
        """{upper bound: requests at or below it}"""
        found = {}
        for labels, value in self.samples.get(f"{name}_bucket", {}).items():
            held = dict(labels)
            if held.get("model") == model and "le" in held:
                found[float(held["le"])] = value
        return found


def parse_metrics(text: str) -> dict[str, dict[Labels, float]]:
    """Prometheus' text format; lines that are not samples are passed over."""
    found: defaultdict[str, dict[Labels, float]] = defaultdict(dict)
    for line in text.splitlines():
        match = None if line.startswith("#") else _LINE.fullmatch(line.strip())
        if match is None:
            continue
        pairs = _LABEL.findall(match[2] or "")
        labels = tuple(
            sorted((name, re.sub(r"\\.", lambda m: _ESCAPES.get(m[0], m[0]), value)) for name, value in pairs)
        )
        try:
            found[match[1]][labels] = float(match[3])
        except ValueError:
            continue
    return dict(found)


def _unescaped(text: str) -> str:
    return re.sub(r"\\.", lambda match: _ESCAPES.get(match[0], match[0]), text)


def read_metrics(url: str, timeout_s: float = 5.0) -> Reading:
    """Raises `TrtBuildError` where nothing answers, or something that is no metrics port."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            text = answer.read(_MAX_BYTES).decode("utf-8", "replace")
    except (OSError, ValueError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", error)
        raise TrtBuildError(f"{url}: {reason}; give the metrics port of a running server (trtbuild serve)") from error
    samples = parse_metrics(text)
    if not any(name.startswith(("trtbuild_", "nv_")) for name in samples):
        raise TrtBuildError(f"{url} answers, but not with Triton's metrics")
    return Reading(time.monotonic(), samples)


def quantile(buckets: Mapping[float, float], part: float) -> float | None:
    """Of cumulative counts by upper bound; None for none. Beyond the last finite bound, that bound."""
    bounds = sorted(buckets)
    if not bounds or buckets[bounds[-1]] <= 0:
        return None
    wanted, below, count = part * buckets[bounds[-1]], 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= wanted:
            if bound == float("inf"):
                return below
            inside = buckets[bound] - count
            return bound if inside <= 0 else below + (bound - below) * (wanted - count) / inside
        below, count = bound, buckets[bound]
    return below


def model_states(before: Reading, now: Reading) -> dict[str, dict[str, float | None]]:
    """Figures of every model with trtbuild_* metrics; a rate is None where its counter began again."""
    models = sorted({dict(labels).get("model", "") for labels in now.samples.get("trtbuild_engine_up", {})})
    return {model: _state(before, now, model) for model in models}


def _state(before: Reading, now: Reading, model: str) -> dict[str, float | None]:
    passed = now.at - before.at

    def rate(name: str) -> float | None:
        old, new = before.of_model(name, model), now.of_model(name, model)
        if new is None or passed <= 0:
            return None
        grown = new - (old or 0.0)
        return grown / passed if grown >= 0 else None

    state: dict[str, float | None] = {"up": now.of_model("trtbuild_engine_up", model)}
    state |= {key: now.of_model(name, model) for key, name in _GAUGES.items()}
    state["output_tokens_per_s"] = rate("trtbuild_generated_tokens_total")
    state["prompt_tokens_per_s"] = rate("trtbuild_prompt_tokens_total")
    for key, parts in _RATES.items():
        rates = [rate(f"trtbuild_requests_{part}_total") for part in parts]
        state[key] = sum(value for value in rates if value is not None)
    for key, name in _LATENCIES.items():
        old, new = before.buckets(name, model), now.buckets(name, model)
        grown = {bound: count - old.get(bound, 0.0) for bound, count in new.items()}
        for part in (50, 99):
            value = quantile(grown, part / 100) if all(count >= 0 for count in grown.values()) else None
            state[f"{key}_p{part}_ms"] = None if value is None else 1e3 * value
    return state


def gpu_states(now: Reading, gpus: GpuReader | None) -> dict[str, dict[str, float | str]]:
    """{"gpu0": {quantity_unit: value}} by NVML, or as the server tells them."""
    found: defaultdict[str, dict[str, float | str]] = defaultdict(dict)
    if gpus is not None and gpus.missing is None:
        for column, value in gpus.read().items():
            name, _, quantity = column.partition("_")
            found[name][quantity] = value
        return dict(found)
    for name, (quantity, factor) in _TRITON_GPU.items():
        for labels, value in now.samples.get(name, {}).items():
            found[dict(labels).get("gpu_uuid", "gpu")][quantity] = value * factor
    return dict(found)


def watch(url: str, interval_s: float, count: int | None, as_json: bool) -> None:
    """Draw until Ctrl-C, or `count` times; `as_json` prints a line each time instead."""
    if interval_s <= 0:
        raise Refused(f"--interval {interval_s:g}: it must be above 0")
    gpus = GpuReader() if urlsplit(url).hostname in _LOCAL else None
    try:
        states = _states(url, interval_s, count, gpus)
        if as_json:
            for state in states:
                click.echo(json.dumps(state))
        else:
            _live(states, url)
    finally:
        if gpus is not None:
            gpus.close()


def _states(url: str, interval_s: float, count: int | None, gpus: GpuReader | None) -> Iterator[dict[str, Any]]:
    before, number = read_metrics(url), 0
    while count is None or number < count:
        time.sleep(interval_s)
        now = read_metrics(url)
        yield {"models": model_states(before, now), "gpus": gpu_states(now, gpus)}
        before, number = now, number + 1


def _live(states: Iterator[dict[str, Any]], url: str) -> None:
    """One picture on a terminal that is drawn over; off it, one after the other."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    if not console.is_terminal:
        for state in states:
            console.print(draw(state, url))
        return
    with Live(console=console, auto_refresh=False, screen=False) as live:
        try:
            for state in states:
                live.update(draw(state, url), refresh=True)
        except KeyboardInterrupt:
            return


def draw(state: Mapping[str, Any], url: str) -> Group:
    """Two tables: models side by side, which fit into 80 columns so, and GPUs where there are any."""
    from rich.console import Group

    lines = [
        (label, *(show(one) for one in state["models"].values()))
        for label, show in (
            ("answers", lambda one: "yes" if one["up"] else "NO"),
            ("requests active + waiting", lambda one: f"{_number(one['active'])} + {_number(one['waiting'])}"),
            ("slots", lambda one: _of(one["slots_used"], one["slots"])),
            ("KV cache, tokens", lambda one: _of(one["kv_tokens_used"], one["kv_tokens"])),
            ("output tokens/s", lambda one: _number(one["output_tokens_per_s"])),
            ("prompt tokens/s", lambda one: _number(one["prompt_tokens_per_s"])),
            ("finished/s", lambda one: _number(one["finished_per_s"])),
            ("refused or failed/s", lambda one: _number(one["not_answered_per_s"])),
            ("cancelled/s", lambda one: _number(one["cancelled_per_s"])),
            ("TTFT p50 / p99, ms", lambda one: f"{_number(one['ttft_p50_ms'])} / {_number(one['ttft_p99_ms'])}"),
            ("ITL p50 / p99, ms", lambda one: f"{_number(one['itl_p50_ms'])} / {_number(one['itl_p99_ms'])}"),
        )
    ]
    tables = [_table(url, ("", *state["models"]), lines)]
    gpus = [
        (
            name, _number(one.get("utilization_percent")), _gib(one.get("memory_used_bytes")),
            *(_number(one.get(key)) for key in ("power_w", "sm_clock_mhz", "temperature_c")),
            str(one.get("throttle_reasons", "")),
        )
        for name, one in state["gpus"].items()
    ]  # fmt: skip
    if gpus:
        tables.append(_table("", ("GPU", "busy, %", "memory, GiB", "W", "SM, MHz", "°C", "throttled by"), gpus))
    return Group(*tables)


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for index, head in enumerate(heads):
        table.add_column(head, justify="right" if index else "left", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    return table


def _number(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _of(used: float | None, total: float | None) -> str:
    return f"{_number(used)} of {_number(total)}"


def _gib(value: float | str | None) -> str:
    return "-" if not isinstance(value, (int, float)) else f"{value / 2**30:.1f}"
