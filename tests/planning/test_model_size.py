"""Bytes per rank, against arithmetic by hand and against the files that conversion writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import TINY_MIXTRAL, TINY_QWEN2, make_checkpoint

from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import Precision, PrecisionName
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.engines.job import Job, convert_model
from trtbuild.engines.recipe import Recipe
from trtbuild.planning.host import rank_file_sizes
from trtbuild.planning.model_size import attention_form, estimate_rank, measure_rank
from trtbuild.workspace import Workspace


def job_of(model: str, **fields: object) -> Job:
    return Job.resolve(Recipe.create(model=model, **fields), weights=False)


def test_mixtral_fp8_tp2_by_hand() -> None:
    job = job_of("mixtral", tp=2, precision="fp8")
    sizes = [measure_rank(plan) for plan in job.plans]
    assert sizes[0] == sizes[1]
    layers, hidden, inner, experts, heads, kv_heads, head_dim, vocab = 32, 4096, 14336, 8, 32, 8, 128, 32000
    # One byte a weight, half of each expert on a rank; per layer one float32 scale of each expert's up-and-gate and of
    # its down matrix, and one of each of the two inputs.
    matrices = experts * 3 * hidden * (inner // 2)
    assert sizes[0].kinds["experts"] == layers * (matrices + 4 * (2 * experts + 2)) == 22_548_580_608
    # Half of the query heads and of the key/value heads, and their rows of the output; weight and input scale of both.
    projections = (heads // 2 + 2 * kv_heads // 2) * head_dim * hidden + hidden * (heads // 2) * head_dim
    assert sizes[0].kinds["attention"] == layers * (projections + 4 * 4) == 671_089_152
    # 16 bit: a whole embedding, half of lm_head, norms; the router is float32.
    assert sizes[0].kinds["embedding"] == vocab * hidden * 2
    assert sizes[0].kinds["lm_head"] == vocab * hidden
    assert sizes[0].kinds["norms, router"] == layers * (2 * hidden * 2 + experts * hidden * 4) + hidden * 2
    assert sizes[0].kinds["dense MLP"] == sizes[0].kinds["shared expert"] == 0
    # 4 key/value heads on a rank, keys and values, 2 bytes.
    assert sizes[0].cache_bytes == layers * 2 * 4 * head_dim * 2


def test_kv_cache_of_a_token() -> None:
    whole, quarter = (measure_rank(job_of("llama-3.3-70b", tp=tp).plans[0]) for tp in (1, 4))
    assert whole.cache_bytes == 80 * 8 * 128 * 2 * 2 == 327_680
    assert quarter.cache_bytes == 327_680 // 4


def test_latent_cache_is_whole_on_every_rank() -> None:
    """512 latent values and a rotated key of 64, in 2 bytes; 16 heads of 192 + 128 otherwise."""
    for tp in (1, 4):
        job = job_of("deepseek-v2-lite", tp=tp)
        assert measure_rank(job.plans[0]).cache_bytes == 27 * 1152
    assert attention_form(job.config) == "MLA, latent cache: 1152 bytes a layer; expanded heads would take 10240"


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (str(TINY_MIXTRAL), {"precision": "fp8", "tp": 2, "moe_ep": 2}),
        (str(TINY_MIXTRAL), {"precision": "int4", "tp": 2}),
        (str(TINY_QWEN2), {"precision": "int8", "pp": 2}),
        (str(TINY_QWEN2), {"precision": "fp16", "tp": 2}),
        ("qwen3_moe", {"precision": "bf16", "tp": 2, "moe_ep": 2}),
        ("deepseek_v2", {"precision": "int8", "tp": 2, "pp": 2}),
    ],
)
def test_rank_files_have_exactly_these_bytes(model: str, fields: dict[str, object], tmp_path: Path) -> None:
    source = model if "/" in model else str(make_checkpoint(tmp_path / model, model))
    job = Job.resolve(Recipe.create(model=source, **fields))
    checkpoint = convert_model(job, Workspace(tmp_path), workers=1)
    files = sorted(checkpoint.directory.glob("rank*.safetensors"))
    assert [file.stat().st_size for file in files] == rank_file_sizes(job)
    for file, plan in zip(files, job.plans, strict=True):
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert measure_rank(plan).weight_bytes == file.stat().st_size - header


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("mixtral", Layout.resolve(4, 2, moe_ep=4)),
        ("llama-2-70b", Layout.resolve(8, 1)),
        ("qwen2.5-0.5b", Layout.resolve(2, 3)),
        ("qwen2-57b-a14b", Layout.resolve(2, 2, moe_ep=2)),
        ("deepseek-v2", Layout.resolve(8, 4, moe_ep=8)),
    ],
)
@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8", "int4"])
def test_one_layer_of_each_kind_stands_for_all(model: str, layout: Layout, precision: PrecisionName) -> None:
    job = job_of(model, tp=layout.tp, pp=layout.pp, moe_ep=layout.moe_ep if layout.moe_ep > 1 else None)
    wanted = Precision.resolve(precision, job.config.dtype)
    for rank in (layout.rank(0), layout.rank(layout.world_size - 1)):
        exact = measure_rank(plan_rank(job.config, rank, wanted))
        assert estimate_rank(job.config, layout, rank.pp_rank, wanted) == exact
