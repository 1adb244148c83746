"""The tensors that a plan is run with: their names, types, shapes, and where their contents come from.

A plan whose weights are inputs says here, for each, how it is made from the rank checkpoint. The same description
feeds the constants of a plan whose weights are embedded, so that both forms hold the same values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from trtbuild.checkpoints.rank_checkpoint import WeightReader
from trtbuild.checkpoints.rank_tensors import Linear, RankPlan
from trtbuild.engines.network.segments import Segment

if TYPE_CHECKING:
    import torch

Role = Literal["step", "weight", "cache", "output"]

# copy             the rank tensor, or one expert of a stack
# transpose        the same, last two dimensions swapped and contiguous: [in, out]
# twice            the same as copy, each column of the last dimension two times
# reciprocal       1 / activation_scaling_factor, float32 [1, 1]
# product          weights_scaling_factor * activation_scaling_factor, float32 [1, 1] or [1, out]
# first_expert     the global index of the rank's first expert, int32 [1, 1]
# key_heads        MLA's kv_b_proj: the heads' key rows, [heads, nope_head_dim, kv_lora_rank]
# value_heads      the heads' value rows, each transposed, [heads, kv_lora_rank, v_head_dim]
# rope_cos, rope_sin   the model's RoPE table, float32 [positions, rope_dim / 2]
Transform = Literal[
    "copy",
    "transpose",
    "twice",
    "reciprocal",
    "product",
    "first_expert",
    "key_heads",
    "value_heads",
    "rope_cos",
    "rope_sin",
]

# Names of torch types; int4 is bound packed.
TORCH_TYPES = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float8_e4m3": "float8_e4m3fn",
    "int8": "int8",
    "int4": "uint8",
    "int32": "int32",
}

# safetensors' names of the rank checkpoint's types.
STORED_TYPES = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3", "I8": "int8", "I32": "int32",
}  # fmt: skip


@dataclass(frozen=True)
class WeightSource:
    """How a weight's contents follow from the rank: `tensors` are segment-local rank tensor names."""

    transform: Transform
    tensors: tuple[str, ...] = ()
    expert: int | None = None


@dataclass(frozen=True)
class Binding:
    """One input or output of a plan.

    `shape` holds numbers and symbols: B slots, S tokens of the step, `tokens`, and R rows of logits. `alias` names
    the cache input whose memory a cache output must be bound to. An int4 shape counts values, two of which are in a
    byte of the bound tensor.
    """

    name: str
    role: Role
    dtype: str
    shape: tuple[int | str, ...]
    source: WeightSource | None = None
    alias: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; fields that are None are left out."""
        data = {key: value for key, value in asdict(self).items() if value is not None}
        return {**data, "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Binding:
        """Inverse of `to_dict`; raises TypeError on an unknown field."""
        source = data.get("source")
        if source is not None:
            source = replace(WeightSource(**source), tensors=tuple(source["tensors"]))
        return cls(**{**data, "shape": tuple(data["shape"]), "source": source})


def is_always_input(linear: Linear) -> bool:
    """Whether a layer's weights are inputs even of a plan that embeds the others.

    Experts in int8 are: a quantized constant must stand right before its dequantization, so it cannot enter an expert's
    conditional, outside of which TensorRT-RTX 1.7 unpacks it to scratch.
    """
    return linear.precision == "int8" and linear.num_experts is not None


def bind_weight(
    binding: Binding, plan: RankPlan, segment: Segment, read: WeightReader, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The tensor that must be fed to the weight `binding` of `segment` on the rank of `plan`; contiguous, on `device`.

    Raises ValueError where the binding is no weight or the rank's tensor has another shape.
    """
    import torch

    from trtbuild.engines.network.rope import rope_tables

    source = binding.source
    if source is None:
        raise ValueError(f"{binding.name} is a {binding.role}, not a weight")
    if source.transform == "first_expert":
        first = plan.layout.experts(plan.config.moe.num_experts).start if plan.config.moe else 0
        return torch.tensor([[first]], dtype=torch.int32, device=device)
    if source.transform in ("rope_cos", "rope_sin"):
        table = rope_tables(plan.config, int(binding.shape[0]))[source.transform == "rope_sin"]
        return table.contiguous().to(device)
    values = [read(segment.checkpoint_name(name)).to(device) for name in source.tensors]
    value = _transform(source, values, binding.shape).contiguous()
    wanted = [int(dim) for dim in binding.shape]
    if binding.dtype == "int4":
        wanted[-1] //= 2
    if list(value.shape) != wanted or value.dtype != getattr(torch, TORCH_TYPES[binding.dtype]):
        found = f"{value.dtype} {list(value.shape)}"
        raise ValueError(f"{binding.name} wants {binding.dtype} {list(binding.shape)}, {source.tensors} give {found}")
    return value


def _transform(source: WeightSource, values: Sequence[torch.Tensor], shape: Sequence[int | str]) -> torch.Tensor:
    if source.transform in ("key_heads", "value_heads"):
        num_heads, first, second = (int(dim) for dim in shape)
        if source.transform == "key_heads":
            return values[0][: num_heads * first].unflatten(0, (num_heads, first))
        return values[0][-num_heads * second :].unflatten(0, (num_heads, second)).transpose(1, 2)
    if source.transform == "reciprocal":
        return (1.0 / values[0].float()).reshape(1, 1)
    if source.transform == "product":
        weight_scale, activation_scale = values
        chosen = weight_scale if source.expert is None else weight_scale[source.expert]
        return (chosen.float() * activation_scale.float()).reshape(1, -1)
    value = values[0] if source.expert is None else values[0][source.expert]
    if source.transform == "twice":
        return value.repeat_interleave(2, dim=-1)
    return value.transpose(-1, -2) if source.transform == "transpose" else value
