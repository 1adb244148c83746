"""Predicted costs against the loss that quantizing one layer, or all, really causes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import TINY_MIXTRAL, executor_of, prefill

from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import FormatName, LinearForm, Precision
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.shards import fill_from
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.engines.calibration import sensitivity
from trtbuild.engines.calibration.sensitivity import Sensitivity, measure, measure_once, total
from trtbuild.engines.calibration.text import CalibrationText, calibration_tokens
from trtbuild.engines.limits import EngineLimits
from trtbuild.engines.reference.executor import ReferenceExecutor

TEXT = CalibrationText("eval", (TINY_MIXTRAL / "eval.txt").read_text()[:6000])


@pytest.fixture(scope="module")
def source() -> CheckpointSource:
    return CheckpointSource.open("tiny-qwen2")


@pytest.fixture(scope="module")
def costs(source: CheckpointSource) -> Sensitivity:
    return measure(source, {"int4": source, "int8": source, "fp8-dynamic": source}, TEXT)


def divergence(source: CheckpointSource, forms: dict[str, FormatName]) -> float:
    """Mean KL of next-token distributions, source to quantized, on the tokens that were measured."""
    precision = Precision("bf16", "bf16").with_modules({name: LinearForm(form) for name, form in forms.items()})
    plans = [plan_rank(source.config, Layout().rank(0), precision)]
    [tensors] = fill_from(plans, source)
    quantized = ReferenceExecutor(plans, lambda _, name: tensors[name], EngineLimits(1, 256, 256), dtype=torch.float32)
    exact = executor_of(source, max_seq_len=256, chunk_size=256)
    found = []
    for tokens in calibration_tokens(source, TEXT)[: sensitivity.NUM_SEQUENCES]:
        p = prefill(exact, tokens[: sensitivity.SEQUENCE_LENGTH], logits="all").log_softmax(-1)
        q = prefill(quantized, tokens[: sensitivity.SEQUENCE_LENGTH], logits="all").log_softmax(-1)
        found.append((p.exp() * (p - q)).sum(-1))
    return float(torch.cat(found).mean())


def test_every_layer_is_measured_in_every_format(source: CheckpointSource, costs: Sensitivity) -> None:
    plan = plan_rank(source.config, Layout().rank(0), Precision("bf16", "bf16"))
    assert set(costs) == {linear.global_name for linear in plan.linears}
    for name, by_format in costs.items():
        assert by_format["int4"] > 10 * by_format["int8"] > 0, name
        assert by_format["fp8-dynamic"] > by_format["int8"], name


@pytest.mark.parametrize("form", ["int4", "fp8-dynamic"])
def test_the_sum_predicts_the_whole(source: CheckpointSource, costs: Sensitivity, form: FormatName) -> None:
    everything: dict[str, FormatName] = dict.fromkeys(costs, form)
    assert total(costs, everything) == pytest.approx(divergence(source, everything), rel=0.6)


def test_single_layers_are_ranked_as_they_cost(source: CheckpointSource, costs: Sensitivity) -> None:
    ranked = sorted(costs, key=lambda name: costs[name]["int4"])
    cheapest, costliest = ranked[0], ranked[-1]
    real = {name: divergence(source, {name: "int4"}) for name in (cheapest, costliest)}
    assert costs[costliest]["int4"] > 3 * costs[cheapest]["int4"]
    assert real[costliest] > 2 * real[cheapest]
    for name, found in real.items():
        assert costs[name]["int4"] == pytest.approx(found, rel=0.7), name


def test_measured_once(source: CheckpointSource, costs: Sensitivity, tmp_path: Path) -> None:
    readers: dict[FormatName, CheckpointSource] = {"int4": source, "int8": source, "fp8-dynamic": source}
    first = measure_once(source, readers, TEXT, tmp_path)
    assert first == costs
    assert measure_once(source, readers, TEXT, tmp_path) == first
