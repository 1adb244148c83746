"""Real builds of tiny models: what the verifier finds in their plans, and that it finds what is wrong.

Everything compiles here, on a machine without a GPU; nothing runs. `test_tensorrt_network.py` has the numbers.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import cache, partial
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from random_plans import LIMITS, TARGET, config, open_random

pytest.importorskip("tensorrt_rtx")

from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import Precision
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.rank_tensors import RankPlan
from trtbuild.engines.limits import EngineLimits
from trtbuild.engines.network.segments import cut_into_segments
from trtbuild.engines.tensorrt.builder import build_plans
from trtbuild.engines.tensorrt.log import build_log
from trtbuild.engines.tensorrt.network import build_network
from trtbuild.engines.tensorrt.plan_compiler import compile_network
from trtbuild.engines.tensorrt.plan_reader import PlanText, read_plan
from trtbuild.engines.tensorrt.plan_record import PlanRecord
from trtbuild.engines.tensorrt.plan_tasks import BuildOptions, plan_tasks
from trtbuild.engines.tensorrt.plan_verifier import Expectation, expect, verify_plan
from trtbuild.engines.tensorrt.targets import TARGETS, resolve_targets
from trtbuild.errors import CheckFailed, CheckpointError, EngineBuildError, Refused


def rank_plan(
    family: str, precision: Any, tp: int = 1, rank: int = 0, moe_ep: int | None = None, **changes: Any
) -> RankPlan:
    made = config(family, **changes)
    return plan_rank(made, Layout.resolve(tp=tp, moe_ep=moe_ep).rank(rank), Precision.resolve(precision, made.dtype))


@cache
def compiled(
    family: str, precision: str, tp: int, phase: str, form: str | None = None, moe_ep: int | None = None
) -> tuple[PlanText, Expectation]:
    """The decoder segment of rank 0, read back, and what it must show."""
    plan = rank_plan(family, precision, tp, moe_ep=moe_ep)
    segment = cut_into_segments(plan)[1]
    embedded = phase == "any"
    read = open_random([plan], 0) if embedded else None
    built = build_network(plan, segment, phase, LIMITS, form, read)  # type: ignore[arg-type]
    blob = BytesIO()
    compile_network(built, TARGET, f"{family}-{precision}", blob)
    outputs = tuple(b.name for b in built.bindings if b.role == "output" or b.alias)
    expected = expect(plan, segment, phase, LIMITS, TARGET, built.moe_form, outputs, embedded)  # type: ignore[arg-type]
    return read_plan(blob.getvalue(), build_log().lines), expected


# Qwen3-MoE's plans take longest, and differ from Qwen2-MoE's by two norms.
QWEN3_MOE = [("bf16", 1), ("fp8", 2)]
VERIFIED = [
    pytest.param(family, precision, tp, marks=[pytest.mark.slow] * (family == "qwen3_moe" and case not in QWEN3_MOE))
    for family in ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3_moe", "deepseek_v2")
    for case in product(("fp16", "bf16", "fp8", "int4"), (1, 2))
    for precision, tp in [case]
]


@pytest.mark.parametrize(("family", "precision", "tp"), VERIFIED)
def test_every_plan_of_an_engine_verifies(tmp_path: Path, family: str, precision: Any, tp: int) -> None:
    made = config(family)
    plans = [plan_rank(made, rank, Precision.resolve(precision, made.dtype)) for rank in Layout.resolve(tp=tp).ranks()]
    options = BuildOptions(LIMITS, TARGET)
    records = build_plans(
        plans, options, tmp_path, open_reader=partial(open_random, plans), weights_digest="w", workers=0
    )
    # A dense first layer is a segment of its own.
    num_decoders = 2 if made.moe and made.moe.dense_layers else 1
    assert {(served.rank, served.segment) for record in records for served in record.serves} == {
        (r, s) for r in range(tp) for s in range(2 + num_decoders)
    }
    decoders = [record for record in records if record.kind == "decoder"]
    assert len(decoders) == num_decoders * (tp if precision == "int4" else 2)
    for record in decoders:
        assert record.verification["world_size"] == (2 if tp == 2 else None)
        assert all(
            size <= 1.5 * asked
            for size, asked in zip(
                record.verification["scratch_bytes"], record.verification["scratch_forecast"], strict=True
            )
        )
    assert build_log().errors == []


@pytest.mark.parametrize("moe_ep", [None, 2])
@pytest.mark.parametrize("form", ["conditional", "routed", "dense"])
@pytest.mark.parametrize(
    ("precision", "phase"), [("fp8", "prefill"), ("fp8", "decode"), ("fp16", "prefill"), ("int4", "any")]
)
def test_moe_forms_compile(precision: str, phase: str, form: str, moe_ep: int | None) -> None:
    text, expected = compiled("mixtral", precision, 2, phase, form, moe_ep)
    found = verify_plan("moe", text, expected)
    assert found["stream_capturable"] == (form == "dense")
    assert (found["conditional_jumps"] > 0) == (form != "dense")


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_int4_matrices_are_small_in_the_plan(tmp_path: Path, family: str) -> None:
    """By the builder's own figure: 16-bit and int4 weights embedded in the same network."""
    sizes = {}
    for precision in ("fp16", "int4"):
        text, expected = compiled(family, precision, 1, "any")
        verify_plan(precision, text, expected)
        sizes[precision] = text.weight_bytes
    plan = rank_plan(family, "fp16")
    plain = sum(t.spec.num_bytes for t in plan.plain if ".layers." in t.spec.name)
    assert (sizes["fp16"] - plain) / (sizes["int4"] - plain) >= 3.2


