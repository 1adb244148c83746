"""What an engine may lose: limits by precision, and what of a record is over them.

The limits of blocks are relative errors on the source's own inputs, computed in float32. A block may lose 1.3 times
what it loses when the source is rounded to nearest to the same formats, the worst quantization that is not a mistake:
calibrated weights lose less, and a block's error is the mean of so many values that healthy ones of one format hardly
differ from that. (No fixed limit would do: int4 attention loses 0.14 in most layers of Qwen2.5 0.5B and 0.66 in one.)
Weights in 16 bit are the source's weights; 0.01 leaves room for a norm that took scales up and was rounded again.
The yardstick shares our quantizer's code, so the median over all blocks of a kind is also held against what the format
can explain: int8 rows lose 0.01 to 0.02, e4m3 (3 bits of mantissa, weights and activations) 0.02 to 0.06, int4 groups
0.08 to 0.25.

The limits of distributions depend on the model: small models lose more. They are set for models from half a billion
parameters on, from what Qwen2.5-Coder 0.5B loses (perf/results/verify.jsonl): half as much again in KL divergence for
int4, twice as much and more where that is small; and meant to be tightened: --max-ppl-increase 2% and the like.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from trtbuild.errors import Refused

LIMIT_NAMES = ("max_ppl_increase", "max_kl", "min_top1", "max_layer_error")
# A block's limit: what is exact but for rounded norms, or so many times what rounding to nearest loses.
_EXACT, _OVER_ROUNDING = 0.01, 1.3
_MEDIAN_LIMITS = {"bf16": 0.005, "fp16": 0.005, "int8": 0.04, "fp8": 0.10, "fp8-dynamic": 0.08, "int4": 0.35}
# max_ppl_increase, max_kl (nats a token), min_top1.
_DISTRIBUTION_LIMITS: dict[str, tuple[float, float, float]] = {
    "bf16": (0.01, 0.005, 0.95),
    "fp16": (0.01, 0.005, 0.95),
    "int8": (0.02, 0.01, 0.94),
    "fp8": (0.04, 0.04, 0.88),
    "fp8-dynamic": (0.04, 0.04, 0.88),
    "int4": (0.28, 0.30, 0.70),
}
# int4 that a calibration found; weights that came quantized may be rounded to nearest.
_CALIBRATED_INT4 = (0.20, 0.22, 0.74)


def block_limit(rounding: float) -> float:
    """Largest relative error of a block that loses `rounding` when the source is rounded to nearest."""
    return max(_EXACT, _OVER_ROUNDING * rounding)


def looseness(precision: str) -> float:
    """Orders precisions by what they lose."""
    return _MEDIAN_LIMITS[precision]


@dataclass(frozen=True)
class Limits:
    """What an engine is held against; `max_layer_error` replaces the limits of all blocks where it is given."""

    max_ppl_increase: float
    max_kl: float
    min_top1: float
    max_layer_error: float | None = None

    @classmethod
    def for_engine(
        cls,
        precisions: Iterable[str],
        *,
        calibrated: bool = False,
        max_ppl_increase: float | None = None,
        max_kl: float | None = None,
        min_top1: float | None = None,
        max_layer_error: float | None = None,
    ) -> Limits:
        """Those of the loosest of an engine's precisions, where none is given. Raises Refused for a bad one.

        `calibrated`: its int4 weights come from a calibration.
        """
        if min_top1 is not None and min_top1 > 1:
            raise Refused(f"--min-top1 {min_top1:g}: must be from 0 to 1, or 0% to 100%")
        loosest = max(precisions, key=lambda name: _DISTRIBUTION_LIMITS[name], default="bf16")
        ppl, kl, top1 = _CALIBRATED_INT4 if calibrated and loosest == "int4" else _DISTRIBUTION_LIMITS[loosest]
        return cls(
            ppl if max_ppl_increase is None else max_ppl_increase, kl if max_kl is None else max_kl,
            top1 if min_top1 is None else min_top1, max_layer_error,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse_part(text: str) -> float:
    """ "2%" or "0.02" as 0.02; ValueError for anything else, or below 0."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%?)\s*", text)
    if not match:
        raise ValueError(f"{text!r}: use a part such as 2% or 0.02")
    return float(match[1]) / (100 if match[2] else 1)


