"""A killed calibration goes on with its next layer, and what was found is used by every layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import TINY_MIXTRAL

from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.engines.calibration import ranges as calibration
from trtbuild.engines.calibration.ranges import calibrate, calibrate_once
from trtbuild.engines.calibration.text import CalibrationText
from trtbuild.progress import Progress

TEXT = CalibrationText("eval", (TINY_MIXTRAL / "eval.txt").read_text()[:6000])


class Killed(Exception):
    pass


class Layers:
    """A progress factory that counts layers and dies after some of them."""

    def __init__(self, die_after: int | None = None) -> None:
        self.found, self.computed, self._die_after = -1, 0, die_after

    @contextmanager
    def __call__(self, title: str, total: float, unit: str = "") -> Iterator[Progress]:
        yield self

    def advance(self, amount: float = 1.0, detail: str = "") -> None:
        # The first call tells what an earlier run left.
        if self.found < 0:
            self.found = int(amount)
            return
        self.computed += 1
        if self.computed == self._die_after:
            raise Killed


@pytest.fixture(scope="module")
def source() -> CheckpointSource:
    return CheckpointSource.open("tiny-mixtral")


@pytest.mark.parametrize("damage", [None, "ranges.jsonl", "hidden.safetensors"])
def test_an_interrupted_calibration_goes_on(source: CheckpointSource, tmp_path: Path, damage: str | None) -> None:
    expected = calibrate(source, TEXT)
    with pytest.raises(Killed):
        calibrate(source, TEXT, directory=tmp_path, progress=Layers(die_after=2))
    if damage:
        file = tmp_path / damage
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    layers = Layers()
    assert calibrate(source, TEXT, directory=tmp_path, progress=layers) == expected
    assert layers.found + layers.computed == source.config.num_layers == 3
    assert layers.found == (0 if damage else 2)


def test_every_layout_uses_what_was_found(
    source: CheckpointSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ".calibration"
    with pytest.raises(Killed):
        calibrate_once(source, TEXT, folder, progress=Layers(die_after=1))
    first = calibrate_once(source, TEXT, folder, progress=Layers())
    [directory] = folder.glob("[!.]*")
    assert {file.name for file in directory.iterdir()} == {"ranges.json", "record.json", "request.json"}
    monkeypatch.setattr(calibration, "calibrate", lambda *_, **__: pytest.fail("calibrated again"))
    assert calibrate_once(source, TEXT, folder) == first
    other = CalibrationText("other", TEXT.text + " thee")
    with pytest.raises(pytest.fail.Exception):
        calibrate_once(source, other, folder)
