"""`trtbuild generate`: one prompt through an engine worker, streamed to the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from trtbuild.engines.passport import Passport
from trtbuild.engines.serving.launch import start_worker
from trtbuild.engines.serving.request import RequestOutput, SamplingParams
from trtbuild.errors import TrtBuildError
from trtbuild.progress import ProgressFactory, no_progress


def generate(
    engine_dir: Path,
    prompt: str,
    params: SamplingParams,
    *,
    chat: bool = False,
    dtype: str | None = None,
    executor: str | None = None,
    threads: int | None = None,
    as_json: bool = False,
    progress: ProgressFactory = no_progress,
) -> RequestOutput:
    """Start a worker, stream the answer to stdout, and say on stderr which executor made it and how fast.

    With `chat` the prompt is a user's message and the tokenizer's chat template is applied. Raises TrtBuildError with
    the scheduler's reason where the answer ends in an error, Refused for an engine that nothing here can run.
    """
    Passport.open(engine_dir).check_runnable()
    with progress(f"loading {engine_dir.name}", 1):
        started_worker = start_worker(engine_dir, slots=1, dtype=dtype, executor=executor, threads=threads)
    with started_worker as worker, worker.connect() as client:
        output = RequestOutput("generate")
        for event in client.generate([{"role": "user", "content": prompt}] if chat else prompt, params):
            output.add(event)
            if not as_json:
                click.echo(event.text, nl=False)
        record = _measure(worker.hello, output)
    if output.error:
        raise TrtBuildError(f"{engine_dir.name}: {output.error}")
    if as_json:
        answer = {"text": output.text, "token_ids": output.token_ids}
        if params.logprobs is not None:
            answer |= {"logprobs": output.logprobs, "top_logprobs": output.top_logprobs}
        click.echo(json.dumps(answer | record))
    else:
        click.echo()
        click.echo(_describe(record), err=True)
    return output


def _measure(hello: dict[str, Any], output: RequestOutput) -> dict[str, Any]:
    """Times by the worker's clock: tokens may reach this process in bursts."""
    count, usage = len(output.token_ids), output.usage
    ttft = usage.ttft_s if usage else None
    decoding = usage.total_s - ttft if usage and ttft is not None else 0.0
    return {
        "executor": hello["executor"],
        "executor_why": hello["executor_why"],
        "device": hello["device"],
        "finish_reason": output.finish_reason,
        "num_tokens": count,
        "ttft_s": None if ttft is None else round(ttft, 4),
        "tokens_per_s": round((count - 1) / decoding, 2) if count > 1 and decoding > 0 else None,
    }


def _describe(record: dict[str, Any]) -> str:
    name = {
        "reference": f"reference executor (PyTorch on {record['device']}, not TensorRT: {record['executor_why']})",
        "tensorrt": f"TensorRT executor on {record['device']}",
    }.get(record["executor"], record["executor"])
    speed = f", {record['tokens_per_s']} tokens/s" if record["tokens_per_s"] else ""
    first = "" if record["ttft_s"] is None else f", first after {record['ttft_s']:.2f} s"
    return f"[{name}: {record['num_tokens']} tokens{first}{speed}; ended by {record['finish_reason']}]"
