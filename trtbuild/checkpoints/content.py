"""Content digests of tensors: XXH3-128 over a tensor's bytes, computed in the blocks in which tensors are read.

XXH3 finds every change that happens by accident; it is no defence against someone who forges a file. It runs at
memory speed (11 GB/s on one core where sha256 makes 1.4), so that no tensor has to be left out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import xxhash

if TYPE_CHECKING:
    import torch

    from trtbuild.checkpoints.quantization import QuantizedWeight, StoredWeight

ALGORITHM = "xxh3_128"
# A block of 16-bit values and its float32 copy stay in a core's L2 cache together.
BLOCK_ELEMENTS = 1 << 18
_READ_BYTES = 1 << 20


class SourceReader(Protocol):
    """Reads source weights by canonical name, whole or by rows."""

    def tensor(self, canonical: str, /) -> torch.Tensor:
        """The whole weight."""
        ...

    def rows(self, canonical: str, start: int, stop: int, /) -> torch.Tensor:
        """Rows start..stop, contiguous; valid until the next call."""
        ...

    def shape(self, canonical: str, /) -> tuple[int, ...]:
        """Shape of the whole weight."""
        ...

    def stored(self, canonical: str, /) -> StoredWeight | None:
        """What is known of a weight that the source holds quantized; None for the others.

        `tensor` and `rows` give such a weight dequantized.
        """
        ...

    def stored_rows(self, canonical: str, start: int, stop: int, /) -> QuantizedWeight:
        """Rows start..stop of a weight for which `stored` is not None, as they are stored."""
        ...

    def digest_of(self, canonical: str, /) -> str | None:
        """Content digest of what a weight was made from, where that is not what `rows` gives."""
        ...


class Digest:
    """An XXH3-128 in progress."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def update(self, data: torch.Tensor | bytes | memoryview) -> None:
        """Add bytes, or a contiguous tensor's."""
        self._state.update(data if isinstance(data, bytes | memoryview) else raw_bytes(data))

    def hex(self) -> str:
        return self._state.hexdigest()

    @classmethod
    def of(cls, data: torch.Tensor | bytes | memoryview) -> str:
        """Digest of one piece of data."""
        digest = cls()
        digest.update(data)
        return digest.hex()


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    import torch

    return tensor.flatten().view(torch.uint8).numpy().data


def row_blocks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of the blocks of rows in which a tensor of this shape is worked on; each begins at an even one."""
    step = max(1, BLOCK_ELEMENTS // max(1, math.prod(shape[1:])) // 2) * 2
    return ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def source_digest(source: SourceReader, canonical: str) -> str:
    """Digest of one source tensor as `source` reads it (with its LoRA adapters merged)."""
    known = source.digest_of(canonical)
    if known is not None:
        return known
    digest = Digest()
    for start, stop in row_blocks(source.shape(canonical)):
        digest.update(source.rows(canonical, start, stop))
    return digest.hex()


def file_digest(descriptor: int, start: int, num_bytes: int) -> str:
    """Digest of a stretch of an open file."""
    digest, stop = Digest(), start + num_bytes
    while start < stop:
        data = os.pread(descriptor, min(_READ_BYTES, stop - start), start)
        if not data:
            raise OSError(f"the file ends at byte {start}, expected {stop}")
        digest.update(data)
        start += len(data)
    return digest.hex()


def stack_digest(parts: Iterable[str]) -> str:
    """Digest of a stack of experts: over its experts' digests, which several workers found."""
    digest = Digest()
    for part in parts:
        digest.update(bytes.fromhex(part))
    return digest.hex()


def file_fingerprint(file: Path) -> list[int]:
    """What the file system says of a file: size, times of modification and of change, inode.

    The time of change (ctime) cannot be set back by an ordinary program, unlike the time of modification.
    """
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def changed_tensors(source: SourceReader, recorded: dict[str, Any]) -> list[str]:
    """Names of the tensors whose content is not the recorded digest; reads all of them."""
    return [name for name, digest in recorded.items() if source_digest(source, name) != digest]
