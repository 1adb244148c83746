"""`quant_method` fp8 (AutoFP8, one scale a tensor) and fbgemm_fp8 (one a row): what is read of them."""

from __future__ import annotations

from collections.abc import Iterator

from trtbuild.checkpoints.hub_formats.options import RUN_OPTIONS, Options, list_problems, unknown_options
from trtbuild.checkpoints.hub_formats.scheme import HubQuantization, Scheme


def fp8_problems(options: Options) -> Iterator[str]:
    if options.get("activation_scheme") not in ("static", "dynamic"):
        yield f"activation_scheme is {options.get('activation_scheme')!r}; static and dynamic are read"
    if options.get("weight_block_size"):
        yield f"weight_block_size {options['weight_block_size']!r}: blocks of scales cannot be represented"
    if options.get("fmt", "e4m3") not in (None, "e4m3", "float8_e4m3fn"):
        yield f"fmt is {options['fmt']!r}; e4m3 is read"
    yield from list_problems(options, "ignored_layers", "modules_to_not_convert")
    known = {"activation_scheme", "weight_block_size", "fmt", "ignored_layers", "modules_to_not_convert"}
    yield from unknown_options(options, RUN_OPTIONS | known)


def read_fp8(options: Options) -> HubQuantization:
    is_static = options["activation_scheme"] == "static"
    note = "activations are scaled for each token, where the checkpoint's tools may scale whole tensors"
    scheme = Scheme("fp8", "AutoFP8", bits=8, activations="static" if is_static else "dynamic")
    ignored = [*(options.get("ignored_layers") or ()), *(options.get("modules_to_not_convert") or ())]
    return HubQuantization(((("Linear",), scheme),), tuple(ignored), notes=() if is_static else (note,))


def fbgemm_problems(options: Options) -> Iterator[str]:
    bound = options.get("activation_scale_ub", 1200.0)
    if not isinstance(bound, int | float) or isinstance(bound, bool) or not 0 < bound < float("inf"):
        yield f"activation_scale_ub is {bound!r}, but must be a positive number"
    yield from list_problems(options, "modules_to_not_convert")
    yield from unknown_options(options, RUN_OPTIONS | {"activation_scale_ub", "modules_to_not_convert"})


def read_fbgemm(options: Options) -> HubQuantization:
    bound = options.get("activation_scale_ub", 1200.0)
    note = (
        f"activation_scale_ub {bound:g} is not applied: a token with a larger activation is scaled to its own maximum, "
        "where fbgemm cuts it off there"
    )
    scheme = Scheme(
        "fp8", f"fbgemm_fp8 (activation_scale_ub {bound:g} not applied)", 8, rows=True, activations="dynamic"
    )
    return HubQuantization(((("Linear",), scheme),), tuple(options.get("modules_to_not_convert") or ()), notes=(note,))
