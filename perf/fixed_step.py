"""An executor whose steps take a fixed time and next to no CPU, for measuring what is around it.

    --loader fixed_step:load_20ms      with perf/ on PYTHONPATH; the engine directory is not read

Logits are rows of a fixed table, chosen by a rolling hash of the tokens that the slot really holds: a wrong slot,
position or stale cache gives other tokens, and a stream's answer does not depend on its neighbours.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from trtbuild.engines.executor import LogitRows

# Where set: a file that gets a record for each step, see `STEP_RECORD`.
STEPS_VARIABLE = "TRTBUILD_FIXED_STEPS"
STEP_RECORD = struct.Struct("<ddi")
"""When the step ended (time.monotonic), the executor's own CPU seconds so far, and the slots of a decode (else 0)."""

TINY_MIXTRAL = Path(__file__).parents[1] / "tests" / "checkpoints" / "tiny-mixtral"
_ROWS = 4096
_FACTOR, _MODULUS = 1_000_003, 2**31 - 1


class FixedStepExecutor:
    """See the module. Prefill takes no time: it is the steps between tokens that are measured."""

    name: Literal["reference", "tensorrt"] = "reference"

    def __init__(self, num_slots: int, step_s: float, max_seq_len: int = 4096, chunk_size: int = 512) -> None:
        self.num_slots, self.max_seq_len, self.chunk_size, self.vocab_size = num_slots, max_seq_len, chunk_size, 1024
        self._step_s = step_s
        # [slot, position]: the hash of the tokens up to that position, itself included, behind a column of zeros.
        self._hashes = np.zeros((num_slots, max_seq_len + 1), np.int64)
        table = np.random.default_rng(7).normal(0, 2.5, (_ROWS, self.vocab_size)).astype(np.float32)
        # Ordinary text: not the special tokens, nor the byte tokens, most of which make no character.
        table[:, :259] = -1e4
        self._table = torch.from_numpy(table)
        steps = os.environ.get(STEPS_VARIABLE)
        self._log = None if steps is None else os.open(steps, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._cpu_s = 0.0

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
        """See `Executor`; embeddings are refused."""
        if embeddings is not None or not 0 < len(tokens) <= self.chunk_size or start + len(tokens) > self.max_seq_len:
            raise ValueError(f"bad chunk: {len(tokens)} tokens at {start}")
        begun = time.thread_time()
        hashes = self._hashes[slot]
        for index, token in enumerate(tokens, start):
            hashes[index + 1] = (hashes[index] * _FACTOR + token + 1) % _MODULUS
        end = start + len(tokens)
        rows = {"none": hashes[:0], "last": hashes[end : end + 1], "all": hashes[start + 1 : end + 1]}[logits]
        found = None if logits == "none" else self._table[torch.from_numpy(rows % _ROWS)]
        self._note(begun, 0)
        return found

    def decode(self, slots: Sequence[int], tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """See `Executor`."""
        if not len(set(slots)) == len(slots) == len(tokens) == len(positions) or max(positions) >= self.max_seq_len:
            raise ValueError(f"bad decode: {slots}, {tokens}, {positions}")
        begun = time.thread_time()
        time.sleep(self._step_s)
        where, at = np.asarray(slots), np.asarray(positions)
        hashes = (self._hashes[where, at] * _FACTOR + np.asarray(tokens) + 1) % _MODULUS
        self._hashes[where, at + 1] = hashes
        found = self._table[torch.from_numpy(hashes % _ROWS)]
        self._note(begun, len(slots))
        return found

    def close(self) -> None:
        """Nothing but the log is held."""
        if self._log is not None:
            os.close(self._log)

    def _note(self, begun: float, num_slots: int) -> None:
        if self._log is not None:
            self._cpu_s += time.thread_time() - begun
            os.write(self._log, STEP_RECORD.pack(time.monotonic(), self._cpu_s, num_slots))


@dataclass
class FixedStepEngine:
    """What `trtbuild.engines.load.load_engine` returns."""

    executor: FixedStepExecutor
    tokenizer: Any
    eos_token_ids: tuple[int, ...] = (2,)
    name: str = "fixed-step"
    passport: dict[str, Any] = field(default_factory=dict)


def load_20ms(engine_dir: Path, num_slots: int | None = None, dtype: str | None = None) -> FixedStepEngine:
    """Steps of 20 ms."""
    return _load(num_slots, 0.02)


def load_100ms(engine_dir: Path, num_slots: int | None = None, dtype: str | None = None) -> FixedStepEngine:
    """Steps of 100 ms, for many streams on a small machine."""
    return _load(num_slots, 0.1)


def _load(num_slots: int | None, step_s: float) -> FixedStepEngine:
    from transformers import AutoTokenizer

    return FixedStepEngine(FixedStepExecutor(num_slots or 128, step_s), AutoTokenizer.from_pretrained(TINY_MIXTRAL))


def read_steps(path: Path) -> list[tuple[float, float, int]]:
    """The records of a log, see `STEP_RECORD`; a half-written last one is left out."""
    data = path.read_bytes()
    return list(STEP_RECORD.iter_unpack(data[: len(data) - len(data) % STEP_RECORD.size]))
