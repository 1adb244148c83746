"""int4 layers of a mixture are calibrated on what the other layers, in their own formats, really give them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers import TINY_MIXTRAL, prefill
from safetensors.torch import load_file

from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import FormatName, LinearForm, Precision, PrecisionName
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.rank_tensors import Linear
from trtbuild.checkpoints.shards import fill_from
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.checkpoints.tokenizer import load_tokenizer
from trtbuild.cli import main
from trtbuild.engines import precision_choice
from trtbuild.engines.calibration import layers, prepare, sensitivity
from trtbuild.engines.calibration.layer_quantizer import LayerQuantizer
from trtbuild.engines.calibration.prepare import prepare_once
from trtbuild.engines.calibration.text import CalibrationText, calibration_tokens
from trtbuild.engines.job import Job, convert_model
from trtbuild.engines.limits import EngineLimits
from trtbuild.engines.recipe import Recipe
from trtbuild.engines.reference.executor import ReferenceExecutor
from trtbuild.progress import Progress
from trtbuild.workspace import Workspace

TEXT = CalibrationText("eval", (TINY_MIXTRAL / "eval.txt").read_text()[:6000])
Seen = dict[tuple[str, int | None], torch.Tensor]


def mixture_of(source: CheckpointSource, form: FormatName) -> dict[str, LinearForm]:
    """Every layer's qkv and fc in `form`, the others (dense, gate, proj) in int4."""
    plan = plan_rank(source.config, Layout().rank(0), Precision(source.config.dtype, source.config.dtype))
    names = [linear.global_name for linear in plan.linears]
    return {name: LinearForm(form if name.endswith(("qkv", "fc")) else "int4") for name in names}


@pytest.fixture
def sequences(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    found = [ids[:256] for ids in calibration_tokens(CheckpointSource.open("tiny-mixtral"), TEXT)[:2]]
    for module in (layers, sensitivity):
        monkeypatch.setattr(module, "calibration_tokens", lambda *_: found)
    return found


@pytest.fixture
def calibrated_on(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Second moments of the inputs by which each matrix is quantized."""
    seen: Seen = {}
    weight = LayerQuantizer.weight

    def record(self: LayerQuantizer, linear: Linear, expert: int | None, inputs: Any) -> torch.Tensor:
        seen[linear.global_name, expert] = inputs.moments(fitted=False).clone()
        return weight(self, linear, expert, inputs)

    monkeypatch.setattr(LayerQuantizer, "weight", record)
    return seen


def engine_sees(
    source: CheckpointSource,
    reader: Any,
    mixture: dict[str, LinearForm],
    sequences: list[list[int]],
    precision: PrecisionName = "auto",
) -> tuple[Seen, torch.Tensor]:
    """Second moments of all inputs of dense layers in the mixed model, and the last sequence's logits."""
    plans = [
        plan_rank(source.config, Layout().rank(0), Precision(precision, source.config.dtype).with_modules(mixture))
    ]
    [tensors] = fill_from(plans, reader)
    inputs: dict[tuple[str, int | None], list[torch.Tensor]] = defaultdict(list)
    executor = ReferenceExecutor(
        plans, lambda _, name: tensors[name], EngineLimits(1, 512, 512),
        observer=lambda linear, expert, x: inputs[linear.global_name, expert].append(x.flatten(0, -2).float()),
    )  # fmt: skip
    logits = [prefill(executor, tokens, logits="all") for tokens in sequences][-1]
    seen = {key: torch.cat(parts) for key, parts in inputs.items() if key[1] is None}
    return {key: x.T @ x / len(x) for key, x in seen.items()}, logits


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).norm() / right.norm())


@pytest.mark.parametrize(
    ("model", "form"),
    [
        ("tiny-mixtral", "int8"),
        pytest.param("tiny-mixtral", "fp8-dynamic", marks=pytest.mark.slow),
        pytest.param("tiny-qwen2", "bf16", marks=pytest.mark.slow),
        ("tiny-qwen2", "fp8-dynamic"),
    ],
)
def test_inputs_are_those_of_the_engine(
    model: str, form: FormatName, sequences: list[list[int]], calibrated_on: Seen, tmp_path: Path
) -> None:
    """Nearer to what the mixed model's layers get than the inputs behind int4 everywhere were, in every layer."""
    source = CheckpointSource.open(model)
    mixture = mixture_of(source, form)
    prepare_once(source, TEXT, "int4-gptq", tmp_path)
    uniform = dict(calibrated_on)
    calibrated_on.clear()
    prepared = prepare_once(source, TEXT, "int4-gptq", tmp_path, mixture=mixture)
    assert {name for name, _ in calibrated_on} == {name for name, kept in mixture.items() if kept.format == "int4"}
    real, _ = engine_sees(source, prepared, mixture, sequences)
    compared = [key for key in calibrated_on if key in real]
    assert len(compared) >= source.config.num_layers
    for key in compared:
        now, before = distance(calibrated_on[key], real[key]), distance(uniform[key], real[key])
        # What is left is 16-bit rounding, which a calibration in batches and an engine do not share.
        assert now < 0.02 and now < before / 3, (key, now, before)


