"""The same prompt must get the same answer wherever and beside whatever it runs; and an engine must reach its limits.

A prompt is answered greedily, alone in slot 0. Then its answer is computed again from the same tokens in other ways,
step by step. 16-bit arithmetic does not add up to the same bits in every batch shape, and greedy decoding may part at a
near tie, so tokens alone prove little either way. What is judged is the difference of the logits: root mean square,
relative to the logits' own spread. Rounding keeps it below `noise_limit`; a wrong slot, mask or cache index makes it
about 1. Half of a prompt's steps must be within that limit, and all within four times it. The latter holds for models
without a router and, in 16 bit, weights: with a router the last chosen expert may change at a tie, and fp8 activations
are rounded so coarsely that some steps are far off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from trtbuild.accuracy.distributions import kl_divergence, prefill_logits
from trtbuild.engines.executor import Executor

# By what a step computes in, for each decoder layer, since every layer adds its rounding. Healthy engines of 3 and 24
# layers show 0.003 and 0.017 in bf16, and 0.007 and 0.077 with fp8 activations, where a difference may round to the
# next of few values. A slip by one position shows 0.03 in 3 layers; exchanged rows 0.6, whatever the depth.
_NOISE_PER_LAYER = {"float32": 0.0001, "fp16": 0.0015, "bf16": 0.004, "fp8": 0.008}
_FEWEST_LAYERS, _LARGEST_NOISE = 3, 0.25
NUM_STEPS = 16
_PROMPT_LENGTHS = (24, 37, 51)
_UNEVEN_CHUNKS = (7, 1, 12, 3)
# Positions at the end of the long prompt whose distributions are compared.
LAST_POSITIONS = 64
_DECODED_AT_LIMIT = 16


@dataclass(frozen=True)
class Answer:
    """Tokens decoded greedily, and the logits [steps, vocab] that they were chosen from."""

    tokens: list[int]
    logits: torch.Tensor


def noise_limit(compute: str, num_layers: int) -> float:
    """How much half of a prompt's steps may differ, where a step computes in float32, fp16, bf16 or fp8."""
    return min(_LARGEST_NOISE, _NOISE_PER_LAYER[compute] * max(num_layers, _FEWEST_LAYERS))


