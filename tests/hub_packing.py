"""Packing and unpacking of hub formats, written once more from their descriptions, one word at a time.

A quantized weight here is unsigned `codes` [out, in], `zeros` [out, groups] (unsigned) and `scales` [out, groups].
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import hf_config, random_weights, save_checkpoint
from safetensors.torch import load_file

TOOL_MADE = Path(__file__).parent / "checkpoints" / "tiny-quantized"
TOOLS = sorted(directory.name for directory in TOOL_MADE.iterdir() if directory.is_dir())
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "sym": False}
AWQ_NIBBLES = [0, 2, 4, 6, 1, 3, 5, 7]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Codes:
    codes: np.ndarray
    zeros: np.ndarray
    scales: torch.Tensor
    groups: np.ndarray

    def dequantized(self) -> torch.Tensor:
        """float32 [out, in] of the 16-bit products."""
        centred = self.codes.astype(np.int32) - self.zeros.astype(np.int32)[:, self.groups]
        return torch.from_numpy(centred).float() * self.scales.float()[:, self.groups]


def random_codes(
    shape: tuple[int, int],
    group: int,
    seed: int,
    *,
    bits: int = 4,
    zeros: bool = True,
    order: bool = False,
    dtype: torch.dtype = torch.float16,
) -> Codes:
    generator = np.random.default_rng(seed)
    out, width = shape
    middle = 1 << (bits - 1)
    number = width // group
    points = generator.integers(1, 2 * middle, (out, number)) if zeros else np.full((out, number), middle)
    groups = np.arange(width) // group
    if order:
        groups = groups[generator.permutation(width)]
    scales = torch.from_numpy(generator.uniform(0.01, 0.03, (out, number))).to(dtype)
    return Codes(generator.integers(0, 2 * middle, shape), points, scales, groups)


def pack_words(values: np.ndarray, bits: int, nibbles: Sequence[int] | None = None) -> torch.Tensor:
    """[rows, n] unsigned -> int32 [rows, n * bits / 32]; nibble i of a word holds column `nibbles[i]` of its part."""
    per_word = 32 // bits
    order = list(nibbles or range(per_word))
    words = np.zeros((values.shape[0], values.shape[1] // per_word), dtype=np.uint32)
    for column in range(words.shape[1]):
        for place in range(per_word):
            part = values[:, column * per_word + order[place]].astype(np.uint32)
            words[:, column] |= part << np.uint32(bits * place)
    return torch.from_numpy(words.view(np.int32))


def unpack_words(words: torch.Tensor, bits: int, nibbles: Sequence[int] | None = None) -> np.ndarray:
    per_word = 32 // bits
    order = list(nibbles or range(per_word))
    raw = words.contiguous().numpy().view(np.uint32)
    values = np.zeros((raw.shape[0], raw.shape[1] * per_word), dtype=np.int32)
    for column in range(raw.shape[1]):
        for place in range(per_word):
            part = raw[:, column] >> np.uint32(bits * place)
            values[:, column * per_word + order[place]] = part & np.uint32((1 << bits) - 1)
    return values


def pack_awq(name: str, weight: Codes, bits: int = 4) -> Tensors:
    assert bits == 4
    return {
        f"{name}.qweight": pack_words(weight.codes.T, 4, AWQ_NIBBLES),
        f"{name}.qzeros": pack_words(weight.zeros.T, 4, AWQ_NIBBLES),
        f"{name}.scales": weight.scales.t().contiguous(),
    }


def pack_gptq(name: str, weight: Codes, bits: int = 4, offset: int = 1) -> Tensors:
    return {
        f"{name}.qweight": pack_words(weight.codes, bits).t().contiguous(),
        f"{name}.qzeros": pack_words(weight.zeros.T - offset, bits),
        f"{name}.scales": weight.scales.t().contiguous(),
        f"{name}.g_idx": torch.from_numpy(weight.groups.astype(np.int32)),
    }


def pack_compressed(name: str, weight: Codes, bits: int = 4) -> Tensors:
    packed = {
        f"{name}.weight_packed": pack_words(weight.codes, bits),
        f"{name}.weight_scale": weight.scales,
        f"{name}.weight_shape": torch.tensor(weight.codes.shape),
    }
    if (weight.groups != np.sort(weight.groups)).any():
        packed[f"{name}.weight_g_idx"] = torch.from_numpy(weight.groups.astype(np.int32))
    if (weight.zeros != 1 << (bits - 1)).any():
        packed[f"{name}.weight_zero_point"] = pack_words(weight.zeros.T, bits).t().contiguous()
    return packed


def read_codes(tensors: Tensors, name: str, options: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Signed codes [out, in] and zero points [out, groups] of a module of a tool-made checkpoint."""
    if f"{name}.weight_packed" in tensors:
        bits = options["config_groups"]["group_0"]["weights"]["num_bits"]
        codes = unpack_words(tensors[f"{name}.weight_packed"], bits)
        points = tensors.get(f"{name}.weight_zero_point")
        zeros = np.full((len(codes), 1), 1 << (bits - 1)) if points is None else unpack_words(points.t(), bits).T
    elif options["quant_method"] == "awq":
        bits = 4
        codes = unpack_words(tensors[f"{name}.qweight"], bits, AWQ_NIBBLES).T
        zeros = unpack_words(tensors[f"{name}.qzeros"], bits, AWQ_NIBBLES).T
    else:
        bits = options["bits"]
        codes = unpack_words(tensors[f"{name}.qweight"].t(), bits).T.T
        # Modulo the type: GPTQModel lets a zero point of 0 borrow.
        words = tensors[f"{name}.qzeros"].long() + (0x11111111 if bits == 4 else 0x01010101)
        if options["checkpoint_format"] == "gptq_v2":
            words = tensors[f"{name}.qzeros"].long()
        zeros = unpack_words(words.to(torch.int32), bits).T
    middle = 1 << (bits - 1)
    return codes - middle, zeros - middle


def tool_made(name: str) -> tuple[Path, dict[str, Any], Tensors, dict[str, str]]:
    """Directory, quantization_config, tensors and expected digests of a checkpoint that a real tool made."""
    directory = TOOL_MADE / name
    config = json.loads((directory / "config.json").read_text())
    expected = json.loads((directory / "expected.json").read_text())
    return directory, config["quantization_config"], load_file(directory / "model.safetensors"), expected


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def quantize_checkpoint(
    directory: Path,
    options: dict[str, Any],
    pack: Callable[[str, Codes], Tensors],
    make: Callable[[tuple[int, int], str], Codes],
    family: str = "llama",
    keep: Callable[[str], bool] = lambda name: False,
    **changes: Any,
) -> dict[str, Codes]:
    """Write a small checkpoint with its linear layers quantized; their codes, by module."""
    config = hf_config(family, torch_dtype="float16", **{"num_hidden_layers": 1, **changes})
    weights = random_weights(config, dtype=torch.float16)
    made: dict[str, Codes] = {}
    for name in list(weights):
        skipped = ("embed_tokens", "lm_head", ".gate.", "shared_expert_gate")
        if weights[name].dim() != 2 or any(part in name for part in skipped) or keep(name):
            continue
        module = name.removesuffix(".weight")
        out, width = weights.pop(name).shape
        made[module] = make((out, width), module)
        weights |= pack(module, made[module])
    save_checkpoint(directory, config | {"quantization_config": options}, weights)
    return made


def gptq_checkpoint(directory: Path, **changes: Any) -> dict[str, Codes]:
    return quantize_checkpoint(directory, {**GPTQ, **changes}, pack_gptq, lambda shape, _: random_codes(shape, 16, 1))
