"""Forecasts of the host's memory, disk and time, against what perf/planning.py recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import TESTS, TINY_MIXTRAL, TINY_QWEN2

from trtbuild.engines.job import Job, convert_model
from trtbuild.engines.recipe import Recipe
from trtbuild.planning.host import CONVERT_RATE, CPU_OPS, PROCESS_BYTES, HostForecaster, check_host
from trtbuild.workspace import Workspace

LINES = (TESTS.parent / "perf" / "results" / "planning.jsonl").read_text().splitlines()
# The last record of each figure.
RECORDED: dict[str, dict[str, Any]] = {line["figure"]: line for line in map(json.loads, LINES)}
COMPILED = {
    "compile llama-3.1-8b bf16, weights as inputs": {"model": "llama-3.1-8b"},
    "compile mixtral fp8 tp2, weights as inputs": {"model": "mixtral", "precision": "fp8", "tp": 2},
}


def job_of(**fields: object) -> Job:
    return Job.resolve(Recipe.create(**fields), weights=False)


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8", "int4"])
def test_rates_of_conversion_are_the_recorded_ones(precision: str) -> None:
    found = RECORDED[f"convert {precision}"]["bytes_per_cpu_second"]
    assert CONVERT_RATE[precision] == pytest.approx(found, rel=0.3)


def test_the_rate_of_calibration_is_the_recorded_one() -> None:
    assert pytest.approx(RECORDED["calibrate"]["operations_per_cpu_second"], rel=0.3) == CPU_OPS


@pytest.mark.parametrize("figure", COMPILED)
def test_compilation_lies_within_its_forecast(figure: str) -> None:
    recorded = RECORDED[figure]
    job = job_of(**COMPILED[figure], plan_only=True, target=("sm89",))
    forecast = HostForecaster(job, 1).forecast()
    seconds, memory = forecast.seconds["compile"], forecast.memory["compile"]
    assert seconds.low < recorded["cpu_seconds"] < seconds.high
    assert memory.low < PROCESS_BYTES + recorded["anonymous_bytes"] < memory.high


def test_disk_is_what_conversion_writes(tmp_path: Path) -> None:
    job = job_of(model=str(TINY_MIXTRAL), precision="int8", tp=2, pp=3)
    forecast = HostForecaster(job, 1).forecast()
    checkpoint = convert_model(job, Workspace(tmp_path), workers=1)
    written = sum(file.stat().st_size for file in checkpoint.directory.glob("rank*.safetensors"))
    assert forecast.disk["rank checkpoint"] == written


def test_plan_only_needs_no_checkpoint_on_disk() -> None:
    """One plan serves all groups of layers and ranks, for prefill and decode; and one each for embed and head."""
    forecast = HostForecaster(job_of(model="mistral-large-2", tp=8, plan_only=True), 2).forecast()
    assert set(forecast.disk) == {"plans"}
    assert forecast.num_plans == 4
    assert forecast.disk["plans"] < 2**26
    assert forecast.peak == forecast.memory["compile"]


def test_embedded_weights_count_in_the_builders_memory() -> None:
    """int4 stands in the plans, at most 512 MiB in each: a rank's 80 layers of 105 MiB are 20 plans of four."""
    job = job_of(model="llama-3.3-70b", precision="int4", tp=4)
    forecast = HostForecaster(job, 1).forecast()
    assert forecast.num_plans == 1 + 4 * 20 + 1
    decoder = sum(spec.num_bytes for spec in job.plans[0].only_layers().tensors())
    assert forecast.memory["compile"].low > decoder / 20
    assert forecast.disk["plans"] > 4 * decoder


def test_what_is_there_already_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(model=str(TINY_QWEN2))
    forecast = HostForecaster(job, 1).forecast()
    workspace = Workspace(tmp_path)
    convert_model(job, workspace, workers=1)
    free = forecast.disk["plans"] + 2**20
    monkeypatch.setattr("trtbuild.planning.host.shutil.disk_usage", lambda _: type("Usage", (), {"free": free}))
    check_host(job, workspace, forecast)
    assert forecast.disk["rank checkpoint"] > 2**20
