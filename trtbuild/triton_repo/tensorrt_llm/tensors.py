"""The tensors of the five models, as 1.2's templates have them, less what an engine cannot use.

Sources: config.pbtxt of `triton_backend/all_models/inflight_batcher_llm` and the backend that reads them
(`triton_backend/inflight_batcher_llm/src`). Dims are without the batch. Tensors of encoders, images, and of a draft
model behind the BLS are left out: we build decoders of text. Of the others each line says what the engine must have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from trtbuild.engines.tensorrt_llm.engine_config import TrtllmEngine

Feature = Literal["any", "lora", "prompt_table", "mrope", "draft_tokens", "lookahead", "context_logits", "guided"]
ModelRole = Literal["preprocessing", "tensorrt_llm", "postprocessing", "ensemble", "tensorrt_llm_bls"]
ROLES: tuple[ModelRole, ...] = ("preprocessing", "tensorrt_llm", "postprocessing", "ensemble", "tensorrt_llm_bls")

# Types that follow from the engine: what its logits are computed in, and what its weights are held in.
_LOGITS, _WEIGHTS = "logits", "weights"
# tensorrt_llm/builder.py, SpeculativeDecodingMode
DRAFT_TOKENS_EXTERNAL, MEDUSA, LOOKAHEAD, EXPLICIT_DRAFT_TOKENS, EAGLE = 2, 4, 8, 16, 32


@dataclass(frozen=True)
class Tensor:
    """`scalar`: Triton passes the batch's values as one vector (`reshape: { shape: [] }`)."""

    name: str
    dtype: str
    dims: tuple[int, ...] = (1,)
    optional: bool = True
    scalar: bool = False
    ragged: bool = False
    needs: Feature = "any"


def _tensors(names: str, dtype: str, *dims: int, needs: Feature = "any", **flags: bool) -> list[Tensor]:
    return [Tensor(name, dtype, dims or (1,), needs=needs, **flags) for name in names.split()]


def _scalars(names: str, dtype: str, needs: Feature = "any", optional: bool = True) -> list[Tensor]:
    return _tensors(names, dtype, needs=needs, optional=optional, scalar=True)


_LORA = [
    *_scalars("lora_task_id", "UINT64", "lora"),
    *_tensors("lora_weights", _WEIGHTS, -1, -1, needs="lora", ragged=True),
    *_tensors("lora_config", "INT32", -1, 3, needs="lora", ragged=True),
]
_GUIDE = _tensors("guided_decoding_guide_type guided_decoding_guide", "STRING", needs="guided", ragged=True)
_RETURNS = (
    "return_log_probs return_generation_logits return_perf_metrics return_num_input_tokens return_num_output_tokens"
)

_ENGINE_INPUTS = [
    *_tensors("input_ids", "INT32", -1, ragged=True),
    *_scalars("input_lengths request_output_len", "INT32", optional=False),
    *_scalars("num_return_sequences", "INT32"),
    *_tensors("draft_input_ids", "INT32", -1, needs="draft_tokens", ragged=True),
    *_tensors("draft_logits", _LOGITS, -1, -1, needs="draft_tokens", ragged=True),
    *_scalars("draft_acceptance_threshold", "FP32", "draft_tokens"),
    *_scalars("end_id pad_id", "INT32"),
    *_tensors("stop_words_list bad_words_list", "INT32", 2, -1, ragged=True),
    *_tensors("embedding_bias", "FP32", -1, ragged=True),
    *_scalars("beam_width", "INT32"),
    *_scalars("temperature", "FP32"),
    *_scalars("runtime_top_k", "INT32"),
    *_scalars("runtime_top_p runtime_top_p_min runtime_top_p_decay", "FP32"),
    *_scalars("runtime_top_p_reset_ids", "INT32"),
    *_scalars("len_penalty", "FP32"),
    *_scalars("early_stopping", "BOOL"),
    *_scalars("repetition_penalty", "FP32"),
    *_scalars("min_tokens", "INT32"),
    *_scalars("beam_search_diversity_rate presence_penalty frequency_penalty", "FP32"),
    *_scalars("seed", "UINT64"),
    *_scalars(_RETURNS, "BOOL"),
    *_scalars("return_context_logits", "BOOL", "context_logits"),
    *_scalars("exclude_input_in_output stop streaming", "BOOL"),
    *_tensors("prompt_embedding_table", _WEIGHTS, -1, -1, needs="prompt_table", ragged=True),
    *_tensors("prompt_table_extra_ids", "UINT64", -1, needs="prompt_table", ragged=True),
    *_scalars("prompt_vocab_size", "INT32", "prompt_table"),
    *_tensors("mrope_rotary_cos_sin", "FP32", -1, needs="mrope"),
    *_tensors("mrope_position_deltas", "INT64", needs="mrope"),
    *_LORA,
    *_tensors("context_phase_params", "UINT8", -1, ragged=True),
    *_tensors(
        "retention_token_range_starts retention_token_range_ends retention_token_range_priorities "
        "retention_token_range_durations_ms", "INT32", -1, ragged=True,
    ),
    *_tensors("retention_decode_priority retention_decode_duration_ms", "INT32", ragged=True),
    *_GUIDE,
    *_tensors(
        "lookahead_window_size lookahead_ngram_size lookahead_verification_set_size", "INT32", needs="lookahead",
        ragged=True,
    ),
]  # fmt: skip