def test_only_int4_layers_are_stored_and_all_is_read(sequences: list[list[int]], tmp_path: Path) -> None:
    source = CheckpointSource.open("tiny-mixtral")
    mixture = mixture_of(source, "int8")
    prepared = prepare_once(source, TEXT, "int4-gptq", tmp_path, mixture=mixture)
    plan = plan_rank(source.config, Layout().rank(0), Precision("auto", "bf16").with_modules(mixture))
    for linear in plan.linears:
        for piece in linear.pieces:
            stored = prepared.stored(piece.source)
            assert (stored.origin if stored else None) == ("int4-gptq" if linear.precision == "int4" else None)
    assert sum(prepared.tokens_per_expert(0)) == 2 * sum(map(len, sequences))
    _, logits = engine_sees(source, prepared, mixture, sequences)
    assert bool(logits.isfinite().all())


def test_awq_folds_no_scale_into_layers_that_stay(sequences: list[list[int]], tmp_path: Path) -> None:
    """Nothing in 16 bit changes where the readers of norms stay; a mixture then loses less than int4 everywhere."""
    source = CheckpointSource.open("tiny-mixtral")
    _, exact = engine_sees(source, source, {}, sequences, "bf16")
    lost, folded = {}, {}
    for form in ("bf16", "int4"):
        mixture = mixture_of(source, form)
        prepared = prepare_once(source, TEXT, "int4-awq", tmp_path, mixture=mixture)
        names = load_file(prepared.folder / "layer-0001.safetensors")
        folded[form] = {name for name in names if not name.endswith((".values", ".scales"))}
        _, logits = engine_sees(source, prepared, mixture, sequences)
        p, q = exact.float().log_softmax(-1), logits.float().log_softmax(-1)
        lost[form] = float((p.exp() * (p - q)).sum(-1).mean())
    assert len(folded["int4"]) >= 3 and not folded["bf16"]
    assert 0 < lost["bf16"] < 0.7 * lost["int4"] < 0.05, lost


class Killed(Exception):
    pass


@contextmanager
def die_after_one_layer(title: str, total: float, unit: str = "") -> Iterator[Progress]:
    class Bar:
        calls = 0

        def advance(self, amount: float = 1.0, detail: str = "") -> None:
            self.calls += 1
            # The first call tells what was found.
            if self.calls == 2:
                raise Killed

    yield Bar()


def test_killed_it_goes_on_to_the_same_bytes(sequences: list[list[int]], tmp_path: Path) -> None:
    source = CheckpointSource.open("tiny-qwen2")
    mixture = mixture_of(source, "fp8-dynamic")
    whole = prepare_once(source, TEXT, "int4-gptq", tmp_path / "whole", mixture=mixture)
    with pytest.raises(Killed):
        prepare_once(source, TEXT, "int4-gptq", tmp_path / "x", mixture=mixture, progress=die_after_one_layer)
    again = prepare_once(source, TEXT, "int4-gptq", tmp_path / "x", mixture=mixture)
    assert again.folder.name == whole.folder.name
    assert {f.name: f.read_bytes() for f in again.folder.iterdir()} == {
        f.name: f.read_bytes() for f in whole.folder.iterdir()
    }


def test_another_mixture_is_another_calibration(sequences: list[list[int]], tmp_path: Path) -> None:
    source = CheckpointSource.open("tiny-qwen2")
    folders = {
        prepare_once(source, TEXT, "int4-gptq", tmp_path, mixture=mixture).folder
        for mixture in (None, mixture_of(source, "int8"), mixture_of(source, "bf16"), mixture_of(source, "int8"))
    }
    assert len(folders) == 3


