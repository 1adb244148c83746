"""`perf report`: one self-contained page that opens offline, with the choices of workload and SLO made in the browser.

plotly.js lies in the page compressed (1.5 of 4.8 MB); every browser since 2023 unpacks it by itself.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from html import escape
from importlib.resources import files
from typing import Any

from trtbuild.html_page import document, section
from trtbuild.perf.records import Point
from trtbuild.perf.report_rows import Row

# Key, heading; those after them are in the CSV's order and shown on request.
_MAIN = {
    "series": "engine", "load": "load", "isl": "ISL", "osl": "OSL", "valid": "valid",
    "output_tokens_per_s": "out tokens/s", "requests_per_s": "requests/s", "user_tokens_per_s_mean": "user tokens/s",
    "ttft_p50_ms": "TTFT p50, ms", "ttft_p99_ms": "TTFT p99, ms", "itl_p50_ms": "ITL p50, ms",
    "itl_p99_ms": "ITL p99, ms", "e2e_p50_ms": "end-to-end p50, ms", "goodput_per_s": "goodput/s",
    "num_errors": "errors", "ppl_increase_percent": "perplexity, +%", "energy_per_token_j": "J/token",
}  # fmt: skip
_HEAT_METRICS = {
    "output_tokens_per_s": "output tokens/s", "ttft_p50_ms": "TTFT p50, ms", "ttft_p99_ms": "TTFT p99, ms",
    "itl_p50_ms": "ITL p50, ms", "itl_p99_ms": "ITL p99, ms", "e2e_p50_ms": "end-to-end p50, ms",
    "user_tokens_per_s_mean": "user tokens/s", "energy_per_token_j": "J/token",
}  # fmt: skip
_DEFINITIONS = (
    "TTFT: from sending a request to its first token. ITL: the gaps between the tokens of one stream, of all streams "
    "together. Speed for each user: 1 / the mean gap of a request. Requests of the ramp and of the drain are left out. "
    "Bands and bars are bootstrap intervals of 95 % over requests: they know nothing of differences between runs."
)


@dataclass(frozen=True)
class ReportRun:
    """What of a run goes into the page besides its rows; `telemetry` is `report_telemetry.read_telemetry`'s."""

    name: str
    points: Sequence[Point]
    sweep: Mapping[str, Any]
    telemetry: Mapping[str, Any] = field(default_factory=dict)


def render(runs: Sequence[ReportRun], rows: Sequence[Row], notes: Iterable[str] = ()) -> str:
    """The whole page. `notes` says what is missing in the plots, such as the roofline of a CPU."""
    title = "Performance: " + ", ".join(escape(run.name) for run in runs)
    telemetry = {key: held for run in runs for key, held in run.telemetry.items()}
    slo = next((point.slo for run in runs for point in run.points if point.slo), None)
    data = {"rows": rows, "columns": _columns(rows), "telemetry": telemetry, "slo": slo}
    content = [
        f"<h1>{title}</h1>",
        _banner(rows),
        _cards(rows),
        _best(),
        _plots(notes, _why_no_gpu(runs)),
        _table(),
        section("Environment", "", "".join(_environment(run) for run in runs)),
        section("What the figures mean", "", f'<p class="soft">{_DEFINITIONS}</p>'),
        "<noscript><p class='bad'>Plots and table need JavaScript; points.csv has the same figures.</p></noscript>",
        _scripts(data),
    ]
    return document(title, "".join(content), head=f"<style>{_asset('report.css')}</style>")


def _banner(rows: Sequence[Row]) -> str:
    """Who produced the numbers; the reference executor is never taken for TensorRT."""
    executors = sorted({str(row["executor"]) for row in rows})
    devices = ", ".join(sorted({str(row["device"]) for row in rows})) or "nothing measured"
    said = {"reference": "the reference executor (PyTorch), not TensorRT", "tensorrt": "TensorRT"}
    who = " and ".join(said.get(name, name) for name in executors) or "no executor"
    days = sorted({str(row["started_at"])[:10] for row in rows})
    span = "" if not days else f", {days[0]}" if len(days) == 1 else f", {days[0]} to {days[-1]}"
    return f'<p class="soft">Measured with {escape(who)} on {escape(devices)}{escape(span)}.</p>'


def _cards(rows: Sequence[Row]) -> str:
    valid = [row for row in rows if row["valid"]]
    fastest = max((row["output_tokens_per_s"] or 0 for row in valid), default=0)
    first = min((row["ttft_p50_ms"] for row in valid if row["ttft_p50_ms"] is not None), default=None)
    cards = [
        ("engines", str(len({row["engine"] for row in rows}))), ("points", str(len(rows))),
        ("invalid points", str(len(rows) - len(valid))),
        ("failed requests", str(sum(row["num_errors"] or 0 for row in rows))),
        ("most output tokens/s", f"{fastest:.4g}"), ("lowest TTFT p50", "none" if first is None else f"{first:.4g} ms"),
    ]  # fmt: skip
    return (
        '<div class="cards">' + "".join(f'<div class="card">{a}<b>{escape(b)}</b></div>' for a, b in cards) + "</div>"
    )


