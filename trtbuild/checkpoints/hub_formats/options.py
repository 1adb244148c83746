"""What all readers of a `quantization_config` check alike."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from trtbuild.checkpoints.precision import INT4_GROUPS

Options = Mapping[str, Any]
# What names the tool and its run, or chooses between kernels that compute the same.
RUN_OPTIONS = {
    "quant_method", "method", "meta", "backend", "model_name_or_path", "model_file_base_name", "dataset", "tokenizer",
    "batch_size", "damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "use_cuda_fp16",
    "model_seqlen", "block_name_to_quantize", "module_name_preceding_first_block", "pad_token_id", "use_exllama",
    "disable_exllama", "max_input_length", "exllama_config", "cache_block_outputs", "modules_in_block_to_quantize",
    "quantizer", "act_group_aware", "mse", "do_fuse", "modules_to_fuse", "fuse_max_seq_len", "version",
    "offload_to_disk", "hessian", "failsafe", "lm_head", "is_marlin_format", "pack_impl",
}  # fmt: skip


def group_problems(group: Any, name: str = "group_size") -> Iterator[str]:
    """An int4 group is a whole row (-1), or a multiple of the smallest that the builder has."""
    if not isinstance(group, int) or isinstance(group, bool) or (group != -1 and group < 1):
        yield f"{name} is {group!r}, but must be a positive whole number, or -1 for whole rows"
    elif group != -1 and group % INT4_GROUPS[-1]:
        yield f"{name} {group} is not a multiple of {INT4_GROUPS[-1]}, the smallest group that can be computed"


def unknown_options(options: Options, known: set[str]) -> Iterator[str]:
    for key in sorted(set(options) - known):
        if options[key] not in (None, False, [], {}):
            yield (
                f"{key} = {options[key]!r} is not known and might change the result; if it does not, remove it from "
                "config.json"
            )


def flag_problems(options: Options, *names: str) -> Iterator[str]:
    for name in names:
        if not isinstance(options.get(name), bool | None):
            yield f"{name} is {options[name]!r}, but must be true or false"


def list_problems(options: Options, *names: str) -> Iterator[str]:
    for name in names:
        given = options.get(name) or []
        if not isinstance(given, list) or not all(isinstance(entry, str) for entry in given):
            yield f"{name} is {given!r}, but must be a list of module names"
            continue
        yield from (f"{name}: {entry!r} is not a pattern" for entry in given if not is_pattern(entry))


def is_pattern(name: str) -> bool:
    try:
        re.compile(name[3:] if name.startswith("re:") else "")
    except re.error:
        return False
    return True
