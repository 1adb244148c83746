"""Small models of every family with random weights, whose plans are built and looked at."""

from __future__ import annotations

from typing import Any
from zlib import crc32

import torch

from trtbuild.checkpoints.model_config import MlaConfig, ModelConfig, MoeConfig, RopeConfig
from trtbuild.checkpoints.rank_tensors import RankPlan, TensorSpec
from trtbuild.engines.limits import EngineLimits

LIMITS = EngineLimits(max_batch_size=8, max_seq_len=128, chunk_size=64)
TARGET = ("sm89",)
TORCH_TYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8, "U8": torch.uint8, "I32": torch.int32,
}  # fmt: skip


def config(family: str, **changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "architecture": family, "family": family, "dtype": "fp16", "vocab_size": 320, "hidden_size": 256,
        "num_layers": 2,
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "intermediate_size": 512, "norm_epsilon": 1e-5,
        "max_position_embeddings": 4096, "rope": RopeConfig(),
    }  # fmt: skip
    fields |= {
        "llama": {},
        "mistral": {"sliding_window": 48},
        "mixtral": {"moe": MoeConfig(num_experts=4, top_k=2, intermediate_size=256)},
        "qwen2": {"qkv_bias": True, "tie_embeddings": True},
        "qwen2_moe": {
            "qkv_bias": True,
            "moe": MoeConfig(4, 2, 256, False, shared_intermediate_size=384, shared_gate=True, dense_layers=(0,)),
        },
        "qwen3_moe": {"qk_norm": True, "moe": MoeConfig(8, 3, 256)},
        "deepseek_v2": {
            "moe": MoeConfig(
                8, 3, 256, False, 512, dense_layers=(0,), num_groups=4, top_groups=2, routed_scaling_factor=2.0
            ),
            "mla": MlaConfig(128, 192, 64, 32, 64),
            "head_dim": 96, "num_kv_heads": 4,
            "rope": RopeConfig(type="yarn", factor=4.0, mscale=0.707, mscale_all_dim=0.707),
        },
    }[family]  # fmt: skip
    return ModelConfig(**(fields | changes))


def random_tensor(spec: TensorSpec, seed: int = 0) -> torch.Tensor:
    """Values that differ from tensor to tensor: TensorRT stores equal constants once."""
    generator = torch.Generator().manual_seed(crc32(f"{spec.name} {seed}".encode()))
    if spec.dtype == "I32":
        return torch.randperm(spec.shape[0], generator=generator).int()
    if spec.dtype in ("U8", "I8"):
        return torch.randint(0, 120, spec.shape, generator=generator).to(TORCH_TYPES[spec.dtype])
    return (torch.rand(spec.shape, generator=generator) * 0.1 + 0.01).to(TORCH_TYPES[spec.dtype])


def open_random(plans: list[RankPlan], rank: int) -> Any:
    specs = {spec.name: spec for spec in plans[rank].tensors()}
    return lambda name: random_tensor(specs[name], rank)
