"""A conversion that is killed, anywhere and again and again, goes on to the same bytes."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conversions import LAYOUT, contents, run
from helpers import make_checkpoint

import trtbuild.checkpoints.convert as convert_module
from trtbuild.checkpoints.convert import convert
from trtbuild.checkpoints.journal import Journal
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import Precision, PrecisionName
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.checkpoints.work_units import cut_into_units

pytestmark = pytest.mark.usefixtures("journal_at_once")


FILE_OPERATIONS = {
    "open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "shutil.rmtree", "mmap.__new__", "fcntl.flock",
}  # fmt: skip


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> CheckpointSource:
    directory = make_checkpoint(
        tmp_path_factory.mktemp("hf") / "m", "mixtral", num_hidden_layers=1, num_local_experts=2
    )
    return CheckpointSource.open(str(directory))


def run_and_die(source: CheckpointSource, directory: Path, precision: PrecisionName, at_event: int) -> bool:
    """Convert in a child that kills itself with SIGKILL before its n-th file operation; whether it came that far.

    One worker: torch cannot use new threads after a fork.
    """
    pid = os.fork()
    if pid == 0:
        events = itertools.count(1)

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            if event in FILE_OPERATIONS and next(events) == at_event:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        code = 1
        try:
            run(source, directory, precision)
            code = 0
        finally:  # The child must not return into pytest.
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int4"])
def test_killed_before_any_file_operation_it_resumes(
    one_layer: CheckpointSource, tmp_path: Path, precision: PrecisionName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte-identical to an uninterrupted run, and no finished unit is done twice."""
    source = one_layer
    run(source, tmp_path / "whole", precision)
    expected = contents(tmp_path / "whole")
    plans = [plan_rank(source.config, rank, Precision(precision, "bf16")) for rank in LAYOUT.ranks()]
    all_units = {unit.key for unit in cut_into_units(plans)}
    done: list[str] = []
    fill = convert_module.fill_unit
    monkeypatch.setattr(convert_module, "fill_unit", lambda unit, *rest: (done.append(unit.key), fill(unit, *rest))[1])

    event, resumed = 0, set()
    while True:
        event += 1
        target = tmp_path / "out" / f"at{event}"
        if not run_and_die(source, target, precision, event):
            break
        journal = target.with_name(f".{target.name}.partial") / "journal.jsonl"
        finished = set(Journal(journal).entries) if journal.exists() else set()
        published = target.exists()
        resumed.add(len(finished))
        done.clear()
        run(source, target, precision)
        assert contents(target) == expected, event
        assert sorted(done) == ([] if published else sorted(all_units - finished)), event
        shutil.rmtree(target.parent)
    # Every unit's journal entry was a kill point, and so was each step around them.
    assert event > len(all_units) + 15
    assert resumed >= set(range(len(all_units)))


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_a_rank_file_that_was_lost_in_between_is_written_again(
    one_layer: CheckpointSource, tmp_path: Path, damage: str
) -> None:
    run(one_layer, tmp_path / "whole", "bf16")
    assert run_and_die(one_layer, tmp_path / "out", "bf16", 30)
    partial = tmp_path / ".out.partial"
    assert len(Journal(partial / "journal.jsonl").entries) > 3
    file = partial / "rank1.safetensors"
    file.unlink() if damage == "gone" else os.truncate(file, 1000)
    run(one_layer, tmp_path / "out", "bf16")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_killed_again_and_again(tmp_path: Path) -> None:
    """A run that dies every few operations still ends, in the same bytes."""
    deep = make_checkpoint(tmp_path / "deep", "mixtral", num_hidden_layers=4, shards=2)
    source = CheckpointSource.open(str(deep))
    run(source, tmp_path / "whole", "int8")
    deaths = 0
    # Fewer operations would not reach the first unit after a resumption.
    while run_and_die(source, tmp_path / "out", "int8", 32):
        deaths += 1
        assert deaths < 30, "no run came further than the one before"
    assert deaths >= 4
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


WORKERS_SCRIPT = """
import sys, time
import trtbuild.checkpoints.convert as module
from pathlib import Path
from trtbuild.checkpoints.convert import convert
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import Precision
from trtbuild.checkpoints.source import CheckpointSource
module.SYNC_SECONDS = float(sys.argv[2])
fill = module.fill_unit
module.fill_unit = lambda *arguments: (time.sleep(0.01), fill(*arguments))[1]
source, precision = CheckpointSource.open("tiny-mixtral"), Precision("int4", "bf16")
convert(source, Path(sys.argv[1]), Layout.resolve(2), precision, workers=3)
"""


@pytest.mark.parametrize("sync_seconds", ["0", "0.05"])
def test_killed_with_several_workers(sync_seconds: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL once some units are journalled, whatever the others (and the journal's thread) do at that moment."""
    source, layout, precision = CheckpointSource.open("tiny-mixtral"), Layout.resolve(2), Precision("int4", "bf16")
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    for num_bytes in (1, 16_000):
        with subprocess.Popen([sys.executable, "-c", WORKERS_SCRIPT, str(tmp_path / "out"), sync_seconds]) as process:
            while process.poll() is None and not (journal.exists() and journal.stat().st_size >= num_bytes):
                time.sleep(0.001)
            process.kill()
        assert process.returncode == -signal.SIGKILL
    finished, done = set(Journal(journal).entries), []
    fill = convert_module.fill_unit
    monkeypatch.setattr(convert_module, "fill_unit", lambda unit, *rest: (done.append(unit.key), fill(unit, *rest))[1])
    convert(source, tmp_path / "out", layout, precision, workers=3)
    units = {
        unit.key for unit in cut_into_units([plan_rank(source.config, rank, precision) for rank in layout.ranks()])
    }
    assert 20 < len(finished) < len(units)
    assert sorted(done) == sorted(units - finished)
    convert(source, tmp_path / "whole", layout, precision)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
