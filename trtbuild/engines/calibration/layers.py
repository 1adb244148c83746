"""One decoder layer at a time: its weights, and the hidden states of the calibration tokens through it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import SAFETENSORS_16BIT, Precision
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.safetensors_file import torch_dtype
from trtbuild.checkpoints.shards import fill_from
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.engines.calibration.text import CalibrationText, calibration_tokens
from trtbuild.engines.network.decoder import define_segment
from trtbuild.engines.network.rope import rope_tables
from trtbuild.engines.network.segments import Segment
from trtbuild.engines.reference.torch_ops import Step, TorchOps
from trtbuild.engines.reference.torch_weights import TorchWeights
from trtbuild.workspace import write_atomic

Ops = TypeVar("Ops", bound=TorchOps)
_LAYER = Segment("decoder", 0, 0, 1)


def first_hidden(source: CheckpointSource, text: CalibrationText) -> torch.Tensor:
    """Embeddings of the calibration tokens, [sequences, length, H], in the model's 16-bit type."""
    tokens = torch.tensor(calibration_tokens(source, text))
    return source.tensor("embedding")[tokens].to(torch_dtype(SAFETENSORS_16BIT[source.config.dtype]))


def layer_weights(
    source: CheckpointSource, layer: int, dtype: torch.dtype, device: torch.device, precision: Precision | None = None
) -> TorchWeights:
    """One layer alone, in 16 bit or in `precision`, as the reference executor multiplies by it.

    A pipeline with a stage per layer cuts it out, without embedding and head.
    """
    config = source.config
    stage = Layout(pp=config.num_layers).rank(layer)
    plan = plan_rank(config, stage, precision or Precision(config.dtype, config.dtype)).only_layers()
    [tensors] = fill_from([plan], source)
    return TorchWeights(plan, tensors.__getitem__, dtype, device)


def layer_ops(kind: type[Ops], weights: TorchWeights, hidden: torch.Tensor, **options: Any) -> Ops:
    """Operations of one layer over whole sequences, hidden [sequences, length, H]; `run_layer` runs them."""
    num_sequences, length, _ = hidden.shape
    caches = {
        f"transformer.layers.0.attention.{name}": hidden.new_zeros((num_sequences, heads, length, width))
        for name, (heads, width) in weights.plan.cache_shapes().items()
    }
    tables = rope_tables(weights.plan.config, length)
    cos, sin = (table.to(hidden.device).expand(num_sequences, -1, -1) for table in tables)
    step = Step(range(num_sequences), [0] * num_sequences, length)
    inputs = {"hidden": [hidden], "rope_cos": [cos], "rope_sin": [sin]}
    return kind(_LAYER, [weights], inputs, step, [caches], **options)


def run_layer(ops: TorchOps) -> torch.Tensor:
    """The layer's output, [sequences, length, H]."""
    define_segment(ops, ops.weights[0].plan, _LAYER)
    return ops.outputs["hidden"][0]


def save_hidden(file: Path, layer: int, hidden: torch.Tensor) -> None:
    """Keep the hidden states before `layer`; call it after what was found below is kept, or a layer is left out."""
    write_atomic(file, save({"hidden": hidden.cpu()}, metadata={"layer": str(layer)}))


def load_hidden(file: Path, is_kept: Callable[[int], bool]) -> tuple[int, torch.Tensor | None]:
    """The layer to go on with, and hidden states [sequences, length, H] before it; 0 and None where there are none.

    `is_kept` says whether what was found in a layer is there; they count only if all before them is.
    """
    if not file.is_file():
        return 0, None
    try:
        with safe_open(file, framework="pt") as stored:
            layer, hidden = int(stored.metadata()["layer"]), stored.get_tensor("hidden")
    except (SafetensorError, KeyError, ValueError):
        return 0, None
    return (layer, hidden) if all(map(is_kept, range(layer))) else (0, None)
