"""An executor whose logits are a pure function of the tokens that its slot really holds, and a loader that serves it.

A scheduler that feeds a wrong position, slot or token, or reuses a stale cache, gets other tokens. Positions behind a
chunk are poisoned up to the chunk size, as the real caches are by a padded chunk.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from trtbuild.engines.executor import LogitRows
from trtbuild.engines.serving.request import Request, SamplingParams
from trtbuild.errors import Refused

POISON = -1
TINY_MIXTRAL = Path(__file__).parents[2] / "checkpoints" / "tiny-mixtral"


def request(name: str, prompt: list[int], **params: Any) -> Request:
    return Request(name, prompt, SamplingParams(**params))


class FakeExecutor:
    """See the module; `calls` records ("prefill", slot, start, length) and ("decode", slots)."""

    name: Literal["reference", "tensorrt"] = "reference"

    def __init__(
        self, num_slots: int = 3, max_seq_len: int = 40, chunk_size: int = 5, vocab_size: int = 32, step_s: float = 0.0
    ) -> None:
        self.num_slots, self.max_seq_len = num_slots, max_seq_len
        self.chunk_size, self.vocab_size = chunk_size, vocab_size
        self.cache = [[POISON] * (max_seq_len + chunk_size) for _ in range(num_slots)]
        self.calls: list[tuple[Any, ...]] = []
        self.nan_after: tuple[int, ...] | None = None
        self.closed = False
        self._step_s = step_s

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def prefill(
        self,
        slot: int,
        tokens: Sequence[int],
        start: int,
        logits: LogitRows = "last",
        embeddings: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        assert embeddings is None, "its logits are a function of tokens"
        if not 0 < len(tokens) <= self.chunk_size or start + len(tokens) > self.max_seq_len:
            raise ValueError(f"bad chunk: {len(tokens)} tokens at {start}")
        self.calls.append(("prefill", slot, start, len(tokens)))
        time.sleep(self._step_s)
        end = start + len(tokens)
        self.cache[slot][start : start + self.chunk_size] = [*tokens, *[POISON] * (self.chunk_size - len(tokens))]
        rows = {"none": range(0), "last": range(end - 1, end), "all": range(start, end)}[logits]
        return None if logits == "none" else torch.stack([self._logits(slot, position) for position in rows])

    def decode(self, slots: Sequence[int], tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        if len(set(slots)) != len(slots) or not len(slots) == len(tokens) == len(positions):
            raise ValueError(f"bad decode: {slots}, {tokens}, {positions}")
        self.calls.append(("decode", tuple(slots)))
        time.sleep(self._step_s)
        for slot, token, position in zip(slots, tokens, positions, strict=True):
            if position >= self.max_seq_len:
                raise ValueError(f"position {position} is past the slot")
            self.cache[slot][position] = token
        return torch.stack([self._logits(slot, position) for slot, position in zip(slots, positions, strict=True)])

    def close(self) -> None:
        self.closed = True

    def _logits(self, slot: int, position: int) -> torch.Tensor:
        history = self.cache[slot][: position + 1]
        if POISON in history:
            raise ValueError(f"slot {slot} is read at {position} where nothing valid was written: {history}")
        if self.nan_after is not None and tuple(history[: len(self.nan_after)]) == self.nan_after:
            return torch.full((self.vocab_size,), float("nan"))
        return logits_after(history, self.vocab_size)


class ProductExecutor(FakeExecutor):
    """Its prefill also does what a real one does on a CPU: a product of a shape that depends on the chunk's length."""

    def prefill(
        self,
        slot: int,
        tokens: Sequence[int],
        start: int,
        logits: LogitRows = "last",
        embeddings: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        torch.mm(torch.ones((len(tokens), 64), dtype=torch.bfloat16), torch.ones((64, 64), dtype=torch.bfloat16))
        return super().prefill(slot, tokens, start, logits, embeddings)


def logits_after(history: Sequence[int], vocab_size: int) -> torch.Tensor:
    """[vocab_size] float32, a hash of the token history."""
    digest = hashlib.blake2b(repr(list(history)).encode(), digest_size=8).digest()
    values = np.random.default_rng(int.from_bytes(digest, "little")).normal(0, 2.5, vocab_size)
    return torch.from_numpy(values.astype(np.float32))


@dataclass
class FakeEngine:
    """What `trtbuild.engines.load.load_engine` returns."""

    executor: FakeExecutor
    tokenizer: Any = None
    eos_token_ids: tuple[int, ...] = (2,)
    name: str = "fake"
    passport: dict[str, Any] = field(default_factory=dict)


def load_fake(engine_dir: Path, num_slots: int | None = None, dtype: str | None = None) -> FakeEngine:
    """Behaviour by the directory's name; steps of 20 ms make "in flight" a state that a test can meet."""
    from transformers import AutoTokenizer

    if engine_dir.name == "refused":
        raise Refused("engine.json: built for sm120, this GPU is sm90")
    if engine_dir.name == "crash":
        raise RuntimeError("segment 3 is corrupt")
    if engine_dir.name == "slow":
        time.sleep(60)
    executor = FakeExecutor(num_slots or 4, max_seq_len=400, chunk_size=16, vocab_size=1024, step_s=0.02)
    if engine_dir.name == "device-lost":
        executor.prefill = _fail  # type: ignore[method-assign]
    tokenizer = AutoTokenizer.from_pretrained(TINY_MIXTRAL)
    return FakeEngine(executor, tokenizer, name=engine_dir.name)


def load_products(engine_dir: Path, num_slots: int | None = None, dtype: str | None = None) -> FakeEngine:
    """Steps that take no time, and chunks of up to 1024 tokens."""
    return FakeEngine(ProductExecutor(max_seq_len=1100, chunk_size=1024, vocab_size=1024))


def _fail(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("device lost")
