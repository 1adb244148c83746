"""`plan --builder tensorrt-llm`: what the engine takes, where TensorRT-LLM runs, and nothing of TensorRT-RTX."""

from __future__ import annotations

from typing import Any

import pytest

from trtbuild.engines.job import Job
from trtbuild.engines.recipe import Recipe
from trtbuild.errors import Refused
from trtbuild.planning.plan import EnginePlan, make_plan
from trtbuild.planning.report import print_plan


def planned(gpu: str | None = None, **fields: Any) -> EnginePlan:
    recipe = Recipe.create(**({"model": "mixtral", "builder": "tensorrt-llm", "tp": 2} | fields))
    return make_plan(Job.resolve(recipe, weights=False), gpu_name=gpu)


@pytest.mark.parametrize(("precision", "share"), [("int8", 0.5), ("int4", 0.27), ("fp8", 0.5)])
def test_bytes_are_the_engines_and_not_the_checkpoints(precision: str, share: float) -> None:
    """int8 and int4 checkpoints are in 16 bit, and what is built from them is not."""
    plan, full = planned(precision=precision), planned(precision="bf16")
    assert plan.ranks[0].kinds["experts"] / full.ranks[0].kinds["experts"] == pytest.approx(share, rel=0.05)
    is_deferred = precision.startswith("int")
    assert (plan.rank_files[0] > 1.9 * plan.ranks[0].weight_bytes) == is_deferred


def test_gpus_are_tensorrt_llms(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(precision="int8")
    reasons = {device.fit.gpu.name: (device.fit.limits, device.fit.notes) for device in plan.devices}
    assert reasons["h100-80"] == ((), ())
    assert "sm75: TensorRT-LLM 1.x supports sm80 and later" in reasons["t4"][0][0]
    assert "no int8" in " ".join(reasons["b200"][0])
    assert set(plan.host.memory) == {"convert"}
    print_plan(plan, False)
    told = capsys.readouterr().out
    assert "what TensorRT-LLM takes is not known" in told
    for other in ("tokens, chunks of", "needs the builder", "What runs on which machine"):
        assert other not in told


def test_an_fp8_cache_holds_twice_the_tokens() -> None:
    half, whole = planned(precision="fp8", kv_cache="fp8"), planned(precision="fp8")
    assert 2 * half.ranks[0].cache_bytes == whole.ranks[0].cache_bytes


def test_flags_are_checked_and_what_does_not_run_is_refused() -> None:
    with pytest.raises(Refused, match="did you mean tokens_per_block"):
        planned(trtllm={"tokens_per_blok": 3})
    with pytest.raises(Refused, match="an engine is for one compute capability"):
        planned(target="sm89,sm90")
    with pytest.raises(Refused, match=r"sm75: TensorRT-LLM 1.x supports sm80 and later"):
        planned("t4").check("t4")
    planned("h100-80").check("h100-80")
