"""Upper bounds of prefill and decode speed by the roofline model (Williams, Waterman and Patterson, "Roofline: an
insightful visual performance model for multicore architectures", Communications of the ACM 52(4), 2009).

A pipeline stage takes as long as the slower of its memory traffic and its arithmetic, each at the data sheet's rate;
collectives are added, for a tensor-parallel rank waits for them. Nothing else costs time here: no launches, no
latencies, no imperfect kernels. So these are bounds, not measurements, and real engines stay below them.

Memory traffic of a step of n tokens: all weights but the embedding table and idle experts, once; the KV cache up to
the context; what the step adds to it. Under uniform routing n tokens wake E * (1 - (1 - k/E)^n) of E experts (each
token misses an expert with probability 1 - k/E).
A ring all-reduce of b bytes over p ranks sends 2 * (p - 1) / p * b bytes from each (Patarasuk and Yuan, "Bandwidth
optimal all-reduce algorithms", JPDC 69(2), 2009), an all-gather half of that; there are two all-reduces in a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trtbuild.checkpoints.layout import Layout, padded_vocab
from trtbuild.checkpoints.model_config import ModelConfig
from trtbuild.planning.gpus import Gpu
from trtbuild.planning.model_size import RankSize, attended_positions

# Bytes of an activation in the residual stream, and of a logit.
ACTIVATION, LOGIT = 2, 4
BATCHES = (1, 8, 32, 128, 512)


@dataclass(frozen=True)
class Step:
    """Seconds of one step, summed over the pipeline stages, which run one after the other."""

    tokens: int
    memory: float
    compute: float
    link: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def bound(self) -> str:
        """What takes longest: memory, compute or link."""
        times = {"memory": self.memory, "compute": self.compute, "link": self.link}
        return max(times, key=lambda name: times[name])


@dataclass(frozen=True)
class Roofline:
    """`stages` holds one rank of each pipeline stage; the ranks of a tensor-parallel group are alike."""

    config: ModelConfig
    layout: Layout
    stages: Sequence[RankSize]
    gpu: Gpu

    def decode(self, batch: int, context: int) -> Step:
        """One token for each of `batch` sequences that have `context` positions behind them."""
        return self._step(batch, batch, context, head_rows=batch)

    def prefill(self, chunk: int, context: int) -> Step:
        """A chunk of one prompt, of which `context` positions are behind it; causal attention within the chunk."""
        return self._step(chunk, 1, context + chunk // 2, head_rows=1)

    def _step(self, tokens: int, sequences: int, context: int, head_rows: int) -> Step:
        memory = compute = link = seconds = 0.0
        for index, stage in enumerate(self.stages):
            times = (
                self._bytes(stage, tokens, sequences, context) / (self.gpu.bandwidth * 1e9),
                self._compute_seconds(stage, tokens, context, head_rows),
                self._link_bytes(index, tokens, head_rows) / (self.gpu.link_bandwidth * 1e9),
            )
            memory, compute, link = memory + times[0], compute + times[1], link + times[2]
            seconds += max(times[0], times[1]) + times[2]
        return Step(tokens, memory, compute, link, seconds)

    def _bytes(self, stage: RankSize, tokens: int, sequences: int, context: int) -> float:
        idle = stage.kinds["embedding"] + (1 - self._experts_hit(tokens)) * stage.kinds["experts"]
        rows = tokens * self.config.hidden_size * ACTIVATION if stage.kinds["embedding"] else 0
        per_layer = stage.cache_bytes / len(stage.layers)
        read = sequences * per_layer * attended_positions(self.config, stage.layers, context)
        return stage.weight_bytes - idle + rows + read + tokens * stage.cache_bytes

    def _experts_hit(self, tokens: int) -> float:
        """Expected share of the experts that at least one token chooses."""
        moe = self.config.moe
        return 1.0 if moe is None else 1 - (1 - moe.top_k / moe.num_experts) ** tokens

    def _compute_seconds(self, stage: RankSize, tokens: int, context: int, head_rows: int) -> float:
        # int8 and int4 weights are multiplied in 16 bit; only fp8 has arithmetic of its own.
        fp8 = stage.fp8_ops * tokens / ((self.gpu.fp8 or self.gpu.fp16) * 1e12)
        head = 2.0 * stage.kinds["lm_head"] / ACTIVATION
        plain = (stage.quantized_ops - stage.fp8_ops + stage.plain_ops - head) * tokens + head * head_rows
        attention = stage.attention_ops * tokens * attended_positions(self.config, stage.layers, context)
        return fp8 + (plain + attention) / (self.gpu.fp16 * 1e12)

    def _link_bytes(self, index: int, tokens: int, head_rows: int) -> float:
        """Sent by one rank: two all-reduces in a layer, gathered logits, and the hidden states for the next stage."""
        tp, hidden = self.layout.tp, tokens * self.config.hidden_size * ACTIVATION
        share = (tp - 1) / tp
        sent = 2 * len(self.stages[index].layers) * 2 * share * hidden
        if index == len(self.stages) - 1:
            return sent + share * head_rows * padded_vocab(self.config.vocab_size, tp) * LOGIT
        return sent + hidden
