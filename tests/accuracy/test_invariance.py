"""An executor whose answers depend on where they are computed is found out; one that only rounds is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import TINY_QWEN2, executor_of, some_tokens

from trtbuild.accuracy.distributions import WatchedExecutor, prefill_logits
from trtbuild.accuracy.invariance import check_invariance, check_long_prompt, noise_limit, prompts_of
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.engines.executor import LogitRows
from trtbuild.engines.reference.executor import ReferenceExecutor

BLOCKS = [some_tokens(100, 1024, seed) for seed in range(4)]


@pytest.fixture(scope="module")
def source() -> CheckpointSource:
    return CheckpointSource.open(str(TINY_QWEN2))


def executor(
    source: CheckpointSource,
    dtype: torch.dtype = torch.bfloat16,
    *,
    max_batch_size: int = 4,
    max_seq_len: int = 96,
    chunk_size: int = 32,
) -> ReferenceExecutor:
    return executor_of(
        source, dtype=dtype, max_batch_size=max_batch_size, max_seq_len=max_seq_len, chunk_size=chunk_size
    )


class Changed(WatchedExecutor):
    """An executor with one fault."""

    def __init__(self, inner: ReferenceExecutor, fault: str) -> None:
        super().__init__(inner)
        self.fault = fault

    def prefill(
        self,
        slot: int,
        tokens: Sequence[int],
        start: int,
        logits: LogitRows = "last",
        embeddings: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        if self.fault == "chunks forget what came before":
            start = 0
        if self.fault == "later chunks slip by a position":
            start = max(0, start - 1)
        return super().prefill(slot, tokens, start, logits, embeddings)

    def decode(self, slots: Sequence[int], tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        if self.fault == "rows of a batch are exchanged" and len(slots) > 1:
            return super().decode(slots, tokens, positions).roll(1, 0)
        if self.fault == "the last slot forgets a token":
            positions = [p - (slot == self.num_slots - 1) for p, slot in zip(positions, slots, strict=True)]
        logits = super().decode(slots, tokens, positions)
        if self.fault == "noise":
            generator = torch.Generator().manual_seed(len(slots) + slots[0])
            logits = logits + 0.5 * noise_limit("bf16", 3) * logits.std() * torch.randn(
                logits.shape, generator=generator
            )
        return logits


@pytest.mark.parametrize(
    ("fault", "way"),
    [
        ("chunks forget what came before", "in uneven chunks"),
        ("later chunks slip by a position", "in uneven chunks"),
        ("rows of a batch are exchanged", "in a full batch"),
        ("the last slot forgets a token", "on the last slot"),
    ],
)
@pytest.mark.parametrize("compute", ["bf16", "fp8"])
def test_a_fault_of_place_is_found(source: CheckpointSource, fault: str, way: str, compute: str) -> None:
    """Also within fp8's wider limits, which the rounding of activations takes."""
    found = check_invariance(
        Changed(executor(source), fault), prompts_of(BLOCKS, 60), compute, 3, strict=compute == "bf16"
    )
    assert any(way in line for line in found["failures"]), found["failures"]
    assert not any("again:" in line for line in found["failures"])


def test_limits_grow_with_depth_up_to_a_bound() -> None:
    """Healthy ones of 24 layers showed 0.017 and 0.077; no depth makes exchanged rows pass."""
    assert 3 * 0.017 < noise_limit("bf16", 24) < 0.1
    assert 2 * 0.077 < noise_limit("fp8", 24) < 0.2
    assert noise_limit("bf16", 1) == noise_limit("bf16", 3) < 0.02
    assert noise_limit("bf16", 500) == noise_limit("fp8", 80) < 0.5 * 0.6


def test_rounding_is_not_a_fault(source: CheckpointSource) -> None:
    found = check_invariance(executor(source), prompts_of(BLOCKS, 60), "bf16", 3, strict=True)
    assert found["failures"] == []
    assert len(found["ways"]) == 12
    # Chunks of other shapes round otherwise, which is what the limit leaves room for.
    differences = {run["way"]: run["median_difference"] for run in found["ways"]}
    assert differences["again"] == 0
    assert 0 < differences["in uneven chunks"] < noise_limit("bf16", 3) / 2
    exact = check_invariance(executor(source, torch.float32), prompts_of(BLOCKS, 60), "float32", 3, strict=True)
    assert exact["failures"] == []
    assert all(run["same_tokens"] for run in exact["ways"])


def test_parting_at_a_near_tie_is_reported_with_its_margin(source: CheckpointSource) -> None:
    found = check_invariance(Changed(executor(source), "noise"), prompts_of(BLOCKS, 60), "bf16", 3, strict=True)
    assert found["failures"] == []
    parted = [run for run in found["ways"] if not run["same_tokens"]]
    assert parted
    for run in parted:
        assert run["margin_there"] <= 2 * run["largest_logit_difference"]
        assert 0 <= run["parts_at_step"] < found["num_steps"]


def test_one_slot_has_no_batch(source: CheckpointSource) -> None:
    found = check_invariance(executor(source, max_batch_size=1), prompts_of(BLOCKS, 60), "bf16", 3, strict=True)
    assert {run["way"] for run in found["ways"]} == {"again", "in uneven chunks"}


def source_logits(executor: ReferenceExecutor, tokens: Sequence[int], count: int) -> torch.Tensor:
    return prefill_logits(executor, 0, tokens)[-count:]


@pytest.mark.parametrize("length", [95, 40])
def test_a_long_prompt_reaches_the_last_position(source: CheckpointSource, length: int) -> None:
    tokens = some_tokens(length, 1024)
    exact = source_logits(executor(source, torch.float32), tokens, 32)
    watched = WatchedExecutor(executor(source))
    found = check_long_prompt(watched, tokens, exact)
    assert (found["num_tokens"], found["num_compared"], found["last_position"]) == (length, 32, 95)
    assert found["num_decoded"] == {95: 1, 40: 32}[length]
    assert 0 < found["mean_kl"] < 0.01
    assert watched.num_not_finite == 0


def test_what_breaks_late_in_a_slot_is_seen(source: CheckpointSource) -> None:
    tokens = some_tokens(95, 1024)
    exact = source_logits(executor(source, torch.float32), tokens, 32)
    found = check_long_prompt(Changed(executor(source), "chunks forget what came before"), tokens, exact)
    assert found["mean_kl"] > 0.05


def with_nan(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        logits = method(*arguments, **named)
        if logits is not None:
            logits = logits.clone()
            logits[-1, 7] = float("nan")
        return logits

    return call


def test_every_logit_is_watched(source: CheckpointSource, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = executor(source)
    watched = WatchedExecutor(inner)
    prefill_logits(watched, 0, BLOCKS[0][:40])
    assert (watched.num_rows, watched.num_not_finite) == (40, 0)
    monkeypatch.setattr(inner, "decode", with_nan(inner.decode))
    watched.decode([0, 1], [5, 6], [40, 0])
    assert (watched.num_rows, watched.num_not_finite) == (42, 1)
