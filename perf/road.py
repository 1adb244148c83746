"""Whole-process times of the road's commands on the bundled models: `python perf/road.py [--repeat N] [--save]`.

Each command runs in its own process, in a fresh workspace, as a user would run it. --save appends one dated JSON line
per figure, with the machine and versions, to perf/results/road.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

COMPILES = {
    "compile tiny-mixtral fp8 tp2 ep2": ["tiny-mixtral", "--precision", "fp8", "--tp", "2", "--moe-ep", "2"],
    "compile tiny-mixtral int4 tp2": ["tiny-mixtral", "--precision", "int4", "--tp", "2"],
    "compile tiny-qwen2 bf16": ["tiny-qwen2"],
}
RESULTS = Path(__file__).parent / "results" / "road.jsonl"


def timed(arguments: list[str], workspace: Path) -> float:
    """Seconds of one `trtbuild` process; its output is shown only where it fails."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "trtbuild", *arguments], cwd=workspace, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"trtbuild {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}")
    return time.monotonic() - started


def measure(repeat: int) -> dict[str, list[float]]:
    figures: dict[str, list[float]] = {}
    for _ in range(repeat):
        with tempfile.TemporaryDirectory() as directory:
            workspace = Path(directory)
            figures.setdefault("--help", []).append(timed(["--help"], workspace))
            for name, arguments in COMPILES.items():
                figures.setdefault(name, []).append(timed(["compile", *arguments], workspace))
            prompt = ["generate", "tiny-mixtral-fp8-tp2-ep2", "ROMEO", "--max-tokens", "40"]
            figures.setdefault("generate 40 tokens", []).append(timed(prompt, workspace))
    return figures


def machine() -> dict[str, str | int | None]:
    packages = ("torch", "tensorrt-rtx-cu12", "transformers", "trtbuild")
    versions = {name: version(name) for name in packages}
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    lines = []
    for name, seconds in measure(options.repeat).items():
        middle = statistics.median(seconds)
        print(f"{name:36} {middle:7.2f} s  ({min(seconds):.2f} to {max(seconds):.2f}, {len(seconds)} runs)")
        figure = {
            "date": time.strftime("%Y-%m-%d"),
            "figure": name,
            "unit": "s",
            "median": round(middle, 3),
            "runs": len(seconds),
        }
        lines.append(json.dumps(figure | {"executor": "reference", "machine": machine()}))
    if options.save:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a", encoding="utf-8") as stream:
            stream.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
