"""A mixture of experts as TensorRT layers, in three forms.

`conditional`  each expert stands in a conditional and computes all tokens if any chose it: no idle expert's weights are
               read. For decode.
`routed`       each expert loops over tiles of the tokens that chose it: computes no more than was routed, and reads no
               idle expert. For prefill.
`dense`        every expert computes every token: the only form that CUDA graphs can capture.

No form lets a token's value reach the sum through an expert that it did not choose, not even multiplied by 0 (which
would make NaN of an overflow). No collective stands inside: under expert parallelism ranks take different branches.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import numpy as np
import tensorrt_rtx as trt

from trtbuild.engines.tensorrt.graph import ElementWise, Graph
from trtbuild.engines.tensorrt.weights import Enter, Weights
from trtbuild.errors import EngineBuildError

MoeForm = Literal["conditional", "routed", "dense"]

# Rows that one turn of the routed loop computes: the smallest tile that fills a tensor-core GEMM.
TILE_ROWS = 64


def choose_form(phase: str, max_tokens: int, num_experts: int, top_k: int, formats: Collection[str]) -> MoeForm:
    """The form of a plan: its phase, the largest step's tokens and the formats of the experts' weights decide.

    Up to one tile of tokens, routing saves no arithmetic over a conditional. A model whose tokens choose every expert
    gains from neither. Plans of both phases (embedded weights) are routed: a loop of zero turns reads no weights.
    In a loop int8 weights are dequantized to scratch, all experts of all layers at once, and int4 weights one expert at
    a time, where a conditional keeps both fused with the matrix multiply; so they are never routed.
    """
    if top_k >= num_experts:
        return "dense"
    if phase == "decode" or max_tokens <= TILE_ROWS or not {"int8", "int4"}.isdisjoint(formats):
        return "conditional"
    return "routed"


@dataclass
class _Routing:
    """One layer's choice over the rank's E experts.

    coefficients: float32 [tokens, E], 0 where not chosen; chosen: int32 0 or 1 [tokens, E].
    """

    coefficients: trt.ITensor
    chosen: trt.ITensor


def emit_experts(
    graph: Graph, weights: Weights, form: MoeForm, x: trt.ITensor, name: str, scores: trt.ITensor, indices: trt.ITensor
) -> trt.ITensor:
    """Sum over the rank's experts of score * ffn(x), [tokens, hidden] in x's type.

    scores float32 and indices int32 are [tokens, top_k]; indices count from the rank's first expert, and those outside
    of 0..E-1 are another rank's or nobody's.
    """
    num_experts = weights.linears[f"{name}.fc"].num_experts
    if num_experts is None:
        raise EngineBuildError(f"{name}.fc is no stack of experts")
    routing = _route(graph, scores, indices, num_experts)
    emit = {"conditional": _conditional, "routed": _routed, "dense": _dense}[form]
    return graph.cast(emit(graph, weights, x, name, routing, num_experts), x.dtype)


def _route(graph: Graph, scores: trt.ITensor, indices: trt.ITensor, num_experts: int) -> _Routing:
    top_k = scores.shape[1]
    experts = graph.constant(np.arange(num_experts).reshape(1, 1, -1), np.int32)
    is_choice = graph.elementwise(graph.reshape(indices, (-1, top_k, 1)), experts, ElementWise.EQUAL)
    spread = graph.reshape(scores, (-1, top_k, 1))
    weighted = graph.select(is_choice, spread, graph.constant([[[0]]], np.float32))
    coefficients = graph.reduce(weighted, trt.ReduceOperation.SUM, [1], keep=False)
    chosen = graph.reduce(graph.cast(is_choice, trt.int32), trt.ReduceOperation.MAX, [1], keep=False)
    return _Routing(coefficients, chosen)


def _ffn(
    graph: Graph, weights: Weights, x: trt.ITensor, name: str, expert: int, enter: Enter | None = None
) -> trt.ITensor:
    """proj(silu(gate) * up) of one expert, [rows, hidden]; the fused fc holds up before gate."""
    both = weights.linear(x, f"{name}.fc", expert, enter)
    half = both.shape[1] // 2
    up, gate = graph.slice(both, 1, 0, half), graph.slice(both, 1, half, half)
    return weights.linear(graph.multiply(graph.silu(gate), up), f"{name}.proj", expert, enter)


def _weighted(graph: Graph, routing: _Routing, expert: int, y: trt.ITensor) -> trt.ITensor:
    """float32 y times the expert's coefficients where it was chosen, 0 elsewhere."""
    term = graph.multiply(graph.cast(y, trt.float32), graph.slice(routing.coefficients, 1, expert, 1))
    chosen = _positive(graph, graph.slice(routing.chosen, 1, expert, 1))
    return graph.select(chosen, term, graph.constant([[0]], np.float32))


def _dense(
    graph: Graph, weights: Weights, x: trt.ITensor, name: str, routing: _Routing, num_experts: int
) -> trt.ITensor:
    terms = (_weighted(graph, routing, e, _ffn(graph, weights, x, name, e)) for e in range(num_experts))
    return reduce(graph.add, terms)


