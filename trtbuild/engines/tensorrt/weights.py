"""Weights and linear layers of a TensorRT network, as network inputs or as embedded constants.

Why each precision is written as it is (TensorRT-RTX 1.7, from the text of compiled plans):

- 16 bit: [out, in], transposed by the matrix multiply at no cost.
- fp8: quantize and dequantize scales are the constant 1, and the real scales multiply outside, in float32. A scale that
  is an input makes both GEMM operands 16-bit. Operands are dequantized to float32 and the product is float32, since a
  product of unscaled values overflows fp16; the plan's GEMM still has fp8 operands. Stored as [in, out]: an input
  of [out, in] is copied to scratch first.
- fp8-dynamic: the same, with each token's own scale (largest value / 448) before and after, and a scale for each
  output channel after.
- int8: the float32 scale of each output channel is an input of the dequantize layer, which fuses into the GEMM. Scaling
  the product instead would have it overflow fp16. Inside a conditional, weight and scale must enter through its
  boundary, or they are dequantized outside of it, to scratch; in a loop they always are. A constant cannot enter, so
  int8 experts are inputs even of a plan that embeds its weights.
- int4: constants, [out, in] with block scales [out, in / group]; an int4 input would be unpacked to scratch. Its zero
  points have no place in TensorRT: the sum of x over each group is multiplied by -zero * scale, a GEMM of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import tensorrt_rtx as trt

from trtbuild.checkpoints.rank_checkpoint import WeightReader
from trtbuild.checkpoints.rank_tensors import Linear, RankPlan, TensorSpec
from trtbuild.engines.network.segments import Segment
from trtbuild.engines.tensorrt.bindings import (
    STORED_TYPES,
    Binding,
    Transform,
    WeightSource,
    bind_weight,
    is_always_input,
)
from trtbuild.engines.tensorrt.graph import NONE, TRANSPOSE, ElementWise, Graph
from trtbuild.errors import EngineBuildError

Enter = Callable[[trt.ITensor], trt.ITensor]

# Largest e4m3 value (checkpoints.quantization has it too, and imports torch, which a build does without).
FP8_MAX = 448.0


class Weights:
    """The weights of one segment of one rank plan; `bindings` lists those that became network inputs, in order."""

    def __init__(self, graph: Graph, plan: RankPlan, segment: Segment, read: WeightReader | None) -> None:
        """`read` is None for weights as inputs; otherwise it gives the values to embed."""
        self.graph = graph
        self.plan = plan
        self.segment = segment
        self.specs: Mapping[str, TensorSpec] = segment.weights(plan)
        self.linears: Mapping[str, Linear] = segment.linears(plan)
        self.bindings: dict[str, Binding] = {}
        self._read = read
        self._tensors: dict[str, trt.ITensor] = {}

    @property
    def embedded(self) -> bool:
        return self._read is not None

    def tensor(self, name: str, dtype: str, shape: tuple[int, ...], source: WeightSource) -> trt.ITensor:
        """The network's tensor of one weight: an input or a constant; the same one when asked again."""
        if name not in self._tensors:
            binding = Binding(name, "weight", dtype, shape, source)
            if self._read is None or self._is_always_input(source):
                self._tensors[name] = self.graph.input(name, dtype, shape)
                self.bindings[name] = binding
            else:
                values = bind_weight(binding, self.plan, self.segment, self._read)
                self._tensors[name] = self.graph.weight(name, dtype, shape, values)
        return self._tensors[name]

    def plain(self, name: str) -> trt.ITensor:
        """A rank tensor as it is stored."""
        spec = self.specs[name]
        return self.tensor(name, STORED_TYPES[spec.dtype], spec.shape, WeightSource("copy", (name,)))

    def linear(self, x: trt.ITensor, name: str, expert: int | None = None, enter: Enter | None = None) -> trt.ITensor:
        """x [tokens, in] -> [tokens, out] in x's type; no bias.

        `expert` indexes a stack, counted on the rank. `enter` brings a tensor into the conditional that x is in.
        """
        layer = self.linears.get(name)
        if layer is None:
            return self.graph.matmul(x, self.plain(f"{name}.weight"), TRANSPOSE)
        if layer.form.order:
            x = self.graph.gather(x, self.plain(f"{name}.input_order"), axis=1)
        if layer.precision == "fp8":
            return self._fp8(x, name, expert)
        if layer.precision == "fp8-dynamic":
            return self._fp8_dynamic(x, name, expert)
        if layer.precision == "int8":
            scale = self._part(name, "per_channel_scale", "copy", expert)
            weight = self._part(name, "weight", "transpose", expert)
            if enter is not None:
                scale, weight = enter(scale), enter(weight)
            return self.graph.matmul(x, self.graph.dequantize(weight, scale, x.dtype, axis=1))
        if layer.precision == "int4":
            return self._int4(x, name, layer, expert)
        return self.graph.matmul(x, self._part(name, "weight", "copy", expert), TRANSPOSE)

    def _fp8(self, x: trt.ITensor, name: str, expert: int | None) -> trt.ITensor:
        graph = self.graph
        weight_scale, activation_scale = f"{name}.weights_scaling_factor", f"{name}.activation_scaling_factor"
        source = WeightSource("reciprocal", (activation_scale,))
        input_inverse = self.tensor(f"{name}.input_scale", "float32", (1, 1), source)
        source = WeightSource("product", (weight_scale, activation_scale), expert)
        shape = (1, self.specs[weight_scale].shape[-1])
        output_scale = self.tensor(f"{_of_expert(name, expert)}.output_scale", "float32", shape, source)
        product = self._fp8_product(graph.multiply(graph.cast(x, trt.float32), input_inverse), name, expert)
        return graph.cast(graph.multiply(product, output_scale), x.dtype)

    def _fp8_dynamic(self, x: trt.ITensor, name: str, expert: int | None) -> trt.ITensor:
        graph = self.graph
        wide = graph.cast(x, trt.float32)
        largest = graph.reduce(graph.unary(wide, trt.UnaryOperation.ABS), trt.ReduceOperation.MAX, [1])
        scale = graph.elementwise(largest, graph.scalar_like(FP8_MAX, largest), ElementWise.DIV)
        is_zero = graph.elementwise(scale, graph.scalar_like(0, scale), ElementWise.EQUAL)
        scale = graph.select(is_zero, graph.scalar_like(1, scale), scale)
        product = self._fp8_product(graph.elementwise(wide, scale, ElementWise.DIV), name, expert)
        channels = graph.reshape(self._part(name, "per_channel_scale", "copy", expert), (1, -1))
        return graph.cast(graph.multiply(graph.multiply(product, scale), channels), x.dtype)

    def _fp8_product(self, scaled: trt.ITensor, name: str, expert: int | None) -> trt.ITensor:
        """fp8(scaled) times the stored weight, without its scales, in float32."""
        graph, one = self.graph, self.graph.constant(1.0, np.float32)
        left = graph.dequantize(graph.quantize(scaled, one, trt.fp8), one, trt.float32)
        if self.embedded:
            right = graph.dequantize(self._part(name, "weight", "copy", expert), one, trt.float32)
            return graph.matmul(left, right, TRANSPOSE)
        right = graph.dequantize(self._part(name, "weight", "transpose", expert), one, trt.float32)
        return graph.matmul(left, right, NONE)

    def _int4(self, x: trt.ITensor, name: str, layer: Linear, expert: int | None) -> trt.ITensor:
        if not self.embedded:
            raise EngineBuildError(
                f"{name}: int4 weights must be embedded, TensorRT-RTX unpacks int4 inputs to scratch"
            )
        graph = self.graph
        source = WeightSource("copy", (f"{name}.weight",), expert)
        shape = (layer.out_features, layer.in_features)
        packed = self.tensor(f"{_of_expert(name, expert)}.weight", "int4", shape, source)
        num_groups = layer.in_features // (layer.group_size or 1)
        # Rows of a single block are unpacked to scratch (TensorRT-RTX 1.7), of two equal ones not.
        scales = self._part(name, "weights_scaling_factor", "copy" if num_groups > 1 else "twice", expert)
        y = graph.matmul(x, graph.dequantize(packed, scales, x.dtype), TRANSPOSE)
        if not layer.form.zeros:
            return y
        groups = graph.reshape(graph.cast(x, trt.float32), (-1, num_groups, layer.group_size or 1))
        sums = graph.cast(graph.reduce(groups, trt.ReduceOperation.SUM, [2], keep=False), x.dtype)
        return graph.add(y, graph.matmul(sums, self._part(name, "zero", "copy", expert), TRANSPOSE))

    def _is_always_input(self, source: WeightSource) -> bool:
        layer = self.linears.get(source.tensors[0].rpartition(".")[0]) if source.tensors else None
        return layer is not None and is_always_input(layer)

    def _part(self, name: str, part: str, transform: Transform, expert: int | None) -> trt.ITensor:
        """`{name}.{part}`, or one expert's share of it."""
        spec = self.specs[f"{name}.{part}"]
        shape = spec.shape if expert is None else spec.shape[1:]
        shape = (*shape[:-2], shape[-1], shape[-2]) if transform == "transpose" else shape
        shape = (*shape[:-1], 2 * shape[-1]) if transform == "twice" else shape
        source = WeightSource(transform, (f"{name}.{part}",), expert)
        return self.tensor(f"{_of_expert(name, expert)}.{part}", STORED_TYPES[spec.dtype], shape, source)


def _of_expert(name: str, expert: int | None) -> str:
    return name if expert is None else f"{name}.{expert}"
