"""Answers of /v1/completions: whole, or as chunks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from trtbuild.triton_repo.openai.answers import Usage, envelope, gather, number
from trtbuild.triton_repo.openai.schemas import CompletionBody
from trtbuild.triton_repo.openai.streaming import chunk_events
from trtbuild.triton_repo.openai.wire import Piece


async def whole_completion(body: CompletionBody, pieces: AsyncIterator[Piece]) -> dict[str, Any]:
    """A text_completion object; choices are ordered by prompt, then by sequence."""
    wholes, usage = await gather(pieces)
    choices = [
        {
            "index": prompt * body.n + sequence,
            "text": whole.text,
            "logprobs": None if whole.logprobs is None else Logprobs().take(whole.logprobs),
            "finish_reason": whole.finish_reason,
        }
        for (prompt, sequence), whole in wholes.items()
    ]
    return envelope("cmpl", "text_completion", body.model) | {"choices": choices, "usage": usage.to_dict()}


def completion_events(body: CompletionBody, first: Piece, pieces: AsyncIterator[Piece]) -> AsyncIterator[bytes]:
    """Server-sent text_completion objects; `first` is the piece that was waited for."""
    return chunk_events(_CompletionStream(body), first, pieces)


class Logprobs:
    """OpenAI's older form: parallel lists; offsets are in characters, from the beginning of the answer."""

    def __init__(self) -> None:
        self._offset = 0

    def take(self, tokens: list[dict[str, Any]]) -> dict[str, Any]:
        """The lists of some more tokens."""
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            text = token["token"] or ""
            found["tokens"].append(text)
            found["token_logprobs"].append(number(token["logprob"]))
            # The chosen token too, which need not be among the likeliest.
            top = {one["token"] or "": number(one["logprob"]) for one in reversed([token, *token["top"]])}
            found["top_logprobs"].append(top)
            found["text_offset"].append(self._offset)
            self._offset += len(text)
        return found


class _CompletionStream:
    """From pieces to chunks."""

    def __init__(self, body: CompletionBody) -> None:
        self._body = body
        self._head = envelope("cmpl", "text_completion", body.model)
        self._logprobs: dict[int, Logprobs] = {}
        self._held: dict[int, list[dict[str, Any]]] = {}
        self._usage = Usage()
        self.include_usage = body.stream_options is not None and body.stream_options.include_usage

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """One chunk, or none while a text is held back."""
        self._usage.add(piece)
        index = piece.prompt_index * self._body.n + piece.sequence_index
        self._held.setdefault(index, []).extend(piece.logprobs or [])
        if not piece.text and piece.finish_reason is None:
            return []
        logprobs = None
        if self._held[index]:
            logprobs = self._logprobs.setdefault(index, Logprobs()).take(self._held.pop(index))
        choice = {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}
        usage = {"usage": None} if self.include_usage else {}
        return [self._head | {"choices": [choice]} | usage]

    def last(self) -> dict[str, Any]:
        """The chunk that has the usage, and no choice."""
        return self._head | {"choices": [], "usage": self._usage.to_dict()}
