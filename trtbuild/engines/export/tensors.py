"""What an export's files hold: a tensor's header, and how to make its rows when their turn comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtbuild.checkpoints.rank_tensors import TensorSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ExportTensor:
    """One tensor of the exported files; `rows` gives its rows start..stop (0..1 of one without dimensions)."""

    spec: TensorSpec
    rows: Callable[[int, int], torch.Tensor]

    @property
    def num_rows(self) -> int:
        return self.spec.shape[0] if self.spec.shape else 1


TENSORRT_LLM = "TensorRT-LLM >= 1.3"
# Families of ours that its PyTorch backend has no model of (its registered names begin with DeepSeek-V3).
NOT_IN_TENSORRT_LLM = frozenset({"DeepseekV2ForCausalLM"})


def constant(name: str, dtype: str, shape: tuple[int, ...], value: torch.Tensor) -> ExportTensor:
    """A small tensor that is known beforehand."""
    flat = value.reshape(shape or (1,))
    return ExportTensor(TensorSpec(name, dtype, shape), lambda start, stop: flat[start:stop])


@dataclass(frozen=True)
class ExportPlan:
    """How a checkpoint is to be written: its tensors in order, and what its configuration files say of them.

    `quantization` goes into config.json (None: nothing is quantized), `files` are JSON files beside it. `loads_in`
    names the engines whose own readers take it; `notes` say where one of them computes otherwise than we do.
    """

    tensors: tuple[ExportTensor, ...]
    quantization: dict[str, Any] | None
    files: dict[str, dict[str, Any]]
    loads_in: tuple[str, ...]
    notes: tuple[str, ...]