_STATISTICS = [
    *_tensors("cum_log_probs", "FP32", -1),
    *_tensors("output_log_probs", "FP32", -1, -1),
    *_tensors("context_logits", _LOGITS, -1, -1, needs="context_logits"),
    *_tensors("generation_logits", _LOGITS, -1, -1, -1),
    *_tensors("batch_index sequence_index", "INT32"),
    *_tensors("kv_cache_alloc_new_blocks kv_cache_reused_blocks kv_cache_alloc_total_blocks", "INT32"),
    *_tensors("arrival_time_ns first_scheduled_time_ns first_token_time_ns last_token_time_ns", "INT64"),
    *_tensors("acceptance_rate", "FP32"),
    *_tensors("total_accepted_draft_tokens total_draft_tokens num_input_tokens num_output_tokens", "INT32"),
]
_ENGINE_OUTPUTS = [
    *_tensors("output_ids", "INT32", -1, -1),
    *_tensors("sequence_length", "INT32", -1),
    *_STATISTICS,
    *_tensors("context_phase_params", "UINT8", -1),
]

_TEXT_INPUTS = [
    *_tensors("text_input", "STRING", optional=False),
    *_tensors("max_tokens", "INT32", optional=False),
    *_tensors("num_return_sequences", "INT32"),
    *_tensors("bad_words stop_words", "STRING", -1),
    *_tensors("exclude_input_in_output", "BOOL"),
    *_tensors("end_id pad_id top_k", "INT32"),
    *_tensors("top_p temperature length_penalty repetition_penalty", "FP32"),
    *_tensors("min_tokens", "INT32"),
    *_tensors("presence_penalty frequency_penalty", "FP32"),
    *_tensors("seed", "UINT64"),
    *_tensors(_RETURNS, "BOOL"),
    *_tensors("return_context_logits", "BOOL", needs="context_logits"),
    *_tensors("beam_width", "INT32"),
    *_tensors("stream", "BOOL"),
    *_tensors("prompt_embedding_table", _WEIGHTS, -1, -1, needs="prompt_table"),
    *_tensors("prompt_table_extra_id", "UINT64", needs="prompt_table"),
    *_tensors("prompt_vocab_size", "INT32", needs="prompt_table"),
    *_tensors("embedding_bias_words", "STRING", -1),
    *_tensors("embedding_bias_weights", "FP32", -1),
    # Without the reshape: a step of the ensemble, or the BLS, passes it on as it came.
    *(replace(tensor, scalar=False) for tensor in _LORA),
    *_GUIDE,
]
_TEXT_OUTPUTS = [*_tensors("text_output", "STRING", -1), *_STATISTICS]

_PREPROCESSING_INPUTS = [
    *_tensors("QUERY", "STRING", optional=False),
    *_tensors("REQUEST_OUTPUT_LEN", "INT32", optional=False),
    *_tensors("BAD_WORDS_DICT STOP_WORDS_DICT EMBEDDING_BIAS_WORDS", "STRING", -1),
    *_tensors("EMBEDDING_BIAS_WEIGHTS", "FP32", -1),
    *_tensors("END_ID PAD_ID", "INT32"),
    *_tensors("PROMPT_TABLE_EXTRA_ID", "UINT64", needs="prompt_table"),
]
_PREPROCESSING_OUTPUTS = [
    *_tensors("INPUT_ID", "INT32", -1),
    *_tensors("REQUEST_INPUT_LEN", "INT32"),
    *_tensors("BAD_WORDS_IDS STOP_WORDS_IDS", "INT32", 2, -1),
    *_tensors("EMBEDDING_BIAS", "FP32", -1),
    *_tensors("REQUEST_OUTPUT_LEN", "INT32", -1),
    *_tensors("OUT_END_ID OUT_PAD_ID", "INT32"),
    *_tensors("OUT_PROMPT_TABLE_EXTRA_IDS", "UINT64", -1, needs="prompt_table"),
]
_POSTPROCESSING_INPUTS = [
    *_tensors("TOKENS_BATCH", "INT32", -1, -1, optional=False),
    *_tensors("SEQUENCE_LENGTH", "INT32", -1, optional=False),
]

