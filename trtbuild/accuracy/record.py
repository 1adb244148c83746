"""The record of a verification: what goes into the passport, and what the command prints."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import click

import trtbuild
from trtbuild.accuracy.gate import block_name, blocks_allowed

RECORD_FORMAT = 1


def environment(executor: str, why: str, device: str, builder: Mapping[str, str]) -> dict[str, Any]:
    """Who made the numbers. The reference executor is not TensorRT, and the record says so."""
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if executor == "tensorrt":
        versions[builder["name"]] = builder["version"]
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "trtbuild": trtbuild.__version__,
        "executor": executor, "executor_why": why, "tensorrt_has_run": executor == "tensorrt",
        "device": device, "device_name": name, "versions": versions,
    }  # fmt: skip


def plain_numbers(value: Any) -> Any:
    """The same with floats that JSON has, six digits of each: NaN and infinities become text."""
    if isinstance(value, dict):
        return {key: plain_numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_numbers(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


def worst_blocks(record: Mapping[str, Any], count: int) -> list[tuple[str, float, float]]:
    """Name, error and limit of the blocks that are nearest to their limits, or furthest over them."""
    found = []
    for block in record["blocks"]:
        pairs = zip(block["errors"], blocks_allowed(block, record["limits"]), strict=True)
        found += [(block_name(block, i), _number(error), allowed) for i, (error, allowed) in enumerate(pairs)]
    return sorted(found, key=lambda item: -_share(item[1], item[2]))[:count]


def _share(error: float, allowed: float) -> float:
    return math.inf if math.isnan(error) or not allowed else error / allowed


def _number(value: float | str) -> float:
    return float(value)


def print_record(name: str, record: Mapping[str, Any], as_json: bool) -> None:
    """The numbers beside what is allowed, in the order of the checks; as JSON, the record."""
    if as_json:
        click.echo(json.dumps(dict(record)))
        return
    executor = f"TensorRT on {record['device_name']}"
    if not record["tensorrt_has_run"]:
        executor = (
            f"reference executor (PyTorch on {record['device']}): TensorRT has not run ({record['executor_why']})"
        )
    click.echo(f"{name}: {'passed' if record['passed'] else 'FAILED'}")
    click.echo(f"  made by     {executor}")
    click.echo(f"  source      {record['source']['model']}, in float32")
    limits = record["limits"]
    for text in record["texts"]:
        click.echo(
            f"  text        {text['name']}, {text['num_tokens']} tokens: perplexity {_short(text['source_ppl'])} -> "
            f"{_short(text['engine_ppl'])}, {_percent(text['ppl_increase'])} (standard error "
            f"{_percent(text['ppl_increase_se'])}; at most {_percent(limits['max_ppl_increase'])})"
        )
        click.echo(
            f"              KL {_short(text['mean_kl'])} nats (99 %: {_short(text['p99_kl'])}, at most "
            f"{limits['max_kl']:g} in the mean), top-1 agreement {_percent(text['top1'])} "
            f"(at least {_percent(limits['min_top1'])})"
        )
    print_checks_of_executor(record)
    errors = [_number(error) for block in record["blocks"] for error in block["errors"]]
    click.echo(f"  layers      {len(errors)} blocks, median error {_short(median(errors))}; nearest to their limits:")
    for where, error, allowed in worst_blocks(record, 3):
        click.echo(f"              {where}: {_short(error)} of {allowed:.3g}")
    if record["golden"]:
        counts = record["golden"]["summary"]
        source = "" if record["golden"]["source_ran"] else "; the source does not fit in memory and was not asked"
        click.echo(
            f"  golden      {counts['questions']} questions: engine {counts['engine_passed']}, source "
            f"{counts['source_passed']} as expected; {counts['both_failed']} fail in both{source}"
        )


def print_checks_of_executor(record: Mapping[str, Any]) -> None:
    """Batch invariance, the long prompt and finiteness."""
    runs, logits = record["invariance"]["ways"], record["logits"]
    same = sum(run["same_tokens"] for run in runs)
    largest = max(_number(run["median_difference"]) for run in runs)
    click.echo(
        f"  invariance  {same} of {len(runs)} answers are the same tokens; logits differ by at most {_short(largest)} "
        f"of their spread (limit {record['invariance']['noise_limit']:g})"
    )
    for run in runs:
        if not run["same_tokens"]:
            click.echo(
                f"              prompt {run['prompt']} {run['way']}: parts at step {run['parts_at_step']}, where the "
                f"margin was {_short(run['margin_there'])}; logits differ by up to "
                f"{_short(run['largest_logit_difference'])}"
            )
    prompt = record["long_prompt"]
    click.echo(
        f"  long prompt {prompt['num_tokens']} tokens, then to position {prompt['last_position']}: KL "
        f"{_short(prompt['mean_kl'])} nats over the prompt's last {prompt['num_compared']}"
    )
    click.echo(f"  logits      {logits['rows']} rows, {logits['not_finite']} not finite")


def _short(value: float | str) -> str:
    return f"{_number(value):.4g}"


def _percent(value: float | str) -> str:
    return f"{100 * _number(value):.2f} %"
