"""Any layout that `Layout.check` accepts: the ranks' shards are the source, cut up; and one model at any precision."""

from __future__ import annotations

from typing import Any

import torch
from helpers import hf_config, random_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from trtbuild.checkpoints.families import family_of, read_config
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import Precision, PrecisionName
from trtbuild.checkpoints.rank_tensors import plan_rank
from trtbuild.checkpoints.shards import fill_all
from trtbuild.errors import Refused

Weights = dict[str, torch.Tensor]


@st.composite
def models(draw: st.DrawFn) -> tuple[dict[str, Any], Layout]:
    """A small model and a layout, drawn so that most fit."""
    family = draw(st.sampled_from(["llama", "mistral", "mixtral", "qwen2"]))
    tp, pp = draw(st.sampled_from([1, 2, 3, 4, 6, 8])), draw(st.integers(1, 4))
    moe_ep = draw(st.sampled_from([n for n in range(1, tp + 1) if tp % n == 0])) if family == "mixtral" else 1
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
    if family == "mixtral":
        changes["num_local_experts"] = draw(st.sampled_from([2, 3, 4, 8]))
    if family == "llama":
        changes |= {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
    return hf_config(family, **changes), Layout.resolve(tp, pp, None, moe_ep)


def reassemble(ranks: list[Weights], hf: dict[str, Any], layout: Layout) -> Weights:
    """The checkpoint's tensors from the ranks' ones; asserts that every copy of a replicated part is the same."""
    result: Weights = {}

    def put(name: str, tensor: torch.Tensor) -> None:
        assert name not in result or torch.equal(result[name], tensor), name
        result[name] = tensor

    def stage(number: int) -> list[Weights]:
        return ranks[number * layout.tp : (number + 1) * layout.tp]

    head_dim, q_heads, kv_heads = hf["head_dim"], hf["num_attention_heads"], hf["num_key_value_heads"]
    for rank in stage(0):
        put("model.embed_tokens.weight", rank["transformer.vocab_embedding.weight"])
    for rank in stage(layout.pp - 1):
        put("model.norm.weight", rank["transformer.ln_f.weight"])
    head = torch.cat([rank["lm_head.weight"] for rank in stage(layout.pp - 1)])
    assert len(head) % layout.tp == 0
    assert len(head) - hf["vocab_size"] < layout.tp
    assert head[hf["vocab_size"] :].count_nonzero() == 0
    put("model.embed_tokens.weight" if hf["tie_word_embeddings"] else "lm_head.weight", head[: hf["vocab_size"]])

    layer = 0
    for number in range(layout.pp):
        group = stage(number)
        local = 0
        while f"transformer.layers.{local}.attention.qkv.weight" in group[0]:
            name, source = f"transformer.layers.{local}.", f"model.layers.{layer}."
            for rank in group:
                put(f"{source}input_layernorm.weight", rank[f"{name}input_layernorm.weight"])
                put(f"{source}post_attention_layernorm.weight", rank[f"{name}post_layernorm.weight"])
            for kind in ("weight", "bias"):
                if f"{name}attention.qkv.{kind}" in group[0]:
                    _split_qkv([rank[f"{name}attention.qkv.{kind}"] for rank in group], kind, source, put, (q_heads, kv_heads, head_dim))
            put(f"{source}self_attn.o_proj.weight", torch.cat([rank[f"{name}attention.dense.weight"] for rank in group], 1))
            if f"{name}attention.dense.bias" in group[0]:
                for rank in group:
                    put(f"{source}self_attn.o_proj.bias", rank[f"{name}attention.dense.bias"])
            (_join_experts if "num_local_experts" in hf else _join_mlp)(group, name, source, put, layout)
            local, layer = local + 1, layer + 1
    assert layer == hf["num_hidden_layers"]
    return result


def _split_qkv(parts: list[torch.Tensor], kind: str, source: str, put: Any, sizes: tuple[int, int, int]) -> None:
    q_heads, kv_heads, head_dim = sizes
    tp = len(parts)
    rank_q, rank_kv = q_heads // tp, max(1, kv_heads // tp)
    split = [part.unflatten(0, (-1, head_dim)).split([rank_q, rank_kv, rank_kv]) for part in parts]
    copies = max(1, tp // kv_heads)
    for letter, index in (("q", 0), ("k", 1), ("v", 2)):
        heads = torch.cat([found[index] for found in split])
        if index:
            grouped = heads.unflatten(0, (kv_heads, copies))
            assert torch.equal(grouped, grouped[:, :1].expand_as(grouped))
            heads = grouped[:, 0]
        put(f"{source}self_attn.{letter}_proj.{kind}", heads.flatten(0, 1))


def _join_mlp(group: list[Weights], name: str, source: str, put: Any, layout: Layout) -> None:
    del layout
    for target, part in (("fc", "gate"), ("gate", "up"), ("proj", "down")):
        put(f"{source}mlp.{part}_proj.weight", torch.cat([rank[f"{name}mlp.{target}.weight"] for rank in group], int(part == "down")))
        biases = [rank[f"{name}mlp.{target}.bias"] for rank in group if f"{name}mlp.{target}.bias" in rank]
        if biases and part == "down":
            for bias in biases:
                put(f"{source}mlp.down_proj.bias", bias)
        elif biases:
            put(f"{source}mlp.{part}_proj.bias", torch.cat(biases))


def _join_experts(group: list[Weights], name: str, source: str, put: Any, layout: Layout) -> None:
    moe = f"{source}block_sparse_moe."
    for rank in group:
        put(f"{moe}gate.weight", rank[f"{name}mlp.router.weight"].bfloat16())
    experts_per_rank = len(group[0][f"{name}mlp.proj.weight"])
    for ep in range(layout.moe_ep):
        # The ranks of one expert group are moe_ep apart.
        members = group[ep :: layout.moe_ep]
        for index in range(experts_per_rank):
            expert = f"{moe}experts.{ep * experts_per_rank + index}."
            halves = [rank[f"{name}mlp.fc.weight"][index].chunk(2) for rank in members]
            put(f"{expert}w3.weight", torch.cat([up for up, _ in halves]))
            put(f"{expert}w1.weight", torch.cat([gate for _, gate in halves]))
            put(f"{expert}w2.weight", torch.cat([rank[f"{name}mlp.proj.weight"][index] for rank in members], 1))


def shards(hf: dict[str, Any], weights: Weights, layout: Layout, precision: Precision) -> list[Weights]:
    config = read_config(hf)
    family = family_of(config.architecture)
    plans = [plan_rank(config, rank, precision) for rank in layout.ranks()]
    amax = {linear.global_name: 3.0 for plan in plans for linear in plan.linears}
    return fill_all(plans, lambda name: weights[family.source_name(name)], amax)


@settings(max_examples=150)
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


@settings(max_examples=150)
@given(models())
def test_check_refuses_exactly_what_cannot_be_cut(model: tuple[dict[str, Any], Layout]) -> None:
    hf, layout = model
    q, kv, inner = hf["num_attention_heads"], hf["num_key_value_heads"], hf["intermediate_size"]
    fits = q % layout.tp == 0 and (kv % layout.tp == 0 or layout.tp % kv == 0) and layout.pp <= hf["num_hidden_layers"]
    fits = fits and inner % layout.moe_tp == 0 and hf.get("num_local_experts", layout.moe_ep) % layout.moe_ep == 0
    try:
        layout.check(read_config(hf))
    except Refused as refusal:
        assert not fits, refusal.message
        assert refusal.exit_code == 3
    else:
        assert fits


def dequantized(ranks: list[Weights], precision: PrecisionName) -> list[Weights]:
    """Every quantized matrix as float32, by code of the test's own."""
    result = []
    for rank in ranks:
        plain = {}
        for name, tensor in rank.items():
            stem = name.removesuffix(".weight")
            if name.endswith(("scaling_factor", "per_channel_scale")):
                continue
            if precision == "int8" and f"{stem}.per_channel_scale" in rank:
                plain[name] = tensor.float() * rank[f"{stem}.per_channel_scale"].unsqueeze(-1)
            elif precision == "fp8" and f"{stem}.weights_scaling_factor" in rank:
                scale = rank[f"{stem}.weights_scaling_factor"]
                plain[name] = tensor.float() * (scale.unsqueeze(-1) if tensor.dim() == 3 else scale)
            elif f"{stem}.weights_scaling_factor" in rank:
                low, high = tensor.int() & 15, tensor.int() >> 4
                values = torch.stack([low, high], -1).flatten(-2)
                values = torch.where(values > 7, values - 16, values).float()
                scale = rank[f"{stem}.weights_scaling_factor"].float()
                plain[name] = values * scale.repeat_interleave(values.shape[-1] // scale.shape[-1], -1)
            else:
                plain[name] = tensor
        result.append(plain)
    return result


QUANTIZED = st.sampled_from([
    ("llama", (2,)), ("llama", (4, 2)), ("llama", (8,)), ("qwen2", (2, 3)), ("mistral", (4,)),
    ("mixtral", (4, 1, 2, 2)), ("mixtral", (4, 1, 1, 4)), ("mixtral", (2, 1, 2, 1)),
])  # fmt: skip


@settings(max_examples=30)
@given(QUANTIZED, st.sampled_from(["int8", "int4", "fp8"]), st.sampled_from(["bf16", "fp16"]), st.integers(0, 99))
def test_a_quantized_model_is_the_same_in_every_layout(
    model: tuple[str, tuple[int, ...]], precision: PrecisionName, dtype: Any, seed: int
) -> None:
    family, sizes = model
    # A rank's input is a multiple of 128 at every tp, so that the int4 group is the same.
    hf = hf_config(family, hidden_size=128, num_attention_heads=8, head_dim=128, intermediate_size=1024, num_hidden_layers=3)
    if family == "mixtral":
        hf |= {"intermediate_size": 256, "num_hidden_layers": 1}
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
