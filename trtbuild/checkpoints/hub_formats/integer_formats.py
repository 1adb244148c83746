"""`quant_method` awq and gptq: which of their options can be represented, and what they mean."""

from __future__ import annotations

from collections.abc import Iterator

from trtbuild.checkpoints.hub_formats.options import (
    RUN_OPTIONS,
    Options,
    flag_problems,
    group_problems,
    is_pattern,
    list_problems,
    unknown_options,
)
from trtbuild.checkpoints.hub_formats.scheme import HubQuantization, Scheme


def awq_problems(options: Options) -> Iterator[str]:
    layout = options.get("version", options.get("format", "gemm"))
    if not isinstance(layout, str) or layout.lower() != "gemm":
        yield f"version {layout!r} packs the weights otherwise; gemm is read"
    if options.get("bits", 4) != 4:
        yield f"bits is {options['bits']!r}; 4 is read"
    if options.get("desc_act"):
        yield "desc_act is true, which AWQ does not have"
    yield from group_problems(options.get("group_size", 128))
    yield from flag_problems(options, "zero_point", "sym")
    yield from list_problems(options, "modules_to_not_convert")
    known = {"bits", "group_size", "zero_point", "sym", "desc_act", "format", "modules_to_not_convert", "pack_dtype"}
    yield from unknown_options(options, RUN_OPTIONS | known)


def read_awq(options: Options) -> HubQuantization:
    group = options.get("group_size", 128)
    scheme = Scheme(
        "awq",
        "AutoAWQ (gemm)",
        bits=4,
        group_size=None if group == -1 else group,
        symmetric=options.get("zero_point") is False,
    )
    return HubQuantization(((("Linear",), scheme),), tuple(options.get("modules_to_not_convert") or ()))


def gptq_problems(options: Options) -> Iterator[str]:
    layout = options.get("checkpoint_format") or options.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2") or options.get("is_marlin_format"):
        yield f"checkpoint_format {layout!r} packs the weights otherwise; gptq and gptq_v2 are read"
    if options.get("pack_dtype", "int32") not in (None, "int32", "torch.int32"):
        yield f"pack_dtype is {options['pack_dtype']!r}; int32 is read"
    overrides = options.get("dynamic") or {}
    if not isinstance(overrides, dict) or not all(isinstance(found, dict) for found in overrides.values()):
        yield f"dynamic is {overrides!r}, but must map patterns to options"
        overrides = {}
    yield from _gptq_width_problems(options)
    for pattern, changes in overrides.items():
        if not is_pattern("re:" + pattern.removeprefix("+:").removeprefix("-:")):
            yield f"dynamic: {pattern!r} is not a pattern"
        if not pattern.startswith("-:"):
            yield from (f"dynamic {pattern!r}: {p}" for p in _gptq_width_problems({**options, **changes}))
            yield from (f"dynamic {pattern!r}: {p}" for p in unknown_options(changes, RUN_OPTIONS | _GPTQ_WIDTH))
    known = {"checkpoint_format", "format", "pack_dtype", "dynamic", "modules_to_not_convert"} | _GPTQ_WIDTH
    yield from list_problems(options, "modules_to_not_convert")
    yield from unknown_options(options, RUN_OPTIONS | known)


_GPTQ_WIDTH = {"bits", "group_size", "sym", "desc_act"}


def _gptq_width_problems(options: Options) -> Iterator[str]:
    bits, group = options.get("bits"), options.get("group_size", 128)
    if bits not in (4, 8) or not isinstance(bits, int):
        yield f"bits is {bits!r}; 4 is read, and 8 in whole rows"
    if bits == 8 and group != -1:
        yield f"8 bits in groups of {group!r} cannot be represented; with group_size -1 (whole rows) they can"
    else:
        yield from group_problems(group)
    yield from flag_problems(options, "sym", "desc_act")
    if bits == 8 and options.get("sym") is False:
        yield "8 bits with zero points (sym false) cannot be represented"


def read_gptq(options: Options) -> HubQuantization:
    meta = options.get("meta")
    tools = (meta.get("quantizer") if isinstance(meta, dict) else None) or ""
    made_by = ", ".join(map(str, tools)) if isinstance(tools, list) else str(tools)
    group = options.get("group_size", 128)
    version = options.get("checkpoint_format") or options.get("format") or "gptq"
    scheme = Scheme(
        "gptq",
        f"GPTQ ({made_by})" if made_by else "GPTQ",
        bits=options["bits"],
        group_size=None if group == -1 else group,
        symmetric=options.get("sym") is not False,
        # With static groups the columns were quantized in another order, and stored in their own.
        act_order=bool(options.get("desc_act")) and not options.get("static_groups") and group != -1,
        zero_offset=1 if version == "gptq" else 0,
        wraps="gptqmodel" in made_by,
    )
    ignored = tuple(options.get("modules_to_not_convert") or ())
    return HubQuantization(((("Linear",), scheme),), ignored, options.get("dynamic") or {})
