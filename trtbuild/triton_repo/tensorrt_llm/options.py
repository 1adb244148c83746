"""How a TensorRT-LLM engine is served: what config.pbtxt of its models says beyond the engine's own facts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from trtbuild.errors import refuse_all

BatchingStrategy = Literal["inflight_fused_batching", "inflight_batching"]
SchedulerPolicy = Literal["guaranteed_no_evict", "max_utilization"]
DecodingMode = Literal["top_k", "top_p", "top_k_top_p", "beam_search", "medusa", "redrafter", "lookahead", "eagle"]
ChatTemplate = Literal["off", "user", "messages"]
DECODING_MODES: tuple[DecodingMode, ...] = (
    "top_k", "top_p", "top_k_top_p", "beam_search", "medusa", "redrafter", "lookahead", "eagle",
)  # fmt: skip
Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TrtllmOptions:
    """Names and meanings are those of TensorRT-LLM's Triton backend; None leaves a value to the engine, or to it.

    Raises `Refused` with every value that cannot be; `check_options` holds them against an engine.
    """

    max_batch_size: int | None = None
    """Of all five models; None: the engine's."""
    max_beam_width: int | None = None
    batching_strategy: BatchingStrategy = "inflight_fused_batching"
    batch_scheduler_policy: SchedulerPolicy = "guaranteed_no_evict"
    kv_cache_free_gpu_mem_fraction: float = 0.9
    """Of the memory that is free once the engine is loaded."""
    max_tokens_in_paged_kv_cache: int | None = None
    max_attention_window_size: tuple[int, ...] | None = None
    """One for all layers, or one for each, repeated; None: the model's sliding window."""
    sink_token_length: int | None = None
    enable_chunked_context: bool | None = None
    """None: where the engine was built for it."""
    enable_kv_cache_reuse: bool | None = None
    """None: where the engine was built for it and no layer has a window."""
    kv_cache_host_memory_bytes: int = 0
    decoding_mode: DecodingMode | None = None
    lookahead: tuple[int, int, int] | None = None
    """Window, n-gram and verification set size."""
    medusa_choices: str | None = None
    eagle_choices: str | None = None
    lora_cache_optimal_adapter_size: int | None = None
    lora_cache_max_adapter_size: int | None = None
    lora_cache_gpu_memory_fraction: float | None = None
    lora_cache_host_memory_bytes: int | None = None
    lora_prefetch_dir: str | None = None
    guided_decoding_backend: Literal["xgrammar"] | None = None
    gpu_weights_percent: float | None = None
    normalize_log_probs: bool = True
    enable_context_fmha_fp32_acc: bool = False
    multi_block_mode: bool = True
    cuda_graph_mode: bool = False
    cuda_graph_cache_size: int = 0
    participant_ids: Groups = ()
    """MPI ranks of each instance, for orchestrator mode without spawned processes."""
    gpu_device_ids: Groups = ()
    """GPUs of each instance."""
    num_nodes: int = 1
    instances: int = 1
    max_queue_delay_microseconds: int = 0
    max_queue_size: int = 0
    """Requests that may wait; 0: any number."""
    cancellation_check_period_ms: int = 100
    stats_check_period_ms: int = 100
    preprocessing_instances: int = 1
    postprocessing_instances: int = 1
    bls_instances: int = 1
    decoupled: bool = True
    """Without it nothing streams, and batches are refused."""
    exclude_input_in_output: bool = False
    """What holds where a request does not say."""
    add_special_tokens: bool = True
    skip_special_tokens: bool = True
    accumulate_tokens: bool = False
    """Each answer of a stream of the BLS has all of its text so far."""
    chat_template: ChatTemplate = "off"
    """"user": text_input is what a user says; "messages": it is a list of messages in JSON."""

    def __post_init__(self) -> None:
        refuse_all("options of the TensorRT-LLM repository", self.find_problems())

    def find_problems(self) -> Iterator[str]:
        """Values that cannot be, alone or together."""
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{name} is {value}, must be at least 1"
        for name in _SIZES:
            value = getattr(self, name)
            if value is not None and value < 0:
                yield f"{name} is {value}, must not be negative"
        for name in _FRACTIONS:
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                yield f"{name} is {value}, must be above 0 and at most 1"
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                yield f"{name} is {value!r}; choose {', '.join(allowed)}"
        if any(window < 1 for window in self.max_attention_window_size or ()):
            yield f"max_attention_window_size is {self.max_attention_window_size}, each must be at least 1"
        if self.lookahead is not None and (len(self.lookahead) != 3 or min(self.lookahead) < 0):
            yield f"lookahead is {self.lookahead}: three numbers, window, n-gram and verification set size"
        if self.kv_cache_host_memory_bytes and self.enable_kv_cache_reuse is False:
            yield "kv_cache_host_memory_bytes holds reused blocks; enable_kv_cache_reuse is off"
        if self.postprocessing_instances > 1 and self.decoupled:
            yield (
                f"postprocessing_instances is {self.postprocessing_instances}: the pieces of a stream would overtake "
                "each other; one instance serves all, or switch decoupled off"
            )
        yield from self._group_problems()

    def _group_problems(self) -> Iterator[str]:
        for name in ("gpu_device_ids", "participant_ids"):
            groups: Groups = getattr(self, name)
            if any(number < 0 for group in groups for number in group) or any(not group for group in groups):
                yield f"{name} is {format_groups(groups)!r}: groups of numbers from 0 on, such as 0,1;2,3"
            if any(len(set(group)) != len(group) for group in groups):
                yield f"{name} is {format_groups(groups)!r}: a group names the same one twice"
            if len(groups) > 1 and len(groups) != self.instances:
                yield f"{name} has {len(groups)} groups for {self.instances} instances; each needs one"
        ranks = [rank for group in self.participant_ids for rank in group]
        if len(set(ranks)) != len(ranks):
            yield f"participant_ids is {format_groups(self.participant_ids)!r}: a rank can serve one instance only"
        if self.instances > 1 and len(self.gpu_device_ids) <= 1:
            yield (
                f"instances is {self.instances}: gpu_device_ids must say where each runs, such as 0,1;2,3; "
                "Triton's instance_group does not place this backend"
            )


