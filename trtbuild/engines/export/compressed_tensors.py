"""The compressed-tensors form (https://github.com/neuralmagic/compressed-tensors), which vLLM and SGLang read.

    fp8, fp8-dynamic   X.weight F8_E4M3 [out, in]   X.weight_scale F32 [1] or [out, 1]   (X.input_scale F32 [1])
    int4, int8         X.weight_packed I32 [out, in * bits / 32]   X.weight_scale [out, groups]   X.weight_shape I64 [2]
                       (X.weight_zero_point I32 [out / 8, groups])

A packed word holds the lowest column (of zero points the lowest row) in its lowest bits, each code plus half its range.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from trtbuild.checkpoints.precision import FormatName, LinearForm
from trtbuild.checkpoints.rank_tensors import TensorSpec
from trtbuild.engines.export.modules import Module, ModuleList
from trtbuild.engines.export.tensors import TENSORRT_LLM, ExportPlan, ExportTensor, constant
from trtbuild.errors import refuse_all

_FLOAT, _PACKED = "float-quantized", "pack-quantized"
# TensorRT-LLM (its models/quant_config_utils.py) takes of this form only scaled rows with dynamic activations.
_READ_BY_TENSORRT_LLM = "fp8-dynamic"
# Of vLLM's Marlin kernels, which SGLang has too.
_KERNEL_GROUPS = (32, 64, 128)


def lay_out(modules: ModuleList) -> ExportPlan:
    """Raises Refused, naming the layers, for what this form cannot hold."""
    found = list(modules)
    quantized = [module for module in found if isinstance(module, Module)]
    refuse_all("--scheme compressed-tensors", [*modules.fusion_problems(), *_problems(quantized)])
    tensors: list[ExportTensor] = []
    for module in found:
        tensors += [module] if isinstance(module, ExportTensor) else _tensors(modules, module)
    loads_in = _loads_in({module.form.format for module in quantized}, modules.group_size)
    config = _config(quantized, modules.unquantized) if quantized else None
    return ExportPlan(tuple(tensors), config, {}, loads_in, (*modules.notes(), *_notes(quantized)))


def _loads_in(formats: set[FormatName], group_size: int | None) -> tuple[str, ...]:
    found = [TENSORRT_LLM] if formats <= {_READ_BY_TENSORRT_LLM} else []
    if group_size is None or group_size in _KERNEL_GROUPS:
        found += ["vLLM", "SGLang"]
    return (*found, "transformers")


def _problems(quantized: list[Module]) -> Iterator[str]:
    for module in quantized:
        if module.form.order:
            yield (
                f"{module.name} has act-order, kept from a checkpoint that was quantized before; that checkpoint "
                "itself is what other engines load"
            )
            return
    for module in quantized:
        per_word = {"int4": 8, "int8": 4}.get(module.form.format, 1)
        if module.shape[1] % per_word:
            yield f"{module.name}: its {module.shape[1]} inputs do not fill whole words of {per_word} values"


def _notes(quantized: list[Module]) -> Iterator[str]:
    if any(module.form.format == "int8" for module in quantized):
        yield "int8: vLLM and SGLang round the float32 scales of rows to the model's 16-bit type"


def _tensors(modules: ModuleList, module: Module) -> Iterator[ExportTensor]:
    weight, name, (rows, columns) = module.weight, module.name, module.shape
    if module.form.format in ("fp8", "fp8-dynamic"):
        spec = TensorSpec(f"{name}.weight", "F8_E4M3", module.shape)
        yield ExportTensor(spec, modules.rows_of(weight, "weight"))
        yield from _float_scales(modules, module)
        return
    bits = 4 if module.form.format == "int4" else 8
    offset = 0x88 if bits == 4 else 0x80
    spec = TensorSpec(f"{name}.weight_packed", "I32", (rows, columns * bits // 32))
    # Our octets are the words' own, but for the sign.
    packed = modules.rows_of(weight, "weight", lambda part: (part.view(torch.uint8) ^ offset).view(torch.int32))
    yield ExportTensor(spec, packed)
    if bits == 4:
        yield modules.group_scales(module)
        if module.form.zeros:
            yield _zero_points(modules, module)
    else:
        yield _column(modules, module, "per_channel_scale")
    yield constant(f"{name}.weight_shape", "I64", (2,), torch.tensor([rows, columns]))


def _zero_points(modules: ModuleList, module: Module) -> ExportTensor:
    """Eight rows in a word. Ranks hold -zero * scale, rounded by less than the distance of two zero points."""
    rows, spread = module.shape[0], modules.repeats(module)

    def words(start: int, stop: int) -> torch.Tensor:
        part = (module.weight, 8 * start, min(8 * stop, rows))
        shifts, scales = (
            modules.parts.rows(part[0], role, *part[1:]).float() for role in ("zero", "weights_scaling_factor")
        )
        codes = torch.full((8 * (stop - start), shifts.shape[1]), 8, dtype=torch.int32)
        codes[: len(shifts)] -= (shifts / scales).round().to(torch.int32)
        places = torch.arange(0, 32, 4, dtype=torch.int32).view(1, 8, 1)
        # Nibbles share no bit: their sum is the word.
        packed = (codes.unflatten(0, (-1, 8)) << places).sum(1, dtype=torch.int32)
        return packed.repeat_interleave(spread, 1)

    shape = (-(-rows // 8), module.shape[1] // (module.group_size or 1))
    return ExportTensor(TensorSpec(f"{module.name}.weight_zero_point", "I32", shape), words)


def _float_scales(modules: ModuleList, module: Module) -> Iterator[ExportTensor]:
    name, weight = module.name, module.weight
    if module.form.format == "fp8-dynamic":
        yield _column(modules, module, "per_channel_scale")
        return
    if module.form.row_scales:
        yield _column(modules, module, "weights_scaling_factor")
    else:
        yield constant(f"{name}.weight_scale", "F32", (1,), modules.parts.scalar(weight, "weights_scaling_factor"))
    yield constant(f"{name}.input_scale", "F32", (1,), modules.parts.scalar(weight, "activation_scaling_factor"))


def _column(modules: ModuleList, module: Module, role: str) -> ExportTensor:
    spec = TensorSpec(f"{module.name}.weight_scale", "F32", (module.shape[0], 1))
    return ExportTensor(spec, modules.rows_of(module.weight, role, lambda rows: rows.unsqueeze(1)))


def _config(quantized: list[Module], ignored: list[str]) -> dict[str, Any]:
    """One group for all linear modules, or, where they are quantized differently, one with names for each form."""
    by_form: dict[tuple[LinearForm, int | None], list[str]] = {}
    for module in quantized:
        form = LinearForm(module.form.format, zeros=module.form.zeros, row_scales=module.form.row_scales)
        by_form.setdefault((form, module.group_size), []).append(module.name)
    groups = {
        f"group_{index}": _group(form, size, ["Linear"] if len(by_form) == 1 else names)
        for index, ((form, size), names) in enumerate(by_form.items())
    }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
    }


def _group(form: LinearForm, group_size: int | None, targets: list[str]) -> dict[str, Any]:
    inputs = None
    if form.format == "fp8":
        weights = _arguments("float", 8, "channel" if form.row_scales else "tensor")
        inputs = _arguments("float", 8, "tensor")
    elif form.format == "fp8-dynamic":
        weights = _arguments("float", 8, "channel")
        inputs = _arguments("float", 8, "token", dynamic=True)
    elif form.format == "int8":
        weights = _arguments("int", 8, "channel")
    else:
        weights = _arguments("int", 4, "group", group_size=group_size, symmetric=not form.zeros)
    return {
        "targets": targets,
        "format": _FLOAT if inputs else _PACKED,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }


def _arguments(
    kind: str, bits: int, strategy: str, *, group_size: int | None = None, symmetric: bool = True, dynamic: bool = False
) -> dict[str, Any]:
    return {
        "type": kind, "num_bits": bits, "strategy": strategy, "group_size": group_size, "symmetric": symmetric,
        "dynamic": dynamic, "actorder": None, "block_structure": None, "observer": None, "observer_kwargs": {},
    }  # fmt: skip
