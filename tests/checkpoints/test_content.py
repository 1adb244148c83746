"""Content digests: what is noticed of a changed source or rank checkpoint, and when."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import xxhash
from helpers import make_checkpoint, raw_bytes

import trtbuild.checkpoints.convert as convert_module
from trtbuild.checkpoints.content import changed_tensors, source_digest
from trtbuild.checkpoints.convert import ActivationRange, Calibration, convert
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import Precision, PrecisionName
from trtbuild.checkpoints.rank_checkpoint import RankCheckpoint, verify_content, weights_digest
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.safetensors_file import read_header
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.checkpoints.work_units import cut_into_units
from trtbuild.errors import CheckFailed, CheckpointError, Refused

LAYOUT = Layout.resolve(2)
# In the middle of this tensor, where the cheap digest does not look.
TENSOR = "model.layers.1.block_sparse_moe.experts.2.w3.weight"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "hf", "mixtral", num_hidden_layers=2)


def run(directory: Path, out: Path, precision: PrecisionName = "bf16", **options: Any) -> RankCheckpoint:
    source = CheckpointSource.open(str(directory))
    plan = plan_rank(source.config, Layout().rank(0), Precision("fp8", "bf16"))
    calibration = Calibration({}, lambda: {linear.global_name: ActivationRange(3.0) for linear in plan.linears})
    return convert(
        source, out, LAYOUT, Precision(precision, "bf16"), calibration=calibration if precision == "fp8" else None,
        **options,
    )  # fmt: skip


def flip_bit(file: Path, position: int, *, keep_mtime: bool = False) -> None:
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(position)
        value = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([value ^ 1]))
    if keep_mtime:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_mtime_ns == before.st_mtime_ns


def middle(directory: Path, name: str = TENSOR) -> tuple[Path, int]:
    [file] = directory.glob("*.safetensors")
    entry = read_header(file)[name]
    # Of a bf16 value the low byte, so that no NaN comes of it.
    return file, entry.start + entry.num_bytes // 4 * 2


@pytest.mark.parametrize("precision", ["bf16", "int4", "int8", "fp8"])
def test_digests_are_those_of_the_bytes(directory: Path, tmp_path: Path, precision: PrecisionName) -> None:
    """Of every source tensor and every rank tensor, by another way of computing them."""
    checkpoint = run(directory, tmp_path / "out", precision)
    source = CheckpointSource.open(str(directory))
    recorded = checkpoint.authority["source"]["tensors"]
    assert len(recorded) == len(source.entries)
    for name, digest in recorded.items():
        assert digest == xxhash.xxh3_128_hexdigest(raw_bytes(source.tensor(name))) == source_digest(source, name)
    for rank, digests in enumerate(checkpoint.authority["digests"]):
        assert list(digests) == [spec.name for spec in checkpoint.plans[rank].tensors()]
        for name, digest in digests.items():
            tensor = checkpoint.tensor(rank, name)
            if tensor.dim() == 3 or (
                (".mlp.f" in name or ".mlp.p" in name)
                and name.endswith(("weights_scaling_factor", "per_channel_scale"))
            ):
                parts = b"".join(xxhash.xxh3_128_digest(raw_bytes(expert)) for expert in tensor)
                assert digest == xxhash.xxh3_128_hexdigest(parts), name
            else:
                assert digest == xxhash.xxh3_128_hexdigest(raw_bytes(tensor)), name
    verify_content(checkpoint)


def test_verify_content_names_what_differs(directory: Path, tmp_path: Path) -> None:
    checkpoint = run(directory, tmp_path / "out", "int4")
    file = tmp_path / "out" / "rank1.safetensors"
    entries = read_header(file)
    for name in ("transformer.layers.1.mlp.fc.weight", "transformer.ln_f.weight", "lm_head.weight"):
        position = entries[name].start + entries[name].num_bytes // 2
        flip_bit(file, position)
        with pytest.raises(CheckpointError, match=rf"differs from what was written: rank1.safetensors: {name}; "):
            verify_content(RankCheckpoint.open(tmp_path / "out"))
        flip_bit(file, position)
    verify_content(checkpoint)


@pytest.mark.parametrize("keep_mtime", [False, True])
def test_one_flipped_bit_of_the_source_is_noticed(directory: Path, tmp_path: Path, keep_mtime: bool) -> None:
    """Also with the time of modification set back: the time of change tells."""
    before = weights_digest(run(directory, tmp_path / "out"))
    flip_bit(*middle(directory), keep_mtime=keep_mtime)
    with pytest.raises(Refused, match=r"other weights: layers\.1\.experts\.2\.up of .* changed; .*--force"):
        run(directory, tmp_path / "out")
    assert weights_digest(run(directory, tmp_path / "out", force=True)) != before
    flip_bit(*middle(directory))
    assert weights_digest(run(directory, tmp_path / "again")) == before


def test_a_touched_source_is_read_once_and_an_untouched_one_never(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(directory, tmp_path / "out")
    reads: list[str] = []
    changed = convert_module.changed_tensors
    monkeypatch.setattr(convert_module, "changed_tensors", lambda s, r: (reads.extend(r), changed(s, r))[1])
    run(directory, tmp_path / "out")
    assert not reads
    [file] = directory.glob("*.safetensors")
    file.touch()
    run(directory, tmp_path / "out")
    assert len(reads) == len(CheckpointSource.open(str(directory)).entries)
    reads.clear()
    run(directory, tmp_path / "out")
    assert not reads
    shutil.copytree(directory, tmp_path / "copy")
    run(tmp_path / "copy", tmp_path / "out")
    assert reads


def interrupted(directory: Path, out: Path, monkeypatch: pytest.MonkeyPatch, num_units: int) -> None:
    """A conversion that ends with an error after some units."""
    fill, left = convert_module.fill_unit, iter(range(num_units))

    def fill_some(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise CheckFailed("stop")
        return fill(*arguments)

    with monkeypatch.context() as patch, pytest.raises(CheckFailed):
        patch.setattr(convert_module, "fill_unit", fill_some)
        run(directory, out)


def test_a_source_that_changed_between_two_runs(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was made of the changed tensor is made again, and nothing else."""
    source = CheckpointSource.open(str(directory))
    units = cut_into_units([plan_rank(source.config, rank, Precision("bf16", "bf16")) for rank in LAYOUT.ranks()])
    interrupted(directory, tmp_path / "out", monkeypatch, len(units) - 1)
    flip_bit(*middle(directory), keep_mtime=True)
    done: list[str] = []
    fill = convert_module.fill_unit
    monkeypatch.setattr(convert_module, "fill_unit", lambda unit, *rest: (done.append(unit.key), fill(unit, *rest))[1])
    run(directory, tmp_path / "out")
    [changed] = [unit.key for unit in units if "layers.1.experts.2.up" in unit.sources]
    assert sorted(done) == sorted({changed, units[-1].key})
    run(directory, tmp_path / "whole")
    for name in ("rank0.safetensors", "rank1.safetensors", "trtbuild.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_source_that_changes_while_it_is_read(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flipped: list[bool] = []

    def fill(*arguments: Any) -> Any:
        if not flipped:
            flip_bit(*middle(directory))
            flipped.append(True)
        return original(*arguments)

    original = convert_module.fill_unit
    monkeypatch.setattr(convert_module, "fill_unit", fill)
    with pytest.raises(CheckFailed, match="was changed while it was read; give the command again"):
        run(directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    checkpoint = run(directory, tmp_path / "out")
    assert not changed_tensors(CheckpointSource.open(str(directory)), checkpoint.authority["source"]["tensors"])


def test_an_older_format_is_refused_with_the_fix(directory: Path, tmp_path: Path) -> None:
    run(directory, tmp_path / "out")
    file = tmp_path / "out" / "trtbuild.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 1}))
    with pytest.raises(CheckpointError, match="format 1, this trtbuild reads 2; convert it again with --force"):
        RankCheckpoint.open(tmp_path / "out")


def test_bytes_are_on_disk_before_the_journal_says_so(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every unit that the journal names was written before a sync of all rank files that came before the entry."""
    events: list[str] = []
    fill, sync = convert_module.fill_unit, convert_module.RankFiles.sync
    add = os.fdatasync
    monkeypatch.setattr(convert_module, "SYNC_SECONDS", 0.0)
    monkeypatch.setattr(convert_module, "fill_unit", lambda *a: (fill(*a), events.append("written"))[0])
    monkeypatch.setattr(convert_module.RankFiles, "sync", lambda self: (events.append("sync"), sync(self))[1])
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: (events.append("disk"), add(descriptor))[1])
    run(directory, tmp_path / "out")
    unit = ["written", "sync", "disk", "disk", "disk"]
    assert events[: len(unit) * 5] == unit * 5
