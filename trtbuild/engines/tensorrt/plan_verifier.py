"""Whether a compiled plan is what was asked for, read from the plan itself.

"No error" proves little: TensorRT computes an fp8 layer in 16 bit, or unpacks 4-bit weights to scratch, without a word.
So every build is read back, and a difference fails it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from trtbuild.checkpoints.rank_tensors import Linear, RankPlan
from trtbuild.engines.limits import EngineLimits
from trtbuild.engines.network.segments import Segment, moe_of
from trtbuild.engines.tensorrt.experts import MoeForm
from trtbuild.engines.tensorrt.ops import Phase
from trtbuild.engines.tensorrt.plan_forecast import SMALL_CONSTANTS, Forecast, forecast
from trtbuild.engines.tensorrt.plan_reader import PlanText, Program
from trtbuild.errors import CheckFailed

SCRATCH_TOLERANCE = 1.5
# The builder's figure counts padding and kernels' constants; equal weights are stored once.
WEIGHT_TOLERANCE = 1.15

# What the operands of a matrix multiply tell: "plain" is 16 bit or float32.
KINDS = ("fp8", "int8", "int4", "plain")
_KIND_OF_FORMAT = {"fp8": "fp8", "fp8-dynamic": "fp8", "int8": "int8", "int4": "int4"}
_PACKED = ("int4", "int8")


@dataclass(frozen=True)
class Expectation:
    """What a plan must show.

    formats: of the segment's linear layers. gemms: least and most matrix multiplies of one program, by `KINDS`.
    num_conditionals: experts' branches or loops in one program.
    """

    targets: tuple[str, ...]
    world_size: int | None
    formats: tuple[str, ...]
    gemms: dict[str, tuple[int, int]]
    moe_form: MoeForm | None
    num_conditionals: int
    num_collectives: int
    outputs: tuple[str, ...]
    forecast: Forecast
    embedded: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def expect(
    plan: RankPlan,
    segment: Segment,
    phase: Phase,
    limits: EngineLimits,
    targets: tuple[str, ...],
    moe_form: MoeForm | None,
    outputs: tuple[str, ...],
    embedded: bool,
) -> Expectation:
    """What the plan of a segment must show, from the rank plan alone."""
    tp = plan.layout.layout.tp
    branches = 0
    moe = moe_of(plan, segment)
    if moe_form in ("conditional", "routed") and moe:
        branches = segment.num_layers * len(plan.layout.experts(moe.num_experts))
    # Two all-reduces in a decoder layer, one all-gather of the logits.
    collectives = {"decoder": 2 * segment.num_layers, "head": 1, "embed": 0}[segment.kind] if tp > 1 else 0
    return Expectation(
        targets=targets,
        world_size=tp if collectives else None,
        formats=tuple(dict.fromkeys(linear.precision for linear in segment.linears(plan).values())),
        gemms=_expected_gemms(plan, segment, moe_form, embedded),
        moe_form=moe_form,
        num_conditionals=branches,
        num_collectives=collectives,
        outputs=outputs,
        forecast=forecast(plan, segment, phase, limits, moe_form, embedded),
        embedded=embedded,
    )


def _expected_gemms(
    plan: RankPlan, segment: Segment, form: MoeForm | None, embedded: bool
) -> dict[str, tuple[int, int]]:
    """Least and most matrix multiplies by kind of operands.

    int8 may be unpacked to scratch, and layers that share an input become one; int4 experts in a loop are unpacked too
    (the scratch check bounds what that takes). Constants in fp8 that multiply the same values become one multiply.
    """
    most: Counter[str] = Counter({"plain": _num_other_gemms(plan, segment)})
    least: dict[str, set[Hashable]] = {kind: set() for kind in KINDS}
    for name, linear in segment.linears(plan).items():
        kind, count = _KIND_OF_FORMAT.get(linear.precision, "plain"), linear.num_experts or 1
        most[kind] += count
        # Zero points have a multiply of their own.
        most["plain"] += count * linear.form.zeros
        if kind == "int8" or (kind == "int4" and form == "routed" and linear.num_experts is not None):
            most["plain"] += count
        elif kind == "fp8" and embedded and _shares_input(plan, name, linear, form):
            _, layer, block, *_ = name.split(".")
            least[kind].add((layer, block, linear.form))
        elif kind in ("fp8", "int4"):
            least[kind].update((name, i) for i in range(count))
    return {kind: (len(least[kind]), most[kind]) for kind in KINDS}


def _shares_input(plan: RankPlan, name: str, linear: Linear, form: MoeForm | None) -> bool:
    """Whether a layer multiplies the very tensor that others of its block do; in a branch or loop none does."""
    if linear.num_experts is not None and form != "dense":
        return False
    shared = ["attention.fused_a", "mlp.fc", "mlp.gate", "mlp.shared_expert.fc"]
    if plan.config.mla and not plan.config.mla.q_lora_rank:
        shared.append("attention.q_b_proj")
    return name.split(".", 2)[2] in shared


def _num_other_gemms(plan: RankPlan, segment: Segment) -> int:
    """Multiplies besides the quantizable layers': lm_head; in a layer the router, the shared expert's gate, and of
    latent attention the heads' keys and values, the scores and the sum. Other attention is one fused kernel.
    """
    if segment.kind != "decoder":
        return int(segment.kind == "head")
    moe = moe_of(plan, segment)
    in_layer = (1 + moe.shared_gate if moe else 0) + (4 if plan.config.mla else 0)
    return segment.num_layers * in_layer


def verify_plan(name: str, text: PlanText, expected: Expectation) -> dict[str, Any]:
    """Raise `CheckFailed` with every difference; otherwise what was found, for the plan's record."""
    problems = [*_memory_problems(text, expected)]
    for i, program in enumerate(text.programs):
        problems += [f"profile {i}: {problem}" for problem in _program_problems(program, expected, text.named)]
    if problems:
        raise CheckFailed(f"plan {name} is not what was asked:" + "".join(f"\n  - {problem}" for problem in problems))
    return {
        "targets": list(text.programs[0].targets),
        "world_size": text.programs[0].world_size,
        "gemms": [_count(program) for program in text.programs],
        "num_collectives": text.programs[0].num_collectives,
        "conditional_jumps": text.programs[0].num_conditional_jumps,
        "stream_capturable": all(program.stream_capturable for program in text.programs),
        "scratch_bytes": list(text.scratch_bytes),
        "scratch_forecast": list(expected.forecast.scratch),
        "weight_bytes": text.weight_bytes,
        "weight_forecast": expected.forecast.weights,
    }


