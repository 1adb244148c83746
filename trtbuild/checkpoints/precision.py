"""What `--precision` means for each linear layer, and what a rank's slice allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from trtbuild.errors import Refused

PrecisionName = Literal["bf16", "fp16", "fp8", "int8", "int4"]
PRECISIONS: tuple[PrecisionName, ...] = get_args(PrecisionName)

# Groups that TensorRT-RTX's block dequantization compiles for, in the order in which we prefer them.
INT4_GROUPS = (128, 64, 32, 16)

SAFETENSORS_16BIT = {"bf16": "BF16", "fp16": "F16"}


@dataclass(frozen=True)
class Precision:
    """The precision of the quantized linear layers, and the 16-bit type of everything else.

    Router, norms, embeddings and lm_head always stay in `dtype` (the router in float32, as TensorRT-LLM keeps it).
    """

    weights: PrecisionName
    dtype: Literal["bf16", "fp16"]

    @classmethod
    def resolve(cls, name: PrecisionName, model_dtype: Literal["bf16", "fp16"]) -> Precision:
        """`bf16` and `fp16` name both types; a quantized precision keeps the checkpoint's own 16-bit type."""
        return cls(name, name if name in ("bf16", "fp16") else model_dtype)

    @property
    def is_quantized(self) -> bool:
        return self.weights not in ("bf16", "fp16")


def int4_group(in_features: int, module: str) -> int:
    """Largest supported group that divides a rank's input slice, 128 where possible.

    Raises `Refused` when not even the smallest divides it.
    """
    for group in INT4_GROUPS:
        if in_features % group == 0:
            return group
    raise Refused(
        f"int4: the input of {module} is {in_features} wide on a rank, which no group of {INT4_GROUPS} divides; "
        "use a smaller --tp (or --moe-ep instead of --moe-tp), or --precision int8"
    )
