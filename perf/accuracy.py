"""Our quantization beside llm-compressor's and ModelOpt's: `python perf/accuracy.py [DIR] [--others PYTHON] [--save]`.

Perplexity on two texts, CPU seconds and memory of the same jobs: the same checkpoint, calibration tokens, evaluation
blocks and cores. A method runs in a process of its own with one thread (--threads); what is measured is loading and
quantizing, neither imports nor evaluation. Theirs are evaluated in memory by the tool's own fake-quantized forward in
bf16, ours by the reference executor over the rank checkpoint; each is compared with the bf16 of its own code.

Texts: Python's documentation (pydoc_data) and Shakespeare; for a checkpoint that brings an eval.txt, which it was not
trained on, that text's two halves (tiny-mixtral knows no punctuation, so documentation tells nothing about it).
Every block begins as the tokenizer begins a text and has 256 tokens more; the block's mean loss is kept, so that the
difference of two methods has a standard error: the increases over bf16 are compared block by block.

--others names a Python with llmcompressor and nvidia-modelopt, --modelopt another for the latter: version 0.47 is made
for transformers below 5.15, and where experts are fused (from 5.0) its AWQ leaves them rounded to nearest.
--against-saved takes what is not run from saved lines of the same inputs. A failure is recorded with its error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accuracy_table import print_table

RESULTS = Path(__file__).parent / "results" / "accuracy.jsonl"
CHECKPOINTS = Path(__file__).parent.parent / "tests" / "checkpoints"
BLOCK_TOKENS = 256
PYDOC_CHARACTERS = 40_000
THEIRS = [
    "bf16", "llm-compressor rtn", "llm-compressor fp8-dynamic", "modelopt fp8", "llm-compressor gptq",
    "llm-compressor awq", "modelopt int4-awq", "modelopt int4-awq-exported", "llm-compressor awq-sym",
    "llm-compressor rtn-asym", "modelopt bf16",
]  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """What every method gets."""

    model: Path
    moe: bool
    calibration: list[list[int]]
    texts: dict[str, list[list[int]]]
    weights_digest: str

    @classmethod
    def prepare(cls, model: Path, num_blocks: int) -> Inputs:
        from trtbuild.checkpoints.source import CheckpointSource
        from trtbuild.checkpoints.tokenizer import load_tokenizer
        from trtbuild.engines.calibration.text import CalibrationText, calibration_tokens

        source = CheckpointSource.open(str(model))
        tokenizer = load_tokenizer(source.directory)
        texts = {name: blocks_of(tokenizer, text, num_blocks) for name, text in evaluation_texts(model).items()}
        calibration = calibration_tokens(source, CalibrationText.open(None))
        return cls(source.directory, source.config.moe is not None, calibration, texts, source.digest)

    @property
    def identity(self) -> str:
        """Runs can be compared where this is the same."""
        content = json.dumps([self.weights_digest, self.calibration, self.texts])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def evaluation_texts(model: Path) -> dict[str, str]:
    """Two texts by name."""
    held_out = model / "eval.txt"
    if held_out.is_file():
        text = held_out.read_text(encoding="utf-8")
        middle = text.index("\n", len(text) // 2)
        return {"held-out, 1st half": text[:middle], "held-out, 2nd half": text[middle:]}
    from pydoc_data.topics import topics

    documentation = "\n".join(topics[name] for name in sorted(topics))[:PYDOC_CHARACTERS]
    shakespeare = (CHECKPOINTS / "tiny-mixtral" / "eval.txt").read_text(encoding="utf-8")
    return {"Python documentation": documentation, "Shakespeare": shakespeare}


def blocks_of(tokenizer: Any, text: str, num_blocks: int) -> list[list[int]]:
    """Consecutive blocks from the text's beginning: what the tokenizer begins with, and BLOCK_TOKENS tokens."""
    plain: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    prefix = ids[: len(ids) - len(plain)] if ids[-len(plain) :] == plain else []
    starts = range(0, len(plain) - BLOCK_TOKENS + 1, BLOCK_TOKENS)
    if len(starts) < num_blocks:
        sys.exit(f"--blocks {num_blocks}: a text has {len(starts)} blocks of {BLOCK_TOKENS} tokens")
    return [prefix + plain[start : start + BLOCK_TOKENS] for start in starts[:num_blocks]]


