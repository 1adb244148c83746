"""What the tools make of our exports: writes tool_readings.json beside this file. By hand, in two steps.

    .venv/bin/python record_tools.py make OUT         our exports, in the project's environment
    TOOLS/bin/python record_tools.py read OUT         in one with llmcompressor 0.14, transformers 5, nvidia-modelopt

Of every export: sha256 of the file that was read; of compressed-tensors' ones the matrices as that library unpacks
them, and the logits that transformers' AutoModelForCausalLM computes; of ModelOpt's ones its own packing and config.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
TOKENS = [5, 17, 3, 99, 42, 64, 8, 23, 77, 101]
PACKAGES = ("compressed-tensors", "transformers", "nvidia-modelopt", "torch")


def make(out: Path) -> None:
    sys.path[:0] = [str(HERE.parents[1])]
    from exporting import CASES, exported

    for name, case in CASES.items():
        exported(out / name, case)
        if case.scheme == "modelopt":
            exported(out / f"{name}-twin", case, "compressed-tensors")


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def unpacked(directory: Path) -> dict[str, torch.Tensor]:
    """Module -> matrix, in bfloat16, by compressed-tensors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    quantization = QuantizationConfig.model_validate(
        json.loads((directory / "config.json").read_text())["quantization_config"]
    )
    tensors = load_file(directory / "model.safetensors")
    found = {}
    for key in sorted(name for name in tensors if name.endswith(".weight_scale")):
        module = key.removesuffix(".weight_scale")
        groups = quantization.config_groups.values()
        [group] = [g for g in groups if "Linear" in g.targets or module in g.targets]
        own = {name.removeprefix(module + "."): t for name, t in tensors.items() if name.startswith(module + ".")}
        compressor = BaseCompressor.get_value_from_registry(group.format)
        found[module] = compressor.decompress(own, group)["weight"].to(torch.bfloat16)
    return found


def logits(directory: Path) -> list[float]:
    """The last position's, by transformers with the compressed-tensors package."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(directory), dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        return [round(value, 4) for value in model(torch.tensor([TOKENS])).logits[0, -1].float().tolist()]


def check_modelopt(directory: Path, twin: Path) -> dict[str, Any]:
    """ModelOpt's own encoder makes our bytes out of the values that compressed-tensors reads from the twin."""
    from modelopt.torch.export import quant_utils
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

    nested = json.loads((directory / "hf_quant_config.json").read_text())
    flat = json.loads((directory / "config.json").read_text())["quantization_config"]
    algorithm = flat["quant_algo"]
    kind = {"FP8": "fp8", "FP8_PER_CHANNEL_PER_TOKEN": "fp8_pc_pt", "W4A16_AWQ": "int4_awq", "W8A16": "int8_wo"}[
        algorithm
    ]
    tensors, twins = load_file(directory / "model.safetensors"), load_file(twin / "model.safetensors")
    modules = [key.removesuffix(".weight_scale") for key in sorted(tensors) if key.endswith(".weight_scale")]
    for module in modules:
        scale = tensors[f"{module}.weight_scale"].float()
        own = twins[f"{module}.weight_scale"].float()
        if f"{module}.weight_packed" in twins:
            from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

            bits = 4 if kind == "int4_awq" else 8
            codes = unpack_from_int32(twins[f"{module}.weight_packed"], bits, twins[f"{module}.weight_shape"]).float()
        else:
            codes = twins[f"{module}.weight"].float()
        wide = own.repeat_interleave(codes.shape[1] // own.shape[1], 1) if own.dim() == 2 else own
        encoded = quant_utils.to_quantized_weight(codes * wide, scale, kind, block_size=flat.get("group_size"))
        assert torch.equal(encoded.view(torch.uint8), tensors[f"{module}.weight"].view(torch.uint8)), module
    theirs = convert_hf_quant_config_format(nested)
    assert all(flat[key] == theirs[key] for key in ("quant_algo", "quant_method", "ignore")), theirs
    return {"encoded_alike": len(modules)}


def read(out: Path) -> None:
    readings: dict[str, Any] = {"versions": {name: importlib.metadata.version(name) for name in PACKAGES}}
    for folder in sorted(out.iterdir()):
        directory = folder / "export"
        if folder.name.endswith("-twin"):
            continue
        file = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
        entry: dict[str, Any] = {"file": file}
        readings[folder.name] = entry
        if (directory / "hf_quant_config.json").is_file():
            entry |= check_modelopt(directory, out / f"{folder.name}-twin" / "export")
            continue
        if "quantization_config" in json.loads((directory / "config.json").read_text()):
            entry["unpacked"] = {name: digest(matrix)[:16] for name, matrix in unpacked(directory).items()}
        entry["logits"] = logits(directory)
    (HERE / "tool_readings.json").write_text(json.dumps(readings) + "\n")


if __name__ == "__main__":
    {"make": make, "read": read}[sys.argv[1]](Path(sys.argv[2]))