def prompts_of(blocks: Sequence[Sequence[int]], max_input_len: int) -> list[list[int]]:
    """A few prompts of different lengths from different places."""
    count = len(_PROMPT_LENGTHS)
    return [
        list(blocks[i * len(blocks) // count][: min(length + i, max_input_len)])
        for i, length in enumerate(_PROMPT_LENGTHS)
    ]


def check_invariance(
    executor: Executor, prompts: Sequence[Sequence[int]], compute: str, num_layers: int, *, strict: bool
) -> dict[str, Any]:
    """Answers of each prompt alone, on the last slot, in uneven chunks, and in a full batch.

    `compute` and `num_layers` are for `noise_limit`; `strict` also bounds single steps. The result's `failures` has a
    line for each prompt and way that differs too much.
    """
    limit = noise_limit(compute, num_layers)
    steps = max(1, min(NUM_STEPS, executor.max_seq_len - max(map(len, prompts))))
    alone = [_answer(executor, 0, prompt, steps) for prompt in prompts]
    pairs = [(prompt, answer.tokens) for prompt, answer in zip(prompts, alone, strict=True)]
    ways: dict[str, list[torch.Tensor]] = {
        "again": [_replay(executor, 0, prompt, tokens) for prompt, tokens in pairs],
        "in uneven chunks": [_replay(executor, 0, prompt, tokens, _UNEVEN_CHUNKS) for prompt, tokens in pairs],
    }
    if executor.num_slots > 1:
        last = executor.num_slots - 1
        ways["on the last slot"] = [_replay(executor, last, prompt, tokens) for prompt, tokens in pairs]
        ways["in a full batch"] = _replay_in_batch(executor, prompts, alone)
    compared = [
        _compare(way, index, answer, logits)
        for way, runs in ways.items()
        for index, (answer, logits) in enumerate(zip(alone, runs, strict=False))
    ]
    return {
        "num_prompts": len(prompts), "num_steps": steps, "num_slots": executor.num_slots, "compute": compute,
        "noise_limit": limit, "strict": strict, "ways": compared,
        "failures": list(_failures(compared, limit, strict)),
    }  # fmt: skip


def check_long_prompt(executor: Executor, tokens: Sequence[int], source_logits: torch.Tensor) -> dict[str, Any]:
    """A prompt of max_input_len tokens, then on to max_seq_len; `source_logits` are of the prompt's last positions.

    Behind the prompt some tokens are decoded, the text goes on as chunks, and the last tokens are decoded again, so
    that every position of the slot is written and the steps at both limits are decode steps.
    """
    count = len(source_logits)
    _fill(executor, tokens[:-count], 0)
    logits = prefill_logits(executor, 0, tokens[-count:], len(tokens) - count)
    exact, found = source_logits.log_softmax(-1), logits.to(source_logits.device).float().log_softmax(-1)
    kl = kl_divergence(exact, found)
    position, decoded = len(tokens), 0
    token = int(logits[-1].argmax())
    while position < executor.max_seq_len:
        if decoded == _DECODED_AT_LIMIT:
            skipped = executor.max_seq_len - _DECODED_AT_LIMIT - position
            if skipped > 0:
                _fill(executor, [tokens[i % len(tokens)] for i in range(skipped)], position)
                position += skipped
        token = int(executor.decode([0], [token], [position])[0].argmax())
        position, decoded = position + 1, decoded + 1
    return {
        "num_tokens": len(tokens), "num_compared": count, "mean_kl": float(kl.mean()), "max_kl": float(kl.max()),
        "num_decoded": decoded, "last_position": position - 1,
    }  # fmt: skip


def _fill(executor: Executor, tokens: Sequence[int], start: int) -> None:
    for begin in range(0, len(tokens), executor.chunk_size):
        part = tokens[begin : begin + executor.chunk_size]
        # Asking for logits has their finiteness checked.
        executor.prefill(0, part, start + begin, "last")


def _answer(executor: Executor, slot: int, prompt: Sequence[int], steps: int) -> Answer:
    rows = [prefill_logits(executor, slot, prompt)[-1:]]
    tokens = [int(rows[0].argmax())]
    while len(tokens) < steps:
        rows.append(executor.decode([slot], tokens[-1:], [len(prompt) + len(tokens) - 1]))
        tokens.append(int(rows[-1].argmax()))
    return Answer(tokens, torch.cat(rows))


def _replay(
    executor: Executor, slot: int, prompt: Sequence[int], tokens: Sequence[int], chunks: Sequence[int] = ()
) -> torch.Tensor:
    """Logits of the same tokens, computed in another way."""
    rows = [prefill_logits(executor, slot, prompt, chunks=chunks)[-1:]]
    for step, token in enumerate(tokens[:-1]):
        rows.append(executor.decode([slot], [token], [len(prompt) + step]))
    return torch.cat(rows)


def _replay_in_batch(
    executor: Executor, prompts: Sequence[Sequence[int]], alone: Sequence[Answer]
) -> list[torch.Tensor]:
    """All slots busy, the prompts from the last slot down; slots without one of their own run another's beginning.

    With fewer slots than prompts, only the first prompts' logits.
    """
    slots = list(range(executor.num_slots))
    held = [slot % len(prompts) for slot in reversed(slots)]
    own = {index: slots[len(slots) - 1 - index] for index in range(min(len(prompts), len(slots)))}
    # A shorter beginning makes the others' positions differ from the prompt's own.
    texts = [
        list(prompts[i]) if own.get(i) == slot else list(prompts[i])[: 5 + slot % 7]
        for slot, i in zip(slots, held, strict=True)
    ]
    first = {slot: prefill_logits(executor, slot, text)[-1:] for slot, text in zip(slots, texts, strict=True)}
    rows = {index: [first[slot]] for index, slot in own.items()}
    for step in range(len(alone[0].tokens) - 1):
        tokens = [alone[i].tokens[step] for i in held]
        logits = executor.decode(slots, tokens, [len(text) + step for text in texts])
        for index, slot in own.items():
            rows[index].append(logits[slot : slot + 1])
    return [torch.cat(rows[index]) for index in sorted(rows)]


def _compare(way: str, prompt: int, answer: Answer, logits: torch.Tensor) -> dict[str, Any]:
    """Per-step differences of one prompt's logits; where the likeliest tokens part first, and the margin there."""
    exact, difference = answer.logits.float(), (logits - answer.logits).float()
    spread = (exact - exact.mean(-1, keepdim=True)).norm(dim=-1)
    relative = (difference.norm(dim=-1) / spread).tolist()
    parted = (logits.argmax(-1) != exact.argmax(-1)).nonzero().flatten().tolist()
    found: dict[str, Any] = {
        "way": way, "prompt": prompt, "same_tokens": not parted, "median_difference": median(relative),
        "largest_difference": float(torch.tensor(relative).max()),
        "largest_logit_difference": float(difference.abs().max()),
    }  # fmt: skip
    if parted:
        best = exact[parted[0]].topk(2).values
        found |= {"parts_at_step": parted[0], "margin_there": float(best[0] - best[1])}
    return found


def _failures(compared: Sequence[dict[str, Any]], limit: float, strict: bool) -> Iterator[str]:
    for run in compared:
        checks: list[tuple[str, Callable[[dict[str, Any]], float], float]] = [
            ("half of the steps", lambda r: r["median_difference"], limit)
        ]
        if strict:
            checks.append(("a step", lambda r: r["largest_difference"], 4 * limit))
        for what, value, allowed in checks:
            if not value(run) <= allowed:
                parts = f"; tokens part at step {run['parts_at_step']}" if "parts_at_step" in run else ""
                yield (
                    f"prompt {run['prompt']} {run['way']}: logits of {what} differ by {value(run):.3g} of their spread "
                    f"from the prompt alone, at most {allowed:g} is allowed{parts}"
                )
                break
