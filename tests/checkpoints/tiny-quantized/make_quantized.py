"""Makes the quantized checkpoints beside this file, with the tools that people quantize with.

    PYTHONPATH=GPTQMODEL python make_quantized.py OUT --autoawq DIR --autogptq DIR

needs an environment with llmcompressor (0.14, transformers 5), and the unpacked sources of autoawq 0.2.9, auto-gptq
0.7.1 (of both only single modules are imported: the packages want older libraries) and gptqmodel 7.7.0 (with device-smi,
logbar, tokenicer, random_word, threadpoolctl, pypcre and defuser). Each checkpoint gets an expected.json: sha256 of every
quantized weight as its own tool dequantizes it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

SMALL = dict(
    vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=64, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
)
GROUP = 16


def model_of(family: str, dtype: torch.dtype, seed: int, layers: int = 1) -> Any:
    import transformers

    config = getattr(transformers, f"{family}Config")
    extra = dict(num_local_experts=2, num_experts_per_tok=1, sliding_window=None) if family == "Mixtral" else {}
    torch.manual_seed(seed)
    if family == "Llama":
        extra["num_hidden_layers"] = layers
    model = getattr(transformers, f"{family}ForCausalLM")(config(**{**SMALL, **extra})).to(dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(1 + 0.2 * torch.randn_like(weight))
            elif weight.dim() > 1:
                weight.copy_(torch.randn_like(weight.float()) * 1.5 / weight.shape[-1] ** 0.5)
                # Outlying inputs, and values that lie to one side, so that orders and zero points matter.
                weight.mul_(1 + 3 * torch.rand(weight.shape[-1]).pow(6)).add_(0.1 * torch.rand(weight.shape[-1]))
        # Inputs whose weights are all positive, which have no zero point but 0.
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight[:5, :GROUP].abs_()
    return model


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def finish(directory: Path, expected: dict[str, torch.Tensor]) -> None:
    for file in directory.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    digests = {name: digest(weight) for name, weight in sorted(expected.items())}
    (directory / "expected.json").write_text(json.dumps(digests, indent=1) + "\n")


# With transformers 5 llm-compressor names the parts of Mixtral's experts otherwise than the hub does.
HUB_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def hub_name(name: str) -> str:
    before, dot, after = name.partition(".experts.")
    for tool, hub in HUB_NAMES.items():
        after = after.replace(tool, hub)
    return before + dot + after


def compressed(
    out: Path,
    name: str,
    family: str,
    weights: dict | None,
    preset: str | None,
    ignore: list[str],
    hub_names: bool = False,
) -> None:
    """llm-compressor, and compressed-tensors' own decompression; with `hub_names` the tensors are renamed."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = out / f"{name}-16bit"
    model_of(family, torch.bfloat16, seed=len(name), layers=2 if ignore[1:] else 1).save_pretrained(str(plain))
    model = AutoModelForCausalLM.from_pretrained(str(plain), dtype=torch.bfloat16)
    if weights:
        scheme: dict[str, Any] = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    else:
        scheme = {"targets": ["Linear"], "scheme": preset}
    tokens = torch.randint(32, (8, 24), generator=torch.Generator().manual_seed(3)).tolist()
    data = Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * 24] * 8})
    needs_data = {}
    if preset == "FP8":
        # Any tokenizer will do: the data are tokens.
        tokenizer = AutoTokenizer.from_pretrained(str(Path(__file__).parent.parent / "tiny-qwen2"))
        needs_data = {"dataset": data, "num_calibration_samples": 8, "max_seq_length": 24, "processor": tokenizer}
    oneshot(model=model, recipe=[QuantizationModifier(ignore=ignore, **scheme)], **needs_data)
    directory = out / name
    model.save_pretrained(str(directory), save_compressed=True)
    originals = load_file(plain / "model.safetensors")
    shutil.rmtree(plain)
    config = json.loads((directory / "config.json").read_text())
    quantization = QuantizationConfig.model_validate(config["quantization_config"])
    (args,) = quantization.config_groups.values()
    tensors = load_file(directory / "model.safetensors")
    if hub_names:
        tensors = {hub_name(key): tensor for key, tensor in tensors.items()}
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    modules = [key.removesuffix("_scale") for key in sorted(tensors) if key.endswith("weight_scale")]
    compressor = BaseCompressor.get_value_from_registry(quantization.format)
    expected = {}
    for weight in modules:
        prefix = weight.removesuffix("weight")
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        expected[weight] = compressor.decompress(own, args)["weight"].to(torch.bfloat16)
        # The names mean what they seem to: transformers' own file has the same matrix, unquantized.
        exact = originals[hub_name(weight)].float()
        assert (expected[weight].float() - exact).norm() < 0.2 * exact.norm(), weight
    finish(directory, expected)


