"""A run survives what happens to it."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from trtbuild.errors import CheckpointError, Refused
from trtbuild.perf.records import ClientFigures, Load, Measured, Point, PointSpec, RequestRecord
from trtbuild.perf.run_directory import POINTS, RunDirectory
from trtbuild.perf.sweep import Sweep

SWEEP = Sweep.create(engines="a", concurrency="1")


def point(point_id: str, valid: bool = True) -> Point:
    spec = PointSpec("a", "native", Load("concurrency", 1), 8, 4)
    return Point(
        point_id, spec, valid, None if valid else "died", {"name": "a"}, "reference", "cpu", {},
        "2026-01-01T00:00:00+00:00", 1.0, 4, 0, {}, {}, {},
    )  # fmt: skip


def test_points_come_back(tmp_path: Path) -> None:
    with RunDirectory.writing(tmp_path / "run", SWEEP, "command") as run:
        run.add(point("a"))
        run.add(point("b", valid=False))
    assert RunDirectory.open(tmp_path / "run").points() == [point("a"), point("b", valid=False)]
    with pytest.raises(Refused, match=r"no sweep\.json"):
        RunDirectory.open(tmp_path)


@pytest.mark.parametrize("torn", [1, 40, -1])
def test_a_torn_line_is_cut_off(tmp_path: Path, torn: int) -> None:
    with RunDirectory.writing(tmp_path / "run", SWEEP, "command") as run:
        run.add(point("a"))
        whole = (run.path / POINTS).read_bytes()
        run.add(point("b"))
    file = tmp_path / "run" / POINTS
    second = file.read_bytes()[len(whole) :]
    file.write_bytes(whole + second[:torn])
    assert [one.point_id for one in RunDirectory.open(tmp_path / "run").points()] == ["a"]
    with RunDirectory.writing(tmp_path / "run", SWEEP, "command") as run:
        assert file.read_bytes() == whole
        run.add(point("b"))
        assert [one.point_id for one in run.points()] == ["a", "b"]


def test_a_line_that_is_damaged_is_named(tmp_path: Path) -> None:
    with RunDirectory.writing(tmp_path / "run", SWEEP, "command") as run:
        run.add(point("a"))
        (run.path / POINTS).write_bytes(b"{}\n")
        with pytest.raises(CheckpointError, match="line 1"):
            run.points()


def test_an_invalid_point_is_replaced(tmp_path: Path) -> None:
    with RunDirectory.writing(tmp_path / "run", SWEEP, "command") as run:
        run.add(point("a", valid=False))
        run.add(point("b"))
        run.add(point("a"))
        assert (run.path / POINTS).read_bytes().count(b"\n") == 2
        assert {one.point_id: one.valid for one in run.points()} == {"a": True, "b": True}


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with RunDirectory.writing(tmp_path / "run", SWEEP, "command") as run:
        run.add(point("a"))
        before = (run.path / POINTS).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr("trtbuild.perf.run_directory.os.fsync", full)
            with pytest.raises(OSError, match="No space"):
                run.add(point("b"))
        assert (run.path / POINTS).read_bytes() == before
        run.add(point("b"))


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        RunDirectory.writing(tmp_path / "run", SWEEP, "command"),
        pytest.raises(Refused, match="another"),
        RunDirectory.writing(tmp_path / "run", SWEEP, "command"),
    ):
        pass


def test_raw_records_come_back(tmp_path: Path) -> None:
    records = [RequestRecord(1.0, 0.1, [1.5, 1.75], 8, 2, finish_reason="length", end_s=1.75)]
    records.append(replace(records[0], token_times_s=[], error="timeout"))
    with RunDirectory.writing(tmp_path / "run", SWEEP, "command") as run:
        run.write_raw("a", Measured(records, ClientFigures(0.1, 0.0), window=(0.5, 2.0)))
        assert run.read_raw("a") == (records, (0.5, 2.0))
        with pytest.raises(CheckpointError, match="sweep again"):
            run.read_raw("b")
