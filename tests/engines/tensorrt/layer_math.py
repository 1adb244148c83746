"""What single TensorRT layers compute, in torch, after TensorRT's documentation of each layer.

Written from the layers' own attributes only; nothing of the package that emitted them is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorrt_rtx as trt
import torch

FP8_MAX = 448.0
Inputs = list[Any]

EW, UN, RE = trt.ElementWiseOperation, trt.UnaryOperation, trt.ReduceOperation
ELEMENTWISE: dict[Any, Callable[..., torch.Tensor]] = {
    EW.SUM: torch.add, EW.SUB: torch.sub, EW.PROD: torch.mul, EW.DIV: torch.div, EW.MAX: torch.maximum,
    EW.MIN: torch.minimum, EW.FLOOR_DIV: torch.floor_divide, EW.EQUAL: torch.eq, EW.GREATER: torch.gt,
    EW.LESS: torch.lt, EW.AND: torch.logical_and, EW.OR: torch.logical_or,
}  # fmt: skip
UNARY = {UN.SQRT: torch.sqrt, UN.EXP: torch.exp, UN.NEG: torch.neg, UN.ABS: torch.abs}


def elementwise(layer: Any, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    return ELEMENTWISE[layer.op](inputs[0], inputs[1])


def unary(layer: Any, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    return UNARY[layer.op](inputs[0])


def activation(layer: Any, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    assert layer.type == trt.ActivationType.SIGMOID
    return torch.sigmoid(inputs[0])


def matrix_multiply(layer: Any, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    a, b = (
        value.transpose(-1, -2) if op == trt.MatrixOperation.TRANSPOSE else value
        for value, op in zip(inputs, (layer.op0, layer.op1), strict=True)
    )
    return a @ b


def reduce(layer: Any, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    axes = [axis for axis in range(inputs[0].dim()) if layer.axes >> axis & 1]
    if layer.op == RE.MAX:
        return inputs[0].amax(axes, keepdim=layer.keep_dims)
    if layer.op == RE.AVG:
        return inputs[0].mean(axes, keepdim=layer.keep_dims)
    assert layer.op == RE.SUM
    return inputs[0].sum(axes, keepdim=layer.keep_dims, dtype=inputs[0].dtype)


def softmax(layer: Any, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    return inputs[0].softmax(layer.axes.bit_length() - 1)


def topk(layer: Any, inputs: Inputs, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    values, indices = inputs[0].topk(layer.k, layer.axes.bit_length() - 1, largest=layer.op == trt.TopKOperation.MAX)
    return values, indices.int()


def gather(layer: Any, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    assert layer.mode == trt.GatherMode.DEFAULT and layer.num_elementwise_dims == 0
    data, indices = inputs
    assert bool((indices >= 0).all()) and bool((indices < data.shape[layer.axis]).all()), "gather outside of the tensor"
    assert layer.axis == 0 or indices.dim() == 1
    return data.movedim(layer.axis, 0)[indices.long()].movedim(0, layer.axis)


def select(layer: Any, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    return torch.where(inputs[0], inputs[1], inputs[2])


def cast(layer: Any, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    return inputs[0].to(dtype)


def identity(layer: Any, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    return inputs[0]


def shape(layer: Any, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(inputs[0].shape, dtype=torch.int64)


def shuffle(layer: Any, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    """First transpose, reshape, second transpose; a 0 in the dimensions copies the one at its place."""
    value = inputs[0]
    first, second = list(layer.first_transpose), list(layer.second_transpose)
    rank = value.dim()
    if rank:
        value = value.permute(first[:rank])
    if len(inputs) > 1 and inputs[1] is not None:
        dims = inputs[1].tolist()
    else:
        dims = None if layer.reshape_dims is None else list(layer.reshape_dims)
    if dims is not None:
        if layer.zero_is_placeholder:
            dims = [value.shape[i] if dim == 0 else dim for i, dim in enumerate(dims)]
        value = value.reshape(dims)
    return value.permute(second[: value.dim()]) if value.dim() else value


def concatenation(layer: Any, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    return torch.cat(inputs, layer.axis)


def slice_(layer: Any, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    value = inputs[0]
    axes = list(layer.axes) if layer.axes is not None else list(range(value.dim()))
    for axis, start, size, stride in zip(axes, layer.start, layer.shape, layer.stride, strict=True):
        last = start + (size - 1) * stride
        assert stride > 0 and last < value.shape[axis], "slice outside of the tensor"
        value = value.narrow(axis, start, last - start + 1)
        value = value.index_select(axis, torch.arange(0, value.shape[axis], stride)) if stride > 1 else value
    return value


def fill(layer: Any, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    assert layer.operation == trt.FillOperation.LINSPACE
    size, start, steps = inputs
    value = torch.full(size.tolist(), start.item(), dtype=dtype)
    for axis, step in enumerate(steps.tolist()):
        count = value.shape[axis]
        ramp = torch.arange(count, dtype=dtype) * step
        value = value + ramp.reshape([count if i == axis else 1 for i in range(value.dim())])
    return value


def cumulative(layer: Any, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    assert layer.op == trt.CumulativeOperation.SUM and not layer.reverse
    total = inputs[0].cumsum(int(inputs[1]), dtype=inputs[0].dtype)
    return total - inputs[0] if layer.exclusive else total


def quantize(layer: Any, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    assert layer.to_type == trt.fp8 and inputs[1].numel() == 1
    return (inputs[0].float() / inputs[1]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def dequantize(layer: Any, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    """A number, one scale for each index of `axis`, or blocks along the dimensions where the scale is smaller."""
    value, scale = inputs[0].float(), inputs[1].float()
    if scale.numel() == 1:
        return (value * scale.reshape(())).to(dtype)
    if scale.dim() == 1:
        return (value * scale.reshape([-1 if i == layer.axis else 1 for i in range(value.dim())])).to(dtype)
    for axis in range(value.dim()):
        scale = scale.repeat_interleave(value.shape[axis] // scale.shape[axis], axis)
    return (value * scale).to(dtype)


def kv_cache_update(layer: Any, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    assert layer.cache_mode == trt.KVCacheMode.LINEAR
    cache, update, write_indices = inputs[0].clone(), inputs[1], inputs[2]
    length = update.shape[2]
    for slot, start in enumerate(write_indices.tolist()):
        assert start + length <= cache.shape[2], "cache update past the cache's end"
        cache[slot, :, start : start + length] = update[slot]
    return cache


def attention(attributes: Any, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    """No scaling by 1/sqrt(D). LOWER_RIGHT with lengths lets query i see j <= i + lengths[b] - S."""
    query, keys, values = (value.float() for value in inputs[:3])
    mask, lengths = inputs[3], inputs[6]
    assert attributes.norm_op == trt.AttentionNormalizationOp.SOFTMAX
    batch, heads, step, _ = query.shape
    groups, capacity = keys.shape[1], keys.shape[2]
    keys, values = (value.repeat_interleave(heads // groups, 1) for value in (keys, values))
    scores = query @ keys.transpose(-1, -2)
    j, i = torch.arange(capacity), torch.arange(step)[:, None]
    seen = torch.ones(batch, 1, step, capacity, dtype=torch.bool)
    if lengths is not None:
        seen &= (j < lengths[:, None])[:, None, None]
    if attributes.causal_kind == trt.CausalMaskKind.LOWER_RIGHT:
        ends = lengths if lengths is not None else torch.full((batch,), capacity)
        seen &= (j <= i + (ends - step)[:, None, None])[:, None]
    else:
        assert attributes.causal_kind == trt.CausalMaskKind.NONE
    if mask is not None:
        seen &= mask
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ values).to(dtype)


LAYERS: dict[str, tuple[type, Callable[..., Any]]] = {
    "ELEMENTWISE": (trt.IElementWiseLayer, elementwise),
    "UNARY": (trt.IUnaryLayer, unary),
    "ACTIVATION": (trt.IActivationLayer, activation),
    "MATRIX_MULTIPLY": (trt.IMatrixMultiplyLayer, matrix_multiply),
    "REDUCE": (trt.IReduceLayer, reduce),
    "SOFTMAX": (trt.ISoftMaxLayer, softmax),
    "TOPK": (trt.ITopKLayer, topk),
    "GATHER": (trt.IGatherLayer, gather),
    "SELECT": (trt.ISelectLayer, select),
    "CAST": (trt.ICastLayer, cast),
    "IDENTITY": (trt.IIdentityLayer, identity),
    "SHAPE": (trt.IShapeLayer, shape),
    "SHUFFLE": (trt.IShuffleLayer, shuffle),
    "CONCATENATION": (trt.IConcatenationLayer, concatenation),
    "SLICE": (trt.ISliceLayer, slice_),
    "FILL": (trt.IFillLayer, fill),
    "CUMULATIVE": (trt.ICumulativeLayer, cumulative),
    "QUANTIZE": (trt.IQuantizeLayer, quantize),
    "DEQUANTIZE": (trt.IDequantizeLayer, dequantize),
    "KV_CACHE_UPDATE": (trt.IKVCacheUpdateLayer, kv_cache_update),
}
