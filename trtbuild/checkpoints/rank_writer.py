"""The rank files of a running conversion: preallocated, then written into place by several threads.

Written with pwrite rather than through a memory map: a page fault for every 4 KiB costs more than the copy.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from trtbuild.checkpoints.content import Digest, file_digest, raw_bytes
from trtbuild.checkpoints.rank_checkpoint import rank_file
from trtbuild.checkpoints.rank_tensors import ConstantTensor, RankPlan
from trtbuild.checkpoints.safetensors_file import layout_header, torch_dtype
from trtbuild.checkpoints.work_units import Unit
from trtbuild.errors import Refused
from trtbuild.units import format_bytes
from trtbuild.workspace import sync

if TYPE_CHECKING:
    import torch


def constant_values(constant: ConstantTensor) -> torch.Tensor:
    import torch

    return torch.full(constant.spec.shape, constant.value, dtype=torch_dtype(constant.spec.dtype))


class RankFiles:
    """Rank files at full length in `directory`; a context manager that closes them."""

    def __init__(self, directory: Path, plans: list[RankPlan]) -> None:
        self._directory = directory
        self._constants = [plan.constants for plan in plans]
        self._specs = [{spec.name: spec for spec in plan.tensors()} for plan in plans]
        headers = [layout_header(specs.values(), {"format": "pt"}) for specs in self._specs]
        self._headers = [header for header, _ in headers]
        self._starts = [starts for _, starts in headers]
        self._sizes = [
            len(header) + sum(spec.num_bytes for spec in specs.values())
            for header, specs in zip(self._headers, self._specs, strict=True)
        ]
        self._descriptors: list[int] = []

    def __enter__(self) -> RankFiles:
        files = [self._directory / rank_file(rank) for rank in range(len(self._specs))]
        self._descriptors = [os.open(file, os.O_RDWR) for file in files]
        for rank, constants in enumerate(self._constants):
            for constant in constants:
                start, _, _ = self.place(rank, constant.spec.name, None)
                self.write_at(rank, start, raw_bytes(constant_values(constant)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def missing(self) -> list[int]:
        """Ranks whose file an earlier run did not leave whole."""
        return [rank for rank in range(len(self._specs)) if not self._is_whole(rank)]

    def allocate(self, ranks: list[int]) -> None:
        """Create these ranks' files with their disk space; Refused where it is not there."""
        for rank in ranks:
            (self._directory / rank_file(rank)).unlink(missing_ok=True)
        needed, free = sum(self._sizes[rank] for rank in ranks), shutil.disk_usage(self._directory).free
        if needed > free:
            raise Refused(
                f"{self._directory.parent}: the rank checkpoint takes {format_bytes(needed)}, "
                f"{format_bytes(free)} are free"
            )
        for rank in ranks:
            with (self._directory / rank_file(rank)).open("wb") as stream:
                stream.write(self._headers[rank])
                stream.flush()
                os.posix_fallocate(stream.fileno(), 0, self._sizes[rank])
        sync(self._directory)

    def sync(self) -> None:
        """Put everything written so far on disk."""
        for descriptor in self._descriptors:
            os.fdatasync(descriptor)

    def place(self, rank: int, name: str, expert: int | None) -> tuple[int, int, int]:
        """Where a tensor (or one expert of it) begins in its file, its bytes, and those of one row."""
        spec, start = self._specs[rank][name], self._starts[rank][name]
        if expert is None:
            return start, spec.num_bytes, spec.num_bytes // max(1, spec.shape[0])
        size = spec.num_bytes // spec.shape[0]
        return start + expert * size, size, size // max(1, spec.shape[1])

    def write_at(self, rank: int, start: int, data: memoryview) -> None:
        """Write all of `data` at byte `start` of a rank's file."""
        while data:
            done = os.pwrite(self._descriptors[rank], data, start)
            data, start = data[done:], start + done

    def digest(self, rank: int, start: int, num_bytes: int) -> str:
        """Content digest of a stretch of a rank's file."""
        return file_digest(self._descriptors[rank], start, num_bytes)

    def _is_whole(self, rank: int) -> bool:
        file, header = self._directory / rank_file(rank), self._headers[rank]
        if not file.is_file() or file.stat().st_size != self._sizes[rank]:
            return False
        with file.open("rb") as stream:
            return stream.read(len(header)) == header


class _Part:
    """One tensor, or one expert of it, while a unit writes it."""

    def __init__(self, start: int, num_bytes: int, row_bytes: int) -> None:
        self.start, self.num_bytes, self.row_bytes = start, num_bytes, row_bytes
        self.position = 0
        self.in_order = True
        self.hash = Digest()


class UnitWriter:
    """The destination of one unit; hashes what it writes while that is in the cache."""

    def __init__(self, files: RankFiles, unit: Unit) -> None:
        self._files = files
        self._parts: dict[tuple[int, str, int | None], _Part] = {}
        # A rank's lm_head may be nothing but padding, of which no row is ever written.
        for part in unit.slices:
            if part.linear is None:
                self._part(part.rank, part.name, part.piece.expert)

    def write(self, rank: int, name: str, expert: int | None, row: int, block: torch.Tensor) -> None:
        """Store rows of a rank tensor; see `shards.Destination`."""
        part, data = self._part(rank, name, expert), raw_bytes(block)
        offset = row * part.row_bytes
        if offset == part.position:
            part.hash.update(data)
            part.position += len(data)
        else:
            part.in_order = False
        self._files.write_at(rank, part.start + offset, data)

    def _part(self, rank: int, name: str, expert: int | None) -> _Part:
        key = rank, name, expert
        if key not in self._parts:
            self._parts[key] = _Part(*self._files.place(rank, name, expert))
        return self._parts[key]

    def digests(self) -> dict[str, str]:
        """rank{r}/NAME[/EXPERT] -> content digest of everything that the unit wrote a part of.

        A part that was written out of order, or whose last rows are padding, is read back.
        """
        found: dict[str, str] = {}
        for (rank, name, expert), part in self._parts.items():
            key = f"rank{rank}/{name}" if expert is None else f"rank{rank}/{name}/{expert}"
            complete = part.in_order and part.position == part.num_bytes
            found[key] = part.hash.hex() if complete else self._files.digest(rank, part.start, part.num_bytes)
        return found
