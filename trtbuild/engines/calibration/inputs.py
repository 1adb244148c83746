"""What one matrix sees of the calibration tokens, and how much each token counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from trtbuild.engines.calibration.int4 import SecondMoments, add_ridge

# Tokens that are held in float32 at a time.
CHUNK = 2048
# Tokens that a trial of scales looks at.
_SAMPLED_TOKENS = 1024
# How many tokens the first of a sequence counts for: all later ones attend to it.
FIRST_COUNTS = 32.0
# No token is larger than so many of the median size, in mean squares.
LARGEST_SIZE = 16.0


@dataclass(frozen=True)
class Tokens:
    """x [n, in] with the weights of their squared errors, one for all or [n]; `first` [n]: which begin a sequence."""

    x: torch.Tensor
    weight: torch.Tensor | float = 1.0
    first: torch.Tensor | None = None

    def each(self) -> torch.Tensor:
        """A weight for each token, [n] in float32."""
        if isinstance(self.weight, torch.Tensor):
            return self.weight.float()
        return torch.full((len(self.x),), float(self.weight), device=self.x.device)

    def counts(self) -> torch.Tensor | float:
        """How many tokens each stands for, where first ones are to matter as they do to the model."""
        return 1.0 if self.first is None else 1.0 + (FIRST_COUNTS - 1.0) * self.first

    def sizes(self) -> torch.Tensor:
        """The mean square of each token, [n] in float32."""
        return torch.cat([x.float().square().mean(-1) for x in self.x.split(CHUNK)])


@dataclass(frozen=True)
class Inputs:
    """The tokens that one matrix sees, in parts."""

    parts: Sequence[Tokens]

    def moments(self, *, fitted: bool = True) -> torch.Tensor:
        """Weighted mean of x x^T, [in, in] in float32.

        `fitted`: for values that are fitted to it closely, with a ridge and the weights of `_fitted`.
        """
        found = SecondMoments(self.parts[0].x.shape[-1], self.parts[0].x.device)
        for x, weights in self._chunks(self._fitted() if fitted else self.parts):
            found.add(x, weights)
        return add_ridge(found.matrix(), found.num_tokens) if fitted else found.matrix()

    def _fitted(self) -> list[Tokens]:
        """The same tokens, weighted so that neither too few of them count nor one for all the others.

        First tokens are attention sinks: few, unlike the others, and a matrix that fails them spoils the whole
        sequence. Some layers' inputs are hundreds of times larger there, and would leave nothing for other tokens.
        """
        seen = [(part.sizes(), part.each()) for part in self.parts]
        counted = torch.cat([size[weight > 0] for size, weight in seen])
        limit = LARGEST_SIZE * (counted.median() if len(counted) else counted.sum())
        return [
            replace(part, weight=weight * (limit / size.clamp(min=1e-20)).clamp_(max=1.0) * part.counts())
            for part, (size, weight) in zip(self.parts, seen, strict=True)
        ]

    def magnitude(self) -> torch.Tensor:
        """Weighted mean of |x|, [in]."""
        first = self.parts[0].x
        total, weight = torch.zeros(first.shape[-1], device=first.device), torch.zeros((), device=first.device)
        for x, weights in self._chunks(self.parts):
            total.addmv_(x.abs().float().T, weights)
            weight += weights.sum()
        return total / weight.clamp(min=1e-12)

    def sample(self) -> torch.Tensor:
        """Some of the tokens, each times its weight's root: float32 [n, in].

        They are drawn at random, since every k-th would meet the first of each sequence too often. These are attention
        sinks, whose activations are hundreds of times larger than all others.
        """
        lengths = [len(part.x) for part in self.parts]
        drawn = torch.randperm(sum(lengths), generator=torch.Generator().manual_seed(0))[:_SAMPLED_TOKENS].sort().values
        found, first = [], 0
        for part, length in zip(self.parts, lengths, strict=True):
            mine = (drawn[(drawn >= first) & (drawn < first + length)] - first).to(part.x.device)
            found.append(part.x[mine].float() * part.each()[mine].sqrt().unsqueeze(-1))
            first += length
        return torch.cat(found)

    @staticmethod
    def _chunks(parts: Sequence[Tokens]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for part in parts:
            yield from zip(part.x.split(CHUNK), part.each().split(CHUNK), strict=True)
