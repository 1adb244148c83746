"""An OpenAI completions server with programmed delays, token ids as prompts.

python scripted_openai.py '{"ttft_s": 0.2, "spread_s": 0.1, "itl_s": 0.05, "log": FILE, "refuse_every": 0}'

prints its port. Of first tokens within `spread_s` each request has its own: without, equal requests of a closed loop
stay in step, and what is measured is how long a client takes to send so many at once.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

DEFAULTS = {"ttft_s": 0.0, "spread_s": 0.0, "itl_s": 0.0, "log": None, "refuse_every": 0}
SCRIPT: dict[str, Any] = {**DEFAULTS, **json.loads(sys.argv[1])}
# Multiples of it, modulo one, fill the interval evenly however many there are.
GOLDEN_RATIO = 0.5 * 5**0.5 - 0.5
app = FastAPI()
count = 0


@app.post("/v1/completions", response_model=None)
async def completions(request: Request) -> JSONResponse | StreamingResponse:
    global count  # noqa: PLW0603
    arrived, body = time.monotonic(), await request.json()
    count += 1
    ttft_s = SCRIPT["ttft_s"] + SCRIPT["spread_s"] * (count * GOLDEN_RATIO % 1.0)
    if SCRIPT["log"] is not None:
        with Path(SCRIPT["log"]).open("a", encoding="utf-8") as log:
            log.write(json.dumps({"arrived": arrived, "ttft_s": ttft_s, "body": body}) + "\n")
    if SCRIPT["refuse_every"] and count % SCRIPT["refuse_every"] == 0:
        return JSONResponse({"error": {"message": "the queue is full"}}, status_code=429)
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
    usage["total_tokens"] = sum(usage.values())
    if not body.get("stream"):
        await wait(arrived + ttft_s + (body["max_tokens"] - 1) * SCRIPT["itl_s"])
        return JSONResponse(envelope(" tok" * body["max_tokens"]) | {"usage": usage})
    return StreamingResponse(events(arrived + ttft_s, body["max_tokens"], usage), media_type="text/event-stream")


async def events(first_at: float, num_tokens: int, usage: dict[str, int]) -> AsyncIterator[str]:
    for index in range(num_tokens):
        await wait(first_at + index * SCRIPT["itl_s"])
        yield f"data: {json.dumps(envelope(' tok'))}\n\n"
    yield f"data: {json.dumps({**envelope(''), 'choices': [], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"


async def wait(due: float) -> None:
    await asyncio.sleep(max(0.0, due - time.monotonic()))


def envelope(text: str) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None}
    return {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}


if __name__ == "__main__":
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    sys.stdout.write(f"{listening.getsockname()[1]}\n")
    sys.stdout.flush()
    uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listening])
