"""The modules of an export, by the checkpoint's own names: what every scheme has in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from trtbuild.checkpoints.families import family_of
from trtbuild.checkpoints.precision import SAFETENSORS_16BIT, LinearForm
from trtbuild.checkpoints.rank_checkpoint import RankCheckpoint
from trtbuild.checkpoints.rank_tensors import TensorSpec
from trtbuild.checkpoints.safetensors_file import torch_dtype
from trtbuild.engines.export.rank_parts import RankParts, Weight
from trtbuild.engines.export.tensors import ExportTensor

# Their files' names for what is no linear layer though it is a matrix.
_NO_MODULES = ("embedding",)
# Parts of a dense MLP that engines join (q, k and v are one with us too).
_JOINED = ("gate", "up")


@dataclass(frozen=True)
class Module:
    """A quantized linear module: `name` is the checkpoint's (without `.weight`), `group_size` int4's in the export.

    `expert`: it belongs to a layer of routed experts.
    """

    name: str
    weight: Weight
    form: LinearForm
    group_size: int | None
    expert: bool

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]"""
        return self.weight.shape[0], self.weight.shape[1]


class ModuleList:
    """A rank checkpoint as the modules of a Hugging Face one."""

    def __init__(self, checkpoint: RankCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.parts = RankParts(checkpoint)
        self.dtype = SAFETENSORS_16BIT[checkpoint.precision.dtype]
        self._family = family_of(checkpoint.config.architecture)

    def __iter__(self) -> Iterator[Module | ExportTensor]:
        """In the order of the network: quantized modules, and the tensors that stay as they are."""
        for weight in self.parts.weights:
            name = self._family.source_name(weight.canonical)
            yield self._module(name, weight) if weight.form is not None else self._plain(name, weight)

    @property
    def unquantized(self) -> list[str]:
        """The linear modules in 16 bit; lm_head among them also where it is the embedding."""
        found = [
            self._family.source_name(weight.canonical).removesuffix(".weight")
            for weight in self.parts.weights
            if len(weight.shape) == 2 and weight.form is None and weight.canonical not in _NO_MODULES
        ]
        return found if "lm_head" in found else [*found, "lm_head"]

    @cached_property
    def group_size(self) -> int | None:
        """Of all int4 modules together: larger groups repeat their scales, for engines that take one size only."""
        sizes = {weight.linear.group_size for weight in self.parts.weights if weight.linear is not None}
        return math.gcd(*(size for size in sizes if size)) or None

    def group_scales(self, module: Module) -> ExportTensor:
        """int4's scales [out, in / group_size]."""
        assert module.group_size
        repeats = self.repeats(module)
        spec = TensorSpec(
            f"{module.name}.weight_scale", self.dtype, (module.shape[0], module.shape[1] // module.group_size)
        )
        return ExportTensor(
            spec,
            self.rows_of(module.weight, "weights_scaling_factor", lambda rows: rows.repeat_interleave(repeats, 1)),
        )

    def repeats(self, module: Module) -> int:
        """Groups of the export for each of the ranks'."""
        linear = module.weight.linear
        assert linear is not None and linear.group_size and module.group_size
        return linear.group_size // module.group_size

    def notes(self) -> Iterator[str]:
        """What is not to the bit: routers that took up AWQ's scales are float32 with us."""
        routers = [weight for weight in self.parts.weights if weight.canonical.endswith(".router")]
        rounded = [weight for weight in routers if not self._is_exact(weight)]
        if rounded:
            yield (
                f"{len(rounded)} of {len(routers)} routers are rounded from float32 to "
                f"{self.checkpoint.precision.dtype}, which is what other engines hold them in"
            )

    def fusion_problems(self) -> Iterator[str]:
        """Layers that other engines join, and that are quantized differently here."""
        joined: dict[str, dict[str, str]] = {}
        for weight in self.parts.weights:
            stem, _, part = weight.canonical.rpartition(".")
            if len(weight.shape) == 2 and (part in _JOINED or ".experts." in stem):
                group = stem.partition(".experts.")[0] + (".experts" if ".experts." in stem else ".mlp")
                form = weight.form.format if weight.form is not None else self.checkpoint.precision.dtype
                joined.setdefault(group, {}).setdefault(form, self._family.source_name(weight.canonical))
        for forms in joined.values():
            if len(forms) > 1:
                listed = ", ".join(f"{name.removesuffix('.weight')} is {form}" for form, name in forms.items())
                yield f"{listed}: other engines compute them as one, in one precision; choose one that is not auto"
                return

    def _is_exact(self, weight: Weight) -> bool:
        exact = self.parts.rows(weight, "weight", 0, weight.shape[0])
        return torch.equal(exact.to(torch_dtype(self.dtype)).to(exact.dtype), exact)

    def rows_of(
        self, weight: Weight, role: str, change: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows
    ) -> Callable[[int, int], torch.Tensor]:
        """For `ExportTensor`: a role's rows, changed."""
        return lambda start, stop: change(self.parts.rows(weight, role, start, stop))

    def _module(self, name: str, weight: Weight) -> Module:
        linear, form = weight.linear, weight.form
        assert linear is not None and form is not None
        group = self.group_size if form.format == "int4" else None
        return Module(name.removesuffix(".weight"), weight, form, group, expert=linear.num_experts is not None)

    def _plain(self, name: str, weight: Weight) -> ExportTensor:
        """In the model's 16-bit type, which no engine's reader wants otherwise: ours is float32 of a router alone."""
        dtype = torch_dtype(self.dtype)
        spec = TensorSpec(name, self.dtype, weight.shape)
        return ExportTensor(spec, self.rows_of(weight, "weight", lambda rows: rows.to(dtype)))
