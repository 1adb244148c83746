"""Plans of every form of linear layer and of mixtures: compiled they are what was asked, and a difference is found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tensorrt_rtx")

from random_plans import LIMITS, TARGET, config, open_random

from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import LinearForm, Precision
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.rank_tensors import RankPlan
from trtbuild.engines.network.segments import cut_into_segments
from trtbuild.engines.tensorrt.builder import build_plans
from trtbuild.engines.tensorrt.log import build_log
from trtbuild.engines.tensorrt.network import build_network
from trtbuild.engines.tensorrt.plan_compiler import compile_network
from trtbuild.engines.tensorrt.plan_reader import PlanText, read_plan
from trtbuild.engines.tensorrt.plan_tasks import BuildOptions, plan_tasks
from trtbuild.engines.tensorrt.plan_verifier import Expectation, expect, verify_plan
from trtbuild.engines.tensorrt.targets import resolve_targets
from trtbuild.errors import CheckFailed, EngineBuildError, Refused

INT4, ZEROS, ORDER = LinearForm("int4"), LinearForm("int4", zeros=True), LinearForm("int4", zeros=True, order=True)
DYNAMIC, ROWS, STATIC = LinearForm("fp8-dynamic"), LinearForm("fp8", row_scales=True), LinearForm("fp8")
INT8, PLAIN = LinearForm("int8"), LinearForm("bf16")
Forms = Mapping[str, LinearForm]
MIXED: Forms = {"attention": INT8, "mlp.proj": DYNAMIC, "mlp.gate": STATIC, "": INT4}


def mixed_plans(family: str, forms: Forms, tp: int = 1, **changes: Any) -> list[RankPlan]:
    """Every rank's plan; a layer has the form of the first key that its global name contains."""
    made = config(family, **changes)
    names = [linear.global_name for linear in plan_rank(made, Layout().rank(0), Precision("fp16", "fp16")).linears]
    chosen = {name: next(form for key, form in forms.items() if key in name) for name in names}
    precision = Precision("auto", "bf16").with_modules(chosen)
    return [plan_rank(made, rank, precision) for rank in Layout.resolve(tp=tp).ranks()]


def compiled(
    plan: RankPlan, phase: Any, form: Any = None, asked: RankPlan | None = None
) -> tuple[PlanText, Expectation]:
    """The first decoder segment, read back, and what it must show (by the plan `asked`, if it is another one)."""
    segment = cut_into_segments(plan)[1]
    embedded = phase == "any"
    built = build_network(plan, segment, phase, LIMITS, form, open_random([plan], 0) if embedded else None)
    blob = BytesIO()
    compile_network(built, TARGET, "mixed", blob)
    outputs = tuple(b.name for b in built.bindings if b.role == "output" or b.alias)
    expected = expect(asked or plan, segment, phase, LIMITS, TARGET, built.moe_form, outputs, embedded)
    return read_plan(blob.getvalue(), build_log().lines), expected


@pytest.mark.parametrize(
    ("family", "forms", "tp"),
    [
        ("llama", {"": DYNAMIC}, 2),
        ("mistral", MIXED, 1),
        ("qwen2", {"": ZEROS}, 2),
        ("mixtral", {"": DYNAMIC}, 2),
        ("mixtral", {"": ZEROS}, 2),
        ("mixtral", {"attention": PLAIN, "mlp.proj": DYNAMIC, "": INT4}, 1),
        ("qwen2_moe", {"attention": INT8, "mlp.shared_expert": PLAIN, "mlp.proj": ROWS, "": INT4}, 2),
        ("deepseek_v2", {"attention": DYNAMIC, "mlp.proj": INT8, "": INT4}, 2),
    ],
)
def test_every_plan_of_an_engine_verifies(tmp_path: Path, family: str, forms: Forms, tp: int) -> None:
    plans = mixed_plans(family, forms, tp)
    records = build_plans(
        plans, BuildOptions(LIMITS, TARGET), tmp_path, open_reader=partial(open_random, plans), weights_digest="w",
        workers=0,
    )  # fmt: skip
    decoders = [record for record in records if record.kind == "decoder"]
    assert {record.embedded for record in decoders} == {any(form.format == "int4" for form in forms.values())}
    assert build_log().errors == []


