"""Weights and linear layers of a TensorRT network, as network inputs or as embedded constants.

Why each precision is written as it is (TensorRT-RTX 1.7, from the text of compiled plans):

- 16 bit: [out, in], transposed by the matrix multiply at no cost.
- fp8: quantize and dequantize scales are the constant 1, and the real scales multiply outside, in float32. A scale that
  is an input makes both GEMM operands 16-bit. Operands are dequantized to float32 and the product is float32, since a
  product of unscaled values overflows fp16; the plan's GEMM still has fp8 operands. Stored as [in, out]: an input
  of [out, in] is copied to scratch first.
- int8: the float32 scale of each output channel is an input of the dequantize layer, which fuses into the GEMM. Scaling
  the product instead would have it overflow fp16. Inside a conditional, weight and scale must enter through its
  boundary, or they are dequantized outside of it, to scratch; in a loop they always are.
- int4: constants, [out, in] with block scales [out, in / group]; an int4 input would be unpacked to scratch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import tensorrt_rtx as trt

from trtbuild.checkpoints.rank_checkpoint import WeightReader
from trtbuild.checkpoints.rank_tensors import Linear, RankPlan, TensorSpec
from trtbuild.engines.network.segments import Segment
from trtbuild.engines.tensorrt.bindings import STORED_TYPES, Binding, Transform, WeightSource, bind_weight
from trtbuild.engines.tensorrt.graph import NONE, TRANSPOSE, Graph
from trtbuild.errors import EngineBuildError

Enter = Callable[[trt.ITensor], trt.ITensor]


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
            if self._read is None:
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
        if layer.precision == "fp8":
            return self._fp8(x, name, layer, expert)
        if layer.precision == "int8":
            scale = self._part(name, "per_channel_scale", "copy", expert)
            weight = self._part(name, "weight", "transpose", expert)
            if enter is not None:
                scale, weight = enter(scale), enter(weight)
            return self.graph.matmul(x, self.graph.dequantize(weight, scale, x.dtype, axis=1))
        if layer.precision == "int4":
            if not self.embedded:
                raise EngineBuildError(
                    f"{name}: int4 weights must be embedded, TensorRT-RTX unpacks int4 inputs to scratch"
                )
            return self.graph.matmul(x, self._int4(name, layer, expert, x.dtype), TRANSPOSE)
        return self.graph.matmul(x, self._part(name, "weight", "copy", expert), TRANSPOSE)

    def _fp8(self, x: trt.ITensor, name: str, layer: Linear, expert: int | None) -> trt.ITensor:
        graph, one = self.graph, self.graph.constant(1.0, np.float32)
        weight_scale, activation_scale = f"{name}.weights_scaling_factor", f"{name}.activation_scaling_factor"
        source = WeightSource("reciprocal", (activation_scale,))
        input_scale = self.tensor(f"{name}.input_scale", "float32", (1, 1), source)
        source = WeightSource("product", (weight_scale, activation_scale), expert)
        output_scale = self.tensor(f"{_of_expert(name, expert)}.output_scale", "float32", (1, 1), source)
        scaled = graph.multiply(graph.cast(x, trt.float32), input_scale)
        left = graph.dequantize(graph.quantize(scaled, one, trt.fp8), one, trt.float32)
        if self.embedded:
            right = graph.dequantize(self._part(name, "weight", "copy", expert), one, trt.float32)
            product = graph.matmul(left, right, TRANSPOSE)
        else:
            right = graph.dequantize(self._part(name, "weight", "transpose", expert), one, trt.float32)
            product = graph.matmul(left, right, NONE)
        return graph.cast(graph.multiply(product, output_scale), x.dtype)

    def _int4(self, name: str, layer: Linear, expert: int | None, dtype: trt.DataType) -> trt.ITensor:
        source = WeightSource("copy", (f"{name}.weight",), expert)
        shape = (layer.out_features, layer.in_features)
        weight = self.tensor(f"{_of_expert(name, expert)}.weight", "int4", shape, source)
        return self.graph.dequantize(weight, self._part(name, "weights_scaling_factor", "copy", expert), dtype)

    def _part(self, name: str, part: str, transform: Transform, expert: int | None) -> trt.ITensor:
        """`{name}.{part}`, or one expert's share of it."""
        spec = self.specs[f"{name}.{part}"]
        shape = spec.shape if expert is None else spec.shape[1:]
        shape = (*shape[:-2], shape[-1], shape[-2]) if transform == "transpose" else shape
        source = WeightSource(transform, (f"{name}.{part}",), expert)
        return self.tensor(f"{_of_expert(name, expert)}.{part}", STORED_TYPES[spec.dtype], shape, source)


def _of_expert(name: str, expert: int | None) -> str:
    return name if expert is None else f"{name}.{expert}"