def _memory_problems(text: PlanText, expected: Expectation) -> Iterator[str]:
    if len(text.programs) != len(expected.forecast.scratch) or len(text.scratch_bytes) != len(text.programs):
        yield (
            f"asked for {len(expected.forecast.scratch)} profiles, found {len(text.programs)} programs and "
            f"{len(text.scratch_bytes)} scratch sizes in the log"
        )
        return
    for i, (found, asked) in enumerate(zip(text.scratch_bytes, expected.forecast.scratch, strict=True)):
        if found > SCRATCH_TOLERANCE * asked:
            yield (
                f"profile {i}: scratch is {found:,} bytes, forecast {asked:,} "
                f"(weights may have been unpacked; at most {SCRATCH_TOLERANCE} times the forecast is allowed)"
            )
    most = WEIGHT_TOLERANCE * expected.forecast.weights + SMALL_CONSTANTS
    if text.weight_bytes > most:
        yield (
            f"weights in the plan are {text.weight_bytes:,} bytes, forecast {expected.forecast.weights:,} "
            f"from {', '.join(expected.formats) or '16 bit'}"
        )
    if expected.embedded and text.weight_bytes < expected.forecast.weights / WEIGHT_TOLERANCE - SMALL_CONSTANTS:
        yield f"weights in the plan are only {text.weight_bytes:,} bytes of {expected.forecast.weights:,}"


def _program_problems(program: Program, expected: Expectation, named: frozenset[str]) -> Iterator[str]:
    if set(program.targets) != set(expected.targets):
        yield f"asked for targets {' '.join(expected.targets)}, found {' '.join(program.targets)}"
    if program.world_size != expected.world_size:
        yield f"asked for a world size of {expected.world_size}, found {program.world_size}"
    if program.num_collectives != expected.num_collectives:
        yield f"asked for {expected.num_collectives} collectives, found {program.num_collectives}"
    yield from _gemm_problems(program, expected)
    yield from _moe_problems(program, expected)
    missing = set(expected.outputs) - {output.removesuffix(" [profile 1]") for output in program.outputs} - named
    if missing:
        yield f"outputs {sorted(missing)} are missing"


def _gemm_problems(program: Program, expected: Expectation) -> Iterator[str]:
    found = Counter(_kind_of(operands) for operands in program.gemms)
    for kind, (least, most) in expected.gemms.items():
        if not least <= found[kind] <= most:
            asked = str(most) if least == most else f"{least} to {most}"
            yield f"asked for {asked} {kind} matrix multiplies, found {found[kind]} among {_count(program)}"


def _kind_of(operands: tuple[str, ...]) -> str:
    """fp8 shows in both operands; int4 and int8 multiply 16-bit activations and show in what is unpacked on the way."""
    packed = next((kind for kind in operands if kind in _PACKED), None)
    return packed or ("fp8" if operands[:2] == ("fp8_e4m3", "fp8_e4m3") else "plain")


def _moe_problems(program: Program, expected: Expectation) -> Iterator[str]:
    """A conditional leaves one `cjmp` and two `jmp`; a loop leaves `cjmp` alone."""
    form = "routed" if program.num_conditional_jumps and not program.num_jumps else "conditional"
    form = form if program.num_conditional_jumps else None
    asked = None if expected.moe_form == "dense" else expected.moe_form
    if form != asked:
        yield f"asked for experts in the form {expected.moe_form or 'none'}, found {form or 'no conditional execution'}"
    elif program.num_conditional_jumps < expected.num_conditionals:
        found = program.num_conditional_jumps
        yield f"asked for {expected.num_conditionals} experts' branches, found {found} conditional jumps"


def _count(program: Program) -> dict[str, int]:
    """How many multiplies have which operand types; of a fused dequantization, the packed weight's type counts."""
    pairs = ((types[0], next((t for t in types if t in _PACKED), types[:2][-1])) for types in program.gemms if types)
    return dict(Counter(" x ".join(pair) for pair in pairs))
