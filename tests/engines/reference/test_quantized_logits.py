"""Quantized rank files, dequantized by the test's own code into a transformers model, give the executor's logits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    executor_of,
    hf_config,
    hf_logits,
    hf_model,
    prefill_all,
    random_weights,
    save_checkpoint,
    some_tokens,
)
from reassembly import dequantized, read_ranks, reassemble
from rounded_inputs import Rounding, round_inputs, static_rounding

from trtbuild.checkpoints.convert import ActivationRange, Calibration, convert
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import Precision, PrecisionName
from trtbuild.checkpoints.rank_checkpoint import RankCheckpoint
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.source import CheckpointSource

TOKENS = some_tokens(40)
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"tie_word_embeddings": True},
    "mixtral": {"sliding_window": 11},
    "qwen2_moe": {"shared_expert_intermediate_size": 128},
    "qwen3_moe": {},
    # 64 and 16 heads' 16 values: int4 groups divide every input of a rank.
    "deepseek_v2": {"q_lora_rank": 64, "v_head_dim": 16},
}
LAYOUTS = {
    "llama": [(1,), (4,)], "qwen2": [(2, 2)], "mixtral": [(1,), (4, 1, 2, 2)], "qwen2_moe": [(2, 1, 1, 2)],
    "qwen3_moe": [(2,)], "deepseek_v2": [(1,), (2, 2, 1, 2)],
}  # fmt: skip
CASES = [(family, sizes) for family in MODELS for sizes in LAYOUTS[family]]


@dataclass(frozen=True)
class Converted:
    """A rank checkpoint and the same weights as a float32 Hugging Face checkpoint."""

    source: CheckpointSource
    checkpoint: RankCheckpoint
    model: Any

    def executor_logits(self) -> torch.Tensor:
        precision, layout = self.checkpoint.precision.weights, self.checkpoint.layout
        executor = executor_of(self.source, layout, precision, read=self.checkpoint.tensor)
        return prefill_all(executor, TOKENS, (7, 20))


def converted(
    tmp_path: Path, family: str, sizes: tuple[int, ...], precision: PrecisionName, amax: float = 4.0, **changes: Any
) -> Converted:
    hf, layout = hf_config(family, **MODELS[family], **changes), Layout.resolve(*sizes)
    source = CheckpointSource.open(str(save_checkpoint(tmp_path / "hf", hf)))
    ranges = {
        linear.global_name: ActivationRange(amax + index / 8)
        for rank in layout.ranks()
        for index, linear in enumerate(plan_rank(source.config, rank, Precision("fp8", "bf16")).linears)
    }
    calibration = Calibration({"amax": amax}, lambda: ranges) if precision == "fp8" else None
    checkpoint = convert(source, tmp_path / "out", layout, Precision(precision, "bf16"), calibration=calibration)
    weights = reassemble(dequantized(read_ranks(tmp_path / "out", layout), precision), hf, layout)
    if hf["tie_word_embeddings"]:
        weights.pop("lm_head.weight", None)
    plain = {name: tensor.float().contiguous() for name, tensor in weights.items()}
    directory = save_checkpoint(tmp_path / "dequantized", hf | {"torch_dtype": "float32"}, plain)
    return Converted(source, checkpoint, hf_model(directory))


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize(("family", "sizes"), CASES)
def test_weight_only(family: str, sizes: tuple[int, ...], precision: PrecisionName, tmp_path: Path) -> None:
    model = converted(tmp_path, family, sizes, precision)
    expected, found = hf_logits(model.model, TOKENS), model.executor_logits()
    assert float((found - expected).abs().max()) < 1e-4
    # The quantization shows: without it the logits are elsewhere.
    plain = hf_logits(hf_model(model.source.directory), TOKENS)
    assert float((expected - plain).abs().max()) > {"int8": 0.01, "int4": 0.2}[precision]


@pytest.mark.parametrize(("family", "sizes"), CASES)
def test_fp8_with_static_activations(family: str, sizes: tuple[int, ...], tmp_path: Path) -> None:
    # Of DeepSeek's many roundings one always falls otherwise, and three layers carry it to every later token.
    changes = {"num_hidden_layers": 2} if family == "deepseek_v2" else {}
    model = converted(tmp_path, family, sizes, "fp8", **changes)
    unrounded = hf_logits(model.model, TOKENS)

    def rounding_of(layer: int, name: str) -> Rounding:
        """From the file of the layer's own pipeline stage."""
        layout, num_layers = model.checkpoint.layout, model.source.config.num_layers
        parts = torch.arange(num_layers).tensor_split(layout.pp)
        [stage] = [s for s, part in enumerate(parts) if layer in part]
        local = layer - int(parts[stage][0])
        scales = [
            model.checkpoint.tensor(rank, f"transformer.layers.{local}.{name}.activation_scaling_factor")
            for rank in layout.stage_ranks(stage)
        ]
        assert all(torch.equal(scale, scales[0]) for scale in scales)
        return static_rounding(scales[0])

    round_inputs(model.model, rounding_of)
    difference = (model.executor_logits() - hf_logits(model.model, TOKENS)).abs()
    # Where float32 sums differ in their last bit, an activation may round to the neighbouring e4m3 value, which the
    # layers above carry on: at most 0.06 then. Most logits see none of that (median 2e-6), and the rounding as a
    # whole moves them by 0.4.
    if family == "deepseek_v2":
        # Tokens that see none of it are exact in all their logits, which no other scale achieves.
        assert int((difference.amax(dim=1) < 1e-4).sum()) >= len(TOKENS) // 8
        assert float(difference.median()) < 0.05
        assert float(difference.max()) < 0.5
    else:
        assert float(difference.median()) < 1e-4
        assert float(difference.max()) < 0.2
    assert float((hf_logits(model.model, TOKENS) - unrounded).abs().median()) > 0.2


@torch.inference_mode()
@pytest.mark.parametrize("amax", [4.0, 0.25])
def test_one_fp8_layer_is_exact(amax: float, tmp_path: Path) -> None:
    """The first layer's attention input, where nothing has been rounded before: no flips, and saturation at amax."""
    model = converted(tmp_path, "llama", (2,), "fp8", amax)
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(3))
    weights = [
        {name.removeprefix("transformer.layers.0.attention.qkv."): model.checkpoint.tensor(rank, name)
         for name in read_ranks(tmp_path / "out", Layout.resolve(2))[rank] if "layers.0.attention.qkv." in name}
        for rank in range(2)
    ]  # fmt: skip
    executor = executor_of(model.source, Layout.resolve(2), "fp8", read=model.checkpoint.tensor)
    for rank in range(2):
        scale = weights[rank]["activation_scaling_factor"]
        assert float(scale) == pytest.approx(amax / 448)
        rounded = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        assert float(rounded.abs().max()) == pytest.approx(min(amax, float(x.abs().max())), rel=0.07)
        expected = rounded @ (weights[rank]["weight"].float() * weights[rank]["weights_scaling_factor"]).T
        found = executor._stages[0].weights[rank].linears["transformer.layers.0.attention.qkv"].apply(x)
        assert torch.allclose(found, expected, atol=1e-5)


def test_random_weights_are_not_all_alike() -> None:
    """The helper's own guard: two seeds are two models."""
    first, second = (random_weights(hf_config("llama"), seed) for seed in (0, 1))
    assert not torch.equal(first["lm_head.weight"], second["lm_head.weight"])
