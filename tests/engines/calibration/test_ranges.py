"""Activation ranges against hooks on transformers' model, and what calibration does with text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DEEPSEEK_LITE, TINY_MIXTRAL, TINY_QWEN2, hf_config, hf_model, random_weights, save_checkpoint

from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.engines.calibration.ranges import calibrate
from trtbuild.engines.calibration.text import NUM_SEQUENCES, SEQUENCE_LENGTH, CalibrationText, calibration_tokens
from trtbuild.errors import CheckpointError

TEXT = CalibrationText("eval", (TINY_MIXTRAL / "eval.txt").read_text()[:9000])


def hooked_amax(
    directory: Path, sequences: list[list[int]], dtype: torch.dtype = torch.bfloat16
) -> tuple[dict[str, float], dict[int, list[int]]]:
    """Largest input of every layer of transformers' 16-bit model, every expert on every token; tokens per expert."""
    model = hf_model(directory, dtype)
    amax: dict[str, float] = {}
    routed: dict[int, list[int]] = {}

    def record(name: str, x: torch.Tensor) -> None:
        amax[name] = max(amax.get(name, 0.0), float(x.abs().max()))

    def hook(module: torch.nn.Module, name: str) -> None:
        module.register_forward_pre_hook(lambda _, arguments: record(name, arguments[0]))

    def hook_experts(layer: int, experts: Any) -> None:
        def forward(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            x, chosen = arguments[0], arguments[1]
            record(f"transformer.layers.{layer}.mlp.fc", x)
            counts = torch.bincount(chosen.flatten(), minlength=experts.num_experts)
            routed[layer] = (torch.tensor(routed.get(layer, [0] * experts.num_experts)) + counts).tolist()
            for expert in range(experts.num_experts):
                gate, up = (x @ experts.gate_up_proj[expert].T).chunk(2, -1)
                record(f"transformer.layers.{layer}.mlp.proj", torch.nn.functional.silu(gate) * up)

        experts.register_forward_pre_hook(forward)

    for index, layer in enumerate(model.model.layers):
        name = f"transformer.layers.{index}."
        attention = layer.self_attn
        if hasattr(attention, "kv_b_proj"):
            hook(attention.kv_a_proj_with_mqa, f"{name}attention.fused_a")
            hook(attention.q_b_proj if attention.q_lora_rank else attention.q_proj, f"{name}attention.q_b_proj")
        else:
            hook(attention.q_proj, f"{name}attention.qkv")
        hook(attention.o_proj, f"{name}attention.dense")
        if hasattr(layer.mlp, "experts"):
            hook_experts(index, layer.mlp.experts)
            for shared in (getattr(layer.mlp, f"shared_expert{s}", None) for s in ("", "s")):
                if shared is not None:
                    hook(shared.up_proj, f"{name}mlp.shared_expert.fc")
                    hook(shared.down_proj, f"{name}mlp.shared_expert.proj")
        else:
            for part, ours in (("gate", "fc"), ("up", "gate"), ("down", "proj")):
                hook(getattr(layer.mlp, f"{part}_proj"), f"{name}mlp.{ours}")
    with torch.inference_mode():
        for sequence in sequences:
            model(torch.tensor([sequence]))
    return amax, routed


@pytest.mark.parametrize("directory", [TINY_QWEN2, TINY_MIXTRAL])
def test_ranges_are_what_transformers_layers_see(directory: Path) -> None:
    source = CheckpointSource.open(str(directory))
    sequences = calibration_tokens(source, TEXT)
    ranges = calibrate(source, TEXT)
    expected, routed = hooked_amax(directory, sequences)
    assert ranges.keys() == expected.keys()
    # bf16 on both sides; sums are in another order, and an MoE routes near ties elsewhere.
    for name, found in ranges.items():
        assert found.amax == pytest.approx(expected[name], rel=0.03), name
    num_tokens = sum(map(len, sequences))
    for layer, counts in routed.items():
        for name in ("mlp.fc", "mlp.proj"):
            tokens = ranges[f"transformer.layers.{layer}.{name}"].tokens_per_expert
            assert sum(tokens) == 2 * num_tokens
            assert sum(abs(a - b) for a, b in zip(tokens, counts, strict=True)) < 0.02 * num_tokens
        assert ranges[f"transformer.layers.{layer}.attention.qkv"].tokens_per_expert == ()


@pytest.mark.parametrize(
    ("family", "changes", "num_ranges"),
    [
        # Layers 0 and 2: qkv, dense, fc, proj and the shared expert's two; layer 1 is a plain MLP.
        ("qwen2_moe", {}, 6 + 5 + 6),
        ("qwen3_moe", {"mlp_only_layers": [2]}, 4 + 4 + 5),
        # Layer 0 is dense: fused_a, q_b, dense and the MLP's three; the others have 3 + 2 + 2.
        ("deepseek_v2", {}, 6 + 7 + 7),
        ("deepseek_v2", DEEPSEEK_LITE, 6 + 7 + 7),
    ],
)
def test_shared_experts_and_latent_attention_get_ranges(
    family: str, changes: dict[str, Any], num_ranges: int, tmp_path: Path
) -> None:
    copy_tokenizer(tmp_path)
    # fp16: with bf16's rounding, routing near ties differs so often that the largest values do.
    hf = hf_config(family, vocab_size=1024, max_position_embeddings=256, torch_dtype="float16", **changes)
    source = CheckpointSource.open(str(save_checkpoint(tmp_path, hf, random_weights(hf, dtype=torch.float16))))
    sequences = calibration_tokens(source, TEXT)
    ranges = calibrate(source, TEXT)
    expected, _ = hooked_amax(tmp_path, sequences, torch.float16)
    assert ranges.keys() == expected.keys()
    assert len(ranges) == num_ranges
    for name, found in ranges.items():
        assert found.amax == pytest.approx(expected[name], rel=0.03), name
    num_tokens, top_k = sum(map(len, sequences)), hf["num_experts_per_tok"]
    routed = [found.tokens_per_expert for name, found in ranges.items() if name.endswith("mlp.fc")]
    assert [sum(tokens) for tokens in routed if tokens] == [top_k * num_tokens] * 2


def copy_tokenizer(target: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (target / name).write_bytes((TINY_MIXTRAL / name).read_bytes())


def mixtral_with(tmp_path: Path, change: Any, **config: Any) -> CheckpointSource:
    """tiny-mixtral's tokenizer on a random model whose weights `change` edits."""
    copy_tokenizer(tmp_path)
    hf = hf_config("mixtral", vocab_size=1024, max_position_embeddings=256, **config)
    weights = random_weights(hf)
    change(weights)
    return CheckpointSource.open(str(save_checkpoint(tmp_path, hf, weights)))


def test_an_expert_that_no_token_is_routed_to_is_calibrated(tmp_path: Path) -> None:
    """A router of zeros chooses the same two experts for every token; an idle one gets the largest weights."""

    def shun(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.block_sparse_moe.gate.weight"].zero_()

    def enlarge(weights: dict[str, torch.Tensor]) -> None:
        shun(weights)
        for name in ("w1", "w3"):
            weights[f"model.layers.0.block_sparse_moe.experts.{idle}.{name}.weight"] *= 10

    proj = "transformer.layers.0.mlp.proj"
    before = calibrate(mixtral_with(tmp_path, shun), TEXT)[proj]
    num_tokens = sum(map(len, calibration_tokens(mixtral_with(tmp_path, shun), TEXT)))
    assert sorted(before.tokens_per_expert) == [0, 0, num_tokens, num_tokens]
    idle = before.tokens_per_expert.index(0)
    after = calibrate(mixtral_with(tmp_path, enlarge), TEXT)[proj]
    assert after.tokens_per_expert == before.tokens_per_expert
    assert after.amax and before.amax and after.amax > 20 * before.amax


@pytest.mark.parametrize("overflow", ["qkv", "mlp"])
def test_activations_that_are_not_finite_are_an_error(tmp_path: Path, overflow: str) -> None:
    """fp16 overflows in qkv's product (NaN after the softmax) or in the experts' product (Inf)."""

    def enlarge(weights: dict[str, torch.Tensor]) -> None:
        for name, tensor in weights.items():
            if "layers.0" in name and (
                ("q_proj" in name or "k_proj" in name) if overflow == "qkv" else (".w1." in name or ".w3." in name)
            ):
                tensor.mul_(20000)

    source = mixtral_with(tmp_path, enlarge, torch_dtype="float16")
    name = {"qkv": "attention.dense", "mlp": "mlp.proj"}[overflow]
    with pytest.raises(
        CheckpointError, match=rf"calibration: the input of transformer\.layers\.0\.{name} is not finite"
    ):
        calibrate(source, TEXT)


def test_sequences_are_spread_over_the_text_and_begin_with_bos() -> None:
    source = CheckpointSource.open("tiny-mixtral")
    sequences = calibration_tokens(source, CalibrationText.open(None))
    assert [len(sequence) for sequence in sequences] == [SEQUENCE_LENGTH] * NUM_SEQUENCES
    assert {sequence[0] for sequence in sequences} == {1}
    assert len({tuple(sequence) for sequence in sequences}) == NUM_SEQUENCES
    ids = CheckpointTokens(source).ids(CalibrationText.open(None).text)
    assert sequences[0][1:] == ids[: SEQUENCE_LENGTH - 1]
    assert sequences[-1][1:] == ids[-(SEQUENCE_LENGTH - 1) :]


class CheckpointTokens:
    """The checkpoint's tokenizer, without special tokens."""

    def __init__(self, source: CheckpointSource) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(str(source.directory))

    def ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def test_a_text_that_is_too_short_or_unreadable_is_named(tmp_path: Path) -> None:
    source = CheckpointSource.open("tiny-mixtral")
    for text in ("", "To be or not to be"):
        with pytest.raises(CheckpointError, match=r"calibration text 'x' has \d+ tokens; it takes at least 51[12]"):
            calibrate(source, CalibrationText("x", text))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    for name in ("binary", "gone"):
        with pytest.raises(CheckpointError, match=f"--calib-data .*{name}: not a readable UTF-8 text"):
            CalibrationText.open(tmp_path / name)
    assert CalibrationText("a", "x").digest == CalibrationText("b", "x").digest != CalibrationText("a", "y").digest
