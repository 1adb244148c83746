"""`build/NAME/`: the rank checkpoint on disk, in TensorRT-LLM's format plus `trtbuild.json`.

config.json and rank{r}.safetensors are TensorRT-LLM 1.x's. trtbuild.json is the authority for our own builders: the
full ModelConfig (config.json has no sliding window), layout, precision, and the precision manifest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from trtbuild.checkpoints.content import file_digest, stack_digest
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.model_config import ModelConfig
from trtbuild.checkpoints.precision import Precision
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.rank_tensors import RankPlan
from trtbuild.checkpoints.safetensors_file import MappedTensors, TensorEntry, read_header
from trtbuild.errors import CheckpointError
from trtbuild.workspace import digest_of, read_json

if TYPE_CHECKING:
    import torch

# Reads a tensor of one rank by its rank-checkpoint name.
WeightReader: TypeAlias = "Callable[[str], torch.Tensor]"

FORMAT_VERSION = 2
AUTHORITY = "trtbuild.json"


def rank_file(rank: int) -> str:
    return f"rank{rank}.safetensors"


@dataclass(frozen=True)
class RankCheckpoint:
    """A finished rank checkpoint, or an engine directory that holds its files."""

    directory: Path
    authority: dict[str, Any]

    @classmethod
    def open(cls, directory: Path) -> RankCheckpoint:
        """Raises CheckpointError where a file is missing, damaged, or of another format version."""
        authority = read_json(directory / AUTHORITY)
        if authority.get("format") != FORMAT_VERSION:
            raise CheckpointError(
                f"{directory}: rank checkpoint format {authority.get('format')}, this trtbuild reads {FORMAT_VERSION}; "
                "convert it again with --force"
            )
        checkpoint = cls(directory, authority)
        try:
            _ = checkpoint.plans
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{directory / AUTHORITY} is damaged ({error!r}); convert it again with --force"
            ) from error
        for rank in range(checkpoint.layout.world_size):
            checkpoint._check_rank(rank)
        return checkpoint

    @cached_property
    def config(self) -> ModelConfig:
        return ModelConfig.from_dict(self.authority["model"])

    @cached_property
    def layout(self) -> Layout:
        return Layout(**self.authority["layout"])

    @cached_property
    def precision(self) -> Precision:
        return Precision.from_dict(self.authority["precision"])

    @cached_property
    def plans(self) -> list[RankPlan]:
        """One plan per rank, derived again from config, layout and precision."""
        return [plan_rank(self.config, rank, self.precision) for rank in self.layout.ranks()]

    @cached_property
    def _mapped(self) -> list[MappedTensors]:
        return [MappedTensors(read_header(self.directory / rank_file(rank))) for rank in range(self.layout.world_size)]

    def tensor(self, rank: int, name: str) -> torch.Tensor:
        """A view of the rank file."""
        return self._mapped[rank].tensor(name)

    def reader(self, rank: int) -> WeightReader:
        """Reads one rank's tensors by name."""
        return lambda name: self.tensor(rank, name)

    def _check_rank(self, rank: int) -> None:
        file = self.directory / rank_file(rank)
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; convert the model again with --force")
        found = {name: entry.spec for name, entry in read_header(file).items()}
        expected = {spec.name: spec for spec in self.plans[rank].tensors()}
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                raise CheckpointError(f"{file}: tensor {name!r} is {found.get(name)}, expected {expected.get(name)}")


def open_rank(directory: Path, rank: int) -> WeightReader:
    """The reader of one rank, for a process that builds its plans."""
    return RankCheckpoint.open(directory).reader(rank)


def weights_digest(checkpoint: RankCheckpoint) -> str:
    """Identifies the content of the rank weights: over the digests that were taken when they were written."""
    return digest_of(checkpoint.authority["digests"])


def verify_content(checkpoint: RankCheckpoint) -> None:
    """Read every rank file and compare each tensor with the digest taken when it was written.

    Raises CheckpointError that names the tensors that differ.
    """
    wrong: list[str] = []
    for rank, recorded in enumerate(checkpoint.authority["digests"]):
        file = checkpoint.directory / rank_file(rank)
        entries, stacks = read_header(file), plan_stacks(checkpoint.plans[rank])
        with file.open("rb") as stream:
            for name, digest in recorded.items():
                if _tensor_digest(stream.fileno(), entries[name], stacks.get(name)) != digest:
                    wrong.append(f"{file.name}: {name}")
    if wrong:
        more = f", and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise CheckpointError(
            f"{checkpoint.directory}: content differs from what was written: {', '.join(wrong[:8])}{more}; "
            "convert the model again with --force"
        )


def plan_stacks(plan: RankPlan) -> dict[str, int]:
    """Tensor name -> number of experts, of the tensors that are stacks of them."""
    return {
        spec.name: linear.num_experts
        for linear in plan.linears
        if linear.num_experts is not None
        for spec in linear.tensors()
        if not spec.name.endswith(".activation_scaling_factor")
    }


def _tensor_digest(descriptor: int, entry: TensorEntry, num_experts: int | None) -> str:
    if num_experts is None:
        return file_digest(descriptor, entry.start, entry.num_bytes)
    size = entry.num_bytes // num_experts
    return stack_digest(file_digest(descriptor, entry.start + i * size, size) for i in range(num_experts))
