"""`NetworkOps` in PyTorch: the ranks of a tensor-parallel group in lockstep, in one process.

A value is a list with one tensor per rank. Where all ranks hold the very same tensor object, an operation on it is
computed once and shared, so the replicated part of the network costs as much as on one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from trtbuild.checkpoints.model_config import MoeConfig
from trtbuild.checkpoints.rank_tensors import Linear
from trtbuild.engines.network.ops import HeadPart
from trtbuild.engines.network.segments import Segment
from trtbuild.engines.reference.products import attention
from trtbuild.engines.reference.torch_weights import TorchLinear, TorchWeights

Ranks = list[torch.Tensor]

# Called with a linear layer, the rank's expert index (None outside MoE), and its input [tokens, in].
Observer = Callable[[Linear, int | None, torch.Tensor], None]
# Called with the router's layer name and how many tokens chose each expert, [num_experts].
RoutingObserver = Callable[[str, torch.Tensor], None]


@dataclass
class Step:
    """What the host knows of a step: which slots take part, where each writes, and how many tokens each has."""

    slots: Sequence[int]
    write_index: Sequence[int]
    num_tokens: int


@dataclass
class TorchOps:
    """One segment of one step; `caches[rank][name]` is [slots, heads, capacity, D] and is written in place."""

    segment: Segment
    weights: Sequence[TorchWeights]
    inputs: dict[str, Ranks]
    step: Step | None = None
    caches: Sequence[dict[str, torch.Tensor]] = ()
    rope_tables: tuple[torch.Tensor, torch.Tensor] | None = None
    observer: Observer | None = None
    routing_observer: RoutingObserver | None = None
    outputs: dict[str, Ranks] = field(default_factory=dict)

    def input(self, name: str) -> Ranks:
        return self.inputs[name]

    def output(self, name: str, value: Ranks) -> None:
        self.outputs[name] = value

    def embedding(self, name: str, indices: Ranks) -> Ranks:
        if name.startswith("rope_"):
            assert self.rope_tables is not None
            tables = [self.rope_tables[name == "rope_sin_table"]] * len(self.weights)
        else:
            tables = self._plain(name)
        return _each(lambda table, index: table[index.long()], tables, indices)

    def rms_norm(self, x: Ranks, name: str, epsilon: float | None = None) -> Ranks:
        epsilon = self.weights[0].plan.config.norm_epsilon if epsilon is None else epsilon

        def norm(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return functional.rms_norm(value.float(), (value.shape[-1],), weight, epsilon).to(value.dtype)

        return _each(norm, x, self._plain(f"{name}.weight"))

    def linear(self, x: Ranks, name: str) -> Ranks:
        layers = self._linears(name)
        for value, layer in zip(x, layers, strict=True):
            self._observe(layer, None, value)
        return [layer.apply(value) for value, layer in zip(x, layers, strict=True)]

    def add_bias(self, x: Ranks, name: str) -> Ranks:
        return _each(torch.add, x, self._plain(f"{name}.bias"))

    def head_linear(self, x: Ranks, name: str, part: HeadPart) -> Ranks:
        mla = self.weights[0].plan.config.mla
        assert mla is not None

        def apply(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            keys, values = weight.split([value.shape[1] * mla.nope_head_dim, value.shape[1] * mla.v_head_dim])
            matrices = keys if part == "key" else values
            matrices = matrices.unflatten(0, (value.shape[1], -1))
            return (value @ (matrices if part == "key" else matrices.transpose(1, 2))).transpose(1, 2).flatten(2)

        return _each(apply, x, self._plain(f"{name}.weight"))

    def split(self, x: Ranks, sizes: Sequence[int]) -> list[Ranks]:
        return _each_parts(lambda value: value.split(list(sizes), dim=-1), x, len(sizes))

    def concatenate(self, parts: Sequence[Ranks]) -> Ranks:
        return _each(lambda *values: torch.cat(values, dim=-1), *parts)

    def split_heads(self, x: Ranks, num_heads: Sequence[int]) -> list[Ranks]:
        head_dim = x[0].shape[-1] // sum(num_heads)
        split = [value.unflatten(-1, (-1, head_dim)).transpose(1, 2).split(list(num_heads), dim=1) for value in x]
        return [[parts[i] for parts in split] for i in range(len(num_heads))]

    def merge_heads(self, x: Ranks) -> Ranks:
        return _each(lambda value: value.transpose(1, 2).flatten(-2), x)

    def rope(self, x: Ranks, cos: Ranks, sin: Ranks, *, interleaved: bool = False) -> Ranks:
        return _each(_rotate_neighbours if interleaved else _rotate, x, cos, sin)

    def update_cache(self, name: str, values: Ranks) -> Ranks:
        caches = [cache[self.segment.checkpoint_name(name)] for cache in self.caches]
        step = self._step()
        for cache, value in zip(caches, values, strict=True):
            for row, (slot, start) in enumerate(zip(step.slots, step.write_index, strict=True)):
                cache[slot, :, start : start + step.num_tokens] = value[row]
        return caches

    def attention(self, query: Ranks, keys: Ranks, values: Ranks, window: int | None) -> Ranks:
        return [self._attend(q, k, v, window) for q, k, v in zip(query, keys, values, strict=True)]

    def latent_attention(self, query: Ranks, latents: Ranks, rank: int) -> Ranks:
        return [self._attend(q, c, c[..., :rank], None) for q, c in zip(query, latents, strict=True)]

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
        step, scale = self._step(), self.weights[0].plan.config.attention_scale
        rows = [
            _attend(q[row : row + 1], k[slot], v[slot], start, window, scale)
            for row, (slot, start) in enumerate(zip(step.slots, step.write_index, strict=True))
        ]
        return torch.cat(rows) if len(rows) > 1 else rows[0]

    def silu(self, x: Ranks) -> Ranks:
        return _each(functional.silu, x)

    def sigmoid(self, x: Ranks) -> Ranks:
        return _each(torch.sigmoid, x)

    def multiply(self, x: Ranks, y: Ranks) -> Ranks:
        return _each(torch.mul, x, y)

    def add(self, x: Ranks, y: Ranks) -> Ranks:
        return _each(torch.add, x, y)

    def router(self, x: Ranks, name: str) -> Ranks:
        return _each(lambda value, weight: value.flatten(0, 1).float() @ weight.T, x, self._plain(f"{name}.weight"))

    def select_experts(self, logits: Ranks, moe: MoeConfig) -> tuple[Ranks, Ranks]:
        scores, indices = _each_parts(lambda value: _select(value, moe), logits, 2)
        if "active" in self.inputs:
            idle = _each(lambda active: (active.flatten() == 0).unsqueeze(-1), self.inputs["active"])
            indices = _each(lambda index, mask: index.masked_fill(mask, -1), indices, idle)
        return scores, indices

    def experts(self, x: Ranks, name: str, scores: Ranks, indices: Ranks, moe: MoeConfig) -> Ranks:
        if self.routing_observer:
            chosen = indices[0].flatten()
            counts = torch.bincount(chosen[chosen >= 0].long(), minlength=moe.num_experts)
            self.routing_observer(self.segment.checkpoint_name(f"{name}.router"), counts)
        ffn = zip(self._linears(f"{name}.fc"), self._linears(f"{name}.proj"), strict=True)
        values = zip(x, scores, indices, ffn, strict=True)
        return [self._rank_experts(value, score, index, fc, proj) for value, score, index, (fc, proj) in values]

    def gather_rows(self, x: Ranks, rows: Ranks) -> Ranks:
        return _each(lambda value, index: value[index.long()], x, rows)

    def all_reduce(self, x: Ranks) -> Ranks:
        if len(x) == 1:
            return x
        total = torch.stack(x).float().sum(0).to(x[0].dtype)
        return [total] * len(x)

    def all_gather(self, x: Ranks) -> Ranks:
        return x if len(x) == 1 else [torch.cat(x, dim=-1)] * len(x)

    def to_float32(self, x: Ranks) -> Ranks:
        return _each(torch.Tensor.float, x)

    def _rank_experts(
        self, x: torch.Tensor, scores: torch.Tensor, indices: torch.Tensor, fc: TorchLinear, proj: TorchLinear
    ) -> torch.Tensor:
        """One rank's share: each of its experts computes the rows that chose it, and only those."""
        assert fc.linear is not None and fc.linear.num_experts is not None
        flat = x.flatten(0, 1)
        observed = range(fc.linear.num_experts) if self.observer else []
        for expert in observed:
            self._observe(fc, expert, flat)
            self._observe(proj, expert, _gated(fc.apply(flat, expert)))
        # Token-choice pairs in the order of experts: what each expert computes is one slice of them.
        local = indices.flatten().long() - fc.linear.first_expert
        mine = torch.where((local >= 0) & (local < fc.linear.num_experts))[0]
        pairs = mine[local[mine].argsort(stable=True)]
        counts = torch.bincount(local[pairs], minlength=fc.linear.num_experts).tolist()
        rows = pairs // indices.shape[1]
        parts = flat[rows].split(counts)
        outputs = [proj.apply(_gated(fc.apply(part, e)), e) for e, part in enumerate(parts) if len(part)]
        total = torch.zeros(flat.shape, dtype=torch.float32, device=flat.device)
        if outputs:
            total.index_add_(0, rows, torch.cat(outputs).float() * scores.flatten()[pairs].unsqueeze(-1))
        return total.to(x.dtype).view_as(x)

    def _observe(self, layer: TorchLinear, expert: int | None, x: torch.Tensor) -> None:
        if self.observer and layer.linear:
            self.observer(layer.linear, expert, x)

    def _step(self) -> Step:
        assert self.step is not None, "a decoder segment needs the step's slots"
        return self.step

    def _plain(self, name: str) -> Ranks:
        full = self.segment.checkpoint_name(name)
        return [weights.plain[full] for weights in self.weights]

    def _linears(self, name: str) -> list[TorchLinear]:
        full = self.segment.checkpoint_name(name)
        return [weights.linears[full] for weights in self.weights]


