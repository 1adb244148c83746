"""How much each linear layer's quantization costs, in nats a token, measured on the whole model at once.

A layer's output y changes by dy when its weights (and with fp8 its inputs) are rounded. To second order the expected
loss grows by 1/2 E[(g . dy)^2], with the gradient g of the log-likelihood of tokens drawn from the model itself (the
Fisher information, as in arXiv 1905.12558). One backward pass gives g for every layer. The costs are taken to add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from trtbuild.checkpoints.content import SourceReader
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import FormatName, Precision
from trtbuild.checkpoints.prepared_source import PreparedSource
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.shards import fill_from
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.engines.calibration.devices import compute_device, note_device
from trtbuild.engines.calibration.layers import layer_ops, layer_weights, run_layer
from trtbuild.engines.calibration.text import CalibrationText, calibration_tokens
from trtbuild.engines.reference.torch_ops import TorchOps
from trtbuild.engines.reference.torch_weights import TorchLinear, TorchWeights
from trtbuild.progress import ProgressFactory, no_progress
from trtbuild.workspace import digest_of, read_json, staged, write_json

NUM_SEQUENCES = 8
SEQUENCE_LENGTH = 256
# Sequences that are differentiated at once, and rows of logits.
_BATCH = 4
_LOGIT_ROWS = 128
# Raised when the same input gives another result.
_ALGORITHM_VERSION = 2
_RESULT = "sensitivity.json"

# Cost in nats a token: by global name of the linear layer, by format.
Sensitivity = dict[str, dict[FormatName, float]]


@dataclass
class _Recorded:
    """One multiplication of the forward pass."""

    linear: str
    expert: int | None
    x: torch.Tensor
    y: torch.Tensor


@dataclass
class _RecordingLinear(TorchLinear):
    records: list[_Recorded] = field(default_factory=list)

    def apply(self, x: torch.Tensor, expert: int | None = None) -> torch.Tensor:
        y = super().apply(x, expert)
        assert self.linear is not None
        if y.requires_grad:
            y.retain_grad()
            self.records.append(_Recorded(self.linear.name, expert, x.detach(), y))
        return y


def measure(
    source: CheckpointSource,
    readers: Mapping[FormatName, SourceReader],
    text: CalibrationText,
    *,
    device: torch.device | None = None,
    progress: ProgressFactory = no_progress,
) -> Sensitivity:
    """The cost of each format in `readers` (where its weights are read from), for every linear layer."""
    device, num_layers = device or compute_device(), source.config.num_layers
    tokens = torch.tensor([ids[:SEQUENCE_LENGTH] for ids in calibration_tokens(source, text)[:NUM_SEQUENCES]])
    with progress("measuring what each layer's precision costs", 2 * num_layers, "layers") as bar, torch.enable_grad():
        hidden = [source.tensor("embedding")[tokens].float().to(device)]
        for layer in range(num_layers):
            with torch.no_grad():
                weights = layer_weights(source, layer, torch.float32, device)
                hidden.append(torch.cat([run_layer(layer_ops(TorchOps, weights, x)) for x in hidden[-1].split(_BATCH)]))
            bar.advance()
        gradient = _head_gradient(source, hidden.pop())
        found: Sensitivity = {}
        for layer in reversed(range(num_layers)):
            gradient = _through_layer(source, readers, layer, hidden.pop(), gradient, found)
            bar.advance()
    return dict(sorted(found.items()))


def measure_once(
    source: CheckpointSource,
    readers: Mapping[FormatName, SourceReader],
    text: CalibrationText,
    folder: Path,
    *,
    device: torch.device | None = None,
    progress: ProgressFactory = no_progress,
) -> Sensitivity:
    """`measure`, or what it found before for the same weights, tokenizer, text and formats; kept in `folder`.

    Values that another calibration found are other values: they are told apart by the names of their folders.
    """
    identity = {
        "algorithm": ["sensitivity", _ALGORITHM_VERSION], "source": source.fingerprint(),
        "formats": {name: r.folder.name if isinstance(r, PreparedSource) else None for name, r in readers.items()},
        "tokenizer": source.companions_digest, "text": text.digest, "sequences": [NUM_SEQUENCES, SEQUENCE_LENGTH],
    }  # fmt: skip
    final = folder / digest_of(identity)[:32]
    with staged(final, identity) as directory:
        if directory is not None:
            device = device or compute_device()
            note_device(directory, device)
            write_json(directory / _RESULT, measure(source, readers, text, device=device, progress=progress))
    found: Any = read_json(final / _RESULT)
    return found


def _head_gradient(source: CheckpointSource, hidden: torch.Tensor) -> torch.Tensor:
    """Gradient of -log p of drawn tokens, for hidden [sequences, length, H] before the last norm."""
    norm = source.tensor("final_norm").float().to(hidden.device)
    head = source.tensor("embedding" if source.config.tie_embeddings else "lm_head")
    # Random numbers of a CPU, whatever the device: the same tokens are drawn everywhere.
    generator = torch.Generator().manual_seed(0)
    gradients = []
    for part_of_rows in hidden.flatten(0, 1).split(_LOGIT_ROWS):
        rows = part_of_rows.detach().requires_grad_()
        normed = functional.rms_norm(rows, (rows.shape[-1],), norm, source.config.norm_epsilon)
        # In parts of the vocabulary: the whole head in float32 may be as large as a layer.
        logits = torch.cat([normed.detach() @ part.to(hidden.device).float().T for part in head.split(16384)], dim=-1)
        difference = logits.softmax(-1)
        uniform = torch.rand(len(rows), 1, generator=generator).to(hidden.device)
        drawn = torch.searchsorted(difference.cumsum(-1), uniform).clamp_(max=len(head) - 1)
        difference.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=difference.dtype))
        back = torch.zeros_like(normed)
        for start in range(0, len(head), 16384):
            part = head[start : start + 16384].to(hidden.device).float()
            back += difference[:, start : start + len(part)] @ part
        normed.backward(back)
        assert rows.grad is not None
        gradients.append(rows.grad)
    return torch.cat(gradients).view_as(hidden)


def _through_layer(
    source: CheckpointSource,
    readers: Mapping[FormatName, SourceReader],
    layer: int,
    hidden: torch.Tensor,
    gradient: torch.Tensor,
    found: Sensitivity,
) -> torch.Tensor:
    """Add the costs of one layer's linear layers to `found`; the gradient before the layer."""
    weights = layer_weights(source, layer, torch.float32, hidden.device)
    records: list[_Recorded] = []
    for name, linear in weights.linears.items():
        if linear.linear is not None:
            weights.linears[name] = _RecordingLinear(**vars(linear), records=records)
    formats: dict[FormatName, TorchWeights] = {
        name: _layer_in(source, reader, name, layer, hidden.device) for name, reader in readers.items()
    }
    names = {linear.name: linear.global_name for linear in weights.plan.linears}
    before = []
    for batch, after in zip(hidden.split(_BATCH), gradient.split(_BATCH), strict=True):
        x = batch.detach().requires_grad_()
        run_layer(layer_ops(TorchOps, weights, x)).backward(after)
        assert x.grad is not None
        before.append(x.grad)
        with torch.no_grad():
            for record in records:
                _add_costs(record, formats, found.setdefault(names[record.linear], {}), hidden.shape[:2].numel())
        records.clear()
    return torch.cat(before)


