"""Quantizing layer by layer: folded scales change nothing, a kill costs a layer, every expert is calibrated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY_MIXTRAL, executor_of, hf_config, prefill, random_weights, save_checkpoint, some_tokens
from safetensors.torch import load_file

from trtbuild.checkpoints.convert import ActivationRange, Calibration, convert
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import Precision
from trtbuild.checkpoints.prepared_source import PreparedSource
from trtbuild.checkpoints.quantization import QuantizedWeight
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.shards import fill_from
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.checkpoints.tokenizer import load_tokenizer
from trtbuild.engines.calibration import layer_quantizer, layers
from trtbuild.engines.calibration.int4_grid import Grid
from trtbuild.engines.calibration.layer_quantizer import METHODS, Method
from trtbuild.engines.calibration.prepare import prepare, prepare_once
from trtbuild.engines.calibration.smoothing import share_between_heads
from trtbuild.engines.calibration.text import CalibrationText, calibration_tokens
from trtbuild.progress import Progress

TEXT = CalibrationText("eval", (TINY_MIXTRAL / "eval.txt").read_text()[:6000])
TOKENS = some_tokens(40)
FAMILIES = ["llama", "qwen2", "qwen3", "mixtral", "qwen2_moe", "deepseek_v2"]


@pytest.fixture
def uneven(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckpointSource:
    """A random model in which some channels are much larger than others, so that scales have something to do."""
    changes = {"mlp_bias": True, "attention_bias": True} if request.param == "llama" else {}
    hf = hf_config(request.param, **changes)
    weights = random_weights(hf)
    generator = torch.Generator().manual_seed(7)
    for name, weight in weights.items():
        if name.endswith("norm.weight"):
            weights[name] = (torch.randn(weight.shape, generator=generator) * 1.2).exp().to(weight.dtype)
        elif name.endswith(("up_proj.weight", "w3.weight", "v_proj.weight")):
            factor = torch.randn(len(weight), generator=generator).mul(1.2).exp()
            weights[name] = (weight.float() * factor[:, None]).to(weight.dtype)
    monkeypatch.setattr(layers, "calibration_tokens", lambda *_: [some_tokens(64, seed=s) for s in range(4)])
    return CheckpointSource.open(str(save_checkpoint(tmp_path / "hf", hf, weights)))


def logits_of(source: CheckpointSource, reader: Any, precision: str, tokens: list[int] = TOKENS) -> torch.Tensor:
    plans = [plan_rank(source.config, Layout().rank(0), Precision(precision, source.config.dtype))]  # type: ignore[arg-type]
    [tensors] = fill_from(plans, reader)
    executor = executor_of(source, precision=precision, read=lambda _, name: tensors[name], chunk_size=128)  # type: ignore[arg-type]
    return prefill(executor, tokens, logits="all")


@pytest.mark.parametrize("uneven", FAMILIES, indirect=True)
def test_folded_scales_change_nothing(
    uneven: CheckpointSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With (almost) no rounding the model with folded scales is the model: norms, router, biases, rows all fit."""
    searched: list[torch.Tensor] = []
    search = layer_quantizer.search

    def fine(weight: torch.Tensor, grid: Grid) -> QuantizedWeight:
        """15 bits in place of 4."""
        fine_scales = grid.scales / 2048
        groups = weight.unflatten(1, (fine_scales.shape[1], -1)) / fine_scales.unsqueeze(-1)
        return QuantizedWeight(groups.round().flatten(1).to(torch.int16), fine_scales)

    def powers_of_two(*arguments: Any) -> torch.Tensor:
        """What is multiplied and divided by them stays exact in 16 bit."""
        found = search(*arguments)
        if bool((found == 1).all()):
            found = arguments[1].clamp(min=1e-6) ** 0.5
            found = share_between_heads(found, arguments[4]) if len(arguments) > 4 else found
        searched.append(2.0 ** found.log2().round())
        return searched[-1]

    monkeypatch.setattr(layer_quantizer, "round_to_grid", fine)
    monkeypatch.setattr(layer_quantizer, "search", powers_of_two)
    monkeypatch.setattr("trtbuild.engines.calibration.prepare.pack_int4", lambda values: values.contiguous())
    expected, errors = logits_of(uneven, uneven, "bf16"), {}
    for smooth in (False, True):
        folder = tmp_path / f"smooth-{smooth}"
        folder.mkdir()
        prepare(uneven, TEXT, Method(smooth=smooth, compensate=False), folder, origin="test")
        found = logits_of(uneven, FineSource(uneven, folder), "bf16")
        errors[smooth] = float((found - expected).norm() / expected.norm())
    spread = [float(scale.max() / scale.min()) for scale in searched]
    assert max(spread) >= 4
    assert errors[True] < 3 * errors[False] + 1e-4 < 0.01, errors


