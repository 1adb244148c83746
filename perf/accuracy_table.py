"""perf/accuracy.py's table: each method's loss over its own bf16, and ours against theirs, with standard errors."""

from __future__ import annotations

import math
import statistics
from typing import Any

# (is ours, method) -> the run's line, as perf/accuracy.py saves it.
Runs = dict[tuple[bool, str], dict[str, Any]]

BASELINES = ("modelopt bf16", "bf16")
_INT4 = [
    "llm-compressor gptq", "llm-compressor awq", "llm-compressor awq-sym", "modelopt int4-awq",
    "modelopt int4-awq-exported", "llm-compressor rtn",
]  # fmt: skip
# What each of ours is held against: the same bits of weights, the same kind of activations.
RIVALS = {
    "int4": ["llm-compressor rtn"],
    **dict.fromkeys(("int4-awq", "int4-awq-asym", "int4-gptq", "int4-gptq-asym"), _INT4),
    "fp8": ["modelopt fp8"],
    "fp8-dynamic": ["llm-compressor fp8-dynamic", "modelopt fp8"],
}


def print_table(runs: Runs, texts: list[str]) -> None:
    """Every run, then each of ours beside its rivals."""
    print("perplexity, over bf16       " + "".join(f"{text:28}" for text in texts) + "loading and quantizing")
    for is_ours in (False, True):
        for (whose, method), run in runs.items():
            if whose == is_ours:
                print(_run_line(method, run, baseline(runs, is_ours, method), texts, is_ours))
    print()
    for (is_ours, method), run in runs.items():
        for rival in RIVALS.get(method.split(",")[0], []) if is_ours and "nll" in run else []:
            other = runs.get((False, rival), {})
            if "nll" in other and baseline(runs, True, method) and baseline(runs, False, rival):
                for text in texts:
                    print(_comparison(runs, method, rival, text))
                print(_resources(method, run, rival, other))


def baseline(runs: Runs, is_ours: bool, method: str) -> dict[str, Any] | None:
    """The bf16 run of the same code: ModelOpt may have a transformers of its own."""
    names = BASELINES if method.startswith("modelopt") else BASELINES[1:]
    return next((runs[is_ours, name] for name in names if "nll" in runs.get((is_ours, name), {})), None)


def _run_line(method: str, run: dict[str, Any], bf16: dict[str, Any] | None, texts: list[str], ours: bool) -> str:
    name = f"{'trtbuild ' if ours else ''}{method}"
    if "error" in run:
        return f"{name:27} failed: {run['error']}"
    parts = [f"{name:28}"]
    for text in texts:
        parts.append(f"{math.exp(statistics.fmean(run['nll'][text])):8.3f} ")
        if bf16 and bf16 is not run:
            mean, error = mean_and_error(difference(run["nll"][text], bf16["nll"][text]))
            parts.append(f"{100 * math.expm1(mean):+7.2f} % ± {100 * error:4.2f}  ")
        else:
            parts.append(" " * 19)
    figures = f"{run['cpu_seconds']:8.1f} CPU s {run['peak_anon_bytes'] / 2**20:8.0f} MiB anonymous"
    return "".join(parts) + figures + f" {run['peak_rss_bytes'] / 2**20:8.0f} MiB resident"


def increase(runs: Runs, key: tuple[bool, str], text: str) -> list[float]:
    """Of the loss over bf16, block by block."""
    bf16 = baseline(runs, *key)
    assert bf16 is not None
    return difference(runs[key]["nll"][text], bf16["nll"][text])


def _comparison(runs: Runs, method: str, rival: str, text: str) -> str:
    """Difference of the two increases of the loss over bf16, and what one standard error says about it."""
    ours, theirs = (increase(runs, key, text) for key in ((True, method), (False, rival)))
    mean, error = mean_and_error(difference(ours, theirs))
    verdict = "MORE loss" if mean > error else "less loss" if mean < -error else "the same within one standard error"
    pair = f"trtbuild {method} - {rival}"
    return f"{pair:48} {text:22} {mean:+.5f} ± {error:.5f} nats a token: {verdict}"


def _resources(method: str, run: dict[str, Any], rival: str, other: dict[str, Any]) -> str:
    faster = other["cpu_seconds"] / max(run["cpu_seconds"], 0.01)
    anonymous, resident = (other[key] / run[key] for key in ("peak_anon_bytes", "peak_rss_bytes"))
    pair = f"{rival} / trtbuild {method}"
    return f"{pair:48} {faster:.2f} x the time, {anonymous:.2f} x the anonymous memory, {resident:.2f} x the resident"


def difference(left: list[float], right: list[float]) -> list[float]:
    """Block by block."""
    return [a - b for a, b in zip(left, right, strict=True)]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error; the error of a single value is unknown, and infinite here."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return statistics.fmean(values), error
