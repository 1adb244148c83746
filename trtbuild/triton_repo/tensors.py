"""The tensors of our Triton models: one table that the configuration is generated from and requests are read by.

Names, types and dimensions are those of TensorRT-LLM's `ensemble` (text) and `tensorrt_llm` (token ids), so that its
clients go on working; those that TensorRT-LLM does not have say so. Dimensions are without the batch.
Free of numpy and Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DataType = Literal["STRING", "INT32", "UINT64", "FP32", "BOOL"]
ModelKind = Literal["text", "unary", "tokens"]

DEFAULT_MAX_TOKENS = 128
UNARY_SUFFIX = "-unary"
TOKENS_SUFFIX = "-tokens"


@dataclass(frozen=True)
class Tensor:
    """`parameter` is the field of SamplingParams that an input sets; None where it means something else."""

    name: str
    dtype: DataType
    dims: tuple[int, ...] = (1,)
    parameter: str | None = None
    required: bool = False

    @property
    def is_list(self) -> bool:
        return self.dims != (1,)


def _sampling(top_k: str, top_p: str, min_p: str) -> tuple[Tensor, ...]:
    return (
        Tensor("temperature", "FP32", parameter="temperature"),
        Tensor(top_k, "INT32", parameter="top_k"),
        Tensor(top_p, "FP32", parameter="top_p"),
        Tensor(min_p, "FP32", parameter="min_p"),
        Tensor("seed", "UINT64", parameter="seed"),
        Tensor("repetition_penalty", "FP32", parameter="repetition_penalty"),
        Tensor("presence_penalty", "FP32", parameter="presence_penalty"),
        Tensor("frequency_penalty", "FP32", parameter="frequency_penalty"),
        Tensor("min_tokens", "INT32", parameter="min_tokens"),
        Tensor("guided_decoding_guide_type", "STRING", parameter="guide_type"),
        Tensor("guided_decoding_guide", "STRING", parameter="guide"),
        Tensor("end_id", "INT32"),
        Tensor("pad_id", "INT32"),
        Tensor("beam_width", "INT32"),
        Tensor("num_return_sequences", "INT32"),
        Tensor("return_log_probs", "BOOL"),
        Tensor("exclude_input_in_output", "BOOL"),
        # Ours from here on.
        Tensor("ignore_eos", "BOOL", parameter="ignore_eos"),
        Tensor("stop_token_ids", "INT32", (-1,), "stop_token_ids"),
    )


TEXT_INPUTS: tuple[Tensor, ...] = (
    Tensor("text_input", "STRING", required=True),
    Tensor("max_tokens", "INT32", parameter="max_tokens"),
    Tensor("stream", "BOOL"),
    Tensor("stop_words", "STRING", (-1,), "stop"),
    Tensor("bad_words", "STRING", (-1,), "bad"),
    *_sampling("top_k", "top_p", "min_p"),
    Tensor("messages", "STRING"),
    Tensor("tools", "STRING"),
    Tensor("input_ids", "INT32", (-1,)),
    Tensor("num_top_logprobs", "INT32", parameter="logprobs"),
)

TOKEN_INPUTS: tuple[Tensor, ...] = (
    Tensor("input_ids", "INT32", (-1,), required=True),
    Tensor("input_lengths", "INT32"),
    Tensor("request_output_len", "INT32", parameter="max_tokens"),
    Tensor("streaming", "BOOL"),
    # [2, n]: token ids of all words, then where each ends, padded with -1.
    Tensor("stop_words_list", "INT32", (2, -1)),
    Tensor("bad_words_list", "INT32", (2, -1)),
    *_sampling("runtime_top_k", "runtime_top_p", "runtime_min_p"),
)

_OUTPUTS: tuple[Tensor, ...] = (
    Tensor("sequence_length", "INT32", (-1,)),
    Tensor("cum_log_probs", "FP32", (-1,)),
    Tensor("output_log_probs", "FP32", (-1, -1)),
    Tensor("num_input_tokens", "INT32", (-1,)),
    Tensor("num_output_tokens", "INT32", (-1,)),
    Tensor("batch_index", "INT32", (-1,)),
    Tensor("sequence_index", "INT32", (-1,)),
    # Ours.
    Tensor("finish_reason", "STRING", (-1,)),
)
TEXT_OUTPUTS: tuple[Tensor, ...] = (
    Tensor("text_output", "STRING", (-1,)),
    Tensor("token_logprobs", "STRING", (-1,)),
    *_OUTPUTS,
)
TOKEN_OUTPUTS: tuple[Tensor, ...] = (Tensor("output_ids", "INT32", (-1, -1)), *_OUTPUTS)


def inputs_of(kind: ModelKind) -> tuple[Tensor, ...]:
    return TOKEN_INPUTS if kind == "tokens" else TEXT_INPUTS


def outputs_of(kind: ModelKind) -> tuple[Tensor, ...]:
    return TOKEN_OUTPUTS if kind == "tokens" else TEXT_OUTPUTS


def model_name(name: str, kind: ModelKind) -> str:
    """The Triton model of that kind for the engine `name`."""
    return name + {"text": "", "unary": UNARY_SUFFIX, "tokens": TOKENS_SUFFIX}[kind]
