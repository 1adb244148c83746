"""How large a plan's scratch and weights will be, from shapes alone.

The formula was fitted to TensorRT-RTX 1.7.1 builds (weights as inputs, SM89; hidden 2048 and 4096, experts of 768 to
14336, 8 to 128 of them, steps of 8 to 512 tokens, 1 to 8 layers; fp16, bf16, fp8, int8; DeepSeek-V2-Lite's attention):
what the builder logged lay between 0.6 and 1.3 times the forecast. It is a check that nothing was unpacked or copied,
not an accounting of every buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trtbuild.checkpoints.layout import padded_vocab
from trtbuild.checkpoints.model_config import MlaConfig
from trtbuild.checkpoints.rank_tensors import Linear, RankPlan
from trtbuild.engines.limits import EngineLimits
from trtbuild.engines.network.segments import Segment, moe_of
from trtbuild.engines.tensorrt.bindings import is_always_input
from trtbuild.engines.tensorrt.experts import MoeForm
from trtbuild.engines.tensorrt.ops import Phase

# The GEMM library's workspace, one for each stream; plans are built with one stream.
GEMM_WORKSPACE = 8_192_000
# Partial results of fused attention: float32, for so many splits of the keys.
ATTENTION_SPLITS = 8
# What does not grow with the step: partial results of short steps, counters, shapes.
FIXED = 2 * 2**20
# Constants that a plan holds besides embedded weights: numbers, ranges, RoPE-free.
SMALL_CONSTANTS = 256 * 2**10


@dataclass(frozen=True)
class Forecast:
    """Bytes of device memory. `scratch` has one entry for each optimization profile."""

    scratch: tuple[int, ...]
    weights: int


def forecast(
    plan: RankPlan, segment: Segment, phase: Phase, limits: EngineLimits, moe_form: MoeForm | None, embedded: bool
) -> Forecast:
    """Forecast of one plan of a segment."""
    weights = _embedded_bytes(plan, segment) if embedded else 0
    if segment.kind == "embed":
        return Forecast((GEMM_WORKSPACE,), weights)
    if segment.kind == "head":
        return Forecast((GEMM_WORKSPACE + _head_bytes(plan, limits),), weights)
    prefill, decode = (limits.chunk_size, 1), (limits.max_batch_size, limits.max_batch_size)
    steps = {"prefill": [prefill], "decode": [decode]}.get(phase, [prefill, decode])
    per_token = _attention_bytes(plan, segment, limits)
    mixed = _moe_bytes(plan, segment, moe_form) if moe_form else _mlp_bytes(plan, segment)
    # A dense MLP reuses attention's buffers; conditionals and loops do not.
    step_bytes = per_token + mixed if moe_form else max(per_token, mixed)
    constant = GEMM_WORKSPACE + FIXED + _unpacked_bytes(plan, segment, moe_form)
    slot_bytes = _latent_copy(plan, limits)
    return Forecast(tuple(constant + slots * slot_bytes + tokens * step_bytes for tokens, slots in steps), weights)


def _embedded_bytes(plan: RankPlan, segment: Segment) -> int:
    inputs = (linear for linear in segment.linears(plan).values() if is_always_input(linear))
    left_out = sum(spec.num_bytes for linear in inputs for spec in linear.tensors() if not spec.name.endswith(".bias"))
    return sum(spec.num_bytes for spec in segment.weights(plan).values()) - left_out


def _head_bytes(plan: RankPlan, limits: EngineLimits) -> int:
    tp = plan.layout.layout.tp
    vocab = padded_vocab(plan.config.vocab_size, tp)
    gathered = 2 * 4 * vocab + 4 * vocab // tp if tp > 1 else 0
    return limits.max_head_rows * (3 * 2 * plan.config.hidden_size + 2 * vocab // tp + gathered)


def _attention_bytes(plan: RankPlan, segment: Segment, limits: EngineLimits) -> int:
    """Per token: split attention, q/k/v twice (before and after RoPE), residual and norm; the mask of a window."""
    config = plan.config
    heads = max(config.num_heads // plan.layout.layout.tp, 4)
    kv_heads = len(plan.layout.kv_heads(config.num_kv_heads))
    if config.mla:
        return _latent_attention_bytes(plan, config.mla, limits)
    split = heads * config.head_dim * 4 * ATTENTION_SPLITS
    projections = (heads + 2 * kv_heads) * config.head_dim * 2 * 2
    layers = plan.layers[segment.first_layer : segment.first_layer + segment.num_layers]
    windows = [config.window(layer) for layer in layers]
    masked = any(window is not None and window < limits.max_seq_len for window in windows)
    return split + projections + 2 * 2 * config.hidden_size + (2 * limits.cache_capacity if masked else 0)


def _latent_attention_bytes(plan: RankPlan, mla: MlaConfig, limits: EngineLimits) -> int:
    """Per token: float32 scores of every head over the whole cache, the mask, and absorbed queries and outputs."""
    num_heads, capacity = plan.config.num_heads // plan.layout.layout.tp, limits.cache_capacity
    return (4 * num_heads + 2) * capacity + 4 * num_heads * (plan.config.head_dim + mla.latent_dim)


def _latent_copy(plan: RankPlan, limits: EngineLimits) -> int:
    """Per slot of the step: MLA's matrix multiplies read a transposed copy of its latents."""
    return limits.cache_capacity * plan.config.mla.latent_dim * 2 if plan.config.mla else 0


