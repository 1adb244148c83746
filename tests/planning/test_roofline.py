"""Rooflines against arithmetic by hand, and against the limits that the model must tend to."""

from __future__ import annotations

import pytest

from trtbuild.engines.job import Job
from trtbuild.engines.recipe import Recipe
from trtbuild.planning.gpus import GPUS, gpu_named
from trtbuild.planning.model_size import measure_rank
from trtbuild.planning.roofline import Roofline


def roofline(model: str, gpu: str, **fields: object) -> Roofline:
    job = Job.resolve(Recipe.create(model=model, **fields), weights=False)
    stages = [measure_rank(plan) for plan in job.plans][:: job.layout.tp]
    return Roofline(job.config, job.layout, stages, GPUS[gpu])


def test_batch_1_decode_of_llama_2_70b_on_8_h100_by_hand() -> None:
    """Bound by reading a rank's weights once at 3.35 TB/s."""
    hidden, layers, context = 8192, 80, 2048
    attention = (8 + 1 + 1) * 128 * hidden + hidden * 8 * 128
    mlp = 3 * hidden * 28672 // 8
    lm_head = 32000 // 8 * hidden
    weights = 2 * (layers * (attention + mlp + 2 * hidden) + hidden + lm_head)
    row = 2 * hidden
    cache = layers * 2 * 128 * 2
    memory = (weights + row + cache * context + cache) / 3.35e12
    operations = 2 * (layers * (attention + mlp) + lm_head) + layers * context * 8 * 128 * 2 * 2
    # Two all-reduces in a layer, each 2 * 7/8 of the hidden state; float32 logits are gathered.
    sent = 2 * layers * 2 * 7 / 8 * row + 7 / 8 * 32000 * 4
    step = roofline("llama-2-70b", "h100-80", tp=8, precision="bf16").decode(1, context)
    assert step.memory == pytest.approx(memory, rel=1e-9)
    assert step.compute == pytest.approx(operations / 989.4e12, rel=1e-9)
    assert step.link == pytest.approx(sent / 450e9, rel=1e-9)
    assert step.seconds == pytest.approx(memory + sent / 450e9, rel=1e-9)
    assert step.bound == "memory"
    assert step.tokens_per_second == pytest.approx(193.6, abs=0.1)


def test_prefill_of_a_dense_model_is_bound_by_arithmetic() -> None:
    """7 B parameters, 2 operations each, at 165.2 TFLOPS: no more than 11.8 k tokens a second, and not far below."""
    step = roofline("mistral-7b", "rtx4090").prefill(512, 0)
    assert step.bound == "compute"
    parameters = 32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336)
    most = 165.2e12 / (2 * parameters)
    assert 0.97 * most < step.tokens_per_second < most


def test_only_fp8_has_arithmetic_of_its_own() -> None:
    seconds = {
        p: roofline("mistral-7b", "rtx4090", precision=p).prefill(512, 0).compute for p in ("bf16", "fp8", "int4")
    }
    assert seconds["int4"] == seconds["bf16"]
    # Attention stays in 16 bit.
    assert 0.5 < seconds["fp8"] / seconds["bf16"] < 0.52


def test_experts_hit_by_a_batch() -> None:
    """One token wakes 2 of 8 experts; 512 tokens all of them, to a part in a million."""
    line = roofline("mixtral", "h100-80", precision="fp8")
    experts = line.stages[0].kinds["experts"]
    one, eight, many = (line.decode(batch, 1).memory * 3.35e12 for batch in (1, 8, 512))
    rest = line.stages[0].weight_bytes - experts - line.stages[0].kinds["embedding"]
    extra = 2 * 4096 + 2 * line.stages[0].cache_bytes
    assert one == pytest.approx(rest + experts * 2 / 8 + extra, rel=1e-9)
    assert eight == pytest.approx(rest + experts * (1 - 0.75**8) + 8 * extra, rel=1e-9)
    assert many == pytest.approx(rest + experts + 512 * extra, rel=1e-6)


def test_a_window_bounds_what_attention_reads() -> None:
    line = roofline("mistral-7b", "rtx4090")
    windowed = Roofline(
        **{**line.__dict__, "config": line.config.from_dict({**line.config.to_dict(), "sliding_window": 4096})}
    )
    assert windowed.decode(8, 16384).memory == pytest.approx(
        line.decode(8, 4096).memory, rel=1e-9
    )  # fmt: skip
    assert windowed.decode(8, 1000) == line.decode(8, 1000)


def test_pipeline_stages_run_one_after_the_other() -> None:
    """The same weights are read either way; a stage sends its hidden state on."""
    one, four = roofline("mistral-7b", "rtx4090"), roofline("mistral-7b", "rtx4090", pp=4)
    assert four.decode(1, 1000).memory == pytest.approx(one.decode(1, 1000).memory, rel=1e-9)
    assert four.decode(1, 1000).link == pytest.approx(3 * 2 * 4096 / 32e9, rel=1e-9)


def test_names_of_gpus_are_read_leniently() -> None:
    assert gpu_named("RTX 4090") is gpu_named("rtx-4090") is GPUS["rtx4090"]


def test_every_gpu_has_a_source_and_plausible_figures() -> None:
    for gpu in GPUS.values():
        assert gpu.source
        # fp8 and fp4 each double what the next wider type does, at most; int8 is fp8's rate or twice it.
        assert gpu.fp8 is None or 1.9 * gpu.fp16 <= gpu.fp8 <= 2.1 * gpu.fp16
        assert gpu.fp4 is None or gpu.fp8 is None or 1.9 * gpu.fp8 <= gpu.fp4 <= 4.1 * gpu.fp8
        assert (gpu.sm >= 89) == (gpu.fp8 is not None)
        assert (gpu.sm >= 100) == (gpu.fp4 is not None)
