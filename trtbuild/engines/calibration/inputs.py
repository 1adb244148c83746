"""What one matrix sees of the calibration tokens, and how much each token counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from trtbuild.engines.calibration.int4 import SecondMoments, add_ridge

# Tokens that are held in float32 at a time.
CHUNK = 2048
# Tokens that a trial of scales looks at.
_SAMPLED_TOKENS = 1024


@dataclass(frozen=True)
class Inputs:
    """Tokens x [n, in] in parts, each with the weight of its tokens' squared error: one, or one each, [n]."""

    parts: Sequence[tuple[torch.Tensor, torch.Tensor | float]]

    def moments(self, *, ridge: bool = True) -> torch.Tensor:
        """Weighted mean of x x^T, [in, in] in float32."""
        first, _ = self.parts[0]
        found = SecondMoments(first.shape[-1], first.device)
        for x, weights in self._chunks():
            found.add(x, weights)
        return add_ridge(found.matrix(), found.num_tokens) if ridge else found.matrix()

    def magnitude(self) -> torch.Tensor:
        """Weighted mean of |x|, [in]."""
        first, _ = self.parts[0]
        total, weight = torch.zeros(first.shape[-1], device=first.device), torch.zeros((), device=first.device)
        for x, weights in self._chunks():
            total.addmv_(x.abs().float().T, weights)
            weight += weights.sum()
        return total / weight.clamp(min=1e-12)

    def sample(self) -> torch.Tensor:
        """Some of the tokens, each times its weight's root: float32 [n, in].

        They are drawn at random, since every k-th would meet the first of each sequence too often. These are attention
        sinks, whose activations are hundreds of times larger than all others.
        """
        lengths = [len(x) for x, _ in self.parts]
        drawn = torch.randperm(sum(lengths), generator=torch.Generator().manual_seed(0))[:_SAMPLED_TOKENS].sort().values
        found, first = [], 0
        for (x, weight), length in zip(self.parts, lengths, strict=True):
            mine = (drawn[(drawn >= first) & (drawn < first + length)] - first).to(x.device)
            found.append(x[mine].float() * _each(weight, x)[mine].sqrt().unsqueeze(-1))
            first += length
        return torch.cat(found)

    def _chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for x, weight in self.parts:
            yield from zip(x.split(CHUNK), _each(weight, x).split(CHUNK), strict=True)


def _each(weight: torch.Tensor | float, x: torch.Tensor) -> torch.Tensor:
    """A weight for each token, [n] in float32."""
    if isinstance(weight, torch.Tensor):
        return weight.float()
    return torch.full((len(x),), float(weight), device=x.device)
