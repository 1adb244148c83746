"""Plans of every precision, and of engines whose layers differ."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from trtbuild.checkpoints.precision import LinearForm, Precision, PrecisionName
from trtbuild.engines.job import Job
from trtbuild.engines.recipe import Recipe
from trtbuild.errors import Refused
from trtbuild.planning.plan import EnginePlan, make_plan

DYNAMIC, INT4, PLAIN = LinearForm("fp8-dynamic"), LinearForm("int4"), LinearForm("bf16")


@cache
def planned(model: str, weights: PrecisionName, *forms: tuple[str, LinearForm]) -> EnginePlan:
    """A layer has the form of the first key that its name contains; without forms, all have what `weights` says."""
    job = Job.resolve(Recipe.create(model=model, tp=2), weights=False)
    precision = Precision(weights, "bf16")
    if forms:
        names = [linear.global_name for linear in job.plans[0].linears]
        precision = precision.with_modules({n: next(form for key, form in forms if key in n) for n in names})
    return make_plan(replace(job, precision=precision), gpu_name="rtx4090")


def test_zero_points_are_counted() -> None:
    """16 bits for each 128 values of 4 bits and their scale of 16: 3 % of the linear layers."""
    found, plain = planned("mixtral", "int4-awq-asym").ranks[0], planned("mixtral", "int4-awq").ranks[0]
    share = found.kinds["experts"] / plain.kinds["experts"]
    assert share == pytest.approx(1 + 16 / (128 * 4 + 16), rel=1e-6)
    assert found.weight_bytes > plain.weight_bytes


@pytest.mark.parametrize("model", ["llama-3.1-8b", "mixtral"])
@pytest.mark.parametrize("weights", ["int4-awq", "int4-gptq"])
def test_calibrated_int4_is_int4_that_takes_longer(model: str, weights: PrecisionName) -> None:
    found, plain = planned(model, weights), planned(model, "int4")
    assert found.ranks == plain.ranks
    assert found.scratch == plain.scratch
    assert [fit.fit for fit in found.devices] == [fit.fit for fit in plain.devices]
    assert found.host.seconds["convert"] == plain.host.seconds["convert"]
    assert found.host.seconds["calibrate"].low > 0
    assert "calibrate" not in plain.host.seconds


@pytest.mark.parametrize("model", ["llama-3.1-8b", "mixtral"])
def test_dynamic_fp8_computes_as_fast_as_fp8_and_is_not_calibrated(model: str) -> None:
    found, static = planned(model, "fp8-dynamic"), planned(model, "fp8")
    assert found.scratch == static.scratch
    assert "calibrate" not in found.host.seconds
    assert found.ranks[0].fp8_ops == found.ranks[0].quantized_ops == static.ranks[0].fp8_ops
    # A scale for every output channel, where fp8 has two for a layer.
    assert 0 < found.ranks[0].weight_bytes - static.ranks[0].weight_bytes < 0.002 * static.ranks[0].weight_bytes
    job = replace(planned(model, "fp8-dynamic").job)
    assert make_plan(job, gpu_name="a100-80").devices[0].fit.limits[0] == "no fp8-dynamic (needs sm89)"


def test_a_mixture_that_is_not_chosen_yet_cannot_be_planned() -> None:
    with pytest.raises(Refused, match="plan int4 and int8, between which it lies"):
        planned("mixtral", "auto")


def test_a_mixture_lies_between_its_parts() -> None:
    forms = (("attention", DYNAMIC), ("layers.3.", PLAIN), ("", INT4))
    mixed = planned("llama-3.1-8b", "auto", *forms)
    int4, fp8 = planned("llama-3.1-8b", "int4"), planned("llama-3.1-8b", "fp8-dynamic")
    sizes = [plan.ranks[0].weight_bytes for plan in (int4, mixed, fp8)]
    assert sizes == sorted(sizes)
    assert 0 < mixed.ranks[0].fp8_ops < 0.3 * mixed.ranks[0].quantized_ops
    prefill = [plan.devices[0].prefill for plan in (fp8, mixed, int4)]
    compute = [step.compute for step in prefill if step]
    assert compute == sorted(compute)
    assert len(set(compute)) == 3
    # Every segment with int4 is a plan of each rank's own; layer 3 alone is shared, for prefill and decode.
    assert mixed.host.num_plans < int4.host.num_plans + 4 * 2
    assert mixed.to_dict()["precision"]["modules"]["transformer.layers.0.mlp.fc"] == {"format": "int4"}
