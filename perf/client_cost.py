"""CPU that the native driver spends on a streamed token: `python perf/client_cost.py [--save]`.

The server is a stub that answers at once (tests/perf/scripted_server.py), so nothing waits and the client does as much
as it can. One client process, whose own CPU clock is read around the measurement, as `trtbuild perf sweep` reads it.
--save appends one dated JSON line per figure, with the machine and versions, to perf/results/client_cost.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from trtbuild.perf.client_pool import ClientPool
from trtbuild.perf.environment import environment
from trtbuild.perf.records import Load, PointSpec, PromptLimits, Target

STUB = Path(__file__).parents[1] / "tests" / "perf" / "scripted_server.py"
RESULTS = Path(__file__).parent / "results" / "client_cost.jsonl"
MOST_S = 200e-6
# Streams, and tokens of each answer: a short answer shares the cost of its request among few tokens.
CASES = ((1, 16), (1, 128), (16, 16), (16, 128))


def measure(url: str, streams: int, osl: int, repeat: int) -> dict[str, object]:
    target = Target("stub", PromptLimits(4096, 4000, 16, 1000), grpc=url)
    costs: list[float] = []
    for seed in range(repeat):
        spec = PointSpec(
            "stub", "native", Load("concurrency", streams), 128, osl, num_requests=max(50, 4000 // osl), seed=seed
        )
        with ClientPool(spec, target) as pool:
            cost = pool.measure().client.cpu_per_token_s
        if cost is None:
            sys.exit("no token came")
        costs.append(cost)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "figure": f"client CPU per token, {streams} streams, answers of {osl} tokens",
        "unit": "us",
        "median": round(1e6 * statistics.median(costs), 1),
        "max": round(1e6 * max(costs), 1),
        "runs": repeat,
        "most_allowed": 1e6 * MOST_S,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    stub = subprocess.Popen([sys.executable, str(STUB), "{}"], stdout=subprocess.PIPE, text=True)
    if stub.stdout is None:
        raise AssertionError("its output is a pipe")
    try:
        url = f"127.0.0.1:{int(stub.stdout.readline())}"
        figures = [measure(url, streams, osl, options.repeat) for streams, osl in CASES]
    finally:
        stub.kill()
    found = environment()
    machine = {key: found[key] for key in ("cpu", "cores", "python", "trtbuild")}
    machine |= {name: version(name) for name in ("grpcio", "tritonclient")}
    for figure in figures:
        line = json.dumps({**figure, "load": round(os.getloadavg()[0], 2), "machine": machine})
        print(line)
        if options.save:
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
    if any(float(str(figure["median"])) > 1e6 * MOST_S for figure in figures):
        sys.exit(f"more than {1e6 * MOST_S:g} us per token")


if __name__ == "__main__":
    main()
