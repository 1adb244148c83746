"""Flags of trtllm-build 1.0 to 1.2: which there are, and those that follow from a recipe.

Names, defaults and choices are those of tensorrt_llm/commands/build.py and tensorrt_llm/plugin/plugin.py. Some
combinations trtllm-build overrides with no more than a warning (tensorrt_llm/builder.py, `build`); they are refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

FlagValue = str | int | bool
Kind = Literal["number", "text", "switch", "feature", "plugin"]

_PLUGIN_TYPES = ("auto", "float16", "float32", "bfloat16", "int32", "disable")


@dataclass(frozen=True)
class Flag:
    """`kind`: a switch takes no value, a feature takes enable or disable, a plugin a type or disable."""

    kind: Kind
    default: FlagValue | None = None
    choices: tuple[str, ...] = ()


def _plugins(default: str, *names: str, choices: tuple[str, ...] = _PLUGIN_TYPES) -> dict[str, Flag]:
    return {name: Flag("plugin", default, choices) for name in names}


def _features(default: str, *names: str) -> dict[str, Flag]:
    return {name: Flag("feature", default, ("enable", "disable")) for name in names}


FLAGS: dict[str, Flag] = {
    "checkpoint_dir": Flag("text"), "model_config": Flag("text"), "build_config": Flag("text"),
    "model_cls_file": Flag("text"), "model_cls_name": Flag("text"), "output_dir": Flag("text", "engine_outputs"),
    "max_batch_size": Flag("number", 2048), "max_input_len": Flag("number", 1024), "max_seq_len": Flag("number"),
    "max_beam_width": Flag("number", 1), "max_num_tokens": Flag("number", 8192), "opt_num_tokens": Flag("number"),
    "max_encoder_input_len": Flag("number", 1024), "max_prompt_embedding_table_size": Flag("number", 0),
    "kv_cache_type": Flag("text", "paged", ("continuous", "paged", "disabled")),
    "input_timing_cache": Flag("text"), "output_timing_cache": Flag("text", "model.cache"),
    "profiling_verbosity": Flag("text", "layer_names_only", ("layer_names_only", "detailed", "none")),
    "strip_plan": Flag("switch", False), "weight_sparsity": Flag("switch", False),
    "weight_streaming": Flag("switch", False), "fast_build": Flag("switch", False), "workers": Flag("number", 1),
    "log_level": Flag("text", "info", ("internal_error", "error", "warning", "info", "verbose", "debug", "trace")),
    "enable_debug_output": Flag("switch", False), "visualize_network": Flag("text"), "dry_run": Flag("switch", False),
    "monitor_memory": Flag("switch", False), "logits_dtype": Flag("text", None, ("float16", "float32")),
    "gather_context_logits": Flag("switch", False), "gather_generation_logits": Flag("switch", False),
    "gather_all_token_logits": Flag("switch", False), "lora_dir": Flag("text"),
    "lora_ckpt_source": Flag("text", "hf", ("hf", "nemo")), "lora_target_modules": Flag("text"),
    "max_lora_rank": Flag("number", 64),
    "speculative_decoding_mode": Flag(
        "text", None, ("draft_tokens_external", "lookahead_decoding", "medusa", "explicit_draft_tokens", "eagle")
    ),
    "max_draft_len": Flag("number", 0), "auto_parallel": Flag("number", 1), "gpus_per_node": Flag("number", 8),
    "cluster_key": Flag("text"),
    **_plugins("auto", "bert_attention_plugin", "gpt_attention_plugin", "moe_plugin", "mamba_conv1d_plugin"),
    **_plugins("auto", "nccl_plugin"),
    **_plugins("disable", "lora_plugin", "fp8_rowwise_gemm_plugin"),
    **_plugins("disable", "gemm_plugin", choices=(*_PLUGIN_TYPES, "fp8", "nvfp4")),
    **_plugins("disable", "gemm_swiglu_plugin", "low_latency_gemm_plugin", choices=("fp8", "disable")),
    **_plugins("disable", "low_latency_gemm_swiglu_plugin", choices=("fp8", "disable")),
    **_plugins("disable", "gemm_allreduce_plugin", choices=("float16", "bfloat16", "disable")),
    **_features("enable", "context_fmha", "remove_input_padding", "use_paged_context_fmha", "use_fp8_context_fmha"),
    **_features("enable", "paged_state", "use_fused_mlp"),
    **_features("disable", "bert_context_fmha_fp32_acc", "fuse_fp4_quant", "multiple_profiles", "streamingllm"),
    **_features("disable", "norm_quant_fusion", "reduce_fusion", "user_buffer", "pp_reduce_scatter", "dora_plugin"),
    "tokens_per_block": Flag("number", 32),
}  # fmt: skip

# Of earlier releases, and what came after them.
GONE = {
    "max_output_len": "max_seq_len (prompt and answer together)",
    "paged_kv_cache": "kv_cache_type", "builder_opt": "nothing", "enable_xqa": "nothing: it is always on",
    "use_custom_all_reduce": "nothing: it is chosen at run time",
    "multi_block_mode": "the parameter multi_block_mode of the Triton model",
    "enable_context_fmha_fp32_acc": "the parameter enable_context_fmha_fp32_acc of the Triton model",
    "context_fmha_fp32_acc": "the parameter enable_context_fmha_fp32_acc of the Triton model",
    "max_multimodal_len": "max_prompt_embedding_table_size", "use_weight_only": "--precision int8 or int4",
    "use_refit": "nothing", "tp_size": "--tp", "pp_size": "--pp", "world_size": "--tp and --pp",
}  # fmt: skip
# Those that the recipe's own fields or the build itself say.
OURS = {
    "checkpoint_dir": "it is build/NAME", "output_dir": "it is engines/NAME", "model_config": "it is build/NAME's",
    "build_config": "give its fields as flags", "workers": "each rank has a process; --workers says how many at once",
    "max_batch_size": "--max-batch-size", "max_input_len": "--max-input-len", "max_seq_len": "--max-seq-len",
    "input_timing_cache": "it is kept for each GPU and release", "output_timing_cache": "it is kept for each GPU and "
    "release", "dry_run": "trtbuild compile --dry-run", "log_level": "progress is read from the log at level info",
    "auto_parallel": "--tp and --pp", "cluster_key": "--tp and --pp",
    "model_cls_file": "the architecture is the checkpoint's", "model_cls_name": "the architecture is the checkpoint's",
}  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What decides about flags. `sm` is None where the GPU is not known yet (a dry run)."""

    architecture: str
    dtype: str
    quant_algo: str | None
    kv_cache_quant_algo: str | None
    is_moe: bool
    tp: int
    pp: int
    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    sm: int | None = None

    @property
    def has_fp8_weights(self) -> bool:
        return self.quant_algo == "FP8"


