"""Small random Hugging Face checkpoints of every family, and transformers' own reading of them.

Nothing here uses the package's tables: names and shapes are written down once more, from transformers' modules.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from trtbuild.checkpoints.hf_config import read_config
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import Precision, PrecisionName
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.shards import fill_all
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.engines.executor import LogitRows
from trtbuild.engines.limits import EngineLimits
from trtbuild.engines.reference.executor import ReferenceExecutor
from trtbuild.errors import Refused

TESTS = Path(__file__).parent
ORACLE = TESTS / "oracle"
TINY_MIXTRAL = TESTS / "checkpoints" / "tiny-mixtral"
TINY_QWEN2 = TESTS / "checkpoints" / "tiny-qwen2"

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
}
DENSE_FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
MOE_FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2"]
# heads * head_dim is not hidden_size, tp 4 has more ranks than kv heads, and tp 2 does not divide the vocabulary.
BASE: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 128,
    "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXTRA: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 28},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": 96,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 1,
        "use_sliding_window": False,
        "sliding_window": None,
    },
    "qwen3": {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 28, "attention_bias": False},
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        "attention_bias": False,
    },
    # V2's form: low-rank queries, groups of experts, YaRN with its own softmax scale; V2-Lite is a change away.
    "deepseek_v2": {
        "num_key_value_heads": 8,
        "head_dim": None,
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 24,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "rms_norm_eps": 1e-6,
        "moe_intermediate_size": 64,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "rope_scaling": {
            "type": "yarn",
            "factor": 4,
            "original_max_position_embeddings": 32,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 1.0,
        },
    },
}
# V2-Lite: queries in one step, no groups.
DEEPSEEK_LITE: dict[str, Any] = {
    "q_lora_rank": None,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}


def hf_config(family: str, **changes: Any) -> dict[str, Any]:
    """config.json of a small model; a change to None is written as null."""
    model = {"architectures": [ARCHITECTURES[family]], "model_type": family}
    return model | BASE | EXTRA[family] | changes


def refusal(hf: dict[str, Any]) -> str:
    """The message with which this config.json is refused."""
    with pytest.raises(Refused) as caught:
        read_config(hf)
    assert caught.value.exit_code == 3
    return caught.value.message


def hf_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, as transformers writes this model."""
    hidden = config["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        shapes |= {f"{name}{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        is_mla = config["model_type"] == "deepseek_v2"
        attention = _mla_shapes(config) if is_mla else _attention_shapes(config)
        shapes |= {f"{name}self_attn.{part}": shape for part, shape in attention.items()}
        shapes |= {f"{name}{part}": shape for part, shape in _block_shapes(config, layer).items()}
    return shapes


def _attention_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    family, hidden, head_dim = config["model_type"], config["hidden_size"], config["head_dim"]
    q, kv = (config[key] * head_dim for key in ("num_attention_heads", "num_key_value_heads"))
    bias = config.get("attention_bias", False)
    shapes: dict[str, tuple[int, ...]] = {}
    for part, out in (("q", q), ("k", kv), ("v", kv)):
        shapes[f"{part}_proj.weight"] = (out, hidden)
        if bias or family in ("qwen2", "qwen2_moe"):
            shapes[f"{part}_proj.bias"] = (out,)
    shapes["o_proj.weight"] = (hidden, q)
    if bias:
        shapes["o_proj.bias"] = (hidden,)
    if family.startswith("qwen3"):
        shapes |= {"q_norm.weight": (head_dim,), "k_norm.weight": (head_dim,)}
    return shapes


def _mla_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, heads, latent = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    shapes: dict[str, tuple[int, ...]] = {
        "kv_a_proj_with_mqa.weight": (latent + rope, hidden),
        "kv_a_layernorm.weight": (latent,),
        "kv_b_proj.weight": (heads * (nope + value), latent),
        "o_proj.weight": (hidden, heads * value),
    }
    rank = config["q_lora_rank"]
    if rank is None:
        return {**shapes, "q_proj.weight": (heads * (nope + rope), hidden)}
    query: dict[str, tuple[int, ...]] = {"q_a_proj.weight": (rank, hidden), "q_a_layernorm.weight": (rank,)}
    return {**shapes, **query, "q_b_proj.weight": (heads * (nope + rope), rank)}


def _block_shapes(config: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    """The MLP or the mixture of experts of one layer."""
    family, hidden = config["model_type"], config["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {}

    def mlp(name: str, inner: int, parts: Sequence[str] = ("gate_proj", "up_proj", "down_proj")) -> None:
        for part in parts:
            shape = (hidden, inner) if part in ("down_proj", "w2") else (inner, hidden)
            shapes[f"{name}.{part}.weight"] = shape
            if config.get("mlp_bias"):
                shapes[f"{name}.{part}.bias"] = shape[:1]

    is_dense = layer in config.get("mlp_only_layers", []) or layer < config.get("first_k_dense_replace", 0)
    is_dense = is_dense or (layer + 1) % config.get("decoder_sparse_step", 1) > 0
    if family not in MOE_FAMILIES or is_dense:
        mlp("mlp", config["intermediate_size"])
        return shapes
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    num_experts = config.get("num_local_experts") or config.get("num_experts") or config["n_routed_experts"]
    shapes[f"{block}.gate.weight"] = (num_experts, hidden)
    for expert in range(num_experts):
        if family == "mixtral":
            mlp(f"{block}.experts.{expert}", config["intermediate_size"], ("w1", "w2", "w3"))
        else:
            mlp(f"{block}.experts.{expert}", config["moe_intermediate_size"])
    if family == "qwen2_moe":
        mlp("mlp.shared_expert", config["shared_expert_intermediate_size"])
        shapes["mlp.shared_expert_gate.weight"] = (1, hidden)
    if family == "deepseek_v2" and config["n_shared_experts"]:
        mlp("mlp.shared_experts", config["moe_intermediate_size"] * config["n_shared_experts"])
    return shapes


def random_weights(
    config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """Weights with which every part of the network matters: logits spread over several units, sharp attention."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for name, shape in hf_shapes(config).items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            values = 1 + 0.2 * values
        elif name.endswith(".bias"):
            values *= 0.5
        elif len(shape) == 2 and "embed" not in name:
            values *= 1.5 / shape[1] ** 0.5
        weights[name] = values.to(dtype)
    return weights


def save_checkpoint(
    directory: Path,
    config: dict[str, Any],
    weights: dict[str, torch.Tensor] | None = None,
    *,
    shards: int = 1,
    seed: int = 0,
) -> Path:
    """Write config.json and the weights (random ones by default) into `directory`, which is created."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    weights = random_weights(config, seed) if weights is None else weights
    if shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(weights.items())[shard::shards])
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def make_checkpoint(directory: Path, family: str, *, shards: int = 1, seed: int = 0, **changes: Any) -> Path:
    return save_checkpoint(directory, hf_config(family, **changes), shards=shards, seed=seed)


def hf_model(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model, with its plain attention."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(directory), dtype=dtype, attn_implementation="eager").eval()


@torch.inference_mode()
def hf_logits(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """float32 [len(tokens), vocab]."""
    return model(torch.tensor([list(tokens)])).logits[0].float()


def some_tokens(count: int, vocab_size: int = BASE["vocab_size"], seed: int = 1) -> list[int]:
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def rank_tensors(
    source: CheckpointSource,
    layout: Layout,
    precision: PrecisionName | None = None,
    amax: dict[str, float] | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Every rank's tensors, made in memory."""
    wanted = Precision.resolve(precision or source.config.dtype, source.config.dtype)
    return fill_all([plan_rank(source.config, rank, wanted) for rank in layout.ranks()], source.tensor, amax)


def executor_of(
    source: CheckpointSource,
    layout: Layout | None = None,
    precision: PrecisionName | None = None,
    *,
    dtype: torch.dtype | None = torch.float32,
    read: Callable[[int, str], torch.Tensor] | None = None,
    max_batch_size: int = 4,
    max_seq_len: int = 128,
    chunk_size: int = 64,
) -> ReferenceExecutor:
    """The reference executor over rank tensors that are made in memory, or over those that `read` finds."""
    layout = layout or Layout()
    wanted = Precision.resolve(precision or source.config.dtype, source.config.dtype)
    plans = [plan_rank(source.config, rank, wanted) for rank in layout.ranks()]
    if read is None:
        ranks = fill_all(plans, source.tensor)
        read = lambda rank, name: ranks[rank][name]  # noqa: E731
    limits = EngineLimits(max_batch_size=max_batch_size, max_seq_len=max_seq_len, chunk_size=chunk_size)
    return ReferenceExecutor(plans, read, limits, dtype=dtype)


def prefill(
    executor: ReferenceExecutor, tokens: Sequence[int], start: int = 0, slot: int = 0, logits: LogitRows = "last"
) -> torch.Tensor:
    """Logits of one chunk."""
    found = executor.prefill(slot, tokens, start, logits)
    assert found is not None
    return found


def prefill_all(
    executor: ReferenceExecutor, tokens: Sequence[int], chunks: Sequence[int], slot: int = 0
) -> torch.Tensor:
    """Logits of every position, the prompt cut into chunks of these lengths (the rest in one piece)."""
    logits, start = [], 0
    for length in (*chunks, len(tokens) - sum(chunks)):
        if length:
            logits.append(prefill(executor, tokens[start : start + length], start, slot, "all"))
            start += length
    return torch.cat(logits)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()
