"""The two models that are compared, one decoder layer of either in memory: the source checkpoint and an engine's ranks.

Both are computed in float32 by our own network definition. Of the engine this is what its weights mean; its executor's
arithmetic is measured separately, through its logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trtbuild.accuracy.layer_probe import LayerRunner, layer_plan, outer_plan
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.model_config import ModelConfig
from trtbuild.checkpoints.precision import LinearForm, Precision
from trtbuild.checkpoints.rank_checkpoint import RankCheckpoint
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.rank_tensors import Linear
from trtbuild.checkpoints.shards import fill_all
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.engines.limits import EngineLimits
from trtbuild.engines.network.decoder import define_segment
from trtbuild.engines.network.rope import rope_tables
from trtbuild.engines.network.segments import Segment
from trtbuild.engines.reference.executor import ReferenceExecutor
from trtbuild.engines.reference.torch_ops import Ranks, TorchOps
from trtbuild.engines.reference.torch_weights import TorchWeights, share_replicated

# Long sequences run through a layer in chunks of this many tokens.
CHUNK_TOKENS = 512
# Rows of logits that are computed at a time: a vocabulary of 150,000 takes 150 MiB.
_HEAD_ROWS = 256
# Golden questions that the source answers at a time.
_SOURCE_SLOTS = 4


class SourceModel:
    """A checkpoint, run layer by layer in float32 over sequences of at most `num_positions` tokens."""

    def __init__(self, source: CheckpointSource, num_positions: int, device: torch.device) -> None:
        self.config = source.config
        self._source, self._device = source, device
        self._rope = _tables(source.config, num_positions, device)
        self._outer: TorchWeights | None = None

    def embed(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """float32 [sequences, length, H] of sequences of one length."""
        rows = self._source.tensor("embedding")[torch.tensor(tokens)]
        return rows.to(_model_type(self.config)).to(self._device, torch.float32)

    def layer(
        self, layer: int, precision: Precision | None = None, amax: dict[str, float] | None = None
    ) -> LayerRunner:
        """Read one layer's weights; they live as long as the runner.

        With a `precision` they are rounded to nearest to it; `amax` are the largest inputs that fp8 layers saw.
        """
        stages = Layout(pp=self.config.num_layers)
        plan = plan_rank(self.config, stages.rank(layer), precision or _unquantized(self.config)).only_layers()
        [tensors] = fill_all([plan], self._source.tensor, amax)
        weights = TorchWeights(plan, tensors.__getitem__, torch.float32, self._device)
        return LayerRunner([weights], 0, self._rope, CHUNK_TOKENS)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [tokens, vocab] of final hidden states [tokens, H]; keeps norm and lm_head for the next call."""
        if self._outer is None:
            last = Layout(pp=self.config.num_layers).rank(self.config.num_layers - 1)
            plan = outer_plan(plan_rank(self.config, last, _unquantized(self.config)))
            [tensors] = fill_all([plan], self._source.tensor)
            self._outer = TorchWeights(plan, tensors.__getitem__, torch.float32, self._device)
        return _head([self._outer], hidden)[0]


