"""Whether what trtllm-build wrote is what was asked for; a flag that it changed is an error, not a warning in a log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trtbuild.engines.tensorrt_llm.engine_config import TrtllmEngine, engine_file
from trtbuild.engines.tensorrt_llm.flags import FLAGS, FlagValue
from trtbuild.errors import CheckFailed

# Of the rank checkpoint's config.json, what the engine's must repeat.
_MODEL_KEYS = (
    "architecture", "dtype", "logits_dtype", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_size", "intermediate_size", "max_position_embeddings", "rotary_base",
)  # fmt: skip
_MAPPING_KEYS = ("world_size", "tp_size", "pp_size", "moe_tp_size", "moe_ep_size")
_QUANTIZATION_KEYS = ("quant_algo", "kv_cache_quant_algo")
# Flags that do not become fields of build_config under their own names.
_NOT_KEPT = {
    "checkpoint_dir", "output_dir", "log_level", "workers", "input_timing_cache", "output_timing_cache", "fast_build",
    "strip_plan", "dry_run", "visualize_network", "lora_dir", "lora_ckpt_source", "lora_target_modules",
    "max_lora_rank", "logits_dtype", "gather_all_token_logits", "auto_parallel", "gpus_per_node", "cluster_key",
    "monitor_memory", "speculative_decoding_mode", "opt_num_tokens", "nccl_plugin", "paged_state",
}  # fmt: skip


def check_engine(directory: Path, checkpoint: Mapping[str, Any], flags: Mapping[str, FlagValue], release: str) -> None:
    """Raises CheckFailed with every difference; `checkpoint` is the rank checkpoint's config.json."""
    engine = TrtllmEngine.open(directory)
    found = [*_missing(engine), *_model_changes(engine, checkpoint), *_flag_changes(engine, flags)]
    if engine.version != release:
        found.append(f"version is {engine.version}, built with {release}")
    if found:
        raise CheckFailed(
            f"{directory}: trtllm-build made something else than was asked for:" + "".join(f"\n  - {f}" for f in found)
        )


def _missing(engine: TrtllmEngine) -> Iterator[str]:
    for rank in range(engine.world_size):
        file = engine.directory / engine_file(rank)
        if not file.is_file() or not file.stat().st_size:
            yield f"{file.name} is missing or empty"


def _model_changes(engine: TrtllmEngine, checkpoint: Mapping[str, Any]) -> Iterator[str]:
    for section, keys in ((None, _MODEL_KEYS), ("mapping", _MAPPING_KEYS), ("quantization", _QUANTIZATION_KEYS)):
        asked = checkpoint if section is None else checkpoint.get(section) or {}
        got = engine.model if section is None else engine.model.get(section) or {}
        for key in keys:
            if key in asked and asked[key] != got.get(key):
                name = key if section is None else f"{section}.{key}"
                yield f"{name} is {got.get(key)!r}, the rank checkpoint has {asked[key]!r}"


def _flag_changes(engine: TrtllmEngine, flags: Mapping[str, FlagValue]) -> Iterator[str]:
    for name, value in flags.items():
        if name in _NOT_KEPT:
            continue
        place = (
            engine.plugins if FLAGS[name].kind in ("plugin", "feature") or name == "tokens_per_block" else engine.build
        )
        if not _same(place.get(name), value, engine.model.get("dtype")):
            yield f"--{name} {value} became {place.get(name)!r}"


def _same(got: Any, asked: FlagValue, dtype: str | None) -> bool:
    if asked == "disable":
        return got in (None, False)
    if asked == "enable":
        return got is True
    if asked == "auto":
        return got in ("auto", dtype)
    if isinstance(asked, bool | int):
        return got == asked
    return str(got).rpartition(".")[2].lower() == asked.lower()
