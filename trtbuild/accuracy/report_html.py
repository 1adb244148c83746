"""`verify --html`: one self-contained page that opens offline, for eyes and for phones, in light and dark."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from trtbuild.accuracy.gate import blocks_allowed
from trtbuild.accuracy.precision_picture import precision_picture
from trtbuild.html_page import document, section, table
from trtbuild.workspace import write_atomic

if TYPE_CHECKING:
    import plotly.graph_objects as go

_BLOCK_COLOURS = {
    "attention": "#0072B2", "mlp": "#009E73", "expert": "#D55E00", "shared_expert": "#CC79A7", "router": "#E69F00",
}  # fmt: skip


def write_report(file: Path, passport: Mapping[str, Any]) -> None:
    """The page of an engine's record of accuracy; `file` is replaced in one step."""
    write_atomic(file, render(passport).encode())


def render(passport: Mapping[str, Any]) -> str:
    """The whole page. Whatever came from texts, answers or paths is escaped."""
    from plotly.offline import get_plotlyjs

    record = passport["accuracy"]
    name = escape(passport["name"])
    precisions = {linear: held["precision"] for linear, held in (passport["tensors"] or {}).items() if _is_linear(held)}
    parts = [
        _headline(name, record),
        _cards(record),
        _failures(record["failures"]),
        _environment(passport, record),
        _texts(record),
        section("Error of each layer's blocks", _layer_note(record), _plot(layer_figure(record), "layers")),
        section("Precision of each linear layer", "", _plot(precision_picture(precisions), "precision")),
        _executor_checks(record),
        _golden(record["golden"]),
    ]
    return document(f"{name}: accuracy", "".join(parts), head=f"<script>{get_plotlyjs()}</script>")


