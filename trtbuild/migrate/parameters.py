"""Parameters of the models of an `inflight_batcher_llm` repository: names, value types, releases that read them.

From upstream's templates of several releases between 0.5 and 1.2 and the C++ backend of 1.x. `since` and `until` are
bounds, not dates: a name is flagged for a release only where a template of that release or of a later (earlier) one was
seen without it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from trtbuild.migrate.release import Release

Role = Literal["preprocessing", "tensorrt_llm", "postprocessing", "ensemble", "bls", "llmapi", "gpt", "other"]
Kind = Literal["int", "float", "share", "bool", "text", "path", "ints", "groups", "choice"]


@dataclass(frozen=True)
class Parameter:
    """`default`: what the backend takes where the value is missing, empty, a placeholder or unreadable."""

    kind: Kind
    default: str = "unset"
    choices: tuple[str, ...] = ()
    since: tuple[int, int] | None = None
    until: tuple[int, int] | None = None

    def is_read_by(self, release: Release | None) -> bool:
        """True where the release is not known."""
        if release is None:
            return True
        return not ((self.since and release.minor < self.since) or (self.until and release.minor > self.until))


BATCHING_STRATEGIES = ("inflight_fused_batching", "inflight_batching")
STATIC_BATCHING = ("V1", "v1")
SCHEDULER_POLICIES = ("guaranteed_no_evict", "max_utilization")
SPECULATIVE_MODES = ("medusa", "redrafter", "lookahead", "eagle")
DECODING_MODES = ("top_k", "top_p", "top_k_top_p", "beam_search", *SPECULATIVE_MODES)
_CHOICE_LOOKAHEAD = Parameter("int", since=(0, 13))

_ENGINE: dict[str, Parameter] = {
    "max_beam_width": Parameter("int", "1"),
    "FORCE_CPU_ONLY_INPUT_TENSORS": Parameter("choice", "no", ("no", "yes")),
    "gpt_model_type": Parameter("choice", choices=BATCHING_STRATEGIES),
    "gpt_model_path": Parameter("path"),
    "encoder_model_path": Parameter("path", since=(0, 10)),
    "max_tokens_in_paged_kv_cache": Parameter("int", "what kv_cache_free_gpu_mem_fraction gives"),
    "max_attention_window_size": Parameter("ints", "the engine's max_seq_len"),
    "sink_token_length": Parameter("int", "0", since=(0, 8)),
    "batch_scheduler_policy": Parameter("choice", "guaranteed_no_evict", SCHEDULER_POLICIES),
    "kv_cache_free_gpu_mem_fraction": Parameter("share", "0.9"),
    "cross_kv_cache_fraction": Parameter("share", since=(0, 11)),
    "kv_cache_host_memory_bytes": Parameter("int", "0"),
    "kv_cache_onboard_blocks": Parameter("bool", "true"),
    "enable_trt_overlap": Parameter("bool", "false"),
    "exclude_input_in_output": Parameter("bool", "false"),
    "cancellation_check_period_ms": Parameter("int", "100"),
    "stats_check_period_ms": Parameter("int", "100"),
    "recv_poll_period_ms": Parameter("int", "0", since=(0, 11)),
    "iter_stats_max_iterations": Parameter("int", "1000"),
    "request_stats_max_iterations": Parameter("int", "0"),
    "enable_kv_cache_reuse": Parameter("bool", "true in 1.x, false in old releases"),
    "normalize_log_probs": Parameter("bool", "true"),
    "enable_chunked_context": Parameter("bool", "false"),
    "gpu_device_ids": Parameter("groups", "one GPU for each rank, in order"),
    "participant_ids": Parameter("groups", "the ranks, in order", since=(0, 11)),
    "num_nodes": Parameter("int", "1", since=(0, 17)),
    "lora_cache_optimal_adapter_size": Parameter("int", "8"),
    "lora_cache_max_adapter_size": Parameter("int", "64"),
    "lora_cache_gpu_memory_fraction": Parameter("share", "0.05"),
    "lora_cache_host_memory_bytes": Parameter("int", "1 GiB"),
    "lora_prefetch_dir": Parameter("path", since=(0, 17)),
    "decoding_mode": Parameter("choice", "top_k_top_p, or beam_search with max_beam_width > 1", DECODING_MODES),
    "executor_worker_path": Parameter("path", "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker"),
    "worker_path": Parameter("path", until=(0, 9)),
    "lookahead_window_size": _CHOICE_LOOKAHEAD,
    "lookahead_ngram_size": _CHOICE_LOOKAHEAD,
    "lookahead_verification_set_size": _CHOICE_LOOKAHEAD,
    "medusa_choices": Parameter("text"),
    "eagle_choices": Parameter("text", since=(0, 11)),
    "gpu_weights_percent": Parameter("share", "1.0", since=(0, 11)),
    "enable_context_fmha_fp32_acc": Parameter("bool", "false", since=(0, 11)),
    "multi_block_mode": Parameter("bool", "true", since=(0, 11)),
    "cuda_graph_mode": Parameter("bool", "false", since=(0, 11)),
    "cuda_graph_cache_size": Parameter("int", "0", since=(0, 11)),
    "speculative_decoding_fast_logits": Parameter("bool", "false", since=(0, 11)),
    "tokenizer_dir": Parameter("path", since=(0, 17)),
    "guided_decoding_backend": Parameter("choice", choices=("xgrammar",), since=(0, 17)),
    "xgrammar_tokenizer_info_path": Parameter("path", since=(0, 17)),
    "max_num_sequences": Parameter("int", until=(0, 8)),
    "max_kv_cache_length": Parameter("int", until=(0, 7)),
}  # fmt: skip

PARAMETERS: Mapping[Role, Mapping[str, Parameter]] = {
    "tensorrt_llm": _ENGINE,
    "preprocessing": {
        "tokenizer_dir": Parameter("path"),
        "tokenizer_type": Parameter("choice", "auto", ("auto", "llama", "t5", "sp")),
        "add_special_tokens": Parameter("text", "true"),
        "multimodal_model_path": Parameter("path"),
        "visual_model_path": Parameter("path"),
        "engine_dir": Parameter("path"),
        "gpt_model_path": Parameter("path"),
        "max_num_images": Parameter("int", "1"),
        "hf_model_path": Parameter("path"),
    },
    "postprocessing": {
        "tokenizer_dir": Parameter("path"),
        "tokenizer_type": Parameter("choice", "auto", ("auto", "llama", "t5", "sp")),
        "skip_special_tokens": Parameter("text", "true"),
    },
    "bls": {
        "accumulate_tokens": Parameter("text", "false"),
        "tensorrt_llm_model_name": Parameter("text", "tensorrt_llm"),
        "tensorrt_llm_draft_model_name": Parameter("text"),
        "multimodal_encoders_name": Parameter("text"),
    },
}
"""Of the Python models these are upstream's own; a changed model.py may read others."""

