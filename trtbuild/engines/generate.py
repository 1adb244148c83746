"""`trtbuild generate`: one prompt through an engine worker, streamed to the terminal."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

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
    threads: int | None = None,
    as_json: bool = False,
    progress: ProgressFactory = no_progress,
) -> RequestOutput:
    """Start a worker, stream the answer to stdout, and say on stderr which executor made it and how fast.

    With `chat` the prompt is a user's message and the tokenizer's chat template is applied. Raises TrtBuildError with
    the scheduler's reason where the answer ends in an error.
    """
    with progress(f"loading {engine_dir.name}", 1):
        started_worker = start_worker(engine_dir, slots=1, dtype=dtype, threads=threads)
    with started_worker as worker, worker.connect() as client:
        started = time.monotonic()
        first_token = None
        output = RequestOutput("generate")
        for event in client.generate([{"role": "user", "content": prompt}] if chat else prompt, params):
            first_token = first_token or time.monotonic()
            output.add(event)
            if not as_json:
                click.echo(event.text, nl=False)
        record = _measure(worker.hello, output, started, first_token or started)
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


def _measure(hello: dict[str, Any], output: RequestOutput, started: float, first_token: float) -> dict[str, Any]:
    count = len(output.token_ids)
    decoding = time.monotonic() - first_token
    return {
        "executor": hello["executor"],
        "device": hello.get("device", "cpu"),
        "finish_reason": output.finish_reason,
        "num_tokens": count,
        "ttft_s": round(first_token - started, 4),
        "tokens_per_s": round((count - 1) / decoding, 2) if count > 1 and decoding > 0 else None,
    }


def _describe(record: dict[str, Any]) -> str:
    name = {"reference": f"reference executor (PyTorch on {record['device']}, not TensorRT)"}.get(
        record["executor"], record["executor"]
    )
    speed = f", {record['tokens_per_s']} tokens/s" if record["tokens_per_s"] else ""
    first = f"first after {record['ttft_s']:.2f} s"
    return f"[{name}: {record['num_tokens']} tokens, {first}{speed}; ended by {record['finish_reason']}]"
