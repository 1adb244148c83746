"""The tensors that hold a quantized module, found among a checkpoint's and checked against what config.json implies.

X is a module's name, [out, in] its shape, g the inputs of a group (all of them in whole rows), w = 32 / bits the values
in an int32. A tensor of shape [] may also be [1].

    AutoAWQ      X.qweight [in, out/8]   X.qzeros [in/g, out/8]   X.scales [in/g, out]
    GPTQ         X.qweight [in/w, out]   X.qzeros [in/g, out/w]   X.scales [in/g, out]   (X.g_idx [in])
    packed       X.weight_packed [out, in/w]   X.weight_scale [out, in/g]   (X.weight_zero_point [out/w, in/g])
                 (X.weight_g_idx [in])   (X.weight_shape [2])
    ModelOpt     X.weight [out/2, in] or [out, in]   X.weight_scale [out, in/g] or [out]   (X.pre_quant_scale [in])
    fp8          X.weight [out, in]   X.weight_scale [], or [out, 1]   (X.input_scale [])   (X.input_scale_ub [1])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from trtbuild.checkpoints.hub_formats.scheme import HubQuantization, PackingName, Scheme
from trtbuild.checkpoints.safetensors_file import TensorEntry
from trtbuild.checkpoints.source_tensors import Shapes

# A module that has this tensor is quantized.
_WITNESS: dict[PackingName, str] = {
    "awq": "qweight", "gptq": "qweight", "packed": "weight_packed",
    "pairs": "weight", "int8": "weight", "fp8": "weight",
}  # fmt: skip
# What tells a quantized `weight` from one that was left in 16 bit.
_WITNESS_DTYPE: dict[PackingName, str] = {"pairs": "U8", "int8": "I8", "fp8": "F8_E4M3"}
_FLOATS, _INDEX = ("F16", "BF16", "F32"), ("I32", "I64")


@dataclass(frozen=True)
class StoredModule:
    """A quantized linear module of the files: its name, its shape [out, in], and the roles that have a tensor."""

    name: str
    shape: tuple[int, int]
    scheme: Scheme
    roles: frozenset[str]

    def tensor(self, role: str) -> str:
        """The name of the tensor in this role (`qweight`, `scales`, ...)."""
        return f"{self.name}.{role}"

    @property
    def tensors(self) -> list[str]:
        return [self.tensor(role) for role in sorted(self.roles)]

    @property
    def group_size(self) -> int:
        """Inputs of a group."""
        return self.scheme.group_size or self.shape[1]


@dataclass(frozen=True)
class _Wanted:
    """What a role's tensor must be; without `required` it may be left out."""

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    required: bool = True


def find_modules(
    entries: Mapping[str, TensorEntry], expected: Shapes, quantization: HubQuantization | None
) -> dict[str, StoredModule]:
    """The modules that the files hold quantized, by the name that their weight would have in 16 bit."""
    found: dict[str, StoredModule] = {}
    if quantization is None:
        return found
    for name, shape in expected.items():
        if len(shape) != 2 or not name.endswith(".weight"):
            continue
        module = name.removesuffix(".weight")
        scheme = quantization.scheme_of(module)
        witness = entries.get(f"{module}.{_WITNESS[scheme.packing]}")
        if witness is not None and witness.spec.dtype == _WITNESS_DTYPE.get(scheme.packing, witness.spec.dtype):
            roles = frozenset(role for role in _wanted(scheme, *shape) if f"{module}.{role}" in entries)
            found[name] = StoredModule(module, (shape[0], shape[1]), scheme, roles)
    return found


def module_problems(module: StoredModule, entries: Mapping[str, TensorEntry]) -> Iterator[str]:
    """What is missing of a quantized module, or has another type or shape than it must."""
    scheme, (out_features, in_features) = module.scheme, module.shape
    if scheme.packing not in ("int8", "fp8"):
        per_word = 2 if scheme.packing == "pairs" else 32 // scheme.bits
        packed = "output" if scheme.packing in ("awq", "pairs") else "input"
        if (out_features if packed == "output" else in_features) % per_word:
            yield f"{module.name}: {packed}s of {list(module.shape)} do not fill whole words of {per_word} values"
            return
        if in_features % module.group_size:
            yield f"{module.name}: its {in_features} inputs are no whole number of groups of {module.group_size}"
            return
    for role, wanted in _wanted(scheme, out_features, in_features).items():
        name = module.tensor(role)
        if role not in module.roles:
            if wanted.required:
                yield f"tensor {name!r} is missing"
            continue
        spec = entries[name].spec
        if spec.shape not in wanted.shapes:
            implied = " or ".join(str(list(shape)) for shape in wanted.shapes)
            yield f"tensor {name!r} has shape {list(spec.shape)}, config.json implies {implied}"
        elif spec.dtype not in wanted.dtypes:
            yield f"tensor {name!r} is {spec.dtype}; {', '.join(wanted.dtypes)} is read"


def _wanted(scheme: Scheme, out_features: int, in_features: int) -> dict[str, _Wanted]:
    per_word = 32 // scheme.bits
    groups = in_features // (scheme.group_size or in_features)
    out_words, in_words = -(-out_features // per_word), -(-in_features // per_word)
    index = _Wanted(("I32",), ((in_features,),), required=False)
    if scheme.packing in ("awq", "gptq"):
        weight = (in_features, out_words) if scheme.packing == "awq" else (in_words, out_features)
        wanted = {
            "qweight": _Wanted(("I32",), (weight,)),
            "qzeros": _Wanted(("I32",), ((groups, out_words),)),
            "scales": _Wanted(_FLOATS, ((groups, out_features),)),
        }
        return wanted if scheme.packing == "awq" else {**wanted, "g_idx": index}
    if scheme.packing == "packed":
        wanted = {
            "weight_packed": _Wanted(("I32",), ((out_features, in_words),)),
            "weight_scale": _Wanted(_FLOATS, ((out_features, groups),)),
            "weight_shape": _Wanted(_INDEX, ((2,),), required=False),
            "weight_g_idx": index,
        }
        if not scheme.symmetric:
            wanted["weight_zero_point"] = _Wanted(("I32",), ((out_words, groups),))
        return wanted
    if scheme.packing == "pairs":
        return {
            "weight": _Wanted(("U8",), ((out_features // 2, in_features),)),
            "weight_scale": _Wanted(_FLOATS, ((out_features, groups),)),
            "pre_quant_scale": _Wanted(_FLOATS, ((in_features,),), required=False),
        }
    one = ((), (1,), (1, 1))
    rows = ((out_features, 1), (out_features,))
    if scheme.packing == "int8":
        return {
            "weight": _Wanted(("I8",), ((out_features, in_features),)),
            "weight_scale": _Wanted(_FLOATS, rows),
        }
    wanted = {
        "weight": _Wanted(("F8_E4M3",), ((out_features, in_features),)),
        "weight_scale": _Wanted(_FLOATS, rows if scheme.rows else one),
    }
    if scheme.activations == "static":
        return {**wanted, "input_scale": _Wanted(_FLOATS, one)}
    return {**wanted, "input_scale_ub": _Wanted(("F32",), one, required=False)}
