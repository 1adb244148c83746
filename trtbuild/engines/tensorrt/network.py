"""One segment of one rank as a TensorRT network, with its bindings and optimization profiles."""

from __future__ import annotations

from dataclasses import dataclass

import tensorrt_rtx as trt

from trtbuild.checkpoints.rank_checkpoint import WeightReader
from trtbuild.checkpoints.rank_tensors import RankPlan
from trtbuild.engines.limits import EngineLimits
from trtbuild.engines.network.decoder import define_segment
from trtbuild.engines.network.segments import Segment, moe_of
from trtbuild.engines.tensorrt.bindings import Binding
from trtbuild.engines.tensorrt.experts import MoeForm, choose_form
from trtbuild.engines.tensorrt.graph import Graph
from trtbuild.engines.tensorrt.log import build_log
from trtbuild.engines.tensorrt.ops import Phase, TensorRTOps
from trtbuild.engines.tensorrt.weights import Weights


@dataclass
class BuiltNetwork:
    """A network that is ready to compile. `graph` keeps the memory of its constants alive."""

    builder: trt.Builder
    network: trt.INetworkDefinition
    graph: Graph
    bindings: list[Binding]
    phase: Phase
    moe_form: MoeForm | None
    limits: EngineLimits

    def profiles(self) -> list[dict[str, tuple[tuple[int, ...], ...]]]:
        """For each optimization profile, (min, opt, max) shapes of every input with a dynamic dimension."""
        return [self._profile(ranges) for ranges in _ranges(self.phase, self.bindings, self.limits)]

    def _profile(self, ranges: dict[str, tuple[int, int, int]]) -> dict[str, tuple[tuple[int, ...], ...]]:
        profile = {}
        for binding in self.bindings:
            if binding.name not in _input_names(self.network) or all(isinstance(dim, int) for dim in binding.shape):
                continue
            triple = ([dim if isinstance(dim, int) else ranges[dim][i] for dim in binding.shape] for i in range(3))
            profile[binding.name] = tuple(tuple(shape) for shape in triple)
        return profile


def plan_moe_form(plan: RankPlan, segment: Segment, phase: Phase, limits: EngineLimits) -> MoeForm | None:
    """The form of the segment's mixtures of experts in one plan, None where it has none."""
    moe = moe_of(plan, segment)
    if moe is None:
        return None
    tokens = limits.max_batch_size if phase == "decode" else limits.max_step_tokens
    formats = {linear.precision for linear in segment.linears(plan).values() if linear.num_experts is not None}
    return choose_form(phase, tokens, moe.num_experts, moe.top_k, formats)


def build_network(
    plan: RankPlan,
    segment: Segment,
    phase: Phase,
    limits: EngineLimits,
    moe_form: MoeForm | None = None,
    read: WeightReader | None = None,
) -> BuiltNetwork:
    """Define the segment. `read` embeds the weights that it gives; without it they are inputs.

    Raises `EngineBuildError` at the first layer that TensorRT does not take as it was meant.
    """
    log = build_log()
    log.clear()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    graph = Graph(network)
    form = moe_form if moe_of(plan, segment) else None
    form = form or plan_moe_form(plan, segment, phase, limits)
    weights = Weights(graph, plan, segment, read)
    ops = TensorRTOps(graph, weights, plan, segment, limits, phase, form or "dense")
    define_segment(ops, plan, segment)
    log.check(f"segment {segment.index} ({segment.kind}, {phase})")
    bindings = {**ops.bindings, **weights.bindings}
    bound = [bindings[name] for name in (*_input_names(network), *_output_names(network))]
    return BuiltNetwork(builder, network, graph, bound, phase, form, limits)


def builder_config(built: BuiltNetwork, targets: tuple[str, ...]) -> trt.IBuilderConfig:
    """Targets, profiles, and float32 that is float32: the router decides on near ties, so no TF32."""
    config = built.builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    # Streams of its own would give every branch a GEMM workspace; a decoder is a chain.
    config.max_aux_streams = 0
    config.num_compute_capabilities = len(targets)
    for i, target in enumerate(targets):
        config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), i)
    for shapes in built.profiles():
        profile = built.builder.create_optimization_profile()
        for name, (smallest, usual, largest) in shapes.items():
            profile.set_shape(name, smallest, usual, largest)
        config.add_optimization_profile(profile)
    return config


def _ranges(phase: Phase, bindings: list[Binding], limits: EngineLimits) -> list[dict[str, tuple[int, int, int]]]:
    """Ranges of the symbols B, S, tokens and R in each profile."""
    chunk, batch = limits.chunk_size, limits.max_batch_size
    prefill = {"B": (1, 1, 1), "S": (1, chunk, chunk)}
    decode = {"B": (1, batch, batch), "S": (1, 1, 1)}
    if phase == "prefill":
        return [prefill]
    if phase == "decode":
        return [decode]
    if any(binding.name == "hidden" and binding.role == "step" for binding in bindings):
        return [prefill, decode]
    tokens, rows = limits.max_step_tokens, limits.max_head_rows
    return [{"B": (1, 1, batch), "S": (1, chunk, chunk), "tokens": (1, tokens, tokens), "R": (1, rows, rows)}]


def _input_names(network: trt.INetworkDefinition) -> list[str]:
    return [network.get_input(i).name for i in range(network.num_inputs)]


def _output_names(network: trt.INetworkDefinition) -> list[str]:
    return [network.get_output(i).name for i in range(network.num_outputs)]