def _product_size(*linears: Linear) -> int:
    """Bytes of an activation that a GEMM wrote: fp8 products are float32 until they are scaled."""
    return 4 if any(linear.precision in ("fp8", "fp8-dynamic") for linear in linears) else 2


def _mlp_bytes(plan: RankPlan, segment: Segment) -> int:
    hidden, inner = plan.config.hidden_size, plan.config.intermediate_size // plan.layout.layout.tp
    linears = segment.linears(plan)
    both = _product_size(linears["layers.0.mlp.fc"], linears["layers.0.mlp.gate"])
    down = _product_size(linears["layers.0.mlp.proj"])
    return 2 * inner * both + (inner if down == 4 else 0) + (4 + down) * hidden


def _moe_bytes(plan: RankPlan, segment: Segment, form: MoeForm) -> int:
    config, moe = plan.config, moe_of(plan, segment)
    if moe is None:
        return 0
    hidden = config.hidden_size
    num_experts = len(plan.layout.experts(moe.num_experts))
    inner = max(
        len(plan.layout.moe_tp_slice(moe.intermediate_size)), moe.shared_intermediate_size // plan.layout.layout.tp
    )
    linears = segment.linears(plan)
    shared = [linear for name, linear in linears.items() if name == "layers.0.mlp.shared_expert.fc"]
    both = 2 * inner * _product_size(linears["layers.0.mlp.fc"], *shared)
    if form == "conditional":
        # Each expert's result keeps its own buffer, in every layer; of fp8 some stay float32.
        size = 3 if _product_size(linears["layers.0.mlp.proj"]) == 4 else 2
        return both + segment.num_layers * (num_experts + 1) * size * hidden
    if form == "routed":
        # One float32 sum in each layer, which all its experts' loops add to.
        return segment.num_layers * 4 * hidden + 8 * hidden + 16 * num_experts
    return both + 8 * hidden


def _unpacked_bytes(plan: RankPlan, segment: Segment, form: MoeForm | None) -> int:
    """16-bit copies of quantized weights that TensorRT-RTX makes in scratch, known and accepted.

    int8: fc and gate of a dense MLP share an input, are fused, and fusing dequantizes; experts outside of conditionals;
    attention's weights beside conditionals and loops.
    int4: one expert at a time in a loop.
    """
    linears = segment.linears(plan)
    moe = moe_of(plan, segment)
    if moe is None:
        both = [linears["layers.0.mlp.fc"], linears["layers.0.mlp.gate"]]
        return _unpacked(both) if all(linear.precision == "int8" for linear in both) else 0
    experts = [linear for linear in linears.values() if linear.num_experts is not None]
    int8 = [linear for linear in linears.values() if linear.precision == "int8"]
    attention = _unpacked([linear for linear in int8 if linear.num_experts is None])
    if form == "conditional":
        return attention
    stacks = _unpacked([linear for linear in experts if linear.precision == "int8"])
    one_layer = [linears["layers.0.mlp.fc"], linears["layers.0.mlp.proj"]]
    one_expert = _unpacked([linear for linear in one_layer if linear.precision == "int4"])
    num_experts = len(plan.layout.experts(moe.num_experts))
    return attention + stacks * num_experts + (one_expert if form == "routed" else 0)


def _unpacked(linears: Sequence[Linear]) -> int:
    """Bytes in 16 bit, of one expert of a stack."""
    return sum(2 * linear.in_features * linear.out_features for linear in linears)