class FineSource:
    """16-bit weights out of what the patched calibration stored."""

    def __init__(self, base: CheckpointSource, folder: Path) -> None:
        self._base = base
        self._stored: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("layer-*.safetensors")):
            self._stored |= load_file(file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def rows(self, canonical: str, start: int, stop: int) -> torch.Tensor:
        if f"{canonical}.values" in self._stored:
            found = QuantizedWeight(self._stored[f"{canonical}.values"], self._stored[f"{canonical}.scales"])
            return found.dequantize()[start:stop]
        whole = self._stored.get(canonical)
        return self._base.rows(canonical, start, stop) if whole is None else whole[start:stop]


class Killed(Exception):
    pass


class DieAfter:
    """A progress factory that dies after some layers."""

    def __init__(self, layers: int) -> None:
        self.found, self._left = -1, layers

    @contextmanager
    def __call__(self, title: str, total: float, unit: str = "") -> Iterator[Progress]:
        yield self

    def advance(self, amount: float = 1.0, detail: str = "") -> None:
        if self.found < 0:
            self.found = int(amount)
            return
        self._left -= 1
        if not self._left:
            raise Killed


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("precision", "damage"),
    [
        ("int4-awq-asym", None),
        ("int4-gptq", "hidden.safetensors"),
        pytest.param("int4-awq", None, marks=pytest.mark.slow),
        pytest.param("int4-gptq-asym", None, marks=pytest.mark.slow),
        pytest.param("int4-gptq", None, marks=pytest.mark.slow),
        pytest.param("int4-gptq", "layer-0000.safetensors", marks=pytest.mark.slow),
        pytest.param("int4-awq", "layer-0000.safetensors", marks=pytest.mark.slow),
        pytest.param("int4-awq", "hidden.safetensors", marks=pytest.mark.slow),
    ],
)
def test_killed_it_goes_on_to_the_same_bytes(
    tmp_path: Path, precision: str, damage: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "calibration_tokens", lambda *_: [some_tokens(64, seed=s) for s in range(4)])
    source = CheckpointSource.open("tiny-mixtral")
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    prepare(source, TEXT, METHODS[precision], tmp_path / "whole", origin=precision)
    with pytest.raises(Killed):
        prepare(source, TEXT, METHODS[precision], tmp_path / "killed", origin=precision, progress=DieAfter(2))
    if damage == "hidden.safetensors":
        file = tmp_path / "killed" / damage
        file.write_bytes(file.read_bytes()[:1000])
    elif damage:
        (tmp_path / "killed" / damage).unlink()
    again = DieAfter(99)
    prepare(source, TEXT, METHODS[precision], tmp_path / "killed", origin=precision, progress=again)
    assert again.found == (0 if damage else 2)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> PreparedSource:
    source = CheckpointSource.open("tiny-mixtral")
    return prepare_once(source, TEXT, "int4-gptq", tmp_path_factory.mktemp("calibrations"))


def test_calibrated_values_lose_less_than_rounding(mixtral: PreparedSource, tmp_path: Path) -> None:
    """Mean divergence from the 16-bit model's distributions, on text that the calibration did not see."""
    source = mixtral.base
    text = (TINY_MIXTRAL / "eval.txt").read_text()[20000:26000]
    tokens = load_tokenizer(source.directory)(text, add_special_tokens=False)["input_ids"]
    blocks = [tokens[start : start + 100] for start in range(0, 1000, 100)]
    methods = ("int4-awq", "int4-awq-asym", "int4-gptq-asym")
    readers = {"int4": source, "int4-gptq": mixtral}
    readers |= {method: prepare_once(source, TEXT, method, tmp_path) for method in methods}
    exact = [logits_of(source, source, "bf16", block).log_softmax(-1) for block in blocks]
    lost = {}
    for name, reader in readers.items():
        found = [logits_of(source, reader, name, block).log_softmax(-1) for block in blocks]
        lost[name] = sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(exact, found, strict=True)) / 10
    assert lost["int4-gptq"] < lost["int4"] and lost["int4-awq"] < 0.95 * lost["int4"], lost
    assert lost["int4-gptq-asym"] < lost["int4-awq-asym"] < lost["int4-awq"], lost


