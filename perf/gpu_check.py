"""What a GPU shows of an engine: does it load, are its logits right, how many tokens/s.

    python perf/gpu_check.py [--model tiny-mixtral] [--precision fp16,fp8,int4] [--save]

Each precision is compiled in a workspace of its own and loaded whatever the GPU is, so that the exact error of one that
TensorRT-RTX has no target for is seen. The TensorRT executor's logits are compared with the reference executor's in
float32, and both executors' tokens/s are measured (the reference executor on CUDA). --save appends one JSON line per
figure, with the machine and versions, to perf/results/gpu_check.jsonl.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from trtbuild.engines.compile import compile_engine
from trtbuild.engines.device.engine_ranks import load_tensorrt
from trtbuild.engines.device.gpu import find_gpus
from trtbuild.engines.executor import Executor
from trtbuild.engines.job import Job
from trtbuild.engines.load import load_engine
from trtbuild.engines.recipe import Recipe
from trtbuild.errors import TrtBuildError
from trtbuild.workspace import Workspace

RESULTS = Path(__file__).parent / "results" / "gpu_check.jsonl"
PROMPT_TOKENS, DECODE_STEPS = 256, 128
TOKENS = torch.randint(900, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()


def compare(device: Executor, reference: Executor) -> dict[str, float]:
    """Two slots, a prompt in two chunks, then decode steps beside idle slots."""
    pairs = []
    half = min(100, device.chunk_size, device.max_seq_len // 2)
    for tokens, start in ((TOKENS[:half], 0), (TOKENS[half : half + 20], half)):
        pairs.append(tuple(engine.prefill(1, tokens, start, "all") for engine in (device, reference)))
    pairs.append(tuple(engine.prefill(0, TOKENS[:5], 0, "all") for engine in (device, reference)))
    for i in range(4):
        arguments = ([0, 1], [7, 11], [5 + i, half + 20 + i])
        pairs.append(tuple(engine.decode(*arguments) for engine in (device, reference)))
    found, expected = (torch.cat([pair[side].float().cpu() for pair in pairs]) for side in (0, 1))
    return {
        "max_abs_difference": float((found - expected).abs().max()),
        "min_cosine": float(torch.nn.functional.cosine_similarity(found, expected, dim=-1).min()),
        "same_argmax": float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
        "logit_std": float(expected.std()),
    }


def speeds(engine: Executor) -> dict[str, float]:
    """tokens/s of prefill at batch 1, and of decode at batch 1 and at every slot."""
    prompt = TOKENS[: min(PROMPT_TOKENS, engine.chunk_size, engine.max_seq_len // 2)]
    steps = min(DECODE_STEPS, engine.max_seq_len - len(prompt))
    found = {"prefill": len(prompt) / _seconds(lambda: engine.prefill(0, prompt, 0))}
    for batch in sorted({1, engine.num_slots}):
        slots = list(range(batch))

        def decode(slots: list[int] = slots) -> None:
            for step in range(steps):
                engine.decode(slots, [5] * len(slots), [len(prompt) + step] * len(slots))

        found[f"decode batch {batch}"] = batch * steps / _seconds(decode)
    return found


def _seconds(work: Callable[[], object]) -> float:
    """The best of three, after one that is not counted."""
    times = []
    for _ in range(4):
        started = time.monotonic()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.monotonic() - started)
    return min(times[1:])


def check(model: str, precision: str, workspace: Path, target: str | None) -> list[dict[str, Any]]:
    """Figures of one precision; an executor that cannot be made is a figure too, with its exact error."""
    recipe = Recipe.create(
        model=model, precision=precision, max_batch_size=8, max_seq_len=512, **({"target": (target,)} if target else {})
    )
    directory = compile_engine(Job.resolve(recipe), Workspace(workspace)).directory
    common = {"model": model, "precision": precision}
    figures: list[dict[str, Any]] = []
    try:
        for figure in tensorrt_figures(directory):
            figures.append(common | {"executor": "tensorrt"} | figure)
    except (TrtBuildError, RuntimeError) as error:
        traceback.print_exc()
        figures.append(common | {"executor": "tensorrt", "error": f"{type(error).__name__}: {error}"})
    reference = load_engine(directory, executor="reference").executor
    figures.append(common | {"executor": f"reference on {reference.device}", "figure": "tokens/s"} | speeds(reference))
    reference.close()
    return figures


def tensorrt_figures(directory: Path) -> Iterator[dict[str, Any]]:
    """Figures as they come: those before an error count."""
    started = time.monotonic()
    device = load_tensorrt(directory)
    yield {"figure": "load", "seconds": time.monotonic() - started}
    exact = load_engine(directory, executor="reference", dtype="float32").executor
    yield {"figure": "logits", **compare(device, exact)}
    exact.close()
    yield {"figure": "tokens/s", **speeds(device)}
    device.close()


def machine() -> dict[str, Any]:
    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {
        "gpus": [f"{gpu.name} ({gpu.target}, driver {gpu.driver})" for gpu in find_gpus()],
        "python": platform.python_version(),
        **{name: installed(name) for name in ("torch", "tensorrt-rtx-cu12", "tensorrt", "trtbuild")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-mixtral")
    parser.add_argument("--precision", default="fp16,fp8,int4")
    parser.add_argument("--target", help="Compile for this alone, e.g. sm89.")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    here = machine()
    if not here["gpus"]:
        sys.exit("torch sees no CUDA GPU")
    print(json.dumps(here))
    lines = []
    for precision in options.precision.split(","):
        with tempfile.TemporaryDirectory() as workspace:
            for figure in check(options.model, precision, Path(workspace), options.target):
                print(json.dumps(figure), flush=True)
                lines.append(json.dumps({"date": time.strftime("%Y-%m-%d"), **figure, "machine": here}))
    if options.save:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a", encoding="utf-8") as stream:
            stream.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
