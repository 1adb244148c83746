"""What a config.json's `quantization_config` says, in our own words: which modules are quantized, and how."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from trtbuild.checkpoints.precision import LinearForm

# How the files hold a module: AutoAWQ's and GPTQ's columns of nibbles, compressed-tensors' rows of them, ModelOpt's
# pairs of rows, plain int8, or plain fp8.
PackingName = Literal["awq", "gptq", "packed", "pairs", "int8", "fp8"]


@dataclass(frozen=True)
class Scheme:
    """How one quantized module is held.

    `group_size` None is a whole row. `rows`: fp8 weights have a scale for every output row. `zero_offset` is added to
    a packed zero point; where the sum leaves the type, only `wraps` says what is meant. `act_order` and `symmetric` are
    the config's word, which the tensors may be simpler than.
    """

    packing: PackingName
    origin: str
    bits: int
    group_size: int | None = None
    symmetric: bool = True
    act_order: bool = False
    zero_offset: int = 0
    wraps: bool = False
    rows: bool = False
    activations: Literal["static", "dynamic"] | None = None

    def form(self) -> LinearForm:
        """The form that holds such a module, as far as the config tells."""
        if self.packing == "fp8":
            return (
                LinearForm("fp8", row_scales=self.rows) if self.activations == "static" else LinearForm("fp8-dynamic")
            )
        if self.bits == 8:
            return LinearForm("int8")
        return LinearForm("int4", self.group_size, zeros=not self.symmetric, order=self.act_order)


@dataclass(frozen=True)
class HubQuantization:
    """A checkpoint's quantization. `schemes` gives, in order of precedence, the targets of each scheme.

    A target or an ignored name is a module's name, a part of one, a class ("Linear"), or "re:" and a pattern. `notes`
    tell where we compute something else than the tool that made the checkpoint.
    """

    schemes: tuple[tuple[tuple[str, ...], Scheme], ...]
    ignored: tuple[str, ...] = ()
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def scheme_of(self, module: str) -> Scheme:
        """How the files hold this module, if they hold it quantized."""
        scheme = next(
            (scheme for targets, scheme in self.schemes if any(matches(target, module) for target in targets)),
            self.schemes[0][1],
        )
        for pattern, changes in self._overrides(module):
            if not pattern.startswith("-:"):
                scheme = _changed(scheme, changes)
        return scheme

    def expects(self, module: str) -> bool:
        """Whether the config says that this module is quantized; the tensors have the last word."""
        if module == "lm_head" and not any("lm_head" in target for targets, _ in self.schemes for target in targets):
            return False
        if any(matches(name, module) for name in self.ignored):
            return False
        if any(pattern.startswith("-:") for pattern, _ in self._overrides(module)):
            return False
        return any(matches(target, module) for targets, _ in self.schemes for target in targets)

    def _overrides(self, module: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """GPTQModel's `dynamic`: the first pattern that matches the beginning of a module's name."""
        for pattern, changes in self.overrides.items():
            if re.match(pattern.removeprefix("+:").removeprefix("-:"), module):
                yield pattern, changes
                return


def _changed(scheme: Scheme, changes: Mapping[str, Any]) -> Scheme:
    group = changes.get("group_size", scheme.group_size)
    return replace(
        scheme,
        bits=changes.get("bits", scheme.bits),
        group_size=None if group in (None, -1) else group,
        symmetric=changes.get("sym", scheme.symmetric),
        act_order=changes.get("desc_act", scheme.act_order),
    )


def matches(target: str, module: str) -> bool:
    """Whether a target or an ignored name means this linear module."""
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target == "Linear" or f".{target}." in f".{module}."