def wrong(expected: Expectation, **changes: Any) -> Expectation:
    return replace(expected, **changes)


def test_the_verifier_finds_each_difference() -> None:
    text, expected = compiled("llama", "fp16", 1, "prefill")
    verify_plan("right", text, expected)
    small = replace(expected.forecast, scratch=(1_000_000,))
    for changes, message in (
        ({"gemms": {"fp8": (10, 10)}}, "asked for 10 fp8 matrix multiplies, found 0"),
        ({"targets": ("sm80",)}, "asked for targets sm80, found sm89"),
        ({"world_size": 2}, "asked for a world size of 2, found None"),
        ({"num_collectives": 4}, "asked for 4 collectives, found 0"),
        ({"moe_form": "routed", "num_conditionals": 8}, "asked for experts in the form routed"),
        ({"forecast": small}, "forecast 1,000,000"),
        ({"outputs": ("logits",)}, "['logits'] are missing"),
    ):
        with pytest.raises(CheckFailed, match="plan wrong is not what was asked") as error:
            verify_plan("wrong", text, wrong(expected, **changes))
        assert message in error.value.message


def test_the_verifier_tells_precisions_and_forms_apart() -> None:
    text, expected = compiled("mixtral", "fp8", 2, "decode", "conditional")
    assert expected.gemms == {"fp8": (20, 20), "int8": (0, 0), "int4": (0, 0), "plain": (0, 2)}
    for changes in (
        {"gemms": expected.gemms | {"fp8": (0, 0)}},
        {"gemms": expected.gemms | {"fp8": (19, 19)}},
        {"gemms": expected.gemms | {"plain": (0, 1)}},
        {"moe_form": "routed"},
        {"moe_form": "dense"},
        {"world_size": 4},
    ):
        with pytest.raises(CheckFailed):
            verify_plan("wrong", text, wrong(expected, **changes))


def test_unpacked_int4_weights_are_found() -> None:
    """fp16 weights in the plan where int4 was forecast."""
    text, _ = compiled("llama", "fp16", 1, "any")
    _, expected = compiled("llama", "int4", 1, "any")
    with pytest.raises(CheckFailed, match="weights in the plan are"):
        verify_plan("wrong", text, expected)


def test_something_else_is_no_plan() -> None:
    with pytest.raises(CheckFailed, match="no readable program"):
        read_plan(b"not a plan")


def test_a_build_resumes(tmp_path: Path) -> None:
    plans = [rank_plan("llama", "fp16", 2, rank) for rank in range(2)]
    events: list[tuple[str, bool]] = []
    build = partial(
        build_plans,
        plans,
        directory=tmp_path,
        workers=0,
        on_plan=lambda record, built, total: events.append((record.name, built)),
    )
    first = build(BuildOptions(LIMITS, TARGET))
    assert [built for _, built in events] == [True] * 4
    (tmp_path / f"{first[1].name}.json").unlink()
    (tmp_path / first[2].file).write_bytes(b"cut short")
    events.clear()
    again = build(BuildOptions(LIMITS, TARGET))
    assert sorted(name for name, built in events if built) == sorted([first[1].name, first[2].name])
    assert [record.name for record in again] == [record.name for record in first]
    assert PlanRecord.from_dict(json.loads(json.dumps(again[1].to_dict()))) == again[1]
    assert not list(tmp_path.glob("*.tmp"))
    events.clear()
    build(BuildOptions(EngineLimits(8, 128, 32), TARGET))
    assert [built for _, built in events] == [True] * 4