def derive(facts: Facts, given: Mapping[str, FlagValue]) -> dict[str, FlagValue]:
    """Every flag that matters for the engine, said aloud rather than left to a release's default.

    `given` are the recipe's own ([trtllm]), which come last; check them with `problems` first.
    """
    flags: dict[str, FlagValue] = {
        "max_batch_size": facts.max_batch_size,
        "max_input_len": facts.max_input_len,
        "max_seq_len": facts.max_seq_len,
        "max_num_tokens": _num_tokens(facts, given),
        "max_beam_width": 1,
        "kv_cache_type": "paged",
        "tokens_per_block": 32,
        "logits_dtype": "float32",
        "gpt_attention_plugin": "auto",
        # cuBLASLt beats TensorRT's own kernels for 16-bit products, and not for fp8.
        "gemm_plugin": "disable" if facts.has_fp8_weights else "auto",
        "context_fmha": "enable",
        "remove_input_padding": "enable",
        # KV reuse and chunked context need it.
        "use_paged_context_fmha": "enable",
        "use_fp8_context_fmha": "enable" if _fp8_attention(facts) else "disable",
        "use_fused_mlp": "enable" if facts.quant_algo in (None, "FP8") else "disable",
        "reduce_fusion": "enable" if _reduces(facts) else "disable",
        "multiple_profiles": "enable",
    }
    if facts.is_moe:
        flags["moe_plugin"] = "auto"
    if facts.tp * facts.pp > 1:
        flags["nccl_plugin"] = "auto"
    if "opt_num_tokens" in given:
        flags["multiple_profiles"] = "disable"
    return flags | dict(given)


def _num_tokens(facts: Facts, given: Mapping[str, FlagValue]) -> int:
    """trtllm-build cuts what is above max_batch_size x max_seq_len, and lifts what is below a block."""
    return max(min(8192, facts.max_batch_size * facts.max_seq_len), _block(given))


def _block(given: Mapping[str, FlagValue]) -> int:
    block = given.get("tokens_per_block", 32)
    return block if isinstance(block, int) else 32


def _fp8_attention(facts: Facts) -> bool:
    return facts.has_fp8_weights and facts.kv_cache_quant_algo == "FP8" and (facts.sm is None or facts.sm >= 89)


def _reduces(facts: Facts) -> bool:
    return facts.tp > 1 and facts.architecture == "LlamaForCausalLM"


