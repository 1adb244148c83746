"""An engine worker that several processes share: the first that needs it starts it, the last that leaves ends it.

Triton runs every Python model in a process of its own, and text, unary and token-level models of an engine must share
one copy of its weights. The worker belongs to none of them: it lives as long as somebody is connected, and
`LINGER_S` longer, so that a killed client finds it again. Free of torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from trtbuild.engines.serving.client import WorkerClient
from trtbuild.engines.serving.launch import await_ready, describe_status, worker_command
from trtbuild.errors import Refused, TrtBuildError
from trtbuild.workspace import digest_of

LINGER_S = 10.0
# Of the interpreter that has torch, for a process that embeds another one, as Triton's stub does.
PYTHON_VARIABLE = "TRTBUILD_PYTHON"
# pytriton's Triton needs its bundled CUDA libraries on the path; torch and TensorRT must not find them there.
_FOREIGN_LIBRARIES = "nvidia_pytriton.libs"
# sockaddr_un holds 108 bytes, the socket's own name among them.
_LONGEST_DIRECTORY = 60


class SharedWorker:
    """The worker of `engine_dir` with these options among the processes of `group` (Triton's process id, say).

    `options` are the worker's flags without dashes; None is left out.
    """

    def __init__(self, engine_dir: Path, options: Mapping[str, object], group: str) -> None:
        self._engine_dir = engine_dir
        self._options = dict(options)
        # A packaged engine that was replaced is another engine under the same path.
        passport = (engine_dir / "engine.json").stat()
        identity = [str(engine_dir.resolve()), passport.st_ino, passport.st_mtime_ns, self._options, group]
        self._socket = runtime_directory() / f"{digest_of(identity)[:16]}.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def connect(self, on_lost: Callable[[str], None] | None = None, timeout_s: float = 600.0) -> WorkerClient:
        """A connection to the running worker, or to one that is started now and gets `timeout_s` to load.

        Raises what the worker says where it cannot start.
        """
        with _locked(self._socket.with_suffix(".lock")):
            client = self._try_connect(on_lost)
            if client is None:
                self._start(timeout_s)
                client = self._client(on_lost)
        return client

    def _try_connect(self, on_lost: Callable[[str], None] | None) -> WorkerClient | None:
        if not self._socket.exists():
            return None
        try:
            return self._client(on_lost)
        except TrtBuildError:
            # What a killed worker left behind.
            self._socket.unlink(missing_ok=True)
            return None

    def _client(self, on_lost: Callable[[str], None] | None) -> WorkerClient:
        return WorkerClient(self._socket, describe_end=self._describe_end, on_lost=on_lost)

    def _start(self, timeout_s: float) -> None:
        read_fd, write_fd = os.pipe()
        command = worker_command(
            self._engine_dir,
            self._socket,
            write_fd,
            {**self._options, "linger-seconds": LINGER_S, "prepare-guides": True},
            os.environ.get(PYTHON_VARIABLE) or _python(),
        )
        with os.fdopen(read_fd, "r", encoding="utf-8") as pipe:
            try:
                # Its own session: a Ctrl-C ends Triton, whose end ends it.
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, pass_fds=(write_fd,), start_new_session=True, env=_environment()
                )
            finally:
                os.close(write_fd)
            try:
                await_ready(pipe, self._process, self._engine_dir, None, timeout_s)
            except BaseException:
                self._process.kill()
                self._process.wait()
                raise

    def _describe_end(self) -> str:
        """How the worker ended, as far as this process can know: only its parent learns the status."""
        if self._process is None:
            return "it ended"
        try:
            return describe_status(self._process.wait(timeout=1.0))
        except subprocess.TimeoutExpired:
            return "it closed the connection but still runs"


def _python() -> str:
    if Path(sys.executable or "").name.startswith("python"):
        return sys.executable
    found = shutil.which("python3")
    if found is None:
        raise TrtBuildError(f"no python3 on PATH to run the engine worker with; set {PYTHON_VARIABLE}")
    return found


def _environment() -> dict[str, str]:
    environment = dict(os.environ)
    paths = environment.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    kept = [path for path in paths if path and _FOREIGN_LIBRARIES not in Path(path).parts]
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(kept)
    return environment


def runtime_directory() -> Path:
    """Where sockets are: a directory that only this user can enter."""
    directory = Path(tempfile.gettempdir()) / f"trtbuild-{os.getuid()}"
    if len(os.fsencode(directory)) > _LONGEST_DIRECTORY:
        directory = Path("/tmp") / directory.name
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    found = directory.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or not directory.is_dir():
        raise Refused(f"{directory} must be a directory of this user that nobody else can enter (mode 700)")
    return directory


@contextmanager
def _locked(lock: Path) -> Iterator[None]:
    with lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
