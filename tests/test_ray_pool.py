"""--executor ray on a local cluster of two CPUs: the same bytes, whoever is killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner
from helpers import TINY_MIXTRAL, hf_config, random_weights, save_checkpoint

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'trtbuild[ray]'")

import ray_tasks as tasks  # noqa: E402
from ray_driver import HeldPool  # noqa: E402

import trtbuild.checkpoints.convert as convert_module  # noqa: E402
import trtbuild.ray_pool as ray_pool_module  # noqa: E402
from trtbuild.checkpoints.convert import convert  # noqa: E402
from trtbuild.checkpoints.journal import Journal  # noqa: E402
from trtbuild.checkpoints.layout import Layout  # noqa: E402
from trtbuild.checkpoints.precision import Precision  # noqa: E402
from trtbuild.checkpoints.source import CheckpointSource  # noqa: E402
from trtbuild.cli import main  # noqa: E402
from trtbuild.engines.passport import Passport  # noqa: E402
from trtbuild.errors import CheckFailed, Refused, TrtBuildError  # noqa: E402
from trtbuild.ray_pool import RETRIES, RayPool, versions  # noqa: E402

TESTS = Path(__file__).parent
LAYOUT, INT4 = Layout.resolve(2), Precision("int4", "bf16")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a cluster that ends with the module."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # The cluster's processes inherit it: where workers find ray_tasks.
    os.environ["PYTHONPATH"] = str(TESTS)
    before = signal.getsignal(signal.SIGTERM)
    context = ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=40,
        object_store_memory=100 * 2**20,
    )  # fmt: skip
    signal.signal(signal.SIGTERM, before)
    try:
        yield context.address_info["gcs_address"]
    finally:
        ray.shutdown()
        del os.environ["PYTHONPATH"]


@pytest.fixture
def pool(cluster: str, tmp_path: Path) -> Iterator[RayPool]:
    with RayPool(cluster, tmp_path, 2) as pool:
        yield pool


@pytest.fixture(scope="module")
def local_int4(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """tiny-mixtral, converted by threads of this process."""
    out = tmp_path_factory.mktemp("local") / "m"
    convert(CheckpointSource.open("tiny-mixtral"), out, LAYOUT, INT4, workers=2)
    return contents(out)


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_results_failures_and_deaths(pool: RayPool, tmp_path: Path) -> None:
    assert pool.num_workers == 2
    found = list(pool.run(tasks.square, range(9), memory_bytes=1 << 60))
    assert sorted(number for _, number in found) == [n * n for n in range(9)]
    assert os.getpid() not in {pid for pid, _ in found}
    assert len({pid for pid, _ in found}) <= 4
    alone = list(pool.run(tasks.square, range(3), own_process=True))
    assert len({pid for pid, _ in alone}) == 3

    with pytest.raises(CheckFailed, match=r"^number 2: bad\nand a second line$") as failed:
        list(pool.run(partial(tasks.fail_at_two, tmp_path), (1, 2, 3, 4, 5, 6)))
    assert failed.value.exit_code == 4
    # What ran was ended, what waited has never begun.
    assert {file.name for file in tmp_path.iterdir()} <= {"1", "2", "3"}
    with pytest.raises(OSError, match="No space left") as full:
        list(pool.run(tasks.disk_full, [1]))
    assert full.value.filename == "/data/file"
    with pytest.raises(ZeroDivisionError, match="a bug"):
        list(pool.run(tasks.mistake, [1]))

    (tmp_path / "deaths").mkdir()
    with pytest.raises(TrtBuildError, match=f"a Ray worker died at the same task {RETRIES + 1} times"):
        list(pool.run(partial(tasks.die, tmp_path / "deaths"), [1]))
    assert len(list((tmp_path / "deaths").iterdir())) == RETRIES + 1


def test_closing_ends_what_runs(pool: RayPool, tmp_path: Path) -> None:
    """As Ctrl-C does: the consumer goes away."""
    with closing(pool.run(partial(tasks.outlast, tmp_path), [0, 1])) as results:
        assert next(results) == 0
        [pid] = held_pids(tmp_path)
        assert psutil.pid_exists(pid)
    tasks.wait_for(lambda: not psutil.pid_exists(pid), 10)


class Alarm(BaseException):
    """As cli._Terminated, which SIGTERM raises."""


def test_a_signal_ends_what_runs(pool: RayPool, tmp_path: Path) -> None:
    """The exception of a handler comes out as itself, from wherever the pool waits."""

    def ring(*_: object) -> None:
        raise Alarm

    before = signal.signal(signal.SIGALRM, ring)
    alarm = threading.Thread(
        target=lambda: (tasks.wait_for(lambda: bool(held_pids(tmp_path))), os.kill(os.getpid(), signal.SIGALRM))
    )
    alarm.start()
    try:
        with pytest.raises(Alarm):
            list(pool.run(partial(tasks.outlast, tmp_path), [1]))
    finally:
        alarm.join()
        signal.signal(signal.SIGALRM, before)
    [pid] = held_pids(tmp_path)
    tasks.wait_for(lambda: not psutil.pid_exists(pid), 10)


def test_machines_that_differ_or_do_not_share_are_refused(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ray_pool_module, "versions", lambda: versions() | {"torch": "1.0", "trtbuild": "9.9"})
        with pytest.raises(Refused) as refused, RayPool(cluster, tmp_path):
            pass
    assert re.search(r"torch is 1\.0 here and \d+\.\S+ on \S+; install the same", refused.value.message)
    assert "trtbuild is 9.9 here and 0." in refused.value.message

    @contextlib.contextmanager
    def elsewhere(workspace: Path) -> Iterator[Path]:
        yield workspace / "not-here" / "nonce"

    with monkeypatch.context() as patch:
        patch.setattr(ray_pool_module, "_nonce", elsewhere)
        with pytest.raises(Refused, match=rf"does not see {tmp_path}, .* that all machines share"):
            RayPool(cluster, tmp_path).__enter__()
    with RayPool(cluster, tmp_path):
        assert not list(tmp_path.iterdir())


def test_no_cluster_is_one_clear_refusal(tmp_path: Path) -> None:
    """In a process that is connected to none."""
    command = ["convert", "tiny-qwen2", "--workspace", str(tmp_path)]
    found = run_cli(*command, "--executor", "ray", "--ray-address", "ray://here:1")
    assert (found.exit_code, found.stdout) == (3, "")
    assert found.stderr.startswith("error: --ray-address ray://here:1: Ray Client is not used")
    found = run_cli(*command, "--ray-address", "here:1")
    assert (found.exit_code, found.stderr) == (3, "error: --ray-address here:1 is for --executor ray\n")
    run = [sys.executable, "-m", "trtbuild", *command, "--executor", "ray", "--ray-address", "127.0.0.1:9"]
    alone = subprocess.run(run, capture_output=True, text=True, check=False, timeout=60)
    assert (alone.returncode, alone.stdout) == (3, "")
    assert re.fullmatch(r"error: --executor ray: no Ray cluster at 127.0.0.1:9 \(.*\); `ray start .*\n", alone.stderr)
    assert not (tmp_path / "build").exists()


def test_a_killed_worker_changes_nothing(pool: RayPool, tmp_path: Path, local_int4: dict[str, bytes]) -> None:
    """SIGKILL in the middle of a batch, of which a part is written: another worker does it again."""
    killed: list[int] = []

    def kill_one_and_go() -> None:
        tasks.wait_for(lambda: len(held_pids(tmp_path)) == 2)
        killed.append(held_pids(tmp_path)[0])
        os.kill(killed[0], signal.SIGKILL)
        (tmp_path / "go").touch()

    killer = threading.Thread(target=kill_one_and_go)
    killer.start()
    out = tmp_path / "build" / "m"
    convert(CheckpointSource.open("tiny-mixtral"), out, LAYOUT, INT4, pool=HeldPool(pool, tmp_path, 2))
    killer.join()
    assert not psutil.pid_exists(killed[0])
    assert contents(out) == local_int4


def held_pids(folder: Path) -> list[int]:
    return sorted(int(file.name.removeprefix("pid-")) for file in folder.glob("pid-*"))


@pytest.mark.slow
def test_a_killed_command_goes_on_without_ray(
    cluster: str, tmp_path: Path, local_int4: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 of the driver while two batches are held; Ray ends its tasks, and threads do the rest."""
    out, folder = tmp_path / "build" / "m", tmp_path / "held"
    folder.mkdir()
    command = [sys.executable, str(TESTS / "ray_driver.py"), cluster, "tiny-mixtral", str(out), str(folder), "3"]
    process = subprocess.Popen(command)
    journal = out.with_name(".m.partial") / "journal.jsonl"
    try:
        tasks.wait_for(lambda: len(held_pids(folder)) == 2 and journal.stat().st_size > 0)
    finally:
        process.kill()
        process.wait()
    finished = set(Journal(journal).entries)
    tasks.wait_for(lambda: not any(psutil.pid_exists(pid) for pid in held_pids(folder)))
    filled: list[str] = []
    fill = convert_module.fill_unit
    monkeypatch.setattr(
        convert_module, "fill_unit", lambda unit, *rest: (filled.append(unit.key), fill(unit, *rest))[1]
    )
    convert(CheckpointSource.open("tiny-mixtral"), out, LAYOUT, INT4, workers=2)
    assert contents(out) == local_int4
    assert finished
    assert filled
    assert not finished & set(filled)


