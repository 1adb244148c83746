"""Loss against bytes: `--precision auto` beside every uniform precision. `python perf/auto.py [DIR]`.

The checkpoint, calibration and evaluation texts are those of perf/accuracy.py. Everything is computed by the reference
executor in float32, so that rounding of weights is all that differs: growth of perplexity over 16-bit weights, and the
mean KL divergence of next-token distributions, each with the standard error over blocks of 256 tokens.

Budgets (bytes of weights on the one rank): uniform int4's; those of int4 with zero points; int4's with 10 % of its
linear layers' bytes on top, and with 10 % of all its bytes; half-way to uniform int8's; int8's; a quarter of the way
from there to 16 bit. Below the table: what auto loses in the bytes of each uniform precision, and what it loses of
uniform int4's with 10 % more bytes.
--workspace keeps calibrations for the next run. --save appends JSON lines, --html draws the curves.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accuracy import BLOCK_TOKENS, CHECKPOINTS, Inputs, machine, save
from accuracy_measure import versions
from accuracy_table import mean_and_error

from trtbuild.checkpoints.rank_checkpoint import RankCheckpoint
from trtbuild.engines.job import Job, convert_model
from trtbuild.engines.limits import EngineLimits
from trtbuild.engines.recipe import Recipe
from trtbuild.engines.reference.executor import ReferenceExecutor
from trtbuild.progress import terminal_progress
from trtbuild.workspace import Workspace

RESULTS = Path(__file__).parent / "results" / "auto.jsonl"
UNIFORM = [
    "bf16", "int4", "int4-gptq", "int4-gptq-asym", "int4-awq", "int4-awq-asym", "fp8", "fp8-dynamic", "int8",
]  # fmt: skip
# The anchors of auto's budgets, which are always run.
ANCHORS = ["bf16", "int4-gptq", "int4-gptq-asym", "int8"]
BUDGETS = [
    "int4", "int4 with zero points", "int4 + 10 % of linear", "int4 + 10 % of all", "int4 to int8, half-way", "int8",
    "int8 to 16 bit, a quarter",
]  # fmt: skip

Run = dict[str, Any]


class Losses:
    """Losses of checkpoints over the same blocks; the 16-bit model's distributions are kept in float16, in a file."""

    def __init__(self, texts: dict[str, list[list[int]]], directory: Path) -> None:
        self._texts = texts
        self._directory = directory
        self._exact: dict[str, torch.Tensor] = {}

    @torch.inference_mode()
    def of(self, checkpoint: RankCheckpoint) -> dict[str, dict[str, list[float]]]:
        """By text, of each block: `nll` of its tokens and `kl` from the first checkpoint that was given, nats."""
        longest = max(len(block) for blocks in self._texts.values() for block in blocks)
        limits = EngineLimits(max_batch_size=1, max_seq_len=longest, chunk_size=longest)
        executor = ReferenceExecutor(checkpoint.plans, checkpoint.tensor, limits, dtype=torch.float32)
        first = not self._exact
        if first:
            self._exact = {name: self._file(i, executor.vocab_size) for i, name in enumerate(self._texts)}
        found = {}
        for name, blocks in self._texts.items():
            nll, kl = [], []
            for index, block in enumerate(blocks):
                logits = executor.prefill(0, block[:-1], 0, "all")
                assert logits is not None
                log_q = logits.float().log_softmax(-1)
                if first:
                    self._exact[name][index] = log_q
                log_p = self._exact[name][index].float().log_softmax(-1)
                nll.append(round(-float(log_q.gather(1, torch.tensor(block[1:])[:, None]).mean()), 5))
                kl.append(0.0 if first else round(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), 6))
            found[name] = {"nll": nll, "kl": kl}
        return found

    def _file(self, index: int, vocab_size: int) -> torch.Tensor:
        blocks = list(self._texts.values())[index]
        shape = (len(blocks), len(blocks[0]) - 1, vocab_size)
        file = str(self._directory / f"exact-{index}")
        return torch.from_file(file, shared=True, size=math.prod(shape), dtype=torch.float16).view(shape)