REQUIRED: Mapping[Role, tuple[str, ...]] = {
    "tensorrt_llm": ("gpt_model_type", "gpt_model_path"),
    "preprocessing": ("tokenizer_dir",),
    "postprocessing": ("tokenizer_dir",),
}

# The C++ backend of 1.x asks for these without a default: the model does not load where one is not there at all.
PRESENT = ("tokenizer_dir", "xgrammar_tokenizer_info_path", "guided_decoding_backend")
PRESENT_SINCE = (1, 0)

RENAMED: Mapping[str, str] = {
    "maxTokensInPagedKvCache": "max_tokens_in_paged_kv_cache",
    "kvCacheFreeGpuMemFraction": "kv_cache_free_gpu_mem_fraction",
    "kv_cache_free_gpu_memory_fraction": "kv_cache_free_gpu_mem_fraction",
    "free_gpu_memory_fraction": "kv_cache_free_gpu_mem_fraction",
    "maxAttentionWindow": "max_attention_window_size",
    "max_attention_window": "max_attention_window_size",
    "max_kv_cache_length": "max_attention_window_size",
    "exclude_input_from_output": "exclude_input_in_output",
    "worker_path": "executor_worker_path",
    "engine_dir": "gpt_model_path",
    "engine_path": "gpt_model_path",
    "encoder_engine_dir": "encoder_model_path",
    "batching_strategy": "gpt_model_type",
    "batching_type": "gpt_model_type",
    "enable_block_reuse": "enable_kv_cache_reuse",
    "enable_chunked_prefill": "enable_chunked_context",
    "scheduler_policy": "batch_scheduler_policy",
    "host_cache_size": "kv_cache_host_memory_bytes",
    "beam_width": "max_beam_width",
}
"""Names that people wrote (a placeholder's, an API's, an older release's) for parameters of `tensorrt_llm`."""


def nearest(name: str, known: Iterable[str], cutoff: float = 0.8) -> str | None:
    """The known name that was most likely meant, whatever its case."""
    by_form = {_form(candidate): candidate for candidate in known}
    found = difflib.get_close_matches(_form(name)[:100], by_form, n=1, cutoff=cutoff)
    return by_form[found[0]] if found else None


def _form(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()
