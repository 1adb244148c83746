"""What chat and plain completions share while an answer is put together: counting, and gathering whole texts."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from trtbuild.triton_repo.openai.wire import Piece

# OpenAI's lowest: JSON has no infinity.
_LOWEST_LOGPROB = -9999.0


@dataclass
class Usage:
    """Prompt tokens count once per prompt, however many sequences it has."""

    prompts: dict[int, int] = field(default_factory=dict)
    num_completion_tokens: int = 0

    def add(self, piece: Piece) -> None:
        """Only last pieces carry counts."""
        if piece.finish_reason is not None:
            self.prompts[piece.prompt_index] = piece.num_prompt_tokens
            self.num_completion_tokens += piece.num_tokens

    def to_dict(self) -> dict[str, int]:
        num_prompt_tokens = sum(self.prompts.values())
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": num_prompt_tokens + self.num_completion_tokens,
        }


@dataclass
class Whole:
    """One sequence to its end."""

    text: str = ""
    logprobs: list[dict[str, Any]] | None = None
    finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        if piece.logprobs is not None:
            self.logprobs = [*(self.logprobs or []), *piece.logprobs]
        self.finish_reason = piece.finish_reason or self.finish_reason


async def gather(pieces: AsyncIterator[Piece]) -> tuple[dict[tuple[int, int], Whole], Usage]:
    """Every sequence by (prompt, sequence), in that order, and the usage."""
    wholes: dict[tuple[int, int], Whole] = {}
    usage = Usage()
    async for piece in pieces:
        wholes.setdefault((piece.prompt_index, piece.sequence_index), Whole()).add(piece)
        usage.add(piece)
    return dict(sorted(wholes.items())), usage


def envelope(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """The fields that every chunk of an answer repeats."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def number(logprob: float | None) -> float:
    """A log-probability that JSON can write."""
    return _LOWEST_LOGPROB if logprob is None else max(logprob, _LOWEST_LOGPROB)
