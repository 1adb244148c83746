"""Quantizes the linear layers of one decoder layer, one after the other, and gives what to store of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from trtbuild.checkpoints.precision import int4_group
from trtbuild.checkpoints.quantization import QuantizedWeight
from trtbuild.checkpoints.rank_tensors import Linear
from trtbuild.engines.calibration.inputs import Inputs
from trtbuild.engines.calibration.int4 import compensate
from trtbuild.engines.calibration.int4_grid import GridForm, choose_grid, round_to_grid, widest_grid
from trtbuild.engines.calibration.memory import trim_heap
from trtbuild.engines.calibration.smoothing import RowFold, folds, search
from trtbuild.engines.reference.torch_weights import TorchWeights
from trtbuild.errors import CheckpointError


@dataclass(frozen=True)
class Method:
    """How int4 values are found.

    smooth: with AWQ's scales, folded into what comes before; a mixture of experts is clipped too, a dense model is not
    (engines/README.md has what was measured).
    compensate: with GPTQ's compensation of the rounding error, after a search of where to clip.
    zero_points: each group has one.
    """

    smooth: bool
    compensate: bool
    zero_points: bool = False


METHODS = {
    "int4-awq": Method(smooth=True, compensate=False),
    "int4-awq-asym": Method(smooth=True, compensate=False, zero_points=True),
    "int4-gptq": Method(smooth=False, compensate=True),
    "int4-gptq-asym": Method(smooth=False, compensate=True, zero_points=True),
}


@dataclass(frozen=True)
class StoredPart:
    """One source weight after quantization: `weight` [rows, in] with scales in the 16-bit type."""

    weight: QuantizedWeight
    error_squares: float
    weight_squares: float


@dataclass
class LayerResult:
    """By canonical name: the quantized weights, and the unquantized ones that took up scales."""

    stored: dict[str, StoredPart] = field(default_factory=dict)
    plain: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens_per_expert: tuple[int, ...] = ()


class LayerQuantizer:
    """`weight` is called for each linear layer (or expert) in the order of execution, then `result`."""

    def __init__(
        self, weights: TorchWeights, method: Method, dtype: torch.dtype, only: frozenset[str] | None = None
    ) -> None:
        """`weights` hold one decoder layer of the whole model (tp 1) in 16 bit; `dtype` is that type.

        `only` are the global names of the linear layers to quantize, where the others stay as `weights` have them.
        """
        self._weights, self._method, self._dtype, self._only = weights, method, dtype, only
        self._prefix = "transformer.layers.0."
        plan = weights.plan
        self._linears = {linear.name.removeprefix(self._prefix): linear for linear in plan.linears}
        taken = {name for name, linear in self._linears.items() if self.takes(linear)}
        norm_folds, row_folds = folds(plan.config, plan.layers[0]) if method.smooth else ([], [])
        # A scale is folded where every layer that it changes is quantized here.
        self._norm_folds = [fold for fold in norm_folds if taken.issuperset(fold.linears)]
        self._row_folds = [fold for fold in row_folds if taken.issuperset((fold.producer, fold.linear))]
        self._found: dict[tuple[str, int | None], QuantizedWeight] = {}
        self._errors: dict[tuple[str, int | None], torch.Tensor] = {}
        # s of each norm, and what rows of a producer are divided by: [out], 1 elsewhere.
        self._norm_scales: dict[str, torch.Tensor] = {}
        self._row_scales: dict[tuple[str, int | None], torch.Tensor] = {}
        self._tokens_per_expert: tuple[int, ...] = ()

    def takes(self, linear: Linear) -> bool:
        """Whether this layer is quantized here."""
        return self._only is None or linear.global_name in self._only

    def count_tokens(self, indices: torch.Tensor, num_experts: int) -> None:
        """Record how many tokens the router sends to each expert; indices [tokens, top_k]."""
        self._tokens_per_expert = tuple(torch.bincount(indices.flatten().long(), minlength=num_experts).tolist())

    def prepare(self, name: str, inputs: Inputs) -> None:
        """Choose the scales of a norm by all of its output, before its first reader sees a part of it."""
        if self._method.smooth:
            linear = self._linears[name.removeprefix(self._prefix)]
            self._input_scale(name.removeprefix(self._prefix), None, inputs, self._form(linear))

    def weight(self, linear: Linear, expert: int | None, inputs: Inputs) -> torch.Tensor:
        """Quantize one matrix for its inputs: what it is worth in the original network, float32 [out, in].

        Raises CheckpointError where the inputs are not finite.
        """
        name = linear.name.removeprefix(self._prefix)
        trim_heap()
        if not bool(inputs.magnitude().sum().isfinite()):
            raise CheckpointError(
                f"calibration: the input of {linear.global_name} is not finite; the checkpoint or its dtype is damaged"
            )
        form = self._form(linear)
        scale = self._input_scale(name, expert, inputs, form)
        matrix = self._matrix(name, expert).float()
        clip = self._method.compensate or self._weights.plan.config.moe is not None
        found = self._rounded(matrix if scale is None else matrix * scale, scale, inputs, form, clip=clip)
        self._found[name, expert] = found
        effective = found.dequantize()
        if scale is not None:
            effective /= scale
        self._errors[name, expert] = torch.stack([(effective - matrix).square().sum(1), matrix.square().sum(1)])
        return effective

    def _rounded(
        self, matrix: torch.Tensor, scale: torch.Tensor | None, inputs: Inputs, form: GridForm, *, clip: bool
    ) -> QuantizedWeight:
        """A matrix [out, in] that `scale` has been multiplied into."""
        if not clip:
            return round_to_grid(matrix, widest_grid(matrix, form))
        second = inputs.moments(fitted=self._method.compensate)
        if scale is not None:
            second.div_(scale).div_(scale.unsqueeze(-1))
        grid = choose_grid(matrix, second, form)
        return compensate(matrix, grid, second) if self._method.compensate else round_to_grid(matrix, grid)

    def _form(self, linear: Linear) -> GridForm:
        group = int4_group(linear.in_features, linear.global_name)
        return GridForm(group, self._dtype, self._method.zero_points)

    def _matrix(self, name: str, expert: int | None) -> torch.Tensor:
        weight = self._weights.linears[self._prefix + name].weight
        return weight if expert is None else weight[expert]

    def _input_scale(self, name: str, expert: int | None, inputs: Inputs, form: GridForm) -> torch.Tensor | None:
        """s [in] of a layer's input, None where it stays as it is; the same for all layers that read one norm."""
        if not self._method.smooth:
            return None
        for fold in self._norm_folds:
            if name in fold.linears:
                if fold.norm not in self._norm_scales:
                    readers = self._readers(fold.linears)
                    found = search(readers, inputs.magnitude(), inputs.sample(), form)
                    self._norm_scales[fold.norm] = self._representable(fold.norm, found)
                return self._norm_scales[fold.norm]
        for fold in self._row_folds:
            if name == fold.linear:
                matrix, magnitude = self._matrix(name, expert), inputs.magnitude()
                found = search([matrix], magnitude, inputs.sample(), form, fold)
                self._divide_rows(fold, expert, found)
                return found
        return None

    def _readers(self, names: tuple[str, ...]) -> list[torch.Tensor]:
        """Every matrix that reads a norm's output: of fused ones their sources, of experts each one's."""
        found: list[torch.Tensor] = []
        for name in names:
            weight, linear = self._weights.linears[self._prefix + name].weight, self._linears[name]
            for expert, matrix in enumerate(weight if weight.dim() == 3 else [weight]):
                mine = expert if weight.dim() == 3 else None
                found += [torch.cat([matrix[part] for part in rows]) for rows in _sources(linear, mine).values()]
        return found

    def _representable(self, norm: str, scale: torch.Tensor) -> torch.Tensor:
        """s so that weight / s is a 16-bit number: folding it then costs nothing."""
        weight = self._weights.plain[f"{self._prefix}{norm}.weight"].float()
        folded = (weight / scale).to(self._dtype).float()
        return torch.where(folded != 0, weight / folded, 1.0)

    def _divide_rows(self, fold: RowFold, expert: int | None, scale: torch.Tensor) -> None:
        per_row = scale.unflatten(0, (fold.heads, fold.repeats, -1))[:, 0].flatten()
        rows = scale.new_ones(self._linears[fold.producer].out_features)
        rows[fold.first : fold.first + len(per_row)] = per_row
        self._row_scales[fold.producer, expert] = rows

    def result(self) -> LayerResult:
        """What is stored: quantized weights with folded scales, and norms, router and biases that took up scales."""
        result = LayerResult(tokens_per_expert=self._tokens_per_expert)
        for (name, expert), found in self._found.items():
            rows = self._row_scales.get((name, expert))
            scales = found.scales if rows is None else found.scales / rows.unsqueeze(-1)
            whole = QuantizedWeight(found.values, scales.to(self._dtype), found.zeros)
            self._split(result, self._linears[name], expert, whole, self._errors[name, expert])
            if rows is not None and self._linears[name].has_bias:
                self._split_bias(result, self._linears[name], rows)
        for fold in self._norm_folds:
            scale = self._norm_scales[fold.norm]
            self._add_plain(result, f"{fold.norm}.weight", 1 / scale)
            for name in fold.scaled_plain:
                self._add_plain(result, name, scale)
        return result

    def _split(
        self, result: LayerResult, linear: Linear, expert: int | None, whole: QuantizedWeight, errors: torch.Tensor
    ) -> None:
        """Cut a fused matrix back into its sources."""
        for source, rows in _sources(linear, expert).items():
            cut = QuantizedWeight(
                torch.cat([whole.values[part] for part in rows]),
                torch.cat([whole.scales[part] for part in rows]),
                None if whole.zeros is None else torch.cat([whole.zeros[part] for part in rows]),
            )
            error, weight = (float(sum(float(errors[i, part].sum()) for part in rows)) for i in (0, 1))
            result.stored[source] = StoredPart(cut, error, weight)

    def _split_bias(self, result: LayerResult, linear: Linear, rows: torch.Tensor) -> None:
        bias = self._weights.plain[f"{linear.name}.bias"].float() / rows
        parts: dict[str, list[torch.Tensor]] = {}
        for piece in sorted(linear.bias_pieces, key=lambda piece: piece.rows.start):
            parts.setdefault(piece.source, []).append(bias[piece.offset : piece.offset + len(piece.rows)])
        for source, found in parts.items():
            result.plain[source] = torch.cat(found).to(self._dtype)

    def _add_plain(self, result: LayerResult, name: str, factor: torch.Tensor) -> None:
        weight = self._weights.plain[self._prefix + name]
        [tensor] = [t for t in self._weights.plan.plain if t.spec.name == self._prefix + name]
        dtype = torch.float32 if tensor.spec.dtype == "F32" else self._dtype
        result.plain[tensor.pieces[0].source] = (weight.float() * factor).to(dtype)


def _sources(linear: Linear, expert: int | None) -> dict[str, list[slice]]:
    """Rows of a matrix by the source weight that they come from, in the source's order."""
    parts: dict[str, list[slice]] = {}
    for piece in sorted(linear.pieces, key=lambda piece: piece.rows.start):
        if piece.expert == expert:
            parts.setdefault(piece.source, []).append(slice(piece.offset, piece.offset + len(piece.rows)))
    return parts
