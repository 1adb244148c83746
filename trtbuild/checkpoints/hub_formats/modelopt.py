"""`quant_method` modelopt (NVIDIA ModelOpt's export for the hub): what is read of it."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from typing import Any

from trtbuild.checkpoints.hub_formats.options import (
    Options,
    flag_problems,
    group_problems,
    list_problems,
    unknown_options,
)
from trtbuild.checkpoints.hub_formats.scheme import HubQuantization, Scheme

# `config_groups` repeats what `quant_algo` says.
_KNOWN = {
    "quant_method", "quant_algo", "kv_cache_scheme", "kv_cache_quant_algo", "group_size", "ignore", "producer",
    "config_groups", "has_zero_point", "pre_quant_scale",
}  # fmt: skip
_READ = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "W4A16_AWQ", "W8A16")


def modelopt_problems(options: Options) -> Iterator[str]:
    """Everything about such a config that we cannot read or represent."""
    algorithm = options.get("quant_algo")
    if algorithm not in _READ:
        yield f"quant_algo is {algorithm!r}; {', '.join(_READ)} are read"
    if options.get("kv_cache_scheme") or options.get("kv_cache_quant_algo"):
        yield "kv_cache_scheme: scales for a quantized KV cache are not read"
    if algorithm == "W4A16_AWQ":
        yield from group_problems(options.get("group_size", 128))
    if options.get("has_zero_point"):
        yield "has_zero_point is true; symmetric weights are read"
    yield from flag_problems(options, "has_zero_point", "pre_quant_scale")
    yield from list_problems(options, "ignore")
    yield from unknown_options(options, _KNOWN)


def read_modelopt(options: Options) -> HubQuantization:
    """Of a config in which `modelopt_problems` finds nothing."""
    algorithm = options["quant_algo"]
    form: dict[str, Any] = {
        "FP8": {"packing": "fp8", "bits": 8, "activations": "static"},
        "FP8_PER_CHANNEL_PER_TOKEN": {"packing": "fp8", "bits": 8, "rows": True, "activations": "dynamic"},
        "W4A16_AWQ": {"packing": "pairs", "bits": 4, "group_size": options.get("group_size", 128)},
        "W8A16": {"packing": "int8", "bits": 8},
    }[algorithm]
    if form.get("group_size") == -1:
        form["group_size"] = None
    ignored = tuple(_pattern(name) for name in options.get("ignore") or ())
    return HubQuantization(((("Linear",), Scheme(origin=f"ModelOpt {algorithm}", **form)),), ignored)


def _pattern(name: str) -> str:
    """ModelOpt ignores by shell patterns."""
    return "re:" + fnmatch.translate(name) if "*" in name else name
