"""A request on its way through the scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from trtbuild.engines.serving.detokenizer import TextStream
from trtbuild.engines.serving.request import Request, Usage
from trtbuild.engines.serving.sampling import Constraint, SamplerState
from trtbuild.engines.serving.slots import Slot


@dataclass
class InFlight:
    """A request with its state; without a slot while it waits. Times are on the scheduler's clock."""

    request: Request
    prompt: list[int]
    submitted_at: float
    constraints: Sequence[Constraint] = ()
    held_slot: Slot | None = None
    held_sampler: SamplerState | None = None
    text: TextStream = field(default_factory=lambda: TextStream(None))
    stop_ids: frozenset[int] = frozenset()
    prefilled: int = 0
    reused: int = 0
    output: list[int] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=lambda: [None])
    admitted_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None

    @property
    def prefilling(self) -> bool:
        return self.prefilled < len(self.prompt)

    @property
    def slot(self) -> Slot:
        """Only of an admitted request."""
        if self.held_slot is None:
            raise AssertionError(f"request {self.request.request_id} runs without a slot")
        return self.held_slot

    @property
    def sampler(self) -> SamplerState:
        """Only of an admitted request that generates."""
        if self.held_sampler is None:
            raise AssertionError(f"request {self.request.request_id} is sampled without a sampler")
        return self.held_sampler

    @property
    def expires_at(self) -> float | None:
        deadline_s = self.request.params.deadline_s
        return None if deadline_s is None else self.submitted_at + deadline_s

    def usage(self, now: float) -> Usage:
        """What it took, if it ends now."""
        return Usage(
            prompt_tokens=len(self.prompt),
            completion_tokens=len(self.output),
            reused_tokens=self.reused,
            queue_s=(now if self.admitted_at is None else self.admitted_at) - self.submitted_at,
            ttft_s=None if self.first_token_at is None else self.first_token_at - self.submitted_at,
            total_s=now - self.submitted_at,
        )
