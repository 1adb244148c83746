"""Every form of linear layer in the reference executor, against transformers with the weights that it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from crafted_tensors import ACTIVATION_AMAX, CraftedRanks, craft_ranks
from helpers import hf_config, hf_logits, hf_model, prefill_all, save_checkpoint, some_tokens
from reassembly import reassemble
from rounded_inputs import Rounding, dynamic_rounding, round_inputs, static_rounding

from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import LinearForm
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.engines.limits import EngineLimits
from trtbuild.engines.reference.executor import ReferenceExecutor
from trtbuild.engines.reference.torch_weights import FP8_UNIT, TorchLinear

TOKENS = some_tokens(40)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mixtral": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 128},
    "deepseek_v2": {"q_lora_rank": 64, "v_head_dim": 16},
}
INT4, ZEROS, ORDER = LinearForm("int4"), LinearForm("int4", 32, zeros=True), LinearForm("int4", order=True)
DYNAMIC, ROWS, STATIC = LinearForm("fp8-dynamic"), LinearForm("fp8", row_scales=True), LinearForm("fp8")
INT8, PLAIN = LinearForm("int8"), LinearForm("bf16")


def crafted(
    tmp_path: Path, family: str, sizes: tuple[int, ...], forms: dict[str, LinearForm], num_layers: int = 2
) -> tuple[CraftedRanks, ReferenceExecutor, Any]:
    """Rank tensors, the float32 executor over them, and transformers with the weights that they stand for."""
    hf, layout = hf_config(family, **FAMILIES[family], num_hidden_layers=num_layers), Layout.resolve(*sizes)
    source = CheckpointSource.open(str(save_checkpoint(tmp_path / "hf", hf)))
    ranks = craft_ranks(source, layout, forms)
    executor = executor_over(ranks, torch.float32)
    weights = {name: tensor.float().contiguous() for name, tensor in reassemble(ranks.exact, hf, layout).items()}
    directory = save_checkpoint(tmp_path / "exact", hf | {"torch_dtype": "float32"}, weights)
    return ranks, executor, hf_model(directory)


def executor_over(ranks: CraftedRanks, dtype: torch.dtype) -> ReferenceExecutor:
    limits = EngineLimits(max_batch_size=2, max_seq_len=64, chunk_size=32)
    return ReferenceExecutor(ranks.plans, lambda rank, name: ranks.tensors[rank][name], limits, dtype=dtype)


WEIGHT_ONLY: dict[str, dict[str, LinearForm]] = {
    "zeros": {"": ZEROS},
    "order": {"mlp.shared_expert": ORDER, "mlp.fc": INT4, "mlp.proj": INT4, "": ORDER},
    "mixed": {"layers.1.mlp.proj": INT8, "attention.dense": PLAIN, "attention": INT8, "mlp.proj": ZEROS, "": INT4},
}


@pytest.mark.parametrize(
    ("family", "sizes", "name"),
    [
        ("llama", (1,), "zeros"),
        ("llama", (2,), "zeros"),
        ("llama", (1,), "order"),
        ("llama", (2, 2), "mixed"),
        ("mixtral", (2, 1, 1, 2), "zeros"),
        ("qwen2_moe", (1,), "order"),
        ("deepseek_v2", (2,), "mixed"),
    ],
)
def test_weights_are_what_their_form_stands_for(tmp_path: Path, family: str, sizes: tuple[int, ...], name: str) -> None:
    ranks, executor, model = crafted(tmp_path, family, sizes, WEIGHT_ONLY[name])
    found = prefill_all(executor, TOKENS, (7, 20))
    assert float((found - hf_logits(model, TOKENS)).abs().max()) < 1e-4
    # Each part of the form matters.
    part = {"zeros": ".zero", "order": ".input_order", "mixed": ".per_channel_scale"}[name]
    for tensors in ranks.tensors:
        for key in [key for key in tensors if key.endswith(part)]:
            tensors[key] = tensors[key].roll(1, -1)
    wrong = prefill_all(executor_over(ranks, torch.float32), TOKENS, (7, 20))
    assert float((wrong - found).abs().max()) > 0.1


ACTIVATIONS: dict[str, dict[str, LinearForm]] = {
    "dynamic": {"": DYNAMIC},
    "rows": {"": ROWS},
    "mixed": {"layers.1.mlp.fc": STATIC, "mlp.gate": STATIC, "mlp.proj": ROWS, "attention.dense": ZEROS, "": DYNAMIC},
}


@pytest.mark.parametrize(
    ("family", "sizes", "name"),
    [
        ("llama", (1,), "dynamic"),
        ("llama", (2,), "rows"),
        ("llama", (2,), "mixed"),
        ("mixtral", (2, 1, 1, 2), "dynamic"),
        ("mixtral", (1,), "rows"),
        ("qwen2_moe", (1,), "dynamic"),
        ("deepseek_v2", (1,), "mixed"),
    ],
)
def test_fp8_rounds_inputs_as_its_form_says(tmp_path: Path, family: str, sizes: tuple[int, ...], name: str) -> None:
    ranks, executor, model = crafted(tmp_path, family, sizes, ACTIVATIONS[name])
    unrounded = hf_logits(model, TOKENS)
    linears = [linear for plan in ranks.plans for linear in plan.linears]

    def rounding_of(layer: int, part: str) -> Rounding:
        ours = [linear for linear in linears if linear.global_name == f"transformer.layers.{layer}.{part}"]
        form, cuts = ours[0].form, {piece.columns for linear in ours for piece in linear.pieces}
        if form.format == "fp8-dynamic":
            return dynamic_rounding if len(cuts) == 1 else _by_rank(len(cuts))
        return static_rounding(torch.tensor(ACTIVATION_AMAX / 448)) if form.format == "fp8" else lambda x: x

    round_inputs(model, rounding_of)
    expected = hf_logits(model, TOKENS)
    difference = (prefill_all(executor, TOKENS, (7, 20)) - expected).abs()
    # A last bit of float32 now and then rounds to the neighbouring e4m3 value, which later layers carry on.
    assert float(difference.median()) < 1e-4, difference.amax(1)
    assert float(difference.max()) < 0.3
    assert float((expected - unrounded).abs().median()) > 0.05


def _by_rank(tp: int) -> Rounding:
    """A row-parallel layer's rank sees its own columns of a token, and scales by them."""
    return lambda x: torch.cat([dynamic_rounding(chunk) for chunk in x.chunk(tp, -1)], -1)


