"""What `--precision` means for each linear layer, and what a rank's slice allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from trtbuild.errors import Refused

# What a linear layer's weights are stored as and computed in.
FormatName = Literal["bf16", "fp16", "fp8", "fp8-dynamic", "int8", "int4"]
FORMATS: tuple[FormatName, ...] = get_args(FormatName)
# What can be asked for: a format; a calibrated way to reach one; or the best mixture for a number of bytes.
PrecisionName = Literal[
    "bf16", "fp16", "fp8", "fp8-dynamic", "int8", "int4",
    "int4-awq", "int4-awq-asym", "int4-gptq", "int4-gptq-asym", "auto",
]  # fmt: skip
PRECISIONS: tuple[PrecisionName, ...] = get_args(PrecisionName)
# Precisions whose values follow from activations, which a calibration has to see. (fp8's activation scales do too.)
CALIBRATED: dict[PrecisionName, FormatName] = {
    "int4-awq": "int4", "int4-awq-asym": "int4", "int4-gptq": "int4", "int4-gptq-asym": "int4", "auto": "int4",
}  # fmt: skip
# Those with a zero point in each int4 group.
ASYMMETRIC: tuple[PrecisionName, ...] = ("int4-awq-asym", "int4-gptq-asym")

# Whose rank tensors: those of our own network, or those that trtllm-build reads.
Dialect = Literal["tensorrt-rtx", "tensorrt-llm"]
# TensorRT-LLM quantizes these itself while it builds, from 16-bit weights: it permutes them for the GPU at hand, and a
# checkpoint that was quantized before would be right on one architecture and garbage on another.
DEFERRED: dict[PrecisionName, str] = {"int8": "W8A16", "int4": "W4A16"}

# Groups that TensorRT-RTX's block dequantization compiles for, in the order in which we prefer them.
INT4_GROUPS = (128, 64, 32, 16)

SAFETENSORS_16BIT = {"bf16": "BF16", "fp16": "F16"}


@dataclass(frozen=True)
class LinearForm:
    """How one linear layer's weights are held. `order` and `row_scales` are False in what we quantize ourselves.

    `group_size` bounds the int4 groups (None: 128); a rank may need smaller ones. `zeros`: int4 values have a zero
    point in each group. `order`: the groups are over the input in another order (GPTQ's act-order). `row_scales`: fp8
    weights with static activations have a scale for every output row.
    """

    format: FormatName
    group_size: int | None = None
    zeros: bool = False
    order: bool = False
    row_scales: bool = False

    @property
    def is_quantized(self) -> bool:
        return self.format not in ("bf16", "fp16")


@dataclass(frozen=True)
class Precision:
    """The precision of the quantized linear layers, and the 16-bit type of everything else.

    Router, norms, embeddings and lm_head always stay in `dtype` (the router in float32, as TensorRT-LLM keeps it).
    `modules` are the linear layers (global names) that are held otherwise than `weights` says: all of them where it
    says "auto" or the checkpoint was quantized before. `group_size` bounds all int4 groups, `fp8_cache` asks for a
    scale of the KV cache; both are for the dialect `tensorrt-llm` alone.
    """

    weights: PrecisionName
    dtype: Literal["bf16", "fp16"]
    modules: tuple[tuple[str, LinearForm], ...] = ()
    dialect: Dialect = "tensorrt-rtx"
    group_size: int | None = None
    fp8_cache: bool = False
    _forms: Mapping[str, LinearForm] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_forms", dict(self.modules))

    @classmethod
    def resolve(cls, name: PrecisionName, model_dtype: Literal["bf16", "fp16"]) -> Precision:
        """`bf16` and `fp16` name both types; a quantized precision keeps the checkpoint's own 16-bit type."""
        return cls(name, name if name in ("bf16", "fp16") else model_dtype)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Precision:
        """Inverse of `to_dict`; raises TypeError on an unknown field."""
        modules = tuple((name, LinearForm(**form)) for name, form in data.get("modules", {}).items())
        return cls(**{**data, "modules": modules})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; without what is as it mostly is."""
        data: dict[str, Any] = {"weights": self.weights, "dtype": self.dtype}
        if self.dialect != "tensorrt-rtx":
            data |= {"dialect": self.dialect, "group_size": self.group_size, "fp8_cache": self.fp8_cache}
        default = LinearForm("bf16")
        if self.modules:
            data["modules"] = {
                name: {k: v for k, v in vars(form).items() if k == "format" or v != getattr(default, k)}
                for name, form in self.modules
            }
        return data

    def with_modules(self, modules: Mapping[str, LinearForm]) -> Precision:
        """The same with these linear layers held as given."""
        return replace(self, modules=tuple(sorted(modules.items())))

    def form_of(self, linear: str) -> LinearForm:
        """How the linear layer of this global name is held."""
        if linear in self._forms:
            return self._forms[linear]
        if self.is_deferred:
            return LinearForm(self.dtype)
        return LinearForm(as_format(self.weights), self.group_size, zeros=self.weights in ASYMMETRIC)

    @property
    def is_deferred(self) -> bool:
        """Whether weights are held in 16 bit because the builder quantizes them."""
        return self.dialect == "tensorrt-llm" and self.weights in DEFERRED and not self.modules

    @property
    def is_quantized(self) -> bool:
        return self.weights not in ("bf16", "fp16") or any(form.is_quantized for _, form in self.modules)


def as_format(name: PrecisionName) -> FormatName:
    """The format that a precision ends in."""
    for found in FORMATS:
        if found == CALIBRATED.get(name, name):
            return found
    raise ValueError(name)


def int4_group(in_features: int, module: str, largest: int | None = None) -> int:
    """Largest supported group that divides a rank's input slice (and `largest`), 128 where possible.

    Raises `Refused` when not even the smallest divides it.
    """
    for group in INT4_GROUPS:
        if in_features % group == 0 and (largest or group) % group == 0:
            return group
    raise Refused(
        f"int4: the input of {module} is {in_features} wide on a rank, which no group of {INT4_GROUPS} divides; "
        "use a smaller --tp (or --moe-ep instead of --moe-tp), or --precision int8"
    )