class EngineModel:
    """The weights of an engine's rank files, with its own config, layout and precisions."""

    def __init__(self, checkpoint: RankCheckpoint, num_positions: int, device: torch.device) -> None:
        self.config = checkpoint.config
        self.dtype = checkpoint.precision.dtype
        self._checkpoint, self._device = checkpoint, device
        self._rope = _tables(checkpoint.config, num_positions, device)

    def embed(self, tokens: Sequence[Sequence[int]]) -> Ranks:
        """float32 [sequences, length, H] on each rank of the first stage."""
        name, index = "transformer.vocab_embedding.weight", torch.tensor(tokens)
        ranks = self._checkpoint.layout.stage_ranks(0)
        return [self._checkpoint.tensor(rank, name)[index].to(self._device, torch.float32) for rank in ranks]

    def layer(self, layer: int) -> LayerRunner:
        """Read one layer of the tensor-parallel ranks that hold it."""
        stage, local = self._place(layer)
        return LayerRunner(self._weights(stage, local), local, self._rope, CHUNK_TOKENS)

    def logits(self, hidden: torch.Tensor) -> Ranks:
        """float32 [tokens, vocab] on each rank, of final hidden states [tokens, H]."""
        return _head(self._weights(self._checkpoint.layout.pp - 1, None), hidden)

    def linears(self, layer: int) -> list[Linear]:
        """The quantizable linear layers of one layer, as one rank holds them."""
        stage, local = self._place(layer)
        return list(layer_plan(self._checkpoint.plans[self._checkpoint.layout.stage_ranks(stage)[0]], local).linears)

    def plain_rounding(self) -> Precision:
        """The precision that a source rounded to nearest would have: the engine's formats and sizes of groups."""
        linears = {linear.global_name: linear.form for plan in self._checkpoint.plans for linear in plan.linears}
        forms = {name: LinearForm(form.format, form.group_size) for name, form in linears.items()}
        return self._checkpoint.precision.with_modules(forms)

    def _place(self, layer: int) -> tuple[int, int]:
        layout = self._checkpoint.layout
        for stage in range(layout.pp):
            layers = layout.stage_layers(self.config.num_layers, stage)
            if layer in layers:
                return stage, layers.index(layer)
        raise ValueError(f"layer {layer} is outside {self.config.num_layers}")

    def _weights(self, stage: int, local: int | None) -> list[TorchWeights]:
        weights = []
        for rank in self._checkpoint.layout.stage_ranks(stage):
            whole = self._checkpoint.plans[rank]
            plan = outer_plan(whole) if local is None else layer_plan(whole, local)
            weights.append(TorchWeights(plan, self._checkpoint.reader(rank), torch.float32, self._device))
        share_replicated(weights)
        return weights


def _head(weights: Sequence[TorchWeights], hidden: torch.Tensor) -> Ranks:
    """Final norm and lm_head over [tokens, H]; padding of the vocabulary is cut off."""
    plan, found = weights[0].plan, []
    for rows in hidden.split(_HEAD_ROWS):
        index = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
        segment = Segment("head", 0)
        ops = TorchOps(segment, weights, {"flat_hidden": [rows] * len(weights), "rows": [index] * len(weights)})
        define_segment(ops, plan, segment)
        found.append(ops.outputs["logits"])
    return [torch.cat(parts)[:, : plan.config.vocab_size] for parts in zip(*found, strict=True)]


def _tables(config: ModelConfig, num_positions: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = rope_tables(config, num_positions)
    return cos.to(device), sin.to(device)


def _unquantized(config: ModelConfig) -> Precision:
    return Precision(config.dtype, config.dtype)


def _model_type(config: ModelConfig) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[config.dtype]


def source_executor(source: CheckpointSource, limits: EngineLimits, device: torch.device) -> ReferenceExecutor:
    """The whole source in its own 16-bit type, with few slots; see `source_executor_bytes`."""
    plan = plan_rank(source.config, Layout().rank(0), _unquantized(source.config))
    [tensors] = fill_all([plan], source.tensor)
    slots = min(_SOURCE_SLOTS, limits.max_batch_size)
    return ReferenceExecutor([plan], lambda _, name: tensors[name], limits, num_slots=slots, device=device)


def source_executor_bytes(source: CheckpointSource, limits: EngineLimits) -> int:
    """Memory that `source_executor` takes: weights and KV caches."""
    plan = plan_rank(source.config, Layout().rank(0), _unquantized(source.config))
    weights = sum(tensor.num_bytes for tensor in plan.tensors())
    per_token = sum(2 * heads * width for heads, width in plan.cache_shapes().values()) * source.config.num_layers
    return weights + per_token * limits.max_seq_len * min(_SOURCE_SLOTS, limits.max_batch_size)
