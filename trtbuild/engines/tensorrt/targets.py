"""The GPUs that TensorRT-RTX compiles for, and what each of them can compute.

Compute capabilities are those of `tensorrt_rtx.ComputeCapability` (1.7); that a precision is missing on one was
found by compiling: the builder answers "the model contains HW-specific datatypes", and for a float32 matrix multiply
on sm75 "FP32 GEMM is not supported".
"""

from __future__ import annotations

from collections.abc import Sequence

from trtbuild.checkpoints.precision import Precision, as_format
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
MIN_SM = {"fp16": 75, "bf16": 80, "int8": 80, "int4": 80, "fp8": 89, "fp8-dynamic": 89}
# A router's logits are a float32 matrix multiply.
MIN_SM_MOE = 80


def formats_of(precision: Precision) -> tuple[str, ...]:
    """Formats of the linear layers and the 16-bit type of the rest, each once.

    Before modules are chosen, "auto" counts as int4, which every mixture may hold.
    """
    found = dict.fromkeys(form.format for _, form in precision.modules if form.is_quantized)
    if precision.weights != "auto" or not precision.modules:
        found[as_format(precision.weights)] = None
    return tuple(found | {precision.dtype: None})


def problems(target: str, precision: Precision, moe: bool = False) -> list[str]:
    """What `target` ("sm89") lacks for the weights' formats, the 16-bit type of the rest, or an MoE's router."""
    if target not in TARGETS:
        return [f"{target} is no target of TensorRT-RTX, which has {', '.join(TARGETS)}"]
    able = int(target[2:])
    needed = [name for name in formats_of(precision) if able < MIN_SM[name]]
    found = [f"{TARGETS[target]} has no {name}, which needs sm{MIN_SM[name]}" for name in needed]
    if moe and able < MIN_SM_MOE:
        found.append(f"{TARGETS[target]} has no float32 matrix multiply, which a router needs (sm{MIN_SM_MOE})")
    return [f"{target}: {problem}" for problem in found]


def resolve_targets(requested: Sequence[str] | None, precision: Precision, moe: bool = False) -> tuple[str, ...]:
    """Compute capabilities to compile for, ascending; by default every one that supports the model.

    Raises `Refused`, with all problems, for an unknown target and for one that lacks something.
    """
    able = tuple(target for target in TARGETS if not problems(target, precision, moe))
    if not requested:
        return able
    fix = f"leave it out (able: {', '.join(able)}) or choose another --precision"
    found = [f"{problem}; {fix}" for target in dict.fromkeys(requested) for problem in problems(target, precision, moe)]
    refuse_all("--target", found)
    return tuple(target for target in TARGETS if target in requested)