def layer_figure(record: Mapping[str, Any]) -> go.Figure:
    """Bars: relative error of each block by layer; of experts the worst, their median as a mark; limits as lines."""
    import plotly.graph_objects as go

    figure = go.Figure()
    layers = [block for block in record["blocks"] if block["layer"] is not None]
    for kind in dict.fromkeys(block["block"] for block in layers):
        mine = [block for block in layers if block["block"] == kind]
        errors = [[float(error) for error in block["errors"]] for block in mine]
        x = [block["layer"] for block in mine]
        limits = [max(blocks_allowed(block, record["limits"])) for block in mine]
        colour, title = _BLOCK_COLOURS.get(kind, "#999999"), kind.replace("_", " ")
        many = kind == "expert"
        hover = [f"{title}, {block['precision']}: limit {limit:.3g}" for block, limit in zip(mine, limits, strict=True)]
        name = f"{title} (worst)" if many else title
        figure.add_bar(
            x=x, y=[max(e) for e in errors], name=name, marker_color=colour, hovertext=hover, legendgroup=kind,
            offsetgroup=kind,
        )  # fmt: skip
        if many:
            middle = [median(e) for e in errors]
            marker = {"color": "#56B4E9", "symbol": "line-ew-open", "size": 14, "line": {"width": 3}}
            figure.add_scatter(
                x=x, y=middle, mode="markers", name="expert (median)", marker=marker, offsetgroup=kind, legendgroup=kind
            )
        line = {"color": colour, "dash": "dot", "width": 1}
        figure.add_scatter(
            x=x, y=limits, mode="lines+markers", line=line, marker={"size": 4}, name=f"{title} limit", legendgroup=kind,
            showlegend=False, hoverinfo="skip", offsetgroup=kind,
        )  # fmt: skip
    figure.update_layout(
        template="none", barmode="group", scattermode="group", showlegend=True, height=420,
        margin={"l": 50, "r": 10, "t": 10, "b": 40},
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        xaxis={"title": "decoder layer", "zeroline": False, "dtick": max(1, len({b["layer"] for b in layers}) // 8)},
        yaxis={"title": "relative error", "rangemode": "tozero", "automargin": True},
    )  # fmt: skip
    return figure


def _is_linear(held: Any) -> bool:
    return isinstance(held, dict) and "precision" in held


def _headline(name: str, record: Mapping[str, Any]) -> str:
    verdict = '<span class="good">passed</span>' if record["passed"] else '<span class="bad">failed</span>'
    return (
        f"<h1>{name}: {verdict}</h1>"
        f'<p class="soft">against {escape(str(record["source"]["model"]))} in float32, '
        f'<span style="white-space: nowrap">{escape(record["date"])}</span></p>'
    )


def _cards(record: Mapping[str, Any]) -> str:
    worst = max(record["texts"], key=lambda text: float(text["ppl_increase"]))
    runs = record["invariance"]["ways"]
    cards = [
        ("perplexity", f"{_signed_percent(worst['ppl_increase'])}"),
        ("mean KL, nats", _short(max(float(text["mean_kl"]) for text in record["texts"]))),
        ("top-1 agreement", _percent(min(float(text["top1"]) for text in record["texts"]))),
        ("same answers in batches", f"{sum(run['same_tokens'] for run in runs)} of {len(runs)}"),
        ("logits not finite", str(record["logits"]["not_finite"])),
    ]
    if record["golden"]:
        counts = record["golden"]["summary"]
        cards.append(("golden questions", f"{counts['engine_passed']} of {counts['questions']}"))
    return '<div class="cards">' + "".join(f'<div class="card">{a}<b>{b}</b></div>' for a, b in cards) + "</div>"


def _failures(failures: Sequence[str]) -> str:
    if not failures:
        return ""
    lines = "".join(f"<li>{escape(line)}</li>" for line in failures)
    return f'<h2 class="bad">{len(failures)} checks failed</h2><ul>{lines}</ul>'


def _environment(passport: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    executor = "TensorRT"
    if not record["tensorrt_has_run"]:
        executor = f"reference executor (PyTorch). TensorRT has not run: {record['executor_why']}"
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    rows = [
        ("executor", executor), ("device", f"{record['device']} ({record['device_name']})"), ("versions", versions),
        ("trtbuild", record["trtbuild"]), ("source digest", record["source"]["digest"]),
        ("LoRA", ", ".join(record["source"]["lora"]) or "none"), ("precisions", ", ".join(record["precisions"])),
        ("layout", ", ".join(f"{key} {value}" for key, value in passport["layout"].items())),
        ("rebuild", passport["rebuild"]),
    ]  # fmt: skip
    body = "".join(f"<tr><td>{escape(a)}</td><td>{escape(str(b))}</td></tr>" for a, b in rows)
    return section("Who made these numbers", "", f'<table class="facts">{body}</table>')


def _texts(record: Mapping[str, Any]) -> str:
    limits = record["limits"]
    header = ("text", "tokens", "source", "engine", "increase", "std. error", "KL mean", "KL 99 %", "KL max", "top-1")
    rows = [
        [
            escape(text["name"]), str(text["num_tokens"]), _short(text["source_ppl"]), _short(text["engine_ppl"]),
            _signed_percent(text["ppl_increase"]), _percent(text["ppl_increase_se"]), _short(text["mean_kl"]),
            _short(text["p99_kl"]), _short(text["max_kl"]), _percent(text["top1"]),
        ]
        for text in record["texts"]
    ]  # fmt: skip
    note = (
        f"Allowed: {_percent(limits['max_ppl_increase'])} of perplexity, {limits['max_kl']:g} nats of mean KL "
        f"divergence, {_percent(limits['min_top1'])} top-1 agreement. The standard error is that of the paired "
        "difference."
    )
    return section("Perplexity and next-token distributions", note, table(header, rows, num_text=1, stacked=True))


def _executor_checks(record: Mapping[str, Any]) -> str:
    prompt, invariance = record["long_prompt"], record["invariance"]
    header = ("way", "same tokens", "median", "largest", "logits")
    rows = [
        [
            escape(f"prompt {run['prompt']} {run['way']}"),
            "yes" if run["same_tokens"] else f"to step {run['parts_at_step']} (margin {_short(run['margin_there'])})",
            _short(run["median_difference"]), _short(run["largest_difference"]),
            _short(run["largest_logit_difference"]),
        ]
        for run in invariance["ways"]
    ]  # fmt: skip
    note = (
        "Differences of logits from the prompt alone, median and largest of the steps, as parts of the logits' spread; "
        f"half of the steps must be within {invariance['noise_limit']:g}. The last column is the largest difference of "
        f"one logit. Long prompt: {prompt['num_tokens']} tokens, then to position "
        f"{prompt['last_position']}; mean KL {_short(prompt['mean_kl'])} nats over its last {prompt['num_compared']} "
        f"positions. {record['logits']['rows']} rows of logits, {record['logits']['not_finite']} not finite."
    )
    return section("The same answer wherever it runs", note, table(header, rows, num_text=2))


def _golden(golden: Mapping[str, Any] | None) -> str:
    if not golden:
        return ""
    note = "" if golden["source_ran"] else "The source does not fit into this machine's memory and was not asked."
    return section("Golden questions", note, "".join(_question(line) for line in golden["lines"]))


def _question(line: Mapping[str, Any]) -> str:
    asked = line.get("prompt", json.dumps(line.get("messages"), ensure_ascii=False, indent=1))
    wanted = line["expected"] if isinstance(line["expected"], str) else json.dumps(line["expected"])
    answers = [("engine", line["engine"], line["engine_passed"])]
    if line["source"] is not None:
        answers.insert(0, ("source", line["source"], line["source_passed"]))
    columns = "".join(
        f'<div><span class="{"good" if passed else "bad"}">{who}: {"" if passed else "not "}as expected</span>'
        f"<pre>{escape(answer)}</pre></div>"
        for who, answer, passed in answers
    )
    return (
        f"<p><b>{escape(line['id'])}</b> must be {escape(line['expectation'])} <code>{escape(wanted)}</code></p>"
        f'<pre>{escape(asked)}</pre><div class="answers">{columns}</div>'
    )


def _layer_note(record: Mapping[str, Any]) -> str:
    outer = {block["block"]: float(block["errors"][0]) for block in record["blocks"] if block["layer"] is None}
    return (
        "Every block of the engine on the source's own inputs; dotted lines are the limits of its precision. "
        f"Embedding {_short(outer['embed'])}, head {_short(outer['head'])}."
    )


def _plot(figure: go.Figure, name: str) -> str:
    return figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=name, config={"responsive": True, "displayModeBar": False}
    )


def _short(value: float | str) -> str:
    return f"{float(value):.4g}"


def _percent(value: float | str) -> str:
    return f"{100 * float(value):.2f} %"


def _signed_percent(value: float | str) -> str:
    return f"{100 * float(value):+.2f} %"
