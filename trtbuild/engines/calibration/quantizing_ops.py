"""A decoder layer that quantizes its linear layers as the calibration tokens come to them.

The layer runs once, over all tokens. Each linear layer is quantized when its input is known, and computes on with its
quantized weights: what comes after it is calibrated on what it will really get.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from trtbuild.checkpoints.model_config import MoeConfig
from trtbuild.checkpoints.rank_tensors import Linear
from trtbuild.engines.calibration.int4 import SecondMoments
from trtbuild.engines.calibration.layer_quantizer import LayerQuantizer
from trtbuild.engines.reference.torch_ops import Ranks, TorchOps
from trtbuild.engines.reference.torch_weights import TorchLinear

# Tokens of a matrix multiply: its float32 copies stay small.
_CHUNK = 2048
# Every expert also sees every so many-th token, however the router decides, at this weight of a routed one.
UNROUTED_STRIDE = 4
UNROUTED_WEIGHT = 0.05


@dataclass
class QuantizingOps(TorchOps):
    """One rank (tp 1), one layer. Activations are held in the model's 16-bit type and multiplied in float32."""

    quantizer: LayerQuantizer | None = None

    def linear(self, x: Ranks, name: str) -> Ranks:
        [value], [layer] = x, self._linears(name)
        if layer.linear is None:
            return super().linear(x, name)
        flat = value.flatten(0, -2)
        weight = self._quantizer.weight(layer.linear, None, moments_of([(flat, 1.0)]), flat)
        return [multiply(flat, weight).unflatten(0, value.shape[:-1])]

    def silu(self, x: Ranks) -> Ranks:
        """In place, as `multiply`: what a matrix multiply gave has no other use, and is as large as memory allows."""
        return [functional.silu(x[0], inplace=True)]

    def multiply(self, x: Ranks, y: Ranks) -> Ranks:
        return [x[0].mul_(y[0])]

    def experts(self, x: Ranks, name: str, scores: Ranks, indices: Ranks, moe: MoeConfig) -> Ranks:
        flat = x[0].flatten(0, 1)
        self._quantizer.count_tokens(indices[0], moe.num_experts)
        self._quantizer.prepare(self.segment.checkpoint_name(f"{name}.fc"), flat)
        return super().experts(x, name, scores, indices, moe)

    def _rank_experts(
        self, x: torch.Tensor, scores: torch.Tensor, indices: torch.Tensor, fc: TorchLinear, proj: TorchLinear
    ) -> torch.Tensor:
        assert fc.linear is not None and proj.linear is not None
        flat = x.flatten(0, 1)
        total = torch.zeros(flat.shape, dtype=torch.float32, device=flat.device)
        unrouted = flat[::UNROUTED_STRIDE]
        for expert in range(fc.linear.num_experts or 0):
            tokens, choice = torch.where(indices == expert)
            share = scores[tokens, choice].unsqueeze(-1)
            routed = flat[tokens]
            up, down = self._quantize_expert(fc.linear, proj.linear, expert, [(routed, share), (unrouted, None)])
            total.index_add_(0, tokens, multiply(_gated(multiply(routed, up)), down).float() * share)
        return total.to(x.dtype).view_as(x)

    def _quantize_expert(
        self, fc: Linear, proj: Linear, expert: int, tokens: Sequence[tuple[torch.Tensor, torch.Tensor | None]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both matrices of an expert; routed tokens count by the square of their score, which scales their error."""

        def weighted(parts: Sequence[torch.Tensor]) -> SecondMoments:
            pairs = zip(parts, tokens, strict=True)
            return moments_of(
                [(x, UNROUTED_WEIGHT) if share is None else (x.float() * share, 1.0) for x, (_, share) in pairs]
            )

        inputs = [x for x, _ in tokens]
        up = self._quantizer.weight(fc, expert, weighted(inputs), torch.cat(inputs))
        products = [_gated(multiply(x, up)) for x in inputs]
        down = self._quantizer.weight(proj, expert, weighted(products), torch.cat(products))
        return up, down

    @property
    def _quantizer(self) -> LayerQuantizer:
        assert self.quantizer is not None
        return self.quantizer


def moments_of(parts: Sequence[tuple[torch.Tensor, float]]) -> SecondMoments:
    """Second moments of weighted tokens [n, in]."""
    moments = SecondMoments(parts[0][0].shape[-1], parts[0][0].device)
    for x, weight in parts:
        for chunk in x.split(_CHUNK):
            moments.add(chunk, weight)
    return moments


def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [n, in] by a float32 weight [out, in], in x's type."""
    y = x.new_empty(len(x), len(weight))
    for start in range(0, len(x), _CHUNK):
        y[start : start + _CHUNK] = x[start : start + _CHUNK].float() @ weight.T
    return y


def _gated(up_and_gate: torch.Tensor) -> torch.Tensor:
    up, gate = up_and_gate.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)
