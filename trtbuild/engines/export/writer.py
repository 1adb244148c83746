"""Writing an export's safetensors files: tensor by tensor, in blocks of rows, in the layout that the hub has."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from io import BufferedRandom
from pathlib import Path

from trtbuild.checkpoints.content import raw_bytes
from trtbuild.checkpoints.rank_tensors import TensorSpec
from trtbuild.checkpoints.safetensors_file import layout_header, read_header
from trtbuild.checkpoints.source_files import INDEX_FILE
from trtbuild.engines.export.tensors import ExportTensor
from trtbuild.errors import Refused
from trtbuild.units import format_bytes
from trtbuild.workspace import atomic_file, write_json

# What the hub's clients fetch in one piece.
MAX_SHARD_BYTES = 5 * 10**9
_BLOCK_BYTES = 8 << 20

Advance = Callable[[float], None]


def cut_into_files(tensors: Sequence[ExportTensor], max_bytes: int) -> dict[str, list[ExportTensor]]:
    """File name -> its tensors, in order; a file has `max_bytes` or less, or one tensor."""
    shards: list[list[ExportTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.spec.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.spec.num_bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_files(directory: Path, files: dict[str, list[ExportTensor]], advance: Advance) -> None:
    """Write the files that an interrupted run has not, and the index of several; `advance` counts MiB.

    Raises Refused before the first byte where the disk has no room for them.
    """
    missing = {name: tensors for name, tensors in files.items() if not _is_whole(directory / name, tensors)}
    needed, free = sum(_num_bytes(tensors) for tensors in missing.values()), shutil.disk_usage(directory).free
    if needed > free:
        raise Refused(f"{directory.parent}: the export takes {format_bytes(needed)}, {format_bytes(free)} are free")
    for name, tensors in files.items():
        if name in missing:
            _write_file(directory / name, tensors, advance)
        else:
            advance(_num_bytes(tensors) / 2**20)
    if len(files) > 1:
        total = sum(_num_bytes(tensors) for tensors in files.values())
        weight_map = {tensor.spec.name: name for name, tensors in files.items() for tensor in tensors}
        write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_file(file: Path, tensors: list[ExportTensor], advance: Advance) -> None:
    header, starts = layout_header([tensor.spec for tensor in tensors], {"format": "pt"})
    with atomic_file(file) as stream:
        stream.write(header)
        stream.flush()
        for tensor in tensors:
            _write_tensor(stream, tensor, starts[tensor.spec.name], advance)


def _write_tensor(stream: BufferedRandom, tensor: ExportTensor, start: int, advance: Advance) -> None:
    row_bytes = tensor.spec.num_bytes // max(1, tensor.num_rows)
    step = max(1, _BLOCK_BYTES // max(1, row_bytes))
    for first in range(0, tensor.num_rows, step):
        last = min(first + step, tensor.num_rows)
        data = raw_bytes(tensor.rows(first, last).contiguous())
        if len(data) != (last - first) * row_bytes:
            raise ValueError(f"{tensor.spec}: rows {first}..{last} have {len(data)} bytes")
        position = start + first * row_bytes
        while data:
            done = os.pwrite(stream.fileno(), data, position)
            data, position = data[done:], position + done
        advance((last - first) * row_bytes / 2**20)


def _num_bytes(tensors: Sequence[ExportTensor]) -> int:
    return sum(tensor.spec.num_bytes for tensor in tensors)


def _is_whole(file: Path, tensors: Sequence[ExportTensor]) -> bool:
    """Whether an interrupted run wrote this file: it has its name only when it is on disk."""
    return file.is_file() and _specs(file) == {tensor.spec.name: tensor.spec for tensor in tensors}


def _specs(file: Path) -> dict[str, TensorSpec]:
    return {name: entry.spec for name, entry in read_header(file).items()}
