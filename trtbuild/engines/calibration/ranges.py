"""Static activation ranges for fp8: the model runs in 16 bit, layer by layer, over the calibration text.

One decoder layer's weights and the hidden states of the calibration tokens are all that is in memory. Every expert of
an MoE layer sees every token, so that none is left uncalibrated however the router prefers others; how many tokens
each expert was really routed is recorded beside its range.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

import torch

from trtbuild.checkpoints.convert import ActivationRange, range_from_dict
from trtbuild.checkpoints.journal import Journal
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.model_config import ModelConfig
from trtbuild.checkpoints.precision import SAFETENSORS_16BIT, Precision
from trtbuild.checkpoints.rank_tensors import Linear, plan_rank
from trtbuild.checkpoints.safetensors_file import torch_dtype
from trtbuild.checkpoints.shards import fill_all
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.checkpoints.tokenizer import load_tokenizer
from trtbuild.engines.network.decoder import define_segment
from trtbuild.engines.network.rope import rope_tables
from trtbuild.engines.network.segments import Segment
from trtbuild.engines.reference.torch_ops import Observer, RoutingObserver, Step, TorchOps
from trtbuild.engines.reference.torch_weights import TorchWeights
from trtbuild.errors import CheckpointError
from trtbuild.progress import ProgressFactory, no_progress
from trtbuild.workspace import digest_of, read_json, staged, write_atomic, write_json

NUM_SEQUENCES = 16
SEQUENCE_LENGTH = 512
_BATCH = 4


@dataclass(frozen=True)
class CalibrationText:
    """A text and where it came from, for the record."""

    name: str
    text: str

    @classmethod
    def open(cls, file: Path | None) -> CalibrationText:
        """A file, or the bundled public-domain text."""
        if file is None:
            return cls("bundled", resources.files("trtbuild.data").joinpath("calibration.txt").read_text("utf-8"))
        try:
            return cls(file.name, file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"--calib-data {file}: not a readable UTF-8 text ({error})") from error

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def calibration_tokens(source: CheckpointSource, text: CalibrationText) -> list[list[int]]:
    """Sequences of equal length, evenly spaced over the text, each beginning as the tokenizer begins a text."""
    tokenizer = load_tokenizer(source.directory)
    # verbose=False: a text longer than the model's context is meant to be cut up here.
    ids: list[int] = tokenizer(text.text, verbose=False)["input_ids"]
    plain: list[int] = tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"]
    prefix = ids[: len(ids) - len(plain)] if ids[-len(plain) :] == plain else []
    length = min(SEQUENCE_LENGTH, source.config.max_position_embeddings) - len(prefix)
    if len(plain) < length:
        raise CheckpointError(f"calibration text {text.name!r} has {len(plain)} tokens; it takes at least {length}")
    last = len(plain) - length
    count = min(NUM_SEQUENCES, 1 + last // max(1, length // 2))
    starts = [round(last * i / max(1, count - 1)) for i in range(count)]
    return [prefix + plain[start : start + length] for start in starts]


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
    config, device = source.config, device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, ActivationRange] = {}
    with progress("calibrating", config.num_layers, "layers") as bar:
        saved = _SavedLayers(directory) if directory else None
        first, hidden = saved.load() if saved else (0, None)
        if hidden is None:
            tokens = torch.tensor(calibration_tokens(source, text))
            hidden = source.tensor("embedding")[tokens].to(torch_dtype(SAFETENSORS_16BIT[config.dtype]))
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
        """The layer to go on with, and hidden states [sequences, length, H] before it; None where there are none."""
        from safetensors import SafetensorError, safe_open

        if not self._file.is_file():
            return 0, None
        try:
            with safe_open(self._file, framework="pt") as stored:
                layer, hidden = int(stored.metadata()["layer"]), stored.get_tensor("hidden")
        except (SafetensorError, KeyError, ValueError):
            return 0, None
        is_whole = all(str(before) in self._journal.entries for before in range(layer))
        return (layer, hidden) if is_whole else (0, None)

    def ranges(self, before: int) -> dict[str, ActivationRange]:
        """Of the layers below `before`."""
        entries = (self._journal.entries[str(layer)] for layer in range(before))
        return {name: range_from_dict(found) for entry in entries for name, found in entry.items()}

    def add(self, layer: int, hidden: torch.Tensor, ranges: dict[str, ActivationRange]) -> None:
        """Ranges first: hidden states that are ahead of them would leave a layer out."""
        from safetensors.torch import save

        self._journal.add(str(layer), {name: asdict(found) for name, found in ranges.items()})
        write_atomic(self._file, save({"hidden": hidden.cpu()}, metadata={"layer": str(layer + 1)}))


def calibrate_once(
    source: CheckpointSource, text: CalibrationText, folder: Path, *, progress: ProgressFactory = no_progress
) -> dict[str, ActivationRange]:
    """`calibrate`, or what it found before for the same weights, tokenizer and text, whatever the layout.

    Results are kept in `folder`, one small directory for each.
    """
    identity = {
        "source": source.fingerprint(), "tokenizer": source.companions_digest, "text": text.digest,
        "sequences": [NUM_SEQUENCES, SEQUENCE_LENGTH],
    }  # fmt: skip
    final = folder / digest_of(identity)[:32]
    with staged(final, identity) as directory:
        if directory is not None:
            ranges = calibrate(source, text, directory=directory, progress=progress)
            write_json(directory / "ranges.json", {name: asdict(found) for name, found in ranges.items()})
            for name in ("hidden.safetensors", "ranges.jsonl"):
                (directory / name).unlink(missing_ok=True)
    return {name: range_from_dict(found) for name, found in read_json(final / "ranges.json").items()}


@torch.inference_mode()
def _run_layer(
    source: CheckpointSource, layer: int, hidden: torch.Tensor
) -> tuple[torch.Tensor, dict[str, ActivationRange]]:
    """One layer over hidden [sequences, length, H]: its output, and what its linear layers saw."""
    config = source.config
    weights = _layer_weights(source, layer, hidden)
    amax: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}

    def observe(linear: Linear, expert: int | None, x: torch.Tensor) -> None:
        largest = x.abs().max().float()
        # torch.maximum keeps a NaN, Python's max would lose it.
        amax[linear.global_name] = torch.maximum(amax.get(linear.global_name, largest), largest)

    def observe_routing(name: str, tokens: torch.Tensor) -> None:
        counts[name] = counts.get(name, torch.zeros_like(tokens)) + tokens

    outputs = [_run_batch(config, weights, batch, observe, observe_routing) for batch in hidden.split(_BATCH)]
    routed = tuple(int(n) for n in next(iter(counts.values()))) if counts else ()
    ranges = {name: ActivationRange(float(value), routed if ".mlp." in name else ()) for name, value in amax.items()}
    broken = [name for name, found in ranges.items() if not found.amax < float("inf")]
    if broken:
        raise CheckpointError(
            f"calibration: the input of {broken[0]} is not finite; the checkpoint or its dtype is damaged"
        )
    return torch.cat(outputs), ranges


def _layer_weights(source: CheckpointSource, layer: int, hidden: torch.Tensor) -> TorchWeights:
    """One layer alone: a pipeline with a stage per layer cuts it out, without embedding and head."""
    config = source.config
    stage = Layout(pp=config.num_layers).rank(layer)
    plan = plan_rank(config, stage, Precision(config.dtype, config.dtype)).only_layers()
    [tensors] = fill_all([plan], source.tensor)
    return TorchWeights(plan, tensors.__getitem__, hidden.dtype, hidden.device)


def _run_batch(
    config: ModelConfig,
    weights: TorchWeights,
    hidden: torch.Tensor,
    observer: Observer,
    routing_observer: RoutingObserver,
) -> torch.Tensor:
    num_sequences, length, _ = hidden.shape
    caches = {
        f"transformer.layers.0.attention.{name}": hidden.new_zeros((num_sequences, heads, length, width))
        for name, (heads, width) in weights.plan.cache_shapes().items()
    }
    cos, sin = (table.to(hidden.device).expand(num_sequences, -1, -1) for table in rope_tables(config, length))
    segment = Segment("decoder", 0, 0, 1)
    step = Step(range(num_sequences), [0] * num_sequences, length)
    inputs = {"hidden": [hidden], "rope_cos": [cos], "rope_sin": [sin]}
    ops = TorchOps(segment, [weights], inputs, step, [caches], None, observer, routing_observer)
    define_segment(ops, weights.plan, segment)
    return ops.outputs["hidden"][0]
