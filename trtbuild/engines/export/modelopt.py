"""ModelOpt's hub form, which TensorRT-LLM >= 1.3 reads: hf_quant_config.json, and the same inside config.json.

    FP8                         X.weight F8_E4M3 [out, in]   X.weight_scale F32 []   X.input_scale F32 []
    FP8_PER_CHANNEL_PER_TOKEN   X.weight F8_E4M3 [out, in]   X.weight_scale F32 [out]
    W4A16_AWQ                   X.weight U8 [out/2, in]   X.weight_scale [out, in/group]   (X.pre_quant_scale [in])
    W8A16                       X.weight I8 [out, in]   X.weight_scale F32 [out]

An octet of W4A16_AWQ holds two rows of one column, the even row in its low nibble.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from trtbuild import __version__
from trtbuild.checkpoints.precision import FormatName, LinearForm
from trtbuild.checkpoints.rank_tensors import TensorSpec
from trtbuild.checkpoints.safetensors_file import torch_dtype
from trtbuild.engines.export.modules import Module, ModuleList
from trtbuild.engines.export.tensors import TENSORRT_LLM, ExportPlan, ExportTensor, constant
from trtbuild.errors import refuse_all

QUANT_CONFIG = "hf_quant_config.json"
_ALGORITHMS: dict[FormatName, str] = {
    "fp8": "FP8", "fp8-dynamic": "FP8_PER_CHANNEL_PER_TOKEN", "int4": "W4A16_AWQ", "int8": "W8A16",
}  # fmt: skip
_LOADS_IN: dict[FormatName | None, tuple[str, ...]] = {
    None: (TENSORRT_LLM, "vLLM", "SGLang", "transformers"),
    "fp8": (TENSORRT_LLM, "vLLM", "SGLang"),
    "fp8-dynamic": (TENSORRT_LLM, "vLLM"),
    "int4": (TENSORRT_LLM,),
    "int8": (TENSORRT_LLM,),
}
# Of TensorRT-LLM's kernels for int4 weights.
_KERNEL_GROUPS = (64, 128)
# Modules that TensorRT-LLM joins into one; of the others its W4A16_AWQ reader demands a factor for the input.
_FUSED = ("q", "k", "v", "gate", "up")


def lay_out(modules: ModuleList) -> ExportPlan:
    """Raises Refused, naming the layers, for what this form cannot hold, or its readers do not compute."""
    found = list(modules)
    quantized = [module for module in found if isinstance(module, Module)]
    refuse_all("--scheme modelopt", [*modules.fusion_problems(), *_problems(quantized)])
    tensors: list[ExportTensor] = []
    for module in found:
        tensors += [module] if isinstance(module, ExportTensor) else _tensors(modules, module)
    if not quantized:
        return ExportPlan(tuple(tensors), None, {}, _LOADS_IN[None], tuple(modules.notes()))
    options = _options(quantized[0], modules.unquantized)
    # The file's nested form is what every version reads; config.json has the flat one.
    nested = {
        "producer": {"name": "trtbuild", "version": __version__},
        "quantization": {"kv_cache_quant_algo": None, **options},
    }
    flat = {"quant_method": "modelopt", "producer": nested["producer"]}
    flat |= {{"exclude_modules": "ignore"}.get(key, key): value for key, value in options.items()}
    notes = ["TensorRT-LLM rounds int8's float32 scales to the model's 16-bit type"] * (
        options["quant_algo"] == "W8A16"
    )
    loads_in = _LOADS_IN[quantized[0].form.format]
    return ExportPlan(tuple(tensors), flat, {QUANT_CONFIG: nested}, loads_in, (*modules.notes(), *notes))


def _options(first: Module, unquantized: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {"quant_algo": _ALGORITHMS[first.form.format], "exclude_modules": unquantized}
    if first.form.format == "int4":
        options |= {"group_size": first.group_size, "has_zero_point": False, "pre_quant_scale": True}
    return options


def _problems(quantized: list[Module]) -> Iterator[str]:
    other = "use --scheme compressed-tensors"
    formats = {module.form.format: module.name for module in quantized}
    if len(formats) > 1:
        listed = ", ".join(f"{form} ({name})" for form, name in formats.items())
        yield f"the layers have different precisions, {listed}; {other}"
    size = quantized[0].group_size if quantized else None
    if size is not None and size not in _KERNEL_GROUPS:
        yield f"int4 in groups of {size}; TensorRT-LLM computes {_KERNEL_GROUPS}: convert with --tp 1, or {other}"
    for module in quantized:
        if module.form.zeros or module.form.order or module.form.row_scales:
            yield f"{module.name} has {_foreign(module.form)}, which this form has not; {other}"
            return
        if module.form.format == "int4" and module.shape[0] % 2:
            yield f"{module.name} has {module.shape[0]} outputs; int4 packs pairs of them; {other}"
        if module.form.format == "int4" and module.expert:
            yield (
                f"{module.name}: TensorRT-LLM computes no experts with int4 weights and 16-bit activations "
                f"(W4A16_AWQ); --precision fp8, or {other}, for vLLM and SGLang"
            )
            return


def _foreign(form: LinearForm) -> str:
    return "zero points" if form.zeros else "act-order" if form.order else "static fp8 scales for each row"


def _tensors(modules: ModuleList, module: Module) -> Iterator[ExportTensor]:
    weight, name, (rows, columns) = module.weight, module.name, module.shape
    if module.form.format == "int4":
        spec = TensorSpec(f"{name}.weight", "U8", (rows // 2, columns))
        yield ExportTensor(
            spec, lambda start, stop: _pack_pairs(modules.parts.rows(weight, "weight", 2 * start, 2 * stop))
        )
        yield modules.group_scales(module)
        if weight.canonical.rpartition(".")[2] not in _FUSED:
            # Ours are folded into what comes before.
            ones = torch.ones(columns, dtype=torch_dtype(modules.dtype))
            yield constant(f"{name}.pre_quant_scale", modules.dtype, (columns,), ones)
        return
    dtype = "I8" if module.form.format == "int8" else "F8_E4M3"
    yield ExportTensor(TensorSpec(f"{name}.weight", dtype, module.shape), modules.rows_of(weight, "weight"))
    if module.form.format == "fp8":
        for role, ours in (("weight_scale", "weights_scaling_factor"), ("input_scale", "activation_scaling_factor")):
            yield constant(f"{name}.{role}", "F32", (), modules.parts.scalar(weight, ours))
    else:
        spec = TensorSpec(f"{name}.weight_scale", "F32", (rows,))
        yield ExportTensor(spec, modules.rows_of(weight, "per_channel_scale"))


def _pack_pairs(packed: torch.Tensor) -> torch.Tensor:
    """Ours [rows, in / 2], pairs along `in` -> [rows / 2, in], pairs along the rows."""
    even, odd = packed[0::2], packed[1::2]
    result = packed.new_empty((even.shape[0], 2 * even.shape[1]))
    result[:, 0::2] = (even & 0xF) | (odd << 4)
    result[:, 1::2] = (even >> 4) | (odd & 0xF0)
    return result
