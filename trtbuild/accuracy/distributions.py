"""Next-token distributions of source and engine over a text: perplexity, KL divergence, top-1 agreement."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from trtbuild.accuracy.text_blocks import TextBlocks
from trtbuild.engines.executor import Executor, LogitRows

# Rows of logits that are compared at a time: with a vocabulary of 150,000 each takes 0.6 MiB, five times over.
_ROWS = 32


class WatchedExecutor:
    """An `Executor` that counts the rows of logits that pass through, and those with NaN or Inf in them."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.name: Literal["reference", "tensorrt"] = executor.name
        self.num_slots, self.max_seq_len = executor.num_slots, executor.max_seq_len
        self.chunk_size, self.vocab_size = executor.chunk_size, executor.vocab_size
        self.num_rows = 0
        self.num_not_finite = 0

    @property
    def device(self) -> torch.device:
        return self._executor.device

    def prefill(
        self,
        slot: int,
        tokens: Sequence[int],
        start: int,
        logits: LogitRows = "last",
        embeddings: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        found = self._executor.prefill(slot, tokens, start, logits, embeddings)
        return None if found is None else self._watch(found)

    def decode(self, slots: Sequence[int], tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        return self._watch(self._executor.decode(slots, tokens, positions))

    def close(self) -> None:
        self._executor.close()

    def _watch(self, logits: torch.Tensor) -> torch.Tensor:
        self.num_rows += len(logits)
        self.num_not_finite += int((~torch.isfinite(logits).all(dim=-1)).sum())
        return logits


def prefill_logits(
    executor: Executor, slot: int, tokens: Sequence[int], start: int = 0, chunks: Sequence[int] = ()
) -> torch.Tensor:
    """Logits [len(tokens), vocab] of a sequence in one slot, in chunks of these lengths, then of the executor's."""
    found, position = [], 0
    for length in (*chunks, *[executor.chunk_size] * len(tokens)):
        part = tokens[position : position + length]
        if not part:
            break
        logits = executor.prefill(slot, part, start + position, "all")
        if logits is None:
            raise ValueError("the executor gave no logits for a chunk")
        found.append(logits)
        position += len(part)
    return torch.cat(found)


@dataclass(frozen=True)
class TextResult:
    """Comparison over one text. `ppl_increase` and its standard error are parts (0.02 is 2 %).

    The standard error is that of the mean over blocks of the paired difference of log-likelihood: the texts' own
    variation, which is far larger, cancels. None with one block.
    """

    name: str
    sha256: str
    num_tokens: int
    num_blocks: int
    source_ppl: float
    engine_ppl: float
    ppl_increase: float
    ppl_increase_se: float
    mean_kl: float
    p99_kl: float
    max_kl: float
    top1: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Divergence:
    """Per-token comparisons, gathered block by block: nats, and whether both models' likeliest tokens agree."""

    source_nll: list[float] = field(default_factory=list)
    engine_nll: list[float] = field(default_factory=list)
    kl: list[torch.Tensor] = field(default_factory=list)
    agree: list[torch.Tensor] = field(default_factory=list)

    def add(self, source: torch.Tensor, engine: torch.Tensor, tokens: Sequence[int]) -> None:
        """One block: logits [length, vocab] of both, and the tokens that they were given."""
        # Nothing follows the last token, whose own entry is not used.
        following = torch.tensor([*tokens[1:], 0], device=source.device).unsqueeze(-1)
        losses: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for ours, theirs, next_tokens in zip(*(part.split(_ROWS) for part in (engine, source, following)), strict=True):
            exact, found = theirs.log_softmax(-1), ours.to(source.device).float().log_softmax(-1)
            self.kl.append(kl_divergence(exact, found).cpu())
            self.agree.append((exact.argmax(-1) == found.argmax(-1)).cpu())
            for nll, logp in zip(losses, (exact, found), strict=True):
                nll.append(-logp.gather(-1, next_tokens).double())
        self.source_nll.append(float(torch.cat(losses[0])[:-1].mean()))
        self.engine_nll.append(float(torch.cat(losses[1])[:-1].mean()))

    def result(self, text: TextBlocks) -> TextResult:
        """Blocks are of one length, so means over blocks are means over tokens."""
        kl, agree = torch.cat(self.kl), torch.cat(self.agree)
        differences = torch.tensor(self.engine_nll, dtype=torch.float64) - torch.tensor(self.source_nll).double()
        count = len(differences)
        increase = math.exp(min(float(differences.mean()), 50.0)) if bool(differences.isfinite().all()) else math.nan
        deviation = float(differences.std() / math.sqrt(count)) if count > 1 else 0.0
        return TextResult(
            text.text.name, text.text.digest, text.num_tokens, count, _perplexity(self.source_nll),
            _perplexity(self.engine_nll), increase - 1, increase * deviation, float(kl.mean()),
            float(kl.double().quantile(0.99)), float(kl.max()), float(agree.float().mean()),
        )  # fmt: skip


def kl_divergence(exact: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL(exact || found) in nats of log-probabilities [rows, vocab]: [rows]."""
    return (exact.exp() * (exact - found)).sum(-1).clamp(min=0)


def compare_text(
    executor: Executor, text: TextBlocks, source_logits: Callable[[int], torch.Tensor], advance: Callable[[], None]
) -> TextResult:
    """Every block of `text` through slot 0; `source_logits(i)` gives the source's logits of block i."""
    divergence = Divergence()
    for index, block in enumerate(text.blocks):
        divergence.add(source_logits(index), prefill_logits(executor, 0, block), block)
        advance()
    return divergence.result(text)


def _perplexity(nll: Sequence[float]) -> float:
    mean = sum(nll) / len(nll)
    return math.exp(mean) if mean < 700 else math.inf
