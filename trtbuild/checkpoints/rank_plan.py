"""Which tensors one rank holds: TensorRT-LLM's tensor names, shapes, fusion and sharding.

Names and order follow `tensorrt_llm/models/{llama,qwen}`. Two facts to keep in mind while reading: a dense MLP
computes `silu(fc(x)) * gate(x)`, so `mlp.fc` holds the checkpoint's gate_proj and `mlp.gate` its up_proj; in an MoE
layer `mlp.fc` is the two fused, **up first**. Decoder layers are renumbered from 0 on each pipeline stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trtbuild.checkpoints.layout import RankLayout
from trtbuild.checkpoints.model_config import MlaConfig, ModelConfig
from trtbuild.checkpoints.precision import SAFETENSORS_16BIT, LinearForm, Precision
from trtbuild.checkpoints.rank_tensors import ConstantTensor, Linear, Piece, PlainTensor, RankPlan, TensorSpec
from trtbuild.errors import Refused


def plan_rank(config: ModelConfig, layout: RankLayout, precision: Precision) -> RankPlan:
    """The tensors of one rank; raises `Refused` where int4 finds no group that fits, or act-order meets a cut."""
    layers = layout.layout.stage_layers(config.num_layers, layout.pp_rank)
    dtype = SAFETENSORS_16BIT[precision.dtype]
    plain = list(_outer_tensors(config, layout, dtype))
    linears: list[Linear] = []
    constants: list[ConstantTensor] = []
    for local, layer in enumerate(layers):
        builder = _LayerBuilder(config, layout, precision, dtype, local, layer)
        plain += builder.plain()
        linears += builder.linears()
        constants += builder.constants()
    for linear in linears:
        constants += linear.constants()
        _ = linear.group_size  # Refuses here, before any work.
        if linear.form.order and any(piece.columns is not None for piece in linear.pieces) and layout.layout.tp > 1:
            raise Refused(
                f"{linear.global_name}: the checkpoint's GPTQ groups are in act-order, so that a group's inputs lie on "
                "several ranks; use --tp 1, or a --precision that encodes it again"
            )
    return RankPlan(config, layout, precision, layers, tuple(plain), tuple(linears), tuple(constants))


def _whole(name: str, dtype: str, source: str, *shape: int) -> PlainTensor:
    return PlainTensor(TensorSpec(name, dtype, shape), (Piece(source, range(shape[0])),))


def _outer_tensors(config: ModelConfig, layout: RankLayout, dtype: str) -> Iterator[PlainTensor]:
    if layout.is_first_stage:
        yield _whole("transformer.vocab_embedding.weight", dtype, "embedding", config.vocab_size, config.hidden_size)
    if layout.is_last_stage:
        yield _whole("transformer.ln_f.weight", dtype, "final_norm", config.hidden_size)
        rows = layout.vocab_rows(config.vocab_size)
        real = range(min(rows.start, config.vocab_size), min(rows.stop, config.vocab_size))
        source = "embedding" if config.tie_embeddings else "lm_head"
        yield PlainTensor(TensorSpec("lm_head.weight", dtype, (len(rows), config.hidden_size)), (Piece(source, real),))


@dataclass(frozen=True)
class _LayerBuilder:
    """The tensors of one decoder layer on one rank."""

    config: ModelConfig
    layout: RankLayout
    precision: Precision
    dtype: str
    local: int
    layer: int

    @property
    def _source(self) -> str:
        return f"layers.{self.layer}."

    def plain(self) -> Iterator[PlainTensor]:
        config, hidden = self.config, self.config.hidden_size
        for norm in ("input_layernorm", "post_layernorm"):
            yield self._replicated(f"{norm}.weight", norm, hidden)
        if config.qk_norm:
            yield self._replicated("attention.q_layernorm.weight", "q_norm", config.head_dim)
            yield self._replicated("attention.k_layernorm.weight", "k_norm", config.head_dim)
        if config.mla:
            yield from self._latent_plain(config.mla)
        if config.moe and config.is_moe(self.layer):
            yield self._replicated("mlp.router.weight", "router", config.moe.num_experts, hidden, dtype="F32")
            if config.moe.shared_gate:
                yield self._replicated("mlp.shared_expert_gate.weight", "shared_gate", 1, hidden)

    def constants(self) -> Iterator[ConstantTensor]:
        """The scale of an fp8 KV cache: 1, as upstream's converters write it; values beyond 448 would be clipped."""
        if self.precision.fp8_cache:
            name = f"transformer.layers.{self.local}.attention.kv_cache_scaling_factor"
            yield ConstantTensor(TensorSpec(name, "F32", (1,)), 1.0)

    def linears(self) -> Iterator[Linear]:
        yield from self._latent_attention(self.config.mla) if self.config.mla else self._attention()
        yield from self._experts() if self.config.is_moe(self.layer) else self._dense_mlp()

    def _replicated(self, name: str, source: str, *shape: int, dtype: str | None = None) -> PlainTensor:
        return _whole(f"transformer.layers.{self.local}.{name}", dtype or self.dtype, self._source + source, *shape)

    def _attention(self) -> Iterator[Linear]:
        config, source = self.config, self._source
        heads = _head_rows(self.layout.tp_slice(config.num_heads), config.head_dim)
        qkv = _stack(
            [(source + "q", heads)]
            + [
                (source + part, _head_rows(range(head, head + 1), config.head_dim))
                for part in ("k", "v")
                for head in self.layout.kv_heads(config.num_kv_heads)
            ]
        )
        yield self._linear("attention.qkv", config.hidden_size, qkv, bias=config.qkv_bias)
        dense = (Piece(source + "o", range(config.hidden_size), heads),)
        yield self._linear("attention.dense", len(heads), dense, bias=config.dense_bias)

    def _latent_plain(self, mla: MlaConfig) -> Iterator[PlainTensor]:
        """Norms of the latent vectors, and kv_b_proj: all heads' key rows, then all heads' value rows."""
        if mla.q_lora_rank:
            yield self._replicated("attention.q_a_layernorm.weight", "q_a_norm", mla.q_lora_rank)
        yield self._replicated("attention.kv_a_layernorm.weight", "kv_a_norm", mla.kv_lora_rank)
        heads, width = self.layout.tp_slice(self.config.num_heads), mla.nope_head_dim + mla.v_head_dim
        keys = [range(head * width, head * width + mla.nope_head_dim) for head in heads]
        values = [range(head * width + mla.nope_head_dim, (head + 1) * width) for head in heads]
        pieces = _stack([(self._source + "kv_b", rows) for rows in (*keys, *values)])
        shape = (len(heads) * width, mla.kv_lora_rank)
        name = f"transformer.layers.{self.local}.attention.kv_b_proj.weight"
        yield PlainTensor(TensorSpec(name, self.dtype, shape), pieces)

    def _latent_attention(self, mla: MlaConfig) -> Iterator[Linear]:
        """fused_a (q_a above kv_a) is whole on every rank; the heads' projections are cut."""
        config, source = self.config, self._source
        heads = self.layout.tp_slice(config.num_heads)
        down = [(source + "q_a", range(mla.q_lora_rank))] if mla.q_lora_rank else []
        fused = _stack([*down, (source + "kv_a", range(mla.latent_dim))])
        yield self._linear("attention.fused_a", config.hidden_size, fused)
        query = (Piece(source + ("q_b" if mla.q_lora_rank else "q"), _head_rows(heads, config.head_dim)),)
        yield self._linear("attention.q_b_proj", mla.q_lora_rank or config.hidden_size, query)
        columns = _head_rows(heads, mla.v_head_dim)
        dense = (Piece(source + "o", range(config.hidden_size), columns),)
        yield self._linear("attention.dense", len(columns), dense)

    def _dense_mlp(self) -> Iterator[Linear]:
        config, source = self.config, self._source
        part = self.layout.tp_slice(config.intermediate_size)
        for name, weight in (("fc", "gate"), ("gate", "up")):
            yield self._linear(f"mlp.{name}", config.hidden_size, (Piece(source + weight, part),), bias=config.mlp_bias)
        down = (Piece(source + "down", range(config.hidden_size), part),)
        yield self._linear("mlp.proj", len(part), down, bias=config.mlp_bias)

    def _experts(self) -> Iterator[Linear]:
        """The routed experts, cut by moe-tp and moe-ep, and the shared expert, cut by tp; both hold up above gate."""
        config, moe = self.config, self.config.moe
        assert moe is not None
        part = self.layout.moe_tp_slice(moe.intermediate_size)
        experts = self.layout.experts(moe.num_experts)
        fc: list[Piece] = []
        proj: list[Piece] = []
        for local, expert in enumerate(experts):
            source = f"{self._source}experts.{expert}."
            fc += _stack([(source + "up", part), (source + "gate", part)], expert=local)
            proj.append(Piece(source + "down", range(config.hidden_size), part, expert=local))
        yield self._linear("mlp.fc", config.hidden_size, tuple(fc), experts=experts)
        yield self._linear("mlp.proj", len(part), tuple(proj), experts=experts)
        if moe.shared_intermediate_size:
            part, source = self.layout.tp_slice(moe.shared_intermediate_size), f"{self._source}shared."
            both = _stack([(source + "up", part), (source + "gate", part)])
            yield self._linear("mlp.shared_expert.fc", config.hidden_size, both)
            down = (Piece(source + "down", range(config.hidden_size), part),)
            yield self._linear("mlp.shared_expert.proj", len(part), down)

    def _linear(
        self,
        name: str,
        in_features: int,
        pieces: tuple[Piece, ...],
        *,
        bias: bool = False,
        experts: range | None = None,
    ) -> Linear:
        out_features = sum(len(p.rows) for p in pieces) // (len(experts) if experts else 1)
        # A row-parallel bias is whole on every rank and added once, after the all-reduce.
        bias_pieces = tuple(Piece(p.source + ".bias", p.rows, None, p.offset) for p in pieces) if bias else ()
        global_name = f"transformer.layers.{self.layer}.{name}"
        form = self.precision.form_of(global_name)
        return Linear(
            name=f"transformer.layers.{self.local}.{name}",
            global_name=global_name,
            in_features=in_features,
            out_features=out_features,
            form=form if form.is_quantized else LinearForm(self.precision.dtype),
            dtype=self.dtype,
            pieces=pieces,
            num_experts=len(experts) if experts is not None else None,
            first_expert=experts.start if experts is not None else 0,
            bias_pieces=bias_pieces,
            dialect=self.precision.dialect,
        )


def _head_rows(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)


def _stack(parts: list[tuple[str, range]], expert: int | None = None) -> tuple[Piece, ...]:
    """Pieces placed one below the other."""
    pieces: list[Piece] = []
    offset = 0
    for source, rows in parts:
        pieces.append(Piece(source, rows, None, offset, expert))
        offset += len(rows)
    return tuple(pieces)
