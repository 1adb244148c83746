"""Choosing the next token: batched over rows, on the device where the logits are.

The order is that of transformers' `generate`: constraints (guide, bad words), minimum length, penalties, temperature,
top-k, top-p, min-p, draw.

- Repetition penalty (transformers, vLLM): every token of prompt and output has a positive logit divided and a
  negative one multiplied by it, once.
- Presence and frequency penalty (OpenAI, vLLM): only of the *output*; `logit -= presence + frequency * count`.
- Log-probabilities are those of the model's own distribution, before penalties, temperature and truncation: vLLM's
  default (`logprobs_mode="raw_logprobs"`), comparable between requests and equal to what scoring the text gives.

Nothing is shared between rows. A draw inverts the row's cumulative distribution at one uniform number, a hash of
(seed, index of the token): same logits, same seed, same token, whoever shares the batch and wherever it runs.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from trtbuild.engines.serving.request import SamplingParams
from trtbuild.errors import TrtBuildError

# JSON has no -inf; vLLM reports the same number.
LOWEST_LOGPROB = -9999.0
# Top-k and top-p look at this many of the largest scores, and sort a whole row only where the cut lies further down.
HEAD = 1024


@dataclass(frozen=True)
class Sample:
    """One row's choice. `token_id` is None, and `problem` says why, where none could be made."""

    token_id: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    problem: str | None = None


class Constraint(Protocol):
    """What one request's next token may be, given those before it (`serving.guided`, `serving.bad_words`)."""

    @property
    def complete(self) -> bool:
        """Whether the answer is whole and nothing may follow."""
        ...

    def forbid(self, scores: torch.Tensor) -> None:
        """Set forbidden tokens of a row [vocab] to -inf. Raises `TrtBuildError` where it cannot tell."""
        ...

    def accept(self, token_id: int) -> None:
        """Record that the token became part of the answer."""
        ...


class SamplerState:
    """What sampling must remember of one request: its seed, how far it is, and the tokens that penalties count."""

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        vocab_size: int,
        device: torch.device,
        stop_ids: Collection[int] = (),
        constraints: Sequence[Constraint] = (),
    ) -> None:
        self.params = params
        self.constraints = constraints
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self.num_output = 0
        self.stop_ids = torch.tensor(sorted(i for i in stop_ids if i < vocab_size), dtype=torch.long, device=device)
        self.seen: torch.Tensor | None = None
        self.counts: torch.Tensor | None = None
        if params.penalised:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen[torch.tensor(list(prompt), dtype=torch.long, device=device)] = True
            self.counts = torch.zeros(vocab_size, dtype=torch.float32, device=device)

    def accept(self, token_id: int) -> None:
        """Record that `token_id` became part of the output."""
        self.num_output += 1
        for constraint in self.constraints:
            constraint.accept(token_id)
        if self.seen is not None and self.counts is not None:
            self.seen[token_id] = True
            self.counts[token_id] += 1

    @property
    def complete(self) -> bool:
        """Whether a guide is fulfilled and nothing may follow."""
        return any(constraint.complete for constraint in self.constraints)

    @property
    def holds_back_stop(self) -> bool:
        """Whether stop ids are still forbidden (`min_tokens`)."""
        return self.num_output < self.params.min_tokens and self.stop_ids.numel() > 0