def problems(facts: Facts, given: Mapping[str, FlagValue]) -> Iterator[str]:
    """What is wrong with a recipe's flags: unknown, gone, ours, of a wrong value, or silently changed by the build."""
    for name, value in given.items():
        known = FLAGS.get(name)
        if name in OURS:
            yield f"{name} is not for [trtllm]: {OURS[name]}"
        elif name in GONE:
            yield f"{name} is gone from trtllm-build 1.x; in its place: {GONE[name]}"
        elif known is None:
            near = difflib.get_close_matches(name, FLAGS, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            yield f"trtllm-build 1.0 to 1.2 has no flag {name}{hint}"
        elif (wrong := _wrong_value(known, value)) is not None:
            yield f"{name} = {value!r}: {wrong}"
    yield from _overridden(facts, {name: value for name, value in given.items() if name in FLAGS})


def _wrong_value(flag: Flag, value: FlagValue) -> str | None:
    if flag.kind == "switch":
        return None if isinstance(value, bool) else "it is a switch: true or false"
    if flag.kind == "number":
        return None if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else "must be a number"
    if flag.choices and value not in flag.choices:
        return f"must be {', '.join(flag.choices[:-1])} or {flag.choices[-1]}"
    return None if isinstance(value, str) else "must be text"


def _overridden(facts: Facts, given: Mapping[str, FlagValue]) -> Iterator[str]:
    """Combinations that trtllm-build changes with a warning, or that fail late in it."""
    flags = derive(facts, given)
    on = {name for name, value in flags.items() if value == "enable"}
    yield from _overridden_attention(facts, on)
    tokens, least = flags["max_num_tokens"], _block(given)
    most = max(facts.max_batch_size * facts.max_seq_len, least)
    if isinstance(tokens, int) and tokens > most:
        yield f"max_num_tokens = {tokens}: it is cut to max_batch_size x max_seq_len, {most}"
    if least & (least - 1):
        yield f"tokens_per_block = {least}: blocks of the KV cache are powers of two"
    if isinstance(tokens, int) and tokens < least:
        yield f"max_num_tokens = {tokens}: it is lifted to tokens_per_block, {least}"
    if "reduce_fusion" in on and not _reduces(facts):
        yield "reduce_fusion: 1.x does it for LlamaForCausalLM with --tp above 1 only, and leaves it out otherwise"
    if "user_buffer" in on and "reduce_fusion" not in on:
        yield "user_buffer needs reduce_fusion = enable, and is left out without it"
    if "pp_reduce_scatter" in on and facts.architecture != "MixtralForCausalLM":
        yield f"pp_reduce_scatter is for MixtralForCausalLM, not {facts.architecture}"
    if "norm_quant_fusion" in on:
        yield "norm_quant_fusion is for NVFP4 weights, and left out otherwise"
    if "use_fused_mlp" in on and facts.quant_algo not in (None, "FP8"):
        yield f"use_fused_mlp is for 16-bit and FP8 weights, and left out with {facts.quant_algo}"
    if flags.get("opt_num_tokens") and "multiple_profiles" in on:
        yield "opt_num_tokens cannot be combined with multiple_profiles = enable"
    if flags.get("gather_context_logits") and flags.get("max_draft_len"):
        yield "gather_context_logits cannot be combined with max_draft_len"
    for name in ("gemm_swiglu_plugin", "low_latency_gemm_swiglu_plugin", "low_latency_gemm_plugin"):
        if flags.get(name, "disable") != "disable" and not facts.has_fp8_weights:
            yield f"{name} is for --precision fp8"


def _overridden_attention(facts: Facts, on: set[str]) -> Iterator[str]:
    if "use_fp8_context_fmha" in on and not _fp8_attention(facts):
        yield "use_fp8_context_fmha needs --precision fp8, --kv-cache fp8 and sm89 or later, and is left out otherwise"
    if "context_fmha" not in on and "use_paged_context_fmha" in on:
        yield "context_fmha = disable takes use_paged_context_fmha with it; say use_paged_context_fmha = disable too"
    if "streamingllm" in on and ("use_paged_context_fmha" in on or facts.architecture != "LlamaForCausalLM"):
        yield "streamingllm is for LlamaForCausalLM, with use_paged_context_fmha = disable"
    if facts.kv_cache_quant_algo == "FP8" and not facts.has_fp8_weights and "use_paged_context_fmha" in on:
        yield (
            "--kv-cache fp8 without --precision fp8 takes use_paged_context_fmha away; "
            "say so with [trtllm] use_paged_context_fmha = disable (no KV reuse, no chunked context)"
        )


def arguments(flags: Mapping[str, FlagValue]) -> list[str]:
    """As on trtllm-build's command line; a switch that is off is left out."""
    words: list[str] = []
    for name, value in flags.items():
        if isinstance(value, bool):
            words += [f"--{name}"] if value else []
        elif name in ("lora_dir", "lora_target_modules"):
            words += [f"--{name}", *str(value).split()]
        else:
            words += [f"--{name}", str(value)]
    return words