def bare_package(name: str, root: Path) -> None:
    """A package without its __init__, so that single modules of it can be imported."""
    package = types.ModuleType(name)
    package.__path__ = [str(root / name.replace(".", "/"))]
    sys.modules[name] = package


def plain_checkpoint(out: Path, name: str, family: str, quantization: dict[str, Any]) -> tuple[Path, dict]:
    model = model_of(family, torch.float16, seed=len(name))
    directory = out / name
    model.save_pretrained(str(directory))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}, indent=1))
    return directory, load_file(directory / "model.safetensors")


def linears(tensors: dict[str, torch.Tensor]) -> list[str]:
    skipped = ("embed_tokens", "lm_head", "norm", "block_sparse_moe.gate.")
    return [key for key in tensors if tensors[key].dim() == 2 and not any(part in key for part in skipped)]


def autoawq(out: Path, root: Path) -> None:
    """Zero points as in awq/quantize/quantizer.py; packing and dequantization are AutoAWQ's."""
    for package in ("awq", "awq.utils", "awq.modules", "awq.modules.linear"):
        bare_package(package, root)
    gemm = importlib.import_module("awq.modules.linear.gemm")
    packing = importlib.import_module("awq.utils.packing_utils")
    options = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm",
               "modules_to_not_convert": ["gate"]}
    directory, tensors = plain_checkpoint(out, "awq-mixtral", "Mixtral", options)
    expected = {}
    for name in linears(tensors):
        weight = tensors.pop(name)
        groups = weight.float().unflatten(1, (-1, GROUP))
        high, low = groups.amax(-1), groups.amin(-1)
        scales = ((high - low).clamp(min=1e-5) / 15).half()
        zeros = (-(low / scales.float()).round()).clamp(0, 15)
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False).half()
        linear.weight.data = weight
        packed = gemm.WQLinear_GEMM.from_linear(linear, 4, GROUP, scales=scales.t().contiguous(), zeros=zeros.t())
        stem = name.removesuffix("weight")
        for role in ("qweight", "qzeros", "scales"):
            tensors[stem + role] = getattr(packed, role).contiguous()
        found = packing.dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, GROUP)
        expected[name] = found.t().contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    finish(directory, expected)


