"""int4-awq and int4-gptq: a checkpoint is quantized layer by layer, once for all layouts.

In memory are one decoder layer, the hidden states of the calibration tokens, and the second moments of one linear
layer's input. A finished layer is on disk; a killed calibration goes on with the next one, to the same bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from trtbuild.checkpoints.content import source_digest
from trtbuild.checkpoints.precision import FORMATS, SAFETENSORS_16BIT, LinearForm, Precision
from trtbuild.checkpoints.prepared_source import FACTS, PreparedSource, layer_file
from trtbuild.checkpoints.quantization import pack_int4
from trtbuild.checkpoints.safetensors_file import torch_dtype
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.engines.calibration.devices import compute_device, note_device
from trtbuild.engines.calibration.layer_quantizer import METHODS, LayerQuantizer, LayerResult, Method
from trtbuild.engines.calibration.layers import (
    first_hidden,
    layer_ops,
    layer_weights,
    load_hidden,
    run_layer,
    save_hidden,
)
from trtbuild.engines.calibration.memory import release_freed_memory
from trtbuild.engines.calibration.quantizing_ops import QuantizingOps
from trtbuild.engines.calibration.text import NUM_SEQUENCES, SEQUENCE_LENGTH, CalibrationText
from trtbuild.progress import ProgressFactory, no_progress
from trtbuild.workspace import digest_of, staged, write_atomic, write_json

# Raised when the algorithm changes what it gives for the same input.
_ALGORITHM_VERSION = 6
_HIDDEN = "hidden.safetensors"


def prepare_once(
    source: CheckpointSource,
    text: CalibrationText,
    precision: str,
    folder: Path,
    *,
    mixture: Mapping[str, LinearForm] | None = None,
    device: torch.device | None = None,
    progress: ProgressFactory = no_progress,
) -> PreparedSource:
    """`source` quantized by `precision`, or what an earlier call made of the same weights, tokenizer and text.

    With `mixture` only its int4 layers are quantized, behind the others in the forms that they will have. Results are
    kept in `folder`, one directory for each; on which `device` they were found does not matter.
    """
    identity = {
        "algorithm": [precision, _ALGORITHM_VERSION], "source": source.fingerprint(),
        "tokenizer": source.companions_digest, "text": text.digest, "sequences": [NUM_SEQUENCES, SEQUENCE_LENGTH],
    }  # fmt: skip
    if mixture is not None:
        identity["mixture"] = {name: form.format for name, form in sorted(mixture.items())}
    final = folder / digest_of(identity)[:32]
    with staged(final, identity) as directory:
        if directory is not None:
            prepare(
                source, text, METHODS[precision], directory,
                origin=precision, mixture=mixture, device=device, progress=progress,
            )  # fmt: skip
    return PreparedSource(source, final)


@torch.inference_mode()
def prepare(
    source: CheckpointSource,
    text: CalibrationText,
    method: Method,
    directory: Path,
    *,
    origin: str,
    mixture: Mapping[str, LinearForm] | None = None,
    device: torch.device | None = None,
    progress: ProgressFactory = no_progress,
) -> None:
    """Quantize every decoder layer into `directory`, going on where an interrupted run stopped; see `prepare_once`."""
    dtype, device = torch_dtype(SAFETENSORS_16BIT[source.config.dtype]), device or compute_device()
    precision, only = _surroundings(source, mixture)
    note_device(directory, device)
    with progress(_title(origin, mixture), source.config.num_layers, "layers") as bar:
        first, hidden = load_hidden(directory / _HIDDEN, lambda layer: (directory / layer_file(layer)).is_file())
        hidden = first_hidden(source, text) if hidden is None else hidden
        hidden = hidden.to(device)
        # The tokenizer's.
        release_freed_memory()
        bar.advance(first)
        for layer in range(first, source.config.num_layers):
            weights = layer_weights(source, layer, dtype, device, precision)
            quantizer = LayerQuantizer(weights, method, dtype, only)
            hidden = run_layer(layer_ops(QuantizingOps, weights, hidden, quantizer=quantizer))
            _save_layer(directory, source, layer, quantizer.result(), origin)
            save_hidden(directory / _HIDDEN, layer + 1, hidden)
            del weights, quantizer
            release_freed_memory()
            bar.advance()
    _write_facts(directory, source.config.num_layers)


def _surroundings(
    source: CheckpointSource, mixture: Mapping[str, LinearForm] | None
) -> tuple[Precision, frozenset[str] | None]:
    """How layers are held while others are quantized (those to quantize in 16 bit), and which are to be: None for all.

    The others compute in the form that the mixture gives them, so that int4 is calibrated on what it will really get.
    """
    dtype = source.config.dtype
    if mixture is None:
        return Precision(dtype, dtype), None
    only = frozenset(name for name, form in mixture.items() if form.format == "int4")
    kept = {name: form for name, form in mixture.items() if name not in only}
    return Precision(dtype, dtype).with_modules(kept), only


def _title(origin: str, mixture: Mapping[str, LinearForm] | None) -> str:
    if mixture is None:
        return f"quantizing to {origin}"
    counts = Counter(form.format for form in mixture.values())
    parts = ", ".join(f"{counts[form]} {form}" for form in FORMATS if counts[form])
    return f"quantizing to {origin} again, in the chosen mixture of linear layers ({parts})"


def _save_layer(directory: Path, source: CheckpointSource, layer: int, result: LayerResult, origin: str) -> None:
    tensors = {name: tensor.cpu().contiguous() for name, tensor in result.plain.items()}
    facts: dict[str, Any] = {name: {"digest": source_digest(source, name)} for name in result.plain}
    for name, part in result.stored.items():
        tensors[f"{name}.values"] = pack_int4(part.weight.values.cpu())
        tensors[f"{name}.scales"] = part.weight.scales.cpu()
        if part.weight.zeros is not None:
            tensors[f"{name}.zeros"] = part.weight.zeros.to(torch.int8).cpu()
        facts[name] = {
            "origin": origin, "digest": source_digest(source, name),
            "error_squares": part.error_squares, "weight_squares": part.weight_squares,
        }  # fmt: skip
    facts = {"tensors": facts, "tokens_per_expert": result.tokens_per_expert}
    write_atomic(directory / layer_file(layer), save(tensors, metadata={"facts": json.dumps(facts)}))


def _write_facts(directory: Path, num_layers: int) -> None:
    """Gather what the layers' files say of themselves; what only an interrupted run needs goes."""
    tensors: dict[str, Any] = {}
    tokens: list[list[int]] = []
    for layer in range(num_layers):
        with safe_open(directory / layer_file(layer), framework="pt") as stored:
            facts = json.loads(stored.metadata()["facts"])
        tensors |= facts["tensors"]
        tokens.append(facts["tokens_per_expert"])
    write_json(directory / FACTS, {"tensors": tensors, "tokens_per_expert": tokens})
    (directory / _HIDDEN).unlink(missing_ok=True)
