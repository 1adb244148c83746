"""The decoder network, written once, for one rank, in the operations of `ops.NetworkOps`.

An engine is a chain of segments: `embed`, groups of decoder layers, `head`. Each function here defines one segment.
Weight names inside a segment count layers from the segment's start (`layers.{j}...`), so that segments of one
signature are one plan; `segments.Segment.checkpoint_name` maps them back to the rank checkpoint.
"""

from __future__ import annotations

from trtbuild.checkpoints.rank_tensors import RankPlan
from trtbuild.engines.network.ops import NetworkOps, T
from trtbuild.engines.network.segments import Segment

# name: (type, shape). B slots x S tokens of the step, `tokens` = B * S, R rows whose logits are wanted.
# `active` is 1 for real tokens and 0 for padding and idle slots; `key_value_lengths` is write_index + S, padding
# included, because TensorRT's lower-right causal mask counts from the padded end.
STEP_INPUTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "tokens": ("int32", ("B", "S")),
    "positions": ("int32", ("B", "S")),
    "hidden": ("model", ("B", "S", "H")),
    "rope_cos": ("float32", ("B", "S", "D/2")),
    "rope_sin": ("float32", ("B", "S", "D/2")),
    "write_index": ("int32", ("B",)),
    "key_value_lengths": ("int32", ("B",)),
    "active": ("int32", ("B", "S")),
    "flat_hidden": ("model", ("tokens", "H")),
    "rows": ("int32", ("R",)),
}


def define_segment(ops: NetworkOps[T], plan: RankPlan, segment: Segment) -> None:
    """Emit one segment of one rank's network into `ops`."""
    if segment.kind == "embed":
        _embed(ops)
    elif segment.kind == "decoder":
        _decoder(ops, plan, segment)
    else:
        _head(ops)


def _embed(ops: NetworkOps[T]) -> None:
    """tokens, positions -> hidden and the RoPE rows that every decoder segment of the step uses."""
    ops.output("hidden", ops.embedding("vocab_embedding.weight", ops.input("tokens")))
    positions = ops.input("positions")
    ops.output("rope_cos", ops.embedding("rope_cos_table", positions))
    ops.output("rope_sin", ops.embedding("rope_sin_table", positions))


def _decoder(ops: NetworkOps[T], plan: RankPlan, segment: Segment) -> None:
    """hidden -> hidden through `segment.num_layers` decoder layers."""
    hidden = ops.input("hidden")
    cos, sin = ops.input("rope_cos"), ops.input("rope_sin")
    for j in range(segment.num_layers):
        name = f"layers.{j}"
        window = plan.config.window(plan.layers[segment.first_layer + j])
        attended = _attention(
            ops, plan, f"{name}.attention", ops.rms_norm(hidden, f"{name}.input_layernorm"), cos, sin, window
        )
        hidden = ops.add(hidden, attended)
        normed = ops.rms_norm(hidden, f"{name}.post_layernorm")
        mixed = _moe(ops, plan, f"{name}.mlp", normed) if plan.config.moe else _mlp(ops, plan, f"{name}.mlp", normed)
        hidden = ops.add(hidden, mixed)
    ops.output("hidden", hidden)


def _head(ops: NetworkOps[T]) -> None:
    """Rows of hidden -> float32 logits over the padded vocabulary."""
    rows = ops.gather_rows(ops.input("flat_hidden"), ops.input("rows"))
    logits = ops.to_float32(ops.linear(ops.rms_norm(rows, "ln_f"), "lm_head"))
    ops.output("logits", ops.all_gather(logits))


def _attention(ops: NetworkOps[T], plan: RankPlan, name: str, x: T, cos: T, sin: T, window: int | None) -> T:
    config, tp = plan.config, plan.layout.layout.tp
    num_heads = config.num_heads // tp
    num_kv_heads = len(plan.layout.kv_heads(config.num_kv_heads))
    qkv = ops.linear(x, f"{name}.qkv")
    if config.qkv_bias:
        qkv = ops.add_bias(qkv, f"{name}.qkv")
    query, key, value = ops.split_heads(qkv, (num_heads, num_kv_heads, num_kv_heads))
    keys = ops.update_cache(f"{name}.key_cache", ops.rope(key, cos, sin))
    values = ops.update_cache(f"{name}.value_cache", value)
    attended = ops.merge_heads(ops.attention(ops.rope(query, cos, sin), keys, values, window))
    return _row_parallel(ops, attended, f"{name}.dense", bias=config.dense_bias)


def _mlp(ops: NetworkOps[T], plan: RankPlan, name: str, x: T) -> T:
    """silu(fc) * gate: TensorRT-LLM's `fc` is the checkpoint's gate_proj, its `gate` the up_proj."""
    bias = plan.config.mlp_bias
    activated = ops.silu(_column_parallel(ops, x, f"{name}.fc", bias=bias))
    gated = ops.multiply(activated, _column_parallel(ops, x, f"{name}.gate", bias=bias))
    return _row_parallel(ops, gated, f"{name}.proj", bias=bias)


def _moe(ops: NetworkOps[T], plan: RankPlan, name: str, x: T) -> T:
    moe = plan.config.moe
    assert moe is not None
    scores, indices = ops.select_experts(ops.router(x, f"{name}.router"), moe)
    # One collective after the summed experts: a rank may hold none of a token's experts.
    return ops.all_reduce(ops.experts(x, name, scores, indices, moe))


def _column_parallel(ops: NetworkOps[T], x: T, name: str, *, bias: bool) -> T:
    y = ops.linear(x, name)
    return ops.add_bias(y, name) if bias else y


def _row_parallel(ops: NetworkOps[T], x: T, name: str, *, bias: bool) -> T:
    """Every rank holds the whole bias, so it is added once, after the reduction."""
    y = ops.all_reduce(ops.linear(x, name))
    return ops.add_bias(y, name) if bias else y