def problems_of(values: Mapping[str, Any]) -> list[str]:
    """What `TrtllmOptions(**values)` would refuse, beside what else is wrong."""
    unchecked = object.__new__(TrtllmOptions)
    for one in fields(TrtllmOptions):
        object.__setattr__(unchecked, one.name, values.get(one.name, one.default))
    return list(unchecked.find_problems())


_COUNTS = (
    "max_batch_size", "max_beam_width", "max_tokens_in_paged_kv_cache", "lora_cache_optimal_adapter_size",
    "lora_cache_max_adapter_size", "lora_cache_host_memory_bytes", "num_nodes", "instances", "preprocessing_instances",
    "postprocessing_instances", "bls_instances", "cancellation_check_period_ms", "stats_check_period_ms",
)  # fmt: skip
_SIZES = (
    "sink_token_length", "kv_cache_host_memory_bytes", "cuda_graph_cache_size", "max_queue_delay_microseconds",
    "max_queue_size",
)  # fmt: skip
_FRACTIONS = ("kv_cache_free_gpu_mem_fraction", "lora_cache_gpu_memory_fraction", "gpu_weights_percent")
_CHOICES: dict[str, tuple[str, ...]] = {
    "batching_strategy": ("inflight_fused_batching", "inflight_batching"),
    "batch_scheduler_policy": ("guaranteed_no_evict", "max_utilization"),
    "decoding_mode": DECODING_MODES,
    "guided_decoding_backend": ("xgrammar",),
    "chat_template": ("off", "user", "messages"),
}


def format_groups(groups: Groups) -> str:
    """As the backend reads it: "0,1;2,3"."""
    return ";".join(",".join(map(str, group)) for group in groups)
