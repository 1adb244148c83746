"""`trtbuild verify` of one model in several precisions: `python perf/verify.py [MODEL] [--precision P]... [--save]`.

Seconds (of each phase, too), CPU seconds and memory of a verification, and its figures beside the limits that they were
held against: what the default limits of `trtbuild/accuracy/gate.py` are set from. Engines are compiled into --workspace
first, where they are not there; that is not measured. Each verification runs in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from accuracy_measure import measured
from road import machine

from trtbuild.progress import NoProgress, Progress

RESULTS = Path(__file__).parent / "results" / "verify.jsonl"
PRECISIONS = ["bf16", "int8", "fp8", "fp8-dynamic", "int4", "int4-gptq"]


def compiled(model: str, precision: str, max_seq_len: int | None, workspace: Path) -> str:
    """The engine's name."""
    from trtbuild.engines.compile import compile_engine
    from trtbuild.engines.job import Job
    from trtbuild.engines.recipe import Recipe
    from trtbuild.workspace import Workspace

    place = Workspace(workspace)
    # One plan is compiled for one target: a verification on a CPU reads none.
    recipe = Recipe.create(model=model, precision=precision, max_seq_len=max_seq_len, target=("sm89",))
    job = Job.resolve(recipe, sources=place.sources)
    return compile_engine(job, place, workers=1).directory.name


def verify(name: str, workspace: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own."""
    from trtbuild.accuracy.verify import VerifyOptions, verify_engine
    from trtbuild.workspace import Workspace

    phases: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(title: str, total: float, unit: str = "") -> Iterator[Progress]:
        started = time.perf_counter()
        yield NoProgress()
        phases[title.replace(name, "engine")] = round(time.perf_counter() - started, 1)

    place, options = Workspace(workspace), VerifyOptions.from_flags(**flags)
    passport, figures = measured(
        lambda: verify_engine(place.engine(name), options, sources=place.sources, progress=timed)
    )
    return figures | {"phases": phases, **shown(passport.data["accuracy"])}


def shown(record: dict[str, Any]) -> dict[str, Any]:
    """What of a record tells how far an engine is from its limits."""
    kinds: dict[str, list[float]] = {}
    shares = []
    for block in record["blocks"]:
        kinds.setdefault(f"{block['block']} {block['precision']}", []).extend(map(float, block["errors"]))
        shares += [float(error) / limit for error, limit in zip(block["errors"], block["limits"], strict=True)]
    runs = record["invariance"]["ways"]
    figures = ("name", "num_tokens", "source_ppl", "engine_ppl", "ppl_increase", "ppl_increase_se", "mean_kl", "top1")
    return {
        "passed": record["passed"], "failures": record["failures"], "executor": record["executor"],
        "device": record["device_name"], "limits": record["limits"],
        "texts": [{key: text[key] for key in figures} for text in record["texts"]],
        "long_prompt": {key: record["long_prompt"][key] for key in ("num_tokens", "mean_kl")},
        "blocks": {kind: {"median": median(e), "largest": max(e), "count": len(e)} for kind, e in kinds.items()},
        "largest_share_of_a_limit": round(max(shares), 3),
        "invariance": {
            "same_tokens": sum(run["same_tokens"] for run in runs), "runs": len(runs),
            "largest_median": max(float(run["median_difference"]) for run in runs),
            "largest": max(float(run["largest_difference"]) for run in runs),
        },
    }  # fmt: skip


def print_row(precision: str, found: dict[str, Any]) -> None:
    texts = "; ".join(
        f"{text['name']} {100 * text['ppl_increase']:+.2f} +- {100 * text['ppl_increase_se']:.2f} %, KL "
        f"{text['mean_kl']:.4f}, top-1 {100 * text['top1']:.1f} %"
        for text in found["texts"]
    )
    verdict = "passed" if found["passed"] else "FAILED"
    print(
        f"{precision:12} {verdict}  {found['seconds']:.0f} s, {found['cpu_seconds']:.0f} CPU s, "
        f"{found['peak_anon_bytes'] / 2**20:.0f} MiB anonymous at the peak\n"
        f"             {texts}; blocks up to {found['largest_share_of_a_limit']} of their limits",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny-mixtral", help="As for compile.  [default: tiny-mixtral]")
    parser.add_argument("--model-name", metavar="NAME", help="In the results.  [default: MODEL's last part]")
    parser.add_argument("--precision", action="append", metavar="P", help=f"[default: {', '.join(PRECISIONS)}]")
    parser.add_argument("--text", action="append", type=Path, metavar="FILE", help="As for verify.")
    parser.add_argument("--num-tokens", type=int, metavar="N", help="As for verify.")
    parser.add_argument("--max-seq-len", type=int, metavar="N", help="As for compile; the longest prompt has one less.")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--workspace", type=Path, required=True, help="Where engines are, and are put.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    os.environ |= {name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    flags = {"texts": tuple(options.text or ()), "num_tokens": options.num_tokens, "device": options.device}
    spawned = multiprocessing.get_context("spawn")
    for precision in options.precision or PRECISIONS:
        with ProcessPoolExecutor(1, spawned) as compiling:
            name = compiling.submit(compiled, options.model, precision, options.max_seq_len, options.workspace).result()
        with ProcessPoolExecutor(1, spawned) as verifying:
            found = verifying.submit(verify, name, options.workspace, flags).result()
        print_row(precision, found)
        line = {
            "date": time.strftime("%Y-%m-%d"), "model": options.model_name or Path(options.model).name,
            "precision": precision, "threads": options.threads, **found, "load": os.getloadavg()[0],
            "machine": machine(),
        }  # fmt: skip
        if options.save:
            with RESULTS.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
        else:
            print(json.dumps(line), file=sys.stderr)


if __name__ == "__main__":
    main()
