"""The source layer by layer, and at every layer the error of each block of the engine on the source's own inputs.

Each block of the engine gets what the source's block got (teacher forcing), so its error is its own: a broken part
shows where it is, however little of it reaches the logits. Experts are run on every token of the probe. The yardstick
is the source itself rounded to nearest to the engine's formats: what the bits cost, in this block of this model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trtbuild.accuracy.gate import block_limit, looseness
from trtbuild.accuracy.layer_probe import Block, BlockKey
from trtbuild.accuracy.models import EngineModel, SourceModel
from trtbuild.checkpoints.rank_tensors import Linear
from trtbuild.engines.reference.torch_ops import Ranks
from trtbuild.progress import ProgressFactory, no_progress

# What the blocks are compared on; from as many tokens a projection's error is known to a few percent.
PROBE_SEQUENCES = 3
PROBE_LENGTH = 128
# Sequences of one length go through a layer together, up to this many tokens.
_BATCH_TOKENS = 1024


@dataclass(frozen=True)
class BlockError:
    """Relative error of one block of the engine, by the measure of `relative_error`, and what is allowed.

    `layer` and `expert` are None where the block has none. `rounding` is the error of the source's own block, rounded
    to nearest to the same formats. `choice` is of a router: the part of the tokens whose experts are the source's.
    """

    layer: int | None
    block: Block
    expert: int | None
    precision: str
    error: float
    rounding: float = 0.0
    choice: float | None = None

    @property
    def limit(self) -> float:
        return block_limit(self.rounding)


def group_errors(errors: Sequence[BlockError]) -> list[dict[str, Any]]:
    """For the record: one entry for each block of a layer, `errors` of all its experts in their order."""
    groups: dict[tuple[int | None, Block], dict[str, Any]] = {}
    for found in errors:
        group = groups.setdefault(
            (found.layer, found.block),
            {
                "layer": found.layer, "block": found.block, "precision": found.precision, "errors": [], "limits": [],
            },
        )  # fmt: skip
        group["errors"].append(found.error)
        group["limits"].append(found.limit)
        if found.choice is not None:
            group["choice"] = found.choice
    return list(groups.values())


@torch.inference_mode()
def walk_layers(
    source: SourceModel,
    engine: EngineModel,
    sequences: Sequence[Sequence[int]],
    *,
    progress: ProgressFactory = no_progress,
) -> tuple[list[torch.Tensor], list[BlockError]]:
    """Run the source over all sequences; compare the blocks on the beginnings of a few of them.

    Returns the source's final hidden states [length, H] of each sequence, and every block's error. One layer of one
    of the two models is in memory at a time.
    """
    batches = [source.embed([sequences[i] for i in batch]) for batch in _batches(sequences)]
    tokens = _probe_tokens(sequences)
    probe, hidden = _Probe(engine, tokens), source.embed(tokens)
    errors = [probe.embed(hidden)]
    with progress("comparing layers", source.config.num_layers, "layers") as bar:
        for layer in range(source.config.num_layers):
            runner = source.layer(layer)
            largest = _LargestInputs()
            ops = runner.probe(hidden, observer=largest if probe.needs_inputs else None)
            batches = [runner.run(batch) for batch in batches]
            exact, mlp_input, following = ops.blocks, ops.seen_mlp_input, ops.outputs["hidden"][0]
            # These hold the source's weights.
            del runner, ops
            rounded = probe.rounded(source, layer, hidden, mlp_input, largest.amax)
            errors += probe.layer(layer, hidden, exact, mlp_input, rounded)
            hidden = following
            bar.advance()
    errors.append(probe.head(source, hidden.flatten(0, 1)))
    return [row for batch in batches for row in batch], errors


class _Probe:
    """The engine's side of the comparison."""

    def __init__(self, engine: EngineModel, tokens: Sequence[Sequence[int]]) -> None:
        self._engine, self._tokens = engine, tokens
        self._plain = engine.dtype
        self._rounding = engine.plain_rounding()

    @property
    def needs_inputs(self) -> bool:
        """Whether a format has scales that follow from activations."""
        return any(form.format == "fp8" for _, form in self._rounding.modules)

    def rounded(
        self,
        source: SourceModel,
        layer: int,
        hidden: torch.Tensor,
        mlp_input: torch.Tensor | None,
        amax: dict[str, float],
    ) -> dict[BlockKey, Ranks]:
        """The blocks of the source, rounded to nearest; nothing where nothing is quantized."""
        if not any(linear.is_quantized for linear in self._engine.linears(layer)):
            return {}
        return source.layer(layer, self._rounding, amax).probe(hidden, mlp_input).blocks

    def embed(self, exact: torch.Tensor) -> BlockError:
        error = _worst(self._engine.embed(self._tokens), exact)
        return BlockError(None, "embed", None, self._plain, error)

    def head(self, source: SourceModel, hidden: torch.Tensor) -> BlockError:
        """Logits of the source's final hidden states [tokens, H]."""
        error = _worst(self._engine.logits(hidden), source.logits(hidden))
        return BlockError(None, "head", None, self._plain, error)

    def layer(
        self,
        layer: int,
        hidden: torch.Tensor,
        exact: dict[BlockKey, Ranks],
        mlp_input: torch.Tensor | None,
        rounded: dict[BlockKey, Ranks],
    ) -> list[BlockError]:
        """`exact` and `mlp_input` are the source's, `rounded` those of the rounded source."""
        found = self._engine.layer(layer).probe(hidden, mlp_input)
        linears = self._engine.linears(layer)
        errors = []
        for (block, expert), outputs in exact.items():
            ours, theirs = found.blocks[block, expert], outputs[0]
            precision, choice = _precision_of(block, linears, self._plain), None
            if block == "router":
                choice = min(_same_choice(rank, theirs, self._engine.config.moe) for rank in ours)
                # Softmax does not see what all experts' logits have in common.
                ours, theirs = [_centred(rank) for rank in ours], _centred(theirs)
            rounding = 0.0
            if block != "router" and rounded:
                rounding = _worst(rounded[block, expert], theirs)
            errors.append(BlockError(layer, block, expert, precision, _worst(ours, theirs), rounding, choice))
        return errors


