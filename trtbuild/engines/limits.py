"""How large a step and a slot of an engine may be: the bounds that every plan is compiled for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trtbuild.errors import refuse_all

# Routing, masks and conditional experts take scratch in proportion to the chunk, so it stays small.
MAX_CHUNK_SIZE = 512
# Rows of the head plan when batches are small: as many logits as one step of prompt scoring asks for.
MIN_HEAD_ROWS = 8


@dataclass(frozen=True)
class EngineLimits:
    """Bounds of an engine; raises `Refused` with every problem found.

    max_batch_size: slots of one decode step.
    max_seq_len: tokens that a slot holds, prompt and answer together.
    chunk_size: tokens of one prefill step.
    max_input_len: tokens of the longest prompt that is accepted; None for one less than max_seq_len.
    """

    max_batch_size: int = 16
    max_seq_len: int = 2048
    chunk_size: int = 512
    max_input_len: int | None = None

    def __post_init__(self) -> None:
        refuse_all("engine limits", self._problems())

    def _problems(self) -> Iterator[str]:
        for name in ("max_batch_size", "max_seq_len", "chunk_size"):
            if getattr(self, name) < 1:
                yield f"{name} is {getattr(self, name)}, must be at least 1"
        if self.max_input_len is not None and not 1 <= self.max_input_len < self.max_seq_len:
            yield f"max_input_len is {self.max_input_len}, must be from 1 to max_seq_len - 1 ({self.max_seq_len - 1})"
        if self.chunk_size > MAX_CHUNK_SIZE:
            yield f"chunk_size is {self.chunk_size}, at most {MAX_CHUNK_SIZE} (a longer prompt runs in several chunks)"
        if self.chunk_size > self.max_seq_len:
            yield f"chunk_size {self.chunk_size} is longer than max_seq_len {self.max_seq_len}; lower it to that"

    @property
    def cache_capacity(self) -> int:
        """Positions of a slot's KV cache: a chunk's padding may be written past the last token."""
        return self.max_seq_len + self.chunk_size

    @property
    def max_step_tokens(self) -> int:
        """Tokens of the largest step, prefill or decode."""
        return max(self.chunk_size, self.max_batch_size)

    @property
    def max_head_rows(self) -> int:
        """Rows whose logits one run of the head plan computes."""
        return min(max(self.max_batch_size, MIN_HEAD_ROWS), self.max_step_tokens)
