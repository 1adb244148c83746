"""A checkpoint whose linear layers a calibration has quantized: conversion reads it as it reads any other.

The calibration's folder holds a file for each decoder layer, layer-0003.safetensors: of each quantized source weight,
by canonical name, `NAME.values` (int4, packed), `NAME.scales` and, where it has zero points, `NAME.zeros` (int8); and
the unquantized weights that took up scales (norms, router, biases) under their own names. `facts.json` has errors and
digests. All the rest is the checkpoint's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtbuild.checkpoints.model_config import ModelConfig
from trtbuild.checkpoints.precision import LinearForm, PrecisionName
from trtbuild.checkpoints.quantization import QuantizedWeight, StoredWeight, unpack_int4
from trtbuild.checkpoints.safetensors_file import MappedTensors, TensorEntry, read_header
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.workspace import read_json

if TYPE_CHECKING:
    import torch

FACTS = "facts.json"


def layer_file(layer: int) -> str:
    """Name of one decoder layer's file."""
    return f"layer-{layer:04d}.safetensors"


@dataclass(frozen=True)
class PreparedSource:
    """See `content.SourceReader`; `base` is the checkpoint, `folder` the finished calibration.

    `only` are the canonical names that are taken from there, where it is not all of them.
    """

    base: CheckpointSource
    folder: Path
    only: frozenset[str] | None = None

    @property
    def config(self) -> ModelConfig:
        return self.base.config

    @property
    def directory(self) -> Path:
        """The checkpoint's."""
        return self.base.directory

    @property
    def digest(self) -> str:
        """The checkpoint's."""
        return self.base.digest

    def portable(self) -> PreparedSource:
        """A copy for another process on this file system."""
        return PreparedSource(self.base.portable(), self.folder.absolute(), self.only)

    def tokens_per_expert(self, layer: int) -> tuple[int, ...]:
        """How many calibration tokens the router sent to each expert of a layer."""
        return tuple(self._all_facts["tokens_per_expert"][layer])

    @cached_property
    def _all_facts(self) -> dict[str, Any]:
        return read_json(self.folder / FACTS)

    @cached_property
    def _facts(self) -> dict[str, dict[str, Any]]:
        """By canonical name, of what is taken from the calibration: digest of the original, origin, squared errors."""
        facts = self._all_facts["tensors"]
        return facts if self.only is None else {name: facts[name] for name in self.only}

    @property
    def method(self) -> PrecisionName:
        """The precision that it was calibrated for."""
        return next(facts["origin"] for facts in self._all_facts["tensors"].values() if "origin" in facts)

    @cached_property
    def _mapped(self) -> MappedTensors:
        entries: dict[str, TensorEntry] = {}
        for layer in range(self.config.num_layers):
            file = self.folder / layer_file(layer)
            if file.is_file():
                entries |= read_header(file)
        return MappedTensors(entries)

    def stored(self, canonical: str) -> StoredWeight | None:
        """See `content.SourceReader`."""
        facts = self._facts.get(canonical)
        if facts is None:
            return self.base.stored(canonical)
        if "origin" not in facts:
            return None
        entries = self._mapped.entries
        group = 2 * entries[f"{canonical}.values"].spec.shape[1] // entries[f"{canonical}.scales"].spec.shape[1]
        return StoredWeight(
            LinearForm("int4", group, zeros=f"{canonical}.zeros" in entries), facts["origin"],
            error_squares=facts["error_squares"], weight_squares=facts["weight_squares"],
        )  # fmt: skip

    def stored_rows(self, canonical: str, start: int, stop: int) -> QuantizedWeight:
        """See `content.SourceReader`."""
        if canonical not in self._facts:
            return self.base.stored_rows(canonical, start, stop)
        values = unpack_int4(self._mapped.rows(f"{canonical}.values", start, stop))
        zeros = f"{canonical}.zeros"
        return QuantizedWeight(
            values, self._mapped.rows(f"{canonical}.scales", start, stop),
            self._mapped.rows(zeros, start, stop) if zeros in self._mapped.entries else None,
        )  # fmt: skip

    def rows(self, canonical: str, start: int, stop: int) -> torch.Tensor:
        """See `content.SourceReader`; a quantized weight dequantized, in its scales' type."""
        facts = self._facts.get(canonical)
        if facts is None:
            return self.base.rows(canonical, start, stop)
        if "origin" not in facts:
            return self._mapped.rows(canonical, start, stop)
        found = self.stored_rows(canonical, start, stop)
        return found.dequantize().to(found.scales.dtype)

    def tensor(self, canonical: str) -> torch.Tensor:
        """See `content.SourceReader`."""
        return self.rows(canonical, 0, self.shape(canonical)[0])

    def shape(self, canonical: str) -> tuple[int, ...]:
        """See `content.SourceReader`."""
        return self.base.shape(canonical)

    def digest_of(self, canonical: str) -> str | None:
        """Of the checkpoint's own weight, from which the quantized one was made."""
        facts = self._facts.get(canonical)
        return facts["digest"] if facts else self.base.digest_of(canonical)