def sample(logits: torch.Tensor, states: Sequence[SamplerState]) -> list[Sample]:
    """One token per row of `logits` [rows, vocab] (float32; left unchanged), row i by `states[i]`."""
    usable = torch.isfinite(logits.amax(dim=-1))
    problems = dict.fromkeys((~usable).nonzero()[:, 0].tolist(), "the engine produced logits that are not finite")
    constrained = constrain(logits, states, problems)
    adjusted = adjust(constrained, states)
    if constrained is not logits:
        usable &= torch.isfinite(adjusted.amax(dim=-1))
    tokens = adjusted.argmax(dim=-1)
    drawn = [row for row, state in enumerate(states) if not state.params.greedy]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        chosen = [states[row] for row in drawn]
        # An unusable row is reported below; until then it must not disturb the draw.
        scores = torch.where(usable[rows, None], adjusted[rows], 0.0)
        tokens[rows] = draw(
            warp(scores, [state.params for state in chosen]),
            [uniform(state.seed, state.num_output) for state in chosen],
        )
    logprobs = _logprobs(logits, tokens, states)
    samples = []
    for row, (token, ok) in enumerate(zip(tokens.tolist(), usable.tolist(), strict=True)):
        chosen, likeliest = logprobs.get(row, (None, ()))
        problem = problems.get(row, None if ok else "the guide and the bad words together leave no token")
        samples.append(Sample(token, chosen, likeliest) if problem is None else Sample(None, problem=problem))
    return samples


def constrain(logits: torch.Tensor, states: Sequence[SamplerState], problems: dict[int, str]) -> torch.Tensor:
    """[rows, vocab] with what each row's constraints forbid at -inf; the input itself where no row has any.

    A constraint that cannot tell adds its row to `problems`.
    """
    rows = [row for row, state in enumerate(states) if state.constraints]
    if not rows:
        return logits
    constrained = logits.clone()
    for row in rows:
        for constraint in states[row].constraints:
            try:
                constraint.forbid(constrained[row])
            except TrtBuildError as error:
                problems.setdefault(row, error.message)
    return constrained


def adjust(logits: torch.Tensor, states: Sequence[SamplerState]) -> torch.Tensor:
    """Minimum length and penalties applied to [rows, vocab]; the input itself where no row asks for any."""
    adjusted = logits
    held = [row for row, state in enumerate(states) if state.holds_back_stop]
    penalised = [row for row, state in enumerate(states) if state.seen is not None]
    if held or penalised:
        adjusted = logits.clone()
    for row in held:
        adjusted[row, states[row].stop_ids] = float("-inf")
    if penalised:
        rows = torch.tensor(penalised, device=logits.device)
        params = [states[row].params for row in penalised]
        seen = torch.stack([states[row].seen for row in penalised])  # pyright: ignore[reportArgumentType]
        counts = torch.stack([states[row].counts for row in penalised])  # pyright: ignore[reportArgumentType]
        repetition = _column([p.repetition_penalty for p in params], logits)
        scores = adjusted[rows]
        scores = torch.where(seen, torch.where(scores < 0, scores * repetition, scores / repetition), scores)
        scores -= _column([p.frequency_penalty for p in params], logits) * counts
        scores -= _column([p.presence_penalty for p in params], logits) * (counts > 0)
        adjusted[rows] = scores
    return adjusted


