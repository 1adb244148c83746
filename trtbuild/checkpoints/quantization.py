"""Weight quantization: logical values and scales, before any builder's packing.

All precisions are symmetric. Scales come from whole rows (or whole groups) of the source matrix, never from a rank's
slice, so that every tensor-parallel layout is the same model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trtbuild.checkpoints.precision import LinearForm

FP8_MAX = 448.0
INT8_MAX = 127.0
INT4_MAX = 7.0


class Scratch:
    """Reused memory for the steps of a computation, by name: fresh pages cost more than the arithmetic on them.

    What a function returns in scratch memory is valid until the next call with the same Scratch.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None
    ) -> torch.Tensor:
        """An uninitialised tensor; it shares its memory with the last one taken under this name on the device."""
        num_bytes = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get(name)
        device = device or torch.device("cpu")
        if buffer is None or len(buffer) < num_bytes or buffer.device != device:
            buffer = self._buffers[name] = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        return buffer[:num_bytes].view(dtype).view(tuple(shape))

    def copy(self, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`tensor` in another type, contiguous, on its device."""
        return self.take(name, tensor.shape, dtype, tensor.device).copy_(tensor)


@dataclass(frozen=True)
class QuantizedWeight:
    """`values` [out, in] (int8, or float8_e4m3fn) and float `scales`: [1], [out], or [out, in / group].

    A weight is scale * (value - zero), with an integer `zeros` [out, in / group] where there is one.
    """

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    def dequantize(self, scratch: Scratch | None = None) -> torch.Tensor:
        """float32 [out, in]."""
        scratch = scratch or Scratch()
        if self.values.dtype == torch.float8_e4m3fn:
            result = _float_of_fp8(self.values, scratch)
        else:
            result = scratch.copy("dequantized", self.values, torch.float32)
        if self.scales.dim() < 2:
            return result.mul_(self.scales.float()[:, None] if len(self.scales) > 1 else self.scales.float())
        groups = result.unflatten(1, (self.scales.shape[1], -1))
        if self.zeros is not None:
            groups.sub_(self.zeros.float().unsqueeze(-1))
        groups.mul_(self.scales.float().unsqueeze(-1))
        return result


def _float_of_fp8(values: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """float32 of e4m3fn, through float16's bits: five times as fast as torch's own conversion, and as exact.

    e4m3fn is float16 with the low mantissa bits cut off and an exponent bias of 7 instead of 15. NaN is not handled.
    """
    bits = scratch.copy("half", values.view(torch.int8), torch.int16)
    # The sign extends into bit 14, where float16 has its highest exponent bit.
    bits.bitwise_left_shift_(7).bitwise_and_(~0x4000)
    return scratch.copy("dequantized", bits.view(torch.float16), torch.float32).mul_(256.0)


@dataclass(frozen=True)
class StoredWeight:
    """What is known, before its values are read, of a weight that its source holds quantized.

    `origin` says who quantized it. `activation_scale` is fp8's for static activations. With `form.order` the groups lie
    over the columns `order` [in] (int64) of the weight. The squared errors, where they are known, are those
    against the 16-bit weight; `weight_squares` is that weight's own.
    """

    form: LinearForm
    origin: str
    activation_scale: float | None = None
    order: torch.Tensor | None = None
    error_squares: float | None = None
    weight_squares: float | None = None


def quantize_int8(weight: torch.Tensor, row_amax: torch.Tensor, scratch: Scratch | None = None) -> QuantizedWeight:
    """Per-output-channel int8; `row_amax` [out] is over the source's whole rows, scales are float32 [out]."""
    scratch = scratch or Scratch()
    scales = _nonzero(row_amax.float() / INT8_MAX)
    values = scratch.copy("float", weight, torch.float32).div_(scales[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX)
    return QuantizedWeight(scratch.copy("values", values, torch.int8), scales)


def quantize_int4(
    weight: torch.Tensor, group_size: int, scale_dtype: torch.dtype, scratch: Scratch | None = None
) -> QuantizedWeight:
    """Group-wise int4 in [-8, 7], round to nearest; scales [out, in / group] in the 16-bit type that stores them.

    The values are rounded against the *stored* scale, so its own rounding costs nothing.
    """
    scratch = scratch or Scratch()
    groups = scratch.copy("float", weight, torch.float32).unflatten(1, (-1, group_size))
    absolute = torch.abs(groups, out=scratch.take("dequantized", groups.shape, torch.float32, groups.device))
    scales = _nonzero((absolute.amax(-1) / INT4_MAX).to(scale_dtype))
    values = groups.div_(scales.float().unsqueeze(-1)).round_().clamp_(-8, 7)
    return QuantizedWeight(scratch.copy("values", values.flatten(1), torch.int8), scales)


def quantize_fp8(weight: torch.Tensor, amax: float, scratch: Scratch | None = None) -> QuantizedWeight:
    """Per-tensor e4m3; `amax` is over everything that shares the scale (q, k and v; an expert's up and gate)."""
    scratch = scratch or Scratch()
    scale = fp8_scale(amax)
    values = scratch.copy("float", weight, torch.float32).div_(scale).clamp_(-FP8_MAX, FP8_MAX)
    return QuantizedWeight(scratch.copy("values", values, torch.float8_e4m3fn), torch.tensor([scale]))


def quantize_fp8_rows(weight: torch.Tensor, row_amax: torch.Tensor, scratch: Scratch | None = None) -> QuantizedWeight:
    """Per-output-channel e4m3; `row_amax` [out] is over the source's whole rows, scales are float32 [out]."""
    scratch = scratch or Scratch()
    scales = _nonzero(row_amax.float() / FP8_MAX)
    values = scratch.copy("float", weight, torch.float32).div_(scales[:, None]).clamp_(-FP8_MAX, FP8_MAX)
    return QuantizedWeight(scratch.copy("values", values, torch.float8_e4m3fn), scales)


def fp8_scale(amax: float) -> float:
    """Dequantization multiplier amax / 448, rounded to float32 as it is stored; 1 for an all-zero tensor.

    In double precision inside, so that a checkpoint's own scale comes back from scale * 448.
    """
    return float(np.float32(amax / FP8_MAX)) or 1.0


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """int8 [..., in] in [-8, 7] -> uint8 [..., in / 2]: pairs along `in`, the even one in the low nibble."""
    pairs = values.contiguous().view(torch.int16)
    packed = pairs & 0xF
    # Two values are the bytes of a little-endian int16: shifted by 4, the odd one's nibble lies above the even one's.
    packed |= (pairs >> 4).bitwise_and_(0xF0)
    return packed.to(torch.uint8)


def pack_int4_rows(values: torch.Tensor) -> torch.Tensor:
    """int8 [out, in] in [-8, 7] -> int8 [out / 2, in]: pairs of rows, the even one in the low nibble."""
    return (values[0::2] & 0xF) | (values[1::2] << 4)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_int4`."""
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2).to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


def _nonzero(scales: torch.Tensor) -> torch.Tensor:
    return torch.where(scales > 0, scales, torch.ones_like(scales))