def _conditional(
    graph: Graph, weights: Weights, x: trt.ITensor, name: str, routing: _Routing, num_experts: int
) -> trt.ITensor:
    wanted = graph.reduce(routing.chosen, trt.ReduceOperation.MAX, [0], keep=False)
    terms = []
    for expert in range(num_experts):
        condition = _positive(graph, graph.reshape(graph.slice(wanted, 0, expert, 1), ()))
        conditional = graph.network.add_if_conditional()
        graph.exists(conditional, "a conditional")
        conditional.set_condition(condition)
        enter = _entrance(graph, conditional)
        computed = _ffn(graph, weights, enter(x), name, expert, enter)
        nothing = graph.cast(graph.zeros_like(x), x.dtype)
        y = graph.output_of(conditional.add_output(computed, nothing), "a conditional's output")
        terms.append(_weighted(graph, routing, expert, y))
    return reduce(graph.add, terms)


def _entrance(graph: Graph, conditional: trt.IIfConditional) -> Enter:
    return lambda tensor: graph.output_of(conditional.add_input(tensor), "a conditional's input")


def _routed(
    graph: Graph, weights: Weights, x: trt.ITensor, name: str, routing: _Routing, num_experts: int
) -> trt.ITensor:
    """A chain of loops that all add to one sum: a result of each expert's own would cost E times its memory."""
    chosen = routing.chosen
    axis = graph.constant(0, np.int32)
    layer = graph.network.add_cumulative(chosen, axis, trt.CumulativeOperation.SUM, True, False)
    earlier = graph.output_of(layer, "positions in the experts' queues")
    queue = graph.select(_positive(graph, chosen), earlier, graph.constant([[-1]], np.int32))
    counts = graph.reduce(chosen, trt.ReduceOperation.SUM, [0], keep=False)
    rows = graph.iota_rows(chosen)
    total = graph.zeros_like(x)
    for expert in range(num_experts):
        place = _Queue(
            count=graph.reshape(graph.slice(counts, 0, expert, 1), ()),
            place=graph.slice(queue, 1, expert, 1),
            coefficient=graph.slice(routing.coefficients, 1, expert, 1),
            rows=rows,
        )
        total = _tiles(graph, weights, x, name, expert, place, total)
    return total


@dataclass
class _Queue:
    """The tokens of one expert: how many, int32; each token's place or -1, its coefficient and its row, [tokens, 1]."""

    count: trt.ITensor
    place: trt.ITensor
    coefficient: trt.ITensor
    rows: trt.ITensor


def _tiles(
    graph: Graph, weights: Weights, x: trt.ITensor, name: str, expert: int, queue: _Queue, total: trt.ITensor
) -> trt.ITensor:
    """The loop of one expert over its queue, a tile at a time: `total`, float32 [tokens, hidden], plus its terms."""
    loop = graph.network.add_loop()
    base = loop.add_recurrence(graph.constant(0, np.int32))
    done = loop.add_recurrence(total)
    start, so_far = graph.output_of(base, "a loop's tile"), graph.output_of(done, "a loop's result")
    # With a trip COUNT that depends on data, the builder (1.7) crashes where the plan also has attention.
    more = graph.elementwise(start, queue.count, ElementWise.LESS)
    graph.exists(loop.add_trip_limit(more, trt.TripLimit.WHILE), "a loop's condition")
    offset = graph.elementwise(queue.place, graph.reshape(start, (1, 1)), ElementWise.SUB)
    tile = graph.constant(np.arange(TILE_ROWS).reshape(1, -1), np.int32)
    # Row of each place of the tile; places past the queue's end read row 0 and are never read back.
    here = graph.elementwise(offset, tile, ElementWise.EQUAL)
    source = graph.reduce(
        graph.select(here, queue.rows, graph.constant([[0]], np.int32)), trt.ReduceOperation.SUM, [0], keep=False
    )
    y = _ffn(graph, weights, graph.gather(x, source), name, expert)
    after = graph.elementwise(offset, graph.constant([[-1]], np.int32), ElementWise.GREATER)
    before = graph.elementwise(offset, graph.constant([[TILE_ROWS]], np.int32), ElementWise.LESS)
    low = graph.elementwise(offset, graph.constant([[0]], np.int32), ElementWise.MAX)
    index = graph.elementwise(low, graph.constant([[TILE_ROWS - 1]], np.int32), ElementWise.MIN)
    returned = graph.cast(graph.gather(y, graph.reshape(index, (-1,))), trt.float32)
    added = graph.add(so_far, graph.multiply(returned, queue.coefficient))
    done.set_input(1, graph.select(graph.elementwise(after, before, ElementWise.AND), added, so_far))
    base.set_input(1, graph.add(start, graph.constant(TILE_ROWS, np.int32)))
    return graph.output_of(loop.add_loop_output(so_far, trt.LoopOutput.LAST_VALUE), "a loop's output")


def _positive(graph: Graph, x: trt.ITensor) -> trt.ITensor:
    return graph.elementwise(x, graph.constant(np.zeros((1,) * len(x.shape)), np.int32), ElementWise.GREATER)
