"""TensorRT layers, one checked call each.

TensorRT reports a wrong layer late or not at all: `add_*` returns None, a shape cannot be read, an attribute that was
set reads back as before. `Graph` turns each of these into an `EngineBuildError` at the layer that caused it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorrt_rtx as trt

from trtbuild.engines.tensorrt.log import build_log
from trtbuild.errors import EngineBuildError

if TYPE_CHECKING:
    import torch

ElementWise = trt.ElementWiseOperation
NONE, TRANSPOSE = trt.MatrixOperation.NONE, trt.MatrixOperation.TRANSPOSE

DATA_TYPES = {
    "float32": trt.float32,
    "float16": trt.float16,
    "bfloat16": trt.bfloat16,
    "float8_e4m3": trt.fp8,
    "int8": trt.int8,
    "int4": trt.int4,
    "int32": trt.int32,
}


class Graph:
    """Emits layers into a strongly typed network; every method returns the layer's output tensor."""

    def __init__(self, network: trt.INetworkDefinition) -> None:
        self.network = network
        self._constants: dict[tuple[str, tuple[int, ...], bytes], trt.ITensor] = {}
        # The network borrows the memory of constants until it is built.
        self._kept: list[Any] = []
        self.embedded: dict[str, torch.Tensor] = {}

    def output_of(self, layer: Any, what: str) -> trt.ITensor:
        """The layer's first output, after checking that the layer exists and that its shape can be told."""
        if layer is None:
            raise EngineBuildError(f"TensorRT refused to add {what}: {_last_error()}")
        tensor = layer.get_output(0)
        try:
            len(tensor.shape)
        except (RuntimeError, ValueError) as error:
            raise EngineBuildError(f"TensorRT cannot tell the shape of {what}: {_last_error()}") from error
        return tensor

    def exists(self, layer: Any, what: str) -> None:
        """The same check for a layer without an output."""
        if layer is None:
            raise EngineBuildError(f"TensorRT refused to add {what}: {_last_error()}")

    def input(self, name: str, dtype: str, shape: Sequence[int]) -> trt.ITensor:
        tensor = self.network.add_input(name, DATA_TYPES[dtype], tuple(shape))
        if tensor is None:
            raise EngineBuildError(f"TensorRT refused the input {name} {dtype} {tuple(shape)}: {_last_error()}")
        return tensor

    def output(self, name: str, tensor: trt.ITensor) -> None:
        # A network input, or a tensor that is already an output, cannot be renamed.
        tensor = (
            self.output_of(self.network.add_identity(tensor), f"output {name}") if tensor.is_network_input else tensor
        )
        tensor.name = name
        self.network.mark_output(tensor)

    def constant(self, values: Any, dtype: Any) -> trt.ITensor:
        """A small constant of a numpy type; equal ones are shared."""
        array = np.array(values, dtype=dtype, order="C")
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            self._kept.append(array)
            layer = self.network.add_constant(array.shape, trt.Weights(array))
            self._constants[key] = self.output_of(layer, "a constant")
        return self._constants[key]

    def weight(self, name: str, dtype: str, shape: Sequence[int], values: torch.Tensor) -> trt.ITensor:
        """A constant over the memory of `values`; int4 comes packed, two values a byte."""
        count = int(np.prod(shape))
        packed = 2 if dtype == "int4" else 1
        if values.numel() * packed != count:
            raise EngineBuildError(
                f"weight {name}: {tuple(values.shape)} does not hold {tuple(shape)} values of {dtype}"
            )
        values = self.embedded[name] = values.contiguous()
        weights = trt.Weights(DATA_TYPES[dtype], values.data_ptr(), count)
        layer = self.network.add_constant(tuple(shape), weights)
        tensor = self.output_of(layer, f"the weight {name}")
        layer.name = name
        return tensor

    def elementwise(self, a: trt.ITensor, b: trt.ITensor, operation: trt.ElementWiseOperation) -> trt.ITensor:
        return self.output_of(self.network.add_elementwise(a, b, operation), f"{operation.name}{_shapes(a, b)}")

    def add(self, a: trt.ITensor, b: trt.ITensor) -> trt.ITensor:
        return self.elementwise(a, b, ElementWise.SUM)

    def multiply(self, a: trt.ITensor, b: trt.ITensor) -> trt.ITensor:
        return self.elementwise(a, b, ElementWise.PROD)

    def scalar_like(self, value: float, x: trt.ITensor) -> trt.ITensor:
        """A float32 or int32 constant that broadcasts against x."""
        dtype = np.int32 if x.dtype == trt.int32 else np.float32
        return self.constant(np.full((1,) * len(x.shape), value), dtype)

    def scale(self, x: trt.ITensor, factor: float) -> trt.ITensor:
        """x (float32 or int32) times a number."""
        return self.multiply(x, self.scalar_like(factor, x))

    def cast(self, x: trt.ITensor, dtype: trt.DataType) -> trt.ITensor:
        return x if x.dtype == dtype else self.output_of(self.network.add_cast(x, dtype), f"a cast to {dtype}")

    def matmul(self, a: trt.ITensor, b: trt.ITensor, b_op: trt.MatrixOperation = NONE) -> trt.ITensor:
        return self.output_of(self.network.add_matrix_multiply(a, NONE, b, b_op), f"a matrix multiply{_shapes(a, b)}")

    def silu(self, x: trt.ITensor) -> trt.ITensor:
        """x * sigmoid(x), in float32 inside."""
        wide = self.cast(x, trt.float32)
        return self.cast(self.multiply(wide, self.sigmoid(wide)), x.dtype)

    def sigmoid(self, x: trt.ITensor) -> trt.ITensor:
        """In float32 inside."""
        layer = self.network.add_activation(self.cast(x, trt.float32), trt.ActivationType.SIGMOID)
        return self.cast(self.output_of(layer, "sigmoid"), x.dtype)

    def unary(self, x: trt.ITensor, operation: trt.UnaryOperation) -> trt.ITensor:
        return self.output_of(self.network.add_unary(x, operation), operation.name)

    def reduce(
        self, x: trt.ITensor, operation: trt.ReduceOperation, axes: Sequence[int], keep: bool = True
    ) -> trt.ITensor:
        mask = sum(1 << axis for axis in axes)
        return self.output_of(self.network.add_reduce(x, operation, mask, keep), f"reduce {operation.name}{_shapes(x)}")

    def select(self, condition: trt.ITensor, a: trt.ITensor, b: trt.ITensor) -> trt.ITensor:
        return self.output_of(self.network.add_select(condition, a, b), f"select{_shapes(condition, a, b)}")

    def gather(self, data: trt.ITensor, indices: trt.ITensor, axis: int = 0) -> trt.ITensor:
        """Rows of `data`, [rows, ...], by indices [...] int32; or slices of another `axis`, by indices [n]."""
        layer = self.network.add_gather(data, indices, axis)
        return self.output_of(layer, f"gather{_shapes(data, indices)}")

    def slice(self, x: trt.ITensor, axis: int, start: int, size: int, stride: int = 1) -> trt.ITensor:
        """`size` elements of x from `start` on, every `stride`th, along `axis`, whatever the other dimensions."""
        layer = self.network.add_slice(x, (start,), (size,), (stride,))
        if layer is not None:
            layer.axes = (axis,)
            if tuple(layer.axes or ()) != (axis,):
                raise EngineBuildError(f"TensorRT did not take the axis {axis} of a slice{_shapes(x)}: {_last_error()}")
        return self.output_of(layer, f"slice{_shapes(x)}")

    def reshape(self, x: trt.ITensor, dims: Sequence[int]) -> trt.ITensor:
        """Reshape; 0 copies the dimension of x at that place, -1 is inferred."""
        layer = self.network.add_shuffle(x)
        if layer is not None:
            layer.reshape_dims = tuple(dims)
        return self.output_of(layer, f"reshape{_shapes(x)} to {tuple(dims)}")

    def reshape_to(self, x: trt.ITensor, leading: trt.ITensor, tail: Sequence[int]) -> trt.ITensor:
        """Reshape to run-time dimensions `leading` (int64 [n]) followed by `tail`."""
        layer = self.network.add_shuffle(x)
        if layer is not None:
            layer.set_input(1, self.concatenate([leading, self.constant(list(tail), np.int64)], 0))
        return self.output_of(layer, f"reshape{_shapes(x)}")

    def dims(self, x: trt.ITensor, count: int) -> trt.ITensor:
        """The first `count` run-time dimensions of x, int64 [count]."""
        return self.output_of(self.network.add_slice(self.shape(x), (0,), (count,), (1,)), "leading dimensions")

    def transpose(self, x: trt.ITensor, order: Sequence[int]) -> trt.ITensor:
        layer = self.network.add_shuffle(x)
        if layer is not None:
            layer.first_transpose = trt.Permutation(list(order))
        return self.output_of(layer, f"transpose{_shapes(x)} by {tuple(order)}")

    def concatenate(self, parts: Sequence[trt.ITensor], axis: int) -> trt.ITensor:
        layer = self.network.add_concatenation(list(parts))
        if layer is not None:
            layer.axis = axis
        return self.output_of(layer, f"concatenation{_shapes(*parts)}")

    def shape(self, x: trt.ITensor) -> trt.ITensor:
        """int64 [rank]."""
        return self.output_of(self.network.add_shape(x), "a shape")

    def zeros_like(self, x: trt.ITensor) -> trt.ITensor:
        """Float32 zeros in the run-time shape of x, without reading x."""
        rank = len(x.shape)
        return self._linspace(self.shape(x), trt.float32, np.float32, [0] * rank)

    def iota_rows(self, x: trt.ITensor) -> trt.ITensor:
        """int32 [rows, 1]: 0, 1, 2, ... over the run-time first dimension of x."""
        size = self.concatenate([self.dims(x, 1), self.constant([1], np.int64)], 0)
        return self._linspace(size, trt.int32, np.int32, [1, 0])

    def _linspace(self, size: trt.ITensor, dtype: trt.DataType, number: type, steps: Sequence[int]) -> trt.ITensor:
        """Values from 0 that grow by `steps` along each dimension."""
        fill = self.network.add_fill(trt.Dims([0] * len(steps)), trt.FillOperation.LINSPACE, dtype)
        if fill is not None:
            fill.set_input(0, size)
            fill.set_input(1, self.constant(0, number))
            fill.set_input(2, self.constant(list(steps), number))
        return self.output_of(fill, "a fill")

    def quantize(self, x: trt.ITensor, scale: trt.ITensor, dtype: trt.DataType) -> trt.ITensor:
        return self.output_of(self.network.add_quantize(x, scale, dtype), "quantize")

    def dequantize(
        self, x: trt.ITensor, scale: trt.ITensor, dtype: trt.DataType, axis: int | None = None
    ) -> trt.ITensor:
        """scale: a number, one value for each index of `axis`, or (int4) a block scale of x's rank."""
        layer = self.network.add_dequantize(x, scale, dtype)
        if layer is not None and axis is not None:
            layer.axis = axis
            if layer.axis != axis:
                raise EngineBuildError(f"TensorRT did not take the axis {axis} of dequantize{_shapes(x, scale)}")
        return self.output_of(layer, f"dequantize{_shapes(x, scale)}")


def _shapes(*tensors: trt.ITensor) -> str:
    return " of " + " and ".join(f"{tensor.dtype.name}{list(tensor.shape)}" for tensor in tensors)


def _last_error() -> str:
    errors = build_log().errors
    return errors[-1] if errors else "it gave no reason"