def test_an_engine_has_the_values_of_its_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sequences: list[list[int]]
) -> None:
    """`convert --precision auto`: one more pass, told on stderr; the same command again calibrates nothing."""
    arguments = ["convert", "tiny-mixtral", "--precision", "auto", "--budget", "4.1MB", "--workspace", str(tmp_path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "quantizing to int4-gptq-asym: done" in result.output
    assert "quantizing to int4-gptq-asym again, in the chosen mixture of linear layers (" in result.output
    [build] = (tmp_path / "build").glob("[!.]*")
    authority = json.loads((build / "trtbuild.json").read_text())
    formats = authority["mixture"]["formats"]
    assert {"int4", "int8"} <= set(formats.values())
    int4 = {name for name, form in formats.items() if form == "int4"}
    assert {name for name, entry in authority["tensors"].items() if entry.get("origin") == "int4-gptq-asym"} == int4
    [mixed] = [
        folder
        for folder in (tmp_path / "build" / ".calibration").glob("[!.]*")
        if "mixture" in json.loads((folder / "request.json").read_text())["request"]
    ]
    stored = load_file(build / "rank0.safetensors")
    plan = plan_rank(CheckpointSource.open("tiny-mixtral").config, Layout().rank(0), Precision("bf16", "bf16"))
    singles = [linear for linear in plan.linears if linear.global_name in int4 and len(linear.pieces) == 1]
    for linear in singles:
        calibrated = load_file(mixed / f"layer-{int(linear.global_name.split('.')[2]):04d}.safetensors")
        assert torch.equal(stored[f"{linear.name}.weight"], calibrated[f"{linear.pieces[0].source}.values"])
    assert singles
    monkeypatch.setattr(prepare, "prepare", lambda *_, **__: pytest.fail("calibrated again"))
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 0 and "quantizing" not in again.output, again.output
    # A job that nobody settled is another request no longer.
    job = Job.resolve(Recipe.create(model="tiny-mixtral", precision="auto", budget="4.1MB"))
    assert convert_model(job, Workspace(tmp_path)).directory == build


@pytest.mark.parametrize("form", ["int4", "int8"])
def test_without_a_mixture_there_is_no_second_pass(
    form: FormatName, tmp_path: Path, sequences: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All int4 are the values found before; none int4 are the checkpoint's weights."""
    source = CheckpointSource.open("tiny-mixtral")
    first = prepare_once(source, TEXT, "int4-gptq", tmp_path)
    monkeypatch.setattr(prepare, "prepare", lambda *_, **__: pytest.fail("calibrated again"))
    plan = plan_rank(source.config, Layout().rank(0), Precision("bf16", "bf16"))
    mixture = {linear.global_name: LinearForm(form) for linear in plan.linears}
    reader = precision_choice.prepared_for(source, TEXT, "int4-gptq", mixture, tmp_path)
    assert reader.folder == first.folder
    stored = [reader.stored(piece.source) for linear in plan.linears for piece in linear.pieces]
    assert all(stored) if form == "int4" else not any(stored)


def test_zero_points_are_taken_where_the_budget_has_room(sequences: list[list[int]], tmp_path: Path) -> None:
    """At the bytes of int4 none, from those of int4 with zero points on all; a chosen model is never larger."""
    source = CheckpointSource.open("tiny-qwen2")

    def num_bytes(precision: Precision) -> int:
        return sum(tensor.num_bytes for tensor in plan_rank(source.config, Layout().rank(0), precision).tensors())

    plain, shifted = (num_bytes(Precision(name, "bf16")) for name in ("int4-gptq", "int4-gptq-asym"))
    for budget, zeros in ((plain, False), (shifted - 1, False), (shifted, True), (shifted * 11 // 10, True)):
        chosen = precision_choice.choose_mixture(
            source, Layout(), Precision("auto", "bf16"), TEXT, tmp_path, budget=budget, max_loss=None, fp8=False
        )
        forms = [form for _, form in chosen.precision.modules if form.format == "int4"]
        assert forms and {form.zeros for form in forms} == {zeros}
        assert chosen.record["int4"] == ("int4-gptq-asym" if zeros else "int4-gptq")
        assert num_bytes(chosen.precision) <= budget


def test_a_tenth_more_bytes_lose_a_quarter_less(sequences: list[list[int]], tmp_path: Path) -> None:
    """Than int4 everywhere: divergence from the 16-bit model on text that neither calibration nor costs saw."""
    source = CheckpointSource.open("tiny-mixtral")
    tokens = load_tokenizer(source.directory)((TINY_MIXTRAL / "eval.txt").read_text()[20000:], verbose=False)[
        "input_ids"
    ]
    blocks = [tokens[start : start + 256] for start in range(0, 8 * 256, 256)]
    uniform = mixture_of(source, "int4")
    plan = plan_rank(source.config, Layout().rank(0), Precision("int4", "bf16"))
    num_bytes = sum(tensor.num_bytes for tensor in plan.tensors())
    chosen = precision_choice.choose_mixture(
        source,
        Layout(),
        Precision("auto", "bf16"),
        TEXT,
        tmp_path,
        budget=num_bytes * 11 // 10,
        max_loss=None,
        fp8=False,
    )
    exact = logits_of(source, source, {}, blocks, "bf16")
    lost = []
    for mixture, method in ((uniform, "int4-gptq"), (dict(chosen.precision.modules), chosen.record["int4"])):
        reader = precision_choice.prepared_for(source, TEXT, method, mixture, tmp_path)
        pairs = zip(exact, logits_of(source, reader, mixture, blocks), strict=True)
        lost.append(sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in pairs))
    assert lost[1] < 0.75 * lost[0], lost


def logits_of(
    source: CheckpointSource,
    reader: Any,
    mixture: dict[str, LinearForm],
    blocks: list[list[int]],
    precision: PrecisionName = "auto",
) -> list[torch.Tensor]:
    """Log-probabilities of each block's next tokens, computed in float32."""
    plans = [
        plan_rank(source.config, Layout().rank(0), Precision(precision, source.config.dtype).with_modules(mixture))
    ]
    [tensors] = fill_from(plans, reader)
    limits = EngineLimits(1, 256, 256)
    executor = ReferenceExecutor(plans, lambda _, name: tensors[name], limits, dtype=torch.float32)
    return [prefill(executor, block, logits="all").log_softmax(-1) for block in blocks]
