"""A decoder layer that quantizes its linear layers as the calibration tokens come to them.

The layer runs once, over all tokens. Each linear layer is quantized when its input is known, and computes on with its
quantized weights: what comes after it is calibrated on what it will really get.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn import functional

from trtbuild.checkpoints.model_config import MoeConfig
from trtbuild.engines.calibration.inputs import CHUNK, Inputs, Tokens
from trtbuild.engines.calibration.layer_quantizer import LayerQuantizer
from trtbuild.engines.reference.torch_ops import Ranks, TorchOps
from trtbuild.engines.reference.torch_weights import TorchLinear

# Inputs [n, in] by one matrix, in their type.
Product = Callable[[torch.Tensor], torch.Tensor]
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
        if not self._quantizer.takes(layer.linear):
            return [keep_on(layer, None, flat).unflatten(0, value.shape[:-1])]
        weight = self._quantizer.weight(layer.linear, None, Inputs([Tokens(flat, first=_firsts(value))]))
        return [multiply(flat, weight).unflatten(0, value.shape[:-1])]

    def silu(self, x: Ranks) -> Ranks:
        """In place, as `multiply`: what a matrix multiply gave has no other use, and is as large as memory allows."""
        return [functional.silu(x[0], inplace=True)]

    def multiply(self, x: Ranks, y: Ranks) -> Ranks:
        return [x[0].mul_(y[0])]

    def experts(self, x: Ranks, name: str, scores: Ranks, indices: Ranks, moe: MoeConfig) -> Ranks:
        self._quantizer.count_tokens(indices[0], moe.num_experts)
        seen = Inputs([Tokens(x[0].flatten(0, 1), first=_firsts(x[0]))])
        self._quantizer.prepare(self.segment.checkpoint_name(f"{name}.fc"), seen)
        return super().experts(x, name, scores, indices, moe)

    def _rank_experts(
        self, x: torch.Tensor, scores: torch.Tensor, indices: torch.Tensor, fc: TorchLinear, proj: TorchLinear
    ) -> torch.Tensor:
        assert fc.linear is not None and proj.linear is not None
        flat, first = x.flatten(0, 1), _firsts(x)
        total = torch.zeros(flat.shape, dtype=torch.float32, device=flat.device)
        unrouted = Tokens(flat[::UNROUTED_STRIDE], UNROUTED_WEIGHT, first[::UNROUTED_STRIDE])
        for expert in range(fc.linear.num_experts or 0):
            tokens, choice = torch.where(indices == expert)
            share = scores[tokens, choice].unsqueeze(-1)
            routed = flat[tokens]
            # A routed token counts by the square of its score, which scales its error.
            weighted = [Tokens(routed, share.squeeze(-1).float().square(), first[tokens]), unrouted]
            up, down = self._quantize_expert(fc, proj, expert, weighted)
            total.index_add_(0, tokens, down(_gated(up(routed))).float() * share)
        return total.to(x.dtype).view_as(x)

    def _quantize_expert(
        self,
        fc: TorchLinear,
        proj: TorchLinear,
        expert: int,
        tokens: Sequence[Tokens],
    ) -> tuple[Product, Product]:
        """Both matrices of an expert."""

        def product(layer: TorchLinear, inputs: Inputs) -> Product:
            assert layer.linear is not None
            if not self._quantizer.takes(layer.linear):
                return partial(keep_on, layer, expert)
            return partial(multiply, weight=self._quantizer.weight(layer.linear, expert, inputs))

        up = product(fc, Inputs(tokens))
        return up, product(proj, Inputs([replace(part, x=_gated(up(part.x))) for part in tokens]))

    @property
    def _quantizer(self) -> LayerQuantizer:
        assert self.quantizer is not None
        return self.quantizer


def _firsts(x: torch.Tensor) -> torch.Tensor:
    """Which tokens of x [sequences, length, ...] are the first of theirs: bool [sequences * length]."""
    return torch.arange(x.shape[0] * x.shape[1], device=x.device) % x.shape[1] == 0


def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [n, in] by a float32 weight [out, in], in x's type."""
    y = x.new_empty(len(x), len(weight))
    for start in range(0, len(x), CHUNK):
        y[start : start + CHUNK] = x[start : start + CHUNK].float() @ weight.T
    return y


def keep_on(layer: TorchLinear, expert: int | None, x: torch.Tensor) -> torch.Tensor:
    """x [n, in] through a layer that is not quantized here, as the engine computes it; in x's type."""
    return torch.cat([layer.apply(chunk, expert) for chunk in x.split(CHUNK)])


def _gated(up_and_gate: torch.Tensor) -> torch.Tensor:
    up, gate = up_and_gate.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)