@pytest.mark.parametrize("phase", ["prefill", "decode", "any"])
@pytest.mark.parametrize("form", ["conditional", "routed", "dense"])
def test_dynamic_fp8_experts_have_fp8_operands(form: str, phase: str) -> None:
    [plan] = mixed_plans("mixtral", {"": DYNAMIC}, num_layers=1)
    text, expected = compiled(plan, phase, form)
    for gemms in verify_plan("dynamic", text, expected)["gemms"]:
        # Constants that multiply the same input become one multiply.
        num_fc = 1 if (form, phase) == ("dense", "any") else 4
        assert gemms == {"fp8_e4m3 x fp8_e4m3": 2 + num_fc + 4, "float x float": 1}


@pytest.mark.parametrize("form", ["conditional", "dense"])
def test_int4_experts_with_zero_points_stay_packed(form: str) -> None:
    [plan] = mixed_plans("mixtral", {"attention": ORDER, "": ZEROS}, num_layers=1)
    text, expected = compiled(plan, "any", form)
    for gemms in verify_plan("zeros", text, expected)["gemms"]:
        assert gemms["bf16 x int4"] == 2 + 8


def test_embedded_int8_experts_stay_packed() -> None:
    """They are inputs of the plan, for a constant cannot enter a conditional."""
    [plan] = mixed_plans("mixtral", {"": INT8}, num_layers=1)
    text, expected = compiled(plan, "any", "conditional")
    for gemms in verify_plan("int8", text, expected)["gemms"]:
        assert gemms["bf16 x int8"] >= 8
    assert text.weight_bytes < 0.3 * sum(spec.num_bytes for spec in plan.only_layers().tensors())


@cache
def mixed_llama() -> tuple[PlanText, Expectation]:
    return compiled(mixed_plans("llama", MIXED)[0], "any")


def test_a_layer_in_another_format_is_found() -> None:
    text, expected = mixed_llama()
    verify_plan("right", text, expected)
    # Each layer of one format claimed to be of another; int8 may be unpacked, so fewer are no fault.
    for kind, other in (("fp8", "plain"), ("int4", "plain"), ("plain", "fp8"), ("plain", "int4"), ("fp8", "int4")):
        moved = dict(expected.gemms)
        for name, change in ((kind, -1), (other, 1)):
            least, most = moved[name]
            moved[name] = (least + change, most + change)
        with pytest.raises(CheckFailed, match="matrix multiplies, found"):
            verify_plan("wrong", text, replace(expected, gemms=moved))


@pytest.mark.parametrize(
    ("built", "asked", "message"),
    [
        ({"mlp.fc": PLAIN, "": DYNAMIC}, {"": DYNAMIC}, "asked for 10 fp8 matrix multiplies, found 8"),
        ({"": DYNAMIC}, {"mlp.fc": PLAIN, "": DYNAMIC}, "asked for 8 fp8 matrix multiplies, found 10"),
        ({"mlp.fc": INT8, "": DYNAMIC}, {"": DYNAMIC}, "asked for 10 fp8 matrix multiplies, found 8"),
    ],
)
def test_another_network_is_found(built: Forms, asked: Forms, message: str) -> None:
    """A dynamic fp8 layer that is compiled as 16 bit, and the reverse."""
    text, expected = compiled(mixed_plans("llama", built)[0], "decode", asked=mixed_plans("llama", asked)[0])
    with pytest.raises(CheckFailed) as error:
        verify_plan("wrong", text, expected)
    assert message in error.value.message


