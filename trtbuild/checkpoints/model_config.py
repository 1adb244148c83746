"""Architecture facts of a decoder, under our own names, whatever the checkpoint called them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; field names as in transformers' `rope_parameters`.

    `attention_factor` multiplies the cos and sin tables (YaRN); None means the type's default.
    """

    theta: float = 10000.0
    type: RopeType = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class MoeConfig:
    """A layer of routed experts; `norm_topk_prob` renormalises the chosen experts' probabilities."""

    num_experts: int
    top_k: int
    intermediate_size: int
    norm_topk_prob: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """What the network, the layout and the rank checkpoint need to know of a model.

    Sizes are those of the whole model, before any sharding; `moe` is None for a dense model.
    Layers from `first_window_layer` on attend to the last `sliding_window` positions only.
    """

    architecture: str
    family: str
    dtype: Literal["bf16", "fp16"]
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_epsilon: float
    max_position_embeddings: int
    rope: RopeConfig
    moe: MoeConfig | None = None
    sliding_window: int | None = None
    first_window_layer: int = 0
    tie_embeddings: bool = False
    qkv_bias: bool = False
    dense_bias: bool = False
    mlp_bias: bool = False

    def window(self, layer: int) -> int | None:
        """Positions that `layer` (global index) attends to, or None when it sees all of them."""
        return self.sliding_window if layer >= self.first_window_layer else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`; raises TypeError on an unknown field."""
        moe = data.get("moe")
        nested = {"rope": RopeConfig(**data["rope"]), "moe": MoeConfig(**moe) if moe else None}
        unknown = set(data) - {field.name for field in fields(cls)}
        if unknown:
            raise TypeError(f"unknown ModelConfig fields: {sorted(unknown)}")
        return cls(**{**data, **nested})
