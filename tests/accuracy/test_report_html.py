"""The page: whole without a network, with the record's numbers, and with nothing of the texts taken for HTML."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from trtbuild.accuracy.precision_picture import precision_picture
from trtbuild.accuracy.report_html import layer_figure, render, write_report

EVIL = '<script>alert("x")</script>'


def record(**changes: Any) -> dict[str, Any]:
    run = {
        "way": "again", "prompt": 0, "same_tokens": False, "median_difference": 0.001, "largest_difference": 0.002,
        "largest_logit_difference": 0.25, "parts_at_step": 3, "margin_there": 0.125,
    }  # fmt: skip
    text = {
        "name": EVIL, "sha256": "0", "num_tokens": 512, "num_blocks": 2, "source_ppl": 11.36, "engine_ppl": 12.67,
        "ppl_increase": 0.1153, "ppl_increase_se": 0.01, "mean_kl": 0.11, "p99_kl": 1.5, "max_kl": "nan", "top1": 0.83,
    }  # fmt: skip
    line = {
        "id": EVIL, "prompt": EVIL, "expectation": "exact", "expected": EVIL, "engine": EVIL, "engine_passed": False,
        "source": "</pre>", "source_passed": True, "gates": True,
    }  # fmt: skip
    counts = {"questions": 1, "engine_passed": 0, "source_passed": 1, "both_failed": 0, "gating": 1}
    blocks = [
        {"layer": None, "block": "embed", "precision": "bf16", "errors": [0.0], "limits": [0.01]},
        *(
            {"layer": i, "block": kind, "precision": "int4", "errors": errors, "limits": [0.2] * len(errors)}
            for i in range(2)
            for kind, errors in (("attention", [0.1 + i / 100]), ("expert", [0.1, 0.19, 0.12]))
        ),
        {"layer": None, "block": "head", "precision": "bf16", "errors": [0.0], "limits": [0.01]},
    ]
    return {
        "date": "2026-11-22T10:00:00Z", "trtbuild": "0.1.0", "executor": "reference", "executor_why": EVIL,
        "tensorrt_has_run": False, "device": "cpu", "device_name": "x86_64", "versions": {"torch": "2"},
        "source": {"model": EVIL, "digest": "abc", "lora": [EVIL]}, "precisions": ["int4"], "texts": [text],
        "blocks": blocks, "passed": False, "failures": [f"golden {EVIL}"], "logits": {"rows": 5, "not_finite": 0},
        "invariance": {"ways": [run], "noise_limit": 0.08},
        "golden": {"source_ran": True, "lines": [line], "summary": counts},
        "long_prompt": {"num_tokens": 127, "last_position": 127, "mean_kl": 0.1, "num_compared": 64},
        "limits": {"max_ppl_increase": 0.3, "max_kl": 0.35, "min_top1": 0.7, "max_layer_error": None},
        **changes,
    }  # fmt: skip


def passport(**changes: Any) -> dict[str, Any]:
    return {
        "name": "tiny", "rebuild": f"trtbuild compile {EVIL}", "layout": {"tp": 2}, "accuracy": record(**changes),
        "tensors": {"transformer.layers.0.mlp.fc": {"precision": "int4"}, "transformer.vocab_embedding.weight": "bf16"},
    }  # fmt: skip


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def html() -> str:
    return render(passport())


def test_opens_offline(html: str) -> None:
    page = Page()
    page.feed(html)
    assert [
        a for tag, a in page.tags if tag in ("script", "link", "img", "iframe") and ({"src", "href"} & a.keys())
    ] == []
    assert "Plotly.newPlot" in html
    assert len(html) > 1 << 20
    assert "prefers-color-scheme: dark" in html
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags


def test_texts_and_answers_are_escaped(html: str) -> None:
    assert EVIL not in html
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;" in html
    assert "<pre>&lt;/pre&gt;</pre>" in html
    # Plotly's library, and one call for each of the two figures.
    scripts = re.findall(r"<script[ >]", html.split("</head>")[1])
    assert len(scripts) <= 4


def test_tells_the_numbers(html: str) -> None:
    page = Page()
    page.feed(html)
    text = " ".join(page.text)
    for part in ("failed", "11.36", "12.67", "+11.53 %", "nan", "83.00 %", "to step 3 (margin 0.125)", "0 of 1"):
        assert part in text
    assert "TensorRT has not run" in text
    passed = render(passport(passed=True, failures=[], golden=None))
    assert "checks failed" not in passed
    assert "Golden" not in passed.split("</head>")[1]


def test_cells_have_their_columns_names_for_phones(html: str) -> None:
    page = Page()
    page.feed(html)
    cells = [attributes for tag, attributes in page.tags if tag == "td" and "data-label" in attributes]
    assert [cell["data-label"] for cell in cells[:4]] == ["text", "tokens", "source", "engine"]
    assert [cell.get("class") for cell in cells[:2]] == [None, "number"]
    assert [cell["data-label"] for cell in cells[10:]] == ["way", "same tokens", "median", "largest", "logits"]


def test_bars_are_the_errors_of_the_layers() -> None:
    figure: Any = layer_figure(record())
    bars = {bar.name: (list(bar.x), list(bar.y)) for bar in figure.data if bar.type == "bar"}
    assert bars == {"attention": ([0, 1], [0.1, 0.11]), "expert (worst)": ([0, 1], [0.19, 0.19])}
    [median] = [mark for mark in figure.data if mark.name == "expert (median)"]
    assert list(median.y) == [0.12, 0.12]
    limits = [line for line in figure.data if line.name and line.name.endswith(" limit")]
    assert [list(line.y) for line in limits] == [[0.2, 0.2], [0.2, 0.2]]
    # Marks stand over the bars that they belong to.
    assert figure.layout.scattermode == "group"
    assert {trace.offsetgroup for trace in (*limits, median)} == {"attention", "expert"}


def test_the_picture_has_a_cell_for_every_linear_layer() -> None:
    held = {
        "transformer.layers.0.attention.qkv": "bf16", "transformer.layers.0.mlp.fc": "int4",
        "transformer.layers.1.attention.qkv": "fp8", "transformer.layers.1.mlp.shared_expert.fc": "something new",
        "lm_head": "bf16",
    }  # fmt: skip
    figure: Any = precision_picture(held)
    cells = figure.data[0]
    assert list(cells.x) == [0, 1]
    assert list(cells.y) == ["attention.qkv", "mlp.fc", "mlp.shared_expert.fc"]
    assert [list(row) for row in cells.text] == [["bf16", "fp8"], ["int4", ""], ["", "something new"]]
    legend = [trace.name for trace in figure.data[1:]]
    assert legend == ["int4", "fp8", "bf16", "something new"]
    # Also with one precision, where plotly would leave it out.
    assert figure.layout.showlegend
    assert [[None if code is None else legend[int(code)] for code in row] for row in cells.z] == [
        ["bf16", "fp8"], ["int4", None], [None, "something new"]
    ]  # fmt: skip


def test_written_whole(tmp_path: Path) -> None:
    write_report(tmp_path / "page.html", passport())
    assert (tmp_path / "page.html").read_text() == render(passport())
