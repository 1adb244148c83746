"""Any layout that `Layout.check` accepts: the ranks' shards are the source, cut up; and one model at any precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import DEEPSEEK_LITE, MOE_FAMILIES, hf_config, random_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from reassembly import dequantized, reassemble

from trtbuild.checkpoints.families import family_of
from trtbuild.checkpoints.hf_config import read_config
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import Precision, PrecisionName
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.shards import fill_all
from trtbuild.errors import Refused

Weights = dict[str, torch.Tensor]


@st.composite
def models(draw: st.DrawFn) -> tuple[dict[str, Any], Layout]:
    """A small model and a layout, drawn so that most fit."""
    family = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3", *MOE_FAMILIES]))
    tp, pp = draw(st.sampled_from([1, 2, 3, 4, 6, 8])), draw(st.integers(1, 4))
    moe_ep = draw(st.sampled_from([n for n in range(1, tp + 1) if tp % n == 0])) if family in MOE_FAMILIES else 1
    kv_heads = draw(st.sampled_from([1, 2, 3, 4, 8]))
    changes: dict[str, Any] = {
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * draw(st.sampled_from([1, 2, 3, 4, 8])),
        "head_dim": draw(st.sampled_from([2, 4, 16])),
        "hidden_size": draw(st.sampled_from([8, 16, 20])),
        "intermediate_size": draw(st.sampled_from([24, 48, 17])),
        "num_hidden_layers": draw(st.integers(1, 5)),
        "vocab_size": draw(st.integers(2, 30)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if family in MOE_FAMILIES:
        changes |= draw(mixtures(family, changes))
    if family == "llama":
        changes |= {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
    if family.startswith("qwen3"):
        changes["attention_bias"] = draw(st.booleans())
    return hf_config(family, **changes), Layout.resolve(tp, pp, None, moe_ep)


@st.composite
def mixtures(draw: st.DrawFn, family: str, changes: dict[str, Any]) -> dict[str, Any]:
    """What a family of experts has of its own: how many, how large, in which layers."""
    experts = draw(st.sampled_from([2, 3, 4, 8]))
    if family == "mixtral":
        return {"num_local_experts": experts}
    found: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": draw(st.sampled_from([12, 24, 7]))}
    if family == "deepseek_v2":
        found |= DEEPSEEK_LITE | {"q_lora_rank": draw(st.sampled_from([None, 6])), "kv_lora_rank": 10}
        found |= {"qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": draw(st.sampled_from([3, 6]))}
        found |= {"n_routed_experts": experts, "n_shared_experts": draw(st.sampled_from([None, 1, 2]))}
        heads = changes["num_attention_heads"]
        dense = draw(st.integers(0, changes["num_hidden_layers"]))
        return found | {"num_key_value_heads": heads, "head_dim": None, "first_k_dense_replace": dense}
    if family == "qwen2_moe":
        found["shared_expert_intermediate_size"] = draw(st.sampled_from([24, 16, 9]))
    found |= {"mlp_only_layers": draw(st.lists(st.integers(0, 4), max_size=2))}
    return found | {"num_experts": experts, "decoder_sparse_step": draw(st.sampled_from([1, 1, 2]))}


def shards(hf: dict[str, Any], weights: Weights, layout: Layout, precision: Precision) -> list[Weights]:
    config = read_config(hf)
    family = family_of(config.architecture)
    plans = [plan_rank(config, rank, precision) for rank in layout.ranks()]
    amax = {linear.global_name: 3.0 for plan in plans for linear in plan.linears}
    return fill_all(plans, lambda name: weights[family.source_name(name)], amax)


@settings(max_examples=250)
@given(models())
def test_shards_reassemble_to_the_source(model: tuple[dict[str, Any], Layout]) -> None:
    hf, layout = model
    try:
        layout.check(read_config(hf))
    except Refused:
        return
    weights = random_weights(hf)
    found = reassemble(shards(hf, weights, layout, Precision("bf16", "bf16")), hf, layout)
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(found[name], tensor), name


def has_dense_layers(hf: dict[str, Any]) -> bool:
    if hf["model_type"] not in MOE_FAMILIES:
        return True
    step, listed = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers", [])
    first = hf.get("first_k_dense_replace", 0)
    return any(layer in listed or layer < first or (layer + 1) % step for layer in range(hf["num_hidden_layers"]))


@settings(max_examples=400)
@given(models())
def test_check_refuses_exactly_what_cannot_be_cut(model: tuple[dict[str, Any], Layout]) -> None:
    hf, layout = model
    q, kv, inner = hf["num_attention_heads"], hf["num_key_value_heads"], hf["intermediate_size"]
    fits = q % layout.tp == 0 and (kv % layout.tp == 0 or layout.tp % kv == 0) and layout.pp <= hf["num_hidden_layers"]
    if has_dense_layers(hf):
        fits = fits and inner % layout.tp == 0
    if hf["model_type"] in MOE_FAMILIES:
        experts = next(hf[key] for key in ("num_local_experts", "num_experts", "n_routed_experts") if key in hf)
        size = hf.get("moe_intermediate_size", inner)
        shared = hf.get("shared_expert_intermediate_size") or size * (hf.get("n_shared_experts") or 0)
        fits = fits and experts % layout.moe_ep == 0 and size % layout.moe_tp == 0 and shared % layout.tp == 0
    try:
        layout.check(read_config(hf))
    except Refused as refusal:
        assert not fits, refusal.message
        assert refusal.exit_code == 3
    else:
        assert fits


@pytest.mark.parametrize(
    ("family", "changes"), [("qwen2_moe", {"mlp_only_layers": []}), ("deepseek_v2", {"first_k_dense_replace": 0})]
)
def test_the_plain_mlps_size_counts_only_where_a_layer_has_one(family: str, changes: dict[str, Any]) -> None:
    Layout.resolve(2).check(read_config(hf_config(family, intermediate_size=17, **changes)))
    with pytest.raises(Refused, match="intermediate size 17 is not divisible by --tp 2"):
        Layout.resolve(2).check(read_config(hf_config(family, intermediate_size=17)))


QUANTIZED = st.sampled_from([
    ("llama", (2,)), ("llama", (4, 2)), ("llama", (8,)), ("qwen2", (2, 3)), ("mistral", (4,)),
    ("mixtral", (4, 1, 2, 2)), ("mixtral", (4, 1, 1, 4)), ("mixtral", (2, 1, 2, 1)),
    ("qwen2_moe", (2, 1, 1, 2)), ("qwen3_moe", (2, 2)), ("deepseek_v2", (2,)),
])  # fmt: skip


@settings(max_examples=30)
@given(QUANTIZED, st.sampled_from(["int8", "int4", "fp8"]), st.sampled_from(["bf16", "fp16"]), st.integers(0, 99))
def test_a_quantized_model_is_the_same_in_every_layout(
    model: tuple[str, tuple[int, ...]], precision: PrecisionName, dtype: Any, seed: int
) -> None:
    family, sizes = model
    # A rank's input is a multiple of 128 at every tp, so that the int4 group is the same.
    hf = hf_config(
        family, hidden_size=128, num_attention_heads=8, head_dim=128, intermediate_size=1024, num_hidden_layers=3
    )
    if family == "mixtral":
        hf |= {"intermediate_size": 256, "num_hidden_layers": 1}
    elif family in MOE_FAMILIES:
        hf |= {"moe_intermediate_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "mlp_only_layers": [1]}
    if family == "qwen2_moe":
        hf |= {"shared_expert_intermediate_size": 512}
    if family == "deepseek_v2":
        hf |= {"q_lora_rank": 128, "kv_lora_rank": 128, "v_head_dim": 32, "head_dim": None}
        del hf["mlp_only_layers"]
    weights = random_weights(hf, seed)
    whole = reassemble(dequantized(shards(hf, weights, Layout(), Precision(precision, dtype)), precision), hf, Layout())
    layout = Layout.resolve(*sizes)
    cut = reassemble(dequantized(shards(hf, weights, layout, Precision(precision, dtype)), precision), hf, layout)
    assert whole.keys() == cut.keys() == weights.keys()
    # Half a step of the format: of a row's, a group's, or (fp8) of the value's own exponent.
    worst = {"int8": 0.5001 / 127, "int4": 0.51 / 7, "fp8": 2.0**-4}[precision]
    for name, tensor in whole.items():
        assert torch.equal(cut[name], tensor), name
        error = (tensor.float() - weights[name].float()).abs().max()
        assert error <= worst * weights[name].float().abs().max(), name