def run_cli(*arguments: str) -> Any:
    return CliRunner().invoke(main, arguments)


@pytest.mark.slow
def test_compile_on_ray(cluster: str, tmp_path: Path, local_int4: dict[str, bytes]) -> None:
    """Rank files to the byte, plans compiled and verified by workers; the executor is no part of the request."""
    flags = [
        "--precision",
        "int4",
        "--tp",
        "2",
        "--target",
        "sm89",
        "--max-seq-len",
        "128",
        "--workspace",
        str(tmp_path),
    ]
    ran = run_cli("compile", str(TINY_MIXTRAL), *flags, "--executor", "ray", "--ray-address", cluster)
    assert ran.exit_code == 0, ran.output
    engine = tmp_path / "engines" / "tiny-mixtral-int4-tp2"
    for rank in range(2):
        assert (engine / f"rank{rank}.safetensors").read_bytes() == local_int4[f"rank{rank}.safetensors"]
    passport = Passport.open(engine)
    passport.check_files()
    assert [plan["kind"] for plan in passport.data["plans"]] == ["embed", "decoder", "head", "decoder"]
    assert all(plan["verification"]["world_size"] == 2 for plan in passport.data["plans"] if plan["kind"] == "decoder")
    assert "--executor" not in passport.rebuild
    assert not list(engine.rglob(".*"))
    again = run_cli("compile", str(TINY_MIXTRAL), *flags, "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["passport"] == passport.data


def test_a_damaged_weight_is_told_as_without_ray(cluster: str, tmp_path: Path) -> None:
    config = hf_config("mixtral", num_hidden_layers=1)
    weights = random_weights(config)
    weights["model.layers.0.self_attn.o_proj.weight"][3, 5] = float("nan")
    model = save_checkpoint(tmp_path / "hf" / "m", config, weights)
    command = ["convert", str(model), "--precision", "int4", "--workspace", str(tmp_path)]
    found = run_cli(*command, "--executor", "ray", "--ray-address", cluster)
    expected = run_cli(*command)
    assert found.exit_code == expected.exit_code == 1
    errors = [[line for line in result.stderr.splitlines() if "error" in line] for result in (found, expected)]
    assert errors[0] == errors[1] == ["error: layers.0.o holds NaN or Inf; the checkpoint is damaged"]
    assert {file.name for file in (tmp_path / "build").iterdir() if not file.name.startswith(".")} == set()
