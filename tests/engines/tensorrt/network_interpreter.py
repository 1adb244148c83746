"""Evaluates a TensorRT network definition in torch, layer by layer: what the plan compiled from it will compute.

It reads nothing but the network: layer types, attributes, wiring, constants. Values have the layers' declared types;
with `wide`, float32 in place of fp16 and bf16, so that a comparison can be tight. Ranks run in lockstep: a collective
on one asks the others for their input. Branches of a conditional are evaluated only where they are taken.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import tensorrt_rtx as trt
import torch
from layer_math import LAYERS, attention

sys.setrecursionlimit(50_000)

TYPES = {
    trt.float32: torch.float32, trt.float16: torch.float16, trt.bfloat16: torch.bfloat16, trt.int32: torch.int32,
    trt.int64: torch.int64, trt.bool: torch.bool, trt.fp8: torch.float8_e4m3fn, trt.int8: torch.int8,
    trt.int4: torch.int8,
}  # fmt: skip
# Layers whose attributes are read from another class than LAYERS'.
SCOPES = {
    "ATTENTION_INPUT": trt.IAttentionInputLayer,
    "RECURRENCE": trt.IRecurrenceLayer,
    "TRIP_LIMIT": trt.ITripLimitLayer,
    "LOOP_OUTPUT": trt.ILoopOutputLayer,
    "CONDITION": trt.IConditionLayer,
    "CONDITIONAL_OUTPUT": trt.IIfConditionalOutputLayer,
    "DIST_COLLECTIVE": trt.IDistCollectiveLayer,
}


def run_networks(
    networks: Sequence[trt.INetworkDefinition],
    inputs: Sequence[Mapping[str, torch.Tensor]],
    constants: Sequence[Mapping[str, torch.Tensor]],
    *,
    wide: bool = False,
) -> list[dict[str, torch.Tensor]]:
    """Every rank's outputs by name; the ranks' networks may be the same object.

    inputs: a tensor of another type or shape than the network declares is an error.
    constants: contents of constants that TensorRT's Python API does not show (bf16, fp8, int4), by layer name.
    """
    ranks: list[Rank] = []
    for network, feed, known in zip(networks, inputs, constants, strict=True):
        ranks.append(Rank(network, feed, known, ranks, wide))
    return [rank.outputs() for rank in ranks]


class Rank:
    """One rank's evaluation; values are kept by tensor name."""

    def __init__(
        self,
        network: trt.INetworkDefinition,
        inputs: Mapping[str, torch.Tensor],
        constants: Mapping[str, torch.Tensor],
        group: list[Rank],
        wide: bool,
    ) -> None:
        self._group, self._wide, self._constants = group, wide, constants
        self._network = network
        self._layers = [_typed(network.get_layer(i)) for i in range(network.num_layers)]
        self._producer = {layer.get_output(i).name: layer for layer in self._layers for i in range(layer.num_outputs)}
        # Values of the loops that are running, innermost last, each with the tensors that change in it.
        self._scopes: list[tuple[set[str], dict[str, torch.Tensor]]] = []
        self._values = {name: self._checked(tensor, inputs) for name, tensor in self._declared().items()}

    def outputs(self) -> dict[str, torch.Tensor]:
        tensors = [self._network.get_output(i) for i in range(self._network.num_outputs)]
        return {tensor.name: self.value(tensor) for tensor in tensors}

    def value(self, tensor: trt.ITensor) -> torch.Tensor:
        name = tensor.name
        store = self._values
        for changing, values in reversed(self._scopes):
            if name in changing:
                store = values
                break
        if name not in store:
            layer = self._producer[name]
            results = self._evaluate(layer)
            results = results if isinstance(results, tuple) else (results,)
            for i, result in enumerate(results):
                output = layer.get_output(i)
                wanted = self._type(output.dtype)
                assert result.dtype == wanted, f"{layer.name}: {result.dtype} where {wanted} is declared"
                _check_shape(result, output.shape, layer.name)
                store[output.name] = result
        return store[name]

    def _evaluate(self, layer: Any) -> Any:
        kind = layer.type_name
        control = {
            "CONSTANT": self._constant,
            "CONDITIONAL_INPUT": self._pass,
            "CONDITIONAL_OUTPUT": self._branch,
            "LOOP_OUTPUT": self._loop,
            "DIST_COLLECTIVE": self._collective,
            "ATTENTION_OUTPUT": self._pass,
        }
        if kind in control:
            return control[kind](layer)
        inputs = [self.value(x) if x is not None else None for x in map(layer.get_input, range(layer.num_inputs))]
        dtype = self._type(layer.get_output(0).dtype)
        if kind == "ATTENTION_INPUT":
            inputs += [None] * (7 - len(inputs))
            return attention(layer.attention, inputs, dtype)
        return LAYERS[kind][1](layer, inputs, dtype)

    def _pass(self, layer: Any) -> torch.Tensor:
        return self.value(layer.get_input(0))

    def _branch(self, layer: Any) -> torch.Tensor:
        (condition,) = self._of("CONDITION", layer.conditional.name)
        return self.value(layer.get_input(0 if bool(self.value(condition.get_input(0))) else 1))

    def _loop(self, output: Any) -> torch.Tensor:
        """LAST_VALUE of a recurrence: its value when the loop ends, the initial one after no turns."""
        name = output.loop.name
        recurrences = self._of("RECURRENCE", name)
        (limit,) = self._of("TRIP_LIMIT", name)
        assert output.kind == trt.LoopOutput.LAST_VALUE
        state = {r.get_output(0).name: self.value(r.get_input(0)) for r in recurrences}
        changing = self._downstream(set(state))
        turns = int(self.value(limit.get_input(0))) if limit.kind == trt.TripLimit.COUNT else None
        turn = 0
        while turns is None or turn < turns:
            self._scopes.append((changing, dict(state)))
            if turns is None and not bool(self.value(limit.get_input(0))):
                self._scopes.pop()
                break
            state = {r.get_output(0).name: self.value(r.get_input(1)) for r in recurrences}
            self._scopes.pop()
            turn += 1
            assert turn < 1000, "a loop that does not end"
        return state[output.get_input(0).name]

    def _downstream(self, names: set[str]) -> set[str]:
        """Tensors that depend on `names`, up to the loop's end. Layers stand in the order in which they were added."""
        found = set(names)
        for layer in self._layers:
            if layer.type_name in ("LOOP_OUTPUT", "RECURRENCE"):
                continue
            inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
            if any(x is not None and x.name in found for x in inputs):
                found |= {layer.get_output(i).name for i in range(layer.num_outputs)}
        return found

    def _collective(self, layer: Any) -> torch.Tensor:
        """The group's other ranks are at the same layer, which has the same place in their networks."""
        assert layer.num_ranks == len(self._group)
        index = next(i for i, x in enumerate(self._layers) if x is layer)
        parts = [rank.value(rank._layers[index].get_input(0)) for rank in self._group]
        # The API tells no operation; an all-gather multiplies the first dimension, which is static here.
        if layer.get_output(0).shape[0] == layer.num_ranks * layer.get_input(0).shape[0]:
            return torch.cat(parts, 0)
        return torch.stack(parts).float().sum(0).to(parts[0].dtype)

    def _constant(self, layer: Any) -> torch.Tensor:
        weights = layer.weights
        if not isinstance(weights, trt.Weights):
            value = torch.from_numpy(weights.copy())
        elif layer.get_output(0).dtype == trt.int4:
            packed = self._constants[layer.name].flatten()
            value = torch.stack((packed << 4, packed), -1).view(torch.int8) >> 4
        else:
            value = self._constants[layer.name]
        return value.reshape(tuple(layer.shape)).to(self._type(layer.get_output(0).dtype))

    def _declared(self) -> dict[str, trt.ITensor]:
        return {x.name: x for x in map(self._network.get_input, range(self._network.num_inputs))}

    def _checked(self, tensor: trt.ITensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        value = inputs[tensor.name]
        allowed = {TYPES[tensor.dtype], self._type(tensor.dtype)}
        assert value.dtype in allowed, f"input {tensor.name} is {value.dtype}, the network declares {tensor.dtype}"
        _check_shape(value, tensor.shape, tensor.name)
        return value.to(self._type(tensor.dtype))

    def _type(self, dtype: trt.DataType) -> torch.dtype:
        return torch.float32 if self._wide and dtype in (trt.float16, trt.bfloat16) else TYPES[dtype]

    def _of(self, kind: str, scope: str) -> list[Any]:
        """Layers of a loop or a conditional."""
        layers = [layer for layer in self._layers if layer.type_name == kind]
        return [layer for layer in layers if (layer.conditional if kind == "CONDITION" else layer.loop).name == scope]


def _typed(layer: Any) -> Any:
    """TensorRT returns plain ILayers; their attributes are those of the class that their type names."""
    name = layer.type.name
    cls = SCOPES.get(name) or (LAYERS[name][0] if name in LAYERS else None)
    if name == "CONSTANT":
        cls = trt.IConstantLayer
    wrapped = _Layer(layer, name)
    if cls is not None:
        layer.__class__ = cls
    return wrapped


class _Layer:
    """A layer with its type kept: some classes hide `ILayer.type` behind an attribute of their own."""

    def __init__(self, layer: Any, type_name: str) -> None:
        self._layer = layer
        self.type_name = type_name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def _check_shape(value: torch.Tensor, declared: Any, name: str) -> None:
    shape = tuple(declared)
    same = len(shape) == value.dim() and all(want in (-1, have) for want, have in zip(shape, value.shape, strict=True))
    assert same, f"{name}: {tuple(value.shape)} where {shape} is declared"
