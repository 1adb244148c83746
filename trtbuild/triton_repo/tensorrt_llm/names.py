"""Names of an engine's five models, so that several engines can live in one repository."""

from __future__ import annotations

from trtbuild.triton_repo.tensorrt_llm.tensors import ROLES, ModelRole
from trtbuild.workspace import check_name


class ModelNames(dict[ModelRole, str]):
    """Upstream's own names, or PREFIX_preprocessing and so on; by role."""

    def __init__(self, prefix: str | None = None) -> None:
        super().__init__((role, check_name(f"{prefix}_{role}") if prefix else role) for role in ROLES)
