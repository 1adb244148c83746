"""Rank arithmetic and what a layout refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import hf_config
from hypothesis import given
from hypothesis import strategies as st

from trtbuild.checkpoints.hf_config import read_config
from trtbuild.checkpoints.layout import Layout, padded_vocab
from trtbuild.checkpoints.precision import Precision
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.errors import Refused


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ((1, 1, None, None), Layout(1, 1, 1, 1)),
        ((4, 2, None, None), Layout(4, 2, 4, 1)),
        ((4, 1, 2, None), Layout(4, 1, 2, 2)),
        ((4, 1, None, 4), Layout(4, 1, 1, 4)),
        ((4, 1, 2, 2), Layout(4, 1, 2, 2)),
    ],
)
def test_what_is_not_given_follows(asked: tuple[int, int, int | None, int | None], found: Layout) -> None:
    assert Layout.resolve(*asked) == found


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((4, 1, 2, 4), "--moe-tp 2 x --moe-ep 4 is 8, but must equal --tp 4"),
        ((4, 1, 3, None), "--moe-tp 3 does not divide --tp 4"),
        ((4, 1, None, 3), "--moe-ep 3 does not divide --tp 4"),
        ((0, 1, None, None), "--tp 0: must be at least 1"),
        ((1, -1, None, None), "--pp -1: must be at least 1"),
        ((2, 1, 0, None), "--moe-tp 0: must be at least 1"),
        ((2, 1, None, 0), "--moe-ep 0: must be at least 1"),
    ],
)
def test_sizes_that_do_not_multiply_are_refused(asked: tuple[int, int, int | None, int | None], message: str) -> None:
    with pytest.raises(Refused, match=message) as refusal:
        Layout.resolve(*asked)
    assert refusal.value.exit_code == 3


def refusal_of(layout: Layout, family: str, **changes: Any) -> str:
    with pytest.raises(Refused) as refusal:
        layout.check(read_config(hf_config(family, **changes)))
    return refusal.value.message


def test_check_lists_every_problem() -> None:
    message = refusal_of(
        Layout.resolve(6, 4), "llama", num_attention_heads=20, num_key_value_heads=4, intermediate_size=100
    )
    assert message.startswith("layout tp 6, pp 4, moe-tp 6, moe-ep 1:")
    assert message.split("\n  - ")[1:] == [
        "20 attention heads are not divisible by --tp 6",
        "4 key/value heads and --tp 6: neither divides the other",
        "intermediate size 100 is not divisible by --tp 6",
        "--pp 4 is more than the model's 3 layers",
    ]


def test_check_of_experts() -> None:
    message = refusal_of(Layout.resolve(6, 1, 2, 3), "mixtral", num_attention_heads=12, intermediate_size=101)
    assert message.split("\n  - ")[1:] == [
        "4 experts are not divisible by --moe-ep 3",
        "expert size 101 is not divisible by --moe-tp 2",
    ]
    assert "--moe-ep 2: LlamaForCausalLM has no experts" in refusal_of(Layout.resolve(2, 1, 1, 2), "llama")


def test_one_problem_is_one_line() -> None:
    assert "\n" not in refusal_of(Layout.resolve(3), "llama", num_attention_heads=6, num_key_value_heads=3)


@given(st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4), (3, 2), (2, 3)]), st.integers(1, 4))
def test_ranks_are_upstreams_mapping(experts: tuple[int, int], pp: int) -> None:
    """`tensorrt_llm/mapping.py`: rank = pp_rank * tp + tp_rank, tp_rank = moe_tp_rank * moe_ep + moe_ep_rank."""
    moe_tp, moe_ep = experts
    layout = Layout.resolve(moe_tp * moe_ep, pp, moe_tp, moe_ep)
    places = [(p, t, e) for p in range(pp) for t in range(moe_tp) for e in range(moe_ep)]
    assert [(r.pp_rank, r.moe_tp_rank, r.moe_ep_rank) for r in layout.ranks()] == places
    assert layout.world_size == len(places)
    assert [layout.rank(r).tp_rank for s in range(pp) for r in layout.stage_ranks(s)] == list(range(layout.tp)) * pp
    assert [r.is_first_stage for r in layout.ranks()] == [p == 0 for p, _, _ in places]
    assert [r.is_last_stage for r in layout.ranks()] == [p == pp - 1 for p, _, _ in places]
    for outside in (-1, len(places)):
        with pytest.raises(ValueError, match=f"rank {outside} is outside a world of {len(places)}"):
            layout.rank(outside)


@given(st.integers(1, 50), st.integers(1, 9))
def test_stages_are_split_as_torch_splits(num_layers: int, pp: int) -> None:
    expected = [part.tolist() for part in torch.arange(num_layers).tensor_split(pp)]
    assert [list(Layout(pp=pp).stage_layers(num_layers, stage)) for stage in range(pp)] == expected


@given(st.integers(1, 5000), st.integers(1, 16))
def test_vocabulary_is_padded_to_the_next_multiple(vocab: int, tp: int) -> None:
    padded = padded_vocab(vocab, tp)
    assert padded % tp == 0
    assert 0 <= padded - vocab < tp
    rows = [row for rank in Layout.resolve(tp).ranks() for row in rank.vocab_rows(vocab)]
    assert rows == list(range(padded))


@pytest.mark.parametrize(
    ("tp", "kv_heads", "expected"),
    [
        (8, 4, [[0], [0], [1], [1], [2], [2], [3], [3]]),
        (4, 1, [[0]] * 4),
        (2, 4, [[0, 1], [2, 3]]),
        (4, 4, [[0], [1], [2], [3]]),
    ],
)
def test_kv_heads(tp: int, kv_heads: int, expected: list[list[int]]) -> None:
    assert [rank.kv_heads(kv_heads) for rank in Layout.resolve(tp).ranks()] == expected


@pytest.mark.parametrize(("tp", "group"), [(1, 128), (2, 64), (4, 32), (8, 16)])
def test_int4_group_shrinks_with_the_slice(tp: int, group: int) -> None:
    """The slice of mlp.proj's input is 128 wide at tp 1; the hidden size is not cut and keeps its own group."""
    config = read_config(hf_config("llama", hidden_size=256, num_key_value_heads=8, head_dim=128))
    plan = plan_rank(config, Layout.resolve(tp).rank(0), Precision("int4", "fp16"))
    groups = {linear.name.removeprefix("transformer.layers.0."): linear.group_size for linear in plan.linears[:5]}
    assert groups == {
        "attention.qkv": 128,
        "attention.dense": 128,
        "mlp.fc": 128,
        "mlp.gate": 128,
        "mlp.proj": group,
    }
    shapes = {spec.name: (spec.dtype, spec.shape) for spec in plan.tensors()}
    assert shapes["transformer.layers.0.mlp.proj.weight"] == ("U8", (256, 128 // tp // 2))
    assert shapes["transformer.layers.0.mlp.proj.weights_scaling_factor"] == ("F16", (256, 128 // tp // group))
    assert shapes["transformer.layers.0.mlp.fc.weights_scaling_factor"] == ("F16", (128 // tp, 2))


def test_int4_without_a_group_is_refused_before_any_work() -> None:
    config = read_config(hf_config("llama", num_key_value_heads=8, intermediate_size=136))
    with pytest.raises(Refused, match=r"int4: the input of transformer\.layers\.0\.mlp\.proj is 17 wide on a rank"):
        plan_rank(config, Layout.resolve(8).rank(0), Precision("int4", "bf16"))


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8", "int4", "fp8"])
@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2"])
def test_router_norms_embedding_and_head_are_never_quantized(family: str, precision: Any) -> None:
    config = read_config(hf_config(family))
    plan = plan_rank(config, Layout.resolve(2).rank(1), Precision.resolve(precision, "fp16"))
    dtypes = {spec.name: spec.dtype for spec in plan.tensors()}
    plain = "BF16" if precision == "bf16" else "F16"
    kept = {
        name: dtype
        for name, dtype in dtypes.items()
        if name.endswith(("norm.weight", "ln_f.weight", "embedding.weight", "lm_head.weight"))
    }
    assert len(kept) == 3 * 2 + 3
    assert set(kept.values()) == {plain}
    assert {dtype for name, dtype in dtypes.items() if "router" in name} == ({"F32"} if family == "mixtral" else set())
    assert {dtype for name, dtype in dtypes.items() if name.endswith(".bias")} == (
        {plain} if family == "qwen2" else set()
    )
    linear = {
        dtype
        for name, dtype in dtypes.items()
        if name.endswith(("qkv.weight", "dense.weight", "fc.weight", "proj.weight"))
    }
    assert linear == {{"bf16": "BF16", "fp16": "F16", "int8": "I8", "int4": "U8", "fp8": "F8_E4M3"}[precision]}
