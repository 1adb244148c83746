"""Tensors of the models of an `inflight_batcher_llm` repository, over all releases from 0.8 to 1.2.

A line is: name, the data types that are right (without TYPE_), number of dims, and `required`. Dims of text tensors
changed between releases ([-1], then [1]), their number never did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trtbuild.migrate.parameters import Role


@dataclass(frozen=True)
class TensorRow:
    types: tuple[str, ...]
    rank: int
    required: bool = False


def _rows(table: str) -> dict[str, TensorRow]:
    rows = {}
    for line in table.strip().splitlines():
        names, types, rank, *required = line.split()
        for name in names.split(","):
            rows[name] = TensorRow(tuple(types.split("|")), int(rank), bool(required))
    return rows


_ENGINE_INPUTS = _rows("""
input_ids INT32 1 required
input_lengths,request_output_len INT32 1 required
encoder_input_features FP16|FP32|BF16 2
encoder_output_lengths,num_return_sequences,draft_input_ids,decoder_input_ids,decoder_input_lengths INT32 1
draft_logits,prompt_embedding_table FP16|FP32|BF16 2
draft_acceptance_threshold,temperature,runtime_top_p,runtime_top_p_min,runtime_top_p_decay FP32 1
len_penalty,repetition_penalty,beam_search_diversity_rate,presence_penalty,frequency_penalty FP32 1
embedding_bias,mrope_rotary_cos_sin FP32 1
end_id,pad_id,beam_width,runtime_top_k,runtime_top_p_reset_ids,min_length,min_tokens INT32 1
stop_words_list,bad_words_list INT32 2
early_stopping,return_log_probs,return_context_logits,return_generation_logits,return_perf_metrics BOOL 1
return_num_input_tokens,return_num_output_tokens,return_kv_cache_reuse_stats BOOL 1
exclude_input_in_output,stop,streaming,skip_cross_attn_blocks BOOL 1
random_seed,seed,prompt_table_extra_ids,lora_task_id UINT64 1
prompt_vocab_size,lookahead_window_size,lookahead_ngram_size,lookahead_verification_set_size INT32 1
retention_token_range_starts,retention_token_range_ends,retention_token_range_priorities INT32 1
retention_token_range_durations_ms,retention_decode_priority,retention_decode_duration_ms INT32 1
cross_attention_mask BOOL 2
mrope_position_deltas INT64 1
lora_weights FP16|BF16|FP32 2
lora_config INT32 2
context_phase_params UINT8 1
guided_decoding_guide_type,guided_decoding_guide STRING 1
""")

_STATISTICS = """
batch_index,sequence_index,kv_cache_alloc_new_blocks,kv_cache_reused_blocks,kv_cache_alloc_total_blocks INT32 1
arrival_time_ns,first_scheduled_time_ns,first_token_time_ns,last_token_time_ns INT64 1
acceptance_rate,cum_log_probs FP32 1
total_accepted_draft_tokens,total_draft_tokens,num_input_tokens,num_output_tokens INT32 1
output_log_probs FP32 2
context_logits FP16|FP32 2
generation_logits FP16|FP32 3
"""

_ENGINE_OUTPUTS = _rows(f"""
output_ids INT32 2 required
sequence_length INT32 1 required
context_phase_params UINT8 1
{_STATISTICS.strip()}
""")

_TEXT_INPUTS = """
text_input STRING 1 required
max_tokens INT32 1 required
decoder_text_input,bad_words,stop_words,embedding_bias_words,image_url_input STRING 1
num_return_sequences,end_id,pad_id,top_k,min_length,min_tokens,beam_width,prompt_vocab_size INT32 1
top_p,temperature,length_penalty,repetition_penalty,presence_penalty,frequency_penalty FP32 1
embedding_bias_weights FP32 1
random_seed,seed,prompt_table_extra_id,lora_task_id UINT64 1
return_log_probs,return_context_logits,return_generation_logits,return_perf_metrics BOOL 1
return_num_input_tokens,return_num_output_tokens,return_kv_cache_reuse_stats BOOL 1
exclude_input_in_output,stream BOOL 1
prompt_embedding_table,lora_weights FP16|FP32|BF16 2
lora_config INT32 2
guided_decoding_guide_type,guided_decoding_guide STRING 1
"""

_TEXT_OUTPUTS = _rows(f"text_output STRING 1 required\n{_STATISTICS.strip()}")

_BLS_INPUTS = _rows(f"""
{_TEXT_INPUTS.strip()}
num_draft_tokens INT32 1
use_draft_logits BOOL 1
image_input FP16|FP32|BF16 4
image_bytes_input,video_bytes_input UINT8 4
""")

_PREPROCESSING_INPUTS = _rows("""
QUERY STRING 1
REQUEST_OUTPUT_LEN INT32 1 required
DECODER_QUERY,IMAGE_URL,IMAGES,BAD_WORDS_DICT,STOP_WORDS_DICT,EMBEDDING_BIAS_WORDS STRING 1
IMAGE_BYTES,VIDEO_BYTES UINT8 4
EMBEDDING_BIAS_WEIGHTS FP32 1
END_ID,PAD_ID INT32 1
PROMPT_TABLE_EXTRA_ID UINT64 1
""")

_PREPROCESSING_OUTPUTS = _rows("""
INPUT_ID,REQUEST_INPUT_LEN,REQUEST_OUTPUT_LEN INT32 1 required
DECODER_INPUT_ID,REQUEST_DECODER_INPUT_LEN,OUT_END_ID,OUT_PAD_ID,VISION_INPUT_ID INT32 1
BAD_WORDS_IDS,STOP_WORDS_IDS INT32 2
EMBEDDING_BIAS FP32 1
OUT_PROMPT_TABLE_EXTRA_IDS UINT64 1
""")

_POSTPROCESSING_INPUTS = _rows("""
TOKENS_BATCH INT32 2 required
SEQUENCE_LENGTH INT32 1
CUM_LOG_PROBS,ACCEPTANCE_RATE FP32 1
OUTPUT_LOG_PROBS FP32 2
CONTEXT_LOGITS FP16|FP32 2
GENERATION_LOGITS FP16|FP32 3
BATCH_INDEX,SEQUENCE_INDEX INT32 1
""")

_POSTPROCESSING_OUTPUTS = _rows("""
OUTPUT STRING 1 required
OUT_CUM_LOG_PROBS FP32 1
OUT_OUTPUT_LOG_PROBS FP32 2
OUT_CONTEXT_LOGITS FP16|FP32 2
OUT_GENERATION_LOGITS FP16|FP32 3
OUT_BATCH_INDEX,OUT_SEQUENCE_INDEX INT32 1
""")

INPUTS: Mapping[Role, Mapping[str, TensorRow]] = {
    "tensorrt_llm": _ENGINE_INPUTS,
    "preprocessing": _PREPROCESSING_INPUTS,
    "postprocessing": _POSTPROCESSING_INPUTS,
    "ensemble": _rows(_TEXT_INPUTS),
    "bls": _BLS_INPUTS,
}
OUTPUTS: Mapping[Role, Mapping[str, TensorRow]] = {
    "tensorrt_llm": _ENGINE_OUTPUTS,
    "preprocessing": _PREPROCESSING_OUTPUTS,
    "postprocessing": _POSTPROCESSING_OUTPUTS,
    "ensemble": _TEXT_OUTPUTS,
    "bls": _TEXT_OUTPUTS,
}

# (old name, new name, last release seen with the old one, first seen with the new one)
RENAMED_TENSORS = (
    ("random_seed", "seed", (0, 17), (1, 0)),
    ("min_length", "min_tokens", (0, 17), (1, 0)),
)
