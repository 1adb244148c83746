"""What Triton and the OpenAI front end add to a bare engine worker: time and CPU for each token, and throughput.

    python perf/serving.py [--rounds N] [--concurrency N ...] [--no-throughput] [--save]

The executor takes 20 ms a step (`fixed_step`), so that it is the serving that is measured. All roads lead to the same
worker, and take turns. `added`: how much later than over the worker's own socket a token arrives, counted from the end
of the step that made it; the gaps between tokens (`itl`) cannot show a delay that every token has. CPU is that of each
process but the client, the executor's own taken out. Throughput is once, of tiny-mixtral by the reference executor.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from fixed_step import STEPS_VARIABLE, read_steps
from serving_roads import NAME, Road, openai_body, over_grpc, over_http, over_worker, triton_body

from trtbuild.engines.serving.shared import SharedWorker
from trtbuild.triton_repo.installation import find_triton
from trtbuild.triton_repo.model_config import WorkerSettings
from trtbuild.triton_repo.package import package_engines
from trtbuild.triton_repo.stub_processes import log_format
from trtbuild.triton_repo.triton_process import Ports, TritonProcess
from trtbuild.workspace import Workspace

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "serving.jsonl"
STEP_S = 0.02
# A whole conversation is one stream: long enough for steady state, short enough for many turns of each road.
NUM_TOKENS = 150


@dataclass
class Setting:
    """Everything that runs; `pids` by what the process is."""

    roads: dict[str, Road]
    pids: dict[str, list[int]]
    steps: Path


@dataclass
class Measured:
    """One road at one concurrency; times are ms, CPU is seconds by process."""

    itl: list[float] = field(default_factory=list)
    delay: list[float] = field(default_factory=list)
    cpu_s: dict[str, float] = field(default_factory=dict)
    num_tokens: int = 0
    seconds: float = 0.0


def main() -> None:
    """Print tables; `--save` appends a JSON line for each road and concurrency."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--no-throughput", action="store_true")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        make_engine(Path(place))
        settings = WorkerSettings(loader="fixed_step:load_20ms", slots=128, threads=1)
        with running(Path(place), settings, front_end=True) as setting:
            figures += asyncio.run(overheads(setting, options.concurrency, options.rounds))
        if not options.no_throughput:
            with running(Path(place), WorkerSettings(slots=8, threads=1), front_end=False) as setting:
                figures += asyncio.run(throughput(setting))
    if options.save:
        with RESULTS.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(figure | {"machine": machine()}) + "\n" for figure in figures)


def make_engine(workspace: Path) -> None:
    """The tests' engine without plans, which the reference executor runs."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    from engine_without_plans import make_engine as make

    make(workspace, NAME, model="tiny-mixtral", precision="fp8", max_batch_size=128)


@contextmanager
def running(workspace: Path, settings: WorkerSettings, *, front_end: bool) -> Iterator[Setting]:
    """A worker, Triton over it, and the front end over that."""
    steps = workspace / "steps"
    os.environ[STEPS_VARIABLE] = str(steps)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    os.environ["OMP_NUM_THREADS"] = "1"
    place = Workspace(workspace)
    package_engines(place, [NAME], settings, installation=None)
    with ExitStack() as stack:
        # The group is that of the Triton started here, whose models then find this worker.
        flags = {**settings.flags(), "log-format": log_format()}
        worker = SharedWorker(place.models / NAME / "1" / "engine", flags, f"serve-{os.getpid()}")
        client = stack.enter_context(worker.connect())
        server = stack.enter_context(TritonProcess(find_triton(), place.models, Ports.free()))
        server.wait_ready(120)
        if client.stats()["connections"] < 2:
            raise RuntimeError("Triton's models have started a worker of their own")
        children = psutil.Process(server.process.pid).children()
        pids = {
            "worker": [client.hello["pid"]],
            "tritonserver": [server.process.pid],
            "stub": [child.pid for child in children],
        }
        roads = {
            "worker": over_worker(client),
            "grpc": over_grpc(f"127.0.0.1:{server.ports.grpc}"),
            "http": over_http(server.ports.http, f"/v2/models/{NAME}/generate_stream", triton_body),
        }
        if front_end:
            process, port = stack.enter_context(openai_front_end(server.ports))
            pids["front end"] = [process.pid]
            roads["openai"] = over_http(port, "/v1/completions", openai_body)
        yield Setting(roads, pids, steps)


@contextmanager
def openai_front_end(ports: Ports) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Its process and port."""
    read_fd, write_fd = os.pipe()
    command = [sys.executable, "-m", "trtbuild.triton_repo.openai.server", "--port", "0"]
    command += ["--triton", f"127.0.0.1:{ports.grpc}", "--ready-fd", str(write_fd)]
    process = subprocess.Popen(command, pass_fds=(write_fd,))
    os.close(write_fd)
    try:
        with os.fdopen(read_fd, encoding="utf-8") as pipe:
            yield process, json.loads(pipe.readline())["port"]
    finally:
        process.terminate()
        process.wait()