_INPUTS: Mapping[ModelRole, list[Tensor]] = {
    "preprocessing": _PREPROCESSING_INPUTS,
    "tensorrt_llm": _ENGINE_INPUTS,
    "postprocessing": _POSTPROCESSING_INPUTS,
    "ensemble": _TEXT_INPUTS,
    "tensorrt_llm_bls": _TEXT_INPUTS,
}
_OUTPUTS: Mapping[ModelRole, list[Tensor]] = {
    "preprocessing": _PREPROCESSING_OUTPUTS,
    "tensorrt_llm": _ENGINE_OUTPUTS,
    "postprocessing": _tensors("OUTPUT", "STRING", -1),
    "ensemble": _TEXT_OUTPUTS,
    "tensorrt_llm_bls": _TEXT_OUTPUTS,
}

# The engine's input that a text input becomes where its name is another one; all others keep theirs.
RENAMED: Mapping[str, str] = {
    "top_k": "runtime_top_k", "top_p": "runtime_top_p", "length_penalty": "len_penalty", "stream": "streaming",
}  # fmt: skip
# Text inputs that preprocessing takes, and outputs of preprocessing that the engine takes.
TO_PREPROCESSING: Mapping[str, str] = {
    "text_input": "QUERY", "max_tokens": "REQUEST_OUTPUT_LEN", "bad_words": "BAD_WORDS_DICT",
    "stop_words": "STOP_WORDS_DICT", "embedding_bias_words": "EMBEDDING_BIAS_WORDS",
    "embedding_bias_weights": "EMBEDDING_BIAS_WEIGHTS", "end_id": "END_ID", "pad_id": "PAD_ID",
    "prompt_table_extra_id": "PROMPT_TABLE_EXTRA_ID",
}  # fmt: skip
FROM_PREPROCESSING: Mapping[str, str] = {
    "INPUT_ID": "input_ids", "REQUEST_INPUT_LEN": "input_lengths", "REQUEST_OUTPUT_LEN": "request_output_len",
    "BAD_WORDS_IDS": "bad_words_list", "STOP_WORDS_IDS": "stop_words_list", "EMBEDDING_BIAS": "embedding_bias",
    "OUT_END_ID": "end_id", "OUT_PAD_ID": "pad_id", "OUT_PROMPT_TABLE_EXTRA_IDS": "prompt_table_extra_ids",
}  # fmt: skip


def inputs_of(role: ModelRole, engine: TrtllmEngine, guided: bool) -> list[Tensor]:
    """`guided`: the backend is given a grammar backend."""
    return list(_resolved(_INPUTS[role], engine, guided))


def outputs_of(role: ModelRole, engine: TrtllmEngine) -> list[Tensor]:
    return list(_resolved(_OUTPUTS[role], engine, guided=False))


def _resolved(tensors: Iterable[Tensor], engine: TrtllmEngine, guided: bool) -> Iterator[Tensor]:
    """Those that the engine can use, with types that Triton knows."""
    types = {_LOGITS: _triton_type(engine.logits_dtype), _WEIGHTS: _triton_type(engine.model["dtype"])}
    features = _features_of(engine) | ({"guided"} if guided else set())
    for tensor in tensors:
        if tensor.needs in features:
            yield replace(tensor, dtype=types.get(tensor.dtype, tensor.dtype))


def _features_of(engine: TrtllmEngine) -> set[Feature]:
    has: dict[Feature, bool] = {
        "any": True,
        "lora": engine.has_lora,
        "prompt_table": engine.max_prompt_embedding_table_size > 0,
        "mrope": engine.model.get("position_embedding_type") == "mrope",
        "draft_tokens": engine.speculative_decoding_mode == DRAFT_TOKENS_EXTERNAL,
        "lookahead": engine.speculative_decoding_mode == LOOKAHEAD,
        # Logits of the prompt have to be built in; those of the answer are there at run time.
        "context_logits": bool(engine.build.get("gather_context_logits")),
    }
    return {feature for feature, there in has.items() if there}


def _triton_type(dtype: str) -> str:
    return {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}[dtype]
