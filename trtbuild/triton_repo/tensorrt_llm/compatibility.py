"""Options against the engine that they are for: what the backend would refuse, or drop without a word."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from trtbuild.checkpoints.model_config import ModelConfig
from trtbuild.engines.passport import Passport
from trtbuild.engines.tensorrt_llm.engine_config import TrtllmEngine, engine_file
from trtbuild.errors import refuse_all
from trtbuild.triton_repo.tensorrt_llm.options import DecodingMode, TrtllmOptions, format_groups
from trtbuild.triton_repo.tensorrt_llm.tensors import EAGLE, EXPLICIT_DRAFT_TOKENS, LOOKAHEAD, MEDUSA

# The decoding mode that the backend takes from the engine, whatever it is told.
_MODE_OF_ENGINE: dict[int, DecodingMode] = {
    MEDUSA: "medusa", LOOKAHEAD: "lookahead", EXPLICIT_DRAFT_TOKENS: "redrafter", EAGLE: "eagle",
}  # fmt: skip


_BUILD = "build the engine again with trtbuild compile ... {}"


def _build(*flags: str) -> str:
    """The fix that needs another engine; flags are trtllm-build's own names."""
    return _BUILD.format(" ".join(f"--trtllm {flag}" for flag in flags))


def check_options(options: TrtllmOptions, passport: Passport, engine: TrtllmEngine) -> TrtllmOptions:
    """The options with everything filled in that follows from the engine and its model.

    Raises `Refused` with every contradiction.
    """
    problems = [*_engine_problems(engine), *_feature_problems(options, engine), *_size_problems(options, engine)]
    problems += [*_decoding_problems(options, engine), *_place_problems(options, engine)]
    problems += _tokenizer_problems(options, passport)
    refuse_all(f"{passport.name} (TensorRT-LLM engine)", problems)
    windows = options.max_attention_window_size or model_windows(passport.config, engine.max_seq_len)
    reusable = engine.has_paged_context_attention and engine.kv_cache_quant_algo != "INT8" and not windows
    return replace(
        options,
        max_batch_size=options.max_batch_size or engine.max_batch_size,
        max_beam_width=options.max_beam_width or engine.max_beam_width,
        max_attention_window_size=windows,
        enable_chunked_context=_given(options.enable_chunked_context, engine.has_paged_context_attention),
        enable_kv_cache_reuse=_given(options.enable_kv_cache_reuse, reusable),
        decoding_mode=options.decoding_mode or _MODE_OF_ENGINE.get(engine.speculative_decoding_mode),
    )


def model_windows(config: ModelConfig, max_seq_len: int) -> tuple[int, ...] | None:
    """The window of each layer (of all, where they are the same); None where every layer sees `max_seq_len` tokens.

    The backend repeats a list that is shorter than the layers, by their number in the whole model.
    """
    windows = tuple(min(config.window(layer) or max_seq_len, max_seq_len) for layer in range(config.num_layers))
    if min(windows) >= max_seq_len:
        return None
    return windows[:1] if len(set(windows)) == 1 else windows


