"""Rank checkpoints for trtllm-build, read by the rules of its documentation and not by our own code.

Weight-only: what trtllm-build makes of our 16-bit weights (`preprocess`, below) is what upstream's converter wrote, to
the byte. FP8 and AWQ: 16-bit weights are rebuilt from the files, and compared with the source.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ORACLE, sha256
from safetensors import safe_open

from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import Precision, PrecisionName
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.engines.job import Job, convert_model
from trtbuild.engines.recipe import Recipe
from trtbuild.engines.tensorrt_llm.fit import for_tensorrt_llm
from trtbuild.errors import Refused
from trtbuild.workspace import Workspace

CHECKPOINTS = Path(__file__).parent
WEIGHT_ONLY = sorted(file.stem for file in (ORACLE / "weight_only").glob("*.json"))
DTYPE_NAMES = {"torch.float16": "F16", "torch.float32": "F32", "torch.int8": "I8"}
Ranks = list[dict[str, torch.Tensor]]


def convert(model: Path, place: Path, **fields: Any) -> tuple[Ranks, dict[str, Any]]:
    """Every rank's tensors, and config.json."""
    fields = {"model": str(model), "builder": "tensorrt-llm", "name": "made"} | fields
    checkpoint = convert_model(Job.resolve(Recipe.create(**fields)), Workspace(place), workers=1)
    ranks: Ranks = []
    for rank in range(checkpoint.layout.world_size):
        with safe_open(checkpoint.directory / f"rank{rank}.safetensors", framework="pt") as file:
            ranks.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return ranks, json.loads((checkpoint.directory / "config.json").read_text())


def read_source(model: Path) -> dict[str, torch.Tensor]:
    """By Hugging Face's names, in float32."""
    tensors: dict[str, torch.Tensor] = {}
    for file in model.glob("*.safetensors"):
        with safe_open(file, framework="pt") as content:
            tensors |= {name: content.get_tensor(name).float() for name in content.keys()}  # noqa: SIM118
    return tensors


