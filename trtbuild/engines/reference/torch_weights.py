"""Rank tensors prepared for the reference executor: one torch tensor per weight, with the scales around it.

Quantized layers keep the arithmetic that the TensorRT network has, so that what is compiled is what was checked: fp8
multiplies the stored values and scales the product, int8 and int4 multiply weights dequantized to 16 bit, int4's zero
points enter through a multiply of their own. One difference remains in 16 bit: an fp8 product is rounded here before
it is scaled, where the engine keeps float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trtbuild.checkpoints.quantization import FP8_MAX, unpack_int4
from trtbuild.checkpoints.rank_checkpoint import WeightReader
from trtbuild.checkpoints.rank_tensors import Linear, RankPlan
from trtbuild.engines.reference.products import product

# A power of two that keeps products of stored values inside fp16's range; exact, so it changes no float32 result.
FP8_UNIT = 2.0**-9
# Linear layers that are never quantized.
_PLAIN_LINEARS = ("lm_head.weight", "shared_expert_gate.weight")


@dataclass
class TorchLinear:
    """`y = (quantize(x / input_scale) @ weight.T) * output_scale`; weight [out, in] or [experts, out, in].

    The scales are float32 and fp8's alone; in a stack they have a leading expert dimension, but for `input_inverse`.
    input_inverse: 1 / input_scale [1] of static activations.
    dynamic: the input scale is each token's own, and multiplies the product too.
    output_scale: [1], or [out].
    zero: what int4's group sums of x are multiplied by, [out, in / group] in the weight's type.
    order: the columns of x that the layer takes, int64 [in].
    """

    weight: torch.Tensor
    input_inverse: torch.Tensor | None = None
    output_scale: torch.Tensor | None = None
    linear: Linear | None = None
    dynamic: bool = False
    zero: torch.Tensor | None = None
    order: torch.Tensor | None = None

    def apply(self, x: torch.Tensor, expert: int | None = None) -> torch.Tensor:
        """x [..., in] -> [..., out] in x's type."""
        x = x if self.order is None else x[..., self.order]
        weight, output_scale, zero = (
            part if part is None or expert is None else part[expert]
            for part in (self.weight, self.output_scale, self.zero)
        )
        assert weight is not None
        if output_scale is None:
            y = product(x, weight)
            return y if zero is None else y + _group_sums(x, zero.shape[-1]) @ zero.transpose(-1, -2)
        scaled, token_scale = x.float(), None
        if self.dynamic:
            token_scale = token_scales(scaled)
            scaled = scaled / token_scale
        elif self.input_inverse is not None:
            scaled = scaled * self.input_inverse
        y = product(to_fp8(scaled).to(weight.dtype) * FP8_UNIT, weight).float()
        y = y if token_scale is None else y * token_scale
        return (y * output_scale).to(x.dtype)


def token_scales(x: torch.Tensor) -> torch.Tensor:
    """Dynamic activation scales of float32 x [..., in]: amax / 448 of each token, 1 where it is all zero; [..., 1]."""
    scales = x.abs().amax(-1, keepdim=True) / FP8_MAX
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def _group_sums(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Sums of x over each group of its columns, in float32 inside: [..., num_groups]."""
    return x.float().unflatten(-1, (num_groups, -1)).sum(-1).to(x.dtype)


def to_fp8(x: torch.Tensor) -> torch.Tensor:
    """Saturating conversion to e4m3, as TensorRT's Quantize layer does."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


class TorchWeights:
    """One rank's weights in `dtype` on `device`, under the rank checkpoint's names."""

    def __init__(self, plan: RankPlan, read: WeightReader, dtype: torch.dtype, device: torch.device) -> None:
        self.plan = plan
        self._dtype = dtype
        self._device = device
        self.plain: dict[str, torch.Tensor] = {}
        self.linears: dict[str, TorchLinear] = {}
        for tensor in plan.plain:
            # Norm and router weights take part in float32 arithmetic; both types hold the stored values exactly.
            in_float32 = tensor.spec.name.endswith(("norm.weight", "ln_f.weight", "router.weight"))
            self.plain[tensor.spec.name] = self._put(read(tensor.spec.name), torch.float32 if in_float32 else dtype)
        for linear in plan.linears:
            self.linears[linear.name] = self._linear(linear, read)
            if linear.has_bias:
                self.plain[f"{linear.name}.bias"] = self._put(read(f"{linear.name}.bias"), dtype)
        for name in [name for name in self.plain if name.endswith(_PLAIN_LINEARS)]:
            self.linears[name.removesuffix(".weight")] = TorchLinear(self.plain[name])

    def _put(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return tensor.to(device=self._device, dtype=dtype)

    def _linear(self, linear: Linear, read: WeightReader) -> TorchLinear:
        layer = self._weights(linear, read)
        if linear.form.order:
            layer.order = self._put(read(f"{linear.name}.input_order"), torch.int64)
        if linear.form.zeros:
            layer.zero = self._put(read(f"{linear.name}.zero"), self._dtype)
        return layer

    def _weights(self, linear: Linear, read: WeightReader) -> TorchLinear:
        stored = read(f"{linear.name}.weight")
        if linear.precision == "fp8":
            weight_scale = self._put(read(f"{linear.name}.weights_scaling_factor"), torch.float32)
            input_scale = self._put(read(f"{linear.name}.activation_scaling_factor"), torch.float32)
            output_scale = weight_scale * input_scale / FP8_UNIT**2
            return TorchLinear(self._put(stored, self._dtype) * FP8_UNIT, 1.0 / input_scale, output_scale, linear)
        if linear.precision == "fp8-dynamic":
            output_scale = self._put(read(f"{linear.name}.per_channel_scale"), torch.float32) / FP8_UNIT**2
            weight = self._put(stored, self._dtype) * FP8_UNIT
            return TorchLinear(weight, None, output_scale, linear, dynamic=True)
        if linear.precision == "int8":
            scales = self._put(read(f"{linear.name}.per_channel_scale"), torch.float32)
            values = self._put(stored, torch.float32) * scales.unsqueeze(-1)
            return TorchLinear(values.to(self._dtype), linear=linear)
        if linear.precision == "int4":
            scales = self._put(read(f"{linear.name}.weights_scaling_factor"), self._dtype)
            values = self._put(unpack_int4(stored), self._dtype).unflatten(-1, (-1, linear.group_size or 1))
            return TorchLinear((values * scales.unsqueeze(-1)).flatten(-2), linear=linear)
        return TorchLinear(self._put(stored, self._dtype), linear=linear)


def share_replicated(ranks: list[TorchWeights]) -> None:
    """Let ranks that hold the same bytes hold the same tensor, so that lockstep computes the shared part once."""
    first = ranks[0]
    for other in ranks[1:]:
        for name, tensor in other.plain.items():
            mine = first.plain.get(name)
            if mine is not None and mine.shape == tensor.shape and torch.equal(mine, tensor):
                other.plain[name] = mine
