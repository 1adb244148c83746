"""Two commands at once, a full disk, signals: nothing half-written, nothing left running, and the work goes on."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from helpers import make_checkpoint

from trtbuild.cli import main

NAME = "qwen-bf16-tp2"


def trtbuild(*arguments: str) -> tuple[int, str]:
    """Exit code and stderr of a command in this process; what would be a traceback is raised."""
    result = CliRunner().invoke(main, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stderr


def start(*arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """A command as a process group of its own."""
    command = [sys.executable, "-m", "trtbuild", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=env
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 1 MiB of weights."""
    directory = tmp_path_factory.mktemp("hf") / "qwen"
    return make_checkpoint(directory, "qwen2", hidden_size=128, intermediate_size=512, vocab_size=512)


def rank_bytes(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.glob("rank*.safetensors"))}


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    workspace = tmp_path_factory.mktemp("whole")
    assert trtbuild("convert", str(source), "--tp", "2", "--workspace", str(workspace))[0] == 0
    return rank_bytes(workspace / "build" / NAME)


def test_two_at_once_on_one_name(source: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    """Started together: one converts, each other one says that it is being written, or finds it finished."""
    command = ["convert", str(source), "--tp", "2", "--workspace", str(tmp_path)]
    processes = [start(*command) for _ in range(3)]
    errors = {process.pid: process.communicate(timeout=120)[1] for process in processes}
    codes = [process.returncode for process in processes]
    assert 0 in codes
    for process in processes:
        assert process.returncode in (0, 3), errors[process.pid]
        if process.returncode == 3:
            assert "is being written by another trtbuild process" in errors[process.pid]
    assert rank_bytes(tmp_path / "build" / NAME) == undisturbed


def test_the_second_is_refused_while_the_first_works(source: Path, tmp_path: Path) -> None:
    """The first is stopped (SIGSTOP) in the middle of its work."""
    command = ["convert", str(source), "--tp", "2", "--workspace", str(tmp_path)]
    first = start(*command)
    wait_for(lambda: (tmp_path / "build" / f".{NAME}.partial").exists() or first.poll() is not None)
    first.send_signal(signal.SIGSTOP)
    try:
        if (tmp_path / "build" / NAME).exists():
            pytest.skip("the first one was too fast to be stopped")
        code, stderr = trtbuild(*command)
        assert code == 3
        assert re.fullmatch(rf"error: .*{NAME} is being written by another trtbuild process; wait .*\n", stderr)
    finally:
        first.send_signal(signal.SIGCONT)
        first.communicate(timeout=60)
    assert first.returncode == 0
    assert trtbuild(*command)[0] == 0


def wait_for(condition: Callable[[], object], timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty tmpfs; `resize` gives it a size."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(directory)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def resize(directory: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(directory)], check=True)


def test_a_disk_that_is_too_small_is_told_beforehand(
    small_disk: Path, source: Path, undisturbed: dict[str, bytes]
) -> None:
    needed = sum(map(len, undisturbed.values()))
    resize(small_disk, needed // 2)
    command = ["convert", str(source), "--tp", "2", "--workspace", str(small_disk)]
    code, stderr = trtbuild(*command)
    assert code == 3
    assert re.search(r"the rank checkpoint takes 1\.\d MiB, 0\.\d MiB are free", stderr)
    assert stderr.count("error:") == 1
    assert not (small_disk / "build" / NAME).exists()
    assert not list(small_disk.rglob("rank*.safetensors"))
    resize(small_disk, 4 * needed)
    assert trtbuild(*command)[0] == 0
    assert rank_bytes(small_disk / "build" / NAME) == undisturbed


def test_a_disk_that_fills_up_later_is_a_clean_error_and_resumable(
    small_disk: Path, source: Path, undisturbed: dict[str, bytes]
) -> None:
    """Room for the rank files and a few pages: the journal, then the JSON files, find none, one after the other."""
    page = os.sysconf("SC_PAGE_SIZE")
    needed = sum(-(-len(content) // page) * page for content in undisturbed.values())
    command = ["convert", str(source), "--tp", "2", "--workspace", str(small_disk)]
    codes, failed_at = [], set[str]()
    for pages in range(30):
        resize(small_disk, needed + pages * page)
        code, stderr = trtbuild(*command)
        codes.append(code)
        if code == 0:
            break
        assert code in (1, 3)
        assert len(re.findall("^error: ", stderr, re.MULTILINE)) == 1, stderr
        assert not (small_disk / "build" / NAME).exists()
        failed_at |= set(re.findall(r"([\w.]+): No space left on device", stderr))
    assert codes[-1] == 0, codes
    assert 1 in codes, codes
    assert failed_at
    assert rank_bytes(small_disk / "build" / NAME) == undisturbed


def test_a_full_disk_under_compile(small_disk: Path) -> None:
    """Foreseen; and, where the forecast is overruled, a clean error. On a larger disk the same command goes on."""
    command = [
        "compile", "tiny-qwen2", "--plan-only", "--target", "sm89", "--max-seq-len", "64", "--workers", "1",
        "--workspace", str(small_disk),
    ]  # fmt: skip
    resize(small_disk, 2 << 20)
    code, stderr = trtbuild(*command)
    assert (code, "of disk, 0.00 GiB are free" in stderr) == (3, True), stderr
    assert not list(small_disk.iterdir())
    code, stderr = trtbuild(*command, "--no-fit-check")
    assert code == 1, stderr
    assert re.search(r"^error: .*No space left on device$", stderr, re.MULTILINE), stderr
    assert "Traceback" not in stderr
    assert not list((small_disk / "engines").glob("[!.]*"))
    resize(small_disk, 64 << 20)
    assert trtbuild(*command)[0] == 0


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; an orphan may stay a zombie until somebody reaps it."""
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found += [process] if process.status() != psutil.STATUS_ZOMBIE else []
    return found


COMPILE = ["compile", "tiny-qwen2", "--precision", "bf16", "--target", "sm89", "--max-seq-len", "64", "--workers", "2"]


@pytest.mark.parametrize(
    ("stop", "code", "word"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted"), (signal.SIGKILL, -9, None)],
)
def test_a_stopped_compile_leaves_one_line_and_no_process(
    stop: signal.Signals, code: int, word: str | None, tmp_path: Path
) -> None:
    """SIGINT goes to the whole group, as a terminal sends it; the others to the command alone, as kill does."""
    process = start(*COMPILE, "--workspace", str(tmp_path))
    parent = psutil.Process(process.pid)

    def builders() -> list[psutil.Process]:
        """Build processes that have begun to work: TensorRT is loaded."""
        try:
            found = [child for child in parent.children() if "spawn_main" in " ".join(child.cmdline())]
            return [c for c in found if any("tensorrt" in m.path for m in c.memory_maps())]
        except psutil.NoSuchProcess:
            return []

    wait_for(lambda: builders() or process.poll() is not None)
    running = parent.children(recursive=True)
    if stop == signal.SIGINT:
        os.killpg(process.pid, stop)
    else:
        process.send_signal(stop)
    if stop == signal.SIGKILL:
        # At once: a build that merely ended would take seconds.
        process.wait(timeout=10)
        wait_for(lambda: not alive(running), timeout_s=0.7)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert running
    wait_for(lambda: not alive(running), timeout_s=10)
    assert "Traceback" not in stderr
    if word:
        last = stderr.strip().splitlines()[-1]
        assert last == f"{word}; convert, compile and perf sweep go on where they were when given again"
    assert not list((tmp_path / "engines").glob("[!.]*"))
    shutil.rmtree(tmp_path / "engines")


@pytest.mark.slow
def test_a_hub_that_never_answers_is_told_soon(tmp_path: Path) -> None:
    """It takes connections, and that is all."""
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen(8)
        endpoint = f"http://127.0.0.1:{hole.getsockname()[1]}"
        environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}
        started = time.monotonic()
        process = start("convert", "owner/model", "--workspace", str(tmp_path / "w"), env=environment)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.fullmatch(r"error: cannot fetch owner/model from the hub \(no answer in 10 s\); .*\n", stderr), stderr
    assert time.monotonic() - started < 40