def test_a_build_in_worker_processes(tmp_path: Path) -> None:
    records = build_plans([rank_plan("llama", "bf16")], BuildOptions(LIMITS, TARGET), tmp_path, workers=2)
    assert [record.kind for record in records] == ["embed", "decoder", "decoder", "head"]
    assert all((tmp_path / record.file).stat().st_size == record.size for record in records)


def die(rank: int) -> Any:
    os._exit(9)


def fail(rank: int) -> Any:
    raise CheckpointError("rank 0 is damaged")


def test_a_failing_build_process_is_named(tmp_path: Path) -> None:
    build = partial(
        build_plans, [rank_plan("llama", "int4")], BuildOptions(LIMITS, TARGET), tmp_path, weights_digest="w"
    )
    with pytest.raises(EngineBuildError, match=r"plan decoder-r0-s01 died \(exit code 9\)"):
        build(open_reader=die, workers=1)
    with pytest.raises(CheckpointError, match="rank 0 is damaged"):
        build(open_reader=fail, workers=1)
    assert [path.name for path in tmp_path.glob("*.json")] != []


def test_plans_are_shared_by_ranks_and_groups() -> None:
    plans = [rank_plan("mixtral", "fp8", 2, rank, moe_ep=2, num_layers=5) for rank in range(2)]
    tasks = plan_tasks(plans, BuildOptions(LIMITS, TARGET, segment_layers=2))
    # Groups of 2, 2 and 1 layers: two signatures, each for prefill and decode.
    assert [len(task.serves) for task in tasks if task.segment.kind == "decoder"] == [4, 4, 2, 2]
    with pytest.raises(ValueError, match="digest"):
        plan_tasks([rank_plan("llama", "int4")], BuildOptions(LIMITS, TARGET))


@pytest.mark.parametrize("moe_ep", [2, 4])
def test_default_segments_of_few_experts_compile(moe_ep: int) -> None:
    """Deeper segments of one or two experts a rank find no fused attention."""
    plan = rank_plan("mixtral", "bf16", moe_ep, moe_ep=moe_ep, num_layers=8)
    segment = cut_into_segments(plan)[1]
    assert segment.num_layers == 4 // moe_ep
    compile_network(build_network(plan, segment, "decode", LIMITS), TARGET, "few experts", BytesIO())


def test_an_error_in_the_log_fails_the_build() -> None:
    plan = rank_plan("mixtral", "fp16")
    segment = cut_into_segments(plan)[1]
    built = build_network(plan, segment, "decode", LIMITS)
    with pytest.raises(EngineBuildError, match="FP32 GEMM is not supported"):
        compile_network(built, ("sm75",), "router", BytesIO())


def test_targets() -> None:
    fp8, bf16, fp16 = Precision("fp8", "bf16"), Precision("bf16", "bf16"), Precision("fp16", "fp16")
    assert resolve_targets(None, fp8) == ("sm89", "sm120", "sm121")
    assert resolve_targets(["sm120", "sm80"], bf16) == ("sm80", "sm120")
    assert resolve_targets(None, fp16) == tuple(TARGETS)
    assert "sm75" not in resolve_targets(None, fp16, moe=True)
    with pytest.raises(Refused) as error:
        resolve_targets(["sm80", "sm86", "sm90"], fp8)
    for text in ("sm80: Ampere (A100) has no fp8, which needs sm89", "sm86", "sm90 is no target of TensorRT-RTX"):
        assert text in error.value.message


@pytest.mark.parametrize("vocab_size", [131, 257])
def test_logits_of_an_odd_vocabulary(tmp_path: Path, vocab_size: int) -> None:
    """The program pads them, and its output has a name of its own."""
    plan = rank_plan("llama", "bf16", vocab_size=vocab_size)
    records = build_plans([plan], BuildOptions(LIMITS, TARGET), tmp_path, workers=0)
    [head] = [record for record in records if record.kind == "head"]
    assert [b.shape for b in head.bindings if b.name == "logits"] == [("R", vocab_size)]
