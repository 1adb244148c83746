"""A transformers model whose linear layers round their inputs to fp8, as an engine does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Rounding = Callable[[torch.Tensor], torch.Tensor]


def static_rounding(scale: torch.Tensor) -> Rounding:
    """To e4m3 with one scale for all tokens."""
    return lambda x: (x * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def dynamic_rounding(x: torch.Tensor) -> torch.Tensor:
    """To e4m3 with a scale for each token."""
    scale = x.abs().amax(-1, keepdim=True) / 448
    scale[scale == 0] = 1
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def round_inputs(model: Any, rounding_of: Callable[[int, str], Rounding]) -> None:
    """Round every quantizable layer's input by `rounding_of(layer, rank tensor's name)`."""

    def hook(module: torch.nn.Module, rounding: Rounding) -> None:
        module.register_forward_pre_hook(lambda _, arguments: (rounding(arguments[0]), *arguments[1:]))

    for index, layer in enumerate(model.model.layers):
        is_mla = hasattr(layer.self_attn, "kv_b_proj")
        for part in ("q_a_proj", "kv_a_proj_with_mqa") if is_mla else ("q_proj", "k_proj", "v_proj"):
            name = "attention.fused_a" if is_mla else "attention.qkv"
            hook(getattr(layer.self_attn, part), rounding_of(index, name))
        if is_mla:
            hook(layer.self_attn.q_b_proj, rounding_of(index, "attention.q_b_proj"))
        hook(layer.self_attn.o_proj, rounding_of(index, "attention.dense"))
        if hasattr(layer.mlp, "experts"):
            roundings = rounding_of(index, "mlp.fc"), rounding_of(index, "mlp.proj")
            layer.mlp.experts.forward = _quantized_experts(layer.mlp.experts, *roundings)
            shared = getattr(layer.mlp, "shared_expert", None) or getattr(layer.mlp, "shared_experts", None)
            if shared is not None:
                hook(shared.gate_proj, rounding_of(index, "mlp.shared_expert.fc"))
                hook(shared.up_proj, rounding_of(index, "mlp.shared_expert.fc"))
                hook(shared.down_proj, rounding_of(index, "mlp.shared_expert.proj"))
            continue
        for part, name in (("gate_proj", "mlp.fc"), ("up_proj", "mlp.gate"), ("down_proj", "mlp.proj")):
            hook(getattr(layer.mlp, part), rounding_of(index, name))


def _quantized_experts(experts: Any, round_fc: Rounding, round_proj: Rounding) -> Callable[..., Any]:
    def forward(x: torch.Tensor, chosen: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x)
        for token in range(len(x)):
            for expert, score in zip(chosen[token].tolist(), scores[token], strict=True):
                gate, up = (experts.gate_up_proj[expert] @ round_fc(x[token])).chunk(2)
                inner = torch.nn.functional.silu(gate) * up
                total[token] += score * (experts.down_proj[expert] @ round_proj(inner))
        return total

    return forward
