"""What the tensors of one rank's checkpoint are: copied, linear (with scales and bias), or constant.

Each knows its name, type and shape in the rank file, and the pieces of the source's tensors that it is made of. Which
ones a rank has is `rank_plan.plan_rank`'s to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from trtbuild.checkpoints.layout import RankLayout
from trtbuild.checkpoints.model_config import ModelConfig
from trtbuild.checkpoints.precision import Dialect, FormatName, LinearForm, Precision, int4_group

ITEM_SIZE = {"I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a rank file; `dtype` is the safetensors name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        size = ITEM_SIZE[self.dtype]
        for dim in self.shape:
            size *= dim
        return size


@dataclass(frozen=True)
class Piece:
    """A rectangle of a source tensor and the rows where it lands in the rank tensor.

    `source` is a canonical name (`families.Family.source_name` translates it); `columns` is None for all of them.
    Rows past the source's end stay zero. `expert` is the destination's index in the leading expert dimension.
    """

    source: str
    rows: range
    columns: range | None = None
    offset: int = 0
    expert: int | None = None


@dataclass(frozen=True)
class PlainTensor:
    """A rank tensor that is copied (and converted to `spec.dtype`), never quantized."""

    spec: TensorSpec
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class ConstantTensor:
    """A rank tensor of one value everywhere."""

    spec: TensorSpec
    value: float


@dataclass(frozen=True)
class Linear:
    """A linear layer on one rank: `[out_features, in_features]`, or a stack of `num_experts` of them.

    `name` numbers layers within the pipeline stage, `global_name` within the model. All sources that feed one
    (global_name, expert) share an fp8 scale, as TensorRT-LLM wants it for fused q/k/v and for an expert's up and gate.
    """

    name: str
    global_name: str
    in_features: int
    out_features: int
    form: LinearForm
    dtype: str
    pieces: tuple[Piece, ...]
    num_experts: int | None = None
    first_expert: int = 0
    bias_pieces: tuple[Piece, ...] = ()
    dialect: Dialect = "tensorrt-rtx"

    @property
    def precision(self) -> FormatName:
        return self.form.format

    @property
    def is_quantized(self) -> bool:
        return self.form.is_quantized

    @property
    def has_bias(self) -> bool:
        return bool(self.bias_pieces)

    @cached_property
    def group_size(self) -> int | None:
        """Values of one int4 scale along the input, or None for the other precisions."""
        if self.precision != "int4":
            return None
        return int4_group(self.in_features, self.global_name, self.form.group_size)

    def tensors(self) -> list[TensorSpec]:
        """Rank tensors (see `build/README.md`), apart from constants."""
        stack = () if self.num_experts is None else (self.num_experts,)
        weight_dtype, columns = {
            "fp8": ("F8_E4M3", self.in_features),
            "fp8-dynamic": ("F8_E4M3", self.in_features),
            "int8": ("I8", self.in_features),
            "int4": ("U8", self.in_features // 2),
        }.get(self.precision, (self.dtype, self.in_features))
        weight = TensorSpec(f"{self.name}.weight", weight_dtype, (*stack, self.out_features, columns))
        if self.packs_rows:
            weight = TensorSpec(weight.name, "I8", (*stack, self.out_features // 2, self.in_features))
        specs = [weight, *self._scales(stack)]
        if self.form.order:
            specs.append(TensorSpec(f"{self.name}.input_order", "I32", (self.in_features,)))
        if self.has_bias:
            specs.append(TensorSpec(f"{self.name}.bias", self.dtype, (self.out_features,)))
        return specs

    @property
    def packs_rows(self) -> bool:
        """Whether a byte holds two int4 values of one column, the even row's in the low nibble, as ModelOpt's AWQ."""
        return self.precision == "int4" and self.dialect == "tensorrt-llm"

    def constants(self) -> Iterator[ConstantTensor]:
        """AWQ's scales of the input: ones, since ours are folded into what comes before; TensorRT-LLM wants them."""
        if self.packs_rows:
            shape = (self.in_features,)
            yield ConstantTensor(TensorSpec(f"{self.name}.prequant_scaling_factor", self.dtype, shape), 1.0)

    def _scales(self, stack: tuple[int, ...]) -> Iterator[TensorSpec]:
        if self.precision == "fp8":
            rows = self.out_features if self.form.row_scales else 1
            yield TensorSpec(f"{self.name}.weights_scaling_factor", "F32", (*stack, rows))
            yield TensorSpec(f"{self.name}.activation_scaling_factor", "F32", (1,))
        elif self.precision in ("int8", "fp8-dynamic"):
            yield TensorSpec(f"{self.name}.per_channel_scale", "F32", (*stack, self.out_features))
        elif self.group_size:
            shape = (*stack, self.out_features, self.in_features // self.group_size)
            yield TensorSpec(f"{self.name}.weights_scaling_factor", self.dtype, shape)
            if self.form.zeros:
                # -zero * scale: what a group's sum of inputs is multiplied by and added.
                yield TensorSpec(f"{self.name}.zero", self.dtype, shape)


@dataclass(frozen=True)
class RankPlan:
    """Everything that one rank holds, in file order."""

    config: ModelConfig
    layout: RankLayout
    precision: Precision
    layers: range
    plain: tuple[PlainTensor, ...]
    linears: tuple[Linear, ...]
    constants: tuple[ConstantTensor, ...] = ()

    def tensors(self) -> list[TensorSpec]:
        whole = [tensor.spec for tensor in (*self.plain, *self.constants)]
        return whole + [spec for linear in self.linears for spec in linear.tensors()]

    def cache_shapes(self) -> dict[str, tuple[int, int]]:
        """(heads, width) of each KV cache that one decoder layer keeps on this rank, by the cache's name.

        With MLA it is one cache of latent vectors, the same on every tensor-parallel rank.
        """
        if self.config.mla:
            return {"latent_cache": (1, self.config.mla.latent_dim)}
        heads = len(self.layout.kv_heads(self.config.num_kv_heads))
        return {"key_cache": (heads, self.config.head_dim), "value_cache": (heads, self.config.head_dim)}

    def only_layers(self) -> RankPlan:
        """The same plan without embedding, final norm and lm_head."""
        plain = tuple(t for t in self.plain if t.spec.name.startswith("transformer.layers."))
        return replace(self, plain=plain)
