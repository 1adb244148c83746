"""The GPUs that TensorRT-RTX compiles for, and what each of them can compute.

Compute capabilities are those of `tensorrt_rtx.ComputeCapability` (1.7); that a precision is missing on one was
found by compiling: the builder answers "the model contains HW-specific datatypes".
"""

from __future__ import annotations

from collections.abc import Sequence

from trtbuild.checkpoints.precision import Precision
from trtbuild.errors import refuse_all

TARGETS: dict[str, str] = {
    "sm75": "Turing (RTX 20, T4)",
    "sm80": "Ampere (A100)",
    "sm86": "Ampere (RTX 30, A10)",
    "sm89": "Ada (RTX 40, L4, L40S)",
    "sm120": "Blackwell (RTX 50, RTX PRO)",
    "sm121": "Blackwell (GB10)",
}

# The lowest compute capability whose kernels exist for a weight or activation type.
MIN_SM = {"fp16": 75, "bf16": 80, "int8": 80, "int4": 80, "fp8": 89}


def supports(target: str, precision: Precision) -> bool:
    """Whether `target` ("sm89") computes both the weights' precision and the 16-bit type of the rest."""
    return not missing_types(target, precision)


def missing_types(target: str, precision: Precision) -> list[str]:
    """The types of `precision` that `target` lacks, weights first."""
    needed = dict.fromkeys((precision.weights, precision.dtype))
    return [name for name in needed if int(target[2:]) < MIN_SM[name]]


def resolve_targets(requested: Sequence[str] | None, precision: Precision) -> tuple[str, ...]:
    """Compute capabilities to compile for, ascending; by default every one that supports `precision`.

    Raises `Refused`, with all problems, for an unknown target and for one that lacks the precision.
    """
    able = tuple(target for target in TARGETS if supports(target, precision))
    if not requested:
        return able
    problems = []
    for target in dict.fromkeys(requested):
        if target not in TARGETS:
            problems.append(f"{target} is no target of TensorRT-RTX, which has {', '.join(TARGETS)}")
            continue
        for name in missing_types(target, precision):
            problems.append(
                f"{target}, {TARGETS[target]}, has no {name}, which needs sm{MIN_SM[name]} or newer; "
                f"leave it out (able: {', '.join(able)}) or choose another --precision"
            )
    refuse_all("--target", problems)
    return tuple(target for target in TARGETS if target in requested)