class _LargestInputs:
    """An observer: the largest absolute input of each linear layer, by global name."""

    def __init__(self) -> None:
        self.amax: dict[str, float] = {}

    def __call__(self, linear: Linear, _: int | None, x: torch.Tensor) -> None:
        self.amax[linear.global_name] = max(self.amax.get(linear.global_name, 0.0), float(x.abs().max()))


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """|found - exact| / |exact|, the larger of two: over all tokens, and the median token's.

    Either alone can be blind: a few tokens with huge activations (attention sinks) make up most of the first, and the
    second does not see what breaks for some tokens only.
    """
    difference = (found - exact).flatten(0, -2).norm(dim=-1)
    size = exact.flatten(0, -2).norm(dim=-1)
    total = float(difference.norm() / size.norm()) if bool(size.any()) else float("inf" if difference.any() else 0.0)
    tokens = difference[size > 0] / size[size > 0]
    return _larger(total, float(tokens.median()) if len(tokens) else 0.0)


def _larger(a: float, b: float) -> float:
    """max that keeps NaN."""
    return a if not b >= a else b


def _worst(ranks: Sequence[torch.Tensor], exact: torch.Tensor) -> float:
    """Every rank goes on with its own copy of a block's output."""
    worst = 0.0
    for rank in {id(rank): rank for rank in ranks}.values():
        error = relative_error(rank, exact)
        worst = error if not error <= worst else worst
    return worst


def _centred(logits: torch.Tensor) -> torch.Tensor:
    return logits - logits.mean(dim=-1, keepdim=True)


def _same_choice(found: torch.Tensor, exact: torch.Tensor, moe: Any) -> float:
    """Part of the tokens [tokens, experts] with the same best experts."""
    chosen = (logits.topk(moe.top_k, dim=-1).indices.sort(dim=-1).values for logits in (found, exact))
    return float(torch.eq(*chosen).all(dim=-1).float().mean())


def _precision_of(block: Block, linears: Sequence[Linear], plain: str) -> str:
    """The loosest precision of the linear layers in a block."""
    if block == "router":
        return plain
    names = {"attention": ".attention.", "shared_expert": ".shared_expert."}
    held = {
        linear.precision
        for linear in linears
        if names.get(block, ".mlp.") in linear.global_name
        and not (block == "expert" and ".shared_expert." in linear.global_name)
    }
    return max(held, key=looseness, default=plain)


def _probe_tokens(sequences: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """The beginnings of a few sequences from all over the text, cut to one length."""
    count = min(PROBE_SEQUENCES, len(sequences))
    chosen = [sequences[i * len(sequences) // count] for i in range(count)]
    length = min(PROBE_LENGTH, *(len(sequence) for sequence in chosen), len(chosen[0]))
    return [sequence[:length] for sequence in chosen]


def _batches(sequences: Sequence[Sequence[int]]) -> list[list[int]]:
    """Neighbours of one length, in order."""
    batches: list[list[int]] = []
    for index, sequence in enumerate(sequences):
        last = batches[-1] if batches else []
        length = len(sequence)
        if last and len(sequences[last[0]]) == length and (len(last) + 1) * length <= _BATCH_TOKENS:
            last.append(index)
        else:
            batches.append([index])
    return batches