def sizes(checkpoint: RankCheckpoint) -> tuple[int, int]:
    """Bytes of the rank's weights, and of its linear layers among them."""
    [plan] = checkpoint.plans
    linear = sum(spec.num_bytes for layer in plan.linears for spec in layer.tensors())
    return linear + sum(tensor.spec.num_bytes for tensor in plan.plain), linear


def measure(inputs: Inputs, losses: Losses, workspace: Workspace, label: str, **fields: Any) -> Run:
    """Convert with these fields of a recipe, and evaluate; `label` is the run's name in the table."""
    recipe = Recipe.create(model=str(inputs.model), name=re.sub(r"\W+", "-", label).strip("-"), **fields)
    started, cpu = time.perf_counter(), time.process_time()
    job = Job.resolve(recipe).settle(workspace, terminal_progress)
    checkpoint = convert_model(job, workspace, workers=1, force=True, progress=terminal_progress)
    figures = {"seconds": round(time.perf_counter() - started, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    num_bytes, linear = sizes(checkpoint)
    formats = Counter(layer.precision for layer in checkpoint.plans[0].linears)
    run = {
        "date": time.strftime("%Y-%m-%d"), "model": inputs.model.name, "inputs": inputs.identity, "method": label,
        "precision": fields["precision"], "budget": fields.get("budget"), "rank_bytes": num_bytes,
        "linear_bytes": linear, "formats": dict(formats),
        "predicted_loss_nats": (job.mixture or {}).get("predicted_loss_nats"), "block_tokens": BLOCK_TOKENS,
        **figures, "texts": losses.of(checkpoint), "machine": machine(), "versions": versions("trtbuild", "torch"),
    }  # fmt: skip
    print(f"{label}: {num_bytes / 1e6:.1f} MB, {figures['cpu_seconds']} CPU seconds", file=sys.stderr, flush=True)
    return run


def budgets(runs: dict[str, Run]) -> dict[str, int]:
    """Bytes by name; see above."""
    exact, int4, shifted, int8 = (runs[name] for name in ANCHORS)
    low, middle, high = (run["rank_bytes"] for run in (int4, int8, exact))
    found = [
        low, shifted["rank_bytes"], low + int4["linear_bytes"] // 10, low + low // 10,
        (low + middle) // 2, middle, middle + (high - middle) // 4,
    ]  # fmt: skip
    return dict(zip(BUDGETS, found, strict=True))


def growth(run: Run, exact: Run, text: str) -> tuple[float, float]:
    """Of perplexity over 16-bit weights, in percent, and its standard error."""
    pairs = zip(run["texts"][text]["nll"], exact["texts"][text]["nll"], strict=True)
    mean, error = mean_and_error([a - b for a, b in pairs])
    return 100 * math.expm1(mean), 100 * error


def print_table(runs: dict[str, Run]) -> None:
    """All runs by bytes, then auto against each uniform precision."""
    exact = runs["bf16"]
    texts = list(exact["texts"])
    print(f"{'':32}{'MB':>8}{'linear':>8}   " + "".join(f"{text + ': ppl, KL in mnats':46}" for text in texts))
    for label, run in sorted(runs.items(), key=lambda item: item[1]["rank_bytes"]):
        line = f"{label:32}{run['rank_bytes'] / 1e6:8.2f}{run['linear_bytes'] / 1e6:8.2f}   "
        for text in texts:
            mean, error = growth(run, exact, text)
            kl, kl_error = mean_and_error(run["texts"][text]["kl"])
            line += f"{mean:+8.2f} % ± {error:4.2f}  {1000 * kl:9.3f} ± {1000 * kl_error:<9.3f}   "
        print(line + ", ".join(f"{count} {form}" for form, count in sorted(run["formats"].items())))
    print("\nauto in the bytes of each uniform precision (KL over both texts, mnats)")
    for run in runs.values():
        within = [r for r in runs.values() if r["precision"] == "auto" and r["rank_bytes"] <= run["rank_bytes"]]
        if run["precision"] not in ("auto", "bf16") and within:
            print(_verdict(run, min(within, key=mean_kl)))
    for label, run in runs.items():
        if label.startswith("auto: int4 + 10"):
            share = 1 - mean_kl(run) / mean_kl(runs["int4-gptq"])
            print(f"{label}: {100 * share:.0f} % less KL than uniform int4-gptq (asked: 25)")


def mean_kl(run: Run) -> float:
    return statistics.fmean(statistics.fmean(text["kl"]) for text in run["texts"].values())


def _verdict(uniform: Run, auto: Run) -> str:
    pairs = [
        a - b
        for text in uniform["texts"]
        for a, b in zip(auto["texts"][text]["kl"], uniform["texts"][text]["kl"], strict=True)
    ]
    mean, error = mean_and_error(pairs)
    verdict = "ABOVE the curve" if mean > error else "below" if mean < -error else "on it (within one standard error)"
    if mean > error and auto["rank_bytes"] < 0.98 * uniform["rank_bytes"]:
        verdict = "above, but was not run with as many bytes"
    found = f"{1000 * mean_kl(auto):9.3f} by {auto['method']}, {1000 * mean_kl(uniform):9.3f} by {uniform['method']}"
    return f"{found}: auto is {verdict}"


def draw(runs: dict[str, Run], file: Path) -> None:
    """Mean KL over bytes, one self-contained page."""
    import plotly.graph_objects as go

    auto = sorted((r for r in runs.values() if r["precision"] == "auto"), key=lambda run: run["rank_bytes"])
    others = [r for r in runs.values() if r["precision"] not in ("auto", "bf16")]
    figure = go.Figure(layout={"xaxis_title": "MB of weights", "yaxis_title": "mean KL from 16 bit, nats a token"})
    for name, points, mode in (("auto", auto, "lines+markers"), ("uniform", others, "markers+text")):
        figure.add_scatter(
            x=[run["rank_bytes"] / 1e6 for run in points], y=[mean_kl(run) for run in points], name=name, mode=mode,
            text=[run["method"] for run in points], textposition="top center",
        )  # fmt: skip
    figure.update_yaxes(type="log")
    figure.write_html(file, include_plotlyjs=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=CHECKPOINTS / "tiny-mixtral", metavar="DIR")
    parser.add_argument(
        "--uniform",
        action="append",
        choices=UNIFORM,
        help="Beside bf16, int4-gptq, int4-gptq-asym and int8; repeatable.  [default: all]",
    )
    parser.add_argument("--budget", action="append", choices=BUDGETS, help="Repeatable.  [default: all]")
    parser.add_argument("--target", help="What auto's engine is for; with sm89 or above it may use fp8.")
    parser.add_argument("--blocks", type=int, default=32, help="Of 256 tokens, from each text.  [default: 32]")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workspace", type=Path, help="Keeps calibrations.  [default: a temporary one]")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON lines.  [default: perf/results/...]")
    parser.add_argument("--html", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    inputs = Inputs.prepare(options.model.resolve(), options.blocks)
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory() as directory:
        losses = Losses(inputs.texts, Path(directory))
        workspace = Workspace(options.workspace or Path(directory))

        def add(label: str, **fields: Any) -> None:
            runs[label] = measure(inputs, losses, workspace, label, **fields)
            if options.save:
                save(options.results, runs[label])

        for precision in dict.fromkeys([*ANCHORS, *(options.uniform or UNIFORM)]):
            add(precision, precision=precision)
        target = {"target": options.target} if options.target else {}
        for name, budget in budgets(runs).items():
            if name in (options.budget or BUDGETS):
                add(f"auto: {name}", precision="auto", budget=budget, **target)
    print_table(runs)
    if options.html:
        draw(runs, options.html)


if __name__ == "__main__":
    main()
