"""The report: its rows have the points' figures, its page opens offline, and in a real Chromium it answers."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from engine_without_plans import make_engine
from perf_points import ENVIRONMENT, make_point, make_sweep, write_run

from trtbuild.cli import main
from trtbuild.engines.passport import Passport, verified_digest, write_accuracy
from trtbuild.errors import Refused
from trtbuild.perf.ceiling import Ceilings, gpu_of
from trtbuild.perf.chromium import find_chromium, open_page, screenshot
from trtbuild.perf.records import Load, Point
from trtbuild.perf.report import write_report
from trtbuild.perf.report_html import ReportRun, render
from trtbuild.perf.report_rows import make_rows, pareto_front

EVIL = '</script><script>alert("x")</script>'
TINY_QWEN2 = str(Path(__file__).parents[1] / "checkpoints" / "tiny-qwen2")
CHROMIUM = find_chromium()
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH (apt-get install chromium)")


def points_with_an_invalid_one() -> list[Point]:
    points = make_sweep()
    points[-1] = replace(points[-1], valid=False, why_invalid=f"the client was saturated {EVIL}")
    return points


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("runs") / "tiny", points_with_an_invalid_one())
    return write_report([run], run, run / "engines", pictures=False).page


def test_rows_have_the_points_figures() -> None:
    point = make_point("tiny-fp8", 16)
    (row,) = make_rows({"run": [point]})
    assert row["ttft_p99_ms"] == pytest.approx(1e3 * point.metrics["ttft_s"]["p99"], rel=1e-5)
    assert row["ttft_p99_ms_low"] == pytest.approx(1e3 * point.metrics["ttft_s"]["ci"]["p99"][0], rel=1e-5)
    assert row["output_tokens_per_s"] == pytest.approx(point.throughput["output_tokens_per_s"]["mean"], rel=1e-5)
    assert row["user_tokens_per_s_mean"] == pytest.approx(point.metrics["user_tokens_per_s"]["mean"], rel=1e-5)
    assert (row["ppl_increase_percent"], row["top1_percent"]) == (0.4, 96.0)
    assert (row["series"], row["load"], row["host_cpu_percent"]) == ("tiny-fp8", "c16", 71.0)


def test_series_name_what_differs() -> None:
    one, other = make_point(), make_point(executor="tensorrt")
    assert [row["series"] for row in make_rows({"a": [one], "b": [one]})] == ["tiny-bf16 · a", "tiny-bf16 · b"]
    names = {row["series"] for row in make_rows({"a": [one, other]})}
    assert names == {"tiny-bf16 · reference", "tiny-bf16 · tensorrt"}


def test_the_front_is_what_nothing_dominates() -> None:
    rows = [{"x": x, "y": y} for x, y in ((1, 10), (2, 9), (2, 5), (3, 9.5), (4, 1), (4, 1), (0.5, 10))]
    assert [(row["x"], row["y"]) for row in pareto_front(rows, "x", "y")] == [(4, 1), (3, 9.5), (1, 10)]
    points = [make_point(load=load) for load in (1, 4, 16)]
    points[1] = replace(points[1], valid=False, why_invalid="x")
    assert [row["pareto"] for row in make_rows({"run": points})] == [True, False, True]


def test_what_was_not_measured_is_empty_and_never_zero() -> None:
    empty = make_point(valid=False, why_invalid="the server died", metrics={}, throughput={}, telemetry={}, client={})
    (row,) = make_rows({"run": [empty]})
    for key in ("output_tokens_per_s", "ttft_p50_ms", "itl_p99_ms", "energy_per_token_j", "goodput_per_s"):
        assert row[key] is None
    assert "gpu_power_w" not in row
    empty.notes["no_gpu_telemetry"] = "NVML does not answer (Driver Not Loaded): no GPU was read"
    html = render([ReportRun("run", [empty], {})], [row])
    assert "the server died" in html
    assert "No GPU telemetry: NVML does not answer (Driver Not Loaded)" in html


def test_the_csv_has_every_point(page: Path) -> None:
    with (page.parent / "points.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 72
    first = make_sweep()[0]
    assert float(rows[0]["requests_per_s"]) == pytest.approx(first.throughput["requests_per_s"]["mean"], rel=1e-5)
    assert [row["valid"] for row in rows].count("False") == 1


def test_the_page_is_small_and_needs_no_network(page: Path) -> None:
    html = page.read_text()
    assert len(html) < 5e6
    head = re.sub(r'<script type="text/plain" id="plotly">[^<]*</script>', "", html)
    assert not re.search(r'(src|href)\s*=\s*["\']?(https?:|//)', head)
    assert "reference executor (PyTorch), not TensorRT" in html
    assert EVIL not in html


def test_a_cpu_has_no_roofline_and_that_is_said(page: Path) -> None:
    assert "No roofline: measured on a CPU" in page.read_text()


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80"), ("NVIDIA H100 PCIe", "h100-pcie"), ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"), ("NVIDIA L40S", "l40s"), ("NVIDIA L4", "l4"), ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000"),
        ("NVIDIA H100 NVL", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA A100 80GB PCIe", None),
    ],
)  # fmt: skip
def test_products_as_nvml_names_them(name: str, key: str | None) -> None:
    gpu = gpu_of(name)
    assert (gpu.name if gpu else None) == key


def on_gpu(name: str, load: Load | float = 4, gpu: str = "NVIDIA L4", **changes: Any) -> Point:
    found = ENVIRONMENT | {"gpus": [{"name": gpu, "driver": "580.1"}]}
    return make_point(name, load, isl=64, osl=32, device="cuda:0", environment=found, **changes)


def test_the_roofline_is_that_of_plan(tmp_path: Path) -> None:
    """Of a real passport, by the bytes that a decode step of one token reads at the least."""
    directory = make_engine(tmp_path, "tiny", model=TINY_QWEN2, precision="bf16")
    engine = {"name": "tiny", "digest": verified_digest(Passport.open(directory).data)}
    ceilings = Ceilings(tmp_path / "engines")
    one, four = (ceilings.row(on_gpu("tiny", load, engine=engine)) for load in (1, 4))
    assert not ceilings.notes
    size = (directory / "rank0.safetensors").stat().st_size
    assert one["roofline_user_tokens_per_s"] == one["roofline_tokens_per_s"]
    # 300 GB/s; the embedding table is not read whole.
    assert 300e9 / size < one["roofline_tokens_per_s"] < 2.5 * 300e9 / size
    assert four["roofline_tokens_per_s"] == pytest.approx(4 * four["roofline_user_tokens_per_s"], rel=1e-5)
    assert four["roofline_user_tokens_per_s"] < one["roofline_user_tokens_per_s"]


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({}, "tiny-bf16 is not in this workspace, so its size is not known"),
        ({"gpu": "NVIDIA H100 NVL"}, "NVIDIA H100 NVL is not in the table of `trtbuild plan`"),
        ({"device": "unknown (--url)"}, "measured on a server elsewhere, whose GPU is not known"),
        ({"device": "cpu"}, "measured on a CPU, for which `trtbuild plan` has no roofline"),
    ],
)
def test_why_there_is_no_roofline(tmp_path: Path, changes: dict[str, Any], note: str) -> None:
    ceilings = Ceilings(tmp_path)
    gpu = changes.pop("gpu", "NVIDIA L4")
    assert ceilings.row(replace(on_gpu("tiny-bf16", gpu=gpu), **changes)) == {}
    assert list(ceilings.notes) == [note]


def test_an_engine_that_was_built_again_has_no_roofline(tmp_path: Path) -> None:
    make_engine(tmp_path, "tiny", model=TINY_QWEN2, precision="bf16")
    ceilings = Ceilings(tmp_path / "engines")
    assert ceilings.row(on_gpu("tiny")) == {}
    assert list(ceilings.notes) == ["tiny was built again since it was measured"]


def test_what_verify_found_after_the_sweep_is_in_the_report(tmp_path: Path) -> None:
    directory = make_engine(tmp_path, "tiny", model=TINY_QWEN2, precision="bf16")
    engine = {"name": "tiny", "digest": verified_digest(Passport.open(directory).data), "accuracy": None}
    other = replace(make_point("tiny", 4), engine={**engine, "digest": "before it was built again"})
    run = write_run(tmp_path / "run", [replace(make_point("tiny"), engine=engine), other])

    def report() -> tuple[list[str], int]:
        written = write_report([run], run, tmp_path / "engines", pictures=False)
        rows = csv.DictReader(written.table.read_text().splitlines())
        missing = sum(note.startswith("no accuracy of tiny: trtbuild verify tiny") for note in written.notes)
        return [row.get("ppl_increase_percent", "") for row in rows], missing

    assert report() == (["", ""], 1)
    text = {"name": "bundled", "ppl_increase": 0.012, "mean_kl": 0.01, "top1": 0.96}
    write_accuracy(Passport.open(directory), {"passed": True, "texts": [text]})
    assert report() == (["1.2", ""], 1)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="not a run"):
        write_report([tmp_path], tmp_path, tmp_path)
    empty = write_run(tmp_path / "empty", [])
    with pytest.raises(Refused, match="no point is measured"):
        write_report([empty], tmp_path, tmp_path)
    runs = [write_run(tmp_path / name / "same", [make_point()]) for name in "ab"]
    with pytest.raises(Refused, match="a name is there twice"):
        write_report(runs, tmp_path, tmp_path)


def test_commands(tmp_path: Path) -> None:
    for name, scale in (("a", 1.0), ("b", 1.5)):
        write_run(tmp_path / "perf" / "runs" / name, [make_point(scale=scale)], telemetry=False)

    def call(*arguments: str) -> Any:
        return CliRunner().invoke(main, ["perf", *arguments, "--workspace", str(tmp_path)])

    assert call("report", "a", "--no-png").exit_code == 0
    assert (tmp_path / "perf" / "runs" / "a" / "report.html").is_file()
    assert call("report", "a", "b").exit_code == 2
    both = call("report", "a", "b", "--no-png", "--output", str(tmp_path / "out"), "--json")
    assert json.loads(both.output)["table"] == str(tmp_path / "out" / "points.csv")
    assert call("compare", "a", "b").exit_code == 0
    assert call("compare", "a", "b", "--fail-on-regression", "5%").exit_code == 4
    assert call("compare", "b", "a", "--fail-on-regression", "5%").exit_code == 0
    assert call("compare", "a", "b", "--fail-on-regression", "five").exit_code == 2
    assert call("compare", "a", "nothing").exit_code == 3


ACT = r"""
<script>
async function act() {
  while (document.documentElement.dataset.ready !== "yes") await new Promise((next) => setTimeout(next, 20));
  const set = (id, value) => { byId(id).value = value; byId(id).dispatchEvent(new Event("input")); };
  const keep = {};
  keep.first = byId("answer").textContent;
  keep.drawn = Object.keys(charts).sort();
  set("lengths", "256 → 128");
  set("slo-itl", "20");
  keep.bounded = byId("answer").textContent;
  keep.ranking = [...byId("ranking").rows].map((row) => row.cells[0].textContent + " " + row.cells[1].textContent);
  set("slo-itl", "0.001");
  keep.none = byId("answer").textContent;
  set("slo-itl", "");
  set("lengths", "1024 → 128");
  keep.valid = [...byId("ranking").rows].map((row) => row.cells[0].textContent + " " + row.cells[1].textContent);
  set("filter", "int4 isl=64 load_value>4");
  keep.filtered = byId("count").textContent;
  set("filter", "");
  const heading = [...document.querySelectorAll("#points th")].find((cell) => cell.title === "output_tokens_per_s");
  heading.click();
  const column = (index) => [...byId("points").tBodies[0].rows].map((row) => row.cells[index].textContent);
  const at = [...byId("points").tHead.rows[0].cells].findIndex((cell) => cell.title === "output_tokens_per_s");
  keep.ascending = column(at).map(Number);
  [...document.querySelectorAll("#points th")][at].click();
  keep.descending = column(at).map(Number);
  keep.invalid = [...document.querySelectorAll("#points tr.invalid")].map((row) => row.title);
  keep.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const text = JSON.stringify(keep).replace(/</g, "\\u003c");
  document.body.append(element("script", text, { id: "kept", type: "application/json" }));
}
act();
</script>
"""


@pytest.fixture(scope="module")
def acted(page: Path) -> tuple[dict[str, Any], list[str]]:
    """What the page said to somebody who used it, and its console."""
    assert CHROMIUM is not None
    copy = page.with_name("acted.html")
    copy.write_text(page.read_text().replace("</body>", ACT + "</body>"))
    opened = open_page(CHROMIUM, copy)
    match = re.search(r'<script id="kept" type="application/json">(.*?)</script>', opened.html, re.DOTALL)
    assert match is not None, opened.console
    return json.loads(match[1]), opened.console


@needs_chromium
def test_nothing_is_on_the_console_and_all_is_drawn(acted: tuple[dict[str, Any], list[str]]) -> None:
    kept, console = acted
    assert console == []
    assert kept["drawn"] == ["accuracy", "heat", "itl", "speeds", "telemetry", "ttft"]
    assert kept["overflow"] <= 0


@needs_chromium
def test_errors_of_a_page_are_seen(tmp_path: Path) -> None:
    assert CHROMIUM is not None
    page = tmp_path / "broken.html"
    page.write_text("<script>console.warn('a warning'); notThere();</script>")
    console = open_page(CHROMIUM, page).console
    assert len(console) == 2
    assert "notThere is not defined" in console[1]


@needs_chromium
def test_the_best_engine_under_an_slo_is_named(acted: tuple[dict[str, Any], list[str]]) -> None:
    """By hand: ITL p99 is 1.3 times (step + growth of up to 32 streams)."""
    kept, _ = acted
    # c16: bf16 25.5 ms, fp8 18.2 ms, int4 19.8 ms; c64: fp8 28.6 ms. So bf16 has to go down to c4 (16.1 ms).
    assert kept["bounded"].startswith("Best with ITL p99 ≤ 20 ms: tiny-fp8 at c16")
    assert kept["ranking"] == ["tiny-fp8 c16", "tiny-int4 c16", "tiny-bf16 c4"]
    # c64 of int4 is the fastest there, but invalid.
    assert sorted(kept["valid"]) == ["tiny-bf16 c64", "tiny-fp8 c64", "tiny-int4 c16"]
    assert kept["none"].startswith("Nothing measured at 256 → 128 meets")
    assert kept["first"].startswith("Fastest of all (no SLO given)")


@needs_chromium
def test_the_table_sorts_filters_and_marks_what_is_invalid(acted: tuple[dict[str, Any], list[str]]) -> None:
    kept, _ = acted
    assert kept["filtered"] == "4 of 72 points"
    assert kept["ascending"] == sorted(kept["ascending"])
    assert kept["descending"] == sorted(kept["descending"], reverse=True)
    assert len(kept["ascending"]) == 72
    assert kept["invalid"] == [f"the client was saturated {EVIL}"]


@needs_chromium
def test_pictures_of_every_plot(tmp_path: Path) -> None:
    run = write_run(tmp_path / "tiny", [make_point(name, n) for name in ("tiny-fp8", "tiny-int4") for n in (1, 4)])
    written = write_report([run], run, tmp_path)
    assert [file.stem for file in written.pictures] == ["speeds", "ttft", "itl", "heat", "accuracy", "telemetry"]
    for file in written.pictures:
        content = file.read_bytes()
        width, height = int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
        assert content.startswith(b"\x89PNG")
        assert width == 2200
        assert height >= 920
        assert len(content) > 15_000


@needs_chromium
def test_a_page_with_a_gpu_and_a_rate_has_its_roofline(tmp_path: Path) -> None:
    """Light and dark, at a desk; nothing on the console with GPU telemetry either."""
    assert CHROMIUM is not None
    gpus = [{"name": "NVIDIA L4", "driver": "580.1"}]
    telemetry = {"gpu0_power_w": {"mean": 60.0, "max": 70.0}, "gpu1_power_w": {"mean": 50.0, "max": 70.0}}
    points = [
        make_point(load=load, device="cuda:0", environment=ENVIRONMENT | {"gpus": gpus}, telemetry=telemetry)
        for load in (Load("concurrency", 1), Load("rate", 2.0, "poisson"))
    ]
    rows = make_rows({"gpu": points})
    assert rows[0]["gpu_power_w"] == 110.0
    for row, speed in zip(rows, (1000.0, 2000.0), strict=True):
        row |= {"roofline_tokens_per_s": speed, "roofline_user_tokens_per_s": speed / 2}
    file = tmp_path / "gpu.html"
    file.write_text(render([ReportRun("gpu", points, {})], rows))
    for dark in (False, True):
        picture = tmp_path / f"{dark}.png"
        assert screenshot(CHROMIUM, file, picture, width=1280, height=900, dark=dark) == []
        assert picture.stat().st_size > 20_000
    assert (tmp_path / "False.png").read_bytes() != (tmp_path / "True.png").read_bytes()