async def overheads(setting: Setting, concurrencies: list[int], rounds: int) -> list[dict[str, Any]]:
    """Every road in turn, `rounds` times, at each concurrency; at higher ones fewer times, of more streams."""
    await asyncio.gather(*(road(0, 5) for road in setting.roads.values()))
    figures: list[dict[str, Any]] = []
    for concurrency in concurrencies:
        found = {name: Measured() for name in setting.roads}
        loads = [os.getloadavg()[0]]
        for _ in range(rounds if concurrency == 1 else max(1, rounds // 3)):
            for name, road in setting.roads.items():
                await run_once(setting, road, concurrency, found[name])
        loads.append(os.getloadavg()[0])
        figures += [figure_of(name, concurrency, found[name], found["worker"], loads) for name in found]
        print_table(concurrency, figures[-len(found) :])
    return figures


async def run_once(setting: Setting, road: Road, concurrency: int, found: Measured) -> None:
    """All streams of a concurrency at once; adds to `found`."""
    num_records, cpu, begun = len(read_steps(setting.steps)), cpu_of(setting), time.monotonic()
    streams = await asyncio.gather(*(road(index, NUM_TOKENS) for index in range(concurrency)))
    found.seconds += time.monotonic() - begun
    await asyncio.sleep(0.1)
    for name, seconds in cpu_of(setting).items():
        found.cpu_s[name] = found.cpu_s.get(name, 0.0) + seconds - cpu[name]
    found.num_tokens += sum(map(len, streams))
    for times in streams:
        found.itl += [1e3 * (after - before) for before, after in itertools.pairwise(times)]
    if concurrency == 1:
        ends = [at for at, _, num_slots in read_steps(setting.steps)[num_records:] if num_slots]
        found.delay += [1e3 * (came - end) for came, end in zip(streams[0][1:], ends, strict=True)]


def cpu_of(setting: Setting) -> dict[str, float]:
    """Seconds of every process so far; the executor's own are not the worker's."""
    found = {}
    for name, pids in setting.pids.items():
        # The kernel's CPU clock of another process (clock_getcpuclockid): exact, where psutil counts ticks of 10 ms.
        found[name] = sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)
    steps = read_steps(setting.steps)
    found["worker"] -= steps[-1][1] if steps else 0.0
    return found


def figure_of(name: str, concurrency: int, found: Measured, bare: Measured, loads: list[float]) -> dict[str, Any]:
    per_token = {process: round(1e3 * seconds / found.num_tokens, 3) for process, seconds in found.cpu_s.items()}
    figure: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "figure": "serving overhead",
        "road": name,
        "concurrency": concurrency,
        "step_ms": 1e3 * STEP_S,
        "num_tokens": found.num_tokens,
        "itl_ms": percentiles(found.itl),
        "tokens_per_s": round(found.num_tokens / found.seconds, 1),
        "cpu_ms_per_token": per_token | {"all": round(sum(per_token.values()), 3)},
        "load": [round(load, 2) for load in loads],
    }
    if concurrency == 1:
        figure["itl_minus_workers_ms"] = minus(figure["itl_ms"], percentiles(bare.itl))
        figure["delay_ms"] = percentiles(found.delay)
        figure["added_ms"] = minus(figure["delay_ms"], percentiles(bare.delay))
    return figure


def percentiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": round(cuts[49], 3), "p99": round(cuts[98], 3)}


def minus(left: dict[str, float], right: dict[str, float]) -> dict[str, float]:
    return {name: round(left[name] - right[name], 3) for name in left}


def print_table(concurrency: int, figures: list[dict[str, Any]]) -> None:
    print(f"\nconcurrency {concurrency}, steps of {1e3 * STEP_S:g} ms, load {figures[0]['load']}")
    print(
        f"{'road':8} {'ITL p50':>8} {'p99':>8} {'delay p50':>10} {'added p50':>10} {'p99':>8} {'tokens/s':>9}  "
        "CPU ms per token"
    )
    for one in figures:
        unknown = {"p50": float("nan"), "p99": float("nan")}
        added, delay = one.get("added_ms", unknown), one.get("delay_ms", unknown)
        cpu = ", ".join(f"{name} {ms:.3f}" for name, ms in one["cpu_ms_per_token"].items())
        print(
            f"{one['road']:8} {one['itl_ms']['p50']:8.2f} {one['itl_ms']['p99']:8.2f} {delay['p50']:10.3f} "
            f"{added['p50']:10.3f} {added['p99']:8.3f} {one['tokens_per_s']:9.1f}  {cpu}"
        )
    sys.stdout.flush()


async def throughput(setting: Setting, concurrency: int = 8, rounds: int = 3) -> list[dict[str, Any]]:
    """Tokens per second of the reference executor over each road; the best of the rounds, which take turns."""
    roads = {name: setting.roads[name] for name in ("worker", "grpc")}
    found: dict[str, list[float]] = {name: [] for name in roads}
    load = os.getloadavg()[0]

    for road in roads.values():
        await road(0, 5)
    for _ in range(rounds):
        for name, road in roads.items():
            begun = time.monotonic()
            await asyncio.gather(*(road(index, NUM_TOKENS) for index in range(concurrency)))
            found[name].append(concurrency * NUM_TOKENS / (time.monotonic() - begun))
    print(f"\ntiny-mixtral fp8, reference executor, concurrency {concurrency}: tokens/s {found}")
    return [
        {
            "date": time.strftime("%Y-%m-%d"),
            "figure": "throughput of tiny-mixtral fp8, reference executor",
            "road": name,
            "concurrency": concurrency,
            "tokens_per_s": [round(value, 1) for value in values],
            "load": [round(load, 2), round(os.getloadavg()[0], 2)],
        }
        for name, values in found.items()
    ]


def machine() -> dict[str, Any]:
    packages = ("nvidia-pytriton", "numpy", "torch", "tritonclient", "trtbuild")
    return {
        "cpu": next(
            (
                line.partition(":")[2].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if "model name" in line
            ),
            platform.machine(),
        ),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


if __name__ == "__main__":
    main()
