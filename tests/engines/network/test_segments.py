"""A segment's layers are all of one kind: experts or none, one attention window."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from helpers import hf_config
from hypothesis import given, settings
from hypothesis import strategies as st

from trtbuild.checkpoints.hf_config import read_config
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import LinearForm, Precision
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.rank_tensors import RankPlan
from trtbuild.engines.network.segments import MAX_SEGMENT_LAYERS, Segment, cut_into_segments, has_int4, moe_of


def plans(hf: dict[str, Any], layout: Layout) -> list[RankPlan]:
    config = read_config(hf)
    layout.check(config)
    return [plan_rank(config, rank, Precision("bf16", "bf16")) for rank in layout.ranks()]


def decoder_segments(plan: RankPlan, depth: int | None = None) -> list[Segment]:
    return [segment for segment in cut_into_segments(plan, depth) if segment.kind == "decoder"]


def spans(plan: RankPlan, depth: int | None = None) -> list[tuple[int, int]]:
    """(first layer in the stage, layers) of each group."""
    return [(segment.first_layer, segment.num_layers) for segment in decoder_segments(plan, depth)]


def test_dense_first_layers_stand_alone() -> None:
    """DeepSeek: 3 dense layers, then experts; two stages of 6 and 5 layers, each counted from 0."""
    hf = hf_config("deepseek_v2", num_hidden_layers=11, first_k_dense_replace=3)
    first, second = plans(hf, Layout.resolve(1, 2))
    assert spans(first) == [(0, 3), (3, 3)]
    assert spans(second) == [(0, 5)]
    assert [moe_of(first, segment) is not None for segment in decoder_segments(first)] == [False, True]
    assert spans(first, 2) == [(0, 2), (2, 1), (3, 2), (5, 1)]
    kinds = [[segment.kind for segment in cut_into_segments(plan)] for plan in (first, second)]
    assert kinds == [["embed", "decoder", "decoder"], ["decoder", "head"]]


def test_dense_layers_in_the_middle() -> None:
    """Layers 2, 6, 7 have no experts; the second of two stages begins at layer 5, inside a run of experts."""
    hf = hf_config("qwen3_moe", num_hidden_layers=10, mlp_only_layers=[2, 6, 7])
    first, second = plans(hf, Layout.resolve(1, 2))
    assert spans(first) == [(0, 2), (2, 1), (3, 2)]
    assert spans(second) == [(0, 1), (1, 2), (3, 2)]
    assert [moe_of(second, segment) is not None for segment in decoder_segments(second)] == [True, False, True]
    every_second = hf_config("qwen2_moe", num_hidden_layers=4, mlp_only_layers=[], decoder_sparse_step=2)
    [plan] = plans(every_second, Layout())
    assert spans(plan) == [(0, 1), (1, 1), (2, 1), (3, 1)]
    assert moe_of(plan, Segment("embed", 0)) is None


def test_a_segments_weights_are_of_its_kind() -> None:
    hf = hf_config("qwen2_moe", num_hidden_layers=4, mlp_only_layers=[2])
    [plan] = plans(hf, Layout())
    experts, dense, last = decoder_segments(plan)
    assert {"layers.1.mlp.router.weight", "layers.1.mlp.shared_expert_gate.weight"} <= experts.weights(plan).keys()
    assert "layers.0.mlp.gate.weight" in dense.weights(plan)
    assert not [name for name in dense.weights(plan) if "expert" in name or "router" in name]
    assert last.checkpoint_name("layers.0.mlp.fc") == "transformer.layers.3.mlp.fc"
    assert last.local_name("transformer.layers.2.mlp.fc.weight") is None


def test_windows_are_not_mixed() -> None:
    changes = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3, "num_hidden_layers": 8}
    first, second = plans(hf_config("qwen3", **changes), Layout.resolve(1, 2))
    assert spans(first) == [(0, 3), (3, 1)]
    assert spans(second) == [(0, 4)]


def test_depth_follows_from_the_experts_of_a_rank() -> None:
    hf = hf_config("qwen3_moe", num_hidden_layers=16, num_experts=32, mlp_only_layers=[15])
    [whole] = plans(hf, Layout())
    assert [count for _, count in spans(whole)] == [2] * 7 + [1, 1]
    half = plans(hf, Layout.resolve(2, 1, 1, 2))[0]
    assert [count for _, count in spans(half)] == [4, 4, 4, 3, 1]
    [dense] = plans(hf_config("qwen3", num_hidden_layers=16), Layout())
    assert spans(dense) == [(0, MAX_SEGMENT_LAYERS), (8, MAX_SEGMENT_LAYERS)]


@st.composite
def mixed_models(draw: st.DrawFn) -> tuple[dict[str, Any], Layout, int | None]:
    layers = draw(st.integers(1, 24))
    layout = Layout.resolve(1, draw(st.integers(1, min(4, layers))))
    depth = draw(st.one_of(st.none(), st.integers(1, 30)))
    family = draw(st.sampled_from(["qwen2_moe", "qwen3_moe", "deepseek_v2", "qwen2"]))
    changes: dict[str, Any] = {"num_hidden_layers": layers}
    if family == "deepseek_v2":
        changes["first_k_dense_replace"] = draw(st.integers(0, layers))
    elif family == "qwen2":
        changes |= {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": draw(st.integers(0, 24))}
    else:
        changes["mlp_only_layers"] = draw(st.lists(st.integers(0, layers - 1), max_size=6))
        changes["decoder_sparse_step"] = draw(st.sampled_from([1, 1, 2, 3]))
    return hf_config(family, **changes), layout, depth


@settings(max_examples=200)
@given(mixed_models())
def test_any_chain_covers_every_layer_once_and_never_mixes(model: tuple[dict[str, Any], Layout, int | None]) -> None:
    hf, layout, depth = model
    found = []
    for plan in plans(hf, layout):
        segments = decoder_segments(plan, depth)
        for segment in segments:
            layers = [plan.layers[segment.first_layer + index] for index in range(segment.num_layers)]
            assert len({(plan.config.is_moe(layer), plan.config.window(layer)) for layer in layers}) == 1
            assert (moe_of(plan, segment) is not None) == plan.config.is_moe(layers[0])
            assert segment.num_layers <= (depth or MAX_SEGMENT_LAYERS)
            found += layers
        # No cut without a reason: neighbours that could be one are as deep as they may be.
        if depth:
            for left, right in itertools.pairwise(segments):
                kinds = [
                    (plan.config.is_moe(plan.layers[s.first_layer]), plan.config.window(plan.layers[s.first_layer]))
                    for s in (left, right)
                ]
                assert kinds[0] != kinds[1] or left.num_layers == depth
    assert found == list(range(hf["num_hidden_layers"]))


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2"])
def test_segment_weights_partition_the_plan(family: str) -> None:
    """Every rank tensor belongs to exactly one segment."""
    for plan in plans(hf_config(family, num_hidden_layers=5), Layout.resolve(2, 2, 1, 2)):
        names = [spec.name for segment in cut_into_segments(plan) for spec in segment.weights(plan).values()]
        assert sorted(names) == sorted(spec.name for spec in plan.tensors())


def test_a_byte_budget_shortens_segments() -> None:
    """Never below one layer, and never where the depth was asked for."""
    [plan] = plans(hf_config("llama", num_hidden_layers=7), Layout())
    layer = sum(spec.num_bytes for spec in plan.only_layers().tensors()) // 7

    def depths(budget: int, depth: int | None = None) -> list[int]:
        segments = cut_into_segments(plan, depth, budget)
        return [segment.num_layers for segment in segments if segment.kind == "decoder"]

    assert depths(3 * layer) == [3, 3, 1]
    assert depths(3 * layer - 1) == [2, 2, 2, 1]
    assert depths(1) == [1] * 7
    assert depths(1, depth=4) == [4, 3]


def test_forms_are_not_mixed() -> None:
    """Neighbours whose layers have the same forms are one segment; the byte budget is for those with int4."""
    config = read_config(hf_config("llama", num_hidden_layers=9))
    fp8, int4, narrow = LinearForm("fp8-dynamic"), LinearForm("int4"), LinearForm("int4", 32)
    forms = {f"transformer.layers.{layer}.mlp.proj": fp8 for layer in (3, 4)}
    forms |= {f"transformer.layers.{layer}.mlp.fc": int4 for layer in (5, 6, 7)}
    forms["transformer.layers.7.mlp.fc"] = narrow
    plan = plan_rank(config, Layout().rank(0), Precision("bf16", "bf16").with_modules(forms))
    assert spans(plan) == [(0, 3), (3, 2), (5, 2), (7, 1), (8, 1)]
    assert [has_int4(plan, segment) for segment in decoder_segments(plan)] == [False, False, True, True, False]
    bounded = cut_into_segments(plan, max_bytes=1, only_int4=True)
    assert [(s.first_layer, s.num_layers) for s in bounded[1:-1]] == [(0, 3), (3, 2), (5, 1), (6, 1), (7, 1), (8, 1)]
    # What is spelled out by module is no other form.
    same = Precision("bf16", "bf16").with_modules({"transformer.layers.3.mlp.fc": LinearForm("bf16")})
    assert spans(plan_rank(config, Layout().rank(0), same)) == [(0, MAX_SEGMENT_LAYERS), (8, 1)]