def autogptq(out: Path, root: Path, name: str, bits: int, group: int, sym: bool, actorder: bool) -> None:
    """AutoGPTQ's own GPTQ, on random activations with outliers; what its layer computes of the identity is expected."""
    for package in ("auto_gptq", "auto_gptq.nn_modules", "auto_gptq.nn_modules.qlinear", "auto_gptq.quantization"):
        bare_package(package, root)
    layers = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda")
    gptq = importlib.import_module("auto_gptq.quantization.gptq")
    torch.cuda.synchronize = lambda *_: None
    options = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, "desc_act": actorder,
               "damp_percent": 0.01, "true_sequential": True, "checkpoint_format": "gptq"}
    directory, tensors = plain_checkpoint(out, name, "Llama", options)
    expected, inputs = {}, {}
    for weight_name in linears(tensors):
        weight = tensors.pop(weight_name)
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight.float()
        # q, k and v have one input, gate and up another.
        key = (weight_name.split(".")[2], weight_name.split(".")[3], weight.shape[1])
        if key not in inputs:
            generator = torch.Generator().manual_seed(len(inputs))
            spread = 1 + 4 * torch.rand(weight.shape[1], generator=generator).pow(4)
            inputs[key] = torch.randn(1, 256, weight.shape[1], generator=generator) * spread
        solver = gptq.GPTQ(linear)
        solver.quantizer.configure(bits, perchannel=True, sym=sym, mse=False)
        solver.add_batch(inputs[key], linear(inputs[key]))
        scale, zero, g_idx = solver.fasterquant(group_size=group, actorder=actorder)
        packed = layers.QuantLinear(bits, group, weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = linear.weight.data.half()
        packed.pack(linear, scale.half(), zero, g_idx)
        stem = weight_name.removesuffix("weight")
        for role in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[stem + role] = getattr(packed, role).contiguous()
        # As old versions of the tool do for every layer.
        tensors[stem + "bias"] = torch.zeros(weight.shape[0], dtype=torch.float16)
        expected[weight_name] = packed(torch.eye(weight.shape[1], dtype=torch.float16)).t().contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    finish(directory, expected)


def gptqmodel(out: Path, name: str, version: str) -> None:
    """Rounded to nearest with zero points; packing, conversion to the first format and dequantization are GPTQModel's."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    options = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False, "lm_head": False,
               "checkpoint_format": version, "pack_dtype": "int32", "meta": {"quantizer": ["gptqmodel:7.7.0"]}}
    directory, tensors = plain_checkpoint(out, name, "Llama", options)
    expected = {}
    for weight_name in linears(tensors):
        weight = tensors.pop(weight_name)
        groups = weight.float().unflatten(1, (-1, GROUP))
        high, low = groups.amax(-1).clamp(min=0), groups.amin(-1).clamp(max=0)
        scales = ((high - low) / 15).half()
        zeros = (-(low / scales.float()).round()).clamp(0, 15)
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight.float()
        packed = TorchLinear(4, GROUP, False, False, weight.shape[1], weight.shape[0])
        packed.pack_original(linear, scales, zeros, torch.arange(weight.shape[1], dtype=torch.int32) // GROUP)
        packed.post_init()
        expected[weight_name] = packed.dequantize_weight().half().t().contiguous()
        if version == "gptq":
            convert_gptq_v2_to_v1_format_module(packed, types.SimpleNamespace(bits=4, pack_dtype=torch.int32))
        for role in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[weight_name.removesuffix("weight") + role] = getattr(packed, role).contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    finish(directory, expected)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--autoawq", type=Path, required=True)
    parser.add_argument("--autogptq", type=Path, required=True)
    given = parser.parse_args()
    out = given.out
    int4 = dict(num_bits=4, type="int", strategy="group", group_size=GROUP, symmetric=True)
    compressed(out, "w4a16-llama", "Llama", int4, None, ["lm_head", "re:.*layers.1.mlp.*"])
    compressed(out, "w4a16-asym-qwen2", "Qwen2", int4 | {"symmetric": False}, None, ["lm_head"])
    compressed(out, "w8a16-llama", "Llama", dict(num_bits=8, type="int", strategy="channel"), None, ["lm_head"])
    compressed(out, "fp8-mixtral", "Mixtral", None, "FP8", ["lm_head", "re:.*gate$"], hub_names=True)
    compressed(out, "w4a16-mixtral", "Mixtral", int4, None, ["lm_head", "re:.*gate$"])
    compressed(out, "fp8-dynamic-llama", "Llama", None, "FP8_DYNAMIC", ["lm_head"])
    autoawq(out, given.autoawq)
    autogptq(out, given.autogptq, "gptq-actorder-llama", 4, GROUP, sym=True, actorder=True)
    autogptq(out, given.autogptq, "gptq-8bit-llama", 8, -1, sym=True, actorder=False)
    gptqmodel(out, "gptqmodel-v1-llama", "gptq")
    gptqmodel(out, "gptqmodel-v2-llama", "gptq_v2")


if __name__ == "__main__":
    main()
