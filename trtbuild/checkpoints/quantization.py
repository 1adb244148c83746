"""Weight quantization: logical values and scales, before any builder's packing.

All precisions are symmetric. Scales come from whole rows (or whole groups) of the source matrix, never from a rank's
slice, so that every tensor-parallel layout is the same model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FP8_MAX = 448.0
INT8_MAX = 127.0
INT4_MAX = 7.0


@dataclass(frozen=True)
class QuantizedWeight:
    """`values` [out, in] (int8, or float8_e4m3fn) and float `scales`: [1], [out], or [out, in / group]."""

    values: torch.Tensor
    scales: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """float32 [out, in]."""
        if self.scales.dim() < 2:
            scales = self.scales.float()
            return self.values.float() * (scales[:, None] if len(scales) > 1 else scales)
        groups = self.values.float().unflatten(1, (self.scales.shape[1], -1))
        return (groups * self.scales.float().unsqueeze(-1)).flatten(1)


def quantize_int8(weight: torch.Tensor, row_amax: torch.Tensor) -> QuantizedWeight:
    """Per-output-channel int8; `row_amax` [out] is over the source's whole rows, scales are float32 [out]."""
    scales = _nonzero(row_amax.float() / INT8_MAX)
    values = (weight.float() / scales[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX)
    return QuantizedWeight(values.to(torch.int8), scales)


def quantize_int4(weight: torch.Tensor, group_size: int, scale_dtype: torch.dtype) -> QuantizedWeight:
    """Group-wise int4 in [-8, 7], round to nearest; scales [out, in / group] in the 16-bit type that stores them.

    The values are rounded against the *stored* scale, so its own rounding costs nothing.
    """
    groups = weight.float().unflatten(1, (-1, group_size))
    scales = _nonzero((groups.abs().amax(-1) / INT4_MAX).to(scale_dtype))
    values = (groups / scales.float().unsqueeze(-1)).round_().clamp_(-8, 7)
    return QuantizedWeight(values.flatten(1).to(torch.int8), scales)


def quantize_fp8(weight: torch.Tensor, amax: float) -> QuantizedWeight:
    """Per-tensor e4m3; `amax` is over everything that shares the scale (q, k and v; an expert's up and gate)."""
    scale = fp8_scale(amax)
    values = (weight.float() / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return QuantizedWeight(values, torch.tensor([scale]))


def fp8_scale(amax: float) -> float:
    """Dequantization multiplier amax / 448, rounded to float32 as it is stored; 1 for an all-zero tensor."""
    return float(_nonzero(torch.tensor([amax], dtype=torch.float32) / FP8_MAX)[0])


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """int8 [..., in] in [-8, 7] -> uint8 [..., in / 2]: pairs along `in`, the even one in the low nibble."""
    nibbles = values.view(torch.uint8) & 0xF
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_int4`."""
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2).to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


def _nonzero(scales: torch.Tensor) -> torch.Tensor:
    return torch.where(scales > 0, scales, torch.ones_like(scales))
