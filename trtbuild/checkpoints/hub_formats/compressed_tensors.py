"""`quant_method` compressed-tensors: groups of modules, each with its scheme; pack-quantized and float-quantized."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trtbuild.checkpoints.hub_formats.options import (
    Options,
    group_problems,
    list_problems,
    unknown_options,
)
from trtbuild.checkpoints.hub_formats.scheme import HubQuantization, Scheme

_KNOWN = {
    "quant_method", "config_groups", "format", "ignore", "kv_cache_scheme", "quantization_status", "version",
    "global_compression_ratio", "sparsity_config", "transform_config",
}  # fmt: skip
_GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
# Observers say how the tool found its scales.
_ARGUMENTS = {
    "num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder", "observer",
    "observer_kwargs", "scale_dtype", "zp_dtype",
}  # fmt: skip
_INT_FORMATS, _FLOAT_FORMATS = ("pack-quantized",), ("float-quantized", "naive-quantized")


def compressed_problems(options: Options) -> Iterator[str]:
    """Everything about such a config that we cannot read or represent."""
    status = options.get("quantization_status", "compressed")
    # Tools before 2025 say "frozen" of packed weights too; the format tells those that are not.
    if status not in ("compressed", "frozen"):
        yield f"quantization_status is {status!r}: the weights are not packed; save the model compressed"
    if options.get("kv_cache_scheme"):
        yield "kv_cache_scheme: scales for a quantized KV cache are not read"
    sparsity = options.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        yield f"sparsity_config {sparsity!r}: sparse weights are not read"
    if options.get("transform_config"):
        yield "transform_config: rotated weights, whose activations have to be rotated too, are not read"
    yield from list_problems(options, "ignore")
    yield from unknown_options(options, _KNOWN)
    groups = options.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        yield f"config_groups is {groups!r}, but must name at least one group of modules"
        return
    for name, group in groups.items():
        if not isinstance(group, dict):
            yield f"{name} is {group!r}, but must be an object"
            continue
        yield from (f"{name}: {problem}" for problem in _group_problems(group, options.get("format")))


def _group_problems(group: Options, shared_format: Any) -> Iterator[str]:
    yield from list_problems(group, "targets")
    yield from unknown_options(group, _GROUP_KEYS)
    if group.get("output_activations"):
        yield "output_activations: quantized outputs are not read"
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, dict) or not isinstance(inputs, dict | None):
        yield f"weights is {weights!r} and input_activations {inputs!r}, but must be objects"
        return
    for found in (weights, inputs or {}):
        yield from unknown_options(found, _ARGUMENTS)
    kind, bits, layout = weights.get("type", "int"), weights.get("num_bits", 8), group.get("format") or shared_format
    if kind == "int" and bits in (4, 8) and isinstance(bits, int):
        yield from _integer_problems(weights, inputs, layout)
    elif kind == "float" and bits == 8:
        yield from _float_problems(weights, inputs, layout)
    else:
        yield f"weights of {bits} bits ({kind}); int 4, int 8 and float 8 are read"


def _integer_problems(weights: Options, inputs: Options | None, layout: Any) -> Iterator[str]:
    bits, strategy = weights.get("num_bits", 8), _strategy(weights)
    if inputs:
        yield f"activations of {inputs.get('num_bits')!r} bits with integer weights cannot be represented"
        return
    if layout not in _INT_FORMATS:
        yield f"format {layout!r}; integer weights are read in {', '.join(_INT_FORMATS)}"
    if strategy not in ("group", "channel"):
        yield f"strategy {strategy!r}; group and channel are read"
    elif bits == 8 and (strategy != "channel" or weights.get("symmetric") is False):
        yield (
            f"8 bits with strategy {strategy!r}, symmetric {weights.get('symmetric', True)!r}; 8 bits are read with "
            "strategy 'channel' and symmetric"
        )
    elif strategy == "group":
        yield from group_problems(weights.get("group_size"))


def _float_problems(weights: Options, inputs: Options | None, layout: Any) -> Iterator[str]:
    if layout not in _FLOAT_FORMATS:
        yield f"format {layout!r}; fp8 weights are read in {', '.join(_FLOAT_FORMATS)}"
    if _strategy(weights) not in ("tensor", "channel") or weights.get("symmetric") is False:
        yield (
            f"fp8 weights with strategy {_strategy(weights)!r}, symmetric {weights.get('symmetric', True)!r}; tensor "
            "and channel are read, symmetric"
        )
    if not inputs:
        yield "fp8 weights with 16-bit activations cannot be represented"
        return
    found = (inputs.get("type"), inputs.get("num_bits"), _strategy(inputs), inputs.get("dynamic", False))
    if found not in (("float", 8, "tensor", False), ("float", 8, "tensor", True), ("float", 8, "token", True)):
        yield (
            f"input_activations {found[0]!r} of {found[1]!r} bits, strategy {found[2]!r}, dynamic {found[3]!r}; float "
            "8 is read, static with strategy 'tensor', dynamic with 'token' or 'tensor'"
        )


def _strategy(arguments: Options) -> Any:
    """compressed-tensors leaves it out where the group size says it."""
    given, group = arguments.get("strategy"), arguments.get("group_size")
    return given or ("tensor" if group is None else "channel" if group == -1 else "group")


def read_compressed(options: Options) -> HubQuantization:
    """Of a config in which `compressed_problems` finds nothing."""
    schemes, notes = [], []
    for group in options["config_groups"].values():
        weights, inputs = group["weights"], group.get("input_activations") or {}
        layout = group.get("format") or options.get("format")
        rows = _strategy(weights) == "channel"
        if weights.get("type", "int") == "float":
            is_dynamic = bool(inputs.get("dynamic"))
            if is_dynamic and _strategy(inputs) == "tensor":
                notes.append("activations are scaled for each token, where the checkpoint asks for whole tensors")
            activations = "dynamic" if is_dynamic else "static"
            scheme = Scheme("fp8", f"compressed-tensors {layout}", 8, rows=rows, activations=activations)
        else:
            scheme = Scheme(
                "packed",
                f"compressed-tensors {layout}",
                bits=weights.get("num_bits", 8),
                group_size=None if rows else weights["group_size"],
                symmetric=weights.get("symmetric") is not False,
                act_order=weights.get("actorder") in ("group", "dynamic", True),
            )
        schemes.append((tuple(group.get("targets") or ("Linear",)), scheme))
    # Names before patterns, and those before classes, as compressed-tensors looks them up.
    schemes.sort(key=lambda entry: ("Linear" in entry[0], any(target.startswith("re:") for target in entry[0])))
    return HubQuantization(tuple(schemes), tuple(options.get("ignore") or ()), notes=tuple(notes))
