"""`trtbuild generate --url`: one prompt to a running Triton, streamed to the terminal."""

from __future__ import annotations

import itertools
import json
import statistics
import time

import click

from trtbuild.engines.serving.request import SamplingParams
from trtbuild.triton_repo.client import Part, TritonClient, tensor_values


def generate_remote(
    url: str, name: str, prompt: str, params: SamplingParams, *, chat: bool = False, as_json: bool = False
) -> None:
    """Ask the text model `name` of the Triton whose gRPC service is at `url`; times are this client's.

    Raises `Refused`, `Unavailable` or `DeadlineExceeded` as the model says.
    """
    question = {"stream": True, **tensor_values(params)}
    if chat:
        question["messages"] = json.dumps([{"role": "user", "content": prompt}])
    else:
        question["text_input"] = prompt
    parts: list[Part] = []
    started = time.perf_counter()
    with TritonClient(url) as client:
        for part in client.stream(name, question):
            parts.append(part)
            if not as_json:
                click.echo(part.text, nl=False)
    record = _record(url, parts, started)
    if as_json:
        click.echo(json.dumps({"text": "".join(part.text for part in parts), **record}))
        return
    click.echo()
    speed = f", {record['ms_per_token']} ms per token" if record["ms_per_token"] else ""
    click.echo(
        f"[Triton at {url}: {record['num_tokens']} tokens, first after {record['ttft_s']} s{speed}; "
        f"ended by {record['finish_reason']}]",
        err=True,
    )


def _record(url: str, parts: list[Part], started: float) -> dict[str, object]:
    last = parts[-1].values
    gaps = [after.received_at - before.received_at for before, after in itertools.pairwise(parts)]
    return {
        "url": url,
        "finish_reason": last["finish_reason"].item().decode(),
        "num_prompt_tokens": last["num_input_tokens"].item(),
        "num_tokens": last["num_output_tokens"].item(),
        "ttft_s": round(parts[0].received_at - started, 4),
        "ms_per_token": round(1000 * statistics.median(gaps), 2) if gaps else None,
    }
