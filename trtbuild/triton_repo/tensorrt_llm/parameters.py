"""The `parameters` of the five models: strings, and only those that have a value.

A parameter that is missing is the backend's default, except for three that it must find, empty or not
(model_instance_state.cc, getGuidedDecodingConfigFromParams): without them the model does not load.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import PurePosixPath

from trtbuild.engines.tensorrt_llm.engine_config import TrtllmEngine
from trtbuild.triton_repo.tensorrt_llm.names import ModelNames
from trtbuild.triton_repo.tensorrt_llm.options import TrtllmOptions, format_groups
from trtbuild.triton_repo.tensorrt_llm.tensors import (
    FROM_PREPROCESSING,
    RENAMED,
    TO_PREPROCESSING,
    inputs_of,
    outputs_of,
)
from trtbuild.triton_repo.tensorrt_llm.tokenizer_facts import TokenizerFacts

TOKENIZER = "tokenizer"
"""Beside model.py: our models take a path that is not absolute from there."""
WORKER = "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker"


@dataclass(frozen=True)
class RepositoryFacts:
    """What the configurations are made of; `options` as `check_options` filled them in.

    `engine_path` and `xgrammar_path` are those that Triton's process sees.
    """

    engine: TrtllmEngine
    options: TrtllmOptions
    tokenizer: TokenizerFacts
    names: ModelNames
    engine_path: PurePosixPath
    xgrammar_path: PurePosixPath | None


def engine_parameters(facts: RepositoryFacts) -> dict[str, str]:
    """Of `tensorrt_llm`."""
    options = facts.options
    found = {
        "max_beam_width": options.max_beam_width,
        "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
        "gpt_model_type": options.batching_strategy,
        "gpt_model_path": facts.engine_path,
        "max_tokens_in_paged_kv_cache": options.max_tokens_in_paged_kv_cache,
        "max_attention_window_size": ",".join(map(str, options.max_attention_window_size or ())) or None,
        "sink_token_length": options.sink_token_length,
        "batch_scheduler_policy": options.batch_scheduler_policy,
        "kv_cache_free_gpu_mem_fraction": options.kv_cache_free_gpu_mem_fraction,
        "kv_cache_host_memory_bytes": options.kv_cache_host_memory_bytes,
        "exclude_input_in_output": options.exclude_input_in_output,
        "cancellation_check_period_ms": options.cancellation_check_period_ms,
        "stats_check_period_ms": options.stats_check_period_ms,
        "enable_kv_cache_reuse": options.enable_kv_cache_reuse,
        "normalize_log_probs": options.normalize_log_probs,
        "enable_chunked_context": options.enable_chunked_context,
        "gpu_device_ids": format_groups(options.gpu_device_ids) or None,
        "participant_ids": format_groups(options.participant_ids) or None,
        "num_nodes": options.num_nodes,
        "decoding_mode": options.decoding_mode,
        "executor_worker_path": WORKER,
        "medusa_choices": options.medusa_choices,
        "eagle_choices": options.eagle_choices,
        "gpu_weights_percent": options.gpu_weights_percent,
        "enable_context_fmha_fp32_acc": options.enable_context_fmha_fp32_acc,
        "multi_block_mode": options.multi_block_mode,
        "cuda_graph_mode": options.cuda_graph_mode,
        "cuda_graph_cache_size": options.cuda_graph_cache_size,
        "lora_cache_optimal_adapter_size": options.lora_cache_optimal_adapter_size,
        "lora_cache_max_adapter_size": options.lora_cache_max_adapter_size,
        "lora_cache_gpu_memory_fraction": options.lora_cache_gpu_memory_fraction,
        "lora_cache_host_memory_bytes": options.lora_cache_host_memory_bytes,
        "lora_prefetch_dir": options.lora_prefetch_dir,
        # The C++ backend reads the next file instead.
        "tokenizer_dir": "",
        "xgrammar_tokenizer_info_path": facts.xgrammar_path or "",
        "guided_decoding_backend": options.guided_decoding_backend or "",
    }
    names = ("lookahead_window_size", "lookahead_ngram_size", "lookahead_verification_set_size")
    found |= dict(zip(names, options.lookahead or (None, None, None), strict=True))
    return {name: _text(value) for name, value in found.items() if value is not None}


def preprocessing_parameters(facts: RepositoryFacts) -> dict[str, str]:
    found = {
        "tokenizer_dir": TOKENIZER,
        "add_special_tokens": facts.options.add_special_tokens,
        "chat_template": facts.options.chat_template,
        "end_id": facts.tokenizer.end_ids[0],
        "more_end_ids": ",".join(map(str, facts.tokenizer.end_ids[1:])),
        "pad_id": facts.tokenizer.pad_id,
        "vocab_size": facts.engine.vocab_size,
        "max_input_len": min(facts.engine.max_input_len, facts.engine.max_seq_len - 1),
    }
    return {name: _text(value) for name, value in found.items() if value != ""}


def postprocessing_parameters(facts: RepositoryFacts) -> dict[str, str]:
    found = {
        "tokenizer_dir": TOKENIZER,
        "skip_special_tokens": facts.options.skip_special_tokens,
        "end_ids": ",".join(map(str, facts.tokenizer.end_ids)),
    }
    return {name: _text(value) for name, value in found.items()}


def bls_parameters(facts: RepositoryFacts) -> dict[str, str]:
    found = {
        "tokenizer_dir": TOKENIZER,
        "skip_special_tokens": facts.options.skip_special_tokens,
        "accumulate_tokens": facts.options.accumulate_tokens,
        # Where stop words count from; the engine's model has it too.
        "exclude_input_in_output": facts.options.exclude_input_in_output,
        "preprocessing_model_name": facts.names["preprocessing"],
        "tensorrt_llm_model_name": facts.names["tensorrt_llm"],
        "tensor_routes": json.dumps(_routes(facts)),
    }
    return {name: _text(value) for name, value in found.items()}


def _routes(facts: RepositoryFacts) -> dict[str, object]:
    """Which tensors the BLS passes on, and as what."""
    guided = facts.options.guided_decoding_backend is not None
    text_inputs = [tensor.name for tensor in inputs_of("tensorrt_llm_bls", facts.engine, guided)]
    prepared = {tensor.name for tensor in outputs_of("preprocessing", facts.engine)}
    return {
        "to_preprocessing": {name: TO_PREPROCESSING[name] for name in text_inputs if name in TO_PREPROCESSING},
        "from_preprocessing": {old: new for old, new in FROM_PREPROCESSING.items() if old in prepared},
        "to_engine": {name: RENAMED.get(name, name) for name in text_inputs if name not in TO_PREPROCESSING},
        "outputs": [
            tensor.name for tensor in outputs_of("tensorrt_llm", facts.engine) if tensor.name != "context_phase_params"
        ],
    }


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
