"""Headers of safetensors files: any is read or a clear error, odd ones are read, and what we write others read."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import hf_config, save_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from trtbuild.checkpoints.safetensors_file import MappedTensors, layout_header, read_header
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.errors import CheckpointError

HEADERS = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-5, 2**40),
        st.floats(allow_nan=False),
        st.sampled_from(["BF16", "F32", "x"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "t"]), inner, max_size=4),
    ),
    max_leaves=12,
)


@settings(max_examples=400)
@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), HEADERS, max_size=3), st.integers(0, 64))
def test_any_header_reads_or_is_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], data: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    try:
        entries = read_header(file)
    except CheckpointError as error:
        assert "fuzz.safetensors" in error.message
    else:
        assert sum(entry.num_bytes for entry in entries.values()) == data


@settings(max_examples=150)
@given(st.integers(0, 5000), st.binary(min_size=1, max_size=9))
def test_any_overwritten_bytes_read_or_are_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, position: int, noise: bytes
) -> None:
    directory = tmp_path_factory.getbasetemp() / "fuzzed"
    file = directory / "model.safetensors"
    if not (directory / "pristine").exists():
        save_checkpoint(directory, hf_config("llama"))
        shutil.copy(file, directory / "pristine")
    raw = bytearray((directory / "pristine").read_bytes())
    raw[position : position + len(noise)] = noise
    file.write_bytes(raw)
    try:
        CheckpointSource.open(str(directory))
    except CheckpointError as error:
        assert len(error.message) < 20_000


def test_odd_header_lengths_are_read(tmp_path: Path) -> None:
    """Unpadded headers occur in the wild: tensors then begin at odd bytes."""
    values = torch.arange(6).bfloat16()
    for padding in range(8):
        text = json.dumps({"t": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}).encode() + b" " * padding
        file = tmp_path / f"{padding}.safetensors"
        file.write_bytes(struct.pack("<Q", len(text)) + text + values.view(torch.uint8).numpy().tobytes())
        assert torch.equal(MappedTensors(read_header(file)).tensor("t"), values.view(2, 3))


def test_a_written_header_is_read_back_by_safetensors(tmp_path: Path) -> None:
    from safetensors import safe_open

    from trtbuild.checkpoints.rank_tensors import TensorSpec

    specs = [
        TensorSpec("a", "I8", (3,)),
        TensorSpec("b", "F32", (2, 2)),
        TensorSpec("c", "BF16", (1,)),
        TensorSpec("d", "U8", (0, 4)),
    ]
    header, offsets = layout_header(specs, {"format": "pt"})
    assert len(header) % 8 == 0
    assert all(offsets[s.name] % {"F32": 4, "BF16": 2}.get(s.dtype, 1) == 0 for s in specs)
    file = tmp_path / "x.safetensors"
    file.write_bytes(header + bytes(3 + 16 + 2))
    assert {name: (e.spec, e.start) for name, e in read_header(file).items()} == {
        s.name: (s, offsets[s.name]) for s in specs
    }
    with safe_open(file, framework="pt") as opened:
        assert sorted(opened.keys()) == ["a", "b", "c", "d"]
        assert opened.metadata() == {"format": "pt"}
