"""An engine that runs its TensorRT networks through the interpreter, step by step, as a GPU executor will."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from helpers import some_tokens
from network_interpreter import run_networks

from trtbuild.checkpoints.rank_tensors import RankPlan
from trtbuild.engines.limits import EngineLimits
from trtbuild.engines.network.segments import Segment, cut_into_segments, has_int4
from trtbuild.engines.tensorrt.bindings import TORCH_TYPES, Binding, bind_weight
from trtbuild.engines.tensorrt.network import BuiltNetwork, build_network

# Positions of a prefill step behind the real tokens.
PADDING = 3


@dataclass
class InterpretedEngine:
    """plans: one for each rank of a tensor-parallel group. `embed` puts decoder weights into the networks;
    those beside int4 always are.

    `edit` may change an operation of the emitted network (mutation tests).
    """

    plans: Sequence[RankPlan]
    tensors: Sequence[dict[str, torch.Tensor]]
    limits: EngineLimits
    num_slots: int = 3
    moe_form: Any = None
    embed: bool = False
    wide: bool = True
    segment_layers: int | None = 2
    edit: Callable[[Binding, torch.Tensor], torch.Tensor] | None = None
    _networks: dict[Any, list[BuiltNetwork]] = field(default_factory=dict)
    _caches: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._caches = [{} for _ in self.plans]
        self._segments = cut_into_segments(self.plans[0], self.segment_layers)

    def prefill(self, slot: int, tokens: Sequence[int], start: int) -> torch.Tensor:
        """float32 logits [len(tokens), vocab]."""
        length = len(tokens) + PADDING
        step = {
            "tokens": _ints([*tokens, *[0] * PADDING])[None],
            "positions": torch.arange(start, start + length, dtype=torch.int32)[None],
            "write_index": _ints([start]),
            "key_value_lengths": _ints([start + length]),
            "active": _ints([1] * len(tokens) + [0] * PADDING)[None],
        }
        return self._step("prefill", step, slice(slot, slot + 1), len(tokens))

    def decode(self, slots: Sequence[int], tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """All slots step together; those not in `slots` are idle. Logits [len(slots), vocab]."""
        full = {"tokens": [0] * self.num_slots, "positions": [0] * self.num_slots, "active": [0] * self.num_slots}
        for slot, token, position in zip(slots, tokens, positions, strict=True):
            full["tokens"][slot], full["positions"][slot], full["active"][slot] = token, position, 1
        step = {name: _ints(values)[:, None] for name, values in full.items()}
        step["write_index"] = _ints(full["positions"])
        step["key_value_lengths"] = step["write_index"] + 1
        return self._step("decode", step, slice(0, self.num_slots), self.num_slots)[list(slots)]

    def _step(self, phase: str, step: dict[str, torch.Tensor], slots: slice, rows: int) -> torch.Tensor:
        values = [dict(step) for _ in self.plans]
        for segment in self._segments:
            if segment.kind == "head":
                for value in values:
                    value["flat_hidden"] = value["hidden"].flatten(0, 1)
                    value["rows"] = torch.arange(rows, dtype=torch.int32)
            self._run(segment, phase, values, slots)
        for other in values[1:]:
            assert torch.equal(other["logits"], values[0]["logits"]), "ranks differ in their logits"
        return values[0]["logits"][:, : self.plans[0].config.vocab_size]

    def _run(self, segment: Segment, phase: str, values: list[dict[str, torch.Tensor]], slots: slice) -> None:
        built = self.network(segment, phase)
        feeds = [self._feed(rank, segment, net, values[rank], slots) for rank, net in enumerate(built)]
        constants = [net.graph.embedded for net in built]
        results = run_networks([net.network for net in built], feeds, constants, wide=self.wide)
        for rank, (net, outputs) in enumerate(zip(built, results, strict=True)):
            for binding in net.bindings:
                if binding.role == "output":
                    values[rank][binding.name.removesuffix("_out")] = outputs[binding.name]
                elif binding.alias is not None:
                    self._caches[rank][segment.checkpoint_name(binding.alias)][slots] = outputs[binding.name]

    def _feed(
        self, rank: int, segment: Segment, net: BuiltNetwork, values: dict[str, torch.Tensor], slots: slice
    ) -> dict[str, torch.Tensor]:
        feed = {}
        for binding in net.bindings:
            if binding.role == "step":
                feed[binding.name] = values[binding.name]
            elif binding.role == "weight":
                tensor = bind_weight(binding, self.plans[rank], segment, self.tensors[rank].__getitem__)
                feed[binding.name] = self.edit(binding, tensor) if self.edit else tensor
            elif binding.role == "cache" and binding.alias is None:
                feed[binding.name] = self._cache(rank, segment, binding)[slots]
        return feed

    def _cache(self, rank: int, segment: Segment, binding: Binding) -> torch.Tensor:
        name = segment.checkpoint_name(binding.name)
        if name not in self._caches[rank]:
            dtype = torch.float32 if self.wide else getattr(torch, TORCH_TYPES[binding.dtype])
            shape = (self.num_slots, *(int(dim) for dim in binding.shape[1:]))
            # What was never written must not be seen: a NaN would show.
            self._caches[rank][name] = torch.full(shape, 7.0, dtype=dtype)
        return self._caches[rank][name]

    def network(self, segment: Segment, phase: str) -> list[BuiltNetwork]:
        """One network for all ranks where weights are inputs, one for each where they are embedded."""
        embedded = segment.kind == "decoder" and (self.embed or has_int4(self.plans[0], segment))
        key = (segment.index, "any" if embedded or segment.kind != "decoder" else phase)
        if key not in self._networks:
            form = self.moe_form
            readers = [tensors.__getitem__ for tensors in self.tensors] if embedded else [None]
            built = [
                build_network(plan, segment, key[1], self.limits, form, read)  # type: ignore[arg-type]
                for plan, read in zip(self.plans, readers, strict=False)
            ]
            self._networks[key] = built if embedded else built * len(self.plans)
        return self._networks[key]


def _ints(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def steps(engine: Any, reference: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits of both after each step: two prompts (one in two chunks), then two decode steps beside an idle slot."""
    long, short = some_tokens(75, seed=3), some_tokens(5, seed=4)
    found = []
    for slot, tokens, start in ((0, long[:70], 0), (2, short, 0), (0, long[70:], 70)):
        expected = reference.prefill(slot, tokens, start, "all")
        found.append((engine.prefill(slot, tokens, start), expected))
    for step in range(2):
        arguments = ([0, 2], [7 + step, 11 + step], [75 + step, 5 + step])
        found.append((engine.decode(*arguments), reference.decode(*arguments)))
    return found


def deviation(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    return max(float((found - expected).abs().max()) for found, expected in pairs)