def run(python: str, script: str, method: str, inputs: Inputs, threads: int) -> dict[str, Any]:
    """A child's figures and losses, or `error`, the last line of what it said."""
    job = {
        "method": method, "model": str(inputs.model), "moe": inputs.moe, "calibration": inputs.calibration,
        "texts": inputs.texts, "threads": threads,
    }  # fmt: skip
    environment = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    with tempfile.TemporaryDirectory() as directory:
        job_file, result = Path(directory) / "job.json", Path(directory) / "result.json"
        job_file.write_text(json.dumps(job), encoding="utf-8")
        command = [python, str(Path(__file__).with_name(script)), str(job_file), str(result)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=directory, env=os.environ | environment
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            return {"error": lines[-1][:300] if lines else f"ended with {done.returncode}"}
        return json.loads(result.read_text(encoding="utf-8"))


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0],
        "python": platform.python_version(),
    }  # fmt: skip


def saved_runs(file: Path, identity: str) -> dict[tuple[bool, str], dict[str, Any]]:
    """The newest line for each (ours, method) with these inputs."""
    if not file.is_file():
        return {}
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {(line["ours"], line["method"]): line for line in lines if line["inputs"] == identity}


def our_precisions() -> list[str]:
    """All but `auto`, which takes a budget, and fp16, which is not any of these checkpoints' type."""
    from trtbuild.checkpoints.precision import PRECISIONS

    return [name for name in PRECISIONS if name not in ("auto", "fp16")]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=CHECKPOINTS / "tiny-mixtral", metavar="DIR")
    parser.add_argument(
        "--ours", action="append", metavar="PRECISION[,FIELD=VALUE...]",
        help="Of trtbuild, with fields of a recipe (auto,budget=0.4GiB); repeatable, 'none' for none.  [default: all]",
    )  # fmt: skip
    parser.add_argument("--theirs", action="append", choices=THEIRS, help="Repeatable.  [default: all, with --others]")
    parser.add_argument("--others", metavar="PYTHON", help="A Python with llmcompressor (and nvidia-modelopt).")
    parser.add_argument("--modelopt", metavar="PYTHON", help="A Python with nvidia-modelopt.  [default: --others]")
    parser.add_argument("--model-name", metavar="NAME", help="In the saved lines.  [default: DIR's last part]")
    parser.add_argument("--blocks", type=int, default=32, help="Of 256 tokens, from each text.  [default: 32]")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--against-saved", action="store_true", help="What is not run now comes from saved lines.")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON lines.  [default: perf/results/...]")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    inputs = Inputs.prepare(options.model.resolve(), options.blocks)
    ours = [name for name in options.ours or our_precisions() if name != "none"]
    theirs = (options.theirs or THEIRS) if options.others else []
    runs = saved_runs(options.results, inputs.identity) if options.against_saved else {}
    pythons = {"modelopt": options.modelopt or options.others}
    jobs = [(False, m, pythons.get(m.split()[0], options.others), "accuracy_others.py") for m in theirs]
    jobs += [(True, method, sys.executable, "accuracy_ours.py") for method in ours]
    for is_ours, method, python, script in jobs:
        found = run(python, script, method, inputs, options.threads)
        line = {
            "date": time.strftime("%Y-%m-%d"), "model": options.model_name or inputs.model.name,
            "inputs": inputs.identity, "ours": is_ours, "method": method, "threads": options.threads,
            "block_tokens": BLOCK_TOKENS, **found, "machine": machine(),
        }  # fmt: skip
        runs[is_ours, method] = line
        outcome = found.get("error") or f"{found['cpu_seconds']:.1f} CPU seconds"
        print(f"{'trtbuild' if is_ours else 'theirs'} {method}: {outcome}", file=sys.stderr, flush=True)
        if options.save:
            save(options.results, line)
    print_table(runs, list(inputs.texts))


def save(file: Path, line: dict[str, Any]) -> None:
    """Append one JSON line."""
    file.parent.mkdir(exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