def quantize(weight: torch.Tensor, bits: int) -> tuple[np.ndarray[Any, Any], torch.Tensor]:
    """[out, in] -> codes [in, out] and scales [out]: amax / 2**(bits-1) of an output, ties away from zero."""
    values = weight.float().numpy().astype(np.float32).T
    scales = np.abs(values).max(0) / np.float32(2 ** (bits - 1))
    ratio = values / scales
    codes = np.trunc(ratio + np.copysign(np.float32(0.5), ratio))
    return np.clip(codes, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(np.int8), torch.from_numpy(scales)


ROWS = {
    8: [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15],
    4: [
        0, 1, 8, 9, 16, 17, 24, 25, 2, 3, 10, 11, 18, 19, 26, 27,
        4, 5, 12, 13, 20, 21, 28, 29, 6, 7, 14, 15, 22, 23, 30, 31,
    ],
}  # fmt: skip


def permute(codes: np.ndarray[Any, Any], bits: int) -> torch.Tensor:
    """The layout of the mixed-precision GEMM on SM80 to SM89, for codes [in, out]."""
    size_in, size_out = codes.shape
    rows = codes.reshape(-1, len(ROWS[bits]), size_out)[:, ROWS[bits]].reshape(size_in, size_out)
    together = 16 // bits
    tiles = rows.T.reshape(size_out // together, together, size_in // 64, 64)
    flat = tiles.transpose(0, 2, 1, 3).reshape(-1)
    unsigned = (flat.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    if bits == 8:
        packed = unsigned.reshape(-1, 4)[:, [0, 2, 1, 3]].reshape(-1)
        return torch.from_numpy(packed.view(np.int8).reshape(size_in, size_out).copy())
    nibbles = unsigned.reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1, 2)
    packed = nibbles[:, 0] | (nibbles[:, 1] << 4)
    return torch.from_numpy(packed.view(np.int8).reshape(size_in, size_out // 2).copy())


def preprocess(tensors: dict[str, torch.Tensor], bits: int) -> dict[str, torch.Tensor]:
    """What trtllm-build does with `quant_algo` W8A16 and W4A16 to weights that are not int8 yet."""
    names = ("qkv.weight", "dense.weight", "fc.weight", "proj.weight", "gate.weight")
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not name.endswith(names):
            found[name] = tensor
            continue
        matrices = tensor if tensor.dim() == 3 else tensor[None]
        made = [quantize(matrix, bits) for matrix in matrices]
        codes = torch.stack([permute(codes, bits) for codes, _ in made])
        scales = torch.stack([scales for _, scales in made]).to(tensor.dtype)
        squeeze = (lambda t: t) if tensor.dim() == 3 else (lambda t: t[0])
        found[name] = squeeze(codes)
        found[name.replace(".weight", ".per_channel_scale")] = squeeze(scales)
    return found


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_weight_only_becomes_upstreams_bytes(name: str, tmp_path: Path) -> None:
    case = json.loads((ORACLE / "weight_only" / f"{name}.json").read_text())
    algo = case["config"]["quantization"]["quant_algo"]
    precision, bits = {"W8A16": ("int8", 8), "W4A16": ("int4", 4)}[algo]
    source = fp16_copy(ORACLE / "checkpoints" / case["hf_ckpt"], tmp_path / "source")
    ranks, config = convert(source, tmp_path, precision=precision, tp=case["tp"])
    assert config["quantization"]["quant_algo"] == algo
    assert "*shared_expert_gate*" in config["quantization"]["exclude_modules"]
    expected = {
        (tensor["rank"], tensor["name"]): (tensor["dtype"], tuple(tensor["shape"]), tensor["sha256"])
        for tensor in case["tensors"]
        if "embed_positions" not in tensor["name"]
    }
    found = {
        (rank, name): (DTYPE_NAMES[str(tensor.dtype)], tuple(tensor.shape), sha256(tensor))
        for rank, tensors in enumerate(ranks)
        for name, tensor in preprocess(tensors, bits).items()
    }
    assert found == expected


def fp16_copy(model: Path, place: Path) -> Path:
    """The checkpoint with fp16 as its type, as the recorded conversions asked for."""
    place.mkdir()
    for file in model.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    config = json.loads((place / "config.json").read_text())
    config["torch_dtype"] = "float16"
    (place / "config.json").write_text(json.dumps(config))
    return place


def awq_matrix(tensors: dict[str, torch.Tensor], layer: str, group: int) -> torch.Tensor:
    """[out, in] of ModelOpt's layout: a byte holds two outputs of one input, scales are [out, in / group]."""
    packed, scales = tensors[f"{layer}.weight"], tensors[f"{layer}.weights_scaling_factor"].float()
    smooth = tensors[f"{layer}.prequant_scaling_factor"].float()
    assert packed.dtype == torch.int8
    assert scales.shape == (packed.shape[0] * 2, packed.shape[1] // group)
    assert smooth.shape == (packed.shape[1],)
    low = (packed.to(torch.int16) & 0xF).to(torch.int8)
    high = (packed.to(torch.int16) >> 4 & 0xF).to(torch.int8)
    codes = torch.stack([low, high], 1).flatten(0, 1)
    codes = torch.where(codes > 7, codes - 16, codes).float()
    return codes * scales.repeat_interleave(group, 1) * smooth


def fp8_matrix(tensors: dict[str, torch.Tensor], layer: str) -> torch.Tensor:
    weight, scale = tensors[f"{layer}.weight"], tensors[f"{layer}.weights_scaling_factor"]
    assert weight.dtype == torch.float8_e4m3fn
    assert scale.dtype == torch.float32
    assert tensors[f"{layer}.activation_scaling_factor"].shape == (1,)
    assert scale.shape == ((1,) if weight.dim() == 2 else (len(weight), 1))
    return weight.float() * (scale if weight.dim() == 2 else scale.unsqueeze(-1))


def rowwise_matrix(tensors: dict[str, torch.Tensor], layer: str) -> torch.Tensor:
    weight, scale = tensors[f"{layer}.weight"], tensors[f"{layer}.per_channel_scale"]
    assert weight.dtype == torch.float8_e4m3fn
    assert scale.shape == (len(weight),)
    return weight.float() * scale.unsqueeze(-1)


def dense_layer(source: dict[str, torch.Tensor], layer: int, tp: int, rank: int) -> dict[str, torch.Tensor]:
    """The matrices of one decoder layer on one rank, by TensorRT-LLM's names: q, k, v stacked; fc is gate_proj."""
    prefix = f"model.layers.{layer}."

    def rows(name: str) -> torch.Tensor:
        return source[prefix + name + ".weight"].chunk(tp, 0)[rank]

    def columns(name: str) -> torch.Tensor:
        return source[prefix + name + ".weight"].chunk(tp, 1)[rank]

    return {
        "attention.qkv": torch.cat([rows(f"self_attn.{x}_proj") for x in "qkv"]),
        "attention.dense": columns("self_attn.o_proj"),
        "mlp.fc": rows("mlp.gate_proj"), "mlp.gate": rows("mlp.up_proj"), "mlp.proj": columns("mlp.down_proj"),
    }  # fmt: skip


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("tp", [1, 2])
def test_awq_layout_holds_the_source(tp: int, tmp_path: Path) -> None:
    model = CHECKPOINTS / "tiny-qwen2"
    ranks, config = convert(model, tmp_path, precision="int4-gptq", tp=tp)
    section = config["quantization"]
    group = section["group_size"]
    assert (section["quant_algo"], section["pre_quant_scale"], section["has_zero_point"]) == ("W4A16_AWQ", True, False)
    assert group in (64, 128)
    source = read_source(model)
    for rank, tensors in enumerate(ranks):
        for layer in range(config["num_hidden_layers"]):
            for name, expected in dense_layer(source, layer, tp, rank).items():
                found = awq_matrix(tensors, f"transformer.layers.{layer}.{name}", group)
                assert relative(found, expected) < 0.2, name


def test_awq_scales_stay_folded(tmp_path: Path) -> None:
    """int4-awq changes norms and weights together: their product is the source's, within int4's error."""
    model = CHECKPOINTS / "tiny-qwen2"
    [tensors], config = convert(model, tmp_path, precision="int4-awq")
    source = read_source(model)
    for layer in range(config["num_hidden_layers"]):
        expected = dense_layer(source, layer, 1, 0)["attention.qkv"]
        norm = source[f"model.layers.{layer}.input_layernorm.weight"]
        prefix = f"transformer.layers.{layer}."
        found = awq_matrix(tensors, f"{prefix}attention.qkv", config["quantization"]["group_size"])
        size = config["num_attention_heads"] * config["head_size"]
        # The values' rows took up the scales of the layer behind them.
        folded = found[: size + size // 2] * tensors[f"{prefix}input_layernorm.weight"].float()
        assert relative(folded, (expected * norm)[: size + size // 2]) < 0.2


@pytest.mark.parametrize(("precision", "rebuild"), [("fp8", fp8_matrix), ("fp8-dynamic", rowwise_matrix)])
def test_fp8_holds_the_source(precision: PrecisionName, rebuild: Any, tmp_path: Path) -> None:
    model = CHECKPOINTS / "tiny-qwen2"
    ranks, config = convert(
        model, tmp_path, precision=precision, tp=2, kv_cache="fp8" if precision == "fp8" else "auto"
    )
    section = config["quantization"]
    assert section["quant_algo"] == {"fp8": "FP8", "fp8-dynamic": "FP8_PER_CHANNEL_PER_TOKEN"}[precision]
    source = read_source(model)
    for rank, tensors in enumerate(ranks):
        for layer in range(config["num_hidden_layers"]):
            prefix = f"transformer.layers.{layer}."
            for name, expected in dense_layer(source, layer, 2, rank).items():
                assert relative(rebuild(tensors, prefix + name), expected) < 0.05, name
            if precision == "fp8":
                scale = tensors[f"{prefix}attention.kv_cache_scaling_factor"]
                assert (scale.dtype, scale.tolist()) == (torch.float32, [1.0])
    assert section["kv_cache_quant_algo"] == ("FP8" if precision == "fp8" else None)
    assert section.get("clamp_val") == (None if precision == "fp8" else [-1200.0, 1200.0])


def test_fp8_experts_hold_the_source(tmp_path: Path) -> None:
    """Up above gate in each expert, whose two halves share a scale; experts are dealt out by moe-ep."""
    model = CHECKPOINTS / "tiny-mixtral"
    ranks, config = convert(model, tmp_path, precision="fp8", tp=2, moe_ep=2)
    source, here = read_source(model), config["moe"]["num_experts"] // 2
    for rank, tensors in enumerate(ranks):
        for layer in range(config["num_hidden_layers"]):
            prefix = f"transformer.layers.{layer}.mlp."
            assert tensors[f"{prefix}router.weight"].dtype == torch.float32
            fc, proj = fp8_matrix(tensors, f"{prefix}fc"), fp8_matrix(tensors, f"{prefix}proj")
            for local in range(here):
                expert = f"model.layers.{layer}.block_sparse_moe.experts.{rank * here + local}."
                both = torch.cat([source[f"{expert}w3.weight"], source[f"{expert}w1.weight"]])
                assert relative(fc[local], both) < 0.05
                assert relative(proj[local], source[f"{expert}w2.weight"]) < 0.05


def test_constants_survive_a_resumed_conversion(tmp_path: Path) -> None:
    """Digests of every tensor are those of the file, constants among them."""
    from trtbuild.checkpoints.rank_checkpoint import RankCheckpoint, verify_content

    convert(CHECKPOINTS / "tiny-qwen2", tmp_path, precision="int4-gptq")
    verify_content(RankCheckpoint.open(tmp_path / "build" / "made"))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"precision": "int4-awq", "tp": 2}, "W4A16_AWQ.* for experts"),
    ({"precision": "fp8-dynamic"}, "no rowwise fp8 for experts"),
    ({"precision": "auto", "budget": "4MiB"}, "mixtures are for tensorrt-rtx"),
    ({"plan_only": True}, "--plan-only is for --builder tensorrt-rtx"),
    ({"kv_cache": "fp16"}, "the model's 16-bit type"),
    ({"trtllm": {"max_num_tokens": 10**6}}, "it is cut to max_batch_size x max_seq_len"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_what_cannot_be_built_is_refused_first(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    from trtbuild.containers import Installed
    from trtbuild.engines.tensorrt_llm.builder import TrtllmJob
    from trtbuild.engines.tensorrt_llm.machine import BuildMachine

    fields = {"model": str(CHECKPOINTS / "tiny-mixtral"), "builder": "tensorrt-llm", "name": "made"} | fields
    with pytest.raises(Refused, match=message):
        TrtllmJob.resolve(Job.resolve(Recipe.create(**fields)), BuildMachine(Installed(None), []))


def test_odd_sizes_are_refused_for_weight_only() -> None:
    """1.x pads them in one path and fails in the other."""
    source = CheckpointSource.open(str(CHECKPOINTS / "tiny-qwen2"))
    layout = Layout.resolve(2)
    config = dataclasses.replace(source.config, intermediate_size=96 * 2)
    with pytest.raises(Refused, match=r"mlp\.fc is 96 x 256 on a rank of --tp 2, and the kernels take multiples of 64"):
        for_tensorrt_llm(Precision("int8", "bf16"), config, layout, "auto")
