"""Options that cannot be, alone or with an engine: refused, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from trtbuild.checkpoints.layout import Layout
from trtbuild.errors import Refused
from trtbuild.triton_repo.tensorrt_llm.compatibility import check_options
from trtbuild.triton_repo.tensorrt_llm.option_texts import read_options
from trtbuild.triton_repo.tensorrt_llm.options import TrtllmOptions

PAGED_FMHA = "compile ... --trtllm use_paged_context_fmha=enable"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kv_cache_free_gpu_mem_fraction": 1.5}, "above 0 and at most 1"),
        ({"max_batch_size": 0}, "max_batch_size is 0, must be at least 1"),
        ({"max_queue_size": -1}, "must not be negative"),
        ({"batch_scheduler_policy": "static"}, "choose guaranteed_no_evict, max_utilization"),
        ({"batching_strategy": "V1"}, "choose inflight_fused_batching"),
        ({"guided_decoding_backend": "outlines"}, "choose xgrammar"),
        ({"max_attention_window_size": (128, 0)}, "each must be at least 1"),
        ({"lookahead": (1, 2)}, "three numbers"),
        ({"kv_cache_host_memory_bytes": 1, "enable_kv_cache_reuse": False}, "holds reused blocks"),
        ({"postprocessing_instances": 2}, "would overtake each other"),
        ({"instances": 2}, "gpu_device_ids must say where each runs"),
        ({"instances": 3, "gpu_device_ids": ((0,), (1,))}, "2 groups for 3 instances"),
        ({"gpu_device_ids": ((0, 0),)}, "names the same one twice"),
        ({"instances": 2, "gpu_device_ids": ((0,), (1,)), "participant_ids": ((1,), (1,))}, "one instance only"),
    ],
)  # fmt: skip
def test_values_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        TrtllmOptions(**values)


@pytest.mark.parametrize(
    ("values", "engine", "message"),
    [
        ({"enable_chunked_context": True}, {"plugins": {"use_paged_context_fmha": False}}, PAGED_FMHA),
        ({"enable_kv_cache_reuse": True}, {"plugins": {"use_paged_context_fmha": False}}, PAGED_FMHA),
        ({"enable_kv_cache_reuse": True}, {"quantization": {"kv_cache_quant_algo": "INT8"}}, "INT8 KV cache"),
        ({}, {"build": {"kv_cache_type": "CONTINUOUS"}}, "no paged KV cache, .* --trtllm kv_cache_type=paged"),
        ({}, {"plugins": {"remove_input_padding": False}}, "--trtllm remove_input_padding=enable"),
        ({}, {"plugins": {"gpt_attention_plugin": None}}, "gpt_attention_plugin"),
        ({"max_batch_size": 8}, {}, "the engine was built for 4; lower it, or .* --max-batch-size 8"),
        ({"max_beam_width": 2}, {}, "built for 1; .* --trtllm max_beam_width=2"),
        ({"max_tokens_in_paged_kv_cache": 100}, {}, "max_seq_len 256 tokens would never fit; .* --max-seq-len"),
        ({"max_attention_window_size": (512,)}, {}, "longer than the engine's max_seq_len 256"),
        ({"max_attention_window_size": (64,) * 4}, {}, "4 values for 3 layers"),
        ({"sink_token_length": 4}, {}, "--trtllm streamingllm=enable"),
        ({"lora_cache_max_adapter_size": 8}, {}, "the engine has no LoRA; .* --trtllm lora_plugin=auto"),
        ({"lora_cache_max_adapter_size": 128}, {"plugins": {"lora_plugin": "auto"}}, "built for 64 .max_lora_rank"),
        ({"gpu_weights_percent": 0.5}, {}, "--trtllm weight_streaming=true"),
        ({"decoding_mode": "beam_search"}, {}, "--trtllm max_beam_width=4"),
        ({"decoding_mode": "top_p"}, {"build": {"max_beam_width": 4}}, "need beam_search"),
        ({"decoding_mode": "medusa"}, {}, "--trtllm speculative_decoding_mode=..."),
        ({"decoding_mode": "top_k"}, {"build": {"speculative_decoding_mode": 32}}, "built for eagle"),
        ({}, {"build": {"speculative_decoding_mode": 8}}, "give its window"),
        ({"guided_decoding_backend": "xgrammar"}, {"build": {"max_beam_width": 2}}, "neither beams nor"),
        ({"gpu_device_ids": ((0,),)}, {"layout": Layout(tp=2)}, "each group needs 2 \\(tp 2 x pp 1"),
    ],
)  # fmt: skip
def test_contradictions_with_the_engine(
    values: dict[str, Any], engine: dict[str, Any], message: str, make: Callable[..., Any]
) -> None:
    with pytest.raises(Refused, match=message):
        check_options(TrtllmOptions(**values), *make(**engine))


def test_a_missing_rank_and_a_missing_tokenizer_are_told_together(make: Callable[..., Any]) -> None:
    passport, engine = make(layout=Layout(tp=2))
    (engine.directory / "rank1.engine").unlink()
    (passport.tokenizer_directory / "tokenizer.json").unlink()
    with pytest.raises(Refused, match=r"(?s)rank1.engine of 2 ranks missing.*the fast tokenizer"):
        check_options(TrtllmOptions(), passport, engine)


def test_what_is_not_given_follows_from_the_engine(make: Callable[..., Any]) -> None:
    plain = check_options(TrtllmOptions(), *make())
    assert (plain.max_batch_size, plain.max_beam_width) == (4, 1)
    assert plain.enable_chunked_context and plain.enable_kv_cache_reuse
    assert plain.decoding_mode is None and plain.max_attention_window_size is None
    old = check_options(TrtllmOptions(), *make("old", plugins={"use_paged_context_fmha": False}))
    assert (old.enable_chunked_context, old.enable_kv_cache_reuse) == (False, False)
    int8 = check_options(TrtllmOptions(), *make("int8", quantization={"kv_cache_quant_algo": "INT8"}))
    assert (int8.enable_chunked_context, int8.enable_kv_cache_reuse) == (True, False)
    medusa = check_options(TrtllmOptions(), *make("medusa", build={"speculative_decoding_mode": 4}))
    assert medusa.decoding_mode == "medusa"


def test_options_as_text() -> None:
    found = read_options([
        "kv_cache_free_gpu_mem_fraction=0.85", "max-attention-window-size=256,128", "gpu_device_ids=0,1;2,3",
        "instances=2", "enable_kv_cache_reuse=FALSE", "decoding_mode=top_k", "lookahead=4,3,2",
    ])  # fmt: skip
    assert found == TrtllmOptions(
        kv_cache_free_gpu_mem_fraction=0.85, max_attention_window_size=(256, 128), gpu_device_ids=((0, 1), (2, 3)),
        instances=2, enable_kv_cache_reuse=False, decoding_mode="top_k", lookahead=(4, 3, 2),
    )  # fmt: skip
    with pytest.raises(Refused) as refused:
        read_options(["max_batch_size=many", "nonsense=1", "instances", "decoupled=yes", "instances=1", "instances=2"])
    for part in ("a whole number", "'nonsense=1'", "'instances'", "true or false", "instances is given twice"):
        assert part in refused.value.message


def test_a_misspelt_option_is_recognised_and_everything_wrong_is_told_at_once() -> None:
    with pytest.raises(Refused) as refused:
        read_options(["kv_cache_free_gpu_mem_fractio=0.5", "max_batch_size=0", "instances=two", "gpu_device_ids=0;1"])
    lines = refused.value.message.splitlines()[1:]
    assert lines == [
        "  - 'kv_cache_free_gpu_mem_fractio=0.5': did you mean kv_cache_free_gpu_mem_fraction?",
        "  - instances=two: a whole number",
        "  - max_batch_size is 0, must be at least 1",
    ]