@pytest.mark.parametrize("packed", [INT4, ZEROS])
def test_an_unpacked_int4_layer_is_found(packed: LinearForm) -> None:
    """Of one block to a row, which TensorRT unpacks to scratch without a word: what the network avoids."""
    from trtbuild.engines.tensorrt import weights

    [plan] = mixed_plans("llama", {"attention.dense": packed, "": PLAIN}, 2, num_layers=1)[:1]
    text, expected = compiled(plan, "any")
    verify_plan("right", text, expected)
    with pytest.MonkeyPatch.context() as patch:
        part = weights.Weights._part
        patch.setattr(
            weights.Weights, "_part",
            lambda self, name, what, how, expert: part(self, name, what, "copy" if how == "twice" else how, expert),
        )  # fmt: skip
        text, expected = compiled(plan, "any")
    with pytest.raises(CheckFailed, match="asked for 1 int4 matrix multiplies, found 0"):
        verify_plan("wrong", text, expected)


def test_segments_share_plans_by_their_layers_forms() -> None:
    """Of eight layers 2, 3, 6 and 7 have another form; two layers of int4 stand alone, embedded on each rank."""
    forms = {f"layers.{layer}.": ROWS for layer in (2, 3, 6, 7)} | {"": DYNAMIC}
    tasks = plan_tasks(mixed_plans("llama", forms, 2, num_layers=8), BuildOptions(LIMITS, TARGET))
    shared = {(task.phase, len(task.serves)) for task in tasks if task.segment.kind == "decoder"}
    assert shared == {("prefill", 4), ("decode", 4)}
    assert [task.segment.num_layers for task in tasks if task.segment.kind == "decoder"] == [2] * 4
    int4 = {"layers.4.mlp.proj": INT4, "layers.5.mlp.proj": INT4} | forms
    tasks = plan_tasks(mixed_plans("llama", int4, 2, num_layers=8), BuildOptions(LIMITS, TARGET), "w")
    embedded = [task for task in tasks if task.embedded]
    assert [(task.segment.first_layer, task.segment.num_layers, task.phase) for task in embedded] == [(4, 2, "any")] * 2
    assert sum(len(task.serves) for task in tasks if task.phase == "decode") == 6
    with pytest.raises(ValueError, match="digest"):
        plan_tasks(mixed_plans("llama", int4, num_layers=8), BuildOptions(LIMITS, TARGET))


def test_uniform_engines_keep_their_plans() -> None:
    """The same forms spelled out by module are the same network, and what other segments have is no matter."""
    made = config("llama")
    uniform = [plan_rank(made, Layout().rank(0), Precision("fp8", "bf16"))]
    spelled = mixed_plans("llama", {"": STATIC})
    tasks = [plan_tasks(plans, BuildOptions(LIMITS, TARGET)) for plans in (uniform, spelled)]
    assert [task.segment for task in tasks[0]] == [task.segment for task in tasks[1]]
    alone = mixed_plans("llama", {"layers.1.": STATIC, "": DYNAMIC})
    digests = [
        {task.digest for task in plan_tasks(plans, BuildOptions(LIMITS, TARGET, segment_layers=1))}
        for plans in (spelled, alone)
    ]
    assert len(digests[0] & digests[1]) == 4  # embed, head, and layer 1's two


def test_int4_inputs_are_refused() -> None:
    [plan] = mixed_plans("llama", MIXED)
    with pytest.raises(EngineBuildError, match="int4 weights must be embedded"):
        build_network(plan, cut_into_segments(plan)[1], "decode", LIMITS)


def test_targets_of_mixed_forms() -> None:
    int4 = Precision("auto", "fp16").with_modules({"a": INT4, "b": PLAIN})
    assert resolve_targets(None, int4)[0] == "sm80"
    assert resolve_targets(None, int4.with_modules({"a": INT4, "b": DYNAMIC})) == ("sm89", "sm120", "sm121")
    assert resolve_targets(None, Precision("int4-awq", "bf16"))[0] == "sm80"
    assert resolve_targets(None, Precision("auto", "fp16").with_modules({"a": PLAIN}))[0] == "sm75"
    with pytest.raises(Refused, match=r"sm86: Ampere .* has no fp8-dynamic, which needs sm89"):
        resolve_targets(["sm86"], Precision("fp8-dynamic", "bf16"))
