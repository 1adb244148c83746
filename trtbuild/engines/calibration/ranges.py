"""Static activation ranges for fp8: the model runs in 16 bit, layer by layer, over the calibration text.

One decoder layer's weights and the hidden states of the calibration tokens are all that is in memory. Every expert of
an MoE layer sees every token, so that none is left uncalibrated however the router prefers others; how many tokens
each expert was really routed is recorded beside its range.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from trtbuild.checkpoints.convert import ActivationRange, range_from_dict
from trtbuild.checkpoints.journal import Journal
from trtbuild.checkpoints.rank_tensors import Linear
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.engines.calibration.devices import compute_device, note_device
from trtbuild.engines.calibration.layers import (
    first_hidden,
    layer_ops,
    layer_weights,
    load_hidden,
    run_layer,
    save_hidden,
)
from trtbuild.engines.calibration.text import NUM_SEQUENCES, SEQUENCE_LENGTH, CalibrationText
from trtbuild.engines.reference.torch_ops import TorchOps
from trtbuild.errors import CheckpointError
from trtbuild.progress import ProgressFactory, no_progress
from trtbuild.workspace import digest_of, read_json, staged, write_json

_BATCH = 4


def calibrate(
    source: CheckpointSource,
    text: CalibrationText,
    *,
    directory: Path | None = None,
    device: torch.device | None = None,
    progress: ProgressFactory = no_progress,
) -> dict[str, ActivationRange]:
    """Largest absolute input of every quantizable linear layer, by global name, over the text's sequences.

    With `directory`, every finished layer is kept there, so that a killed calibration goes on with the next one.
    By default a GPU computes where torch has one: minutes in place of hours for a large model.
    """
    config, device = source.config, device or compute_device()
    found: dict[str, ActivationRange] = {}
    with progress("calibrating", config.num_layers, "layers") as bar:
        saved = _SavedLayers(directory) if directory else None
        if directory:
            note_device(directory, device)
        first, hidden = saved.load() if saved else (0, None)
        if hidden is None:
            hidden = first_hidden(source, text)
        hidden = hidden.to(device)
        found |= saved.ranges(first) if saved else {}
        bar.advance(first)
        for layer in range(first, config.num_layers):
            hidden, ranges = _run_layer(source, layer, hidden)
            found |= ranges
            if saved:
                saved.add(layer, hidden, ranges)
            bar.advance()
    return found


class _SavedLayers:
    """What an interrupted calibration had found: ranges in a journal, and the hidden states after its last layer."""

    def __init__(self, directory: Path) -> None:
        self._journal = Journal(directory / "ranges.jsonl")
        self._file = directory / "hidden.safetensors"

    def load(self) -> tuple[int, torch.Tensor | None]:
        """See `load_hidden`."""
        return load_hidden(self._file, lambda layer: str(layer) in self._journal.entries)

    def ranges(self, before: int) -> dict[str, ActivationRange]:
        """Of the layers below `before`."""
        entries = (self._journal.entries[str(layer)] for layer in range(before))
        return {name: range_from_dict(found) for entry in entries for name, found in entry.items()}

    def add(self, layer: int, hidden: torch.Tensor, ranges: dict[str, ActivationRange]) -> None:
        self._journal.add(str(layer), {name: asdict(found) for name, found in ranges.items()})
        save_hidden(self._file, layer + 1, hidden)


def calibrate_once(
    source: CheckpointSource,
    text: CalibrationText,
    folder: Path,
    *,
    device: torch.device | None = None,
    progress: ProgressFactory = no_progress,
) -> dict[str, ActivationRange]:
    """`calibrate`, or what it found before for the same weights, tokenizer and text, whatever layout and device.

    Results are kept in `folder`, one small directory for each.
    """
    identity = _identity(source, text)
    final = kept_ranges(source, text, folder)
    with staged(final, identity) as directory:
        if directory is not None:
            ranges = calibrate(source, text, directory=directory, device=device, progress=progress)
            write_json(directory / "ranges.json", {name: asdict(found) for name, found in ranges.items()})
            for name in ("hidden.safetensors", "ranges.jsonl"):
                (directory / name).unlink(missing_ok=True)
    return {name: range_from_dict(found) for name, found in read_json(final / "ranges.json").items()}


def _identity(source: CheckpointSource, text: CalibrationText) -> dict[str, Any]:
    return {
        "source": source.fingerprint(), "tokenizer": source.companions_digest, "text": text.digest,
        "sequences": [NUM_SEQUENCES, SEQUENCE_LENGTH],
    }  # fmt: skip


def kept_ranges(source: CheckpointSource, text: CalibrationText, folder: Path) -> Path:
    """The directory in which `calibrate_once` keeps what it finds."""
    return folder / digest_of(_identity(source, text))[:32]


@torch.inference_mode()
def _run_layer(
    source: CheckpointSource, layer: int, hidden: torch.Tensor
) -> tuple[torch.Tensor, dict[str, ActivationRange]]:
    """One layer over hidden [sequences, length, H]: its output, and what its linear layers saw."""
    weights = layer_weights(source, layer, hidden.dtype, hidden.device)
    amax: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}

    def observe(linear: Linear, expert: int | None, x: torch.Tensor) -> None:
        lowest, highest = x.aminmax()
        largest = torch.maximum(-lowest, highest).float()
        # torch.maximum keeps a NaN, Python's max would lose it.
        amax[linear.global_name] = torch.maximum(amax.get(linear.global_name, largest), largest)

    def observe_routing(name: str, tokens: torch.Tensor) -> None:
        counts[name] = counts.get(name, torch.zeros_like(tokens)) + tokens

    batches = hidden.split(_BATCH)
    outputs = [
        run_layer(layer_ops(TorchOps, weights, batch, observer=observe, routing_observer=observe_routing))
        for batch in batches
    ]
    routed = tuple(int(n) for n in next(iter(counts.values()))) if counts else ()
    largest = {name: float(value) for name, value in amax.items()}
    broken = [name for name, value in largest.items() if not value < float("inf")]
    if broken:
        raise CheckpointError(
            f"calibration: the input of {broken[0]} is not finite; the checkpoint or its dtype is damaged"
        )
    ranges = {name: ActivationRange(value, routed if ".mlp." in name else ()) for name, value in largest.items()}
    return torch.cat(outputs), ranges
