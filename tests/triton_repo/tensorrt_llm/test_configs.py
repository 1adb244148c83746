"""config.pbtxt of the five models against facts of 1.2's templates, written down here once more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as generated
from trtllm_engine import make_trtllm_engine

from trtbuild.checkpoints.layout import Layout
from trtbuild.engines.passport import Passport
from trtbuild.engines.tensorrt_llm.engine_config import TrtllmEngine
from trtbuild.triton_repo.tensorrt_llm.configs import config_texts
from trtbuild.triton_repo.tensorrt_llm.options import TrtllmOptions
from trtbuild.triton_repo.tensorrt_llm.repository import repository_facts

# Its members are made when it is imported; no type checker sees them.
model_config_pb2: Any = generated

# name type dims; `!` required, `s` reshaped to a vector of the batch, `r` ragged.
ENGINE_INPUTS = """
input_ids INT32 -1 r; input_lengths INT32 1 !s; request_output_len INT32 1 !s; num_return_sequences INT32 1 s
end_id INT32 1 s; pad_id INT32 1 s; stop_words_list INT32 2,-1 r; bad_words_list INT32 2,-1 r; embedding_bias FP32 -1 r
beam_width INT32 1 s; temperature FP32 1 s; runtime_top_k INT32 1 s; runtime_top_p FP32 1 s; runtime_top_p_min FP32 1 s
runtime_top_p_decay FP32 1 s; runtime_top_p_reset_ids INT32 1 s; len_penalty FP32 1 s; early_stopping BOOL 1 s
repetition_penalty FP32 1 s; min_tokens INT32 1 s; beam_search_diversity_rate FP32 1 s; presence_penalty FP32 1 s
frequency_penalty FP32 1 s; seed UINT64 1 s; return_log_probs BOOL 1 s; return_generation_logits BOOL 1 s
return_perf_metrics BOOL 1 s; return_num_input_tokens BOOL 1 s; return_num_output_tokens BOOL 1 s
exclude_input_in_output BOOL 1 s; stop BOOL 1 s; streaming BOOL 1 s; context_phase_params UINT8 -1 r
retention_token_range_starts INT32 -1 r; retention_token_range_ends INT32 -1 r
retention_token_range_priorities INT32 -1 r; retention_token_range_durations_ms INT32 -1 r
retention_decode_priority INT32 1 r; retention_decode_duration_ms INT32 1 r
"""
STATISTICS = """
cum_log_probs FP32 -1; output_log_probs FP32 -1,-1; generation_logits FP32 -1,-1,-1; batch_index INT32 1
sequence_index INT32 1; kv_cache_alloc_new_blocks INT32 1; kv_cache_reused_blocks INT32 1
kv_cache_alloc_total_blocks INT32 1; arrival_time_ns INT64 1; first_scheduled_time_ns INT64 1
first_token_time_ns INT64 1; last_token_time_ns INT64 1; acceptance_rate FP32 1; total_accepted_draft_tokens INT32 1
total_draft_tokens INT32 1; num_input_tokens INT32 1; num_output_tokens INT32 1
"""
ENGINE_OUTPUTS = f"output_ids INT32 -1,-1; sequence_length INT32 -1; context_phase_params UINT8 -1; {STATISTICS}"
TEXT_INPUTS = """
text_input STRING 1 !; max_tokens INT32 1 !; num_return_sequences INT32 1; bad_words STRING -1; stop_words STRING -1
exclude_input_in_output BOOL 1; end_id INT32 1; pad_id INT32 1; top_k INT32 1; top_p FP32 1; temperature FP32 1
length_penalty FP32 1; repetition_penalty FP32 1; min_tokens INT32 1; presence_penalty FP32 1; frequency_penalty FP32 1
seed UINT64 1; return_log_probs BOOL 1; return_generation_logits BOOL 1; return_perf_metrics BOOL 1
return_num_input_tokens BOOL 1; return_num_output_tokens BOOL 1; beam_width INT32 1; stream BOOL 1
embedding_bias_words STRING -1; embedding_bias_weights FP32 -1
"""
GOLDEN = {
    "tensorrt_llm": (ENGINE_INPUTS, ENGINE_OUTPUTS),
    "ensemble": (TEXT_INPUTS, f"text_output STRING -1; {STATISTICS}"),
    "tensorrt_llm_bls": (TEXT_INPUTS, f"text_output STRING -1; {STATISTICS}"),
    "preprocessing": (
        "QUERY STRING 1 !; REQUEST_OUTPUT_LEN INT32 1 !; BAD_WORDS_DICT STRING -1; STOP_WORDS_DICT STRING -1; "
        "EMBEDDING_BIAS_WORDS STRING -1; EMBEDDING_BIAS_WEIGHTS FP32 -1; END_ID INT32 1; PAD_ID INT32 1",
        "INPUT_ID INT32 -1; REQUEST_INPUT_LEN INT32 1; BAD_WORDS_IDS INT32 2,-1; STOP_WORDS_IDS INT32 2,-1; "
        "EMBEDDING_BIAS FP32 -1; REQUEST_OUTPUT_LEN INT32 -1; OUT_END_ID INT32 1; OUT_PAD_ID INT32 1",
    ),
    "postprocessing": ("TOKENS_BATCH INT32 -1,-1 !; SEQUENCE_LENGTH INT32 -1 !", "OUTPUT STRING -1"),
}


def golden(text: str) -> set[tuple[str, ...]]:
    lines = (line.split() for line in text.replace("\n", ";").split(";") if line.strip())
    return {(name, kind, dims, "".join(sorted("".join(flags)))) for name, kind, dims, *flags in lines}


def described(tensors: Any, inputs: bool) -> set[tuple[str, ...]]:
    found = set()
    for tensor in tensors:
        kind = model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_")
        flags = ""
        if inputs:
            flags += "" if tensor.optional else "!"
            flags += "r" if tensor.allow_ragged_batch else ""
            flags += "s" if tensor.HasField("reshape") and not tensor.reshape.shape else ""
        found.add((tensor.name, kind, ",".join(map(str, tensor.dims)), flags))
    return found


Configs = Callable[..., dict[str, Any]]


@pytest.fixture
def configs(tmp_path: Path) -> Configs:
    """The parsed config.pbtxt of an engine, by role."""

    def made(options: TrtllmOptions | None = None, prefix: str | None = None, **engine: Any) -> dict[str, Any]:
        directory = make_trtllm_engine(tmp_path / "tiny-trtllm", **engine)
        facts = repository_facts(
            Passport.open(directory), TrtllmEngine.open(directory), options or TrtllmOptions(), final=Path("/models"),
            prefix=prefix,
        )  # fmt: skip
        texts = config_texts(facts)
        assert not any("${" in text for text in texts.values())
        return {role: text_format.Parse(text, model_config_pb2.ModelConfig()) for role, text in texts.items()}

    return made


def parameters(config: Any) -> dict[str, str]:
    return {name: value.string_value for name, value in config.parameters.items()}


@pytest.mark.parametrize("role", GOLDEN)
def test_tensors_are_those_of_the_templates(role: str, configs: Configs) -> None:
    config = configs()[role]
    inputs, outputs = GOLDEN[role]
    assert described(config.input, inputs=True) == golden(inputs)
    assert described(config.output, inputs=False) == golden(outputs)
    assert config.max_batch_size == 4


def test_what_an_engine_was_built_for_adds_tensors(configs: Configs) -> None:
    plain = configs()["tensorrt_llm"]

    def added(role: str = "tensorrt_llm", **engine: Any) -> set[tuple[str, ...]]:
        options = engine.pop("options", None)
        return described(configs(options, **engine)[role].input, True) - golden(GOLDEN[role][0])

    assert {one[0] for one in added(plugins={"lora_plugin": "auto"})} == {"lora_task_id", "lora_weights", "lora_config"}
    assert ("lora_weights", "BF16", "-1,-1", "r") in added(plugins={"lora_plugin": "auto"})
    assert ("lora_weights", "FP16", "-1,-1", "r") in added(plugins={"lora_plugin": "auto"}, precision="fp16")
    assert added(build={"max_prompt_embedding_table_size": 64}) == golden(
        "prompt_embedding_table BF16 -1,-1 r; prompt_table_extra_ids UINT64 -1 r; prompt_vocab_size INT32 1 s"
    )
    assert added(build={"gather_context_logits": True}) == golden("return_context_logits BOOL 1 s")
    assert added(build={"speculative_decoding_mode": 2}) == golden(
        "draft_input_ids INT32 -1 r; draft_logits FP32 -1,-1 r; draft_acceptance_threshold FP32 1 s"
    )
    assert added(pretrained={"position_embedding_type": "mrope"}) == golden(
        "mrope_rotary_cos_sin FP32 -1; mrope_position_deltas INT64 1"
    )
    assert added(build={"speculative_decoding_mode": 8}, options=TrtllmOptions(lookahead=(4, 3, 2))) == golden(
        "lookahead_window_size INT32 1 r; lookahead_ngram_size INT32 1 r; lookahead_verification_set_size INT32 1 r"
    )
    guided = TrtllmOptions(guided_decoding_backend="xgrammar")
    guides = golden("guided_decoding_guide_type STRING 1 r; guided_decoding_guide STRING 1 r")
    assert added(options=guided) == added("ensemble", options=guided) == guides
    half = configs(pretrained={"logits_dtype": "float16"})["tensorrt_llm"]
    assert {one.name: one.data_type for one in half.output}["generation_logits"] == model_config_pb2.TYPE_FP16
    assert {one.name for one in half.input} == {one.name for one in plain.input}


def test_parameters_of_the_backend(configs: Configs) -> None:
    config = configs()["tensorrt_llm"]
    found = parameters(config)
    assert config.backend == "tensorrtllm"
    assert config.model_transaction_policy.decoupled
    assert (config.instance_group[0].count, config.instance_group[0].kind) == (
        1,
        model_config_pb2.ModelInstanceGroup.KIND_CPU,
    )
    assert found["gpt_model_path"] == "/models/tensorrt_llm/1/engine"
    assert found["gpt_model_type"] == "inflight_fused_batching"
    assert found["batch_scheduler_policy"] == "guaranteed_no_evict"
    assert found["kv_cache_free_gpu_mem_fraction"] == "0.9"
    assert found["enable_kv_cache_reuse"] == found["enable_chunked_context"] == "true"
    assert found["max_beam_width"] == "1"
    # Without these the backend does not load, and empty they mean: no guided decoding.
    assert {found[name] for name in ("tokenizer_dir", "xgrammar_tokenizer_info_path", "guided_decoding_backend")} == {
        ""
    }
    # Empty, they would be read as numbers.
    assert "max_attention_window_size" not in found and "gpu_device_ids" not in found
    given = TrtllmOptions(
        instances=2, gpu_device_ids=((0, 1), (2, 3)), participant_ids=((1, 2), (3, 4)), max_queue_size=7,
        max_queue_delay_microseconds=100, kv_cache_host_memory_bytes=2**30, batch_scheduler_policy="max_utilization",
        max_tokens_in_paged_kv_cache=4096, decoding_mode="top_k", guided_decoding_backend="xgrammar", decoupled=False,
    )  # fmt: skip
    config = configs(given, layout=Layout(tp=2))["tensorrt_llm"]
    found = parameters(config)
    assert (found["gpu_device_ids"], found["participant_ids"]) == ("0,1;2,3", "1,2;3,4")
    assert (config.instance_group[0].count, config.dynamic_batching.default_queue_policy.max_queue_size) == (2, 7)
    assert config.dynamic_batching.max_queue_delay_microseconds == 100
    assert list(config.dynamic_batching.preferred_batch_size) == [4]
    assert found["kv_cache_host_memory_bytes"] == "1073741824"
    assert (found["batch_scheduler_policy"], found["decoding_mode"]) == ("max_utilization", "top_k")
    assert found["max_tokens_in_paged_kv_cache"] == "4096"
    assert found["guided_decoding_backend"] == "xgrammar"
    assert found["xgrammar_tokenizer_info_path"] == "/models/tensorrt_llm/1/xgrammar_tokenizer_info.json"
    assert not config.model_transaction_policy.decoupled


def test_the_sliding_window_goes_into_the_parameters(configs: Configs) -> None:
    found = parameters(configs(model={"sliding_window": 128})["tensorrt_llm"])
    assert (found["max_attention_window_size"], found["enable_kv_cache_reuse"]) == ("128", "false")
    mixed = parameters(configs(model={"sliding_window": 128, "first_window_layer": 1})["tensorrt_llm"])
    assert mixed["max_attention_window_size"] == "256,128,128"
    assert "max_attention_window_size" not in parameters(configs(model={"sliding_window": 4096})["tensorrt_llm"])


def test_parameters_of_our_models(configs: Configs) -> None:
    found = {role: parameters(config) for role, config in configs(prefix="tiny").items()}
    assert found["preprocessing"] == {
        "tokenizer_dir": "tokenizer", "add_special_tokens": "true", "chat_template": "off", "end_id": "2",
        "pad_id": "2", "vocab_size": "1024", "max_input_len": "255",
    }  # fmt: skip
    assert found["postprocessing"] == {"tokenizer_dir": "tokenizer", "skip_special_tokens": "true", "end_ids": "2"}
    assert found["tensorrt_llm_bls"]["tensorrt_llm_model_name"] == "tiny_tensorrt_llm"
    assert found["tensorrt_llm_bls"]["preprocessing_model_name"] == "tiny_preprocessing"
    assert found["tensorrt_llm_bls"]["accumulate_tokens"] == "false"


def test_the_ensemble_maps_every_tensor(configs: Configs) -> None:
    found = configs(prefix="tiny", plugins={"lora_plugin": "auto"}, build={"max_prompt_embedding_table_size": 8})
    ensemble = found["ensemble"]
    assert ensemble.platform == "ensemble" and not ensemble.backend
    before, engine, after = ensemble.ensemble_scheduling.step
    assert [step.model_name for step in (before, engine, after)] == [
        "tiny_preprocessing", "tiny_tensorrt_llm", "tiny_postprocessing",
    ]  # fmt: skip
    assert dict(engine.input_map)["runtime_top_k"] == "top_k"
    assert dict(engine.input_map)["streaming"] == "stream"
    assert dict(engine.input_map)["len_penalty"] == "length_penalty"
    assert dict(engine.input_map)["prompt_table_extra_ids"] == "_OUT_PROMPT_TABLE_EXTRA_IDS"
    assert dict(before.input_map)["QUERY"] == "text_input"
    used = {*before.input_map.values(), *engine.input_map.values()}
    assert {tensor.name for tensor in ensemble.input} <= used
    given = {*before.output_map.values(), *engine.output_map.values(), *after.output_map.values()}
    assert {tensor.name for tensor in ensemble.output} <= given
    assert dict(after.input_map) == {"TOKENS_BATCH": "_TOKENS_BATCH", "SEQUENCE_LENGTH": "_SEQUENCE_LENGTH"}
