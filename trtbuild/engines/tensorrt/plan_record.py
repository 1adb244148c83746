"""What a compiled plan's record says: `NAME.json` beside `NAME.plan`, and the same in the engine's passport."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from trtbuild.engines.tensorrt.bindings import Binding


@dataclass(frozen=True)
class ServedSegment:
    """A segment of a rank that runs the plan."""

    rank: int
    segment: int


@dataclass(frozen=True)
class PlanRecord:
    """One compiled plan.

    phase: "prefill", "decode" or "any" (both; decoder plans then have two profiles, in that order).
    scratch_bytes: device memory of one execution context, the largest of its profiles.
    weight_bytes: weights inside the plan, by the builder's figure.
    digest: of everything that the plan follows from; a record with the same digest need not be built again.
    verification: what the plan verifier read from the plan.
    """

    name: str
    file: str
    kind: str
    phase: str
    serves: tuple[ServedSegment, ...]
    moe_form: str | None
    embedded: bool
    targets: tuple[str, ...]
    bindings: tuple[Binding, ...]
    size: int
    scratch_bytes: int
    weight_bytes: int
    build_seconds: float
    digest: str
    verification: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        data = {**asdict(self), "bindings": [binding.to_dict() for binding in self.bindings]}
        return {**data, "serves": [asdict(served) for served in self.serves], "targets": list(self.targets)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PlanRecord:
        """Inverse of `to_dict`; raises TypeError on unknown or missing fields."""
        return cls(
            **{
                **data,
                "serves": tuple(ServedSegment(**served) for served in data["serves"]),
                "targets": tuple(data["targets"]),
                "bindings": tuple(Binding.from_dict(binding) for binding in data["bindings"]),
            }
        )