def find_failures(record: Mapping[str, Any]) -> list[str]:
    """One line for each check of a record that failed: what, what was found, what is allowed."""
    limits = record["limits"]
    found = [f"config: {name} is {pair[0]!r}, the source has {pair[1]!r}" for name, pair in record["config"].items()]
    found += [line for text in record["texts"] for line in _text_failures(text, limits)]
    found += [line for block in record["blocks"] for line in _block_failures(block, limits)]
    found += _median_failures(record["blocks"])
    found += record["invariance"]["failures"]
    found += _long_prompt_failures(record["long_prompt"], limits)
    if record["logits"]["not_finite"]:
        found.append(f"{record['logits']['not_finite']} of {record['logits']['rows']} rows of logits are not finite")
    golden = record.get("golden") or {"lines": []}
    for line in golden["lines"]:
        if line["gates"]:
            found.append(
                f"golden {line['id']}: the engine's answer fails {line['expectation']}: {line['engine'][:80]!r}"
            )
    return found


def blocks_allowed(block: Mapping[str, Any], limits: Mapping[str, Any]) -> list[float]:
    """The limits that a block of a record is held against: one, or one for each expert."""
    given = limits["max_layer_error"]
    return block["limits"] if given is None else [given] * len(block["limits"])


def block_name(block: Mapping[str, Any], index: int = 0) -> str:
    """For people: "layer 3 expert 5"."""
    where = "" if block["layer"] is None else f"layer {block['layer']} "
    return f"{where}{block['block'].replace('_', ' ')}" + (f" {index}" if block["block"] == "expert" else "")


def _block_failures(block: Mapping[str, Any], limits: Mapping[str, Any]) -> Iterator[str]:
    for index, (error, allowed) in enumerate(zip(block["errors"], blocks_allowed(block, limits), strict=True)):
        # NaN compares as false, and fails.
        if not error <= allowed:
            yield (
                f"{block_name(block, index)} ({block['precision']}): relative error {error:.3g}, "
                f"at most {allowed:.3g} is allowed"
            )


def _median_failures(blocks: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    kinds: dict[tuple[str, str], list[float]] = {}
    for block in blocks:
        kinds.setdefault((block["block"], block["precision"]), []).extend(block["errors"])
    for (kind, precision), errors in kinds.items():
        middle, allowed = median(errors), _MEDIAN_LIMITS[precision]
        if not middle <= allowed:
            yield (
                f"{kind.replace('_', ' ')} ({precision}): the median of {len(errors)} relative errors is {middle:.3g}, "
                f"more than the format loses ({allowed:g})"
            )


def _text_failures(text: Mapping[str, Any], limits: Mapping[str, Any]) -> list[str]:
    found, name = [], f"text {text['name']}"
    if not text["ppl_increase"] <= limits["max_ppl_increase"]:
        increase, error = 100 * text["ppl_increase"], 100 * text["ppl_increase_se"]
        found.append(
            f"{name}: perplexity {text['source_ppl']:.4g} -> {text['engine_ppl']:.4g}, an increase of {increase:.2f} % "
            f"(standard error {error:.2f}), at most {100 * limits['max_ppl_increase']:g} % is allowed"
        )
    if not text["mean_kl"] <= limits["max_kl"]:
        found.append(f"{name}: mean KL divergence {text['mean_kl']:.4g} nats, at most {limits['max_kl']:g} is allowed")
    if not text["top1"] >= limits["min_top1"]:
        found.append(f"{name}: top-1 agreement {text['top1']:.4f}, at least {limits['min_top1']:g} is wanted")
    return found


def _long_prompt_failures(found: Mapping[str, Any], limits: Mapping[str, Any]) -> list[str]:
    if not found["mean_kl"] <= limits["max_kl"]:
        return [
            f"prompt of {found['num_tokens']} tokens: mean KL divergence {found['mean_kl']:.4g} nats over its last "
            f"{found['num_compared']}, at most {limits['max_kl']:g} is allowed"
        ]
    return []
