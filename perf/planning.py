"""The constants of `trtbuild plan`'s estimates, measured on this machine: `python perf/planning.py [--save]`.

Each figure comes from a process of its own: conversion of a random Mixtral by precision, calibration, and compilation
with weights as inputs (real dimensions) and embedded. Rates are by processor time, which a busy machine does not change
much; wall time stands beside it. Memory is anonymous, of all processes together, less what the interpreter and torch
hold before. --save appends one dated JSON line per figure to perf/results/planning.jsonl.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
RESULTS = Path(__file__).parent / "results" / "planning.jsonl"
TINY = ROOT / "tests" / "checkpoints" / "tiny-mixtral"
SIZES = {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 2, "num_attention_heads": 16}


def make_checkpoint(directory: Path) -> None:
    """A random Mixtral of 8 experts, with tiny-mixtral's tokenizer."""
    from helpers import hf_config, save_checkpoint

    tiny = json.loads((TINY / "config.json").read_text())
    config = hf_config("mixtral", **SIZES, num_key_value_heads=4, head_dim=64, vocab_size=tiny["vocab_size"])
    config |= {"num_local_experts": 8, "max_position_embeddings": 2048}
    save_checkpoint(directory, config)
    for file in TINY.glob("*token*"):
        shutil.copyfile(file, directory / file.name)


def convert(model: str, workspace: str, precision: str) -> dict[str, float]:
    """Source bytes a second with one worker; fp8 with made-up activation ranges, so without calibration."""
    from trtbuild.checkpoints.convert import ActivationRange, Calibration
    from trtbuild.checkpoints.convert import convert as run
    from trtbuild.engines.job import Job
    from trtbuild.engines.recipe import Recipe

    job = Job.resolve(Recipe.create(model=model, precision=precision, tp=2))
    names = {linear.global_name for plan in job.plans for linear in plan.linears}
    ranges = Calibration({}, lambda: {name: ActivationRange(8.0) for name in names})
    fp8 = ranges if precision == "fp8" else None
    figures = timed(lambda: run(job.source, Path(workspace) / precision, job.layout, job.precision, calibration=fp8))
    return {"bytes_per_cpu_second": source_bytes(job) / figures["cpu_seconds"], **figures}


def calibrate(model: str, workspace: str, precision: str) -> dict[str, float]:
    """Operations in a second of one core of the matrix multiplies in calibration."""
    from trtbuild.engines.calibration.ranges import calibrate as run
    from trtbuild.engines.calibration.text import NUM_SEQUENCES, SEQUENCE_LENGTH, CalibrationText
    from trtbuild.engines.job import Job
    from trtbuild.engines.recipe import Recipe
    from trtbuild.planning.model_size import count_parameters

    job = Job.resolve(Recipe.create(model=model, precision=precision))
    figures = timed(lambda: run(job.source, CalibrationText.open(None)))
    operations = 2 * count_parameters(job.config).total * NUM_SEQUENCES * SEQUENCE_LENGTH
    return {"operations_per_cpu_second": operations / figures["cpu_seconds"], **figures}


def compile_plans(model: str, workspace: str, precision: str) -> dict[str, float]:
    """One worker; without weights for a known name, with embedded ones for a directory."""
    from trtbuild.engines.compile import compile_engine
    from trtbuild.engines.job import Job
    from trtbuild.engines.recipe import Recipe
    from trtbuild.workspace import Workspace

    fields: dict[str, Any] = {"model": model, "precision": precision, "target": ("sm89",)}
    fields |= {} if Path(model).is_dir() else {"plan_only": True}
    fields |= {"tp": 2} if model == "mixtral" else {}
    job = Job.resolve(Recipe.create(**fields))
    found = []
    figures = timed(lambda: found.append(compile_engine(job, Workspace(Path(workspace)), workers=1)))
    plans = [plan for plan in found[0].passport["plans"] if plan["kind"] == "decoder"]
    largest = max(plans, key=lambda plan: plan["build_seconds"])
    return {**figures, "decoder_plans": len(plans)} | {
        "slowest_plan_seconds": largest["build_seconds"],
        "slowest_plan_bytes": largest["size"],
    }


def timed(work: Callable[[], object]) -> dict[str, float]:
    """Wall and processor time, and the peak of memory; processes that the work starts count."""
    from trtbuild.planning.peak_memory import PeakMemory, anonymous_bytes

    before, started, cpu = anonymous_bytes(), time.monotonic(), cpu_seconds()
    with PeakMemory(interval=0.05) as peak:
        work()
    return {
        "seconds": time.monotonic() - started,
        "cpu_seconds": cpu_seconds() - cpu,
        "anonymous_bytes": peak.num_bytes - before,
    }


def cpu_seconds() -> float:
    own, others = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime


def source_bytes(job: Any) -> int:
    return sum(entry.spec.num_bytes for entry in job.source.entries.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = str(Path(directory) / "random-mixtral")
        make_checkpoint(Path(model))
        figures: dict[str, tuple[Any, str, str]] = {
            f"convert {precision}": (convert, model, precision) for precision in ("bf16", "fp8", "int8", "int4")
        }
        figures["calibrate"] = (calibrate, model, "fp8")
        figures["compile llama-3.1-8b bf16, weights as inputs"] = (compile_plans, "llama-3.1-8b", "bf16")
        figures["compile mixtral fp8 tp2, weights as inputs"] = (compile_plans, "mixtral", "fp8")
        figures["compile random mixtral int4, embedded"] = (compile_plans, model, "int4")
        for name, (function, *arguments) in figures.items():
            report(name, in_process(function, arguments[0], directory, arguments[1]), options.save)


def in_process(function: Callable[..., dict[str, float]], *arguments: str) -> dict[str, float]:
    # A fresh interpreter, as a user's command has.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_undaemoned, (function, arguments))


def _undaemoned(function: Callable[..., dict[str, float]], arguments: tuple[str, ...]) -> dict[str, float]:
    """A pool's process may not start others unless it is no daemon; compiling starts one for each plan."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    return function(*arguments)


def report(name: str, found: dict[str, float], save: bool) -> None:
    from road import machine

    print(name, {key: f"{value:.4g}" for key, value in found.items()}, flush=True)
    if save:
        line = {"date": time.strftime("%Y-%m-%d"), "figure": name, **found, "runs": 1, "machine": machine()}
        with RESULTS.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
