"""The precision that keeps a quantized checkpoint as it is, and its activation scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import FormatName, LinearForm, Precision
from trtbuild.checkpoints.quantization import FP8_MAX, StoredWeight
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.rank_tensors import Linear, RankPlan
from trtbuild.errors import Refused

if TYPE_CHECKING:
    from trtbuild.checkpoints.convert import ActivationRange
    from trtbuild.checkpoints.source import CheckpointSource

_Stored = Callable[[str], StoredWeight | None]


def kept_precision(source: CheckpointSource, dtype: Literal["bf16", "fp16"], *, weights: bool = True) -> Precision:
    """The form of every linear layer in which the checkpoint's quantized values are kept, the rest in 16 bit.

    A layer whose parts are quantized otherwise from each other, or not all, is held in 16 bit. Without `weights` it is
    what config.json says, where the tensors may be simpler: no zero points, groups in their own order, one fp8 scale
    for the parts of a layer. Raises `Refused` for orders of columns that a layer cannot hold.
    """
    stored: _Stored = source.stored if weights else lambda canonical: _planned(source, canonical)
    plan = plan_rank(source.config, Layout().rank(0), Precision(dtype, dtype))
    forms = {linear.global_name: _kept_form(linear, stored, source, weights) for linear in plan.linears}
    forms = {name: form or LinearForm(dtype) for name, form in forms.items()}
    quantized: list[FormatName] = [form.format for form in forms.values() if form.is_quantized]
    commonest: FormatName = max(quantized, key=quantized.count) if quantized else dtype
    return Precision(commonest, dtype).with_modules(forms)


def activation_ranges(source: CheckpointSource, plans: Sequence[RankPlan]) -> dict[str, ActivationRange]:
    """Largest activation at each linear layer with static fp8, by global name, as the checkpoint's scales give it.

    The largest of a layer's parts: they share its input, and the engine's one scale for it.
    """
    from trtbuild.checkpoints.convert import ActivationRange

    largest: dict[str, float] = {}
    for linear in (linear for plan in plans for linear in plan.linears if linear.precision == "fp8"):
        for name in _sources(linear):
            stored = source.stored(name)
            if stored is not None and stored.activation_scale is not None:
                amax = stored.activation_scale * FP8_MAX
                largest[linear.global_name] = max(amax, largest.get(linear.global_name, 0.0))
    return {name: ActivationRange(amax) for name, amax in largest.items()}


def _sources(linear: Linear) -> tuple[str, ...]:
    return tuple(dict.fromkeys(piece.source for piece in linear.pieces))


def _planned(source: CheckpointSource, canonical: str) -> StoredWeight | None:
    """What config.json says of a weight."""
    module = source.family.source_name(canonical).removesuffix(".weight")
    if source.quantization is None or not source.quantization.expects(module):
        return None
    scheme = source.quantization.scheme_of(module)
    return StoredWeight(scheme.form(), scheme.origin)


def _kept_form(linear: Linear, stored: _Stored, source: CheckpointSource, weights: bool) -> LinearForm | None:
    """The form that holds all of a layer's sources as they are stored; None where there is none."""
    found = {name: facts for name in _sources(linear) if (facts := stored(name)) is not None}
    formats: set[FormatName] = {facts.form.format for facts in found.values()}
    if len(found) < len(_sources(linear)) or len(formats) != 1:
        return None
    forms = [facts.form for facts in found.values()]
    sizes = [form.group_size for form in forms if form.group_size]
    return LinearForm(
        formats.pop(),
        group_size=math.gcd(*sizes) if sizes else None,
        zeros=any(form.zeros for form in forms),
        order=_has_order(linear, found),
        row_scales=_has_row_scales(linear, forms, source if weights else None),
    )


def _has_order(linear: Linear, found: Mapping[str, StoredWeight]) -> bool:
    """Whether the groups of all sources lie in one order; Refused where each has its own."""
    if not any(facts.form.order for facts in found.values()):
        return False
    orders = {None if facts.order is None else tuple(facts.order.tolist()) for facts in found.values()}
    if linear.num_experts is not None or len(orders) > 1:
        whose = "the experts'" if linear.num_experts is not None else "its parts'"
        raise Refused(
            f"{linear.global_name}: {whose} groups lie in orders of their own (GPTQ with desc_act, or actorder), "
            "and the layer has one input; use a checkpoint without act-order, or a --precision that encodes it again"
        )
    return True


def _has_row_scales(linear: Linear, forms: Sequence[LinearForm], source: CheckpointSource | None) -> bool:
    """Whether static fp8 needs a scale for every row: the sources have them, or those of a layer have one each."""
    if any(form.format != "fp8" for form in forms):
        return False
    if any(form.row_scales for form in forms):
        return True
    parts: dict[int | None, set[str]] = {}
    for piece in linear.pieces:
        parts.setdefault(piece.expert, set()).add(piece.source)
    if source is None:
        return any(len(names) > 1 for names in parts.values())
    scales = ({_tensor_scale(source, name) for name in names} for names in parts.values())
    return any(len(found) > 1 for found in scales)


def _tensor_scale(source: CheckpointSource, canonical: str) -> float:
    return float(source.stored_rows(canonical, 0, 1).scales[0])