def _given(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def _engine_problems(engine: TrtllmEngine) -> Iterator[str]:
    """In-flight batching is the only kind that 1.x still has."""
    missing = [
        file for rank in range(engine.world_size) if not (engine.directory / (file := engine_file(rank))).is_file()
    ]
    if missing:
        yield f"{', '.join(missing)} of {engine.world_size} ranks missing in {engine.directory}; build the engine again"
    if not engine.has_paged_kv_cache:
        yield f"the engine has no paged KV cache, which in-flight batching needs; {_build('kv_cache_type=paged')}"
    if engine.plugins.get("remove_input_padding") is False:
        yield f"the engine pads its input, and in-flight batching does not; {_build('remove_input_padding=enable')}"
    if "gpt_attention_plugin" in engine.plugins and not engine.plugins["gpt_attention_plugin"]:
        rebuilt = _build("gpt_attention_plugin=auto")
        yield f"the engine has no gpt_attention_plugin, which in-flight batching needs; {rebuilt}"


def _feature_problems(options: TrtllmOptions, engine: TrtllmEngine) -> Iterator[str]:
    rebuild = _build("use_paged_context_fmha=enable")
    if options.enable_chunked_context and not engine.has_paged_context_attention:
        yield f"enable_chunked_context: the engine has no paged context FMHA; {rebuild}"
    if options.enable_kv_cache_reuse and not engine.has_paged_context_attention:
        yield f"enable_kv_cache_reuse: the engine has no paged context FMHA; {rebuild}"
    if options.enable_kv_cache_reuse and engine.kv_cache_quant_algo == "INT8":
        yield "enable_kv_cache_reuse: paged context FMHA does not read an INT8 KV cache; build with FP8 or 16 bit"
    lora = [
        name for name in (
            "lora_cache_optimal_adapter_size", "lora_cache_max_adapter_size", "lora_cache_gpu_memory_fraction",
            "lora_cache_host_memory_bytes", "lora_prefetch_dir",
        ) if getattr(options, name) is not None
    ]  # fmt: skip
    if lora and not engine.has_lora:
        rebuilt = _build("lora_plugin=auto", "lora_target_modules=...")
        yield f"{', '.join(lora)}: the engine has no LoRA; {rebuilt}"
    largest = int((engine.build.get("lora_config") or {}).get("max_lora_rank") or 64)
    if engine.has_lora and (options.lora_cache_max_adapter_size or 0) > largest:
        given = options.lora_cache_max_adapter_size
        yield f"lora_cache_max_adapter_size is {given}, the engine was built for {largest} (max_lora_rank)"
    if (options.lora_cache_optimal_adapter_size or 0) > (options.lora_cache_max_adapter_size or 64):
        yield "lora_cache_optimal_adapter_size exceeds lora_cache_max_adapter_size (64 where it is not given)"
    if options.gpu_weights_percent not in (None, 1.0) and not engine.build.get("weight_streaming"):
        yield f"gpu_weights_percent: the engine cannot stream weights; {_build('weight_streaming=true')}"


def _size_problems(options: TrtllmOptions, engine: TrtllmEngine) -> Iterator[str]:
    for name in ("max_batch_size", "max_beam_width"):
        value, limit = getattr(options, name), getattr(engine, name)
        if (value or 0) > limit:
            rebuilt = (
                _build("max_beam_width=" + str(value))
                if name == "max_beam_width"
                else _BUILD.format(f"--max-batch-size {value}")
            )
            yield f"{name} is {value}, the engine was built for {limit}; lower it, or {rebuilt}"
    tokens = options.max_tokens_in_paged_kv_cache
    if tokens is not None and tokens < engine.max_seq_len:
        yield (
            f"max_tokens_in_paged_kv_cache is {tokens}: a request of max_seq_len {engine.max_seq_len} tokens would "
            "never fit; raise it, or build the engine again with trtbuild compile ... --max-seq-len N, a smaller one"
        )
    windows = options.max_attention_window_size or ()
    if any(window > engine.max_seq_len for window in windows):
        yield f"max_attention_window_size is {max(windows)}, longer than the engine's max_seq_len {engine.max_seq_len}"
    if len(windows) > engine.num_layers:
        yield f"max_attention_window_size has {len(windows)} values for {engine.num_layers} layers"
    if (options.sink_token_length or 0) > 0 and not engine.plugins.get("streamingllm"):
        yield f"sink_token_length: the engine was not built for it; {_build('streamingllm=enable')}"


def _decoding_problems(options: TrtllmOptions, engine: TrtllmEngine) -> Iterator[str]:
    beams = options.max_beam_width or engine.max_beam_width
    mode, forced = options.decoding_mode, _MODE_OF_ENGINE.get(engine.speculative_decoding_mode)
    if mode == "beam_search" and beams == 1:
        yield f"decoding_mode beam_search: max_beam_width is 1; {_build('max_beam_width=4')}"
    if mode in ("top_k", "top_p", "top_k_top_p") and beams > 1:
        yield f"decoding_mode {mode} with max_beam_width {beams}: the engine's beams need beam_search"
    if mode is not None and forced is not None and mode != forced:
        yield f"decoding_mode {mode}: the engine was built for {forced}, which the backend takes instead"
    if mode in _MODE_OF_ENGINE.values() and forced is None:
        yield (
            f"decoding_mode {mode}: the engine was built without speculative decoding; "
            f"{_build('speculative_decoding_mode=...')}"
        )
    if "lookahead" in (mode, forced) and options.lookahead is None:
        yield "decoding_mode lookahead: give its window, n-gram and verification set size"
    if options.lookahead is not None and "lookahead" not in (mode, forced):
        yield "lookahead sizes are for decoding_mode lookahead"
    for name, needed in (("medusa_choices", "medusa"), ("eagle_choices", "eagle")):
        if getattr(options, name) is not None and forced != needed:
            yield f"{name}: the engine was not built for {needed}"
    if options.guided_decoding_backend and (forced is not None or beams > 1):
        yield "guided_decoding_backend: neither beams nor speculative decoding go with it"


def _place_problems(options: TrtllmOptions, engine: TrtllmEngine) -> Iterator[str]:
    for name in ("gpu_device_ids", "participant_ids"):
        groups = getattr(options, name)
        if any(len(group) != engine.world_size for group in groups):
            yield (
                f"{name} is {format_groups(groups)!r}: each group needs {engine.world_size} "
                f"(tp {engine.tp} x pp {engine.pp} of the engine)"
            )


def _tokenizer_problems(options: TrtllmOptions, passport: Passport) -> Iterator[str]:
    directory = passport.tokenizer_directory
    if not (directory / "tokenizer.json").is_file():
        yield f"no {directory / 'tokenizer.json'}: our models need the fast tokenizer; save one with transformers"
    if options.chat_template != "off" and not _has_chat_template(passport):
        yield f"chat_template {options.chat_template}: the tokenizer has no chat template"


def _has_chat_template(passport: Passport) -> bool:
    from trtbuild.workspace import read_json

    file = passport.tokenizer_directory / "tokenizer_config.json"
    has_own = any(passport.tokenizer_directory.glob("chat_template.*"))
    return has_own or (file.is_file() and bool(read_json(file).get("chat_template")))
