"""Stand-ins for tritonserver, mpirun and srun that start real processes, and a repository to serve with them.

The fake server writes `rankN.json` (its arguments, its environment) into FAKE_RANKS, says what it loads, and answers
/v2/health/ready. Rank 0 drains for 0.3 s on SIGTERM and then tells the others, as a leader does. A file `dieN` in
FAKE_RANKS ends rank N with status 9, at once or while it serves; with `stayN` it does not hear the leader.
"""

from __future__ import annotations

import stat
import sys
from pathlib import Path
from typing import Any

from trtllm_engine import make_trtllm_engine

_SERVER = """
import json, os, re, signal, sys, threading, time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

folder, arguments = Path(os.environ["FAKE_RANKS"]), sys.argv[1:]
rank = int(re.search(r"prefix(\\d+)_", " ".join(arguments))[1])
record = {"arguments": arguments, "environment": dict(os.environ), "pid": os.getpid()}
(folder / f"rank{rank}.part").write_text(json.dumps(record))
(folder / f"rank{rank}.part").rename(folder / f"rank{rank}.json")
stopping = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stopping.set())
options = dict(one[2:].split("=", 1) for one in arguments if "=" in one and "load-model" not in one)

class Ready(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/v2/health/ready" else 404)
        self.end_headers()

    def log_message(self, *_):
        pass

if not (folder / f"die{rank}").exists():
    server = HTTPServer(("127.0.0.1", int(options["http-port"])), Ready)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("I1122 1 model_lifecycle.cc:849] successfully loaded 'tensorrt_llm'", flush=True)
while True:
    if (folder / f"die{rank}").exists():
        print(f"E1122 1 rank {rank}: CUDA error: an illegal memory access", flush=True)
        os._exit(9)
    if rank == 0 and stopping.is_set():
        time.sleep(0.3)
        (folder / "drained").touch()
        os._exit(0)
    if rank and (folder / "drained").exists() and not (folder / f"stay{rank}").exists():
        os._exit(0)
    time.sleep(0.02)
"""

_MPIRUN = """
import os, signal, subprocess, sys, time

arguments, contexts = sys.argv[1:], []
first = arguments.index("-n")
for part in arguments[first:]:
    if part == "-n":
        contexts.append([])
    contexts[-1].append(part)
commands = []
for one in contexts:
    assert one[:2] == ["-n", "1"], one
    one = one[2:]
    while one[0] == "-x":
        assert one[1] in os.environ, one[1]
        one = one[2:]
    commands.append([part for part in one if part != ":"])
# As Open MPI does: a process group for each, in our session.
ranks = [subprocess.Popen(one, preexec_fn=os.setpgrp) for one in commands]

def end(*_):
    for one in ranks:
        one.kill()
    sys.exit(143)

signal.signal(signal.SIGTERM, end)
while any(one.poll() is None for one in ranks):
    for number, one in enumerate(ranks):
        if one.poll():
            print("mpirun detected that one or more processes exited with non-zero status, thus causing")
            print("the job to be terminated. The first process to do so was:")
            print(f"  Process name: [[1,1],{number}]")
            print(f"  Exit code:    {one.returncode}", flush=True)
            for other in ranks:
                other.kill()
            sys.exit(one.returncode)
    time.sleep(0.02)
"""

_SRUN = """
import os, re, signal, subprocess, sys, time

arguments = sys.argv[1:]
size = int(next(one for one in arguments if one.startswith("--ntasks=")).split("=")[1])
command = arguments[arguments.index("bash"):]
ranks = [subprocess.Popen(command, env={**os.environ, "SLURM_PROCID": str(rank)}) for rank in range(size)]
signal.signal(signal.SIGTERM, lambda *_: [one.terminate() for one in ranks])
while any(one.poll() is None for one in ranks):
    for number, one in enumerate(ranks):
        if one.poll():
            print(f"srun: error: node1: task {number}: Exited with exit code {one.returncode}", flush=True)
            for other in ranks:
                other.kill()
            sys.exit(one.returncode)
    time.sleep(0.02)
"""


def make_programs(folder: Path) -> Path:
    """`folder` with the programs tritonserver, mpirun and srun; the path of the server."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {"tritonserver": _SERVER, "mpirun": _MPIRUN, "srun": _SRUN}.items():
        file = folder / name
        file.write_text(f"#!{sys.executable} -S\n{text}")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return folder / "tritonserver"


def make_repository(folder: Path, models: dict[str, dict[str, Any]] | None = None) -> Path:
    """A repository with `preprocessing`, and a model of the C++ backend for each of `models`.

    Their values: `parameters` and `count` of config.pbtxt; the rest goes to `make_trtllm_engine`.
    """
    repository = folder / "models"
    _write(repository, "preprocessing", "python", {}, 1)
    for name, given in ({"tensorrt_llm": {}} if models is None else models).items():
        rest = {key: value for key, value in given.items() if key not in ("parameters", "count")}
        engine = make_trtllm_engine(folder / "engines" / name, **rest)
        parameters = {"gpt_model_path": str(engine), **given.get("parameters", {})}
        _write(repository, name, "tensorrtllm", parameters, given.get("count", 1))
    return repository


def _write(repository: Path, name: str, backend: str, parameters: dict[str, str], count: int) -> None:
    (repository / name / "1").mkdir(parents=True)
    lines = [f'name: "{name}"', f'backend: "{backend}"', "max_batch_size: 4"]
    lines.append(f"instance_group [ {{ count: {count} kind: KIND_CPU }} ]")
    lines += [f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}' for key, value in parameters.items()]
    (repository / name / "config.pbtxt").write_text("\n".join(lines) + "\n")