def _best() -> str:
    fields = "".join(
        f'<label>{label} ≤, ms<input type="number" id="slo-{name}" min="0" step="any" placeholder="any"></label>'
        for name, label in (("ttft", "TTFT"), ("itl", "ITL"), ("tpot", "time per token"), ("e2e", "end to end"))
    )
    statistics = "".join(f"<option>{name}</option>" for name in ("p99", "p95", "p90", "p50", "mean"))
    controls = (
        '<label>ISL → OSL<select id="lengths"></select></label><label>load<select id="kind"></select></label>'
        f'{fields}<label>held by<select id="statistic">{statistics}</select></label>'
        '<label class="check"><input type="checkbox" id="log"> logarithmic</label>'
    )
    head = "".join(
        f"<th{kind}>{name}</th>"
        for name, kind in (
            ("engine", ""), ("at", ""), ("out tokens/s", ' class="number"'), ("user tokens/s", ' class="number"'),
            *((f"{name}, ms", ' class="number"') for name in ("TTFT", "ITL", "per token", "end to end")),
            ("perplexity, +%", ' class="number"'),
        )
    )  # fmt: skip
    table = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody id="ranking"></tbody></table></div>'
    note = "Give the bounds that your users need; the best point of every engine that meets them stands below."
    return section(
        "Best engine under an SLO",
        note,
        f'<div class="panel controls">{controls}</div><div id="answer" class="answer"></div>{table}',
    )


def _why_no_gpu(runs: Sequence[ReportRun]) -> str:
    """What the points say of GPU telemetry that they lack."""
    found = {
        point.notes["no_gpu_telemetry"] for run in runs for point in run.points if "no_gpu_telemetry" in point.notes
    }
    return "".join(f"No GPU telemetry: {why}. " for why in sorted(found)).strip()


def _plots(notes: Iterable[str], why_no_gpu: str) -> str:
    metrics = "".join(f'<option value="{key}">{name}</option>' for key, name in _HEAT_METRICS.items())
    heat = (
        '<div class="controls"><label>engine<select id="heat-series"></select></label>'
        f'<label>figure<select id="heat-metric">{metrics}</select></label>'
        '<label>OSL<select id="heat-osl"></select></label></div>'
    )
    point = '<div class="controls"><label>point<select id="telemetry-point"></select></label></div>'
    said = "".join(f'<p class="note">No roofline: {escape(note)}.</p>' for note in notes)
    return "".join(
        section(title, note, f'{before}{_plot(name)}{said if name == "speeds" else ""}')
        for name, title, note, before in (
            ("speeds", "Throughput against speed for each user", "Lines are Pareto fronts; pale points miss the SLO.",
             ""),
            ("ttft", "Time to first token", "p50 (solid) and p99 (dotted), with their intervals.", ""),
            ("itl", "Inter-token latency", "p50 (solid) and p99 (dotted), with their intervals.", ""),
            ("heat", "Input length × load", "", heat),
            ("accuracy", "Accuracy against throughput", "The best point of every engine under the SLO.", ""),
            ("telemetry", "Telemetry over time", why_no_gpu, point),
        )
    )  # fmt: skip


def _plot(name: str) -> str:
    return f'<div class="plot" id="{name}"></div><p class="note" id="{name}-empty"></p>'


def _table() -> str:
    controls = (
        '<div class="controls"><label>filter<input type="search" id="filter" placeholder="int4 ttft_p99_ms&lt;500">'
        '</label><label class="check"><input type="checkbox" id="all-columns"> all columns</label>'
        '<span class="soft" id="count"></span></div>'
    )
    table = '<div class="wide scroll"><table id="points"><thead></thead><tbody></tbody></table></div>'
    note = (
        "A click on a heading sorts; the filter takes words and conditions on the columns of points.csv (hover over a "
        "heading for its name). Invalid points are red, and say why when pointed at."
    )
    return section("Every point", note, controls + table)


def _columns(rows: Sequence[Row]) -> list[dict[str, Any]]:
    keys = dict.fromkeys([*_MAIN, *(key for row in rows for key in row)])
    columns = []
    for key in keys:
        values = [row[key] for row in rows if row.get(key) is not None]
        if not values:
            continue
        number = not any(isinstance(value, (str, bool)) for value in values)
        columns.append({"key": key, "label": _MAIN.get(key, key), "main": key in _MAIN, "number": number})
    return columns


def _environment(run: ReportRun) -> str:
    """One table for each machine and set of versions that the run's points name."""
    groups: dict[str, tuple[dict[str, Any], list[float]]] = {}
    for point in run.points:
        held = {key: value for key, value in point.environment.items() if key != "load_before"}
        _, loads = groups.setdefault(json.dumps(held, sort_keys=True), (held, []))
        before = point.environment.get("load_before")
        loads += [] if before is None else [float(before)]
    parts = [f"<h3>{escape(run.name)}</h3>"]
    for held, loads in groups.values():
        lines = {key.replace("_", " "): _said(value) for key, value in held.items() if value is not None}
        if loads:
            lines["load before a point"] = f"{min(loads):.2f} to {max(loads):.2f}"
        lines |= {f"sweep: {key}": _said(value) for key, value in run.sweep.items() if value not in (None, [], {})}
        body = "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in lines.items())
        parts.append(f'<table class="facts">{body}</table>')
    return "".join(parts)


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_said(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_said(item) for item in value) or "none"
    return str(value)


def _scripts(data: Mapping[str, Any]) -> str:
    # "<" is never text that ends a script here.
    held = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return (
        f'<script type="text/plain" id="plotly">{_plotly()}</script><script>const DATA = {held};</script>'
        f"<script>{_asset('report.js')}</script><script>{_asset('table.js')}</script>"
        f"<script>{_asset('start.js')}</script>"
    )


def _asset(name: str) -> str:
    return (files("trtbuild.perf") / "page" / name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()