def _layer_in(
    source: CheckpointSource, reader: SourceReader, name: FormatName, layer: int, device: torch.device
) -> TorchWeights:
    """One layer's weights in another format, as the reference executor multiplies by them."""
    config = source.config
    stage = Layout(pp=config.num_layers).rank(layer)
    precision = reader.method if isinstance(reader, PreparedSource) else name
    plan = plan_rank(config, stage, Precision(precision, config.dtype)).only_layers()
    [tensors] = fill_from([plan], reader)
    return TorchWeights(plan, tensors.__getitem__, torch.float32, device)


def _add_costs(
    record: _Recorded, formats: Mapping[FormatName, TorchWeights], costs: dict[FormatName, float], num_tokens: int
) -> None:
    gradient = record.y.grad
    for name, weights in formats.items():
        cost = 0.0
        if gradient is not None:
            change = weights.linears[record.linear].apply(record.x, record.expert) - record.y
            cost = float((gradient * change).sum(-1).square().sum()) / (2 * num_tokens)
        costs[name] = costs.get(name, 0.0) + cost


def total(sensitivity: Sensitivity, formats: Mapping[str, FormatName]) -> float:
    """Predicted growth of the loss, nats a token, where each linear layer has the given format (16 bit costs 0)."""
    return sum(sensitivity[name].get(form, 0.0) for name, form in formats.items())
