"""Keeping a source's quantized values: codes bit for bit, scales in the type that the engine computes in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trtbuild.checkpoints.precision import LinearForm
from trtbuild.checkpoints.quantization import QuantizedWeight, pack_int4, pack_int4_rows
from trtbuild.checkpoints.rank_tensors import Linear
from trtbuild.checkpoints.safetensors_file import torch_dtype
from trtbuild.errors import Refused

# A scale may lose what rounding to bfloat16 takes (2**-9) and no more: fp16 has few bits left below 6e-5, then none.
_LARGEST_LOSS = 2.0**-8


@dataclass(frozen=True)
class KeptRows:
    """Rows of one rank's part of a linear layer. `tensors` are what to write, by role: weight, scales, zero.

    `scales` are the source's; `one_scale` is static fp8's where one is to serve the whole layer.
    """

    tensors: dict[str, torch.Tensor]
    scales: torch.Tensor
    one_scale: float | None = None


def keeps(form: LinearForm, stored: LinearForm) -> bool:
    """Whether a linear layer of `form` can hold a source's quantized values as they are."""
    if form.format != stored.format or form.order != stored.order or (stored.zeros and not form.zeros):
        return False
    return form.row_scales or not stored.row_scales


def keep_rows(block: QuantizedWeight, rows: slice, columns: range | None, linear: Linear, source: str) -> KeptRows:
    """Rows and columns (None: all) of a block of the weight named `source`.

    Raises Refused for scales that the engine's 16-bit type cannot hold.
    """
    columns = columns or range(block.values.shape[1])
    values = block.values[rows, columns.start : columns.stop].contiguous()
    scales = block.scales[rows] if len(block.scales) == len(block.values) else block.scales
    if linear.group_size:
        return _keep_groups(block, rows, columns, linear, source)
    if linear.precision == "fp8" and not linear.form.row_scales:
        return KeptRows({"weight": values}, scales, float(scales[0]))
    role = "weights_scaling_factor" if linear.precision == "fp8" else "per_channel_scale"
    return KeptRows({"weight": values, role: scales.float().expand(len(values)).contiguous()}, scales)


def _keep_groups(block: QuantizedWeight, rows: slice, columns: range, linear: Linear, source: str) -> KeptRows:
    """int4. A rank may need smaller groups than the source has: they repeat its scales."""
    assert linear.group_size is not None
    values = block.values[rows, columns.start : columns.stop].contiguous()
    size = block.values.shape[1] // block.scales.shape[1]
    chosen = torch.arange(columns.start, columns.stop, linear.group_size) // size
    scales = block.scales[rows][:, chosen]
    zeros = torch.zeros_like(scales) if block.zeros is None else block.zeros[rows][:, chosen]
    dtype = torch_dtype(linear.dtype)
    # A group of nothing but zeros may have any finite scale: tools store the smallest that they know.
    used = (values.unflatten(1, (len(chosen), -1)) != zeros.unsqueeze(-1)).any(-1)
    packed = pack_int4_rows(values) if linear.packs_rows else pack_int4(values)
    tensors = {"weight": packed, "weights_scaling_factor": _stored(scales, dtype, used, source)}
    if linear.form.zeros:
        tensors["zero"] = _stored(-(scales.float() * zeros.float()), dtype, used, source)
    return KeptRows(tensors, scales)


def _stored(numbers: torch.Tensor, dtype: torch.dtype, used: torch.Tensor, source: str) -> torch.Tensor:
    """`numbers` (scales, or scales times zero points) in the 16-bit type, contiguous; Refused where it cannot be."""
    stored = numbers.to(dtype).contiguous()
    if numbers.dtype == dtype:
        return stored
    exact = numbers.float()
    # NaN compares as false.
    holds = (stored.float() - exact).abs() <= _LARGEST_LOSS * exact.abs()
    lost = torch.where(used, ~holds, ~stored.isfinite())
    if bool(lost.any()):
        finfo = torch.finfo(dtype)
        raise Refused(
            f"{source}: a scale of its int4 groups is {float(exact[lost][0]):.4g}, and {str(dtype)[6:]} holds "
            f"{finfo.smallest_normal:.2g} to {finfo.max:.5g}; set torch_dtype in config.json to bfloat16, or encode "
            "the weights again with --precision int8"
        )
    return stored
