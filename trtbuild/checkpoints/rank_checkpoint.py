"""`build/NAME/`: the rank checkpoint on disk, in TensorRT-LLM's format plus `trtbuild.json`.

config.json and rank{r}.safetensors are TensorRT-LLM 1.x's. trtbuild.json is the authority for our own builders: the
full ModelConfig (config.json has no sliding window), layout, precision, and the precision manifest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.model_config import ModelConfig
from trtbuild.checkpoints.precision import Precision
from trtbuild.checkpoints.rank_tensors import RankPlan, plan_rank
from trtbuild.checkpoints.safetensors_file import MappedTensors, read_header, sampled_digest
from trtbuild.errors import CheckpointError
from trtbuild.workspace import digest_of, read_json

if TYPE_CHECKING:
    import torch

# Reads a tensor of one rank by its rank-checkpoint name.
WeightReader: TypeAlias = "Callable[[str], torch.Tensor]"

FORMAT_VERSION = 1
AUTHORITY = "trtbuild.json"

_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
_QUANT_ALGOS = {"bf16": None, "fp16": None, "fp8": "FP8", "int8": "W8A16", "int4": "W4A16"}
# TensorRT-LLM's own default list of modules that stay unquantized (QuantConfig.exclude_modules = None).
_EXCLUDED = [
    "*lm_head",
    "*router",
    "*vocab_embedding",
    "*position_embedding",
    "*block_embedding",
    "*shared_expert_gate",
]


def rank_file(rank: int) -> str:
    return f"rank{rank}.safetensors"


def tensorrt_llm_config(config: ModelConfig, layout: Layout, precision: Precision) -> dict[str, Any]:
    """config.json as TensorRT-LLM 1.x's `PretrainedConfig` reads it."""
    rope = {
        key: value
        for key, value in asdict(config.rope).items()
        if value is not None and key not in ("theta", "truncate")
    }
    result: dict[str, Any] = {
        "architecture": config.architecture,
        "dtype": _DTYPES[precision.dtype],
        "logits_dtype": "float32",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_size": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "swiglu" if config.moe else "silu",
        "norm_epsilon": config.norm_epsilon,
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": config.max_position_embeddings,
        "rotary_base": config.rope.theta,
        "rotary_scaling": None if config.rope.type == "default" else rope,
        "qk_layernorm": False,
        "attn_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "tie_word_embeddings": config.tie_embeddings,
        "mapping": {
            "world_size": layout.world_size, "gpus_per_node": 8, "cp_size": 1,
            "tp_size": layout.tp, "pp_size": layout.pp,
            "moe_tp_size": layout.moe_tp, "moe_ep_size": layout.moe_ep,
        },
        "quantization": {
            "quant_algo": _QUANT_ALGOS[precision.weights], "kv_cache_quant_algo": None, "group_size": 128,
            "has_zero_point": False, "pre_quant_scale": False,
            "exclude_modules": _EXCLUDED if precision.is_quantized else None,
        },
    }  # fmt: skip
    if config.family == "qwen2":
        result["qwen_type"] = "qwen2"
    if config.moe:
        normalization = 1 if config.moe.norm_topk_prob else 0
        result["moe"] = {
            "num_experts": config.moe.num_experts,
            "top_k": config.moe.top_k,
            "normalization_mode": normalization,
        }
    return result


@dataclass(frozen=True)
class RankCheckpoint:
    """A finished rank checkpoint, or an engine directory that holds its files."""

    directory: Path
    authority: dict[str, Any]

    @classmethod
    def open(cls, directory: Path) -> RankCheckpoint:
        """Raises CheckpointError where a file is missing, damaged, or of another format version."""
        authority = read_json(directory / AUTHORITY)
        if authority.get("format") != FORMAT_VERSION:
            raise CheckpointError(
                f"{directory}: rank checkpoint format {authority.get('format')}, this trtbuild reads {FORMAT_VERSION}; "
                "convert it again with --force"
            )
        checkpoint = cls(directory, authority)
        try:
            _ = checkpoint.plans
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{directory / AUTHORITY} is damaged ({error!r}); convert it again with --force"
            ) from error
        for rank in range(checkpoint.layout.world_size):
            checkpoint._check_rank(rank)
        return checkpoint

    @cached_property
    def config(self) -> ModelConfig:
        return ModelConfig.from_dict(self.authority["model"])

    @cached_property
    def layout(self) -> Layout:
        return Layout(**self.authority["layout"])

    @cached_property
    def precision(self) -> Precision:
        return Precision(**self.authority["precision"])

    @cached_property
    def plans(self) -> list[RankPlan]:
        """One plan per rank, derived again from config, layout and precision."""
        return [plan_rank(self.config, rank, self.precision) for rank in self.layout.ranks()]

    @cached_property
    def _mapped(self) -> list[MappedTensors]:
        return [MappedTensors(read_header(self.directory / rank_file(rank))) for rank in range(self.layout.world_size)]

    def tensor(self, rank: int, name: str) -> torch.Tensor:
        """A view of the rank file."""
        return self._mapped[rank].tensor(name)

    def reader(self, rank: int) -> WeightReader:
        """Reads one rank's tensors by name."""
        return lambda name: self.tensor(rank, name)

    def _check_rank(self, rank: int) -> None:
        file = self.directory / rank_file(rank)
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; convert the model again with --force")
        found = {name: entry.spec for name, entry in read_header(file).items()}
        expected = {spec.name: spec for spec in self.plans[rank].tensors()}
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                raise CheckpointError(f"{file}: tensor {name!r} is {found.get(name)}, expected {expected.get(name)}")


def open_rank(directory: Path, rank: int) -> WeightReader:
    """The reader of one rank, for a process that builds its plans."""
    return RankCheckpoint.open(directory).reader(rank)


def weights_digest(checkpoint: RankCheckpoint) -> str:
    """Identifies the rank weights (see `sampled_digest`)."""
    files = (checkpoint.directory / rank_file(rank) for rank in range(checkpoint.layout.world_size))
    return digest_of([sampled_digest(read_header(file)) for file in files])
