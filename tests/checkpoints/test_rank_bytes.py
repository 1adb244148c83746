"""Rank tensors of layouts that no oracle covers, against TensorRT-LLM's rules written with whole matrices.

`upstream_rank` repeats, pads, chunks and concatenates as `tensorrt_llm/models/*/convert.py` does; the package cuts
rectangles instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import hf_config, random_weights, rank_tensors, save_checkpoint
from safetensors import safe_open

from trtbuild.checkpoints.convert import convert
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import Precision
from trtbuild.checkpoints.source import CheckpointSource

Weights = dict[str, torch.Tensor]


def upstream_rank(weights: Weights, config: dict[str, Any], layout: Layout, rank: int) -> Weights:
    tp, tp_rank, pp_rank = layout.tp, rank % layout.tp, rank // layout.tp
    moe_tp_rank, moe_ep_rank = tp_rank // layout.moe_ep, tp_rank % layout.moe_ep
    result: Weights = {}
    if pp_rank == 0:
        result["transformer.vocab_embedding.weight"] = weights["model.embed_tokens.weight"]
    if pp_rank == layout.pp - 1:
        result["transformer.ln_f.weight"] = weights["model.norm.weight"]
        head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
        padding = torch.zeros(-len(head) % tp, head.shape[1], dtype=head.dtype)
        result["lm_head.weight"] = torch.cat([head, padding]).chunk(tp)[tp_rank]

    def kv(tensor: torch.Tensor) -> torch.Tensor:
        heads = tensor.unflatten(0, (config["num_key_value_heads"], config["head_dim"]))
        return heads.repeat_interleave(max(1, tp // config["num_key_value_heads"]), 0).flatten(0, 1)

    for local, layer in enumerate(torch.arange(config["num_hidden_layers"]).tensor_split(layout.pp)[pp_rank].tolist()):
        source, name = f"model.layers.{layer}.", f"transformer.layers.{local}."
        result[f"{name}input_layernorm.weight"] = weights[f"{source}input_layernorm.weight"]
        result[f"{name}post_layernorm.weight"] = weights[f"{source}post_attention_layernorm.weight"]
        for kind in ("weight", "bias"):
            if f"{source}self_attn.q_proj.{kind}" in weights:
                q, k, v = (weights[f"{source}self_attn.{part}_proj.{kind}"] for part in "qkv")
                parts = [whole.chunk(tp)[tp_rank] for whole in (q, kv(k), kv(v))]
                result[f"{name}attention.qkv.{kind}"] = torch.cat(parts)
        result[f"{name}attention.dense.weight"] = weights[f"{source}self_attn.o_proj.weight"].chunk(tp, 1)[tp_rank]
        if f"{source}self_attn.o_proj.bias" in weights:
            result[f"{name}attention.dense.bias"] = weights[f"{source}self_attn.o_proj.bias"]
        if "num_local_experts" in config:
            moe = f"{source}block_sparse_moe."
            result[f"{name}mlp.router.weight"] = weights[f"{moe}gate.weight"].float()
            w1, w2, w3 = (
                torch.stack(
                    [weights[f"{moe}experts.{expert}.{part}.weight"] for expert in range(config["num_local_experts"])]
                )
                for part in ("w1", "w2", "w3")
            )
            halves = [w.chunk(layout.moe_tp, 1)[moe_tp_rank].chunk(layout.moe_ep)[moe_ep_rank] for w in (w3, w1)]
            result[f"{name}mlp.fc.weight"] = torch.cat(halves, dim=1)
            result[f"{name}mlp.proj.weight"] = w2.chunk(layout.moe_tp, 2)[moe_tp_rank].chunk(layout.moe_ep)[moe_ep_rank]
            continue
        for target, part in (("fc", "gate"), ("gate", "up"), ("proj", "down")):
            result[f"{name}mlp.{target}.weight"] = weights[f"{source}mlp.{part}_proj.weight"].chunk(
                tp, int(part == "down")
            )[tp_rank]
            if f"{source}mlp.{part}_proj.bias" in weights:
                bias = weights[f"{source}mlp.{part}_proj.bias"]
                result[f"{name}mlp.{target}.bias"] = bias if part == "down" else bias.chunk(tp)[tp_rank]
    return result


CASES: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("mixtral", {}, (4, 1, 2, 2)),
    ("mixtral", {"num_hidden_layers": 5}, (4, 2, 1, 4)),
    ("mixtral", {"num_key_value_heads": 4}, (8, 1, 2, 4)),
    ("llama", {"num_key_value_heads": 4}, (8,)),
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}, (8, 2)),
    ("llama", {"num_hidden_layers": 5}, (2, 2)),
    ("llama", {"num_hidden_layers": 7}, (1, 3)),
    ("mistral", {"num_key_value_heads": 1, "vocab_size": 129}, (4,)),
    ("qwen2", {"tie_word_embeddings": True}, (4, 2)),
    ("qwen2", {"num_key_value_heads": 4, "head_dim": 8}, (8,)),
    # Fewer words than padding needs: the last ranks hold nothing but zeros.
    ("llama", {"vocab_size": 5}, (4,)),
]


@pytest.mark.parametrize(("family", "changes", "sizes"), CASES)
def test_rank_files_follow_upstreams_rules(
    family: str, changes: dict[str, Any], sizes: tuple[int, ...], tmp_path: Path
) -> None:
    config = hf_config(family, **changes)
    weights = random_weights(config)
    source = CheckpointSource.open(str(save_checkpoint(tmp_path / "hf", config, weights, shards=3)))
    layout = Layout.resolve(*sizes)
    convert(source, tmp_path / "out", layout, Precision("bf16", "bf16"), workers=2)
    for rank in range(layout.world_size):
        expected = upstream_rank(weights, config, layout, rank)
        with safe_open(tmp_path / "out" / f"rank{rank}.safetensors", framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype, name
            assert torch.equal(found[name], tensor), (rank, name)


def ranks_of(tmp_path: Path, family: str, sizes: tuple[int, ...], **changes: Any) -> tuple[Weights, list[Weights]]:
    config = hf_config(family, **changes)
    weights = random_weights(config)
    source = CheckpointSource.open(str(save_checkpoint(tmp_path, config, weights)))
    return weights, rank_tensors(source, Layout.resolve(*sizes))


def test_expert_parallelism_varies_fastest(tmp_path: Path) -> None:
    weights, ranks = ranks_of(tmp_path, "mixtral", (4, 1, 2, 2))
    for rank, (experts, half) in enumerate([((0, 1), 0), ((2, 3), 0), ((0, 1), 1), ((2, 3), 1)]):
        for local, expert in enumerate(experts):
            source = f"model.layers.1.block_sparse_moe.experts.{expert}."
            up, gate = (weights[f"{source}{part}.weight"].chunk(2)[half] for part in ("w3", "w1"))
            assert torch.equal(ranks[rank]["transformer.layers.1.mlp.fc.weight"][local], torch.cat([up, gate]))
            down = weights[f"{source}w2.weight"].chunk(2, 1)[half]
            assert torch.equal(ranks[rank]["transformer.layers.1.mlp.proj.weight"][local], down)


def test_tp_8_on_4_kv_heads_repeats_each_head_consecutively(tmp_path: Path) -> None:
    weights, ranks = ranks_of(tmp_path, "llama", (8,), num_key_value_heads=4)
    for rank in range(8):
        head = rank // 2
        q = weights["model.layers.0.self_attn.q_proj.weight"][rank * 16 : (rank + 1) * 16]
        k, v = (weights[f"model.layers.0.self_attn.{part}_proj.weight"][head * 16 : (head + 1) * 16] for part in "kv")
        assert torch.equal(ranks[rank]["transformer.layers.0.attention.qkv.weight"], torch.cat([q, k, v]))


def test_vocabulary_is_padded_with_zero_rows_at_the_end(tmp_path: Path) -> None:
    weights, ranks = ranks_of(tmp_path, "llama", (4,), vocab_size=130)
    assert [len(rank["lm_head.weight"]) for rank in ranks] == [33, 33, 33, 33]
    whole = torch.cat([rank["lm_head.weight"] for rank in ranks])
    assert torch.equal(whole[:130], weights["lm_head.weight"])
    assert whole[130:].count_nonzero() == 0
    assert all(len(rank["transformer.vocab_embedding.weight"]) == 130 for rank in ranks)


def test_pipeline_stages_renumber_layers_and_share_out_the_ends(tmp_path: Path) -> None:
    weights, ranks = ranks_of(tmp_path, "llama", (1, 2), num_hidden_layers=3)
    numbers = [sorted({name.split(".")[2] for name in rank if ".layers." in name}) for rank in ranks]
    assert numbers == [["0", "1"], ["0"]]
    assert torch.equal(ranks[1]["transformer.layers.0.mlp.fc.weight"], weights["model.layers.2.mlp.gate_proj.weight"])
    outer = [{name for name in rank if ".layers." not in name} for rank in ranks]
    assert outer == [{"transformer.vocab_embedding.weight"}, {"transformer.ln_f.weight", "lm_head.weight"}]


@pytest.mark.parametrize("repeated", [False, True])
def test_tied_embeddings_are_written_twice(repeated: bool, tmp_path: Path) -> None:
    """Also where the file holds the same lm_head once more."""
    config = hf_config("qwen2", tie_word_embeddings=True)
    weights = random_weights(config)
    stored = weights | ({"lm_head.weight": weights["model.embed_tokens.weight"].clone()} if repeated else {})
    source = CheckpointSource.open(str(save_checkpoint(tmp_path, config, stored)))
    [rank] = rank_tensors(source, Layout())
    assert torch.equal(rank["transformer.vocab_embedding.weight"], weights["model.embed_tokens.weight"])
    assert torch.equal(rank["lm_head.weight"], weights["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("stored", "wanted"), [("float32", "fp16"), ("float32", "bf16"), ("float16", "bf16"), ("bfloat16", "fp16")]
)
def test_weights_are_rounded_once_to_the_16_bit_type(stored: str, wanted: str, tmp_path: Path) -> None:
    config = hf_config("mixtral", torch_dtype=stored)
    weights = random_weights(config, dtype=getattr(torch, stored))
    source = CheckpointSource.open(str(save_checkpoint(tmp_path, config, weights)))
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[wanted]
    [found] = rank_tensors(source, Layout(), wanted)  # type: ignore[arg-type]
    expected = upstream_rank(weights, config, Layout(), 0)
    for name, tensor in expected.items():
        cast = tensor if "router" in name else tensor.to(dtype)
        assert found[name].dtype == cast.dtype, name
        assert torch.equal(found[name], cast), name


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "bf16"), ("float16", "fp16"), ("float32", "fp16")])
def test_a_quantized_precision_keeps_the_checkpoints_16_bit_type(dtype: str, precision: str, tmp_path: Path) -> None:
    source = CheckpointSource.open(str(save_checkpoint(tmp_path, hf_config("llama", torch_dtype=dtype))))
    assert source.config.dtype == precision
    assert Precision.resolve("int8", source.config.dtype) == Precision("int8", precision)  # type: ignore[arg-type]
    assert Precision.resolve("bf16", source.config.dtype) == Precision("bf16", "bf16")
