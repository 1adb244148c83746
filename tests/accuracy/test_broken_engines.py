"""Each of these engines builds, loads and talks; each must fail `verify` with the default limits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY_QWEN2

from trtbuild.accuracy.verify import VerifyOptions, verify_engine

Ranks = list[dict[str, torch.Tensor]]
Break = Callable[[Ranks, dict[str, Any]], None]

# Two blocks of 128 tokens of what the models were trained for.
OPTIONS = VerifyOptions(texts=(TINY_QWEN2 / "eval.txt",), num_tokens=256)
L = "transformer.layers."


def swap(ranks: Ranks, name: str, one: Any, other: Any) -> None:
    """Exchange two parts of a tensor on every rank."""
    for tensors in ranks:
        tensor = tensors[name]
        tensor[one], tensor[other] = tensor[other].clone(), tensor[one].clone()


def expert_scales_swapped(ranks: Ranks, _: dict[str, Any]) -> None:
    swap(ranks, f"{L}1.mlp.fc.weights_scaling_factor", 2, 5)


def experts_exchanged(ranks: Ranks, _: dict[str, Any]) -> None:
    for part in ("fc.weight", "fc.weights_scaling_factor", "proj.weight", "proj.weights_scaling_factor"):
        swap(ranks, f"{L}2.mlp.{part}", 1, 6)


def expert_zeroed(ranks: Ranks, _: dict[str, Any]) -> None:
    for tensors in ranks:
        tensors[f"{L}0.mlp.proj.weight"][4] = 0


def gate_and_up_exchanged(ranks: Ranks, _: dict[str, Any]) -> None:
    for part in ("weight", "weights_scaling_factor"):
        half = ranks[0][f"{L}1.mlp.fc.{part}"].shape[1] // 2
        swap(ranks, f"{L}1.mlp.fc.{part}", (3, slice(None, half)), (3, slice(half, None)))


def router_rows_permuted(ranks: Ranks, _: dict[str, Any]) -> None:
    swap(ranks, f"{L}1.mlp.router.weight", 0, 7)


def group_scales_doubled(ranks: Ranks, _: dict[str, Any]) -> None:
    for tensors in ranks:
        tensors[f"{L}0.attention.qkv.weights_scaling_factor"][:, 1] *= 2


def nibbles_swapped(ranks: Ranks, _: dict[str, Any]) -> None:
    for tensors in ranks:
        packed = tensors[f"{L}2.attention.dense.weight"]
        packed.copy_((packed << 4) | (packed >> 4))


def down_slices_of_ranks_swapped(ranks: Ranks, _: dict[str, Any]) -> None:
    for part in ("weight", "weights_scaling_factor"):
        name = f"{L}2.mlp.proj.{part}"
        ranks[0][name], ranks[1][name] = ranks[1][name], ranks[0][name]


def layers_exchanged(ranks: Ranks, _: dict[str, Any]) -> None:
    for tensors in ranks:
        for name in [name for name in tensors if name.startswith(f"{L}1.")]:
            other = name.replace(f"{L}1.", f"{L}2.")
            tensors[name], tensors[other] = tensors[other], tensors[name]


def rope_theta(_: Ranks, authority: dict[str, Any]) -> None:
    authority["model"]["rope"]["theta"] *= 4


def sliding_window(_: Ranks, authority: dict[str, Any]) -> None:
    authority["model"]["sliding_window"] = 64


def norm_of_ones(ranks: Ranks, _: dict[str, Any]) -> None:
    for tensors in ranks:
        tensors[f"{L}1.post_layernorm.weight"].fill_(1)


def head_shifted(ranks: Ranks, _: dict[str, Any]) -> None:
    for tensors in ranks:
        tensors["lm_head.weight"].copy_(tensors["lm_head.weight"].roll(1, 0))


def norm_of_one_rank(ranks: Ranks, _: dict[str, Any]) -> None:
    ranks[1][f"{L}2.input_layernorm.weight"] *= 1.25


def biases_dropped(ranks: Ranks, _: dict[str, Any]) -> None:
    for tensors in ranks:
        tensors[f"{L}1.attention.qkv.bias"].zero_()


def value_bias_dropped(ranks: Ranks, _: dict[str, Any]) -> None:
    for tensors in ranks:
        bias = tensors[f"{L}0.attention.qkv.bias"]
        bias[-len(bias) // 4 :] = 0


def dense_gate_and_up_exchanged(ranks: Ranks, _: dict[str, Any]) -> None:
    for tensors in ranks:
        fc, gate = f"{L}0.mlp.fc.weight", f"{L}0.mlp.gate.weight"
        tensors[fc], tensors[gate] = tensors[gate], tensors[fc]


def query_heads_permuted(ranks: Ranks, _: dict[str, Any]) -> None:
    """Heads 0 and 2 read different keys."""
    swap(ranks, f"{L}1.attention.qkv.weight", slice(0, 64), slice(128, 192))


def key_and_value_exchanged(ranks: Ranks, _: dict[str, Any]) -> None:
    swap(ranks, f"{L}0.attention.qkv.weight", slice(256, 384), slice(384, 512))


def embedding_shifted(ranks: Ranks, _: dict[str, Any]) -> None:
    for tensors in ranks:
        name = "transformer.vocab_embedding.weight"
        tensors[name] = tensors[name].roll(1, 0)


def activation_scale_too_small(ranks: Ranks, _: dict[str, Any]) -> None:
    ranks[0][f"{L}1.mlp.fc.activation_scaling_factor"] /= 16


def activation_scale_too_large(ranks: Ranks, _: dict[str, Any]) -> None:
    """Values become subnormal, or zero."""
    ranks[0][f"{L}2.attention.dense.activation_scaling_factor"] *= 2.0**15


def expert_scale_off(ranks: Ranks, _: dict[str, Any]) -> None:
    ranks[0][f"{L}2.mlp.proj.weights_scaling_factor"][3] *= 1.25


def not_a_number(ranks: Ranks, _: dict[str, Any]) -> None:
    ranks[0][f"{L}0.mlp.router.weight"][5, 5] = float("nan")


BREAKAGES: list[tuple[str, Break, str]] = [
    ("mixtral-int4", expert_scales_swapped, "layer 1 expert 2 "),
    ("mixtral-int4", experts_exchanged, "layer 2 expert 6 "),
    ("mixtral-int4", expert_zeroed, "layer 0 expert 4 "),
    ("mixtral-int4", gate_and_up_exchanged, "layer 1 expert 3 "),
    ("mixtral-int4", router_rows_permuted, "layer 1 router "),
    ("mixtral-int4", group_scales_doubled, "layer 0 attention "),
    ("mixtral-int4", nibbles_swapped, "layer 2 attention "),
    ("mixtral-int4", down_slices_of_ranks_swapped, "layer 2 expert 0 "),
    ("mixtral-int4", layers_exchanged, "layer 1 attention "),
    ("mixtral-int4", norm_of_ones, "layer 1 router "),
    ("qwen2-bf16", rope_theta, "layer 0 attention "),
    ("qwen2-bf16", sliding_window, "layer 2 attention "),
    ("qwen2-bf16", head_shifted, "head "),
    ("qwen2-bf16", norm_of_one_rank, "layer 2 attention "),
    ("qwen2-bf16", biases_dropped, "layer 1 attention "),
    ("qwen2-bf16", value_bias_dropped, "layer 0 attention "),
    ("qwen2-bf16", dense_gate_and_up_exchanged, "layer 0 mlp "),
    ("qwen2-bf16", embedding_shifted, "embed "),
    ("mixtral-fp8", query_heads_permuted, "layer 1 attention "),
    ("mixtral-fp8", key_and_value_exchanged, "layer 0 attention "),
    ("mixtral-fp8", activation_scale_too_small, "layer 1 expert 7 "),
    ("mixtral-fp8", activation_scale_too_large, "layer 2 attention "),
    ("mixtral-fp8", expert_scale_off, "layer 2 expert 3 "),
    ("mixtral-fp8", not_a_number, "layer 0 router "),
]


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize(("engine", "break_it", "where"), BREAKAGES, ids=[b.__name__ for _, b, _ in BREAKAGES])
def test_a_broken_engine_fails_where_it_is_broken(
    broken: Callable[[str, Break], Path], engine: str, break_it: Break, where: str
) -> None:
    passport = verify_engine(broken(engine, break_it), OPTIONS)
    assert passport.accuracy_state() == "failed"
    failures = passport.data["accuracy"]["failures"]
    assert any(line.startswith(where) for line in failures), failures


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("engine", ["qwen2-bf16", "mixtral-int4", "mixtral-fp8"])
def test_the_same_engine_unbroken_passes_with_room(broken: Callable[[str, Break], Path], engine: str) -> None:
    """Through the same surgery, with nothing cut: blocks lose what rounding to nearest loses."""
    passport = verify_engine(broken(engine, lambda _, __: None), OPTIONS)
    record = passport.data["accuracy"]
    assert record["failures"] == []
    assert passport.accuracy_state() == "passed"
    pairs = [pair for block in record["blocks"] for pair in zip(block["errors"], block["limits"], strict=True)]
    assert max(error / limit for error, limit in pairs) < 0.85