def _each(function: Callable[..., torch.Tensor], *arguments: Ranks) -> Ranks:
    """Apply per rank; once for all where every argument is the same object on each rank."""
    if all(value is argument[0] for argument in arguments for value in argument):
        return [function(*(argument[0] for argument in arguments))] * len(arguments[0])
    return [function(*values) for values in zip(*arguments, strict=True)]


def _each_parts(function: Callable[[torch.Tensor], Sequence[torch.Tensor]], x: Ranks, count: int) -> list[Ranks]:
    """The same for a function with `count` results."""
    if all(value is x[0] for value in x):
        parts = function(x[0])
        return [[part] * len(x) for part in parts]
    results = [function(value) for value in x]
    return [[parts[i] for parts in results] for i in range(count)]


def _rotate(value: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = value.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(value.dtype)


def _rotate_neighbours(value: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return _rotate(torch.cat((value[..., 0::2], value[..., 1::2]), dim=-1), cos, sin)


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, window: int | None, scale: float
) -> torch.Tensor:
    """One slot: query [1, n, S, D] at positions start..; keys [heads, capacity, D], values [heads, capacity, any]."""
    num_tokens = query.shape[2]
    end = start + num_tokens
    oldest = max(0, start - window + 1) if window else 0
    k, v = keys[None, :, oldest:end], values[None, :, oldest:end]
    mask = None
    if num_tokens > 1:
        behind = torch.arange(start, end, device=query.device)[:, None] - torch.arange(oldest, end, device=query.device)
        mask = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    return attention(query, k, v, mask, scale)


def _gated(up_and_gate: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of an expert's fused product; TensorRT-LLM puts up first."""
    up, gate = up_and_gate.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _select(logits: torch.Tensor, moe: MoeConfig) -> tuple[torch.Tensor, torch.Tensor]:
    if moe.norm_topk_prob:
        chosen, indices = logits.topk(moe.top_k, dim=-1)
        return chosen.softmax(dim=-1) * moe.routed_scaling_factor, indices.int()
    scores = logits.softmax(dim=-1)
    if moe.num_groups > 1:
        groups = scores.unflatten(-1, (moe.num_groups, -1))
        best = groups.amax(dim=-1).topk(moe.top_groups, dim=-1).indices
        taken = torch.zeros(groups.shape[:-1], dtype=torch.bool, device=scores.device).scatter(-1, best, True)
        scores = groups.masked_fill(~taken.unsqueeze(-1), 0.0).flatten(-2)
    scores, indices = scores.topk(moe.top_k, dim=-1)
    return scores * moe.routed_scaling_factor, indices.int()
