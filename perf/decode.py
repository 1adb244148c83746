"""Decode of the reference executor against transformers' `generate`: same model, threads and type, paired runs.

    python perf/decode.py [DIR ...] [--dtype bfloat16] [--threads N] [--repeat N] [--save]

DIR are checkpoints; by default the two bundled ones. A figure is the median of paired runs of milliseconds per token
step, greedy, after a prompt of 64 tokens; generate's own prefill is subtracted. --save appends one JSON line per
figure, with machine and versions, to perf/results/decode.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from road import machine

from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import Precision
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.shards import fill_all
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.engines.limits import EngineLimits
from trtbuild.engines.reference.executor import ReferenceExecutor

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = [ROOT / "tests" / "checkpoints" / name for name in ("tiny-mixtral", "tiny-qwen2")]
RESULTS = Path(__file__).parent / "results" / "decode.jsonl"
PROMPT, STEPS, BATCHES = 64, 32, (1, 8)


@torch.inference_mode()
def generate_ms(model: Any, prompts: torch.Tensor) -> float:
    """Milliseconds per step: the time of STEPS + 1 new tokens less that of one."""
    seconds = []
    for count in (1, STEPS + 1):
        started = time.perf_counter()
        model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=count, min_new_tokens=count,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        seconds.append(time.perf_counter() - started)
    return (seconds[1] - seconds[0]) / STEPS * 1e3


def decode_ms(executor: ReferenceExecutor, prompts: torch.Tensor) -> float:
    """The same over the executor's slots."""
    slots = list(range(len(prompts)))
    for slot in slots:
        executor.prefill(slot, prompts[slot].tolist(), 0, "none")
    tokens = [1] * len(slots)
    started = time.perf_counter()
    for step in range(STEPS):
        tokens = executor.decode(slots, tokens, [PROMPT + step] * len(slots)).argmax(-1).tolist()
    return (time.perf_counter() - started) / STEPS * 1e3


def measure(directory: Path, dtype: torch.dtype, repeat: int) -> list[dict[str, Any]]:
    """One figure for each batch size."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(directory), dtype=dtype).eval()
    source = CheckpointSource.open(str(directory))
    plans = [plan_rank(source.config, Layout().rank(0), Precision.resolve(source.config.dtype, source.config.dtype))]
    [tensors] = fill_all(plans, source.tensor)
    limits = EngineLimits(max_batch_size=max(BATCHES), max_seq_len=PROMPT + STEPS + 32, chunk_size=PROMPT)
    executor = ReferenceExecutor(plans, lambda _, name: tensors[name], limits, dtype=dtype)
    figures = []
    for batch in BATCHES:
        prompts = torch.randint(source.config.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
        pairs = [(generate_ms(model, prompts), decode_ms(executor, prompts)) for _ in range(repeat + 1)][1:]
        theirs, ours = (statistics.median(values) for values in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{directory.name:16} batch {batch}: transformers {theirs:8.2f} ms, ours {ours:8.2f} ms, x{ratio:.2f}")
        figures.append({
            "figure": f"decode step, {directory.name}, batch {batch}", "unit": "ms", "transformers": round(theirs, 3),
            "reference": round(ours, 3), "median_speedup": round(ratio, 3), "runs": repeat,
        })  # fmt: skip
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="*", type=Path, default=BUNDLED)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = []
    for directory in options.directories:
        for figure in measure(directory, getattr(torch, options.dtype), options.repeat):
            extra = {"date": time.strftime("%Y-%m-%d"), "dtype": options.dtype, "threads": options.threads}
            lines.append(json.dumps(figure | extra | {"executor": "reference", "machine": machine()}))
    if options.save:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a", encoding="utf-8") as stream:
            stream.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
