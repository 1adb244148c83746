"""Inputs and outputs of each model against upstream's, and the names that changed with the releases."""

from __future__ import annotations

from collections.abc import Mapping

from trtbuild.migrate.findings import Findings
from trtbuild.migrate.models import Tensor, TritonModel
from trtbuild.migrate.parameters import nearest
from trtbuild.migrate.release import Release
from trtbuild.migrate.tensor_tables import INPUTS, OUTPUTS, RENAMED_TENSORS, TensorRow

# A tensor of another name is an error where C++ reads it; a Python model may have been changed to read it.
_FIXED_ROLES = ("tensorrt_llm",)
# Upstream's code of these asks for the release's names; an ensemble may call its own tensors as it likes.
_NAMED_ROLES = ("tensorrt_llm", "bls")


def check_tensors(model: TritonModel, release: Release | None, findings: Findings) -> None:
    if model.role not in INPUTS:
        return
    for kind, table, tensors in (
        ("input", INPUTS[model.role], model.inputs),
        ("output", OUTPUTS[model.role], model.outputs),
    ):
        for tensor in tensors.values():
            if tensor.name in table:
                _check_shape(model, kind, tensor, table[tensor.name], findings)
                _check_name(model, kind, tensor, tensors, release, findings)
            else:
                _check_unknown(model, kind, tensor, table, tensors, findings)
        meant = {nearest(name, table) for name in tensors if name not in table}
        for name, row in table.items():
            if row.required and name not in tensors and name not in meant:
                findings.add(
                    "error", "missing_tensor", model.file, f"{kind}.{name}", "missing",
                    f"TYPE_{row.types[0]} with {row.rank} dim(s)", f"add it; {model.name} cannot answer without it",
                )  # fmt: skip


def sound_type(model: TritonModel, kind: str, name: str) -> str | None:
    """The type of a tensor, unless it is missing, unknown, or a mistake that has its finding."""
    tensors, tables = (model.inputs, INPUTS) if kind == "input" else (model.outputs, OUTPUTS)
    tensor, row = tensors.get(name), tables.get(model.role, {}).get(name)
    return None if tensor is None or (row is not None and tensor.type not in row.types) else tensor.type


def is_missing(model: TritonModel, kind: str, name: str) -> bool:
    """Whether the model lacks a tensor that it must have, which is a finding of its own."""
    tensors, tables = (model.inputs, INPUTS) if kind == "input" else (model.outputs, OUTPUTS)
    row = tables.get(model.role, {}).get(name)
    return name not in tensors and row is not None and row.required


def _check_shape(model: TritonModel, kind: str, tensor: Tensor, row: TensorRow, findings: Findings) -> None:
    allowed = " or ".join(f"TYPE_{type_}" for type_ in row.types)
    if tensor.type is not None and tensor.type not in row.types:
        findings.add(
            "error", "tensor_type", model.file, f"{kind}.{tensor.name}", f"TYPE_{tensor.type}", allowed,
            f"write data_type: {allowed.split()[0]}", tensor.line,
        )  # fmt: skip
    if tensor.rank != row.rank:
        findings.add(
            "error", "tensor_dims", model.file, f"{kind}.{tensor.name}", f"{tensor.rank} dim(s)", f"{row.rank} dim(s)",
            "write the dims of upstream's template", tensor.line,
        )  # fmt: skip


def _check_name(
    model: TritonModel, kind: str, tensor: Tensor, tensors: Mapping[str, Tensor], release: Release | None,
    findings: Findings,
) -> None:  # fmt: skip
    """Old and new names of the same tensor, where the release is known to read the other one."""
    for old, new, last_old, first_new in RENAMED_TENSORS:
        if kind != "input" or model.role not in _NAMED_ROLES or release is None or tensor.name not in (old, new):
            continue
        right = old if release.minor < last_old else new if release.minor >= first_new else tensor.name
        if tensor.name != right and right not in tensors:
            findings.add(
                "warning", "tensor_release", model.file, f"input.{tensor.name}", tensor.name, right,
                f"rename it to {right}, which is what {release} reads; as it is, the value has no effect", tensor.line,
            )  # fmt: skip


def _check_unknown(
    model: TritonModel, kind: str, tensor: Tensor, table: Mapping[str, TensorRow], tensors: Mapping[str, Tensor],
    findings: Findings,
) -> None:  # fmt: skip
    right = nearest(tensor.name, [name for name in table if name not in tensors], 0.85)
    is_fixed = model.role in _FIXED_ROLES
    if right is not None:
        severity = "error" if is_fixed or table[right].required else "warning"
        fix = f"rename it to {right}"
    elif is_fixed:
        severity, fix = "warning", "the backend does not know it; remove it"
    else:
        return
    findings.add(
        severity, "tensor_name", model.file, f"{kind}.{tensor.name}", tensor.name, right or "a tensor of the backend",
        fix,
        tensor.line,
    )  # fmt: skip