@pytest.mark.parametrize("name", ["zeros", "order", "dynamic", "rows"])
def test_in_16_bit(tmp_path: Path, name: str) -> None:
    """The layers' own types move the logits no further than 16 bit does elsewhere."""
    ranks, executor, _ = crafted(tmp_path, "llama", (1,), (WEIGHT_ONLY | ACTIVATIONS)[name])
    exact = prefill_all(executor, TOKENS, (7, 20))
    found = prefill_all(executor_over(ranks, torch.bfloat16), TOKENS, (7, 20))
    assert float(torch.nn.functional.cosine_similarity(found, exact, dim=-1).min()) > 0.98


def test_a_token_of_zeros_stays_zero() -> None:
    weight = torch.randn(4, 32).to(torch.float8_e4m3fn)
    layer = TorchLinear(weight.float(), output_scale=torch.ones(4), dynamic=True)
    x = torch.zeros(2, 32)
    x[1] = 3.0
    y = layer.apply(x)
    assert torch.equal(y[0], torch.zeros(4))
    assert torch.isfinite(y).all()


def test_dynamic_scales_follow_each_token() -> None:
    """Tokens of very different size keep e4m3's relative precision, where a static scale loses or saturates them."""
    x = 0.1 + torch.rand(5, 64, generator=torch.Generator().manual_seed(1))
    x *= torch.tensor([1e-8, 1e-3, 1.0, 500.0, 6e4])[:, None]
    layer = TorchLinear(torch.eye(64), output_scale=torch.full((64,), 1 / FP8_UNIT), dynamic=True)
    error = (layer.apply(x) / x - 1).abs().amax(1)
    assert bool((error < 2**-4 + 1e-6).all()), error
    assert bool((error > 0.01).all())