def test_converted_to_any_layout_it_keeps_the_values(mixtral: PreparedSource, tmp_path: Path) -> None:
    """Rank files hold the calibration's values; the manifest says whose they are, and what each expert saw."""
    tokens = {f"transformer.layers.{i}.mlp.fc": ActivationRange(None, mixtral.tokens_per_expert(i)) for i in range(3)}
    calibration = Calibration({"text": TEXT.digest}, lambda: tokens, lambda: mixtral)
    stored = load_file(mixtral.folder / "layer-0001.safetensors")
    for layout in (Layout.resolve(1), Layout.resolve(2), Layout.resolve(2, moe_ep=2)):
        name = f"tp{layout.tp}-ep{layout.moe_ep}"
        precision = Precision("int4-gptq", "bf16")
        checkpoint = convert(mixtral.base, tmp_path / name, layout, precision, calibration=calibration)
        half = stored["layers.1.experts.5.down.values"]
        rank, expert = (1, 1) if layout.moe_ep == 2 else (layout.tp - 1, 5)
        found = checkpoint.tensor(rank, "transformer.layers.1.mlp.proj.weight")[expert]
        assert torch.equal(found, half if layout.moe_tp == 1 else half[:, half.shape[1] // 2 :])
        entry = checkpoint.authority["tensors"]["transformer.layers.1.mlp.fc"]
        assert entry["precision"] == "int4" and entry["origin"] == "int4-gptq"
        assert 0.05 < entry["relative_error"] < 0.3
        seen = entry["calibration_tokens_per_expert"]
        # Two experts for each token.
        assert len(seen) == 8 and sum(seen) == 2 * sum(map(len, calibration_tokens(mixtral.base, TEXT)))


def test_zero_points_reach_the_ranks_as_what_is_added(tmp_path: Path) -> None:
    """-zero * scale in the 16-bit type, and weights that are worth what the calibration found, whatever the layout."""
    source = CheckpointSource.open("tiny-mixtral")
    prepared = prepare_once(source, TEXT, "int4-awq-asym", tmp_path)
    stored = load_file(prepared.folder / "layer-0001.safetensors")
    name = "layers.1.experts.5.down"
    zeros, scales = stored[f"{name}.zeros"].float(), stored[f"{name}.scales"].float()
    assert bool(zeros.any()) and zeros.min() >= -8 and zeros.max() <= 7
    calibration = Calibration({"text": TEXT.digest}, dict, lambda: prepared)
    for layout in (Layout.resolve(1), Layout.resolve(2)):
        precision = Precision("int4-awq-asym", "bf16")
        checkpoint = convert(source, tmp_path / f"tp{layout.tp}", layout, precision, calibration=calibration)
        shift = torch.cat(
            [checkpoint.tensor(rank, "transformer.layers.1.mlp.proj.zero")[5] for rank in range(layout.tp)], -1
        )
        repeats = shift.shape[1] // zeros.shape[1]
        assert torch.equal(shift, (-zeros * scales).bfloat16().repeat_interleave(repeats, 1))
        assert checkpoint.authority["tensors"]["transformer.layers.1.mlp.proj"]["origin"] == "int4-awq-asym"


def test_every_expert_is_calibrated_even_one_that_the_router_never_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its values follow from the tokens that others got: they lose less on these than rounding does."""
    hf = hf_config("mixtral", num_hidden_layers=1, num_experts_per_tok=1)
    weights = random_weights(hf)
    [gate] = [name for name in weights if name.endswith("block_sparse_moe.gate.weight")]
    # The mean of the others' logits is never the largest.
    weights[gate] = torch.cat(
        [weights[gate][:-1] * 50, weights[gate][:-1].float().mean(0, keepdim=True).bfloat16() * 50]
    )
    monkeypatch.setattr(layers, "calibration_tokens", lambda *_: [some_tokens(64, seed=s) for s in range(4)])
    source = CheckpointSource.open(str(save_checkpoint(tmp_path / "hf", hf, weights)))
    stored = {}
    for name, method in (("gptq", METHODS["int4-gptq"]), ("plain", Method(smooth=False, compensate=False))):
        (tmp_path / name).mkdir()
        prepare(source, TEXT, method, tmp_path / name, origin=name)
        stored[name] = load_file(tmp_path / name / "layer-0000.safetensors")
    facts = json.loads((tmp_path / "gptq" / "facts.json").read_text())
    assert facts["tokens_per_expert"][0][-1] == 0
    last = len(facts["tokens_per_expert"][0]) - 1
    for part in ("up", "gate", "down"):
        name = f"layers.0.experts.{last}.{part}.values"
        assert float((stored["gptq"][name] != stored["plain"][name]).float().mean()) > 0.1


def test_other_weights_or_another_text_are_calibrated_anew(mixtral: PreparedSource, tmp_path: Path) -> None:
    source = mixtral.base
    first = prepare_once(source, TEXT, "int4-gptq", tmp_path)
    again = prepare_once(source, TEXT, "int4-gptq", tmp_path)
    assert first.folder == again.folder
    assert prepare_once(source, TEXT, "int4-awq", tmp_path).folder != first.folder
