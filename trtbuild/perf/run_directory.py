"""A run on disk: sweep.json, points.jsonl, raw/ and telemetry/; readable at every moment, whatever was killed.

A point is in points.jsonl once it is complete: its line is written and on disk last. A torn last line is cut off.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trtbuild.errors import CheckpointError, Refused
from trtbuild.perf.records import Measured, Point, RequestRecord
from trtbuild.perf.sweep import Sweep
from trtbuild.workspace import atomic_file, locked, write_atomic, write_json

SWEEP, POINTS, RAW, TELEMETRY = "sweep.json", "points.jsonl", "raw", "telemetry"


class RunDirectory:
    """perf/runs/NAME."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        return self.path.name

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """One that is there, to read it; `Refused` where it is no run."""
        if not (path / SWEEP).is_file():
            raise Refused(f"{path}: no {SWEEP}; this is not a run (trtbuild perf sweep makes one)")
        return cls(path)

    @classmethod
    @contextmanager
    def writing(cls, path: Path, sweep: Sweep, command: str) -> Iterator[RunDirectory]:
        """The run, for one process at a time; points of an earlier sweep of that name stay."""
        path.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f".{path.name}.lock"), path):
            run = cls(path)
            for folder in (RAW, TELEMETRY):
                (path / folder).mkdir(exist_ok=True)
            run._cut_torn_line()
            write_json(path / SWEEP, {"sweep": sweep.to_dict(), "digest": sweep.digest, "command": command})
            yield run

    def points(self) -> list[Point]:
        """The complete ones, in the order that they were measured; of one measured again, the last."""
        found: dict[str, Point] = {}
        for number, line in enumerate(self._lines(), 1):
            try:
                point = Point.from_dict(json.loads(line))
            except (ValueError, TypeError, KeyError) as error:
                raise CheckpointError(
                    f"{self.path / POINTS}, line {number}: {error!r}; remove that line, and sweep again"
                ) from error
            found[point.point_id] = point
        return list(found.values())

    def add(self, point: Point) -> None:
        """Append, on disk when it returns. An invalid point is replaced by the one that is measured after it."""
        if any(one.point_id == point.point_id for one in self.points()):
            kept = [one for one in self.points() if one.point_id != point.point_id]
            write_atomic(self.path / POINTS, b"".join(_line(one) for one in (*kept, point)))
            return
        with (self.path / POINTS).open("ab") as file:
            before = file.tell()
            try:
                file.write(_line(point))
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                # A full disk: nothing half-written stays.
                os.truncate(self.path / POINTS, before)
                error.filename = str(self.path / POINTS)
                raise

    def write_raw(self, point_id: str, measured: Measured) -> None:
        """Every request of the point, with the window of those that count."""
        content = {"window": measured.window, "records": [record.to_dict() for record in measured.records]}
        with (
            atomic_file(self.raw(point_id).with_suffix(".json.gz")) as file,
            gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as packed,
        ):
            packed.write(json.dumps(content, separators=(",", ":")).encode())

    def read_raw(self, point_id: str) -> tuple[list[RequestRecord], tuple[float, float] | None]:
        """The records, and the window."""
        file = self.raw(point_id).with_suffix(".json.gz")
        try:
            content: dict[str, Any] = json.loads(gzip.decompress(file.read_bytes()))
        except (OSError, EOFError, ValueError) as error:
            raise CheckpointError(f"{file}: {error}; sweep again") from error
        window = content["window"]
        return [RequestRecord.from_dict(one) for one in content["records"]], tuple(window) if window else None

    def raw(self, point_id: str) -> Path:
        """Without a suffix: drivers put their exports there under names that begin so."""
        return self.path / RAW / point_id

    def telemetry(self, point_id: str) -> Path:
        return self.path / TELEMETRY / f"{point_id}.csv"

    def _lines(self) -> list[bytes]:
        """Whole ones."""
        file = self.path / POINTS
        return file.read_bytes().split(b"\n")[:-1] if file.is_file() else []

    def _cut_torn_line(self) -> None:
        file = self.path / POINTS
        if file.is_file():
            os.truncate(file, sum(len(line) + 1 for line in self._lines()))


def _line(point: Point) -> bytes:
    return json.dumps(point.to_dict(), separators=(",", ":")).encode() + b"\n"
