"""`TorchOps` that keep what a decoder layer's blocks put out, and that can be fed another model's hidden states.

Outputs are compared at the ends of blocks (norm to projection), where scales that a quantizer moved between a norm and
the weights behind it, or from one projection into the next, cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from trtbuild.checkpoints.model_config import MoeConfig
from trtbuild.checkpoints.rank_tensors import RankPlan
from trtbuild.engines.network.decoder import define_segment
from trtbuild.engines.network.segments import Segment
from trtbuild.engines.reference.torch_ops import Observer, Ranks, Step, TorchOps
from trtbuild.engines.reference.torch_weights import TorchWeights

# The blocks of a layer: "mlp" is the dense one or the whole mixture, "expert" one routed expert on every token.
Block = Literal["embed", "attention", "mlp", "router", "expert", "shared_expert", "head"]
BlockKey = tuple[Block, int | None]


@dataclass
class ProbeOps(TorchOps):
    """One decoder layer; `blocks` has each block's output per rank, after its collective.

    `mlp_input` replaces what the layer's second half would get from its first, so that errors do not add up.
    """

    mlp_input: torch.Tensor | None = None
    blocks: dict[BlockKey, Ranks] = field(default_factory=dict)
    seen_mlp_input: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self._residual = self.inputs["hidden"]

    def rms_norm(self, x: Ranks, name: str, epsilon: float | None = None) -> Ranks:
        if name.endswith(".post_layernorm"):
            if self.mlp_input is not None:
                x = [self.mlp_input] * len(x)
            self.seen_mlp_input = x[0]
        return super().rms_norm(x, name, epsilon)

    def add(self, x: Ranks, y: Ranks) -> Ranks:
        total = super().add(x, y)
        if x is self._residual:
            self.blocks["mlp" if ("attention", None) in self.blocks else "attention", None] = y
            self._residual = total
        else:
            self.blocks["shared_expert", None] = self.all_reduce(y)
        return total

    def router(self, x: Ranks, name: str) -> Ranks:
        logits = super().router(x, name)
        self.blocks["router", None] = logits
        return logits

    def experts(self, x: Ranks, name: str, scores: Ranks, indices: Ranks, moe: MoeConfig) -> Ranks:
        """Besides the routed mixture, every expert on every token: a broken one may hide behind the router."""
        all_tokens, ranks = scores[0].new_ones((len(scores[0]), 1)), len(x)
        # With an observer, each of these runs would run all experts for it.
        observer, self.observer = self.observer, None
        for expert in range(moe.num_experts):
            only = torch.full_like(indices[0][:, :1], expert)
            alone = super().experts(x, name, [all_tokens] * ranks, [only] * ranks, moe)
            self.blocks["expert", expert] = self.all_reduce(alone)
        self.observer = observer
        return super().experts(x, name, scores, indices, moe)


def layer_plan(plan: RankPlan, local: int) -> RankPlan:
    """The same plan with the tensors of one of its decoder layers only; names stay."""
    name = f"transformer.layers.{local}."
    plain = tuple(tensor for tensor in plan.plain if tensor.spec.name.startswith(name))
    return replace(plan, plain=plain, linears=tuple(linear for linear in plan.linears if linear.name.startswith(name)))


def outer_plan(plan: RankPlan) -> RankPlan:
    """The same plan with embedding, final norm and lm_head only."""
    plain = tuple(tensor for tensor in plan.plain if not tensor.spec.name.startswith("transformer.layers."))
    return replace(plan, plain=plain, linears=())


class LayerRunner:
    """One decoder layer of a model in float32: the tensor-parallel ranks' weights, and RoPE tables for its sequences.

    rope: cos and sin [positions, rope_dim / 2].
    """

    def __init__(
        self, weights: Sequence[TorchWeights], local: int, rope: tuple[torch.Tensor, torch.Tensor], chunk_size: int
    ) -> None:
        self._weights, self._local, self._rope, self._chunk_size = weights, local, rope, chunk_size
        self._segment = Segment("decoder", 0, local, 1)

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [sequences, length, H] through the layer, in chunks, so that a long sequence needs no square mask."""
        caches = self._caches(*hidden.shape[:2])
        outputs, start = [], 0
        for chunk in hidden.split(self._chunk_size, dim=1):
            ops = TorchOps(self._segment, self._weights, self._inputs(chunk, start), self._step(chunk, start), caches)
            define_segment(ops, self._weights[0].plan, self._segment)
            outputs.append(ops.outputs["hidden"][0])
            start += chunk.shape[1]
        return torch.cat(outputs, dim=1)

    def probe(
        self, hidden: torch.Tensor, mlp_input: torch.Tensor | None = None, observer: Observer | None = None
    ) -> ProbeOps:
        """Every block's output over hidden [sequences, length, H]; see `ProbeOps`."""
        caches, inputs, step = self._caches(*hidden.shape[:2]), self._inputs(hidden, 0), self._step(hidden, 0)
        ops = ProbeOps(self._segment, self._weights, inputs, step, caches, observer=observer, mlp_input=mlp_input)
        define_segment(ops, self._weights[0].plan, self._segment)
        return ops

    def _inputs(self, hidden: torch.Tensor, start: int) -> dict[str, Ranks]:
        num_sequences, length, _ = hidden.shape
        cos, sin = (table[start : start + length].expand(num_sequences, -1, -1) for table in self._rope)
        values = {"hidden": hidden, "rope_cos": cos, "rope_sin": sin}
        return {name: [value] * len(self._weights) for name, value in values.items()}

    @staticmethod
    def _step(hidden: torch.Tensor, start: int) -> Step:
        num_sequences, length, _ = hidden.shape
        return Step(range(num_sequences), [start] * num_sequences, length)

    def _caches(self, num_sequences: int, length: int) -> list[dict[str, torch.Tensor]]:
        like = self._rope[0]
        return [
            {
                f"transformer.layers.{self._local}.attention.{name}": like.new_zeros(
                    (num_sequences, heads, length, width)
                )
                for name, (heads, width) in weights.plan.cache_shapes().items()
            }
            for weights in self._weights
        ]