def warp(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Temperature, top-k, top-p and min-p on [rows, vocab]: scaled logits up to a constant per row, -inf where cut.

    As transformers' warpers in that order; the likeliest token always stays.
    """
    # The maximum is subtracted first, so that a small temperature cannot overflow.
    scores = (logits - logits.amax(dim=-1, keepdim=True)) / _column([p.temperature for p in params], logits)
    cutting = [row for row, p in enumerate(params) if p.top_k or p.top_p < 1]
    if cutting:
        rows = torch.tensor(cutting, device=logits.device)
        scores[rows] = _cut(scores[rows], [params[row] for row in cutting])
    if any(p.min_p for p in params):
        probabilities = scores.softmax(dim=-1)
        floor = _column([p.min_p for p in params], logits) * probabilities.amax(dim=-1, keepdim=True)
        scores = scores.masked_fill(probabilities < floor, float("-inf"))
    return scores


def _cut(scores: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Top-k, then top-p of what is left, over [rows, vocab]; of equal scores all stay or none does."""
    limits, decided = _cut_limits(scores, params, min(HEAD, scores.shape[-1]))
    for row, done in enumerate(decided):
        if not done:
            limits[row] = _cut_limits(scores[row, None], params[row : row + 1], scores.shape[-1])[0][0]
    return scores.masked_fill(scores < limits, float("-inf"))


def _cut_limits(scores: torch.Tensor, params: Sequence[SamplingParams], width: int) -> tuple[torch.Tensor, list[bool]]:
    """The smallest score that stays, [rows, 1], from the `width` largest; and for which rows those were enough."""
    vocab = scores.shape[-1]
    head = scores.topk(width, dim=-1).values
    top_k = [min(p.top_k or vocab, vocab) for p in params]
    last = torch.tensor([min(k, width) - 1 for k in top_k], device=scores.device)[:, None]
    limits = head.gather(-1, last)
    limits = torch.where(torch.tensor([k < vocab for k in top_k], device=scores.device)[:, None], limits, float("-inf"))
    total = scores.masked_fill(scores < limits, float("-inf")).logsumexp(dim=-1, keepdim=True)
    probabilities = (head.masked_fill(head < limits, float("-inf")) - total).exp()
    mass_above = probabilities.cumsum(dim=-1) - probabilities
    # Rounding in the sum must not cut the tail off at top_p 1.
    top_p = _column([p.top_p if p.top_p < 1 else float("inf") for p in params], scores)
    kept = (mass_above < top_p).sum(dim=-1, keepdim=True)
    limits = torch.where(top_p < 1, torch.maximum(limits, head.gather(-1, kept - 1)), limits)
    # A top-k cut lies at the k-th score; a top-p cut lies in the head where it drops something of the head.
    return limits, [
        width == vocab or (k <= width if k < vocab else count < width)
        for k, count in zip(top_k, kept[:, 0].tolist(), strict=True)
    ]


def draw(scores: torch.Tensor, uniforms: Sequence[float]) -> torch.Tensor:
    """Token ids [rows], from softmax of `scores` [rows, vocab], by inverting the distribution at each uniform."""
    cumulative = scores.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    points = torch.tensor(uniforms, dtype=torch.float64, device=scores.device)[:, None] * cumulative[:, -1:]
    # right=True: the first token whose cumulative mass exceeds the point, so never one of zero mass.
    return torch.searchsorted(cumulative, points, right=True)[:, 0]


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) for token `index` of a request, from a hash: no generator state, on any device."""
    message = (seed % 2**64).to_bytes(8, "little") + index.to_bytes(8, "little")
    # 48 bits: the product with the total mass then always stays below it in float64.
    return int.from_bytes(hashlib.blake2b(message, digest_size=6).digest(), "little") / 2**48


def token_logprobs(logits: torch.Tensor, targets: Sequence[int]) -> list[float]:
    """Log-probability of `targets[i]` under row i of `logits` [rows, vocab]."""
    wanted = torch.tensor(targets, device=logits.device)
    picked = logits.gather(-1, wanted[:, None])[:, 0] - logits.logsumexp(dim=-1)
    return [max(value, LOWEST_LOGPROB) for value in picked.tolist()]


def _logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, states: Sequence[SamplerState]
) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
    """(chosen, likeliest n) of each row that asks for log-probabilities."""
    wanting = {row: state.params.logprobs for row, state in enumerate(states) if state.params.logprobs is not None}
    if not wanting:
        return {}
    rows = torch.tensor(list(wanting), device=logits.device)
    logprobs = logits[rows].log_softmax(dim=-1).clamp(min=LOWEST_LOGPROB)
    chosen = logprobs.gather(-1, tokens[rows, None])[:, 0].tolist()
    values, ids = logprobs.topk(min(max(wanting.values()), logits.shape[-1]), dim=-1)
    tops = [
        tuple(zip(row_ids, row_values, strict=True))
        for row_ids, row_values in zip(ids.tolist(), values.tolist(), strict=True)
    ]
    return {row: (chosen[i], tops[i][:count]) for i, (row, count) in enumerate(wanting.items())}


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]
